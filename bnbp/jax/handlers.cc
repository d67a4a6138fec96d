/// \file
/// \brief bnbp's operators as XLA's foreign functions, for buffers in the CPU's memory.
///
/// A handler is given an operator's tensors, as many as there are, in the order of its signature, and attributes:
/// `present` and `wanted` have a bit for each of the operator's inputs and outputs, the others are the operator's own.
/// The buffers become the views of a detail::Call, which has the rules, as at the boundary to NumPy. No handler needs
/// the GIL or copies a tensor, and several may run at once.
///
/// What the operators' halves exchange is float64, which JAX does not have unless it is told to. It crosses JAX as its
/// bytes, two uint32 for a number: an array of shape (2, C, 2) has a pair of vectors, and where a pair of each device
/// is gathered, the shape is (devices, 2, C, 2).
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "bnbp/batch_norm.hpp"
#include "bnbp/python.hpp"
#include "ffi.h"
#include "merge.h"

namespace bnbp {
namespace jax {
namespace {

using detail::Call;
using detail::MOST_INPUTS;
using detail::MOST_OUTPUTS;
using detail::Operand;
using detail::Role;
using detail::Signature;
using detail::View;
using xla::CallFrame;

ElementType element_type(int type) {
    switch (type) {
    case xla::F16:
        return ElementType::f16;
    case xla::BF16:
        return ElementType::bf16;
    case xla::F32:
        return ElementType::f32;
    case xla::F64:
        return ElementType::f64;
    default:
        return ElementType::other;
    }
}

View view_of(const xla::Buffer& buffer, bool writable) {
    View view;
    view.element_type = element_type(buffer.type);
    view.type_name = view.element_type == ElementType::other ? "another type" : nullptr;
    view.rank = static_cast<std::size_t>(buffer.rank);
    view.shape = buffer.shape;
    view.data = buffer.data;
    view.writable = writable;
    return view;
}

View vector_of(double* data, const std::int64_t* length) {
    View view;
    view.element_type = ElementType::f64;
    view.rank = 1;
    view.shape = length;
    view.data = data;
    view.writable = true;
    return view;
}

/// The operands or the results, taken one after the other.
class Buffers {
public:
    Buffers(const xla::Buffers& all, const char* what) : all_(all), what_(what) {}

    const xla::Buffer& next() {
        if (next_ >= all_.size || all_.kinds[next_] != xla::BUFFER) {
            throw std::logic_error(std::string("bnbp.jax: expected more ") + what_);
        }
        return *all_.buffers[next_++];
    }

    /// The bytes of float64 numbers: pairs of vectors of length `channels`, and how many pairs.
    double* pairs(std::int64_t& channels, std::size_t& count) {
        const xla::Buffer& buffer = next();
        const std::int64_t* const last = buffer.shape + buffer.rank - 3;
        if (buffer.type != xla::U32 || buffer.rank < 3 || buffer.rank > 4 || last[0] != 2 || last[2] != 2) {
            throw std::logic_error("bnbp.jax: expected pairs of vectors as bytes");
        }
        channels = last[1];
        count = buffer.rank == 4 ? static_cast<std::size_t>(buffer.shape[0]) : 1;
        return static_cast<double*>(buffer.data); // XLA aligns to 16 bytes and more
    }

private:
    const xla::Buffers& all_;
    const char* what_;
    std::int64_t next_ = 0;
};

/// An attribute, which is a number of type T.
template <typename T> T attribute(const CallFrame& frame, const char* name) {
    const xla::Attributes& all = frame.attributes;
    const std::size_t length = std::strlen(name);
    for (std::int64_t k = 0; k < all.size; ++k) {
        if (all.names[k]->size == length && !std::memcmp(all.names[k]->data, name, length)) {
            const xla::Scalar* const scalar = static_cast<const xla::Scalar*>(all.values[k]);
            if (all.kinds[k] != xla::SCALAR || scalar->type != (std::is_same<T, double>::value ? xla::F64 : xla::S64)) {
                break;
            }
            T value;
            std::memcpy(&value, scalar->value, sizeof value);
            return value;
        }
    }
    throw std::logic_error(std::string("bnbp.jax: expected the attribute ") + name);
}

void set_attributes(detail::Attributes& attributes, double epsilon, std::int64_t channel_axis, std::int64_t activation,
                    bool addend) {
    attributes.set_epsilon(epsilon);
    attributes.channel_axis = channel_axis;
    attributes.activation = static_cast<Activation>(activation);
    attributes.addend = addend;
}

/// Compute an operator.
void run(const Signature& signature, const CallFrame& frame) {
    const std::int64_t present = attribute<std::int64_t>(frame, "present"),
                       wanted = attribute<std::int64_t>(frame, "wanted"),
                       count = attribute<std::int64_t>(frame, "count");
    Call call;
    call.attributes.signature = &signature;
    set_attributes(call.attributes, attribute<double>(frame, "epsilon"), attribute<std::int64_t>(frame, "channel_axis"),
                   attribute<std::int64_t>(frame, "activation"), attribute<std::int64_t>(frame, "addend") != 0);
    if (count >= 0) {
        call.attributes.set_count(count);
    }
    Buffers operands(frame.operands, "operands"), results(frame.results, "results");
    View inputs[MOST_INPUTS], outputs[MOST_OUTPUTS];
    std::vector<double> sums;
    std::int64_t channels = 0;
    for (std::size_t k = 0; k < signature.input_count; ++k) {
        if (!(present >> k & 1)) {
            continue;
        }
        if (signature.inputs[k] == Operand::delta_sum) { // and delta_centered_sum: of each part, in their order
            std::size_t parts = 0;
            const double* const pairs = operands.pairs(channels, parts);
            const std::size_t length = 2 * static_cast<std::size_t>(channels);
            sums.assign(pairs, pairs + length);
            for (std::size_t i = length; i < parts * length; ++i) {
                sums[i % length] += pairs[i];
            }
            inputs[k] = vector_of(sums.data(), &channels);
            inputs[k + 1] = vector_of(sums.data() + channels, &channels);
            ++k;
            continue;
        }
        inputs[k] = view_of(operands.next(), false);
    }
    call.check_inputs(inputs, signature.input_count);
    if (signature.outputs[0].role == Role::sum) {
        std::size_t parts = 0;
        double* const pair = results.pairs(channels, parts);
        outputs[0] = vector_of(pair, &channels);
        outputs[1] = vector_of(pair + channels, &channels);
    } else {
        for (std::size_t k = 0; k < call.output_count(); ++k) {
            if (wanted >> k & 1) {
                outputs[k] = view_of(results.next(), true);
            }
        }
    }
    call.check_outputs(outputs, call.output_count());
    call.run(detail::kernel_table(), 0);
}

/// Merge the statistics of parts of one size: pairs of mean and squared deviations become mean and variance.
void merge_statistics(const CallFrame& frame) {
    Buffers operands(frame.operands, "operands"), results(frame.results, "results");
    std::int64_t channels = 0;
    std::size_t parts = 0;
    const double* const pairs = operands.pairs(channels, parts);
    const View mean = view_of(results.next(), true), variance = view_of(results.next(), true);
    const double count = static_cast<double>(attribute<std::int64_t>(frame, "count"));
    const std::size_t length = static_cast<std::size_t>(channels);
    for (const View* each : {&mean, &variance}) {
        if (each->element_type == ElementType::other || each->rank != 1 || each->shape[0] != channels) {
            throw std::logic_error("bnbp.jax: expected results of the length of the parts' vectors");
        }
    }
    for (std::size_t c = 0; c < length; ++c) {
        const merge::Statistics whole = merge::merge(pairs + c, pairs + length + c, parts, 2 * length, count);
        merge::store(mean.data, c, mean.element_type, whole.mean);
        merge::store(variance.data, c, variance.element_type, whole.variance);
    }
}

xla::Error* error(const CallFrame& frame, int code, const char* message) {
    xla::ErrorCreateArgs arguments{sizeof arguments, nullptr, message, code};
    return frame.api->error_create(&arguments);
}

/// What every handler does round its work: answer XLA's question for the version, and turn exceptions into errors.
template <typename Work> xla::Error* handle(CallFrame* frame, Work work) {
    for (xla::Extension* each = frame->extensions; each; each = each->next) {
        if (each->type == xla::METADATA_EXTENSION) {
            xla::Metadata* const metadata = reinterpret_cast<xla::MetadataExtension*>(each)->metadata;
            // XLA drops minor versions after a while. What is read here is in all of one major version, so that the
            // answer is XLA's own minor version, whichever that is.
            const xla::Version* const own = frame->api ? &frame->api->api_version : nullptr;
            const bool known = own && own->major_version == xla::MAJOR_VERSION;
            metadata->api_version.major_version = xla::MAJOR_VERSION;
            metadata->api_version.minor_version = known ? own->minor_version : 1;
            metadata->traits = 0;
            return nullptr;
        }
    }
    if (frame->struct_size < sizeof(CallFrame)) {
        return error(*frame, xla::INTERNAL, "bnbp.jax: expected another version of XLA's foreign function interface");
    }
    if (frame->stage != xla::EXECUTE) {
        return nullptr;
    }
    try {
        work(*frame);
        return nullptr;
    } catch (const std::bad_alloc&) {
        return error(*frame, xla::RESOURCE_EXHAUSTED, "bnbp.jax: no memory for the workspace");
    } catch (const std::invalid_argument& exception) {
        return error(*frame, xla::INVALID_ARGUMENT, exception.what());
    } catch (const std::exception& exception) {
        return error(*frame, xla::INTERNAL, exception.what());
    }
}

template <const Signature& (*signature)()> xla::Error* handler(CallFrame* frame) {
    return handle(frame, [](const CallFrame& call) { run(signature(), call); });
}

xla::Error* merge_handler(CallFrame* frame) { return handle(frame, merge_statistics); }

using namespace detail;

/// The handlers, under the names of the operators.
const struct {
    const char* name;
    const Signature& (*signature)();
    xla::Handler handler;
} HANDLERS[] = {
    {"batch_norm_training", training_signature, handler<training_signature>},
    {"batch_norm_training_statistics", training_statistics_signature, handler<training_statistics_signature>},
    {"batch_norm_inference", inference_signature, handler<inference_signature>},
    {"batch_norm_training_backprop", training_backprop_signature, handler<training_backprop_signature>},
    {"batch_norm_inference_backprop", inference_backprop_signature, handler<inference_backprop_signature>},
    {"batch_norm_training_backprop_reduce", training_backprop_reduce_signature,
     handler<training_backprop_reduce_signature>},
    {"batch_norm_training_backprop_apply", training_backprop_apply_signature,
     handler<training_backprop_apply_signature>},
    {"merge_statistics", nullptr, merge_handler},
};

const Signature* signature_of(const char* name) {
    for (const auto& each : HANDLERS) {
        if (each.signature && !std::strcmp(each.name, name)) {
            return &each.signature();
        }
    }
    return nullptr;
}

ElementType type_named(const char* name) {
    for (ElementType type : {ElementType::f16, ElementType::bf16, ElementType::f32, ElementType::f64}) {
        if (name_of(type) == name) {
            return type;
        }
    }
    return ElementType::other;
}

/// An operand that has a type and a shape, and no memory: a tuple of the two, or None.
bool describe(PyObject* operand, View& view, std::vector<std::int64_t>& shape) {
    if (operand == Py_None) {
        return true;
    }
    const char* type = nullptr;
    PyObject* lengths = nullptr;
    if (!PyArg_ParseTuple(operand, "sO!", &type, &PyTuple_Type, &lengths)) {
        return false;
    }
    for (Py_ssize_t axis = 0; axis < PyTuple_Size(lengths); ++axis) {
        shape.push_back(PyLong_AsLongLong(PyTuple_GetItem(lengths, axis)));
    }
    view.element_type = type_named(type);
    view.type_name = type;
    view.rank = shape.size();
    view.shape = shape.data();
    return !PyErr_Occurred();
}

/// check(operator, operands, epsilon, channel_axis, activation, addend): the types of the outputs, or an error.
PyObject* check(PyObject*, PyObject* arguments) {
    const char* name = nullptr;
    PyObject* operands = nullptr;
    double epsilon = 0;
    long long channel_axis = 0;
    int activation = 0, addend = 0;
    if (!PyArg_ParseTuple(arguments, "sO!dLip", &name, &PyTuple_Type, &operands, &epsilon, &channel_axis, &activation,
                          &addend)) {
        return nullptr;
    }
    const Signature* const signature = signature_of(name);
    if (!signature || PyTuple_Size(operands) != static_cast<Py_ssize_t>(signature->input_count)) {
        PyErr_SetString(PyExc_ValueError, "name: expected an operator, and its operands");
        return nullptr;
    }
    View views[MOST_INPUTS];
    std::vector<std::int64_t> shapes[MOST_INPUTS];
    for (std::size_t k = 0; k < signature->input_count; ++k) {
        if (!describe(PyTuple_GetItem(operands, static_cast<Py_ssize_t>(k)), views[k], shapes[k])) {
            return nullptr;
        }
    }
    try {
        Call call;
        call.attributes.signature = signature;
        set_attributes(call.attributes, epsilon, channel_axis, activation, addend != 0);
        call.check_inputs(views, signature->input_count);
        PyObject* const types = PyTuple_New(static_cast<Py_ssize_t>(call.output_count()));
        for (std::size_t k = 0; types && k < call.output_count(); ++k) {
            PyTuple_SetItem(types, static_cast<Py_ssize_t>(k),
                            PyUnicode_FromString(name_of(call.output_type(k)).c_str()));
        }
        return types;
    } catch (...) {
        set_python_error();
    }
    return nullptr;
}

/// The handlers as capsules, by their names; the kernels are found here.
PyObject* capsules(PyObject*, PyObject*) {
    PyObject* const result = import_kernels() ? PyDict_New() : nullptr;
    for (const auto& each : HANDLERS) {
        void* pointer = nullptr;
        std::memcpy(&pointer, &each.handler, sizeof pointer);
        PyObject* const capsule = result ? PyCapsule_New(pointer, nullptr, nullptr) : nullptr;
        if (!capsule || PyDict_SetItemString(result, each.name, capsule)) {
            Py_XDECREF(capsule);
            Py_XDECREF(result);
            return nullptr;
        }
        Py_DECREF(capsule);
    }
    return result;
}

/// inputs(operator): the names of its inputs.
PyObject* inputs(PyObject*, PyObject* name) {
    const char* const text = PyUnicode_AsUTF8AndSize(name, nullptr);
    const Signature* const signature = text ? signature_of(text) : nullptr;
    if (!signature) {
        if (!PyErr_Occurred()) {
            PyErr_SetString(PyExc_ValueError, "name: expected an operator");
        }
        return nullptr;
    }
    PyObject* const names = PyTuple_New(static_cast<Py_ssize_t>(signature->input_count));
    for (std::size_t k = 0; names && k < signature->input_count; ++k) {
        PyTuple_SetItem(names, static_cast<Py_ssize_t>(k), PyUnicode_FromString(spec_of(signature->inputs[k]).name));
    }
    return names;
}

PyMethodDef methods[] = {
    {"capsules", capsules, METH_NOARGS, "The handlers as capsules, by the names of the operators."},
    {"check", check, METH_VARARGS, "Check the operands' types and shapes; return the types of the outputs."},
    {"inputs", inputs, METH_O, "The names of an operator's inputs."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef_Slot slots[] = {{0, nullptr}};
PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "bnbp.jax.handlers", nullptr, 0, methods, slots, nullptr, nullptr, nullptr};

} // namespace
} // namespace jax
} // namespace bnbp

PyMODINIT_FUNC PyInit_handlers() { return PyModuleDef_Init(&bnbp::jax::module); }
