/// \file
/// \brief PyTorch's stable C interface, as far as it is called here. Not an interface of ours.
///
/// These are functions of libtorch that PyTorch declares in torch/csrc/stable/c/shim.h and promises not to change. They
/// are declared once more, and found by their names when bnbp.torch is imported, so that PyTorch is not needed to
/// compile this and one build serves every PyTorch from 2.10 on.
#ifndef BNBP_TORCH_SHIM_H
#define BNBP_TORCH_SHIM_H

#include <cstddef>
#include <cstdint>

namespace bnbp {
namespace torch {

/// An argument or a result on PyTorch's stack: a number, or a pointer to what is larger.
using Value = std::uint64_t;
/// A reference to a tensor, which somebody owns.
using TensorHandle = struct AtenTensorOpaque*;
using LibraryHandle = struct TorchLibraryOpaque*;
using ListHandle = struct StableListOpaque*;
using StringHandle = struct StringOpaque*;
/// A kernel: the arguments are on the stack, and its results take their place. It owns what it finds there.
using BoxedKernel = void (*)(Value* stack, std::uint64_t arguments, std::uint64_t results);
/// 0, unless the function has failed.
using Status = std::int32_t;

/// The version that this was written for, in PyTorch's encoding: 2.10.
constexpr std::uint64_t VERSION = 2ull << 56 | 10ull << 48;

/// Each function's type and name.
#define BNBP_TORCH_FUNCTIONS(F)                                                                                        \
    F(Status, aoti_torch_library_init_impl, (const char*, const char*, const char*, std::uint32_t, LibraryHandle*))    \
    F(Status, torch_library_impl, (LibraryHandle, const char*, BoxedKernel, std::uint64_t))                            \
    F(Status, aoti_torch_new_tensor_handle, (TensorHandle, TensorHandle*))                                             \
    F(Status, aoti_torch_delete_tensor_object, (TensorHandle))                                                         \
    F(Status, aoti_torch_get_dtype, (TensorHandle, std::int32_t*))                                                     \
    F(Status, aoti_torch_get_dim, (TensorHandle, std::int64_t*))                                                       \
    F(Status, aoti_torch_get_sizes, (TensorHandle, std::int64_t**))                                                    \
    F(Status, aoti_torch_get_strides, (TensorHandle, std::int64_t**))                                                  \
    F(Status, torch_get_const_data_ptr, (TensorHandle, const void**))                                                  \
    F(Status, torch_get_mutable_data_ptr, (TensorHandle, void**))                                                      \
    F(Status, aoti_torch_empty_strided,                                                                                \
      (std::int64_t, const std::int64_t*, const std::int64_t*, std::int32_t, std::int32_t, std::int32_t,               \
       TensorHandle*))                                                                                                 \
    F(Status, torch_list_size, (ListHandle, std::size_t*))                                                             \
    F(Status, torch_list_get_item, (ListHandle, std::size_t, Value*))                                                  \
    F(Status, torch_delete_list, (ListHandle))                                                                         \
    F(Status, torch_string_c_str, (StringHandle, const char**))                                                        \
    F(Status, torch_delete_string, (StringHandle))                                                                     \
    F(Status, torch_get_num_threads, (std::uint32_t*))                                                                 \
    F(std::int32_t, aoti_torch_dtype_float16, ())                                                                      \
    F(std::int32_t, aoti_torch_dtype_bfloat16, ())                                                                     \
    F(std::int32_t, aoti_torch_dtype_float32, ())                                                                      \
    F(std::int32_t, aoti_torch_dtype_float64, ())                                                                      \
    F(std::int32_t, aoti_torch_device_type_cpu, ())

/// The functions themselves, once they are found.
struct Shim {
#define BNBP_TORCH_MEMBER(result, name, parameters) result(*name) parameters = nullptr;
    BNBP_TORCH_FUNCTIONS(BNBP_TORCH_MEMBER)
#undef BNBP_TORCH_MEMBER
};

} // namespace torch
} // namespace bnbp

#endif // BNBP_TORCH_SHIM_H
