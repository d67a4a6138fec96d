"""The boundary: Python objects on one side, the C++ operators and the kernels on the other.

Objects become arrays, and arrays become the `View`s of a `Call`, which checks them and says what the outputs are; those
are taken from `out` or allocated, checked, and computed without the GIL. No rule about values, types, shapes or memory
is stated here, only what concerns Python objects.

The way of a call with arrays asks for no memory but that of its results. Where it takes a shortcut, the long way is the
rule: `type(value) is float` spares what `epsilon_of` does for anything else.
"""

import operator
import sys
import threading
from itertools import islice

import numpy as np

from bnbp.engine import pool
from bnbp.engine.isa import load_kernels
from bnbp.engine.threads import default_num_threads, openmp_num_threads

from cpython.float cimport PyFloat_AsDouble
from cpython.list cimport PyList_GetItem, PyList_Size
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.ref cimport PyObject
from cpython.tuple cimport PyTuple_GetItem, PyTuple_Size
from libc.limits cimport INT_MAX
from libc.stdint cimport int64_t
from libcpp cimport bool as cbool

from bnbp.batch_norm cimport Activation, ElementType, set_kernels, set_python_error
from bnbp.kernels cimport BNBP_KERNELS_CAPSULE, bnbp_kernels


cdef extern from "Python.h":
    ctypedef PyObject* (*PyCFunction)(PyObject*, PyObject*)

    ctypedef struct PyMethodDef:
        const char* ml_name
        PyCFunction ml_meth
        int ml_flags
        const char* ml_doc

    const int METH_FASTCALL
    object PyCFunction_New(PyMethodDef* method, object self)
    long long PyLong_AsLongLongAndOverflow(object value, int* overflow) except? -1


cdef extern from "boundary.h" nogil:
    int cpu_supports(const char* level)
    Py_ssize_t l2_cache_size()
    const Signature* signature_of(const char* name)
    const char* input_name(const Signature* signature, Py_ssize_t k)

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


cdef extern from "bnbp/detail/call.hpp" namespace "bnbp::detail" nogil:
    cppclass View:
        pass

    enum Operand:
        addend

    cppclass Signature:
        Py_ssize_t input_count
        cbool takes(Operand operand)

    cppclass Attributes:
        const Signature* signature
        int64_t channel_axis
        Activation activation
        cbool addend
        int64_t* exact
        void set_epsilon(double value) except +set_python_error
        void set_count(int64_t value) except +set_python_error

    cppclass Call:
        Attributes attributes
        void check_inputs(const View* inputs, Py_ssize_t count) except +set_python_error
        int64_t channels()
        Py_ssize_t output_count()
        cbool is_tensor(Py_ssize_t k)
        ElementType output_type(Py_ssize_t k)
        void check_outputs(const View* outputs, Py_ssize_t count) except +set_python_error
        void run(const bnbp_kernels* kernels, int num_threads) except +set_python_error


cdef extern from "exact.h" namespace "bnbp::exact" nogil:
    cppclass Row:
        Py_ssize_t size()

    Row row_of(bint statistics, bint wide)


cdef extern from "arrays.h":
    int import_numpy() except -1
    bint is_array(PyObject* value) noexcept
    ElementType known_type(PyObject* array) noexcept
    void remember_bfloat16(PyObject* array) noexcept
    Py_ssize_t size_of(PyObject* array) noexcept
    Py_ssize_t bytes_of(PyObject* array) noexcept
    object new_tensor(PyObject* like)
    object new_vector(Py_ssize_t length, ElementType type, PyObject* like)
    object named_tuple(object type, PyObject** items, Py_ssize_t count)

    cppclass Operands:
        View* inputs
        View* outputs
        PyObject** arrays
        PyObject** results
        void hold_input(Py_ssize_t k, PyObject* array)
        void hold_result(Py_ssize_t k, PyObject* array)
        int describe(View& view, PyObject* array, ElementType type) except -1
        int describe_other(View& view, PyObject* array, const char* type_name) except -1


import_numpy()

cdef object ndarray = np.ndarray
cdef object float16 = np.dtype(np.float16), float32 = np.dtype(np.float32), float64 = np.dtype(np.float64)
cdef Py_ssize_t POOLED = 1 << 20  # bytes from which a result's memory is kept for the next; smaller ones malloc reuses
cdef tuple TENSORS = ("input", "normalized_delta", "addend", "normalized"), SUMS = ("delta_sum", "delta_centered_sum")


# ---------------------------------------------------------------- a call

cdef class Operator:
    """What the calls of an operator have in common."""
    cdef const Signature* signature
    cdef tuple names
    cdef object result              # the named tuple of the outputs; None for an operator with one output
    cdef object result_with_addend  # the same with `addend_delta`
    cdef bint counts                # whether the result starts with the number of a channel's elements
    cdef bint computes              # or else everything is checked, and the results' memory taken, and that is all
    cdef bint exact                 # whether sums are added to the digits that the last argument is


cdef PyMethodDef method
method.ml_name = "operator"
method.ml_meth = <PyCFunction> <void*> call
method.ml_flags = METH_FASTCALL  # Cython's own functions would be given a tuple: the limited API has no better for them
method.ml_doc = NULL


def function_of(str name, result, result_with_addend=None, bint computes=True):
    """What calls an operator: `f(*inputs, epsilon, channel_axis, activation, addend, output_mask, out, num_threads
    [, count or digits])`.

    It returns `result`, a named tuple, of the outputs; `result_with_addend`, if there is an addend's gradient among
    them. If `result` is None, it returns the first output. With `computes` false the outputs are as they were, or as
    they were allocated: they fit the arguments, and the call that computes can be given them.
    """
    cdef Operator op = Operator()
    op.signature = signature_of(name.encode())
    if op.signature is NULL:
        raise ValueError(f"name: expected an operator, got {name!r}")
    op.names = tuple([input_name(op.signature, k).decode() for k in range(op.signature.input_count)])
    op.result = result
    op.result_with_addend = result_with_addend or result
    op.counts = name == "BatchNormTrainingStatistics"
    op.computes = computes
    op.exact = name.endswith(" (exact)")
    return PyCFunction_New(&method, op)


cdef object call(object self, PyObject** arguments, Py_ssize_t count):
    cdef Operator op = <Operator> self
    cdef Call call
    cdef Operands operands
    cdef Patience patience
    cdef Py_ssize_t k, inputs = op.signature.input_count, outputs
    cdef PyObject** rest = arguments + inputs
    if not inputs + 7 <= count <= inputs + 8:
        raise TypeError(f"expected {inputs} inputs and 7 or 8 attributes, got {count} arguments")
    cdef int threads = threads_of(<object> rest[6])
    cdef double epsilon = epsilon_of(<object> rest[0])
    call.attributes.signature = op.signature
    call.attributes.channel_axis = axis_of(<object> rest[1])
    call.attributes.activation = activation_of(<object> rest[2])
    cdef int64_t[:, ::1] digits = <object> rest[7] if op.exact else None
    cdef int64_t whole = count_of(<object> rest[7]) if count == inputs + 8 and not op.exact else 0
    call.attributes.set_epsilon(epsilon)
    if op.exact:
        call.attributes.exact = &digits[0, 0]
    elif count == inputs + 8:
        call.attributes.set_count(whole)

    # Whatever may run somebody else's code comes first: that code can resize an array whose memory is known already.
    if op.signature.takes(Operand.addend):
        call.attributes.addend = arguments[inputs - 1] is not <PyObject*> None
    else:
        call.attributes.addend = truth_of("addend", <object> rest[3])
    outputs = call.output_count()
    cdef int mask = mask_of(<object> rest[4], outputs)
    hold_inputs(operands, op.names, arguments, inputs)
    for k in range(inputs):
        if operands.arrays[k] is not NULL:
            describe(operands, operands.inputs[k], operands.arrays[k])
    call.check_inputs(operands.inputs, inputs)
    if op.exact and not has_room(digits, call, operands.arrays[0], inputs == 1):
        raise ValueError("input: expected an array that stays as it is, got one that has changed meanwhile")

    hold_outputs(operands, <object> rest[5], outputs)
    for k in range(outputs):
        if not mask >> k & 1:
            operands.hold_result(k, NULL)
            continue
        if operands.results[k] is NULL:
            array = new_result(call, k, operands.arrays[0])
            operands.hold_result(k, <PyObject*> array)
        if is_array(operands.results[k]):
            describe(operands, operands.outputs[k], operands.results[k])
        else:  # of a subclass, which can say what it likes of its type and shape
            array = ndarray.view(<object> operands.results[k], ndarray)
            describe(operands, operands.outputs[k], <PyObject*> array)
    patience.begin()
    with nogil:
        call.check_outputs(operands.outputs, outputs)
        if op.computes:
            call.run(table, threads)
    return result_of(op, call, operands, outputs)


cdef bint has_room(const int64_t[:, ::1]& digits, const Call& call, PyObject* input, bint statistics):
    """Whether there is a row of digits for each channel. Somebody else's code may have run since they were made."""
    cdef bint wide = bytes_of(input) == 8 * size_of(input)
    return digits.shape[0] == call.channels() and digits.shape[1] == row_of(statistics, wide).size()


cdef object new_result(const Call& call, Py_ssize_t k, PyObject* input):
    """A tensor has the input's axis order."""
    if not call.is_tensor(k):
        return new_vector(call.channels(), call.output_type(k), input)
    return pool.empty_like(<object> input) if bytes_of(input) >= POOLED else new_tensor(input)


cdef object result_of(Operator op, const Call& call, const Operands& operands, Py_ssize_t outputs):
    cdef PyObject* items[3]
    cdef object elements
    if op.exact:
        return None
    if op.result is None:
        return <object> operands.results[0]
    if op.counts:
        elements = size_of(operands.arrays[0]) // call.channels()
        items = [<PyObject*> elements, operands.results[0], operands.results[1]]
        return named_tuple(op.result, items, 3)
    return named_tuple(op.result_with_addend if call.attributes.addend else op.result, operands.results, outputs)


# ---------------------------------------------------------------- attributes

cdef double epsilon_of(epsilon) except? -1:
    if type(epsilon) is float:
        return PyFloat_AsDouble(epsilon)
    try:
        return epsilon
    except Exception as error:
        raise (TypeError if type(error) is TypeError else ValueError)(
            f"epsilon: expected a finite number >= 0, got {text_of(epsilon)}") from unexpected(error)


cdef Activation activation_of(activation) except *:
    if activation is None:
        return Activation.none
    if issubclass(type(activation), str):
        if str.__eq__(activation, "relu"):  # whatever a subclass says
            return Activation.relu
        if str.__eq__(activation, "relu6"):
            return Activation.relu6
    raise (ValueError if issubclass(type(activation), str) else TypeError)(
        f'activation: expected None, "relu" or "relu6", got {text_of(activation)}')


cdef bint truth_of(str name, value) except -1:
    if value is None or type(value) is bool:
        return value is True
    try:
        return operator.index(value) != 0
    except Exception as error:
        raise TypeError(f"{name}: expected a bool, got {text_of(value)}") from unexpected(error)


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


cdef inline bint is_short(value, int64_t least, int64_t most, int64_t* integer) except -1:
    """Whether this is an `int` itself that is in range, which the rest of the checks need not look at."""
    cdef int overflow
    if type(value) is not int:
        return False
    integer[0] = PyLong_AsLongLongAndOverflow(value, &overflow)
    return not overflow and least <= integer[0] <= most


cdef int64_t clipped(str name, value, int64_t most) except? -1:
    """An integer argument, checked; what is beyond `most`, on either side, is `most`."""
    cdef int64_t integer
    if is_short(value, -most, most, &integer):
        return integer
    return max(min(integer_of(name, value), most), -most)


cdef int64_t axis_of(channel_axis) except? -1:
    # Beyond INT_MAX is an axis that no array has, and the operator says so.
    return clipped("channel_axis", channel_axis, INT_MAX)


cdef int64_t count_of(count) except? -1:
    # Beyond 2^53, which no batch reaches, it is not exact as a float64; the operator refuses what is negative.
    return clipped("count", count, <int64_t> 1 << 53)


cdef int threads_of(num_threads) except? -1:
    cdef int64_t integer
    if num_threads is None:
        return 0
    if is_short(num_threads, 1, INT_MAX, &integer):
        return integer
    return min(integer_of("num_threads", num_threads, 1, "an integer or None"), INT_MAX)


# ---------------------------------------------------------------- tensors

cpdef list arrays_of(tuple names, list values):
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
    refuse_mask(name, value, "use .filled(value), which says what stands for the masked elements")
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


cdef int refuse_mask(str name, value, str remedy) except -1:
    """Refuse a masked array, of which NumPy would make one without its mask. Until it is imported, there are none."""
    if issubclass(type(value), getattr(sys.modules.get("numpy.ma"), "MaskedArray", ())):
        raise TypeError(f"{name}: expected an array without a mask, got {type(value).__name__}; {remedy}")
    return 0


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


cdef int hold_inputs(Operands& operands, tuple names, PyObject** values, Py_ssize_t count) except -1:
    """Take the inputs, as arrays."""
    cdef Py_ssize_t k
    for k in range(count):
        if not is_array(values[k]) and values[k] is not <PyObject*> None:
            return hold_others(operands, names, values, count)
    for k in range(count):
        if values[k] is not <PyObject*> None:
            operands.hold_input(k, values[k])
    return 0


cdef int hold_others(Operands& operands, tuple names, PyObject** values, Py_ssize_t count) except -1:
    cdef list objects = []
    cdef Py_ssize_t k
    for k in range(count):
        objects.append(<object> values[k])
    cdef list arrays = arrays_of(names, objects)
    for k in range(count):
        if arrays[k] is not None:
            array = arrays[k]
            operands.hold_input(k, <PyObject*> array)
    return 0


cdef int describe(Operands& operands, View& view, PyObject* array) except -1:
    cdef ElementType known = known_type(array)
    if known == ElementType.other:
        dtype = (<object> array).dtype
        known = element_type(dtype)
        if known == ElementType.other:
            name = str(dtype).encode(errors="backslashreplace")
            return operands.describe_other(view, array, name)
        if known == ElementType.bf16:
            remember_bfloat16(array)
    return operands.describe(view, array, known)


cdef int mask_of(output_mask, Py_ssize_t count) except? -1:
    """Which outputs are wanted, a bit for each; -1 for all."""
    cdef int bits = 0
    if output_mask is None or (type(output_mask) is tuple and len(output_mask) == count
                               and all_true(<tuple> output_mask)):
        return -1
    try:
        mask = tuple(map(operator.index, islice(output_mask, 1000)))  # it may have no end
    except Exception as error:
        raise TypeError(f"output_mask: expected {count} booleans, got {text_of(output_mask)}") from unexpected(error)
    if len(mask) != count:
        raise ValueError(f"output_mask: expected {count} booleans, got {len(mask)}")
    for k in range(count):
        if mask[k]:
            bits |= 1 << k
    return bits


cdef inline bint all_true(tuple values):
    """Whether these are `True` itself: to compare them could run somebody else's code, and takes longer."""
    for value in values:
        if value is not True:
            return False
    return True


cdef int hold_outputs(Operands& operands, out, Py_ssize_t count) except -1:
    """Take what is in `out`, an array or None for each output."""
    cdef PyObject* array
    cdef Py_ssize_t k, entries
    if out is None:
        return 0
    cdef bint is_tuple = issubclass(type(out), tuple)
    # What is in it, whatever a subclass says.
    if is_tuple:
        entries = PyTuple_Size(out)
    elif issubclass(type(out), list):
        entries = PyList_Size(out)
    else:
        raise TypeError(f"out: expected a tuple with an array or None for each output, got {type(out).__name__}")
    if entries != count:
        raise ValueError(f"out: expected {count} entries, an array or None for each output, got {entries}")
    for k in range(count):
        array = PyTuple_GetItem(out, k) if is_tuple else PyList_GetItem(out, k)
        if array is <PyObject*> None:
            continue
        if not is_array(array) and not issubclass(type(<object> array), ndarray):
            raise TypeError(f"out[{k}]: expected a NumPy array or None, got {type(<object> array).__name__}")
        if not is_array(array):
            refuse_mask(f"out[{k}]", <object> array, "use .data, the array behind the mask")
        operands.hold_result(k, array)
    return 0


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
