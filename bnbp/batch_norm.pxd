"""The C++ operators for Cython callers, as bnbp/batch_norm.hpp and bnbp/tensor.hpp declare them.

A module that cimports from here is compiled as C++17, with `bnbp.get_include()` among its include directories, and
calls `import_kernels()` once. Everything else needs no GIL. The errors are the Python exceptions that the package's own
functions raise, with the same words.
"""

from libc.stdint cimport int64_t
from libcpp cimport bool as cbool
from libcpp.string cimport string
from libcpp.vector cimport vector

from bnbp.kernels cimport bnbp_kernels

cdef extern from "bnbp/python.hpp" namespace "bnbp":
    void set_python_error()

cdef extern from "bnbp/batch_norm.hpp" namespace "bnbp":
    # Imports the package, and raises what stands in the way.
    int import_kernels() except 0

cdef extern from "bnbp/batch_norm.hpp" namespace "bnbp" nogil:
    void set_kernels(bnbp_kernels* table) except +set_python_error

    enum class ElementType:
        none
        f16
        bf16
        f32
        f64
        other

    enum class Activation:
        none
        relu
        relu6

    ctypedef vector[int64_t] Shape
    ctypedef vector[int64_t] Strides

    cppclass Tensor:
        ElementType element_type
        Shape shape
        void* data
        Strides strides
        cbool writable
        string type_name

        # Cython takes pointers to const and to other memory for the same, so each pair of constructors stands here
        # once. The C++ compiler tells them apart: with a pointer that is not to const, the tensor is writable.
        Tensor()
        Tensor(ElementType type, Shape lengths) except +
        Tensor(ElementType type, const void* memory, Shape lengths) except +
        Tensor(const float* memory, Shape lengths) except +
        Tensor(const double* memory, Shape lengths) except +
        cbool present()

cdef extern from "bnbp/batch_norm.hpp" namespace "bnbp::op" nogil:
    cppclass BatchNormBase:
        double get_eps_value()
        void set_eps_value(double epsilon) except +set_python_error
        int64_t get_channel_axis()
        void set_channel_axis(int64_t channel_axis)
        const char* get_type_name()
        vector[Tensor] validate_and_infer_types(const vector[Tensor]& inputs) except +set_python_error
        void evaluate(const vector[Tensor]& outputs, const vector[Tensor]& inputs) except +set_python_error
        void evaluate(
            const vector[Tensor]& outputs, const vector[Tensor]& inputs, int num_threads
        ) except +set_python_error

    cppclass BatchNormActivated(BatchNormBase):
        Activation get_activation()
        void set_activation(Activation activation) except +set_python_error
        cbool get_addend()
        void set_addend(cbool addend)

    cppclass BatchNormTraining(BatchNormActivated):
        BatchNormTraining() except +set_python_error
        BatchNormTraining(double epsilon) except +set_python_error
        BatchNormTraining(double epsilon, int64_t channel_axis) except +set_python_error

    cppclass BatchNormTrainingBackprop(BatchNormActivated):
        BatchNormTrainingBackprop() except +set_python_error
        BatchNormTrainingBackprop(double epsilon) except +set_python_error
        BatchNormTrainingBackprop(double epsilon, int64_t channel_axis) except +set_python_error

    cppclass BatchNormTrainingStatistics(BatchNormBase):
        BatchNormTrainingStatistics() except +set_python_error
        BatchNormTrainingStatistics(int64_t channel_axis) except +set_python_error

    cppclass BatchNormTrainingBackpropReduce(BatchNormActivated):
        BatchNormTrainingBackpropReduce() except +set_python_error
        BatchNormTrainingBackpropReduce(int64_t channel_axis) except +set_python_error
        BatchNormTrainingBackpropReduce(int64_t channel_axis, double epsilon) except +set_python_error

    cppclass BatchNormTrainingBackpropApply(BatchNormActivated):
        BatchNormTrainingBackpropApply(int64_t count) except +set_python_error
        BatchNormTrainingBackpropApply(int64_t count, double epsilon) except +set_python_error
        BatchNormTrainingBackpropApply(int64_t count, double epsilon, int64_t channel_axis) except +set_python_error
        int64_t get_count()
        void set_count(int64_t count) except +set_python_error

    cppclass BatchNormInference(BatchNormActivated):
        BatchNormInference() except +set_python_error
        BatchNormInference(double epsilon) except +set_python_error
        BatchNormInference(double epsilon, int64_t channel_axis) except +set_python_error

    cppclass BatchNormInferenceBackprop(BatchNormActivated):
        BatchNormInferenceBackprop() except +set_python_error
        BatchNormInferenceBackprop(double epsilon) except +set_python_error
        BatchNormInferenceBackprop(double epsilon, int64_t channel_axis) except +set_python_error
