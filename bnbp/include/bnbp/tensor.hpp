/// \file
/// \brief Tensors as C++ callers describe them, and the errors that the operators throw.
#ifndef BNBP_TENSOR_HPP
#define BNBP_TENSOR_HPP

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

/// \brief Batch normalisation operators.
namespace bnbp {

/// \brief An argument has a type that the operator does not take. Python's `TypeError`.
class TypeError : public std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

/// \brief An argument has the right type and a value, shape or memory that the operator does not take. Python's
/// `ValueError`.
class ValueError : public std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

/// \brief A call was ended early, and its outputs are partly written. This happens only to calls from Python.
class Interrupted : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// \brief The type of a tensor's elements.
enum class ElementType {
    none,  ///< There is no tensor: an optional input left out, or an output not asked for.
    f16,   ///< IEEE 754 binary16, NumPy's `float16`.
    bf16,  ///< The first half of a binary32, `bfloat16` of the package ml_dtypes.
    f32,   ///< IEEE 754 binary32, NumPy's `float32`.
    f64,   ///< IEEE 754 binary64, NumPy's `float64`.
    other, ///< A type that no operator takes; Tensor::type_name says which.
};

/// \brief The activation that is applied to the output of a forward operator.
enum class Activation {
    none,  ///< Nothing.
    relu,  ///< max(y, 0); NaN stays NaN.
    relu6, ///< min(max(y, 0), 6); NaN stays NaN.
};

/// \brief The lengths of a tensor's axes, outermost first.
using Shape = std::vector<std::int64_t>;

/// \brief The distances in bytes from one element to the next along each axis.
using Strides = std::vector<std::int64_t>;

/// \brief A view of a tensor in memory that the caller owns.
///
/// If `data` is null, it is a type and a shape alone. op::BatchNormBase::validate_and_infer_types looks at nothing
/// else. A default-constructed Tensor stands for "none".
struct Tensor {
    /// \brief The type of the elements.
    ElementType element_type = ElementType::none;
    /// \brief The lengths of the axes.
    Shape shape;
    /// \brief The first element; need not be aligned.
    void* data = nullptr;
    /// \brief Byte strides, of any sign or 0; empty means C-contiguous.
    Strides strides;
    /// \brief Whether an operator may write to `data`.
    bool writable = false;
    /// \brief The name of a type that is ElementType::other, for the error message.
    std::string type_name;

    /// \brief No tensor.
    Tensor() = default;
    /// \brief A type and a shape without memory.
    /// \param type the type of the elements
    /// \param lengths the lengths of the axes
    Tensor(ElementType type, Shape lengths) : element_type(type), shape(std::move(lengths)) {}
    /// \brief A C-contiguous tensor of any type that may be written to.
    /// \param type the type of the elements
    /// \param memory the first element
    /// \param lengths the lengths of the axes
    Tensor(ElementType type, void* memory, Shape lengths)
        : element_type(type), shape(std::move(lengths)), data(memory), writable(true) {}
    /// \brief A C-contiguous tensor of any type that is only read.
    /// \copydetails Tensor(ElementType, void*, Shape)
    Tensor(ElementType type, const void* memory, Shape lengths)
        : element_type(type), shape(std::move(lengths)), data(const_cast<void*>(memory)) {}
    /// \brief A C-contiguous tensor that may be written to.
    /// \param memory the first element
    /// \param lengths the lengths of the axes
    Tensor(float* memory, Shape lengths) : Tensor(ElementType::f32, memory, std::move(lengths)) {}
    /// \copydoc Tensor(float*, Shape)
    Tensor(double* memory, Shape lengths) : Tensor(ElementType::f64, memory, std::move(lengths)) {}
    /// \brief A C-contiguous tensor that is only read.
    /// \param memory the first element
    /// \param lengths the lengths of the axes
    Tensor(const float* memory, Shape lengths) : Tensor(ElementType::f32, memory, std::move(lengths)) {}
    /// \copydoc Tensor(const float*, Shape)
    Tensor(const double* memory, Shape lengths) : Tensor(ElementType::f64, memory, std::move(lengths)) {}

    /// \brief Whether there is a tensor at all.
    /// \return false for the tensor that stands for "none"
    bool present() const { return element_type != ElementType::none; }
};

} // namespace bnbp

#endif // BNBP_TENSOR_HPP
