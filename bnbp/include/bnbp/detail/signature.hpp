/// \file
/// \brief What tells one operator from another: its operands, their roles and its kernel. Not an interface.
#ifndef BNBP_DETAIL_SIGNATURE_HPP
#define BNBP_DETAIL_SIGNATURE_HPP

#include <cstddef>

#include "bnbp/detail/view.hpp"
#include "bnbp/kernels.h"

namespace bnbp {
namespace detail {

/// What an operand must look like.
enum class Role {
    input,      ///< the tensor that sets type, shape and channels
    like_input, ///< a tensor of the input's type and shape
    parameter,  ///< a vector with a value for each channel, or none
    statistic,  ///< a vector with a value for each channel
    sum,        ///< a vector with a float64 value for each channel
};

inline bool is_vector(Role role) { return role != Role::input && role != Role::like_input; }

/// Where the kernels want a tensor's strides; null for a vector.
using StridesSlot = const std::ptrdiff_t* bnbp_arguments::*;

struct InputSpec {
    const char* name;
    Role role;
    const void* bnbp_arguments::* slot;
    StridesSlot strides;
};

struct OutputSpec {
    const char* name;
    Role role;
    void* bnbp_arguments::* slot;
    StridesSlot strides;
};

/// The operators' inputs.
enum Operand {
    input,
    gamma,
    beta,
    mean,
    variance,
    normalized_delta,
    delta_sum,
    delta_centered_sum,
    addend,
    normalized
};

BNBP_OWN inline const InputSpec& spec_of(Operand operand) {
    using A = bnbp_arguments;
    static constexpr InputSpec all[] = {
        {"input", Role::input, &A::input, &A::input_strides},
        {"gamma", Role::parameter, &A::gamma, nullptr},
        {"beta", Role::parameter, &A::beta, nullptr},
        {"mean", Role::statistic, &A::mean, nullptr},
        {"variance", Role::statistic, &A::variance, nullptr},
        {"normalized_delta", Role::like_input, &A::normalized_delta, &A::normalized_delta_strides},
        {"delta_sum", Role::sum, &A::delta_sum, nullptr},
        {"delta_centered_sum", Role::sum, &A::delta_centered_sum, nullptr},
        {"addend", Role::like_input, &A::addend, &A::third_strides},
        {"normalized", Role::like_input, &A::forward_output, &A::third_strides}};
    return all[operand];
}

/// The most operands that an operator has.
constexpr std::size_t MOST_INPUTS = 9, MOST_OUTPUTS = 4;

/// All that tells one operator from another. Constants, so that no call asks whether they are made yet.
struct Signature {
    const char* name;
    std::size_t required; // inputs that must be given, before those that may be left out
    std::size_t input_count;
    Operand inputs[MOST_INPUTS];
    std::size_t output_count;
    OutputSpec outputs[MOST_OUTPUTS];
    bnbp_kernel bnbp_kernels::* kernel;

    /// Where an input is among the operator's; `input_count` if it is not.
    std::size_t find(Operand operand) const {
        std::size_t k = 0;
        while (k < input_count && inputs[k] != operand) {
            ++k;
        }
        return k;
    }
    bool takes(Operand operand) const { return find(operand) < input_count; }
    /// Whether the last output is there only if there was an addend.
    bool returns_addend_delta() const { return output_count == MOST_OUTPUTS; }
};

constexpr OutputSpec tensor(const char* name, void* bnbp_arguments::* slot,
                            StridesSlot strides = &bnbp_arguments::output_strides) {
    return {name, Role::like_input, slot, strides};
}
constexpr OutputSpec vector(const char* name, void* bnbp_arguments::* slot, Role role = Role::statistic) {
    return {name, role, slot, nullptr};
}
constexpr OutputSpec INPUT_DELTA = tensor("input_delta", &bnbp_arguments::input_delta);
constexpr OutputSpec GAMMA_DELTA = vector("gamma_delta", &bnbp_arguments::gamma_delta);
constexpr OutputSpec BETA_DELTA = vector("beta_delta", &bnbp_arguments::beta_delta);
constexpr OutputSpec ADDEND_DELTA =
    tensor("addend_delta", &bnbp_arguments::addend_delta, &bnbp_arguments::addend_delta_strides);

BNBP_OWN inline const Signature& training_signature() {
    using A = bnbp_arguments;
    static constexpr Signature signature{"BatchNormTraining",
                                         3,
                                         4,
                                         {input, gamma, beta, addend},
                                         3,
                                         {tensor("normalized", &A::normalized), vector("batch_mean", &A::batch_mean),
                                          vector("batch_variance", &A::batch_variance)},
                                         &bnbp_kernels::training};
    return signature;
}

BNBP_OWN inline const Signature& training_statistics_signature() {
    using A = bnbp_arguments;
    static constexpr Signature signature{
        "BatchNormTrainingStatistics",
        1,
        1,
        {input},
        2,
        {vector("mean", &A::statistics_mean, Role::sum), vector("m2", &A::statistics_m2, Role::sum)},
        &bnbp_kernels::training};
    return signature;
}

/// The same sums, collected exactly, in memory that is an attribute.
BNBP_OWN inline const Signature& exact_statistics_signature() {
    static constexpr Signature signature{
        "BatchNormTrainingStatistics (exact)", 1, 1, {input}, 0, {}, &bnbp_kernels::training};
    return signature;
}

BNBP_OWN inline const Signature& exact_reduce_signature() {
    static constexpr Signature signature{"BatchNormTrainingBackpropReduce (exact)",
                                         3,
                                         7,
                                         {input, mean, normalized_delta, gamma, beta, variance, normalized},
                                         0,
                                         {},
                                         &bnbp_kernels::training_backprop};
    return signature;
}

BNBP_OWN inline const Signature& inference_signature() {
    static constexpr Signature signature{"BatchNormInference",
                                         5,
                                         6,
                                         {input, gamma, beta, mean, variance, addend},
                                         1,
                                         {tensor("normalized", &bnbp_arguments::normalized)},
                                         &bnbp_kernels::inference};
    return signature;
}

BNBP_OWN inline const Signature& training_backprop_signature() {
    static constexpr Signature signature{"BatchNormTrainingBackprop",
                                         6,
                                         7,
                                         {input, gamma, beta, mean, variance, normalized_delta, normalized},
                                         4,
                                         {INPUT_DELTA, GAMMA_DELTA, BETA_DELTA, ADDEND_DELTA},
                                         &bnbp_kernels::training_backprop};
    return signature;
}

BNBP_OWN inline const Signature& training_backprop_reduce_signature() {
    using A = bnbp_arguments;
    static constexpr Signature signature{"BatchNormTrainingBackpropReduce",
                                         3,
                                         7,
                                         {input, mean, normalized_delta, gamma, beta, variance, normalized},
                                         2,
                                         {vector("delta_sum", &A::reduced_delta, Role::sum),
                                          vector("delta_centered_sum", &A::reduced_product, Role::sum)},
                                         &bnbp_kernels::training_backprop};
    return signature;
}

BNBP_OWN inline const Signature& training_backprop_apply_signature() {
    static constexpr Signature signature{
        "BatchNormTrainingBackpropApply",
        8,
        9,
        {input, gamma, beta, mean, variance, normalized_delta, delta_sum, delta_centered_sum, normalized},
        4,
        {INPUT_DELTA, GAMMA_DELTA, BETA_DELTA, ADDEND_DELTA},
        &bnbp_kernels::training_backprop};
    return signature;
}

BNBP_OWN inline const Signature& inference_backprop_signature() {
    static constexpr Signature signature{"BatchNormInferenceBackprop",
                                         6,
                                         7,
                                         {input, gamma, beta, mean, variance, normalized_delta, normalized},
                                         4,
                                         {INPUT_DELTA, GAMMA_DELTA, BETA_DELTA, ADDEND_DELTA},
                                         &bnbp_kernels::inference_backprop};
    return signature;
}

} // namespace detail
} // namespace bnbp

#endif // BNBP_DETAIL_SIGNATURE_HPP
