// An extension module with one function, which computes the gradients of a batch norm into memory that Python gives it.
#include <Python.h>

#include <bnbp/batch_norm.hpp>
#include <bnbp/python.hpp>
#include <string>
#include <vector>

namespace {

// The memory of an object with a buffer, such as a NumPy array. It stays in place until the end of the scope.
struct Buffer {
    Py_buffer view{};

    Buffer() = default;
    Buffer(const Buffer&) = delete;
    ~Buffer() { PyBuffer_Release(&view); }

    // A view of the memory. The operator checks it.
    bnbp::Tensor tensor() const {
        const std::string format = view.format;
        bnbp::Tensor tensor(format == "d"   ? bnbp::ElementType::f64
                            : format == "f" ? bnbp::ElementType::f32
                            : format == "e" ? bnbp::ElementType::f16
                                            : bnbp::ElementType::other,
                            view.buf, bnbp::Shape(view.shape, view.shape + view.ndim));
        tensor.strides.assign(view.strides, view.strides + view.ndim);
        tensor.writable = !view.readonly;
        tensor.type_name = "format " + format; // for the error if it is another type
        return tensor;
    }
};

// Lets other Python threads run until the end of the scope, also if an exception ends it.
struct WithoutGil {
    PyThreadState* state = PyEval_SaveThread();
    ~WithoutGil() { PyEval_RestoreThread(state); }
};

PyObject* gradient(PyObject*, PyObject* arguments) {
    double epsilon;
    PyObject *x, *gamma, *mean, *variance, *dy, *dx, *dgamma, *dbeta;
    if (!PyArg_ParseTuple(arguments, "OOOOOdOOO:gradient", &x, &gamma, &mean, &variance, &dy, &epsilon, &dx, &dgamma,
                          &dbeta)) {
        return nullptr;
    }
    Buffer buffers[8];
    Buffer* next = buffers;
    for (PyObject* object : {x, gamma, mean, variance, dy, dx, dgamma, dbeta}) {
        if (PyObject_GetBuffer(object, &(next++)->view, PyBUF_RECORDS_RO) < 0) { // with any type and strides
            return nullptr;
        }
    }
    try {
        const bnbp::op::BatchNormTrainingBackprop op(epsilon);
        const std::vector<bnbp::Tensor> inputs{buffers[0].tensor(), buffers[1].tensor(), {}, // beta: not used
                                               buffers[2].tensor(), buffers[3].tensor(), buffers[4].tensor()};
        const std::vector<bnbp::Tensor> outputs{buffers[5].tensor(), buffers[6].tensor(), buffers[7].tensor()};
        const WithoutGil released;
        op.evaluate(outputs, inputs);
    } catch (...) { // the thread has the GIL again
        bnbp::set_python_error();
        return nullptr;
    }
    Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"gradient", gradient, METH_VARARGS, "gradient(x, gamma, mean, variance, dy, epsilon, dx, dgamma, dbeta)"},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "gradients", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

} // namespace

PyMODINIT_FUNC PyInit_gradients() {
    if (!bnbp::import_kernels()) {
        return nullptr; // the Python exception is set
    }
    return PyModule_Create(&definition);
}
