"""The gradients of a batch norm, from code that Numba compiles."""

import math

import numba
import numpy as np

from bnbp.kernels import ARGUMENTS, F64, OK, training_backprop


# This signature checks types, numbers of axes and contiguity: Numba refuses all other arrays.
@numba.njit(
    "Tuple((f8[:,:,::1], f8[::1], f8[::1]))(f8[:,:,::1], f8[::1], f8[::1], f8[::1], f8[:,:,::1], f8)", nogil=True
)
def gradient(x, gamma, mean, variance, dy, epsilon):
    """The gradients with respect to x, gamma and beta."""
    n, c, s = x.shape
    if c < 1 or dy.shape != x.shape or gamma.size != c or mean.size != c or variance.size != c:
        raise ValueError("expected x and dy of one shape (N, C, S), and gamma, mean and variance of length C")
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError("epsilon: expected a finite number >= 0")
    dx, dgamma, dbeta = np.empty_like(x), np.empty_like(gamma), np.empty_like(gamma)

    structure = np.zeros(1, ARGUMENTS)  # zeros, so that a member that is not set is null
    arguments = structure[0]
    arguments.type = arguments.parameter_type = F64
    if x.size:  # n and s are both 0 if there are no elements
        arguments.n, arguments.s = n, s
    arguments.c = c
    arguments.count = n * s
    arguments.epsilon = epsilon
    arguments.input = x.ctypes.data
    arguments.gamma = gamma.ctypes.data
    arguments.mean = mean.ctypes.data
    arguments.variance = variance.ctypes.data
    arguments.normalized_delta = dy.ctypes.data
    arguments.input_delta = dx.ctypes.data
    arguments.gamma_delta = dgamma.ctypes.data
    arguments.beta_delta = dbeta.ctypes.data
    if training_backprop(structure.ctypes) != OK:
        raise MemoryError
    return dx, dgamma, dbeta  # the arrays live until here, because they are used here
