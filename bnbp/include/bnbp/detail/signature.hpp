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

BNBP_OWN inline const InputSpec& spec_of(Operand operand) {
    using A = bnbp_arguments;
    static constexpr InputSpec all[] = {
        {"input", Role::input, &A::input},           {"gamma", Role::parameter, &A::gamma},
        {"beta", Role::parameter, &A::beta},         {"mean", Role::statistic, &A::mean},
        {"variance", Role::statistic, &A::variance}, {"normalized_delta", Role::like_input, &A::normalized_delta},
        {"delta_sum", Role::sum, &A::delta_sum},     {"delta_centered_sum", Role::sum, &A::delta_centered_sum}};
    return all[operand];
}

/// The most operands that an operator has.
constexpr std::size_t MOST_INPUTS = 8, MOST_OUTPUTS = 3;

/// All that tells one operator from another. Constants, so that no call asks whether they are made yet.
struct Signature {
    const char* name;
    std::size_t input_count;
    Operand inputs[MOST_INPUTS];
    std::size_t output_count;
    OutputSpec outputs[MOST_OUTPUTS];
    bnbp_kernel bnbp_kernels::* kernel;
};

constexpr OutputSpec INPUT_DELTA{"input_delta", Role::like_input, &bnbp_arguments::input_delta};
constexpr OutputSpec GAMMA_DELTA{"gamma_delta", Role::statistic, &bnbp_arguments::gamma_delta};
constexpr OutputSpec BETA_DELTA{"beta_delta", Role::statistic, &bnbp_arguments::beta_delta};

BNBP_OWN inline const Signature& training_signature() {
    using A = bnbp_arguments;
    static constexpr Signature signature{"BatchNormTraining",
                                         3,
                                         {input, gamma, beta},
                                         3,
                                         {{"normalized", Role::like_input, &A::normalized},
                                          {"batch_mean", Role::statistic, &A::batch_mean},
                                          {"batch_variance", Role::statistic, &A::batch_variance}},
                                         &bnbp_kernels::training};
    return signature;
}

BNBP_OWN inline const Signature& training_statistics_signature() {
    using A = bnbp_arguments;
    static constexpr Signature signature{
        "BatchNormTrainingStatistics",
        1,
        {input},
        2,
        {{"mean", Role::sum, &A::statistics_mean}, {"m2", Role::sum, &A::statistics_m2}},
        &bnbp_kernels::training};
    return signature;
}

BNBP_OWN inline const Signature& inference_signature() {
    static constexpr Signature signature{"BatchNormInference",
                                         5,
                                         {input, gamma, beta, mean, variance},
                                         1,
                                         {{"normalized", Role::like_input, &bnbp_arguments::normalized}},
                                         &bnbp_kernels::inference};
    return signature;
}

BNBP_OWN inline const Signature& training_backprop_signature() {
    static constexpr Signature signature{"BatchNormTrainingBackprop",
                                         6,
                                         {input, gamma, beta, mean, variance, normalized_delta},
                                         3,
                                         {INPUT_DELTA, GAMMA_DELTA, BETA_DELTA},
                                         &bnbp_kernels::training_backprop};
    return signature;
}

BNBP_OWN inline const Signature& training_backprop_reduce_signature() {
    using A = bnbp_arguments;
    static constexpr Signature signature{
        "BatchNormTrainingBackpropReduce",
        3,
        {input, mean, normalized_delta},
        2,
        {{"delta_sum", Role::sum, &A::reduced_delta}, {"delta_centered_sum", Role::sum, &A::reduced_product}},
        &bnbp_kernels::training_backprop};
    return signature;
}

BNBP_OWN inline const Signature& training_backprop_apply_signature() {
    static constexpr Signature signature{
        "BatchNormTrainingBackpropApply",
        8,
        {input, gamma, beta, mean, variance, normalized_delta, delta_sum, delta_centered_sum},
        3,
        {INPUT_DELTA, GAMMA_DELTA, BETA_DELTA},
        &bnbp_kernels::training_backprop};
    return signature;
}

BNBP_OWN inline const Signature& inference_backprop_signature() {
    static constexpr Signature signature{"BatchNormInferenceBackprop",
                                         6,
                                         {input, gamma, beta, mean, variance, normalized_delta},
                                         3,
                                         {INPUT_DELTA, GAMMA_DELTA, BETA_DELTA},
                                         &bnbp_kernels::inference_backprop};
    return signature;
}

} // namespace detail
} // namespace bnbp

#endif // BNBP_DETAIL_SIGNATURE_HPP
