// A C++ user of the installed header: no Python object goes in or out of the operators.
#include <Python.h>

#include <bnbp/batch_norm.hpp>

#include <stdexcept>
#include <string>
#include <vector>

namespace {

using bnbp::Tensor;

const std::vector<double> x = {1.0, 5.0, -2.0, 4.0, 3.0, 0.5, 7.0, 2.0, 0.0, 1.5, -1.0, 6.0};
const std::vector<double> dy = {0.5, -1.0, 2.0, 0.0, 1.0, 1.5, -0.5, 3.0, 0.25, -2.0, 1.0, 0.75};
const std::vector<double> gamma_ = {1.5, -2.0};
const bnbp::Shape shape = {3, 2, 2};

PyObject* list_of(const std::vector<double>& values) {
    PyObject* list = PyList_New(0);
    for (double value : values) {
        PyObject* number = PyFloat_FromDouble(value);
        PyList_Append(list, number);
        Py_DECREF(number);
    }
    return list;
}

// The forward operator and its gradient: what went in and what came out.
PyObject* gradient(PyObject*, PyObject*) {
    if (!bnbp::import_kernels()) {
        return nullptr;
    }
    std::vector<double> y(12), mean(2), variance(2), dx(12), gamma_delta(2), beta_delta(2);
    try {
        const Tensor input(x.data(), shape), gamma(gamma_.data(), {2}), none;
        bnbp::op::BatchNormTraining(0.5).evaluate({{y.data(), shape}, {mean.data(), {2}}, {variance.data(), {2}}},
                                                  {input, gamma, none});
        const bnbp::op::BatchNormTrainingBackprop op(0.5);
        const std::vector<Tensor> inputs = {
            input, gamma, none, {mean.data(), {2}}, {variance.data(), {2}}, {dy.data(), shape}};
        const std::vector<Tensor> types = op.validate_and_infer_types(inputs);
        if (types.size() != 3 || types[0].shape != shape || types[1].shape != bnbp::Shape{2}) {
            throw std::runtime_error("inferred the wrong shapes");
        }
        op.evaluate({{dx.data(), shape}, {gamma_delta.data(), {2}}, {beta_delta.data(), {2}}}, inputs, 2);
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
    return Py_BuildValue("(NNNNNN)", list_of(x), list_of(dy), list_of(gamma_), list_of(dx), list_of(gamma_delta),
                         list_of(beta_delta));
}

template <typename Error, typename Call> std::string message_of(Call call) {
    try {
        call();
    } catch (const Error& error) {
        return error.what();
    } catch (const std::exception& error) {
        return std::string("another type of error: ") + error.what();
    }
    return "no error";
}

// What C++ callers are told, by the name of the mistake.
PyObject* errors(PyObject*, PyObject*) {
    using bnbp::TypeError;
    using bnbp::ValueError;
    std::vector<double> memory(12);
    std::vector<float> floats(2);
    const Tensor input(x.data(), shape), vector(gamma_.data(), {2}), none, out(memory.data(), shape);
    const bnbp::op::BatchNormInference op;
    auto evaluate = [&](const std::vector<Tensor>& outputs, const std::vector<Tensor>& inputs) {
        return [&op, outputs, inputs] { op.evaluate(outputs, inputs); };
    };
    Tensor odd(x.data(), shape);
    odd.strides = {8};
    const std::vector<std::pair<const char*, std::string>> table = {
        {"epsilon", message_of<ValueError>([] { bnbp::op::BatchNormTraining(-1.0); })},
        {"type", message_of<TypeError>(evaluate({out}, {input, {floats.data(), {2}}, none, vector, vector}))},
        {"shape", message_of<ValueError>(evaluate({out}, {input, none, none, {gamma_.data(), {1}}, vector}))},
        {"count", message_of<ValueError>(evaluate({out}, {input, none, none, vector}))},
        {"outputs", message_of<ValueError>(evaluate({out, out}, {input, none, none, vector, vector}))},
        {"read-only", message_of<ValueError>(evaluate({input}, {input, none, none, vector, vector}))},
        {"null",
         message_of<ValueError>(evaluate({{bnbp::ElementType::f64, shape}}, {input, none, none, vector, vector}))},
        {"strides", message_of<ValueError>(evaluate({out}, {odd, none, none, vector, vector}))},
        {"length", message_of<ValueError>(evaluate({out}, {{x.data(), {-3, 2, 2}}, none, none, vector, vector}))},
    };
    PyObject* dict = PyDict_New();
    for (const auto& [name, message] : table) {
        PyObject* text = PyUnicode_FromString(message.c_str());
        PyDict_SetItemString(dict, name, text);
        Py_DECREF(text);
    }
    return dict;
}

PyObject* before_import(PyObject*, PyObject*) {
    const std::string message = message_of<std::logic_error>([] { bnbp::op::BatchNormTraining().evaluate({}, {}); });
    return PyUnicode_FromString(message.c_str());
}

PyMethodDef methods[] = {{"gradient", gradient, METH_NOARGS, nullptr},
                         {"errors", errors, METH_NOARGS, nullptr},
                         {"before_import", before_import, METH_NOARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "caller", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

} // namespace

PyMODINIT_FUNC PyInit_caller() { return PyModule_Create(&module); }
