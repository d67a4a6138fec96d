/// \file
/// \brief The batch normalisation operators for C++ callers.
///
/// The classes follow nGraph's. An operator holds its attributes. `validate_and_infer_types` checks the inputs and
/// returns the types and shapes of the outputs. `evaluate` computes the outputs. The checks are in detail/call.hpp.
/// bnbp's Python functions go through it too, so both languages refuse the same things with the same words.
///
/// The kernels come from the installed Python package, through the table in kernels.h. Include `Python.h` before this
/// header and call bnbp::import_kernels once, from an extension module or an embedded interpreter. `evaluate` itself
/// does not need the GIL. The header is C++17.
#ifndef BNBP_BATCH_NORM_HPP
#define BNBP_BATCH_NORM_HPP

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "bnbp/detail/call.hpp"
#include "bnbp/kernels.h"
#include "bnbp/tensor.hpp"

/// \brief Batch normalisation operators.
namespace bnbp {

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
/// \brief Imports the Python package `bnbp` and takes its kernels. Include `Python.h` first, and hold the GIL.
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

/// \brief The base class of all operators: attributes, checks and calls of the kernels.
///
/// Pass tensors in the order of the operator's tables. Let C be the length of the channel axis of `input`. `input` and
/// `normalized_delta` have the same type and shape, and each may have strides of its own. All vectors have the shape
/// (C) and the same type: the type of `input` or, if that is f16 or bf16, f32. Operands that are marked f64 have that
/// type instead.
class BatchNormBase {
public:
    virtual ~BatchNormBase() = default;

    /// \brief The value added to the variance before the square root.
    /// \return the attribute `epsilon`
    double get_eps_value() const { return attributes_.epsilon; }

    /// \brief Sets the value added to the variance before the square root.
    /// \param epsilon a finite number >= 0
    /// \throws ValueError for any other number
    void set_eps_value(double epsilon) { attributes_.set_epsilon(epsilon); }

    /// \brief The axis that the channels are on.
    /// \return the attribute `channel_axis`, as it was set
    std::int64_t get_channel_axis() const { return attributes_.channel_axis; }

    /// \brief Sets the axis that the channels are on.
    /// \param channel_axis from -rank to rank - 1 of the later input; negative values count from the end
    void set_channel_axis(std::int64_t channel_axis) { attributes_.channel_axis = channel_axis; }

    /// \brief The operator's name.
    /// \return for example "BatchNormTrainingBackprop"
    const char* get_type_name() const { return attributes_.signature->name; }

    /// \brief Checks the inputs and returns the types and shapes of the outputs.
    /// \param inputs the inputs in the operator's order; only types and shapes are looked at
    /// \return the types and shapes of the outputs in the operator's order, without memory
    /// \throws TypeError if an input's element type is not one the operator takes
    /// \throws ValueError if a rank, a shape, the channel axis or the number of inputs is wrong
    std::vector<Tensor> validate_and_infer_types(const std::vector<Tensor>& inputs) const {
        detail::Call call(attributes_);
        const Views<detail::MOST_INPUTS> views(inputs);
        call.check_inputs(views.first, inputs.size());
        std::vector<Tensor> outputs;
        outputs.reserve(call.output_count());
        for (std::size_t k = 0; k < call.output_count(); ++k) {
            outputs.emplace_back(call.output_type(k), call.is_tensor(k) ? inputs[0].shape : Shape{call.channels()});
        }
        return outputs;
    }

    /// \brief Computes the outputs.
    ///
    /// Everything is checked before the first write, so a call that throws has changed nothing. An output of the
    /// input's shape may have exactly the memory of an input of that shape. The call does not need the GIL, and many
    /// threads may call at once.
    /// \param outputs where to write, in the operator's order; a default-constructed Tensor is not computed
    /// \param inputs the inputs in the operator's order. `gamma` and `beta` may be default-constructed Tensors, which
    ///        stand for ones and zeros. Inputs that the operator's table calls optional may be default-constructed
    ///        Tensors too, or be left out at the end
    /// \param num_threads upper limit of the number of threads; 0 stands for the default found when bnbp was imported
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
        detail::Call call(attributes_);
        const Views<detail::MOST_INPUTS> input_views(inputs);
        const Views<detail::MOST_OUTPUTS> output_views(outputs);
        call.check_inputs(input_views.first, inputs.size());
        call.check_outputs(output_views.first, outputs.size());
        call.run(kernels, num_threads);
    }

protected:
    /// \cond internal
    BatchNormBase(const detail::Signature& signature, double epsilon, std::int64_t channel_axis) {
        attributes_.signature = &signature;
        attributes_.channel_axis = channel_axis;
        set_eps_value(epsilon);
    }

    detail::Attributes attributes_;
    /// \endcond

private:
    /// Views of the tensors, at most as many as an operator has. Further tensors are not looked at.
    template <std::size_t most> struct Views {
        detail::View first[most];
        explicit Views(const std::vector<Tensor>& tensors) {
            for (std::size_t k = 0; k < tensors.size() && k < most; ++k) {
                first[k] = detail::View(tensors[k]);
            }
        }
    };
};

/// \brief The base class of the operators that may include an addition and an activation, and of their gradients.
///
/// The forward operators compute `activation(batch norm + addend)`. The gradients first set `normalized_delta` to 0
/// where the activation is flat, that is, where the forward output is `<= 0` or, for relu6, `>= 6`.
class BatchNormActivated : public BatchNormBase {
public:
    /// \brief The activation that is applied to the forward operator's output.
    /// \return the attribute `activation`
    Activation get_activation() const { return attributes_.activation; }

    /// \brief Sets the activation that is applied to the forward operator's output.
    /// \param activation with relu or relu6, the forward operator normalises with mean and variance as it returns them
    /// \throws ValueError for a number that is not in the enumeration
    void set_activation(Activation activation) {
        if (activation != Activation::none && activation != Activation::relu && activation != Activation::relu6) {
            throw ValueError("activation: expected none, relu or relu6, got number " +
                             std::to_string(static_cast<int>(activation)));
        }
        attributes_.activation = activation;
    }

    /// \brief Whether a tensor is added before the activation.
    /// \return the attribute `addend`
    bool get_addend() const { return attributes_.addend; }

    /// \brief Sets whether a tensor is added before the activation.
    /// \param addend if true, the forward operators have `addend` as their last input, and the gradients have
    ///        `addend_delta` as their last output
    void set_addend(bool addend) { attributes_.addend = addend; }

protected:
    using BatchNormBase::BatchNormBase;
};

/// \brief Normalises a batch with its own mean and variance.
///
/// | Inputs | Shape | Outputs | Shape |
/// |---|---|---|---|
/// | `input` | (N, C, ...) | `normalized` | that of `input` |
/// | `gamma`, or none for ones | (C) | `batch_mean` | (C) |
/// | `beta`, or none for zeros | (C) | `batch_variance`, biased | (C) |
/// | `addend`, with the attribute | that of `input` | | |
class BatchNormTraining : public BatchNormActivated {
public:
    /// \brief The operator with its attributes.
    /// \param epsilon added to the variance before the square root; finite and >= 0
    /// \param channel_axis the axis of `input` that the channels are on; negative values count from the end
    /// \throws ValueError if epsilon is negative, infinite or not a number
    explicit BatchNormTraining(double epsilon = 1e-5, std::int64_t channel_axis = 1)
        : BatchNormActivated(detail::training_signature(), epsilon, channel_axis) {}
};

/// \brief The gradient of BatchNormTraining, through the batch's mean and variance as well.
///
/// | Inputs | Shape | Outputs | Shape |
/// |---|---|---|---|
/// | `input` | (N, C, ...) | `input_delta` | that of `input` |
/// | `gamma`, or none for ones | (C) | `gamma_delta` | (C) |
/// | `beta`, or none; not used | (C) | `beta_delta` | (C) |
/// | `mean`, as BatchNormTraining gave it | (C) | | |
/// | `variance`, likewise | (C) | `addend_delta`, with the attribute `addend` | that of `input` |
/// | `normalized_delta` | that of `input` | | |
/// | `normalized`, optional | that of `input` | | |
///
/// `normalized` is the forward operator's output, and shows where the activation is flat. Without it, the operator
/// computes this again from the other inputs, with the same result bit for bit. With both an activation and an addend,
/// `normalized` must be given.
class BatchNormTrainingBackprop : public BatchNormActivated {
public:
    /// \copydoc BatchNormTraining::BatchNormTraining
    explicit BatchNormTrainingBackprop(double epsilon = 1e-5, std::int64_t channel_axis = 1)
        : BatchNormActivated(detail::training_backprop_signature(), epsilon, channel_axis) {}
};

/// \brief Mean and variance of a batch, or of a part of one, as numbers that can be merged.
///
/// | Inputs | Shape | Outputs | Shape |
/// |---|---|---|---|
/// | `input` | (N, C, ...) | `mean` | (C), f64 |
/// | | | `m2`, the sum of the squared deviations from it | (C), f64 |
///
/// Two parts with `n` and `m` elements in a channel are merged by the formulas of Chan, Golub and LeVeque. The mean is
/// `mean_n + (mean_m - mean_n) m / (n + m)`, and m2 is `m2_n + m2_m + (mean_m - mean_n)^2 n m / (n + m)`. The biased
/// variance of the whole batch is its `m2` divided by its number of elements.
class BatchNormTrainingStatistics : public BatchNormBase {
public:
    /// \brief The operator with its attribute.
    /// \param channel_axis the axis of `input` that the channels are on; negative values count from the end
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
/// | `gamma`, optional | (C) | | |
/// | `beta`, optional | (C) | | |
/// | `variance`, optional | (C) | | |
/// | `normalized`, optional | that of `input` | | |
///
/// The sums of two parts are added. Only an activation needs the optional inputs. It needs `normalized`, or the three
/// others and the attribute epsilon.
class BatchNormTrainingBackpropReduce : public BatchNormActivated {
public:
    /// \brief The operator with its attributes.
    /// \param channel_axis the axis of `input` that the channels are on; negative values count from the end
    /// \param epsilon as in BatchNormTrainingBackprop; only an activation needs it
    explicit BatchNormTrainingBackpropReduce(std::int64_t channel_axis = 1, double epsilon = 1e-5)
        : BatchNormActivated(detail::training_backprop_reduce_signature(), epsilon, channel_axis) {}
};

/// \brief The second half of BatchNormTrainingBackprop: the gradient of a part of a batch from the whole batch's sums.
///
/// | Inputs | Shape | Outputs | Shape |
/// |---|---|---|---|
/// | `input` | (N, C, ...) | `input_delta` | that of `input` |
/// | `gamma`, or none for ones | (C) | `gamma_delta` | (C) |
/// | `beta`, or none; not used | (C) | `beta_delta` | (C) |
/// | `mean`, of the whole batch | (C) | | |
/// | `variance`, likewise | (C) | `addend_delta`, with the attribute `addend` | that of `input` |
/// | `normalized_delta` | that of `input` | | |
/// | `delta_sum`, of the whole batch | (C), f64 | | |
/// | `delta_centered_sum`, likewise | (C), f64 | | |
/// | `normalized`, optional | that of `input` | | |
class BatchNormTrainingBackpropApply : public BatchNormActivated {
public:
    /// \brief The operator with its attributes.
    /// \param count the number of elements of a channel in the whole batch
    /// \param epsilon added to the variance before the square root; finite and >= 0
    /// \param channel_axis the axis of `input` that the channels are on; negative values count from the end
    /// \throws ValueError if count is negative, or epsilon is negative, infinite or not a number
    explicit BatchNormTrainingBackpropApply(std::int64_t count, double epsilon = 1e-5, std::int64_t channel_axis = 1)
        : BatchNormActivated(detail::training_backprop_apply_signature(), epsilon, channel_axis) {
        set_count(count);
    }

    /// \brief The number of elements of a channel in the whole batch.
    /// \return the attribute `count`
    std::int64_t get_count() const { return attributes_.count; }

    /// \brief Sets the number of elements of a channel in the whole batch.
    /// \param count at least the number of elements of a channel in the later input
    /// \throws ValueError if it is negative
    void set_count(std::int64_t count) { attributes_.set_count(count); }
};

/// \brief Normalises with a given mean and variance.
///
/// | Inputs | Shape | Outputs | Shape |
/// |---|---|---|---|
/// | `input` | (N, C, ...) | `normalized` | that of `input` |
/// | `gamma`, or none for ones | (C) | | |
/// | `beta`, or none for zeros | (C) | | |
/// | `mean` | (C) | | |
/// | `variance` | (C) | | |
/// | `addend`, with the attribute | that of `input` | | |
class BatchNormInference : public BatchNormActivated {
public:
    /// \copydoc BatchNormTraining::BatchNormTraining
    explicit BatchNormInference(double epsilon = 1e-5, std::int64_t channel_axis = 1)
        : BatchNormActivated(detail::inference_signature(), epsilon, channel_axis) {}
};

/// \brief The gradient of BatchNormInference: `mean` and `variance` are constants.
///
/// It has the inputs and outputs of BatchNormTrainingBackprop. nGraph has no such operator, but fine-tuning with frozen
/// statistics needs it.
class BatchNormInferenceBackprop : public BatchNormActivated {
public:
    /// \copydoc BatchNormTraining::BatchNormTraining
    explicit BatchNormInferenceBackprop(double epsilon = 1e-5, std::int64_t channel_axis = 1)
        : BatchNormActivated(detail::inference_backprop_signature(), epsilon, channel_axis) {}
};

} // namespace op
} // namespace bnbp

#endif // BNBP_BATCH_NORM_HPP
