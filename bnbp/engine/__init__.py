"""The engine: how the operators are computed. Private; nothing here is an interface, and nothing imports upwards.

A call goes down this list:

``boundary``
    Python objects on one side, the C++ operators (``include/bnbp/detail/call.hpp``, where the rules are) on the other.
``pool``
    Memory of large results, kept for the next ones.
``isa``, ``threads``
    Which build of the kernels this CPU gets, and how many threads a call takes.
``openmp``
    Which OpenMP runtime the kernels share with PyTorch; before anything is loaded that uses one.
``kernels``
    The arithmetic, compiled once for each level of the instruction set.

``floor`` is beside the way: the loops that ``bnbp bench`` compares the operators with.
"""

from .openmp import share_runtime

share_runtime()
