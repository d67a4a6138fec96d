/// \file
/// \brief The batch normalisation operators for C++ callers, and the one place where their rules live.
///
/// The classes follow nGraph's: an operator holds its attributes, `validate_and_infer_types` checks the inputs
/// and says what the outputs will be, `evaluate` computes them. bnbp's Python functions call these classes too,
/// so both languages refuse the same things with the same words.
///
/// The kernels come from the installed Python package, through the table in kernels.h. Include `Python.h` before
/// this header and call bnbp::import_kernels once, from an extension module or an embedded interpreter;
/// `evaluate` itself needs no GIL. C++17.
#ifndef BNBP_BATCH_NORM_HPP
#define BNBP_BATCH_NORM_HPP

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bnbp/kernels.h"

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

/// \brief A call was ended early, and its outputs are partly written. Only calls that come from Python are.
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

/// \brief The lengths of a tensor's axes, outermost first.
using Shape = std::vector<std::int64_t>;

/// \brief The distances in bytes from one element to the next along each axis.
using Strides = std::vector<std::int64_t>;

/// \brief A view of a tensor that lives in somebody else's memory.
///
/// With `data` left null it is a type and a shape alone, which is all that
/// op::BatchNormBase::validate_and_infer_types looks at. A default-constructed Tensor stands for "none".
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

/// \cond internal
// Keeps a function's static variables to the library that it is compiled into. They would otherwise be one for the
// whole process, shared between extensions that were compiled against different versions of this header.
#if defined(__GNUC__)
#define BNBP_OWN __attribute__((visibility("hidden")))
#else
#define BNBP_OWN
#endif

namespace detail {

BNBP_OWN inline bnbp_kernels*& kernel_table() {
    static bnbp_kernels* table = nullptr;
    return table;
}

inline bool is_half(ElementType type) { return type == ElementType::f16 || type == ElementType::bf16; }

inline std::int64_t item_size(ElementType type) { return is_half(type) ? 2 : type == ElementType::f32 ? 4 : 8; }

inline bnbp_type kernel_type(ElementType type) {
    switch (type) {
    case ElementType::f16:
        return BNBP_F16;
    case ElementType::bf16:
        return BNBP_BF16;
    case ElementType::f64:
        return BNBP_F64;
    default:
        return BNBP_F32;
    }
}

inline std::string name_of(ElementType type) {
    switch (type) {
    case ElementType::none:
        return "None";
    case ElementType::f16:
        return "float16";
    case ElementType::bf16:
        return "bfloat16";
    case ElementType::f32:
        return "float32";
    case ElementType::f64:
        return "float64";
    case ElementType::other:
        break;
    }
    return "an unknown type";
}

inline std::string name_of(const Tensor& tensor) {
    return tensor.type_name.empty() ? name_of(tensor.element_type) : tensor.type_name;
}

/// A shape as Python writes it: (), (3,), (4, 3, 2, 2).
inline std::string text_of(const Shape& shape) {
    std::string text = "(";
    for (std::size_t axis = 0; axis < shape.size(); ++axis) {
        text += (axis ? ", " : "") + std::to_string(shape[axis]);
    }
    return text + (shape.size() == 1 ? ",)" : ")");
}

inline std::int64_t product(Shape::const_iterator first, Shape::const_iterator last) {
    return std::accumulate(first, last, std::int64_t{1}, std::multiplies<std::int64_t>());
}

inline bool is_empty(const Tensor& tensor) {
    return std::find(tensor.shape.begin(), tensor.shape.end(), 0) != tensor.shape.end();
}

inline Strides contiguous_strides(const Tensor& tensor) {
    Strides strides(tensor.shape.size());
    std::int64_t step = item_size(tensor.element_type);
    for (std::size_t axis = strides.size(); axis-- > 0; step *= tensor.shape[axis]) {
        strides[axis] = step;
    }
    return strides;
}

inline Strides strides_of(const Tensor& tensor) {
    return tensor.strides.empty() ? contiguous_strides(tensor) : tensor.strides;
}

/// Whether the elements lie in C order without gaps; the stride of an axis of length 1 says nothing.
inline bool is_contiguous(const Tensor& tensor) {
    if (tensor.strides.empty() || is_empty(tensor)) {
        return true;
    }
    std::int64_t step = item_size(tensor.element_type);
    for (std::size_t axis = tensor.shape.size(); axis-- > 0; step *= tensor.shape[axis]) {
        if (tensor.shape[axis] != 1 && tensor.strides[axis] != step) {
            return false;
        }
    }
    return true;
}

inline bool is_aligned(const Tensor& tensor) {
    return reinterpret_cast<std::uintptr_t>(tensor.data) %
               static_cast<std::uintptr_t>(item_size(tensor.element_type)) ==
           0;
}

/// The same element at the same place: an output that is an input, not one that merely overlaps it.
inline bool is_same_memory(const Tensor& a, const Tensor& b) {
    return a.data == b.data && a.element_type == b.element_type && a.shape == b.shape && strides_of(a) == strides_of(b);
}

/// Whether two tensors have a byte in common: whether `sum x_k step_k = target` has a solution with
/// `0 <= x_k <= most_k`, which is a bounded Diophantine equation. What is left of the target is cut off at every
/// step by the largest sum and by the common divisor of the remaining terms, so that the strides of real arrays
/// need a few dozen steps. Past the budget the answer is the cautious one.
class Overlap {
public:
    /// The first byte and the one after the last; equal for tensors without elements.
    struct Extent {
        std::intptr_t low, high;
    };
    static Extent extent_of(const Tensor& tensor) {
        Extent extent{reinterpret_cast<std::intptr_t>(tensor.data), reinterpret_cast<std::intptr_t>(tensor.data)};
        if (!tensor.present() || is_empty(tensor)) {
            return extent;
        }
        std::int64_t step = item_size(tensor.element_type);
        extent.high += static_cast<std::intptr_t>(step);
        for (std::size_t axis = tensor.shape.size(); axis-- > 0; step *= tensor.shape[axis]) {
            const std::int64_t reach =
                (tensor.shape[axis] - 1) * (tensor.strides.empty() ? step : tensor.strides[axis]);
            (reach < 0 ? extent.low : extent.high) += static_cast<std::intptr_t>(reach);
        }
        return extent;
    }

    static bool between(const Tensor& a, const Extent& extent_a, const Tensor& b, const Extent& extent_b) {
        return std::max(extent_a.low, extent_b.low) < std::min(extent_a.high, extent_b.high) && between(a, b);
    }

    /// Whether two elements of one tensor have a byte in common.
    static bool within(const Tensor& tensor) {
        if (is_contiguous(tensor)) {
            return false;
        }
        std::vector<Term> axes;
        for (std::size_t axis = 0; axis < tensor.shape.size(); ++axis) {
            if (tensor.shape[axis] > 1) {
                axes.push_back({std::abs(tensor.strides[axis]), tensor.shape[axis] - 1, 0, 0});
            }
        }
        std::sort(axes.begin(), axes.end(), [](const Term& a, const Term& b) { return a.step < b.step; });
        const std::int64_t size = item_size(tensor.element_type);
        std::int64_t reach = size;
        bool apart = true; // each step leads past all that the smaller ones reach
        for (const Term& axis : axes) {
            if (axis.step == 0) {
                return true;
            }
            apart = apart && axis.step >= reach;
            reach += axis.step * axis.most;
        }
        // Otherwise: whether any two indices, which differ by 1 or more along axis k, are less than `size` bytes apart.
        for (std::size_t k = 0; !apart && k < axes.size(); ++k) {
            Overlap search;
            std::int64_t target = size - 1 - axes[k].step;
            for (std::size_t j = 0; j < axes.size(); ++j) {
                const std::int64_t most = j == k ? axes[j].most - 1 : 2 * axes[j].most;
                target += j == k ? 0 : axes[j].step * axes[j].most;
                if (most) {
                    search.terms_.push_back({axes[j].step, most, 0, 0});
                }
            }
            search.terms_.push_back({1, 2 * (size - 1), 0, 0});
            if (search.solve(target)) {
                return true;
            }
        }
        return false;
    }

private:
    static bool between(const Tensor& a, const Tensor& b) {
        Overlap search;
        std::int64_t reach_a = 0, reach_b = 0;
        const std::int64_t low_a = search.add(a, reach_a), low_b = search.add(b, reach_b);
        // low_a + (a's offset) = low_b + reach_b - (b's offset, counted down)
        return search.solve(low_b - low_a + reach_b);
    }

    struct Term {
        std::int64_t step, most, reach, divisor; // the last two: of this term and all after it
    };
    std::vector<Term> terms_;
    int budget_ = 100000;

    std::int64_t add(const Tensor& tensor, std::int64_t& reach) {
        std::int64_t low = static_cast<std::int64_t>(reinterpret_cast<std::intptr_t>(tensor.data));
        const Strides strides = strides_of(tensor);
        for (std::size_t axis = 0; axis < strides.size(); ++axis) {
            const std::int64_t most = tensor.shape[axis] - 1, step = most ? std::abs(strides[axis]) : 0;
            low += std::min<std::int64_t>(strides[axis], 0) * most;
            reach += step * most;
            if (step * most != 0) {
                terms_.push_back({step, most, 0, 0});
            }
        }
        terms_.push_back({1, item_size(tensor.element_type) - 1, 0, 0});
        reach += terms_.back().most;
        return low;
    }

    bool solve(std::int64_t target) {
        std::sort(terms_.begin(), terms_.end(), [](const Term& a, const Term& b) { return a.step > b.step; });
        std::vector<Term> merged;
        for (const Term& term : terms_) {
            if (!merged.empty() && merged.back().step == term.step) {
                merged.back().most += term.most;
            } else {
                merged.push_back(term);
            }
        }
        terms_ = std::move(merged);
        std::int64_t reach = 0, divisor = 0;
        for (std::size_t k = terms_.size(); k-- > 0;) {
            terms_[k].reach = reach += terms_[k].step * terms_[k].most;
            terms_[k].divisor = divisor = std::gcd(divisor, terms_[k].step);
        }
        return target >= 0 && solve_from(0, target);
    }

    bool solve_from(std::size_t k, std::int64_t target) {
        if (target == 0 || --budget_ < 0) {
            return true;
        }
        if (k == terms_.size() || target > terms_[k].reach || target % terms_[k].divisor != 0) {
            return false;
        }
        const Term& term = terms_[k];
        const std::int64_t rest = term.reach - term.step * term.most;
        const std::int64_t least = target > rest ? (target - rest + term.step - 1) / term.step : 0;
        for (std::int64_t x = std::min(term.most, target / term.step); x >= least; --x) {
            if (solve_from(k + 1, target - x * term.step)) {
                return true;
            }
        }
        return false;
    }
};

/// The memory of a vector as the kernels take it, contiguous and aligned: its own, or a copy.
class Packed {
public:
    explicit Packed(const Tensor& vector) : vector_(vector) {
        if (vector.present() && !(is_contiguous(vector) && is_aligned(vector))) {
            copy_.resize(static_cast<std::size_t>(vector.shape[0] * item_size(vector.element_type)));
        }
    }
    void* data() {
        if (!vector_.present()) {
            return nullptr; // whatever it points to
        }
        return copy_.empty() ? vector_.data : copy_.data();
    }
    void read() {
        walk([](char* packed, char* strided, std::size_t size) { std::memcpy(packed, strided, size); });
    }
    void write() {
        walk([](char* packed, char* strided, std::size_t size) { std::memcpy(strided, packed, size); });
    }

private:
    const Tensor& vector_;
    std::vector<char> copy_; // of operator new, so aligned for every element type

    template <typename Move> void walk(Move move) {
        if (copy_.empty()) {
            return;
        }
        const std::int64_t size = item_size(vector_.element_type), step = strides_of(vector_)[0];
        for (std::int64_t i = 0; i < vector_.shape[0]; ++i) {
            move(copy_.data() + i * size, static_cast<char*>(vector_.data) + i * step, static_cast<std::size_t>(size));
        }
    }
};

/// The tensors of a call as (n, c, s), in the order of the input's memory: axes from the largest stride to the
/// smallest. Tensors that are dense in that order need no strides. If one is not, all have them, along as few axes as
/// describe them all.
class Layout {
public:
    /// Adds a tensor, the input first, and says where its strides will go.
    void add(const Tensor& tensor, const std::ptrdiff_t* bnbp_arguments::* slot) {
        operands_[count_++] = {&tensor, slot, {}, {}};
    }

    /// Fills in the arguments, which may point into this object then.
    void describe(std::size_t channel_axis, bnbp_arguments& arguments) {
        const Tensor& input = *operands_[0].tensor;
        arguments.c = static_cast<std::ptrdiff_t>(input.shape[channel_axis]);
        if (is_empty(input)) { // n = s = 0, whatever the other axes' product would overflow to
            return;
        }
        if (std::all_of(begin(), end(), [](const Operand& operand) {
                return is_contiguous(*operand.tensor) && is_aligned(*operand.tensor);
            })) {
            const auto axis = input.shape.begin() + static_cast<std::ptrdiff_t>(channel_axis);
            arguments.n = static_cast<std::ptrdiff_t>(product(input.shape.begin(), axis));
            arguments.s = static_cast<std::ptrdiff_t>(product(axis + 1, input.shape.end()));
            if (arguments.c == 1) { // as memory_order has it
                arguments.s *= std::exchange(arguments.n, 1);
            }
            return;
        }
        for (Operand& operand : *this) {
            operand.strides = strides_of(*operand.tensor);
        }
        const std::vector<std::size_t> order = memory_order(channel_axis);
        fold(order, channel_axis, arguments);
        if (!std::all_of(begin(), end(), [&](const Operand& operand) { return is_dense(operand, order); })) {
            lengths_.push_back(arguments.c); // last, and so that there is one
            arguments.lengths = lengths_.data();
            for (Operand& operand : *this) {
                operand.steps.push_back(static_cast<std::ptrdiff_t>(operand.strides[channel_axis]));
                arguments.*(operand.slot) = operand.steps.data();
            }
        }
    }

private:
    struct Operand {
        const Tensor* tensor;
        const std::ptrdiff_t* bnbp_arguments::* slot;
        Strides strides;                   // of the tensor's own axes
        std::vector<std::ptrdiff_t> steps; // of the folded axes
    };
    Operand operands_[3];
    std::size_t count_ = 0;
    std::vector<std::ptrdiff_t> lengths_;

    Operand* begin() { return operands_; }
    Operand* end() { return operands_ + count_; }

    /// The axes from the input's largest stride to its smallest. A single channel may stand anywhere: first, so that
    /// all other axes are together.
    std::vector<std::size_t> memory_order(std::size_t channel_axis) const {
        const Shape& shape = operands_[0].tensor->shape;
        const Strides& strides = operands_[0].strides;
        std::vector<std::size_t> order;
        for (std::size_t axis = 0; axis < shape.size(); ++axis) {
            if (shape[axis] > 1) {
                order.push_back(axis);
            }
        }
        std::stable_sort(order.begin(), order.end(),
                         [&](std::size_t a, std::size_t b) { return std::abs(strides[a]) > std::abs(strides[b]); });
        if (shape[channel_axis] == 1) {
            order.insert(order.begin(), channel_axis);
        }
        return order;
    }

    /// Folds neighbouring axes into one wherever every tensor walks through both in equal steps.
    void fold(const std::vector<std::size_t>& order, std::size_t channel_axis, bnbp_arguments& arguments) {
        const Shape& shape = operands_[0].tensor->shape;
        bool after = false, first = true;
        arguments.n = arguments.s = 1;
        for (std::size_t i = 0; i < order.size(); ++i) {
            const std::size_t axis = order[i];
            if (axis == channel_axis) {
                after = first = true;
                continue;
            }
            const auto length = static_cast<std::ptrdiff_t>(shape[axis]);
            (after ? arguments.s : arguments.n) *= length;
            if (!first && std::all_of(begin(), end(), [&](const Operand& operand) {
                    return operand.strides[order[i - 1]] == operand.strides[axis] * shape[axis];
                })) {
                lengths_.back() *= length;
            } else {
                lengths_.push_back(length);
                ++(after ? arguments.after : arguments.before);
            }
            first = false;
            for (Operand& operand : *this) {
                operand.steps.resize(lengths_.size());
                operand.steps.back() = static_cast<std::ptrdiff_t>(operand.strides[axis]);
            }
        }
    }

    static bool is_dense(const Operand& operand, const std::vector<std::size_t>& order) {
        std::int64_t step = item_size(operand.tensor->element_type);
        for (std::size_t i = order.size(); i-- > 0; step *= operand.tensor->shape[order[i]]) {
            if (operand.tensor->shape[order[i]] != 1 && operand.strides[order[i]] != step) {
                return false;
            }
        }
        return is_aligned(*operand.tensor);
    }
};

/// What an operand must look like.
enum class Role {
    input,      ///< the tensor that sets type, shape and channels
    like_input, ///< a tensor of the input's type and shape
    parameter,  ///< a vector with a value for each channel, or none
    statistic,  ///< a vector with a value for each channel
    sum,        ///< a vector with a float64 value for each channel
};

inline bool is_vector(Role role) { return role != Role::input && role != Role::like_input; }

struct InputSpec {
    const char* name;
    Role role;
    const void* bnbp_arguments::* slot;
};

struct OutputSpec {
    const char* name;
    Role role;
    void* bnbp_arguments::* slot;
};

/// The operators' inputs; most take the first few.
enum Operand { input, gamma, beta, mean, variance, normalized_delta, delta_sum, delta_centered_sum };

/// All that tells one operator from another.
struct Signature {
    const char* name;
    std::vector<InputSpec> inputs;
    std::vector<OutputSpec> outputs;
    bnbp_kernel bnbp_kernels::* kernel;

    BNBP_OWN Signature(const char* op, std::initializer_list<Operand> operands, std::vector<OutputSpec> results,
                       bnbp_kernel bnbp_kernels::* run)
        : name(op), outputs(std::move(results)), kernel(run) {
        using A = bnbp_arguments;
        static const InputSpec all[] = {
            {"input", Role::input, &A::input},           {"gamma", Role::parameter, &A::gamma},
            {"beta", Role::parameter, &A::beta},         {"mean", Role::statistic, &A::mean},
            {"variance", Role::statistic, &A::variance}, {"normalized_delta", Role::like_input, &A::normalized_delta},
            {"delta_sum", Role::sum, &A::delta_sum},     {"delta_centered_sum", Role::sum, &A::delta_centered_sum}};
        for (const Operand operand : operands) {
            inputs.push_back(all[operand]);
        }
    }
};

BNBP_OWN inline const Signature& training_signature() {
    using A = bnbp_arguments;
    static const Signature signature{"BatchNormTraining",
                                     {input, gamma, beta},
                                     {{"normalized", Role::like_input, &A::normalized},
                                      {"batch_mean", Role::statistic, &A::batch_mean},
                                      {"batch_variance", Role::statistic, &A::batch_variance}},
                                     &bnbp_kernels::training};
    return signature;
}

BNBP_OWN inline const Signature& training_statistics_signature() {
    using A = bnbp_arguments;
    static const Signature signature{"BatchNormTrainingStatistics",
                                     {input},
                                     {{"mean", Role::sum, &A::statistics_mean}, {"m2", Role::sum, &A::statistics_m2}},
                                     &bnbp_kernels::training};
    return signature;
}

BNBP_OWN inline const Signature& inference_signature() {
    static const Signature signature{"BatchNormInference",
                                     {input, gamma, beta, mean, variance},
                                     {{"normalized", Role::like_input, &bnbp_arguments::normalized}},
                                     &bnbp_kernels::inference};
    return signature;
}

inline std::vector<OutputSpec> deltas() {
    using A = bnbp_arguments;
    return {{"input_delta", Role::like_input, &A::input_delta},
            {"gamma_delta", Role::statistic, &A::gamma_delta},
            {"beta_delta", Role::statistic, &A::beta_delta}};
}

BNBP_OWN inline const Signature& training_backprop_signature() {
    static const Signature signature{"BatchNormTrainingBackprop",
                                     {input, gamma, beta, mean, variance, normalized_delta},
                                     deltas(),
                                     &bnbp_kernels::training_backprop};
    return signature;
}

BNBP_OWN inline const Signature& training_backprop_reduce_signature() {
    using A = bnbp_arguments;
    static const Signature signature{
        "BatchNormTrainingBackpropReduce",
        {input, mean, normalized_delta},
        {{"delta_sum", Role::sum, &A::reduced_delta}, {"delta_centered_sum", Role::sum, &A::reduced_product}},
        &bnbp_kernels::training_backprop};
    return signature;
}

BNBP_OWN inline const Signature& training_backprop_apply_signature() {
    static const Signature signature{
        "BatchNormTrainingBackpropApply",
        {input, gamma, beta, mean, variance, normalized_delta, delta_sum, delta_centered_sum},
        deltas(),
        &bnbp_kernels::training_backprop};
    return signature;
}

BNBP_OWN inline const Signature& inference_backprop_signature() {
    static const Signature signature{"BatchNormInferenceBackprop",
                                     {input, gamma, beta, mean, variance, normalized_delta},
                                     deltas(),
                                     &bnbp_kernels::inference_backprop};
    return signature;
}

} // namespace detail
/// \endcond

/// \brief Tells bnbp where the kernels are. import_kernels does it for you.
/// \param table the table to call through; it must stay alive
/// \throws std::runtime_error if the table is of another version than this header
inline void set_kernels(bnbp_kernels* table) {
    if (table->abi != BNBP_KERNELS_ABI) {
        throw std::runtime_error("bnbp: the installed kernels have version " + std::to_string(table->abi) +
                                 " of the function table, this program was compiled for version " +
                                 std::to_string(BNBP_KERNELS_ABI) + "; compile it again");
    }
    detail::kernel_table() = table;
}

#ifdef Py_PYTHON_H
/// \brief Imports the Python package `bnbp` and takes its kernels. Needs `Python.h` included first, and the GIL.
/// \return true, or false with a Python exception set
inline bool import_kernels() {
    // PyCapsule_Import would do, but it reports a missing package as a missing attribute.
    PyObject* core = PyImport_ImportModule("bnbp.engine.boundary");
    PyObject* capsule = core ? PyObject_GetAttrString(core, "kernels") : nullptr;
    void* table = capsule ? PyCapsule_GetPointer(capsule, BNBP_KERNELS_CAPSULE) : nullptr;
    Py_XDECREF(capsule);
    Py_XDECREF(core); // the table is static memory of an extension module, which Python never unloads
    if (!table) {
        return false;
    }
    try {
        set_kernels(static_cast<bnbp_kernels*>(table));
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_ImportError, error.what());
        return false;
    }
    return true;
}
#endif

/// \brief The operators.
namespace op {

/// \brief What the operators share: the attributes, the rules and the way to the kernels.
///
/// Tensors are passed in the order of the operator's tables. Let C be the length of the channel axis of `input`;
/// `input` and `normalized_delta` have one type and shape, each with strides of its own. Everything per channel has the
/// shape (C) and one type: that of `input`, or f32 where that is f16 or bf16. What is marked f64 has that type instead.
class BatchNormBase {
public:
    virtual ~BatchNormBase() = default;

    /// \brief The value added to the variance before the square root.
    /// \return the attribute `epsilon`
    double get_eps_value() const { return epsilon_; }

    /// \brief Sets the value added to the variance before the square root.
    /// \param epsilon a finite number >= 0
    /// \throws ValueError for any other number
    void set_eps_value(double epsilon) {
        if (!(std::isfinite(epsilon) && epsilon >= 0)) {
            char text[32];
            std::snprintf(text, sizeof text, "%g", epsilon);
            throw ValueError(std::string("epsilon: expected a finite number >= 0, got ") + text);
        }
        epsilon_ = epsilon;
    }

    /// \brief The axis that the channels are on.
    /// \return the attribute `channel_axis`, as it was set
    std::int64_t get_channel_axis() const { return channel_axis_; }

    /// \brief Sets the axis that the channels are on.
    /// \param channel_axis from -rank to rank - 1 of the input that will come; negative ones count from the end
    void set_channel_axis(std::int64_t channel_axis) { channel_axis_ = channel_axis; }

    /// \brief The operator's name.
    /// \return for example "BatchNormTrainingBackprop"
    const char* get_type_name() const { return signature_->name; }

    /// \brief Checks the inputs and says what the outputs will be.
    /// \param inputs the inputs in the operator's order; only types and shapes are looked at
    /// \return the types and shapes of the outputs in the operator's order, without memory
    /// \throws TypeError if an input's element type is not one the operator takes
    /// \throws ValueError if a rank, a shape, the channel axis or the number of inputs is wrong
    std::vector<Tensor> validate_and_infer_types(const std::vector<Tensor>& inputs) const {
        const Rules rules = check_inputs(inputs);
        std::vector<Tensor> outputs;
        outputs.reserve(signature_->outputs.size());
        for (const detail::OutputSpec& spec : signature_->outputs) {
            if (spec.role == detail::Role::like_input) {
                outputs.emplace_back(inputs[0].element_type, inputs[0].shape);
            } else {
                outputs.emplace_back(spec.role == detail::Role::sum ? ElementType::f64 : rules.parameter_type(),
                                     Shape{rules.channels});
            }
        }
        return outputs;
    }

    /// \brief Computes the outputs.
    ///
    /// Everything is checked before the first write: a call that throws has changed nothing. The first output may
    /// be the very memory of `input` or of `normalized_delta`. Needs no GIL; many threads may call at once.
    /// \param outputs where to write, in the operator's order; a default-constructed Tensor is not computed
    /// \param inputs the inputs in the operator's order; `gamma` and `beta` may be default-constructed Tensors,
    ///        which stand for ones and zeros
    /// \param num_threads upper limit of the number of threads; 0 takes the default found when bnbp was imported
    /// \throws TypeError as validate_and_infer_types, and if an output is not of the inferred type
    /// \throws ValueError as validate_and_infer_types, and if an output has the wrong shape, is read-only, repeats an
    ///         element, or overlaps an input or another output
    /// \throws std::bad_alloc if there is no memory for the workspace
    /// \throws std::logic_error if import_kernels was not called
    void evaluate(const std::vector<Tensor>& outputs, const std::vector<Tensor>& inputs, int num_threads = 0) const {
        const bnbp_kernels* kernels = detail::kernel_table();
        if (!kernels) {
            throw std::logic_error("bnbp: call bnbp::import_kernels() before evaluate()");
        }
        if (num_threads < 0) {
            throw ValueError("num_threads: expected at least 1, got " + std::to_string(num_threads));
        }
        const Rules rules = check_call(outputs, inputs);

        const Tensor& input = inputs[0];
        bnbp_arguments arguments{};
        arguments.type = detail::kernel_type(input.element_type);
        arguments.parameter_type = detail::kernel_type(rules.parameter_type());
        arguments.epsilon = epsilon_;
        arguments.num_threads = num_threads;

        detail::Layout layout;
        std::vector<detail::Packed> vectors;
        vectors.reserve(inputs.size() + outputs.size());
        for (std::size_t k = 0; k < inputs.size(); ++k) {
            const detail::InputSpec& spec = signature_->inputs[k];
            if (detail::is_vector(spec.role)) {
                vectors.emplace_back(inputs[k]).read();
                arguments.*(spec.slot) = vectors.back().data();
            } else {
                layout.add(inputs[k],
                           k == 0 ? &bnbp_arguments::input_strides : &bnbp_arguments::normalized_delta_strides);
                arguments.*(spec.slot) = inputs[k].data;
            }
        }
        const std::size_t first_result = vectors.size();
        for (std::size_t k = 0; k < outputs.size(); ++k) {
            const detail::OutputSpec& spec = signature_->outputs[k];
            if (detail::is_vector(spec.role)) {
                arguments.*(spec.slot) = vectors.emplace_back(outputs[k]).data();
            } else if (outputs[k].present()) {
                layout.add(outputs[k], &bnbp_arguments::output_strides);
                arguments.*(spec.slot) = outputs[k].data;
            }
        }
        layout.describe(channel_axis_of(input), arguments);
        arguments.count = count_ < 0 ? static_cast<double>(arguments.n) * static_cast<double>(arguments.s)
                                     : static_cast<double>(count_);
        const bnbp_status status = (kernels->*(signature_->kernel))(&arguments);
        if (status == BNBP_NO_MEMORY) {
            throw std::bad_alloc();
        }
        if (status == BNBP_INTERRUPTED) {
            throw Interrupted("interrupted");
        }
        for (std::size_t k = first_result; k < vectors.size(); ++k) {
            vectors[k].write();
        }
    }

protected:
    /// \cond internal
    BatchNormBase(const detail::Signature& signature, double epsilon, std::int64_t channel_axis)
        : signature_(&signature), channel_axis_(channel_axis) {
        set_eps_value(epsilon);
    }

    void set_whole_count(std::int64_t count) {
        if (count < 0) {
            throw ValueError("count: expected at least 0, got " + std::to_string(count));
        }
        count_ = count;
    }
    std::int64_t whole_count() const { return count_; }
    /// \endcond

private:
    const detail::Signature* signature_;
    double epsilon_ = 0;
    std::int64_t channel_axis_;
    std::int64_t count_ = -1; // elements of a channel in the whole batch; -1: the input is the whole batch

    void check_count(const char* what, std::size_t expected, std::size_t got) const {
        if (got != expected) {
            throw ValueError(std::string(signature_->name) + ": expected " + std::to_string(expected) + " " + what +
                             ", got " + std::to_string(got));
        }
    }

    std::size_t channel_axis_of(const Tensor& input) const {
        const std::int64_t rank = static_cast<std::int64_t>(input.shape.size());
        if (rank < 2) {
            throw ValueError("input: expected at least 2 axes, got shape " + detail::text_of(input.shape));
        }
        if (channel_axis_ < -rank || channel_axis_ >= rank) {
            throw ValueError("channel_axis: expected " + std::to_string(-rank) + " to " + std::to_string(rank - 1) +
                             " for the axes of input " + detail::text_of(input.shape) + ", got " +
                             std::to_string(channel_axis_));
        }
        return static_cast<std::size_t>(channel_axis_ < 0 ? channel_axis_ + rank : channel_axis_);
    }

    /// An argument's name, put into words when it is needed: an error is rare.
    struct Name {
        const char* operand;
        std::ptrdiff_t output = -1; // its number, if it is an output
        operator std::string() const {
            return output < 0 ? operand : "out[" + std::to_string(output) + "] (" + operand + ")";
        }
    };

    /// What the input decides for the other operands: their shapes and types.
    class Rules {
    public:
        const Tensor& input;
        const std::int64_t channels;

        Rules(const Tensor& tensor, std::int64_t channel_count) : input(tensor), channels(channel_count) {
            if (!detail::is_half(input.element_type)) {
                parameters_ = input.element_type;
            }
        }

        /// The type of parameters and statistics. Where the input leaves a choice, the first of them decides, or if
        /// there is none, the input.
        ElementType parameter_type() const { return parameters_; }

        void no_more_inputs() {
            if (parameters_ == ElementType::none) {
                parameters_ = input.element_type;
            }
        }

        void check(const Name& name, detail::Role role, const Tensor& tensor) {
            const ElementType type = tensor.element_type;
            if (role == detail::Role::like_input ? type != input.element_type
                : role == detail::Role::sum      ? type != ElementType::f64
                                                 : !is_parameter(type)) {
                throw TypeError(std::string(name) + ": expected " + expected(role) + ", got " +
                                detail::name_of(tensor));
            }
            if (detail::is_vector(role) && role != detail::Role::sum && parameters_ == ElementType::none) {
                parameters_ = type;
                source_ = name;
            }
            if (role == detail::Role::like_input && tensor.shape != input.shape) {
                throw ValueError(std::string(name) + ": expected shape " + detail::text_of(input.shape) +
                                 ", that of input, got " + detail::text_of(tensor.shape));
            }
            if (detail::is_vector(role) && (tensor.shape.size() != 1 || tensor.shape[0] != channels)) {
                throw ValueError(std::string(name) + ": expected shape " + detail::text_of({channels}) + " for the " +
                                 std::to_string(channels) + " channels of input " + detail::text_of(input.shape) +
                                 ", got " + detail::text_of(tensor.shape));
            }
        }

    private:
        ElementType parameters_ = ElementType::none; // not yet decided
        Name source_{"input"};

        bool is_parameter(ElementType type) const {
            return parameters_ == ElementType::none ? type == input.element_type || type == ElementType::f32
                                                    : type == parameters_;
        }

        std::string expected(detail::Role role) const {
            const std::string own = detail::name_of(input);
            if (role == detail::Role::sum) {
                return "float64";
            }
            if (role == detail::Role::like_input) {
                return own + ", the type of input";
            }
            return parameters_ == ElementType::none
                       ? own + ", the type of input, or float32"
                       : detail::name_of(parameters_) + ", the type of " + std::string(source_);
        }
    };

    /// Checks types and shapes of the inputs.
    Rules check_inputs(const std::vector<Tensor>& inputs) const {
        check_count("inputs", signature_->inputs.size(), inputs.size());
        const Tensor& input = inputs[0];
        if (input.element_type != ElementType::f64 && input.element_type != ElementType::f32 &&
            !detail::is_half(input.element_type)) {
            throw TypeError("input: expected float16, bfloat16, float32 or float64, got " + detail::name_of(input));
        }
        const std::size_t axis = channel_axis_of(input);
        check_lengths(input);
        Rules rules(input, input.shape[axis]);
        if (rules.channels < 1) {
            throw ValueError("input: expected at least 1 channel on axis " + std::to_string(channel_axis_) +
                             ", got shape " + detail::text_of(input.shape));
        }
        for (std::size_t i = 1; i < inputs.size(); ++i) {
            const detail::Role role = signature_->inputs[i].role;
            if (inputs[i].present() || role != detail::Role::parameter) {
                rules.check({signature_->inputs[i].name}, role, inputs[i]);
            }
        }
        rules.no_more_inputs();
        if (count_ >= 0 && !detail::is_empty(input)) {
            const std::int64_t own = detail::product(input.shape.begin(), input.shape.end()) / rules.channels;
            if (count_ < own) {
                throw ValueError("count: expected at least " + std::to_string(own) +
                                 ", the elements of a channel of input " + detail::text_of(input.shape) + ", got " +
                                 std::to_string(count_));
            }
        }
        return rules;
    }

    /// The lengths of the input's axes, which are those of every other tensor.
    static void check_lengths(const Tensor& input) {
        if (std::any_of(input.shape.begin(), input.shape.end(), [](std::int64_t length) { return length < 0; })) {
            throw ValueError("input: expected lengths >= 0, got shape " + detail::text_of(input.shape));
        }
        if (!detail::is_empty(input)) {
            std::int64_t room = std::numeric_limits<std::int64_t>::max() / detail::item_size(input.element_type);
            for (const std::int64_t length : input.shape) {
                room /= length;
            }
            if (room == 0) {
                throw ValueError("input: expected at most 9223372036854775807 bytes, got shape " +
                                 detail::text_of(input.shape));
            }
        }
    }

    /// Whether the first element and the last are so close that sums of such distances are numbers, too.
    static bool is_within_reach(const Tensor& tensor) {
        std::int64_t room = std::numeric_limits<std::int64_t>::max() / 4, step = detail::item_size(tensor.element_type);
        for (std::size_t axis = tensor.shape.size(); axis-- > 0; step *= tensor.shape[axis]) {
            const std::int64_t most = tensor.shape[axis] - 1,
                               stride = tensor.strides.empty() ? step : tensor.strides[axis];
            if (most > 0 && (stride > room / most || stride < -(room / most))) {
                return false;
            }
            room -= most * (most > 0 ? std::abs(stride) : 0);
        }
        return true;
    }

    /// What only a C++ caller can get wrong.
    static void check_memory(const Name& name, const Tensor& tensor) {
        if (!tensor.strides.empty() && tensor.strides.size() != tensor.shape.size()) {
            throw ValueError(std::string(name) + ": expected a stride for each of the " +
                             std::to_string(tensor.shape.size()) + " axes, got " +
                             std::to_string(tensor.strides.size()));
        }
        if (tensor.present() && !detail::is_empty(tensor) && !is_within_reach(tensor)) {
            throw ValueError(std::string(name) + ": expected memory that has addresses, got shape " +
                             detail::text_of(tensor.shape) +
                             (tensor.strides.empty() ? "" : " with strides " + detail::text_of(tensor.strides)));
        }
        if (tensor.present() && !tensor.data && !detail::is_empty(tensor)) {
            throw ValueError(std::string(name) + ": expected data, got a null pointer");
        }
    }

    Name output_name(std::size_t k) const { return {signature_->outputs[k].name, static_cast<std::ptrdiff_t>(k)}; }

    /// Checks everything about a call but the number of threads.
    Rules check_call(const std::vector<Tensor>& outputs, const std::vector<Tensor>& inputs) const {
        Rules rules = check_inputs(inputs);
        check_count("outputs", signature_->outputs.size(), outputs.size());
        std::vector<detail::Overlap::Extent> extents(inputs.size() + outputs.size());
        for (std::size_t i = 0; i < inputs.size(); ++i) {
            check_memory({signature_->inputs[i].name}, inputs[i]);
            extents[i] = detail::Overlap::extent_of(inputs[i]);
        }
        for (std::size_t k = 0; k < outputs.size(); ++k) {
            if (!outputs[k].present()) {
                continue;
            }
            rules.check(output_name(k), signature_->outputs[k].role, outputs[k]);
            check_memory(output_name(k), outputs[k]);
            auto overlaps = [&, extent = detail::Overlap::extent_of(outputs[k])](const Tensor& tensor, std::size_t at) {
                return detail::Overlap::between(outputs[k], extent, tensor, extents[at]);
            };
            extents[inputs.size() + k] = detail::Overlap::extent_of(outputs[k]);
            if (!outputs[k].writable) {
                throw ValueError(std::string(output_name(k)) +
                                 ": expected memory that can be written to, got read-only memory");
            }
            if (detail::Overlap::within(outputs[k])) {
                throw ValueError(std::string(output_name(k)) +
                                 ": expected memory for each element, got elements that overlap each other");
            }
            for (std::size_t i = 0; i < inputs.size(); ++i) {
                if (overlaps(inputs[i], i) && !(k == 0 && detail::is_same_memory(outputs[k], inputs[i]))) {
                    throw ValueError(std::string(output_name(k)) + ": expected memory of its own" +
                                     (k == 0 ? ", or all of an input of the same shape" : "") +
                                     ", got memory that overlaps " + signature_->inputs[i].name);
                }
            }
            for (std::size_t j = 0; j < k; ++j) {
                if (overlaps(outputs[j], inputs.size() + j)) {
                    throw ValueError(std::string(output_name(k)) +
                                     ": expected memory of its own, got memory that overlaps " +
                                     std::string(output_name(j)));
                }
            }
        }
        return rules;
    }
};

/// \brief Normalises a batch with its own mean and variance.
///
/// | Inputs | Shape | Outputs | Shape |
/// |---|---|---|---|
/// | `input` | (N, C, ...) | `normalized` | that of `input` |
/// | `gamma`, or none for ones | (C) | `batch_mean` | (C) |
/// | `beta`, or none for zeros | (C) | `batch_variance`, biased | (C) |
class BatchNormTraining : public BatchNormBase {
public:
    /// \brief The operator with its attributes.
    /// \param epsilon added to the variance before the square root; finite and >= 0
    /// \param channel_axis the axis of `input` that the channels are on; negative ones count from the end
    /// \throws ValueError if epsilon is negative, infinite or not a number
    explicit BatchNormTraining(double epsilon = 1e-5, std::int64_t channel_axis = 1)
        : BatchNormBase(detail::training_signature(), epsilon, channel_axis) {}
};

/// \brief The gradient of BatchNormTraining, through the batch's mean and variance as well.
///
/// | Inputs | Shape | Outputs | Shape |
/// |---|---|---|---|
/// | `input` | (N, C, ...) | `input_delta` | that of `input` |
/// | `gamma`, or none for ones | (C) | `gamma_delta` | (C) |
/// | `beta`, or none; not used | (C) | `beta_delta` | (C) |
/// | `mean`, as BatchNormTraining gave it | (C) | | |
/// | `variance`, likewise | (C) | | |
/// | `normalized_delta` | that of `input` | | |
class BatchNormTrainingBackprop : public BatchNormBase {
public:
    /// \copydoc BatchNormTraining::BatchNormTraining
    explicit BatchNormTrainingBackprop(double epsilon = 1e-5, std::int64_t channel_axis = 1)
        : BatchNormBase(detail::training_backprop_signature(), epsilon, channel_axis) {}
};

/// \brief Mean and variance of a batch, or of a part of one, as numbers that can be merged.
///
/// | Inputs | Shape | Outputs | Shape |
/// |---|---|---|---|
/// | `input` | (N, C, ...) | `mean` | (C), f64 |
/// | | | `m2`, the sum of the squared deviations from it | (C), f64 |
///
/// Two parts with `n` and `m` elements in a channel are merged by Chan, Golub and LeVeque's formulas: the mean is
/// `mean_n + (mean_m - mean_n) m / (n + m)`, and m2 is `m2_n + m2_m + (mean_m - mean_n)^2 n m / (n + m)`. The biased
/// variance of the whole batch is its `m2` over its number of elements.
class BatchNormTrainingStatistics : public BatchNormBase {
public:
    /// \brief The operator with its attribute.
    /// \param channel_axis the axis of `input` that the channels are on; negative ones count from the end
    explicit BatchNormTrainingStatistics(std::int64_t channel_axis = 1)
        : BatchNormBase(detail::training_statistics_signature(), 0, channel_axis) {}
};

/// \brief The first half of BatchNormTrainingBackprop: the sums over a batch, or over a part of one.
///
/// | Inputs | Shape | Outputs | Shape |
/// |---|---|---|---|
/// | `input` | (N, C, ...) | `delta_sum`, that of `normalized_delta` | (C), f64 |
/// | `mean`, of the whole batch | (C) | `delta_centered_sum`, of `normalized_delta * (input - mean)` | (C), f64 |
/// | `normalized_delta` | that of `input` | | |
///
/// The sums of two parts are added.
class BatchNormTrainingBackpropReduce : public BatchNormBase {
public:
    /// \copydoc BatchNormTrainingStatistics::BatchNormTrainingStatistics
    explicit BatchNormTrainingBackpropReduce(std::int64_t channel_axis = 1)
        : BatchNormBase(detail::training_backprop_reduce_signature(), 0, channel_axis) {}
};

/// \brief The second half of BatchNormTrainingBackprop: the gradient of a part of a batch from the whole batch's sums.
///
/// | Inputs | Shape | Outputs | Shape |
/// |---|---|---|---|
/// | `input` | (N, C, ...) | `input_delta` | that of `input` |
/// | `gamma`, or none for ones | (C) | `gamma_delta` | (C) |
/// | `beta`, or none; not used | (C) | `beta_delta` | (C) |
/// | `mean`, of the whole batch | (C) | | |
/// | `variance`, likewise | (C) | | |
/// | `normalized_delta` | that of `input` | | |
/// | `delta_sum`, of the whole batch | (C), f64 | | |
/// | `delta_centered_sum`, likewise | (C), f64 | | |
class BatchNormTrainingBackpropApply : public BatchNormBase {
public:
    /// \brief The operator with its attributes.
    /// \param count the number of elements of a channel in the whole batch
    /// \param epsilon added to the variance before the square root; finite and >= 0
    /// \param channel_axis the axis of `input` that the channels are on; negative ones count from the end
    /// \throws ValueError if count is negative, or epsilon is negative, infinite or not a number
    explicit BatchNormTrainingBackpropApply(std::int64_t count, double epsilon = 1e-5, std::int64_t channel_axis = 1)
        : BatchNormBase(detail::training_backprop_apply_signature(), epsilon, channel_axis) {
        set_count(count);
    }

    /// \brief The number of elements of a channel in the whole batch.
    /// \return the attribute `count`
    std::int64_t get_count() const { return whole_count(); }

    /// \brief Sets the number of elements of a channel in the whole batch.
    /// \param count at least that of the input that will come
    /// \throws ValueError if it is negative
    void set_count(std::int64_t count) { set_whole_count(count); }
};

/// \brief Normalises with a mean and a variance that are given.
///
/// | Inputs | Shape | Outputs | Shape |
/// |---|---|---|---|
/// | `input` | (N, C, ...) | `normalized` | that of `input` |
/// | `gamma`, or none for ones | (C) | | |
/// | `beta`, or none for zeros | (C) | | |
/// | `mean` | (C) | | |
/// | `variance` | (C) | | |
class BatchNormInference : public BatchNormBase {
public:
    /// \copydoc BatchNormTraining::BatchNormTraining
    explicit BatchNormInference(double epsilon = 1e-5, std::int64_t channel_axis = 1)
        : BatchNormBase(detail::inference_signature(), epsilon, channel_axis) {}
};

/// \brief The gradient of BatchNormInference: `mean` and `variance` are constants.
///
/// Inputs and outputs are those of BatchNormTrainingBackprop. nGraph has no such operator; fine-tuning with frozen
/// statistics needs it.
class BatchNormInferenceBackprop : public BatchNormBase {
public:
    /// \copydoc BatchNormTraining::BatchNormTraining
    explicit BatchNormInferenceBackprop(double epsilon = 1e-5, std::int64_t channel_axis = 1)
        : BatchNormBase(detail::inference_backprop_signature(), epsilon, channel_axis) {}
};

} // namespace op
} // namespace bnbp

#endif // BNBP_BATCH_NORM_HPP
