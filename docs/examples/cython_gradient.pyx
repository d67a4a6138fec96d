# cython: boundscheck=False, language_level=3
"""The gradients of a batch norm for C-contiguous arrays of float64 and the shape (N, C, S)."""

import numpy as np

from libcpp.vector cimport vector

from bnbp.batch_norm cimport BatchNormTrainingBackprop, Shape, Tensor, import_kernels

import_kernels()  # once in each module; an ImportError if this module was compiled for another version of the table


cdef Tensor vector_of(const double[::1] values) noexcept nogil:
    return Tensor(&values[0], Shape(1, values.shape[0]))


cdef Tensor tensor_of(const double[:, :, ::1] values) noexcept nogil:
    cdef Shape shape
    shape.assign(&values.shape[0], &values.shape[0] + 3)
    return Tensor(&values[0, 0, 0], shape)


def gradient(
    const double[:, :, ::1] x, const double[::1] gamma, const double[::1] mean, const double[::1] variance,
    const double[:, :, ::1] dy, double epsilon=1e-5,
):
    """The gradients with respect to x, gamma and beta."""
    cdef double[:, :, ::1] dx = np.empty_like(x)
    cdef double[::1] dgamma = np.empty_like(gamma), dbeta = np.empty_like(gamma)
    cdef vector[Tensor] inputs, outputs
    cdef BatchNormTrainingBackprop op
    op.set_eps_value(epsilon)
    with nogil:
        # Give each input the shape of its own array: the operator checks that the shapes match.
        inputs.push_back(tensor_of(x))
        inputs.push_back(vector_of(gamma))
        inputs.push_back(Tensor())  # beta: not used
        inputs.push_back(vector_of(mean))
        inputs.push_back(vector_of(variance))
        inputs.push_back(tensor_of(dy))
        # A pointer to memory that is not const makes a tensor that may be written to.
        outputs.push_back(Tensor(&dx[0, 0, 0], inputs[0].shape))
        outputs.push_back(Tensor(&dgamma[0], inputs[1].shape))
        outputs.push_back(Tensor(&dbeta[0], inputs[1].shape))
        op.evaluate(outputs, inputs)  # raises the TypeError or ValueError that bnbp's own function would
    return np.asarray(dx), np.asarray(dgamma), np.asarray(dbeta)
