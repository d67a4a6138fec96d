/// \file
/// \brief The one place where the operators' rules live: a call, step by step. Not an interface.
#ifndef BNBP_DETAIL_CALL_HPP
#define BNBP_DETAIL_CALL_HPP

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <forward_list>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>

#include "bnbp/detail/layout.hpp"
#include "bnbp/detail/overlap.hpp"
#include "bnbp/detail/signature.hpp"
#include "bnbp/detail/view.hpp"

namespace bnbp {
namespace detail {

BNBP_OWN inline bnbp_kernels*& kernel_table() {
    static bnbp_kernels* table = nullptr;
    return table;
}

/// An input's numbers have another type than is expected, and could be converted: how, each language says for itself.
class WrongNumberType : public TypeError {
public:
    WrongNumberType(const std::string& message, ElementType type) : TypeError(message), expected(type) {}
    const ElementType expected;
};

/// What an operator is told besides its tensors.
struct Attributes {
    const Signature* signature = nullptr;
    double epsilon = 0;
    std::int64_t channel_axis = 1;
    std::int64_t count = -1; // elements of a channel in the whole batch; -1: the input is the whole batch
    Activation activation = Activation::none;
    bool addend = false;
    std::int64_t* exact = nullptr; // digits of exact sums, which samples are added to

    void set_epsilon(double value) {
        if (!(std::isfinite(value) && value >= 0)) {
            char text[32];
            std::snprintf(text, sizeof text, "%g", value);
            throw ValueError(std::string("epsilon: expected a finite number >= 0, got ") + text);
        }
        epsilon = value;
    }

    void set_count(std::int64_t value) {
        if (value < 0) {
            throw ValueError("count: expected at least 0, got " + std::to_string(value));
        }
        count = value;
    }
};

/// One call of an operator: `check_inputs`, which knows the outputs' types and shapes then, `check_outputs`, `run`.
/// Each asks what the one before it has found out, and nothing is asked twice. The views stay where they are until the
/// end. No step needs the GIL, and the first write is in the last.
class Call {
public:
    Attributes attributes;

    Call() = default;
    explicit Call(const Attributes& of) : attributes(of) {}

    void check_inputs(const View* inputs, std::size_t count) {
        const Signature& signature = *attributes.signature;
        check_count("inputs", signature.required, signature.input_count, count);
        inputs_ = inputs;
        input_count_ = count;
        const View& input = inputs[0];
        if (input.element_type != ElementType::f64 && input.element_type != ElementType::f32 &&
            !is_half(input.element_type)) {
            refuse_type({"input"}, "float16, bfloat16, float32 or float64", ElementType::f32, input);
        }
        axis_ = channel_axis_of(input);
        check_lengths(input);
        channels_ = input.shape[axis_];
        parameters_ = is_half(input.element_type) ? ElementType::none : input.element_type;
        if (channels_ < 1) {
            throw ValueError("input: expected at least 1 channel on axis " + std::to_string(attributes.channel_axis) +
                             ", got shape " + shape_of(input));
        }
        for (std::size_t i = 1; i < count; ++i) {
            const InputSpec& spec = spec_of(signature.inputs[i]);
            if (inputs[i].present() || (i < signature.required && spec.role != Role::parameter)) {
                check({spec.name}, spec.role, inputs[i]);
            }
        }
        check_activation();
        if (parameters_ == ElementType::none) {
            parameters_ = input.element_type;
        }
        if (attributes.count >= 0 && !is_empty(input)) {
            const std::int64_t own = product(input.shape, input.shape + input.rank) / channels_;
            if (attributes.count < own) {
                throw ValueError("count: expected at least " + std::to_string(own) +
                                 ", the elements of a channel of input " + shape_of(input) + ", got " +
                                 std::to_string(attributes.count));
            }
        }
    }

    /// The number of channels, and so the length of every vector.
    std::int64_t channels() const { return channels_; }

    /// The number of outputs: `addend_delta` is one where there was an addend.
    std::size_t output_count() const {
        const Signature& signature = *attributes.signature;
        return signature.output_count - (signature.returns_addend_delta() && !attributes.addend ? 1 : 0);
    }

    /// Whether an output is a tensor of the input's type and shape, and not a vector.
    bool is_tensor(std::size_t k) const { return !is_vector(attributes.signature->outputs[k].role); }

    ElementType output_type(std::size_t k) const {
        return is_tensor(k)                                         ? inputs_[0].element_type
               : attributes.signature->outputs[k].role == Role::sum ? ElementType::f64
                                                                    : parameters_;
    }

    void check_outputs(const View* outputs, std::size_t count) {
        const Signature& signature = *attributes.signature;
        check_count("outputs", output_count(), output_count(), count);
        outputs_ = outputs;
        output_count_ = count;
        Extent extents[MOST_INPUTS + MOST_OUTPUTS];
        for (std::size_t i = 0; i < input_count_; ++i) {
            extents[i] = Extent(inputs_[i]);
            check_memory({spec_of(signature.inputs[i]).name}, inputs_[i], extents[i]);
        }
        for (std::size_t k = 0; k < count; ++k) {
            const View& output = outputs[k];
            if (!output.present()) {
                continue;
            }
            check(output_name(k), signature.outputs[k].role, output);
            const Extent extent = extents[MOST_INPUTS + k] = Extent(output);
            check_memory(output_name(k), output, extent);
            if (!output.writable) {
                throw ValueError(std::string(output_name(k)) +
                                 ": expected memory that can be written to, got read-only memory");
            }
            if (Overlap::within(output)) {
                throw ValueError(std::string(output_name(k)) +
                                 ": expected memory for each element, got elements that overlap each other");
            }
            for (std::size_t i = 0; i < input_count_; ++i) {
                if (Overlap::between(output, extent, inputs_[i], extents[i]) &&
                    !(is_tensor(k) && is_same_memory(output, inputs_[i]))) {
                    throw ValueError(std::string(output_name(k)) + ": expected memory of its own" +
                                     (is_tensor(k) ? ", or all of an input of the same shape" : "") +
                                     ", got memory that overlaps " + spec_of(signature.inputs[i]).name);
                }
            }
            for (std::size_t j = 0; j < k; ++j) {
                if (Overlap::between(output, extent, outputs[j], extents[MOST_INPUTS + j])) {
                    throw ValueError(std::string(output_name(k)) +
                                     ": expected memory of its own, got memory that overlaps " +
                                     std::string(output_name(j)));
                }
            }
        }
    }

    void run(const bnbp_kernels* kernels, int num_threads) {
        const Signature& signature = *attributes.signature;
        bnbp_arguments arguments{};
        arguments.type = kernel_type(inputs_[0].element_type);
        arguments.parameter_type = kernel_type(parameters_);
        arguments.epsilon = attributes.epsilon;
        arguments.activation = kernel_activation(attributes.activation);
        arguments.num_threads = num_threads;

        Layout layout;
        std::forward_list<Packed> copies, results; // of vectors that are not plain
        for (std::size_t k = 0; k < input_count_; ++k) {
            const InputSpec& spec = spec_of(signature.inputs[k]);
            const View& view = inputs_[k];
            if (!is_vector(spec.role)) {
                if (view.present() && is_read(signature.inputs[k])) {
                    layout.add(view, spec.strides);
                    arguments.*(spec.slot) = view.data;
                }
            } else if (!view.present() || is_plain(view)) {
                arguments.*(spec.slot) = view.present() ? view.data : nullptr; // whatever it points to
            } else {
                copies.emplace_front(view).read();
                arguments.*(spec.slot) = copies.front().data();
            }
        }
        for (std::size_t k = 0; k < output_count_; ++k) {
            const OutputSpec& spec = signature.outputs[k];
            const View& view = outputs_[k];
            if (!view.present()) {
                continue;
            }
            if (!is_vector(spec.role)) {
                layout.add(view, spec.strides);
            }
            arguments.*(spec.slot) =
                !is_vector(spec.role) || is_plain(view) ? view.data : results.emplace_front(view).data();
        }
        arguments.exact = attributes.exact;
        arguments.samples = static_cast<std::ptrdiff_t>(inputs_[0].shape[axis_ == 0 ? 1 : 0]);
        layout.describe(axis_, arguments);
        arguments.count = attributes.count < 0 ? static_cast<double>(arguments.n) * static_cast<double>(arguments.s)
                                               : static_cast<double>(attributes.count);
        const bnbp_status status = (kernels->*(signature.kernel))(&arguments);
        if (status == BNBP_NO_MEMORY) {
            throw std::bad_alloc();
        }
        if (status == BNBP_INTERRUPTED) {
            throw Interrupted("interrupted");
        }
        for (Packed& result : results) {
            result.write();
        }
    }

private:
    /// An argument's name, put into words when it is needed: an error is rare.
    struct Name {
        const char* operand;
        std::ptrdiff_t output = -1; // its number, if it is an output
        operator std::string() const {
            return output < 0 ? operand : "out[" + std::to_string(output) + "] (" + operand + ")";
        }
    };

    const View* inputs_ = nullptr;
    const View* outputs_ = nullptr;
    std::size_t input_count_ = 0, output_count_ = 0; // as they were given
    std::size_t axis_ = 0;
    std::int64_t channels_ = 0;
    // The type of parameters and statistics. Where the input leaves a choice, the first of them decides, or if there is
    // none, the input.
    ElementType parameters_ = ElementType::none; // not yet decided
    Name source_{"input"};

    void check_count(const char* what, std::size_t least, std::size_t most, std::size_t got) const {
        if (got < least || got > most) {
            throw ValueError(std::string(attributes.signature->name) + ": expected " + std::to_string(least) +
                             (least < most ? (most > least + 1 ? " to " : " or ") + std::to_string(most) : "") + " " +
                             what + ", got " + std::to_string(got));
        }
    }

    /// Whether an input that may be left out is there.
    bool has(Operand operand) const {
        const std::size_t k = attributes.signature->find(operand);
        return k < input_count_ && inputs_[k].present();
    }

    /// Whether the kernels read a tensor that is there: without an activation, the forward output is nothing to them.
    bool is_read(Operand operand) const {
        return operand != Operand::normalized || attributes.activation != Activation::none;
    }

    /// The tensors that the activation and the addend need.
    void check_activation() const {
        const Signature& signature = *attributes.signature;
        const View& input = inputs_[0];
        if (signature.takes(Operand::addend) && attributes.addend != has(Operand::addend)) {
            throw ValueError(attributes.addend
                                 ? "addend: expected shape " + shape_of(input) + ", that of input, got None"
                                 : std::string("addend: expected None without the attribute addend, got a tensor"));
        }
        if (attributes.activation == Activation::none || !signature.takes(Operand::normalized) ||
            has(Operand::normalized)) {
            return;
        }
        const std::string gradient =
            std::string("the gradient of activation \"") + name_of(attributes.activation) + "\"";
        if (attributes.addend) {
            throw ValueError("normalized: expected the forward operator's output, which " + gradient +
                             " with an addend needs, got None");
        }
        if (!has(Operand::variance)) {
            throw ValueError("variance: expected shape " + text_of(&channels_, 1) + " for the " +
                             std::to_string(channels_) + " channels of input " + shape_of(input) + ", which " +
                             gradient + " needs where normalized is not given, got None");
        }
    }

    std::size_t channel_axis_of(const View& input) const {
        const std::int64_t rank = static_cast<std::int64_t>(input.rank), axis = attributes.channel_axis;
        if (rank < 2) {
            throw ValueError("input: expected at least 2 axes, got shape " + shape_of(input));
        }
        if (axis < -rank || axis >= rank) {
            throw ValueError("channel_axis: expected " + std::to_string(-rank) + " to " + std::to_string(rank - 1) +
                             " for the axes of input " + shape_of(input) + ", got " + std::to_string(axis));
        }
        return static_cast<std::size_t>(axis < 0 ? axis + rank : axis);
    }

    /// The lengths of the input's axes, which are those of every other tensor.
    static void check_lengths(const View& input) {
        double size = 1; // rounded: close to the limit the answer is that of whole numbers
        for (std::size_t axis = 0; axis < input.rank; ++axis) {
            if (input.shape[axis] < 0) {
                throw ValueError("input: expected lengths >= 0, got shape " + shape_of(input));
            }
            size *= static_cast<double>(input.shape[axis]);
        }
        if (!(size < 0x1p59) && !is_empty(input)) {
            std::int64_t room = std::numeric_limits<std::int64_t>::max() / item_size(input.element_type);
            for (std::size_t axis = 0; axis < input.rank; ++axis) {
                room /= input.shape[axis];
            }
            if (room == 0) {
                throw ValueError("input: expected at most 9223372036854775807 bytes, got shape " + shape_of(input));
            }
        }
    }

    /// The shape and type of an operand besides the input, which decides on them.
    void check(const Name& name, Role role, const View& view) {
        const View& input = inputs_[0];
        const ElementType type = view.element_type;
        if (role == Role::like_input ? type != input.element_type
            : role == Role::sum      ? type != ElementType::f64
                                     : !is_parameter(type)) {
            refuse_type(name, expected(role), expected_type(role), view);
        }
        if (is_vector(role) && role != Role::sum && parameters_ == ElementType::none) {
            parameters_ = type;
            source_ = name;
        }
        if (role == Role::like_input && !is_same_shape(view, input)) {
            throw ValueError(std::string(name) + ": expected shape " + shape_of(input) + ", that of input, got " +
                             shape_of(view));
        }
        if (is_vector(role) && (view.rank != 1 || view.shape[0] != channels_)) {
            throw ValueError(std::string(name) + ": expected shape " + text_of(&channels_, 1) + " for the " +
                             std::to_string(channels_) + " channels of input " + shape_of(input) + ", got " +
                             shape_of(view));
        }
    }

    [[noreturn]] static void refuse_type(const Name& name, const std::string& expected, ElementType type,
                                         const View& view) {
        const std::string message = std::string(name) + ": expected " + expected + ", got " + name_of(view);
        if (name.output < 0 && is_number(view)) {
            throw WrongNumberType(message, type);
        }
        throw TypeError(message);
    }

    bool is_parameter(ElementType type) const {
        return parameters_ == ElementType::none ? type == inputs_[0].element_type || type == ElementType::f32
                                                : type == parameters_;
    }

    std::string expected(Role role) const {
        const std::string own = name_of(inputs_[0]);
        if (role == Role::sum) {
            return "float64";
        }
        if (role == Role::like_input) {
            return own + ", the type of input";
        }
        return parameters_ == ElementType::none ? own + ", the type of input, or float32"
                                                : name_of(parameters_) + ", the type of " + std::string(source_);
    }

    /// One type of those that `expected` names.
    ElementType expected_type(Role role) const {
        return role == Role::sum                  ? ElementType::f64
               : role == Role::like_input         ? inputs_[0].element_type
               : parameters_ == ElementType::none ? ElementType::f32
                                                  : parameters_;
    }

    /// What only a C++ caller can get wrong.
    static void check_memory(const Name& name, const View& view, const Extent& extent) {
        if (view.data && extent.has_addresses && (!view.has_strides() || view.stride_count == view.rank)) {
            return;
        }
        if (view.has_strides() && view.stride_count != view.rank) {
            throw ValueError(std::string(name) + ": expected a stride for each of the " + std::to_string(view.rank) +
                             " axes, got " + std::to_string(view.stride_count));
        }
        if (!extent.has_addresses) {
            throw ValueError(std::string(name) + ": expected memory that has addresses, got shape " + shape_of(view) +
                             (view.has_strides() ? " with strides " + text_of(view.strides, view.rank) : ""));
        }
        if (view.present() && !view.data && !is_empty(view)) {
            throw ValueError(std::string(name) + ": expected data, got a null pointer");
        }
    }

    Name output_name(std::size_t k) const {
        return {attributes.signature->outputs[k].name, static_cast<std::ptrdiff_t>(k)};
    }
};

} // namespace detail
} // namespace bnbp

#endif // BNBP_DETAIL_CALL_HPP
