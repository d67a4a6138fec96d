"""The boundary: Python objects on one side, the C++ operators and the kernels on the other.

Objects become arrays, arrays become `Tensor`s; the operator class checks them and says what the outputs are; those are
taken from `out` or allocated; and the operator is evaluated without the GIL. No rule about values, types, shapes or
memory is stated here, only what concerns Python objects.
"""

import operator
import threading
from itertools import islice

import numpy as np

from bnbp.engine import pool
from bnbp.engine.isa import load_kernels
from bnbp.engine.threads import default_num_threads, openmp_num_threads

from cpython.buffer cimport PyBUF_STRIDES, PyBuffer_IsContiguous, PyObject_GetBuffer
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.limits cimport INT_MAX
from libc.stdint cimport int64_t
from libcpp cimport bool as cbool
from libcpp.memory cimport unique_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

from bnbp.kernels cimport BNBP_KERNELS_CAPSULE, bnbp_kernels


cdef extern from "boundary.h" nogil:
    void raise_python()
    int cpu_supports(const char* level)
    Py_ssize_t l2_cache_size()

    struct DLTensor:
        unsigned char code
        unsigned char bits

    const int DL_UINT
    const int DL_BFLOAT

    int at_fork(bnbp_kernels* table)
    int interrupted "Patience::interrupted"() noexcept
    unsigned long main_thread "Patience::main_thread"

    cppclass Patience:
        void begin()

    cppclass Buffers:
        Py_buffer* views
        int count


cdef extern from "bnbp/batch_norm.hpp" namespace "bnbp" nogil:
    enum class ElementType:
        f16
        bf16
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

    cppclass BatchNormTrainingStatistics(BatchNormBase):
        BatchNormTrainingStatistics(int64_t channel_axis) except +raise_python

    cppclass BatchNormTrainingBackpropReduce(BatchNormBase):
        BatchNormTrainingBackpropReduce(int64_t channel_axis) except +raise_python

    cppclass BatchNormTrainingBackpropApply(BatchNormBase):
        BatchNormTrainingBackpropApply(int64_t count, double epsilon, int64_t channel_axis) except +raise_python

    cppclass BatchNormInference(BatchNormBase):
        BatchNormInference(double epsilon, int64_t channel_axis) except +raise_python

    cppclass BatchNormInferenceBackprop(BatchNormBase):
        BatchNormInferenceBackprop(double epsilon, int64_t channel_axis) except +raise_python


cdef object ndarray = np.ndarray, empty = np.empty, empty_like = np.empty_like
cdef object float16 = np.dtype(np.float16), float32 = np.dtype(np.float32), float64 = np.dtype(np.float64)
cdef Py_ssize_t POOLED = 1 << 20  # bytes from which a result's memory is kept for the next; smaller ones malloc reuses
cdef tuple TENSORS = ("input", "normalized_delta"), SUMS = ("delta_sum", "delta_centered_sum")
cdef tuple _BACKPROP = ("input", "gamma", "beta", "mean", "variance", "normalized_delta")
cdef dict INPUT_NAMES = {
    "BatchNormTraining": _BACKPROP[:3],
    "BatchNormTrainingStatistics": _BACKPROP[:1],
    "BatchNormTrainingBackprop": _BACKPROP,
    "BatchNormTrainingBackpropReduce": ("input", "mean", "normalized_delta"),
    "BatchNormTrainingBackpropApply": _BACKPROP + SUMS,
    "BatchNormInference": _BACKPROP[:5],
    "BatchNormInferenceBackprop": _BACKPROP,
}


def run(str name, tuple inputs, epsilon, channel_axis, output_mask, out, num_threads, count=0):
    """The outputs of the operator `name`, as a list."""
    cdef unique_ptr[BatchNormBase] op
    cdef vector[Tensor] tensors, inferred, outputs
    cdef Buffers buffers
    cdef Patience patience
    cdef int threads = threads_of(num_threads)
    cdef Py_ssize_t k
    cdef tuple names = INPUT_NAMES[name]
    op.reset(operator_of(name, epsilon_of(epsilon), axis_of(channel_axis), count_of(count)))

    # Whatever may run somebody else's code comes first: that code can resize an array whose memory is known already.
    cdef tuple mask = mask_of(output_mask, 3)
    arrays = arrays_of(names, inputs)
    tensors.resize(len(inputs))
    for k in range(len(inputs)):
        set_tensor(tensors[k], arrays[k], buffers)
    inferred = op.get().validate_and_infer_types(tensors)

    results = out_of(out, inferred.size())
    outputs.resize(inferred.size())
    for k in range(<Py_ssize_t> inferred.size()):
        if mask is not None and not mask[k]:
            results[k] = None
        elif results[k] is None:
            results[k] = new_result(inferred[k], arrays[0], &buffers.views[0])
        set_tensor(outputs[k], plain(results[k]), buffers)
    patience.begin()
    with nogil:
        op.get().evaluate(outputs, tensors, threads)
    if name == "BatchNormTrainingStatistics":
        results.insert(0, arrays[0].size // results[0].size)
    return results


cdef object new_result(const Tensor& inferred, input, const Py_buffer* view):
    """`inferred` says it all, but NumPy takes objects that there are faster. A tensor has the input's axis order."""
    if inferred.shape.size() > 1:
        if view.len >= POOLED:
            return pool.empty_like(input)
        return empty(input.shape, input.dtype) if PyBuffer_IsContiguous(view, b"C") else empty_like(input, subok=False)
    if inferred.element_type == ElementType.f32:
        return empty(inferred.shape[0], float32)
    return empty(inferred.shape[0], float64 if inferred.element_type == ElementType.f64 else input.dtype)


# ---------------------------------------------------------------- attributes

cdef BatchNormBase* operator_of(str name, double epsilon, int64_t channel_axis, int64_t count) except NULL:
    if name == "BatchNormTraining":
        return new BatchNormTraining(epsilon, channel_axis)
    if name == "BatchNormTrainingBackprop":
        return new BatchNormTrainingBackprop(epsilon, channel_axis)
    if name == "BatchNormInference":
        return new BatchNormInference(epsilon, channel_axis)
    if name == "BatchNormInferenceBackprop":
        return new BatchNormInferenceBackprop(epsilon, channel_axis)
    if name == "BatchNormTrainingStatistics":
        return new BatchNormTrainingStatistics(channel_axis)
    if name == "BatchNormTrainingBackpropReduce":
        return new BatchNormTrainingBackpropReduce(channel_axis)
    if name == "BatchNormTrainingBackpropApply":
        return new BatchNormTrainingBackpropApply(count, epsilon, channel_axis)
    raise ValueError(f"name: expected an operator, got {name!r}")


cdef double epsilon_of(epsilon) except? -1:
    try:
        return epsilon
    except Exception as error:
        raise ValueError(f"epsilon: expected a finite number >= 0, got {text_of(epsilon)}") from unexpected(error)


def text_of(value, how=repr):
    """What a message says of a value. Not every object can be printed, nor can an integer of 5000 digits."""
    try:
        return how(value)
    except Exception:
        return f"an unprintable {type(value).__name__}"


cdef object unexpected(error):
    """What an object's own method raised, to be named as the cause; None if it is only that there is no method.

    That there is no memory is not the argument's fault, and is raised as it is.
    """
    if isinstance(error, MemoryError):
        raise error
    return None if type(error) in (TypeError, ValueError, OverflowError) else error


cpdef integer_of(str name, value, least=None, str expected="an integer"):
    """An integer argument, checked."""
    try:
        integer = operator.index(value)
    except Exception as error:
        raise TypeError(f"{name}: expected {expected}, got {text_of(value)}") from unexpected(error)
    if least is not None and integer < least:
        raise ValueError(f"{name}: expected at least {least}, got {text_of(integer)}")
    return integer


cdef int64_t axis_of(channel_axis) except? -1:
    # Beyond INT_MAX is an axis that no array has, and the operator says so.
    return max(min(integer_of("channel_axis", channel_axis), INT_MAX), -INT_MAX)


cdef int64_t count_of(count) except? -1:
    # Beyond 2^53, which no batch reaches, it is not exact as a float64; the operator refuses what is negative.
    return max(min(integer_of("count", count), 1 << 53), -(1 << 53))


cdef int threads_of(num_threads) except? -1:
    if num_threads is None:
        return 0
    return min(integer_of("num_threads", num_threads, 1, "an integer or None"), INT_MAX)


# ---------------------------------------------------------------- tensors

cdef list arrays_of(tuple names, tuple values):
    """An array for each operand, or None.

    A list has no type of its own. It takes that of the input or, if it is for the channels, that of the first array
    that is; as the input itself it is float64, and so are sums.
    """
    cdef list arrays = [], lists = None
    cdef Py_ssize_t k
    for k in range(len(values)):
        value = array = values[k]
        if type(value) is not ndarray and value is not None:
            array = array_of(names[k], value)
            if isinstance(value, (list, tuple, int, float)) and array.dtype.kind in "iuf":
                lists = lists or []
                lists.append(k)
        arrays.append(array)
    if lists is not None:
        own = None  # a loop, because Cython releases an item twice if a comprehension has no memory for it
        for k in range(len(values)):
            if own is None and arrays[k] is not None and k not in lists and names[k] not in TENSORS + SUMS:
                own = arrays[k].dtype
        for k in lists:
            dtype = float64
            if k > 0 and names[k] not in SUMS:
                if own is not None and names[k] not in TENSORS:
                    dtype = own
                elif arrays[0] is not None:
                    dtype = arrays[0].dtype
            arrays[k] = arrays[k].astype(float64 if element_type(dtype) == ElementType.other else dtype)
    return arrays


cdef object array_of(str name, value):
    """An array of anything that has a buffer, `__array__` or `__dlpack__`, or is a list of numbers."""
    cdef bint dlpack
    try:
        dlpack = hasattr(value, "__dlpack__")
        device = CPU
        if dlpack:
            device, _ = value.__dlpack_device__()  # unpacked, because an index is not checked here
            device = operator.index(device)
        if device in HOSTS:
            if dlpack and not hasattr(value, "__array__"):
                return from_dlpack(value)
            try:
                return np.asarray(value)
            except TypeError:  # what PyTorch says of bfloat16
                if not dlpack:
                    raise
                return from_dlpack(value)
    except MemoryError:
        raise
    except Exception as error:
        raise TypeError(f"{name}: expected an array, got {type(value).__name__}: {text_of(error, str)}") from error
    raise TypeError(f"{name}: expected a tensor in the CPU's memory, got {type(value).__name__} on "
                    f"{DEVICES.get(device, f'device type {text_of(device)}')}; copy it to the CPU first")


# Of DLPack's device types: memory that the CPU reads, its own and that of CUDA's and ROCm's hosts and managed memory.
cdef int CPU = 1
cdef tuple HOSTS = (1, 3, 11, 13)
cdef dict DEVICES = {2: "a CUDA device", 4: "an OpenCL device", 7: "a Vulkan device", 8: "a Metal device",
                     10: "a ROCm device", 14: "a oneAPI device", 15: "a WebGPU device"}


cdef class Exported:
    """A capsule from somebody's `__dlpack__`, to be taken once."""
    cdef object capsule

    def __dlpack__(self, **options):
        return self.capsule

    def __dlpack_device__(self):
        return CPU, 0


cdef object from_dlpack(value):
    """An array that shares a tensor's memory. NumPy does not know bfloat16, and is told that these are integers."""
    cdef Exported exported = Exported()
    cdef DLTensor* tensor
    try:
        return np.from_dlpack(value)
    except Exception:
        exported.capsule = value.__dlpack__()
        tensor = <DLTensor*> PyCapsule_GetPointer(exported.capsule, "dltensor")
        if tensor.code != DL_BFLOAT or tensor.bits != 16:
            raise
        from ml_dtypes import bfloat16
        tensor.code = DL_UINT
        return np.from_dlpack(exported).view(bfloat16)


cdef ElementType element_type(dtype):
    if dtype is float32 or dtype == float32:
        return ElementType.f32
    if dtype is float64 or dtype == float64:
        return ElementType.f64
    if dtype is float16 or dtype == float16:
        return ElementType.f16
    # That of ml_dtypes, without importing it.
    if dtype.type.__name__ == "bfloat16" and dtype.itemsize == 2 and dtype.isnative:
        return ElementType.bf16
    return ElementType.other


cdef int set_tensor(Tensor& tensor, array, Buffers& buffers) except -1:
    cdef Py_buffer* view
    if array is None:
        return 0
    tensor.element_type = element_type(array.dtype)
    if tensor.element_type == ElementType.other:
        tensor.type_name = str(array.dtype).encode(errors="backslashreplace")
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
    """Which outputs are wanted; None for all."""
    if output_mask is None or (type(output_mask) is tuple and len(output_mask) == count
                               and all_true(<tuple> output_mask)):
        return None
    try:
        mask = tuple(map(operator.index, islice(output_mask, 1000)))  # it may have no end
    except Exception as error:
        raise TypeError(f"output_mask: expected {count} booleans, got {text_of(output_mask)}") from unexpected(error)
    if len(mask) != count:
        raise ValueError(f"output_mask: expected {count} booleans, got {len(mask)}")
    return mask


cdef inline bint all_true(tuple values):
    """Whether these are `True` itself: to compare them could run somebody else's code, and takes longer."""
    for value in values:
        if value is not True:
            return False
    return True


cdef list out_of(out, Py_ssize_t count):
    """An array or None for each output."""
    if out is None:
        return [None] * count
    cdef list entries
    if issubclass(type(out), tuple):
        entries = list(tuple.__iter__(out))  # what is in it, whatever a subclass says
    elif issubclass(type(out), list):
        entries = list(list.__iter__(out))
    else:
        raise TypeError(f"out: expected a tuple with an array or None for each output, got {type(out).__name__}")
    if len(entries) != count:
        raise ValueError(f"out: expected {count} entries, an array or None for each output, got {len(entries)}")
    for k, array in enumerate(entries):
        if type(array) is not ndarray and array is not None and not issubclass(type(array), ndarray):
            raise TypeError(f"out[{k}]: expected a NumPy array or None, got {type(array).__name__}")
    return entries


cdef object plain(array):
    """The array itself of a subclass, which can say what it likes of its type and shape."""
    return array if array is None or type(array) is ndarray else ndarray.view(array, ndarray)


# ---------------------------------------------------------------- the process

kernels, _isa = load_kernels(lambda level: cpu_supports(level.encode()))  # C++ callers import the capsule from here
cdef bnbp_kernels* table = <bnbp_kernels*> PyCapsule_GetPointer(kernels, BNBP_KERNELS_CAPSULE)
set_kernels(table)
table.l2_size = l2_cache_size() or table.l2_size
table.default_num_threads, _threads_source = default_num_threads()
table.openmp_num_threads = openmp_num_threads()
if at_fork(table):
    raise MemoryError
main_thread = threading.main_thread().ident or 0
table.interrupted = interrupted


def set_l2_size(Py_ssize_t size):
    """Make the kernels believe in another cache, so that tests reach every schedule with small arrays; the old size."""
    old, table.l2_size = table.l2_size, size
    return old


def config():
    """What `bnbp.show_config` says of the compiled part."""
    return {
        "isa": _isa,
        "caches": {"l2": table.l2_size},
        "pool": pool.state(),
        "openmp": {"enabled": table.openmp != 0, "version": table.openmp or None},
        "threads": {
            "default": 1 if table.serial else table.default_team(),
            "source": "serial: a forked process" if table.serial else
                      "omp_set_num_threads" if table.default_team() < table.default_num_threads else _threads_source,
        },
    }
