"""The operators over the ranks of a communicator: what each promises, and the steps of its call.

A call has three steps. Everything that can fail comes first: the arguments are checked, the memory of the results is
allocated, and the sums of the rank's own part are computed. Then the parts are exchanged. The last step is the rank's
own work, and writes the results.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

import bnbp
from bnbp._results import (
    BatchNormTrainingBackpropAddendResult,
    BatchNormTrainingBackpropResult,
    BatchNormTrainingResult,
)
from bnbp._statistics import as_operands
from bnbp.engine import boundary

from ._exchange import Contribution, Terms, communicator_of, exchange, fingerprint
from ._parts import own_statistics, own_sums, whole_statistics, whole_sums

__all__ = [
    "batch_norm_inference",
    "batch_norm_inference_backprop",
    "batch_norm_training",
    "batch_norm_training_backprop",
]

Array = NDArray[np.floating[Any]]
Activation = Literal["relu", "relu6"]
GradientResult = BatchNormTrainingBackpropResult | BatchNormTrainingBackpropAddendResult

_gradients = BatchNormTrainingBackpropResult, BatchNormTrainingBackpropAddendResult

# With an addend, their results have one more field. A type checker cannot know this.
_apply: Any = bnbp.batch_norm_training_backprop_apply
_inference_backprop: Any = bnbp.batch_norm_inference_backprop

# They check the arguments, and return the results' memory.
_prepare: dict[str, Any] = {
    "batch_norm_training": boundary.function_of("BatchNormTraining", BatchNormTrainingResult, computes=False),
    "batch_norm_training_backprop": boundary.function_of("BatchNormTrainingBackprop", *_gradients, computes=False),
    "batch_norm_inference_backprop": boundary.function_of("BatchNormInferenceBackprop", *_gradients, computes=False),
}


def batch_norm_training(
    input: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    epsilon: float = 1e-5,
    *,
    comm: Any = None,
    reproducible: bool = True,
    activation: Activation | None = None,
    addend: ArrayLike | None = None,
    channel_axis: int = 1,
    out: Sequence[Array | None] | None = None,
    num_threads: int | None = None,
) -> BatchNormTrainingResult:
    r"""Normalise each channel of a batch that is spread over MPI processes; see :func:`bnbp.batch_norm_training`.

    Every rank of the communicator calls it with its part of the batch. Mean and variance are over the whole batch.

    Parameters
    ----------
    input : array_like, float16, bfloat16, float32 or float64, shape (N, C, ...)
        This rank's part of the batch, in any memory layout. N may differ from rank to rank, and be 0. C and the type
        are the same on all ranks.
    gamma, beta : array_like, shape (C,), type of `input` or, if that has 16 bits, float32; or None
        Scale and shift of each channel, with the same values on all ranks.
    epsilon : float, default 1e-5
        Added to the variance before the square root; the same on all ranks.
    comm : mpi4py.MPI.Intracomm, optional
        The processes that the batch is spread over. The default is ``MPI.COMM_WORLD``.
    reproducible : bool, default True
        Whether the results have the same bits however the samples are spread over ranks. The same on all ranks.
    activation : {None, "relu", "relu6"}, default None
        What is applied to the result; the same on all ranks.
    addend : array_like, shape and type of `input`, optional
        This rank's part of a tensor that is added before the activation. All ranks pass one, or none does.
    channel_axis, out, num_threads : optional
        As in :func:`bnbp.batch_norm_training`. Every rank decides for itself.

    Returns
    -------
    BatchNormTrainingResult
        Named tuple of ``normalized``, for this rank's part, and ``batch_mean`` and ``batch_variance``, for the whole
        batch. These two are bit-for-bit identical on all ranks. If the batch is empty on all ranks, both are NaN.

    Raises
    ------
    TypeError, ValueError
        As :func:`bnbp.batch_norm_training`, on the rank with the wrong argument. All other ranks raise the same type of
        error, which names the rank. If the ranks disagree, all of them raise the same ValueError.

    Notes
    -----
    The result is the result of :func:`bnbp.batch_norm_training` on the whole batch, within the accuracy promised there.
    As there, the mean is not rounded to the parameters' type before it is subtracted, unless there is an activation.

    Examples
    --------
    This example has one process. Under ``mpirun -n 4``, every process would have a part of x.

    >>> import numpy as np, bnbp.mpi
    >>> x = np.array([[1.0], [2.0], [3.0], [6.0]])
    >>> y, mean, variance = bnbp.mpi.batch_norm_training(x, gamma=[2.0], epsilon=0.5)
    >>> y.ravel(), mean, variance
    (array([-2., -1.,  0.,  3.]), array([3.]), array([3.5]))
    """
    comm = communicator_of(comm)
    arrays: list[Any] = []
    prepared: list[BatchNormTrainingResult] = []

    def contribute() -> Contribution:
        arrays.extend(boundary.arrays_of(("input", "gamma", "beta", "addend"), [input, gamma, beta, addend]))
        attributes = epsilon, channel_axis, activation, None, None, out, num_threads
        result = _prepare["batch_norm_training"](*arrays, *attributes)
        prepared.append(result)
        own = own_statistics(bool(reproducible), arrays[0], channel_axis=channel_axis, num_threads=num_threads)
        terms = Terms(
            "batch_norm_training",
            bool(reproducible),
            result.batch_mean.size,
            arrays[0].dtype.type.__name__,
            result.batch_mean.dtype.type.__name__,
            float(epsilon),
            activation,
            addend is not None,
            *map(fingerprint, arrays[1:3]),
        )
        return Contribution(terms, arrays[0].size // terms.channels, own)

    _, parts = exchange(comm, contribute)
    whole = whole_statistics(bool(reproducible), parts)
    (x, scale, shift, added), (result,) = arrays, prepared
    with np.errstate(all="ignore"):  # infinities and NaN are results like others
        mean, variance, exact_shift = as_operands(whole, scale, shift, epsilon, result.batch_mean.dtype)
        result.batch_mean[...], result.batch_variance[...] = mean, variance
    # As in one process: with an activation the statistics are used as they are returned, without one as they are.
    bnbp.batch_norm_inference(
        *(x, scale, exact_shift if activation is None else shift, mean, variance, epsilon),
        activation=activation,
        addend=added,
        channel_axis=channel_axis,
        out=result.normalized,
        num_threads=num_threads,
    )
    return result


def batch_norm_training_backprop(
    input: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    mean: ArrayLike,
    variance: ArrayLike,
    normalized_delta: ArrayLike,
    epsilon: float = 1e-5,
    *,
    comm: Any = None,
    reproducible: bool = True,
    activation: Activation | None = None,
    normalized: ArrayLike | None = None,
    addend: bool = False,
    channel_axis: int = 1,
    output_mask: Sequence[bool] | None = None,
    out: Sequence[Array | None] | None = None,
    num_threads: int | None = None,
) -> GradientResult:
    r"""Gradient of :func:`batch_norm_training`, over the same MPI processes.

    .. warning::

       ``gamma_delta`` and ``beta_delta`` are already the gradients of the whole batch. Do not add them up over the
       ranks, and do not average them, as a data-parallel program does with its other gradients.

    Parameters
    ----------
    input : array_like, float16, bfloat16, float32 or float64, shape (N, C, ...)
        What :func:`batch_norm_training` was given: this rank's part of the batch.
    gamma, beta : array_like, shape (C,), the parameters' type; or None
        Scale and shift of each channel, with the same values on all ranks.
    mean, variance : array_like, shape (C,), the parameters' type
        The whole batch's mean and variance, as :func:`batch_norm_training` returned them on all ranks.
    normalized_delta : array_like, shape and type of `input`
        Gradient of the loss with respect to this rank's part of the normalised output.
    epsilon : float, default 1e-5
        As in the forward operator; the same on all ranks.
    comm : mpi4py.MPI.Intracomm, optional
        The processes that the batch is spread over. The default is ``MPI.COMM_WORLD``.
    reproducible : bool, default True
        Whether the results have the same bits however the samples are spread over ranks. The same on all ranks.
    activation : {None, "relu", "relu6"}, default None
        What the forward operator applied; the same on all ranks.
    normalized : array_like, shape and type of `input`, optional
        The forward operator's output, as in :func:`bnbp.batch_norm_training_backprop`.
    addend : bool, default False
        Whether the forward operator had an addend; the same on all ranks.
    channel_axis, output_mask, out, num_threads : optional
        As in :func:`bnbp.batch_norm_training_backprop`. Every rank decides for itself. A rank that wants no output must
        still make the call.

    Returns
    -------
    BatchNormTrainingBackpropResult
        Named tuple of ``input_delta``, for this rank's part, and ``gamma_delta`` and ``beta_delta``, for the whole
        batch. These two are bit-for-bit identical on all ranks. With `addend` it is a
        BatchNormTrainingBackpropAddendResult, which has ``addend_delta`` for this rank's part too.

    Raises
    ------
    TypeError, ValueError
        As :func:`bnbp.batch_norm_training_backprop`, on the rank with the wrong argument. All other ranks raise the
        same type of error, which names the rank. If the ranks disagree, all of them raise the same ValueError.

    Examples
    --------
    >>> import numpy as np, bnbp.mpi
    >>> x, dy = np.array([[1.0], [2.0], [3.0], [6.0]]), np.array([[1.0], [0.0], [0.0], [1.0]])
    >>> _, mean, variance = bnbp.mpi.batch_norm_training(x, [2.0], None, epsilon=0.5)
    >>> backward = bnbp.mpi.batch_norm_training_backprop(x, [2.0], None, mean, variance, dy, epsilon=0.5)
    >>> backward.gamma_delta, backward.beta_delta
    (array([0.5]), array([2.]))
    """
    call = _Gradient("batch_norm_training_backprop", reproducible, activation, addend, channel_axis, num_threads)
    operands = [input, gamma, beta, mean, variance, normalized_delta, normalized]
    count, sums = call.sums(comm, operands, epsilon, output_mask, out)
    _apply(*call.arrays[:6], *sums, count, epsilon, **call.options(call.mask), out=call.result)
    return call.result


def batch_norm_inference(
    input: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    mean: ArrayLike,
    variance: ArrayLike,
    epsilon: float = 1e-5,
    *,
    comm: Any = None,
    activation: Activation | None = None,
    addend: ArrayLike | None = None,
    channel_axis: int = 1,
    out: Array | Sequence[Array | None] | None = None,
    num_threads: int | None = None,
) -> Array:
    """Normalise this rank's part of a batch with a given mean and variance: :func:`bnbp.batch_norm_inference`.

    No rank needs data from another, so nothing is communicated. A rank may call it alone, and an error concerns one
    rank. `comm` is checked. It is a parameter so that all operators can be called alike.

    Parameters
    ----------
    input, gamma, beta, mean, variance, epsilon, activation, addend, channel_axis, out, num_threads
        As in :func:`bnbp.batch_norm_inference`.
    comm : mpi4py.MPI.Intracomm, optional
        The processes that the batch is spread over. The default is ``MPI.COMM_WORLD``.

    Returns
    -------
    ndarray
        The normalised part; shape and type of `input`.

    Examples
    --------
    >>> import numpy as np, bnbp.mpi
    >>> bnbp.mpi.batch_norm_inference(np.array([[1.0], [5.0]]), [2.0], None, [3.0], [3.5], epsilon=0.5).ravel()
    array([-2.,  2.])
    """
    communicator_of(comm)
    return bnbp.batch_norm_inference(
        *(input, gamma, beta, mean, variance, epsilon),
        activation=activation,
        addend=addend,
        channel_axis=channel_axis,
        out=out,
        num_threads=num_threads,
    )


def batch_norm_inference_backprop(
    input: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    mean: ArrayLike,
    variance: ArrayLike,
    normalized_delta: ArrayLike,
    epsilon: float = 1e-5,
    *,
    comm: Any = None,
    reproducible: bool = True,
    activation: Activation | None = None,
    normalized: ArrayLike | None = None,
    addend: bool = False,
    channel_axis: int = 1,
    output_mask: Sequence[bool] | None = None,
    out: Sequence[Array | None] | None = None,
    num_threads: int | None = None,
) -> GradientResult:
    """Gradient of :func:`batch_norm_inference`, with mean and variance as constants.

    .. warning::

       ``gamma_delta`` and ``beta_delta`` are already the gradients of the whole batch. Do not add them up over the
       ranks, and do not average them, as a data-parallel program does with its other gradients.

    Parameters
    ----------
    input, gamma, beta, mean, variance, normalized_delta, epsilon, activation, normalized, addend, channel_axis
        As in :func:`batch_norm_training_backprop`. `mean` and `variance` may be any.
    comm : mpi4py.MPI.Intracomm, optional
        The processes that the batch is spread over. The default is ``MPI.COMM_WORLD``.
    reproducible : bool, default True
        Whether the results have the same bits however the samples are spread over ranks. The same on all ranks.
    output_mask, out, num_threads : optional
        As in :func:`bnbp.batch_norm_inference_backprop`. Every rank decides for itself.

    Returns
    -------
    BatchNormTrainingBackpropResult
        Named tuple as in :func:`batch_norm_training_backprop`: ``input_delta`` for this rank's part, ``gamma_delta``
        and ``beta_delta`` for the whole batch.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm_training_backprop`.

    Examples
    --------
    >>> import numpy as np, bnbp.mpi
    >>> x, dy = np.array([[1.0], [2.0], [3.0], [6.0]]), np.array([[1.0], [0.0], [0.0], [1.0]])
    >>> backward = bnbp.mpi.batch_norm_inference_backprop(x, [2.0], None, [3.0], [3.5], dy, epsilon=0.5)
    >>> backward.input_delta.ravel(), backward.gamma_delta, backward.beta_delta
    (array([1., 0., 0., 1.]), array([0.5]), array([2.]))
    """
    call = _Gradient("batch_norm_inference_backprop", reproducible, activation, addend, channel_axis, num_threads)
    operands = [input, gamma, beta, mean, variance, normalized_delta, normalized]
    count, sums = call.sums(comm, operands, epsilon, output_mask, out)
    of_sums = [False, *call.mask[1:3], *([False] if addend else [])]
    of_elements = [wanted and not other for wanted, other in zip(call.mask, of_sums, strict=True)]
    # The sums become these two by the formulas of training. They first: an output may take the place of an input.
    _apply(*call.arrays[:6], *sums, count, epsilon, **call.options(of_sums), out=call.result)
    _inference_backprop(*call.arrays[:6], epsilon, **call.options(of_elements), out=call.result)
    return call.result


class _Gradient:
    """A call of a gradient operator."""

    arrays: list[Any]  # input, gamma, beta, mean, variance, normalized_delta, normalized
    result: GradientResult  # the results' memory, None for results that are not wanted
    mask: list[bool]

    def __init__(
        self,
        operator: str,
        reproducible: bool,
        activation: Activation | None,
        addend: bool,
        channel_axis: int,
        num_threads: int | None,
    ) -> None:
        self.operator, self.reproducible, self.activation, self.addend = operator, reproducible, activation, addend
        self.channel_axis, self.num_threads = channel_axis, num_threads

    def options(self, output_mask: list[bool]) -> dict[str, Any]:
        """The options of the second half, which computes some of the outputs."""
        return {
            "activation": self.activation,
            "normalized": self.arrays[6],
            "addend": self.addend,
            "channel_axis": self.channel_axis,
            "output_mask": output_mask,
            "num_threads": self.num_threads,
        }

    def sums(self, comm: Any, operands: list[Any], epsilon: float, output_mask: Any, out: Any) -> tuple[int, Any]:
        """Elements of a channel, and the gradient's sums, over all ranks."""
        contribute = partial(self._contribution, operands, epsilon, output_mask, out)
        count, parts = exchange(communicator_of(comm), contribute)
        return count, whole_sums(bool(self.reproducible), parts)

    def _contribution(self, operands: list[Any], epsilon: float, output_mask: Any, out: Any) -> Contribution:
        names = "input", "gamma", "beta", "mean", "variance", "normalized_delta", "normalized"
        self.arrays = boundary.arrays_of(names, operands)
        attributes = epsilon, self.channel_axis, self.activation, self.addend, output_mask, out, self.num_threads
        self.result = _prepare[self.operator](*self.arrays, *attributes)
        self.mask = [each is not None for each in self.result]
        input, gamma, beta, mean, variance, normalized_delta, normalized = self.arrays
        own = own_sums(
            *(bool(self.reproducible), input, mean, normalized_delta),
            gamma=gamma,
            beta=beta,
            variance=variance,
            normalized=normalized,
            epsilon=epsilon,
            activation=self.activation,
            addend=self.addend,
            channel_axis=self.channel_axis,
            num_threads=self.num_threads,
        )
        terms = Terms(
            self.operator,
            bool(self.reproducible),
            mean.size,
            input.dtype.type.__name__,
            mean.dtype.type.__name__,
            float(epsilon),
            self.activation,
            bool(self.addend),
            *map(fingerprint, (gamma, beta, mean, variance)),
        )
        return Contribution(terms, input.size // terms.channels, own)
