"""bnbp in JAX: the operators for arrays in the CPU's memory, through XLA's foreign function interface.

>>> import bnbp.jax
>>> normalized, batch_mean, batch_variance = bnbp.jax.batch_norm_training(x, gamma, beta)  # doctest: +SKIP

The files follow the steps of a call:

- ``_functions.py`` has the operators, their promises, and the checks that run when a function is traced;
- ``_gradients.py`` says how JAX differentiates them, and which code runs on which device;
- ``_synchronised.py`` puts together the parts of a batch on several devices;
- ``_calls.py`` registers the handlers, and calls them;
- ``_formulas.py`` has the operators in ``jax.numpy``, for other devices and second derivatives;
- ``handlers.cc`` is what XLA calls: its buffers on one side, bnbp's C++ operators on the other;
- ``ffi.h`` declares the part of XLA's stable C interface that is used, and ``merge.h`` merges statistics.
"""

try:
    import jax as _jax
except ModuleNotFoundError as _error:
    if _error.name != "jax":
        raise
    raise ImportError("bnbp.jax: JAX is missing; install it with `pip install jax`") from None

if tuple(map(int, _jax.__version__.split(".")[:2])) < (0, 7):
    raise ImportError(f"bnbp.jax: expected JAX 0.7 or later, got {_jax.__version__}")

from ._functions import (
    batch_norm_inference,
    batch_norm_inference_backprop,
    batch_norm_training,
    batch_norm_training_backprop,
)

__all__ = [
    "batch_norm_inference",
    "batch_norm_inference_backprop",
    "batch_norm_training",
    "batch_norm_training_backprop",
]
