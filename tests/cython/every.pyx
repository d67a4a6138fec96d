# cython: language_level=3
"""Every operator, through what bnbp.batch_norm declares, on arrays of float64 that come as addresses."""

from libc.stdint cimport int64_t, uintptr_t
from libcpp.vector cimport vector

from bnbp.batch_norm cimport (
    Activation,
    BatchNormActivated,
    BatchNormBase,
    BatchNormInference,
    BatchNormInferenceBackprop,
    BatchNormTraining,
    BatchNormTrainingBackprop,
    BatchNormTrainingBackpropApply,
    BatchNormTrainingBackpropReduce,
    BatchNormTrainingStatistics,
    ElementType,
    Shape,
    Strides,
    Tensor,
    import_kernels,
    set_kernels,
    set_python_error,
)
from bnbp.kernels cimport BNBP_KERNELS_ABI, bnbp_kernels

cdef extern from *:
    """
    static void throw_one(int which) {
        switch (which) {
        case 0: throw bnbp::TypeError("a type");
        case 1: throw bnbp::ValueError("a value");
        case 2: throw std::bad_alloc();
        case 3: throw std::logic_error("logic");
        case 4: throw bnbp::Interrupted("interrupted");
        default: throw which;
        }
    }
    """
    void throw_one(int which) except +set_python_error nogil


def throw(int which):
    with nogil:
        throw_one(which)


def start():
    import_kernels()


def start_with_another_version():
    cdef bnbp_kernels table
    table.abi = BNBP_KERNELS_ABI - 1
    set_kernels(&table)


cdef Tensor tensor_of(operand, bint writable) except *:
    if operand is None:
        return Tensor()
    address, shape, strides = operand
    cdef Shape lengths = shape
    cdef Strides steps = strides
    cdef void* data = <void*> <uintptr_t> address
    cdef Tensor tensor
    if writable:
        tensor = Tensor(ElementType.f64, data, lengths)
    else:
        tensor = Tensor(ElementType.f64, <const void*> data, lengths)
    assert tensor.present() and tensor.writable == writable and tensor.data == data and tensor.shape == lengths
    tensor.strides = steps
    return tensor


cdef BatchNormBase* new_operator(str name, double epsilon, int64_t axis, int64_t count) except NULL:
    if name == "BatchNormTraining":
        return new BatchNormTraining(epsilon, axis)
    if name == "BatchNormTrainingBackprop":
        return new BatchNormTrainingBackprop(epsilon, axis)
    if name == "BatchNormTrainingStatistics":
        return new BatchNormTrainingStatistics(axis)
    if name == "BatchNormTrainingBackpropReduce":
        return new BatchNormTrainingBackpropReduce(axis, epsilon)
    if name == "BatchNormTrainingBackpropApply":
        return new BatchNormTrainingBackpropApply(count, epsilon, axis)
    if name == "BatchNormInference":
        return new BatchNormInference(epsilon, axis)
    if name == "BatchNormInferenceBackprop":
        return new BatchNormInferenceBackprop(epsilon, axis)
    raise KeyError(name)


def evaluate(
    str name, list outputs, list inputs, double epsilon=0.5, int64_t axis=1, int64_t count=0, bint relu=False,
    bint addend=False, int threads=0,
):
    """Compute the outputs; the shapes that were inferred for them."""
    cdef vector[Tensor] from_, to, inferred
    for operand in inputs:
        from_.push_back(tensor_of(operand, False))
    for operand in outputs:
        to.push_back(tensor_of(operand, True))
    cdef BatchNormBase* op = new_operator(name, epsilon, axis, count)
    cdef BatchNormActivated* activated = NULL
    try:
        assert op.get_type_name().decode() == name
        if relu or addend:
            activated = <BatchNormActivated*> op
            activated.set_activation(Activation.relu if relu else Activation.none)
            activated.set_addend(addend)
        with nogil:
            inferred = op.validate_and_infer_types(from_)
            if threads:
                op.evaluate(to, from_, threads)
            else:
                op.evaluate(to, from_)
        return [tuple(tensor.shape) for tensor in inferred]
    finally:
        del op


def attributes():
    """What is read after it was written, and the defaults."""
    cdef BatchNormTraining plain
    cdef BatchNormTrainingBackpropApply* apply = new BatchNormTrainingBackpropApply(7)
    try:
        before = plain.get_eps_value(), plain.get_channel_axis(), plain.get_activation() == Activation.none
        plain.set_eps_value(0.25)
        plain.set_channel_axis(-1)
        plain.set_activation(Activation.relu6)
        plain.set_addend(True)
        after = plain.get_eps_value(), plain.get_channel_axis(), plain.get_activation() == Activation.relu6
        counts = [apply.get_count()]
        apply.set_count(9)
        counts.append(apply.get_count())
        return before, after, bool(plain.get_addend()), counts
    finally:
        del apply


def defaults():
    """The constructors that leave out arguments: epsilon and the axis of each."""
    cdef BatchNormTraining a = BatchNormTraining(0.25)
    cdef BatchNormTrainingBackprop b
    cdef BatchNormTrainingBackprop c = BatchNormTrainingBackprop(0.25)
    cdef BatchNormTrainingStatistics d
    cdef BatchNormTrainingStatistics e = BatchNormTrainingStatistics(2)
    cdef BatchNormTrainingBackpropReduce f
    cdef BatchNormTrainingBackpropReduce g = BatchNormTrainingBackpropReduce(2)
    cdef BatchNormTrainingBackpropApply* h = new BatchNormTrainingBackpropApply(7, 0.25)
    cdef BatchNormInference i
    cdef BatchNormInference j = BatchNormInference(0.25)
    cdef BatchNormInferenceBackprop k
    cdef BatchNormInferenceBackprop m = BatchNormInferenceBackprop(0.25)
    cdef BatchNormBase* op
    cdef BatchNormBase** all_ = [&a, &b, &c, &d, &e, &f, &g, h, &i, &j, &k, &m]
    try:
        return [(op.get_eps_value(), op.get_channel_axis()) for op in all_[:12]]
    finally:
        del h


def memory(uintptr_t floats, uintptr_t doubles):
    """Which of the tensors that plain pointers make may be written to."""
    cdef Shape shape = [1]
    cdef float* f = <float*> floats
    cdef const float* cf = f
    cdef double* d = <double*> doubles
    cdef const double* cd = d
    cdef vector[Tensor] tensors
    tensors.push_back(Tensor(f, shape))
    tensors.push_back(Tensor(cf, shape))
    tensors.push_back(Tensor(d, shape))
    tensors.push_back(Tensor(cd, shape))
    tensors.push_back(Tensor(ElementType.bf16, shape))
    return [(bool(tensor.writable), tensor.element_type == ElementType.f32) for tensor in tensors]
