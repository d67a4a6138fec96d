"""The operators: what each promises, and nothing else. The rules are in C++, the arithmetic in the kernels.

The types are in ``ops.pyi``, as in NumPy. So help() starts with a signature that can be read.
"""

import numpy as np

from ._results import (
    BatchNormStatistics,
    BatchNormTrainingBackpropAddendResult,
    BatchNormTrainingBackpropResult,
    BatchNormTrainingBackpropSums,
    BatchNormTrainingResult,
)
from .engine import boundary

__all__ = [
    "batch_norm_inference",
    "batch_norm_inference_backprop",
    "batch_norm_training",
    "batch_norm_training_backprop",
    "batch_norm_training_backprop_apply",
    "batch_norm_training_backprop_reduce",
    "batch_norm_training_statistics",
]

_gradients = BatchNormTrainingBackpropResult, BatchNormTrainingBackpropAddendResult

_training = boundary.function_of("BatchNormTraining", BatchNormTrainingResult)
_training_backprop = boundary.function_of("BatchNormTrainingBackprop", *_gradients)
_statistics = boundary.function_of("BatchNormTrainingStatistics", BatchNormStatistics)
_reduce = boundary.function_of("BatchNormTrainingBackpropReduce", BatchNormTrainingBackpropSums)
_apply = boundary.function_of("BatchNormTrainingBackpropApply", *_gradients)
_inference = boundary.function_of("BatchNormInference", None)
_inference_backprop = boundary.function_of("BatchNormInferenceBackprop", *_gradients)


def batch_norm_training(
    input,
    gamma=None,
    beta=None,
    epsilon=1e-5,
    *,
    activation=None,
    addend=None,
    channel_axis=1,
    out=None,
    num_threads=None,
):
    r"""Normalise each channel of a batch to mean 0 and variance 1, then scale it by gamma and shift it by beta.

    The result is the normalised batch, and the mean and the variance of each channel, which the gradient needs. This is
    batch normalisation as it is in training. The nGraph operator set calls it ``BatchNormTraining``.

    Parameters
    ----------
    input : array_like, float16, bfloat16, float32 or float64, shape (N, C, ...)
        The batch, in any memory layout. It has at least two axes, and at least one channel on ``channel_axis``.
    gamma, beta : array_like, shape (C,), type of `input` or, if that has 16 bits, float32; or None
        Scale and shift of each channel. None stands for ones and zeros. The first of the two that is given sets the
        type of both, the parameters' type. If neither is given, the parameters' type is the type of `input`.
    epsilon : float, default 1e-5
        Added to the variance before the square root; finite and not negative.
    activation : {None, "relu", "relu6"}, default None
        The activation to apply to the result: none, :math:`\max(y, 0)` or :math:`\min(\max(y, 0), 6)`. NaN stays NaN.
        With an activation, the mean and the variance are rounded to the parameters' type before they are used.
    addend : array_like, shape and type of `input`, optional
        A tensor to add before the activation, in any memory layout.
    channel_axis : int, default 1
        The axis of the channels; negative values count from the end. -1 is channels-last.
    out : sequence of (ndarray or None), optional
        For each output an array to write it into, such as an earlier result, or None. The array has the shape and type
        of the output, and any memory layout. ``out[0]`` may be `input` or `addend` itself, to work in place. Any other
        overlap is refused.
    num_threads : int, optional
        Upper limit for the number of threads. The default is ``BNBP_NUM_THREADS``, else ``OMP_NUM_THREADS``, else the
        number of CPUs that the process may use. The result does not depend on it.

    Returns
    -------
    BatchNormTrainingResult
        Named tuple of ``normalized`` (shape and type of `input`, and its order of axes in memory), ``batch_mean`` and
        ``batch_variance`` (shape (C,), the parameters' type). The variance is biased: it is divided by :math:`m`, the
        number of elements of a channel. For an empty batch, the mean and the variance are NaN.

    Raises
    ------
    TypeError
        If an element type is not accepted, the types of two arguments do not match, or a tensor is not in the CPU's
        memory. The message names the argument.
    ValueError
        If a shape, `epsilon`, `activation`, `channel_axis`, `num_threads` or `out` is not acceptable.

    Notes
    -----
    Over the :math:`m` elements of a channel,

    .. math::

       \mathtt{normalized}_i &= \gamma \, \frac{\mathtt{input}_i - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta \\
       \mu &= \frac1m \sum_i \mathtt{input}_i \\
       \sigma^2 &= \frac1m \sum_i (\mathtt{input}_i - \mu)^2 .

    The mean and the variance are accumulated in float64 for all types. For float64 data, their sums are compensated
    too. Both are computed for chunks of the channel and then merged [1]_, so nothing cancels: a constant channel has
    variance exactly 0. ``normalized`` is computed in the type of the data. For 16-bit types, it is computed in float32
    and rounded once at the end.

    References
    ----------
    .. [1] T. F. Chan, G. H. Golub, R. J. LeVeque, "Algorithms for computing the sample variance: analysis and
       recommendations", The American Statistician 37 (1983), 242-247.

    Examples
    --------
    >>> import numpy as np, bnbp
    >>> x = np.array([[[1, 2], [5, 5]], [[3, 6], [5, 5]]], dtype=np.float32)  # N=2, C=2, two positions
    >>> result = bnbp.batch_norm_training(x, gamma=[1, 2], beta=[0, 7], epsilon=0.5)
    >>> result.batch_mean, result.batch_variance
    (array([3., 5.], dtype=float32), array([3.5, 0. ], dtype=float32))
    >>> result.normalized[:, 0]
    array([[-1. , -0.5],
           [ 0. ,  1.5]], dtype=float32)
    """
    return _training(input, gamma, beta, addend, epsilon, channel_axis, activation, None, None, out, num_threads)


def batch_norm_training_backprop(
    input,
    gamma,
    beta,
    mean,
    variance,
    normalized_delta,
    epsilon=1e-5,
    *,
    activation=None,
    normalized=None,
    addend=False,
    channel_axis=1,
    output_mask=None,
    out=None,
    num_threads=None,
):
    r"""Compute the gradients of batch normalisation in training, with respect to input, gamma and beta.

    This is the backward pass of :func:`batch_norm_training`. It starts from `normalized_delta`, the gradient of the
    loss with respect to the normalised output. The mean and the variance depend on the input too, and the gradient goes
    through them. The nGraph operator set calls the operator ``BatchNormTrainingBackprop``.

    Parameters
    ----------
    input : array_like, float16, bfloat16, float32 or float64, shape (N, C, ...)
        The input of :func:`batch_norm_training`. It has at least two axes; the channels are on ``channel_axis``.
    gamma : array_like, shape (C,), type of `input` or, if that has 16 bits, float32; or None
        Scale of each channel. None stands for ones. The first of `gamma`, `beta`, `mean` and `variance` that is given
        sets the type of all four, the parameters' type.
    beta : array_like, shape (C,), the parameters' type; or None
        Shift of each channel. None stands for zeros. Only an activation uses it: it affects at
        which elements the activation is flat.
    mean, variance : array_like, shape (C,), the parameters' type
        The batch's own mean and biased variance, as :func:`batch_norm_training` returned them.
    normalized_delta : array_like, shape and type of `input`
        Gradient of the loss with respect to the normalised output. It may have any memory layout, and so may `input`.
    epsilon : float, default 1e-5
        As in the forward operator; finite and not negative. A channel with ``variance + epsilon`` = 0 follows IEEE
        arithmetic: its results are infinite or NaN. The other channels are not affected.
    activation : {None, "relu", "relu6"}, default None
        The activation that the forward operator applied. `normalized_delta` is then taken as 0 where the forward output
        is not above 0 or, for "relu6", not below 6. Where the forward output is NaN, the gradient passes.
    normalized : array_like, shape and type of `input`, optional
        The forward operator's output. If it is left out, it is computed again from the other arguments, bit for bit,
        and without reading anything more. With an activation and an addend, it must be given.
    addend : bool, default False
        Whether the forward operator had an addend. If so, the fourth output is ``addend_delta``, its gradient.
    channel_axis : int, default 1
        The axis of the channels; negative values count from the end. -1 is channels-last.
    output_mask : sequence of three bool, or with `addend` four, optional
        Which outputs to compute; by default all. The others are returned as None, and their arrays in `out` are left
        alone. If the mask is written out, as in ``(True, False, False)``, a type checker knows which outputs are None.
        Without ``input_delta`` and ``addend_delta``, the tensors are read once and none is written.
    out : sequence of (ndarray or None), optional
        For each output an array to write it into, such as an earlier result, or None. The array has the shape and type
        of the output, and any memory layout. ``out[0]`` and ``out[3]`` may each be one of the tensors that are read, to
        work in place. Any other overlap is refused.
    num_threads : int, optional
        Upper limit for the number of threads. The default is ``BNBP_NUM_THREADS``, else ``OMP_NUM_THREADS``, else the
        number of CPUs that the process may use. The result does not depend on it.

    Returns
    -------
    BatchNormTrainingBackpropResult
        Named tuple of ``input_delta`` (shape and type of `input`, and its order of axes in memory), ``gamma_delta`` and
        ``beta_delta`` (shape (C,), the parameters' type). With `addend`, it is a BatchNormTrainingBackpropAddendResult,
        which also has ``addend_delta``, with the shape and type of `input`. For an empty batch, ``gamma_delta`` and
        ``beta_delta`` are 0. With one element in a channel, ``input_delta`` is exactly 0, because the output does not
        depend on that element.

    Raises
    ------
    TypeError
        If an element type is not accepted, the types of two arguments do not match, or a tensor is not in the CPU's
        memory. The message names the argument.
    ValueError
        If a shape, `epsilon`, `activation`, `channel_axis`, `output_mask`, `num_threads` or `out` is not acceptable, or
        if `normalized` is missing. All checks come before the first write.

    Notes
    -----
    With :math:`\mathtt{inv\_std} = 1 / \sqrt{\mathtt{variance} + \epsilon}` and
    :math:`\hat x_i = (\mathtt{input}_i - \mathtt{mean}) \, \mathtt{inv\_std}`, over the :math:`m` elements of a
    channel,

    .. math::

       \mathtt{beta\_delta} &= \sum_i \mathtt{normalized\_delta}_i \\
       \mathtt{gamma\_delta} &= \sum_i \mathtt{normalized\_delta}_i \, \hat x_i \\
       \mathtt{input\_delta}_i &= \gamma \, \mathtt{inv\_std} \Bigl( \mathtt{normalized\_delta}_i \\
           &\qquad - \frac{\mathtt{beta\_delta}}{m} - \hat x_i \, \frac{\mathtt{gamma\_delta}}{m} \Bigr) .

    The formulas are from S. Ioffe and C. Szegedy, "Batch normalization", 2015 (arXiv:1502.03167), section 3, in the
    simplified form that the operator reference derives. Sums over float32 data are in float64, and sums over float64
    data are compensated. This makes them right to the last place or so. The error of sums over 16-bit data is within
    2^-20 times the sum of their terms' magnitudes, before they are rounded to the parameters' type. ``input_delta`` is
    computed in the type of the data. For 16-bit types, it is computed in float32 and rounded once at the end.

    Examples
    --------
    >>> import numpy as np, bnbp
    >>> x = np.array([[1.0], [2.0], [3.0], [6.0]])
    >>> forward = bnbp.batch_norm_training(x, [2.0], None, epsilon=0.5)
    >>> dy = np.array([[1.0], [0.0], [0.0], [1.0]])
    >>> backward = bnbp.batch_norm_training_backprop(
    ...     x, [2.0], None, forward.batch_mean, forward.batch_variance, dy, epsilon=0.5)
    >>> backward.gamma_delta, backward.beta_delta
    (array([0.5]), array([2.]))
    >>> backward.input_delta.ravel()
    array([ 0.625 , -0.4375, -0.5   ,  0.3125])
    """
    return _training_backprop(
        input,
        gamma,
        beta,
        mean,
        variance,
        normalized_delta,
        normalized,
        epsilon,
        channel_axis,
        activation,
        addend,
        output_mask,
        out,
        num_threads,
    )


def batch_norm_training_statistics(input, *, channel_axis=1, num_threads=None):
    """Compute the mean and the squared deviations of each channel, over a batch or over a part of one.

    :func:`merge_statistics` merges the statistics of the parts.

    Parameters
    ----------
    input : array_like, float16, bfloat16, float32 or float64, shape (N, C, ...)
        The batch or a part of it, in any memory layout. It has at least two axes, and at least one channel on
        ``channel_axis``.
    channel_axis : int, default 1
        The axis of the channels; negative values count from the end. -1 is channels-last.
    num_threads : int, optional
        Upper limit for the number of threads, as in :func:`batch_norm_training`.

    Returns
    -------
    BatchNormStatistics
        Named tuple of ``count``, ``mean`` and ``m2``. ``count`` is the number of elements of a channel. ``m2`` is the
        sum of the squared deviations from ``mean``; both are float64, shape (C,). The property ``variance`` is
        ``m2 / count``, the biased variance. Without elements, ``mean`` is NaN and ``m2`` is 0.

    Raises
    ------
    TypeError
        If the element type is not accepted, or the tensor is not in the CPU's memory.
    ValueError
        If the shape, `channel_axis` or `num_threads` is not acceptable.

    See Also
    --------
    merge_statistics : Merges the statistics of the parts of a batch.
    batch_norm_inference : Normalises a part with the statistics of the whole, rounded to the parameters' type.

    Examples
    --------
    >>> import numpy as np, bnbp
    >>> x = np.array([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]])
    >>> statistics = bnbp.batch_norm_training_statistics(x)
    >>> statistics
    BatchNormStatistics(count=3, mean=array([3., 5.]), m2=array([14.,  0.]))
    >>> statistics.variance.round(3)
    array([4.667, 0.   ])
    """
    return _statistics(input, 0.0, channel_axis, None, None, None, None, num_threads)


def batch_norm_training_backprop_reduce(
    input,
    mean,
    normalized_delta,
    *,
    gamma=None,
    beta=None,
    variance=None,
    epsilon=1e-5,
    activation=None,
    normalized=None,
    addend=False,
    channel_axis=1,
    num_threads=None,
):
    r"""Compute the sums that the gradient needs, over a batch or over a part of one.

    This is the first half of :func:`batch_norm_training_backprop`. Add the sums of the parts of a batch, and pass them
    to :func:`batch_norm_training_backprop_apply`, which computes the gradient of each part.

    Parameters
    ----------
    input : array_like, float16, bfloat16, float32 or float64, shape (N, C, ...)
        The batch or a part of it. It has at least two axes; the channels are on ``channel_axis``.
    mean : array_like, shape (C,), type of `input` or, if that has 16 bits, float32
        The mean of the whole batch. Pass the same to :func:`batch_norm_training_backprop_apply`.
    normalized_delta : array_like, shape and type of `input`
        Gradient of the loss with respect to the normalised output. It may have any memory layout, and so may `input`.
    gamma, beta, variance : array_like, shape (C,), the parameters' type; or None
        As in :func:`batch_norm_training_backprop`. They are needed only with an activation and without `normalized`.
    epsilon : float, default 1e-5
        As in the forward operator. It is needed only with an activation and without `normalized`.
    activation, normalized, addend
        As in :func:`batch_norm_training_backprop`. The sums leave out the elements at which the activation is flat.
    channel_axis : int, default 1
        The axis of the channels; negative values count from the end. -1 is channels-last.
    num_threads : int, optional
        Upper limit for the number of threads, as in :func:`batch_norm_training`.

    Returns
    -------
    BatchNormTrainingBackpropSums
        Named tuple of ``delta_sum`` and ``delta_centered_sum``: float64, shape (C,). The error of each sum is less than
        2^-44 times the sum of its terms' magnitudes for float32 data, and less than 2^-20 times that sum for 16-bit
        data. For float64 data, the sums are compensated, and right to the last place or so unless the terms cancel.

    Raises
    ------
    TypeError
        If an element type is not accepted, the types of two arguments do not match, or a tensor is not in the CPU's
        memory. The message names the argument.
    ValueError
        If a shape, `epsilon`, `activation`, `channel_axis` or `num_threads` is not acceptable, or if an
        activation is given with neither `normalized` nor `variance`.

    Notes
    -----
    Over the elements of a channel,

    .. math::

       \mathtt{delta\_sum} &= \sum_i \mathtt{normalized\_delta}_i \\
       \mathtt{delta\_centered\_sum} &= \sum_i \mathtt{normalized\_delta}_i \, (\mathtt{input}_i - \mathtt{mean})

    Examples
    --------
    >>> import numpy as np, bnbp
    >>> x, dy = np.array([[1.0], [2.0], [3.0], [6.0]]), np.array([[1.0], [0.0], [0.0], [1.0]])
    >>> bnbp.batch_norm_training_backprop_reduce(x, [3.0], dy)
    BatchNormTrainingBackpropSums(delta_sum=array([2.]), delta_centered_sum=array([1.]))
    """
    return _reduce(
        input,
        mean,
        normalized_delta,
        gamma,
        beta,
        variance,
        normalized,
        epsilon,
        channel_axis,
        activation,
        addend,
        None,
        None,
        num_threads,
    )


def batch_norm_training_backprop_apply(
    input,
    gamma,
    beta,
    mean,
    variance,
    normalized_delta,
    delta_sum,
    delta_centered_sum,
    count,
    epsilon=1e-5,
    *,
    activation=None,
    normalized=None,
    addend=False,
    channel_axis=1,
    output_mask=None,
    out=None,
    num_threads=None,
):
    r"""Compute the gradients of a batch, or of a part of one, from the sums of the whole batch.

    This is the second half of :func:`batch_norm_training_backprop`. It reads the tensors once, and not at all if
    `output_mask` leaves ``input_delta`` out.

    Parameters
    ----------
    input, gamma, beta, mean, variance, normalized_delta : array_like
        As in :func:`batch_norm_training_backprop`, for the batch or for a part of it. `mean` and `variance` are the
        statistics of the whole batch.
    delta_sum, delta_centered_sum : array_like, float64, shape (C,)
        The sums of :func:`batch_norm_training_backprop_reduce` over the whole batch.
    count : int
        Number of elements of a channel in the whole batch. It is at least the number in `input`.
    epsilon, activation, normalized, addend, channel_axis, output_mask, out, num_threads
        As in :func:`batch_norm_training_backprop`. The activation is the same as in the first half.

    Returns
    -------
    BatchNormTrainingBackpropResult
        Named tuple of ``input_delta`` of this part, and ``gamma_delta`` and ``beta_delta`` of the whole batch. The
        types are the same as in :func:`batch_norm_training_backprop`.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm_training_backprop`, and if `count` is not an integer, or is less than the number of
        elements that a channel of `input` has.

    Notes
    -----
    With :math:`m` = `count`, :math:`\mathtt{beta\_delta}` = `delta_sum` and :math:`\mathtt{gamma\_delta}` =
    `delta_centered_sum` :math:`\cdot\, \mathtt{inv\_std}`, the formula is the same as in
    :func:`batch_norm_training_backprop`.

    Examples
    --------
    A batch in two parts, as two processes would have them:

    >>> import numpy as np, bnbp
    >>> x, dy = np.array([[1.0], [2.0], [3.0], [6.0]]), np.array([[1.0], [0.0], [0.0], [1.0]])
    >>> parts = [slice(0, 1), slice(1, 4)]
    >>> whole = bnbp.merge_statistics(*(bnbp.batch_norm_training_statistics(x[part]) for part in parts))
    >>> sums = [bnbp.batch_norm_training_backprop_reduce(x[part], whole.mean, dy[part]) for part in parts]
    >>> delta_sum, delta_centered_sum = (sum(both) for both in zip(*sums))
    >>> for part in parts:
    ...     result = bnbp.batch_norm_training_backprop_apply(
    ...         x[part], [2.0], None, whole.mean, whole.variance, dy[part],
    ...         delta_sum, delta_centered_sum, whole.count, epsilon=0.5)
    ...     print(result.input_delta.ravel(), result.gamma_delta)
    [0.625] [0.5]
    [-0.4375 -0.5     0.3125] [0.5]
    """
    return _apply(
        input,
        gamma,
        beta,
        mean,
        variance,
        normalized_delta,
        delta_sum,
        delta_centered_sum,
        normalized,
        epsilon,
        channel_axis,
        activation,
        addend,
        output_mask,
        out,
        num_threads,
        count,
    )


def batch_norm_inference(
    input,
    gamma,
    beta,
    mean,
    variance,
    epsilon=1e-5,
    *,
    activation=None,
    addend=None,
    channel_axis=1,
    out=None,
    num_threads=None,
):
    r"""Normalise each channel with a given mean and variance, then scale it by gamma and shift it by beta.

    This is batch normalisation in a network that is trained. The nGraph operator set calls it ``BatchNormInference``.

    Parameters
    ----------
    input : array_like, float16, bfloat16, float32 or float64, shape (N, C, ...)
        The batch, in any memory layout. It has at least two axes, and at least one channel on ``channel_axis``.
    gamma, beta : array_like, shape (C,), type of `input` or, if that has 16 bits, float32; or None
        Scale and shift of each channel. None stands for ones and zeros. The first of `gamma`, `beta`, `mean` and
        `variance` that is given sets the type of all four, the parameters' type.
    mean, variance : array_like, shape (C,), the parameters' type
        Statistics to normalise with, such as running averages gathered in training.
    epsilon : float, default 1e-5
        Added to the variance before the square root; finite and not negative.
    activation : {None, "relu", "relu6"}, default None
        The activation to apply to the result: none, :math:`\max(y, 0)` or :math:`\min(\max(y, 0), 6)`. NaN stays NaN.
    addend : array_like, shape and type of `input`, optional
        A tensor to add before the activation, in any memory layout.
    channel_axis : int, default 1
        The axis of the channels; negative values count from the end. -1 is channels-last.
    out : ndarray, optional
        An array to write the result into, with its shape and type and any memory layout. It may be `input` or `addend`
        itself, to work in place. Any other overlap is refused. A sequence of one array or None is accepted too.
    num_threads : int, optional
        Upper limit for the number of threads. The default is ``BNBP_NUM_THREADS``, else ``OMP_NUM_THREADS``, else the
        number of CPUs that the process may use. The result does not depend on it.

    Returns
    -------
    ndarray
        ``normalized``, with the shape and type of `input`, and its order of axes in memory.

    Raises
    ------
    TypeError
        If an element type is not accepted, the types of two arguments do not match, or a tensor is not in the CPU's
        memory. The message names the argument.
    ValueError
        If a shape, `epsilon`, `activation`, `channel_axis`, `num_threads` or `out` is not acceptable.

    Notes
    -----
    .. math::

       \mathtt{normalized}_i = \gamma \, \frac{\mathtt{input}_i - \mathtt{mean}}{\sqrt{\mathtt{variance} + \epsilon}}
       + \beta

    The scale is computed in float64 and rounded once. The rest is computed in the type of the data. For 16-bit types,
    it is computed in float32 and rounded once at the end.

    Examples
    --------
    >>> import numpy as np, bnbp
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> bnbp.batch_norm_inference(x, None, [0, 100], mean=[2, 20], variance=[3, 24], epsilon=1.0)
    array([[ -0.5,  98. ],
           [  0.5, 102. ]])
    """
    outputs = (out,) if issubclass(type(out), np.ndarray) else out
    return _inference(
        input, gamma, beta, mean, variance, addend, epsilon, channel_axis, activation, None, None, outputs, num_threads
    )


def batch_norm_inference_backprop(
    input,
    gamma,
    beta,
    mean,
    variance,
    normalized_delta,
    epsilon=1e-5,
    *,
    activation=None,
    normalized=None,
    addend=False,
    channel_axis=1,
    output_mask=None,
    out=None,
    num_threads=None,
):
    r"""Compute the gradients of batch normalisation with given statistics, with respect to input, gamma and beta.

    This is the backward pass of :func:`batch_norm_inference`. The mean and the variance are constants here, as in
    fine-tuning with frozen statistics. nGraph has no such operator. The arguments, results and errors are the same as
    in :func:`batch_norm_training_backprop`.

    Parameters
    ----------
    input, gamma, beta, mean, variance, normalized_delta, epsilon
        As in :func:`batch_norm_training_backprop`; `mean` and `variance` may be any. For ``input_delta`` alone, and
        without an activation, only the tensor `normalized_delta` is read.
    activation, normalized, addend, channel_axis, output_mask, out, num_threads
        As in :func:`batch_norm_training_backprop`.

    Returns
    -------
    BatchNormTrainingBackpropResult
        Named tuple of ``input_delta``, ``gamma_delta`` and ``beta_delta``, as in :func:`batch_norm_training_backprop`.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm_training_backprop`.

    Notes
    -----
    ``gamma_delta`` and ``beta_delta`` have the same formulas as in :func:`batch_norm_training_backprop`, and

    .. math::

       \mathtt{input\_delta}_i = \gamma \, \mathtt{inv\_std} \; \mathtt{normalized\_delta}_i .

    Examples
    --------
    >>> import numpy as np, bnbp
    >>> x, dy = np.array([[1.0], [3.0]]), np.array([[10.0], [20.0]])
    >>> bnbp.batch_norm_inference_backprop(x, [3.0], None, mean=[2.0], variance=[3.0], normalized_delta=dy, epsilon=1.0)
    BatchNormTrainingBackpropResult(input_delta=array([[15.],
           [30.]]), gamma_delta=array([5.]), beta_delta=array([30.]))
    """
    return _inference_backprop(
        input,
        gamma,
        beta,
        mean,
        variance,
        normalized_delta,
        normalized,
        epsilon,
        channel_axis,
        activation,
        addend,
        output_mask,
        out,
        num_threads,
    )
