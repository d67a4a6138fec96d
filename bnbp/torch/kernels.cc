/// \file
/// \brief bnbp's operators as kernels of PyTorch's dispatcher, for tensors in the CPU's memory.
///
/// A kernel takes its arguments from PyTorch's stack, in the order of the schemas in _operators.py: the operator's
/// tensors, in the order of its signature, and then its attributes. They become the views of a detail::Call, which has
/// the rules, as they do at the boundary to NumPy; the outputs are PyTorch's own tensors. No kernel holds the GIL.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstring>
#include <forward_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "bnbp/batch_norm.hpp"
#include "shim.h"

namespace bnbp {
namespace torch {
namespace {

using namespace bnbp::detail;

Shim shim;

void must(Status status, const char* function) {
    if (status) {
        throw std::runtime_error(std::string("bnbp: PyTorch's function ") + function + " has failed");
    }
}
#define BNBP_MUST(name, ...) must(shim.name(__VA_ARGS__), #name)

/// A tensor of PyTorch's that is released at the end.
class Owned {
public:
    Owned() = default;
    explicit Owned(TensorHandle handle) : handle_(handle) {}
    Owned(const Owned&) = delete;
    Owned& operator=(const Owned&) = delete;
    ~Owned() { reset(nullptr); }

    TensorHandle get() const { return handle_; }
    TensorHandle release() {
        TensorHandle handle = handle_;
        handle_ = nullptr;
        return handle;
    }
    void reset(TensorHandle handle) {
        if (handle_) {
            shim.aoti_torch_delete_tensor_object(handle_);
        }
        handle_ = handle;
    }

private:
    TensorHandle handle_ = nullptr;
};

/// The arguments, taken one after the other. What is behind a pointer belongs to the taker.
class Arguments {
public:
    explicit Arguments(const Value* stack) : next_(stack) {}

    void tensor(Owned& owned) { owned.reset(reinterpret_cast<TensorHandle>(*next_++)); }
    void optional_tensor(Owned& owned) {
        Value value = 0;
        if (optional(value)) {
            owned.reset(reinterpret_cast<TensorHandle>(value));
        }
    }
    double number() {
        double result;
        std::memcpy(&result, next_++, sizeof result);
        return result;
    }
    std::int64_t integer() { return static_cast<std::int64_t>(*next_++); }
    bool truth() { return (*next_++ & 0xff) != 0; }

    Activation activation() {
        Value value = 0;
        if (!optional(value)) {
            return Activation::none;
        }
        const StringHandle string = reinterpret_cast<StringHandle>(value);
        const char* text = nullptr;
        std::string name;
        if (!shim.torch_string_c_str(string, &text)) {
            name = text;
        }
        shim.torch_delete_string(string);
        if (name == "relu") {
            return Activation::relu;
        }
        if (name == "relu6") {
            return Activation::relu6;
        }
        throw ValueError("activation: expected None, \"relu\" or \"relu6\", got \"" + name + "\"");
    }

    /// A bit for each output that is wanted.
    unsigned mask(std::size_t outputs) {
        const ListHandle list = reinterpret_cast<ListHandle>(*next_++);
        std::size_t size = 0;
        unsigned bits = 0;
        Status status = shim.torch_list_size(list, &size);
        for (std::size_t k = 0; !status && k < size && k < outputs; ++k) {
            Value item = 0;
            status = shim.torch_list_get_item(list, k, &item);
            bits |= static_cast<unsigned>((item & 0xff) != 0) << k;
        }
        shim.torch_delete_list(list);
        must(status, "torch_list_get_item");
        return bits;
    }

private:
    const Value* next_;

    bool optional(Value& value) {
        Value* const box = reinterpret_cast<Value*>(*next_++);
        if (!box) {
            return false;
        }
        value = *box;
        delete box; // as PyTorch's own header does
        return true;
    }
};

ElementType element_type(std::int32_t dtype) {
    static const std::int32_t known[] = {shim.aoti_torch_dtype_float16(), shim.aoti_torch_dtype_bfloat16(),
                                         shim.aoti_torch_dtype_float32(), shim.aoti_torch_dtype_float64()};
    static const ElementType types[] = {ElementType::f16, ElementType::bf16, ElementType::f32, ElementType::f64};
    for (int k = 0; k < 4; ++k) {
        if (known[k] == dtype) {
            return types[k];
        }
    }
    return ElementType::other;
}

std::int32_t dtype_of(ElementType type) {
    return type == ElementType::f16    ? shim.aoti_torch_dtype_float16()
           : type == ElementType::bf16 ? shim.aoti_torch_dtype_bfloat16()
           : type == ElementType::f32  ? shim.aoti_torch_dtype_float32()
                                       : shim.aoti_torch_dtype_float64();
}

/// The operands' views, with strides in bytes.
class Operands {
public:
    View inputs[MOST_INPUTS], outputs[MOST_OUTPUTS];

    void describe(View& view, TensorHandle tensor, bool writable) {
        std::int32_t dtype = 0;
        std::int64_t rank = 0, *sizes = nullptr, *strides = nullptr;
        BNBP_MUST(aoti_torch_get_dtype, tensor, &dtype);
        BNBP_MUST(aoti_torch_get_dim, tensor, &rank);
        BNBP_MUST(aoti_torch_get_sizes, tensor, &sizes);
        BNBP_MUST(aoti_torch_get_strides, tensor, &strides);
        view.element_type = element_type(dtype);
        view.rank = view.stride_count = static_cast<std::size_t>(rank);
        view.shape = sizes;
        view.writable = writable;
        if (view.element_type == ElementType::other) {
            view.type_name = "another type";
            view.stride_count = 0;
            return;
        }
        std::int64_t* const bytes = room(view.rank);
        for (std::size_t axis = 0; axis < view.rank; ++axis) {
            bytes[axis] = strides[axis] * item_size(view.element_type);
        }
        view.strides = bytes;
        if (writable) {
            BNBP_MUST(torch_get_mutable_data_ptr, tensor, &view.data);
        } else {
            const void* data = nullptr;
            BNBP_MUST(torch_get_const_data_ptr, tensor, &data);
            view.data = const_cast<void*>(data);
        }
    }

    /// A new tensor of the input's shape and type in the memory format that PyTorch gives its own results: channels
    /// last if the input is, or else contiguous. What is both, for want of axes longer than 1, is contiguous after the
    /// forward operators, and what its strides suggest after the gradients.
    void new_tensor(Owned& owned, bool forward) {
        const View& input = inputs[0];
        std::int64_t* const strides = room(input.rank);
        const bool last = !(forward && is_contiguous(input)) && is_channels_last(input);
        std::int64_t step = 1;
        if (last) {
            strides[1] = 1;
            step = input.shape[1];
        }
        for (std::size_t axis = input.rank; axis-- > 0;) {
            if (last && axis == 1) {
                continue;
            }
            strides[axis] = step;
            step *= input.shape[axis] > 1 ? input.shape[axis] : 1;
        }
        make(owned, static_cast<std::int64_t>(input.rank), input.shape, strides, input.element_type);
    }

    static void make(Owned& owned, std::int64_t rank, const std::int64_t* sizes, const std::int64_t* strides,
                     ElementType type) {
        TensorHandle handle = nullptr;
        BNBP_MUST(aoti_torch_empty_strided, rank, sizes, strides, dtype_of(type), shim.aoti_torch_device_type_cpu(), 0,
                  &handle);
        owned.reset(handle);
    }

private:
    enum { ROOM = 64 };
    std::int64_t room_[ROOM];
    std::size_t used_ = 0;
    std::forward_list<std::vector<std::int64_t>> more_;

    std::int64_t* room(std::size_t count) {
        if (count <= ROOM - used_) {
            used_ += count;
            return room_ + used_ - count;
        }
        return more_.emplace_front(count).data();
    }

    /// What PyTorch's `is_channels_last_strides_2d` and `_3d` say: four or five axes, the channels' stride the
    /// smallest, then the last axis's and on to the first. An axis of length 1 has any stride, but where all of
    /// channels, height and width have length 1 the tensor counts as contiguous.
    static bool is_channels_last(const View& view) {
        if (view.rank != 4 && view.rank != 5) {
            return false;
        }
        std::int64_t least = 0;
        if (view.strides[1] == 0) {
            return false;
        }
        std::size_t order[] = {1, view.rank - 1, view.rank - 2, view.rank - 3, 0};
        order[view.rank - 1] = 0;
        for (std::size_t k = 0; k < view.rank; ++k) {
            const std::size_t axis = order[k];
            const std::int64_t length = view.shape[axis], stride = view.strides[axis];
            if (length == 0 || stride < least) {
                return false;
            }
            if (axis == 0 && least == view.strides[1]) {
                return false;
            }
            least = stride * (length > 1 ? length : 1);
        }
        return true;
    }
};

/// What a schema has after an operator's tensors.
struct Attribute {
    enum Kind { none, epsilon, activation, addend, output_mask, count };
};

/// Compute an operator. `attributes` are those of its schema, in their order.
void run(const Signature& signature, const Attribute::Kind* attributes, Value* stack) {
    Owned owned[MOST_INPUTS], results[MOST_OUTPUTS];
    Operands operands;
    Arguments arguments(stack);
    Call call;
    call.attributes.signature = &signature;
    unsigned mask = ~0u;
    for (std::size_t k = 0; k < signature.input_count; ++k) {
        const Role role = spec_of(signature.inputs[k]).role;
        if (k < signature.required && role != Role::parameter) {
            arguments.tensor(owned[k]);
        } else {
            arguments.optional_tensor(owned[k]);
        }
    }
    double epsilon = 0;
    std::int64_t count = -1;
    for (; *attributes != Attribute::none; ++attributes) {
        switch (*attributes) {
        case Attribute::epsilon:
            epsilon = arguments.number();
            break;
        case Attribute::activation:
            call.attributes.activation = arguments.activation();
            break;
        case Attribute::addend:
            call.attributes.addend = arguments.truth();
            break;
        case Attribute::output_mask:
            mask = arguments.mask(MOST_OUTPUTS);
            break;
        default:
            count = arguments.integer();
        }
    }
    call.attributes.set_epsilon(epsilon);
    if (count >= 0) {
        call.attributes.set_count(count);
    }
    if (signature.takes(Operand::addend)) {
        call.attributes.addend = owned[signature.find(Operand::addend)].get() != nullptr;
    }
    for (std::size_t k = 0; k < signature.input_count; ++k) {
        if (owned[k].get()) {
            operands.describe(operands.inputs[k], owned[k].get(), false);
        }
    }
    call.check_inputs(operands.inputs, signature.input_count);
    for (std::size_t k = 0; k < signature.output_count; ++k) {
        if (k >= call.output_count() || !(mask >> k & 1)) {
            const std::int64_t nothing = 0, step = 1;
            const ElementType type = k < call.output_count() ? call.output_type(k) : operands.inputs[0].element_type;
            Operands::make(results[k], 1, &nothing, &step, type);
            continue;
        }
        if (call.is_tensor(k)) {
            operands.new_tensor(results[k], signature.outputs[k].slot == &bnbp_arguments::normalized);
        } else {
            const std::int64_t channels = call.channels(), step = 1;
            Operands::make(results[k], 1, &channels, &step, call.output_type(k));
        }
        operands.describe(operands.outputs[k], results[k].get(), true);
    }
    call.check_outputs(operands.outputs, call.output_count());
    std::uint32_t threads = 1;
    BNBP_MUST(torch_get_num_threads, &threads);
    call.run(kernel_table(), static_cast<int>(threads));
    for (std::size_t k = 0; k < signature.output_count; ++k) {
        stack[k] = reinterpret_cast<Value>(results[k].release());
    }
}

using A = Attribute;

/// One of PyTorch's kernels: an operator and the attributes of its schema.
template <const Signature& (*signature)(), Attribute::Kind... attributes>
void boxed(Value* stack, std::uint64_t, std::uint64_t) {
    static constexpr Attribute::Kind order[] = {attributes..., Attribute::none};
    run(signature(), order, stack);
}

/// The kernels, under the names of the schemas.
const struct {
    const char* name;
    BoxedKernel kernel;
} KERNELS[] = {
    {"batch_norm_training", boxed<training_signature, A::epsilon, A::activation>},
    {"batch_norm_training_statistics", boxed<training_statistics_signature>},
    {"batch_norm_inference", boxed<inference_signature, A::epsilon, A::activation>},
    {"batch_norm_training_backprop",
     boxed<training_backprop_signature, A::epsilon, A::activation, A::addend, A::output_mask>},
    {"batch_norm_inference_backprop",
     boxed<inference_backprop_signature, A::epsilon, A::activation, A::addend, A::output_mask>},
    {"batch_norm_training_backprop_reduce",
     boxed<training_backprop_reduce_signature, A::epsilon, A::activation, A::addend>},
    {"batch_norm_training_backprop_apply",
     boxed<training_backprop_apply_signature, A::count, A::epsilon, A::activation, A::addend, A::output_mask>},
};

/// Find PyTorch's functions: `addresses` has one for each name.
bool find_functions(PyObject* addresses) {
#define BNBP_TORCH_FIND(result, name, parameters)                                                                      \
    {                                                                                                                  \
        PyObject* const address = PyDict_GetItemString(addresses, #name); /* borrowed */                               \
        void* const place = address ? PyLong_AsVoidPtr(address) : nullptr;                                             \
        if (!place) {                                                                                                  \
            if (!PyErr_Occurred()) {                                                                                   \
                PyErr_SetString(PyExc_KeyError, #name);                                                                \
            }                                                                                                          \
            return false;                                                                                              \
        }                                                                                                              \
        std::memcpy(&shim.name, &place, sizeof place);                                                                 \
    }
    BNBP_TORCH_FUNCTIONS(BNBP_TORCH_FIND)
#undef BNBP_TORCH_FIND
    return true;
}

PyObject* register_kernels(PyObject*, PyObject* addresses) {
    if (!PyDict_Check(addresses)) {
        PyErr_SetString(PyExc_TypeError, "addresses: expected a dict");
        return nullptr;
    }
    if (!import_kernels() || !find_functions(addresses)) {
        return nullptr;
    }
    try {
        LibraryHandle library = nullptr; // never deleted: it would take the kernels with it
        BNBP_MUST(aoti_torch_library_init_impl, "bnbp", "CPU", __FILE__, __LINE__, &library);
        for (const auto& each : KERNELS) {
            BNBP_MUST(torch_library_impl, library, each.name, each.kernel, VERSION);
        }
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_ImportError, error.what());
        return nullptr;
    }
    Py_RETURN_NONE;
}

#define BNBP_TORCH_NAME(result, name, parameters) #name,
const char* const FUNCTIONS[] = {BNBP_TORCH_FUNCTIONS(BNBP_TORCH_NAME)};
#undef BNBP_TORCH_NAME

PyObject* function_names(PyObject*, PyObject*) {
    PyObject* const names = PyTuple_New(sizeof FUNCTIONS / sizeof *FUNCTIONS);
    for (Py_ssize_t k = 0; names && k < PyTuple_Size(names); ++k) {
        PyTuple_SetItem(names, k, PyUnicode_FromString(FUNCTIONS[k]));
    }
    return names;
}

PyMethodDef methods[] = {
    {"function_names", function_names, METH_NOARGS, "The names of PyTorch's functions that the kernels call."},
    {"register_kernels", register_kernels, METH_O, "Register the kernels; takes a dict of the functions' addresses."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef_Slot slots[] = {{0, nullptr}};
PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "bnbp.torch.kernels", nullptr, 0, methods, slots, nullptr, nullptr, nullptr};

} // namespace
} // namespace torch
} // namespace bnbp

PyMODINIT_FUNC PyInit_kernels() { return PyModuleDef_Init(&bnbp::torch::module); }
