"""The boundary: Python objects on one side, the C++ operators and the kernels on the other.

Objects become arrays, arrays become `Tensor`s; the operator class checks them and says what the outputs are; those are
taken from `out` or allocated; and the operator is evaluated without the GIL. No rule about values, types, shapes or
memory is stated here, only what concerns Python objects.
"""

import operator
import os

import numpy as np

from bnbp import _pool
from bnbp._isa import load_kernels
from bnbp._threads import default_num_threads

from cpython.buffer cimport PyBUF_STRIDES, PyObject_GetBuffer
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.limits cimport INT_MAX
from libc.stdint cimport int64_t
from libcpp cimport bool as cbool
from libcpp.memory cimport unique_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

from bnbp.kernels cimport BNBP_KERNELS_CAPSULE, bnbp_kernels


cdef extern from "bnbp/batch_norm.hpp" namespace "bnbp" nogil:
    """
    #if !defined(_WIN32)
    #include <unistd.h>
    #endif
    #if defined(__APPLE__)
    #include <sys/sysctl.h>
    #endif

    // The C++ exception in flight becomes the Python exception of the same meaning.
    static void raise_python() {
        try {
            throw;
        } catch (const bnbp::TypeError& error) {
            PyErr_SetString(PyExc_TypeError, error.what());
        } catch (const bnbp::ValueError& error) {
            PyErr_SetString(PyExc_ValueError, error.what());
        } catch (const std::bad_alloc&) {
            PyErr_NoMemory();
        } catch (const std::exception& error) {
            PyErr_SetString(PyExc_RuntimeError, error.what());
        }
    }

    // Whether this CPU, and its operating system, can run code of a level of the x86-64 psABI.
    static int cpu_supports(const char* level) {
    #if defined(__x86_64__) && defined(__GNUC__)
        __builtin_cpu_init();
        const int v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                       __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
        const int v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                       __builtin_cpu_supports("avx512vl");
        if (!strcmp(level, "x86-64-v4")) return v4;
        if (!strcmp(level, "x86-64-v3")) return v3;
    #endif
        return 1;
    }

    // Bytes of a core's second-level cache, or 0 where the system does not say.
    static Py_ssize_t l2_cache_size() {
        long long size = 0;
    #if defined(_SC_LEVEL2_CACHE_SIZE)
        size = sysconf(_SC_LEVEL2_CACHE_SIZE);
    #elif defined(__APPLE__)
        size_t length = sizeof size;
        if (sysctlbyname("hw.l2cachesize", &size, &length, NULL, 0)) size = 0;
    #endif
        return size > 0 ? (Py_ssize_t)size : 0;
    }

    // The buffers of one call, given back when it ends, however it ends.
    struct Buffers {
        Py_buffer views[9];  // six inputs and three outputs
        int count = 0;
        ~Buffers() { while (count > 0) PyBuffer_Release(&views[--count]); }
    };
    """
    void raise_python "::raise_python"()
    int cpu_supports "::cpu_supports"(const char* level)
    Py_ssize_t l2_cache_size "::l2_cache_size"()

    cppclass Buffers "::Buffers":
        Py_buffer* views
        int count

    enum class ElementType:
        f32
        f64
        other

    cppclass Tensor:
        ElementType element_type
        vector[int64_t] shape
        void* data
        vector[int64_t] strides
        cbool writable
        string type_name

    void set_kernels(bnbp_kernels* table) except +raise_python


cdef extern from "bnbp/batch_norm.hpp" namespace "bnbp::op" nogil:
    cppclass BatchNormBase:
        vector[Tensor] validate_and_infer_types(const vector[Tensor]& inputs) except +raise_python
        void evaluate(const vector[Tensor]& outputs, const vector[Tensor]& inputs, int num_threads) except +raise_python

    cppclass BatchNormTraining(BatchNormBase):
        BatchNormTraining(double epsilon, int64_t channel_axis) except +raise_python

    cppclass BatchNormTrainingBackprop(BatchNormBase):
        BatchNormTrainingBackprop(double epsilon, int64_t channel_axis) except +raise_python

    cppclass BatchNormInference(BatchNormBase):
        BatchNormInference(double epsilon, int64_t channel_axis) except +raise_python

    cppclass BatchNormInferenceBackprop(BatchNormBase):
        BatchNormInferenceBackprop(double epsilon, int64_t channel_axis) except +raise_python


cdef object ndarray = np.ndarray, empty = np.empty, float32 = np.dtype(np.float32), float64 = np.dtype(np.float64)
cdef object pool_empty = _pool.empty
cdef Py_ssize_t POOLED = 1 << 20  # bytes from which a result's memory is kept for the next; smaller ones malloc reuses
cdef tuple INPUT_NAMES = ("input", "gamma", "beta", "mean", "variance", "normalized_delta")


def run(str name, tuple inputs, epsilon, channel_axis, output_mask, out, num_threads):
    """The outputs of the operator `name`, as a list."""
    cdef unique_ptr[BatchNormBase] op
    cdef vector[Tensor] tensors, inferred, outputs
    cdef Buffers buffers
    cdef int threads = threads_of(num_threads)
    cdef Py_ssize_t k
    op.reset(operator_of(name, epsilon_of(epsilon), axis_of(channel_axis)))

    arrays = []
    tensors.resize(len(inputs))
    for k in range(len(inputs)):
        arrays.append(array_of(INPUT_NAMES[k], inputs[k], arrays[0] if k else None))
        set_tensor(tensors[k], arrays[k], buffers)
    inferred = op.get().validate_and_infer_types(tensors)

    wanted = mask_of(output_mask, inferred.size())
    results = out_of(out, inferred.size())
    outputs.resize(inferred.size())
    for k in range(<Py_ssize_t> inferred.size()):
        if not wanted[k]:
            results[k] = None
        elif results[k] is None:
            # `inferred` says the same of shape and type, but NumPy takes the input's own objects faster.
            if inferred[k].shape.size() == 1:
                results[k] = empty(inferred[k].shape[0], arrays[0].dtype)
            elif buffers.views[0].len < POOLED:
                results[k] = empty(arrays[0].shape, arrays[0].dtype)
            else:
                results[k] = pool_empty(arrays[0].shape, arrays[0].dtype)
        set_tensor(outputs[k], results[k], buffers)
    with nogil:
        op.get().evaluate(outputs, tensors, threads)
    return results


# ---------------------------------------------------------------- attributes

cdef BatchNormBase* operator_of(str name, double epsilon, int64_t channel_axis) except NULL:
    if name == "BatchNormTraining":
        return new BatchNormTraining(epsilon, channel_axis)
    if name == "BatchNormTrainingBackprop":
        return new BatchNormTrainingBackprop(epsilon, channel_axis)
    if name == "BatchNormInference":
        return new BatchNormInference(epsilon, channel_axis)
    if name == "BatchNormInferenceBackprop":
        return new BatchNormInferenceBackprop(epsilon, channel_axis)
    raise ValueError(f"name: expected an operator, got {name!r}")


cdef double epsilon_of(epsilon) except? -1:
    try:
        return epsilon
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"epsilon: expected a finite number >= 0, got {epsilon!r}") from None


cpdef integer_of(str name, value, least=None, str expected="an integer"):
    """An integer argument, checked."""
    try:
        integer = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected {expected}, got {value!r}") from None
    if least is not None and integer < least:
        raise ValueError(f"{name}: expected at least {least}, got {integer}")
    return integer


cdef int64_t axis_of(channel_axis) except? -1:
    # Beyond INT_MAX is an axis that no array has, and the operator says so.
    return max(min(integer_of("channel_axis", channel_axis), INT_MAX), -INT_MAX)


cdef int threads_of(num_threads) except? -1:
    if num_threads is None:
        return 0
    return min(integer_of("num_threads", num_threads, 1, "an integer or None"), INT_MAX)


# ---------------------------------------------------------------- tensors

cdef object array_of(str name, value, first):
    """An array of anything that has a buffer, `__array__` or `__dlpack__`, is a list of numbers, or is None.

    A list has no type of its own and takes that of `input`; as the input itself it is float64.
    """
    if type(value) is ndarray or value is None:
        return value
    try:
        if hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
            return np.from_dlpack(value)
        array = np.asarray(value)
    except MemoryError:
        raise
    except Exception as error:
        raise TypeError(f"{name}: expected an array, got {type(value).__name__}: {error}") from error
    if isinstance(value, (list, tuple, int, float)) and array.dtype.kind in "iuf":
        return array.astype(float32 if first is not None and first.dtype == float32 else float64)
    return array


cdef int set_tensor(Tensor& tensor, array, Buffers& buffers) except -1:
    cdef Py_buffer* view
    if array is None:
        return 0
    dtype = array.dtype
    if dtype is float32 or dtype == float32:
        tensor.element_type = ElementType.f32
    elif dtype is float64 or dtype == float64:
        tensor.element_type = ElementType.f64
    else:
        tensor.element_type = ElementType.other
        tensor.type_name = str(dtype).encode()
        tensor.shape = array.shape
        return 0
    view = &buffers.views[buffers.count]
    PyObject_GetBuffer(array, view, PyBUF_STRIDES)
    buffers.count += 1
    tensor.data = view.buf
    tensor.writable = not view.readonly
    tensor.shape.assign(view.shape, view.shape + view.ndim)
    tensor.strides.assign(view.strides, view.strides + view.ndim)
    return 0


cdef tuple mask_of(output_mask, Py_ssize_t count):
    if output_mask is None or (type(output_mask) is tuple and output_mask == (True, True, True)):
        return (True,) * count
    try:
        mask = tuple(map(operator.index, output_mask))
    except TypeError:
        raise TypeError(f"output_mask: expected {count} booleans, got {output_mask!r}") from None
    if len(mask) != count:
        raise ValueError(f"output_mask: expected {count} booleans, got {len(mask)}")
    return mask


cdef list out_of(out, Py_ssize_t count):
    """An array or None for each output."""
    if out is None:
        return [None] * count
    if not isinstance(out, (tuple, list)):
        raise TypeError(f"out: expected a tuple with an array or None for each output, got {type(out).__name__}")
    if len(out) != count:
        raise ValueError(f"out: expected {count} entries, an array or None for each output, got {len(out)}")
    for k, array in enumerate(out):
        if type(array) is not ndarray and array is not None and not isinstance(array, ndarray):
            raise TypeError(f"out[{k}]: expected a NumPy array or None, got {type(array).__name__}")
    return list(out)


# ---------------------------------------------------------------- the process

kernels, _isa = load_kernels(lambda level: cpu_supports(level.encode()))  # C++ callers import the capsule from here
cdef bnbp_kernels* table = <bnbp_kernels*> PyCapsule_GetPointer(kernels, BNBP_KERNELS_CAPSULE)
set_kernels(table)
table.l2_size = l2_cache_size() or table.l2_size
table.default_num_threads, _threads_source = default_num_threads()


def _after_fork():
    """GNU OpenMP's threads are not in a forked child: a new team would wait for them for ever."""
    if table.region_entered:
        table.serial = 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def set_l2_size(Py_ssize_t size):
    """Make the kernels believe in another cache, so that tests reach every schedule with small arrays; the old size."""
    old, table.l2_size = table.l2_size, size
    return old


def config():
    """What `bnbp.show_config` says of the compiled part."""
    return {
        "isa": _isa,
        "caches": {"l2": table.l2_size},
        "pool": _pool.state(),
        "openmp": {"enabled": table.openmp != 0, "version": table.openmp or None},
        "threads": {
            "default": 1 if table.serial else table.default_num_threads,
            "source": "serial: forked after a parallel call" if table.serial else _threads_source,
        },
    }
