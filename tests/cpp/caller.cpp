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

// The gradient of a batch in two parts, the second with its axes in another order: what evaluate gives for the whole,
// and what the halves give.
PyObject* parts(PyObject*, PyObject*) {
    using namespace bnbp::op;
    std::vector<double> whole(12), gamma_delta(2), beta_delta(2), apart(12), sums(4), part_sums(4), statistics(4);
    const std::vector<double> mean = {2.0, 2.5}, variance = {8.0, 4.0};
    // Elements 4 to 11, those of n = 1 and 2, with n innermost in memory.
    std::vector<double> moved_x(8), moved_dy(8);
    for (int n = 0; n < 2; ++n) {
        for (int k = 0; k < 4; ++k) {
            moved_x[static_cast<std::size_t>(2 * k + n)] = x[static_cast<std::size_t>(4 + 4 * n + k)];
            moved_dy[static_cast<std::size_t>(2 * k + n)] = dy[static_cast<std::size_t>(4 + 4 * n + k)];
        }
    }
    const Tensor none, gamma(gamma_.data(), {2}), mean_of(mean.data(), {2}), variance_of(variance.data(), {2});
    Tensor x1(x.data(), {1, 2, 2}), dy1(dy.data(), {1, 2, 2}), x2(moved_x.data(), {2, 2, 2}),
        dy2(moved_dy.data(), {2, 2, 2}), dx2(apart.data() + 4, {2, 2, 2});
    x2.strides = dy2.strides = {8, 32, 16};
    try {
        BatchNormTrainingBackprop(0.5).evaluate(
            {{whole.data(), shape}, {gamma_delta.data(), {2}}, {beta_delta.data(), {2}}},
            {{x.data(), shape}, gamma, none, mean_of, variance_of, {dy.data(), shape}});
        const BatchNormTrainingBackpropReduce reduce;
        reduce.evaluate({{sums.data(), {2}}, {sums.data() + 2, {2}}}, {x1, mean_of, dy1});
        reduce.evaluate({{part_sums.data(), {2}}, {part_sums.data() + 2, {2}}}, {x2, mean_of, dy2});
        for (std::size_t k = 0; k < 4; ++k) {
            sums[k] += part_sums[k];
        }
        const Tensor delta_sum(sums.data(), {2}), delta_centered_sum(sums.data() + 2, {2});
        const BatchNormTrainingBackpropApply apply(6, 0.5);
        if (apply.get_count() != 6) {
            throw std::runtime_error("forgot the count");
        }
        apply.evaluate({{apart.data(), {1, 2, 2}}, none, none},
                       {x1, gamma, none, mean_of, variance_of, dy1, delta_sum, delta_centered_sum});
        apply.evaluate({dx2, none, none}, {x2, gamma, none, mean_of, variance_of, dy2, delta_sum, delta_centered_sum});
        BatchNormTrainingStatistics().evaluate({{statistics.data(), {2}}, {statistics.data() + 2, {2}}}, {x2});
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
    return Py_BuildValue("(NNN)", list_of(whole), list_of(apart), list_of(statistics));
}

// The forward operator with ReLU6 and the batch's dy as its addend, and the gradient: normalized, input_delta,
// gamma_delta and addend_delta of the whole operator; then the sums of the first half, and the sums and input_delta
// without an addend, where normalized need not be given.
PyObject* activated(PyObject*, PyObject*) {
    using namespace bnbp::op;
    std::vector<double> y(12), plain(12), dx(12), gamma_delta(2), addend_delta(12), sums(4), again(4), apart(12);
    const std::vector<double> mean = {2.0, 2.5}, variance = {8.0, 4.0}, beta_ = {0.5, 3.0};
    const Tensor none, input(x.data(), shape), gamma(gamma_.data(), {2}), beta(beta_.data(), {2}),
        mean_of(mean.data(), {2}), variance_of(variance.data(), {2}), delta(dy.data(), shape),
        normalized(y.data(), shape);
    const auto relu6 = [](auto op, bool addend) {
        op.set_activation(bnbp::Activation::relu6);
        op.set_addend(addend);
        if (op.get_activation() != bnbp::Activation::relu6 || op.get_addend() != addend) {
            throw std::runtime_error("forgot an attribute");
        }
        return op;
    };
    try {
        relu6(BatchNormInference(0.5), true).evaluate({normalized}, {input, gamma, beta, mean_of, variance_of, delta});
        relu6(BatchNormInference(0.5), false)
            .evaluate({{plain.data(), shape}}, {input, gamma, beta, mean_of, variance_of});
        const auto whole = relu6(BatchNormTrainingBackprop(0.5), true);
        const std::vector<Tensor> inputs = {input, gamma, beta, mean_of, variance_of, delta, normalized};
        if (whole.validate_and_infer_types(inputs).size() != 4) {
            throw std::runtime_error("inferred the wrong number of outputs");
        }
        whole.evaluate({{dx.data(), shape}, {gamma_delta.data(), {2}}, none, {addend_delta.data(), shape}}, inputs);
        const Tensor first(sums.data(), {2}), second(sums.data() + 2, {2});
        relu6(BatchNormTrainingBackpropReduce(1, 0.5), true)
            .evaluate({first, second}, {input, mean_of, delta, none, none, none, normalized});
        const Tensor third(again.data(), {2}), fourth(again.data() + 2, {2});
        relu6(BatchNormTrainingBackpropReduce(1, 0.5), false)
            .evaluate({third, fourth}, {input, mean_of, delta, gamma, beta, variance_of});
        relu6(BatchNormTrainingBackpropApply(6, 0.5), false)
            .evaluate({{apart.data(), shape}, none, none},
                      {input, gamma, beta, mean_of, variance_of, delta, third, fourth});
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
    return Py_BuildValue("(NNNNNNNN)", list_of(y), list_of(plain), list_of(dx), list_of(gamma_delta),
                         list_of(addend_delta), list_of(sums), list_of(again), list_of(apart));
}

// 16-bit numbers, whose parameters are float: 1, 2, 3 and 4 in either type, normalised with mean 2 and variance 1.
PyObject* halves(PyObject*, PyObject*) {
    using bnbp::ElementType;
    const std::uint16_t numbers[2][4] = {{0x3c00, 0x4000, 0x4200, 0x4400}, {0x3f80, 0x4000, 0x4040, 0x4080}};
    const ElementType types[2] = {ElementType::f16, ElementType::bf16};
    const float mean = 2, variance = 1;
    PyObject* results = PyList_New(0);
    for (int k = 0; k < 2; ++k) {
        std::uint16_t y[4] = {};
        try {
            bnbp::op::BatchNormInference(0).evaluate(
                {{types[k], y, {4, 1}}}, {{types[k], numbers[k], {4, 1}}, {}, {}, {&mean, {1}}, {&variance, {1}}});
        } catch (const std::exception& error) {
            PyErr_SetString(PyExc_RuntimeError, error.what());
            return nullptr;
        }
        for (const std::uint16_t bits : y) {
            PyObject* number = PyLong_FromLong(bits);
            PyList_Append(results, number);
            Py_DECREF(number);
        }
    }
    return results;
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
    Tensor odd(x.data(), shape), broadcast = out;
    odd.strides = {8};
    broadcast.strides = {32, 16, 0};
    Tensor far_away = out;
    far_away.strides = {std::int64_t{1} << 62, 16, 8};
    Tensor unknown = input;
    unknown.element_type = static_cast<bnbp::ElementType>(9);
    Tensor untyped(memory.data(), {2}); // none, and so nothing is written to it
    untyped.element_type = bnbp::ElementType::none;
    bnbp::op::BatchNormTraining().evaluate({none, untyped, none}, {input, none, none});
    bnbp::op::BatchNormInference adding;
    adding.set_addend(true);
    bnbp::op::BatchNormTrainingBackprop gradient_op;
    gradient_op.set_activation(bnbp::Activation::relu);
    gradient_op.set_addend(true);
    const bnbp::Shape endless = {std::int64_t{1} << 40, 2, std::int64_t{1} << 40};
    const std::vector<std::pair<const char*, std::string>> table = {
        {"epsilon", message_of<ValueError>([] { bnbp::op::BatchNormTraining(-1.0); })},
        {"type", message_of<TypeError>(evaluate({out}, {input, {floats.data(), {2}}, none, vector, vector}))},
        {"shape", message_of<ValueError>(evaluate({out}, {input, none, none, {gamma_.data(), {1}}, vector}))},
        {"count", message_of<ValueError>(evaluate({out}, {input, none, none, vector}))},
        {"many", message_of<ValueError>(evaluate({out}, std::vector<Tensor>(40, vector)))},
        {"many outputs",
         message_of<ValueError>(evaluate(std::vector<Tensor>(40, out), {input, none, none, vector, vector}))},
        {"outputs", message_of<ValueError>(evaluate({out, out}, {input, none, none, vector, vector}))},
        {"read-only", message_of<ValueError>(evaluate({input}, {input, none, none, vector, vector}))},
        {"null",
         message_of<ValueError>(evaluate({{bnbp::ElementType::f64, shape}}, {input, none, none, vector, vector}))},
        {"strides", message_of<ValueError>(evaluate({out}, {odd, none, none, vector, vector}))},
        {"broadcast", message_of<ValueError>(evaluate({broadcast}, {input, none, none, vector, vector}))},
        {"endless", message_of<ValueError>(
                        evaluate({{memory.data(), endless}}, {{x.data(), endless}, none, none, vector, vector}))},
        {"whole", message_of<ValueError>([] { bnbp::op::BatchNormTrainingBackpropApply(-2); })},
        {"reach", message_of<ValueError>(evaluate({out}, {far_away, none, none, vector, vector}))},
        {"unknown", message_of<TypeError>(evaluate({out}, {unknown, none, none, vector, vector}))},
        {"no addend", message_of<ValueError>([&] { adding.evaluate({out}, {input, none, none, vector, vector}); })},
        {"addend", message_of<ValueError>(evaluate({out}, {input, none, none, vector, vector, input}))},
        {"normalized", message_of<ValueError>(
                           [&] { gradient_op.validate_and_infer_types({input, none, none, vector, vector, input}); })},
        {"activation", message_of<ValueError>([&] { gradient_op.set_activation(static_cast<bnbp::Activation>(7)); })},
        {"none", std::to_string(memory[0] + memory[1])},
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
                         {"parts", parts, METH_NOARGS, nullptr},
                         {"activated", activated, METH_NOARGS, nullptr},
                         {"halves", halves, METH_NOARGS, nullptr},
                         {"errors", errors, METH_NOARGS, nullptr},
                         {"before_import", before_import, METH_NOARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "caller", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

} // namespace

PyMODINIT_FUNC PyInit_caller() { return PyModule_Create(&module); }
