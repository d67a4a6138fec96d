"""The C function table for code that is compiled in Python, as ``bnbp/kernels.h`` declares it.

Numba and ctypes call the kernels through it. A kernel takes one pointer, to a structure with the operands' addresses
and lengths, and returns a status. **Nothing is checked at this level.** A wrong length or type gives a wrong result, or
crashes the process.

The module is installed together with the kernels, so its structures are always those of the kernels. If they ever
differ, importing the module fails.
"""

import ctypes

import numpy as np

from .engine.boundary import kernels as _capsule

__all__ = [
    "ABI",
    "ARGUMENTS",
    "BF16",
    "F16",
    "F32",
    "F64",
    "IDENTITY",
    "INTERRUPTED",
    "NO_MEMORY",
    "OK",
    "RELU",
    "RELU6",
    "TABLE",
    "inference",
    "inference_backprop",
    "training",
    "training_backprop",
]

#: Version of the structures below, ``BNBP_KERNELS_ABI``.
ABI = 5

F32, F64, F16, BF16 = range(4)
IDENTITY, RELU, RELU6 = range(3)
OK, NO_MEMORY, INTERRUPTED = range(3)

_POINTER = np.uintp

#: The structure ``bnbp_arguments`` as a NumPy dtype. A pointer is a ``uintp``: the array's ``ctypes.data``, or 0.
ARGUMENTS = np.dtype(
    [
        ("type", np.intc),
        ("parameter_type", np.intc),
        ("n", np.intp),
        ("c", np.intp),
        ("s", np.intp),
        ("before", np.intc),
        ("after", np.intc),
        ("lengths", _POINTER),
        ("input_strides", _POINTER),
        ("normalized_delta_strides", _POINTER),
        ("third_strides", _POINTER),
        ("output_strides", _POINTER),
        ("addend_delta_strides", _POINTER),
        ("activation", np.intc),
        ("epsilon", np.double),
        ("count", np.double),
        ("num_threads", np.intc),
        ("input", _POINTER),
        ("gamma", _POINTER),
        ("beta", _POINTER),
        ("mean", _POINTER),
        ("variance", _POINTER),
        ("normalized_delta", _POINTER),
        ("addend", _POINTER),
        ("forward_output", _POINTER),
        ("delta_sum", _POINTER),
        ("delta_centered_sum", _POINTER),
        ("normalized", _POINTER),
        ("batch_mean", _POINTER),
        ("batch_variance", _POINTER),
        ("input_delta", _POINTER),
        ("addend_delta", _POINTER),
        ("gamma_delta", _POINTER),
        ("beta_delta", _POINTER),
        ("statistics_mean", _POINTER),
        ("statistics_m2", _POINTER),
        ("reduced_delta", _POINTER),
        ("reduced_product", _POINTER),
        ("samples", np.intp),
        ("exact", _POINTER),
    ],
    align=True,
)

#: The structure ``bnbp_kernels`` as a NumPy dtype. A function is a ``uintp``.
TABLE = np.dtype(
    [
        ("abi", np.intc),
        ("isa", _POINTER),
        ("l2_size", np.intp),
        ("openmp", np.intc),
        ("default_num_threads", np.intc),
        ("openmp_num_threads", np.intc),
        ("serial", np.intc),
        ("default_team", _POINTER),
        ("interrupted", _POINTER),
        ("training", _POINTER),
        ("training_backprop", _POINTER),
        ("inference", _POINTER),
        ("inference_backprop", _POINTER),
    ],
    align=True,
)


def _address(capsule: object) -> int:
    """The pointer in the capsule of kernels."""
    get = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    return int(get(capsule, b"bnbp.engine.boundary.kernels"))


def _table(capsule: object) -> np.void:
    """The table that the capsule points to; raises ImportError if this module does not describe it."""
    table: np.void = np.frombuffer(ctypes.string_at(_address(capsule), TABLE.itemsize), TABLE)[0]
    if table["abi"] != ABI:
        raise ImportError(
            f"bnbp.kernels: expected version {ABI} of the function table, got {table['abi']}; install bnbp again"
        )
    return table


_kernel = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_functions = _table(_capsule)

training = _kernel(int(_functions["training"]))
training_backprop = _kernel(int(_functions["training_backprop"]))
inference = _kernel(int(_functions["inference"]))
inference_backprop = _kernel(int(_functions["inference_backprop"]))
