"""bnbp in PyTorch: batch normalisation for CPU tensors, by bnbp's operators.

>>> import bnbp.torch
>>> model = bnbp.torch.convert(model)  # doctest: +SKIP

The files follow the steps of a call:

- ``_convert.py`` replaces the batch norms of a model, and fuses them with the additions and ReLUs that follow;
- ``_modules.py`` has the modules, and ``_sync.py`` has the module for several processes;
- ``_functional.py`` is `batch_norm`, which decides whether a call runs here or in PyTorch;
- ``_library.py`` has the operators in PyTorch's dispatcher, and ``_gradients.py`` their gradients;
- ``kernels.cc`` is what the dispatcher calls: PyTorch's tensors on one side, bnbp's C++ operators on the other;
- ``shim.h`` declares the part of PyTorch's stable C interface that is used.
"""

try:
    import torch as _torch
except ModuleNotFoundError as _error:
    if _error.name != "torch":
        raise
    raise ImportError("bnbp.torch: PyTorch is missing; install it with `pip install torch`") from None

if tuple(map(int, _torch.__version__.split(".")[:2])) < (2, 10):
    raise ImportError(f"bnbp.torch: expected PyTorch 2.10 or later, got {_torch.__version__}")

from ._convert import convert
from ._functional import batch_norm
from ._modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from ._sync import SyncBatchNorm

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "batch_norm", "convert"]
