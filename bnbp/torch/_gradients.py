r"""The gradients of the operators in PyTorch's dispatcher, and the gradients of these.

A forward operator's gradient is its own backprop operator. The gradient of a backprop operator is the second derivative
of a batch norm. It is composed of PyTorch's operators here. The docstring of each function has the formulas that it
computes. In these, :math:`g` is ``normalized_delta`` where the activation is not flat and 0 elsewhere, :math:`r = 1 /
\sqrt{\sigma^2 + \epsilon}`, :math:`\hat x = (x - \mu) r`, and :math:`A, B, D, E` are the gradients with respect to
``input_delta``, ``gamma_delta``, ``beta_delta`` and ``addend_delta``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._library import operators

__all__ = ["call"]

Gradients = tuple[Tensor | None, ...]


# ---------------------------------------------------------------- the forward operators


def _set_up_training(ctx: Any, inputs: Any, output: Any) -> None:
    input, gamma, beta, addend, epsilon, activation = inputs
    normalized, mean, variance = output
    _set_up(ctx, (input, gamma, beta, mean, variance), addend, epsilon, activation, normalized)
    ctx.mark_non_differentiable(mean, variance)


def _set_up_inference(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, addend, epsilon, activation = inputs
    _set_up(ctx, tensors, addend, epsilon, activation, output)


def _set_up(ctx: Any, tensors: Any, addend: Any, epsilon: float, activation: str | None, normalized: Any) -> None:
    """Keep the tensors that the gradient needs. It needs the output only if it cannot compute it again."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, normalized if activation is not None and addend is not None else None)
    ctx.epsilon, ctx.activation, ctx.addend = epsilon, activation, addend is not None


def _needs(ctx: Any, count: int) -> list[bool]:
    """Which of the first inputs need a gradient. PyTorch leaves out what has its default value at the end."""
    return [*ctx.needs_input_grad[:count], *[False] * (count - len(ctx.needs_input_grad))]


def _backprop(ctx: Any, operator: str, delta: Tensor, wanted: list[bool]) -> list[Tensor | None]:
    """The four outputs of a backprop operator, None where one is not wanted."""
    *tensors, normalized = ctx.saved_tensors
    masked = ctx.addend and ctx.activation is not None  # else the addend's gradient is the output's
    wanted, wants_addend = wanted[:3], wanted[3]
    results: list[Tensor | None] = [None] * 4
    if any(wanted) or (wants_addend and masked):
        mask = [*wanted, wants_addend and masked]
        outputs = call(operator, *tensors, delta, normalized, ctx.epsilon, ctx.activation, masked, mask)
        results = [output if want else None for output, want in zip(outputs, mask, strict=True)]
    if wants_addend and not masked:
        results[3] = delta
    return results


def _training(ctx: Any, delta: Tensor | None, *_: Any) -> Gradients:
    if delta is None:
        return (None,) * 6
    operator = "batch_norm_training_backprop"
    return (*_backprop(ctx, operator, delta, _needs(ctx, 4)), None, None)


def _inference(ctx: Any, delta: Tensor | None) -> Gradients:
    r"""The gradients of a normalisation with given statistics, also of mean and variance if they are wanted.

    :math:`\partial\mu = -\gamma r \, \mathtt{beta\_delta}` and :math:`\partial\sigma^2 = -\frac12 \gamma r^2 \,
    \mathtt{gamma\_delta}`.
    """
    if delta is None:
        return (None,) * 8
    input, gamma, beta, mean, variance, addend = _needs(ctx, 6)
    operator = "batch_norm_inference_backprop"
    wanted = [input, gamma or variance, beta or mean, addend]
    input_delta, gamma_delta, beta_delta, addend_delta = _backprop(ctx, operator, delta, wanted)
    mean_delta = variance_delta = None
    if mean or variance:
        r = (ctx.saved_tensors[4] + ctx.epsilon).rsqrt()
        scale = -r if ctx.saved_tensors[1] is None else -r * ctx.saved_tensors[1]
        mean_delta = scale * beta_delta if mean else None
        variance_delta = scale * r / 2 * gamma_delta if variance else None
    return (
        input_delta,
        gamma_delta if gamma else None,
        beta_delta if beta else None,
        mean_delta,
        variance_delta,
        addend_delta,
        None,
        None,
    )


# ---------------------------------------------------------------- the backprop operators


class _Terms:
    """The tensors of a backprop operator, and the terms of its gradients; in float32 if the data has 16 bits."""

    def __init__(self, ctx: Any, names: str) -> None:
        ctx_tensors = dict(zip(names.split(), ctx.saved_tensors, strict=True))
        input = ctx_tensors["input"]
        self.axes = [axis for axis in range(input.dim()) if axis != 1]
        self.along = [-1 if axis == 1 else 1 for axis in range(input.dim())]
        self.type = torch.promote_types(input.dtype, torch.float32)
        self.mask = _where_not_flat(ctx, **ctx_tensors) if ctx.activation is not None else None
        self.x = self.tensor(input)
        self.gamma = self.vector(ctx_tensors["gamma"]) if ctx_tensors.get("gamma") is not None else 1
        self.g = self.masked(self.tensor(ctx_tensors["normalized_delta"]))

    def tensor(self, value: Tensor) -> Tensor:
        return value.to(self.type)

    def vector(self, value: Tensor) -> Tensor:
        return value.to(self.type).reshape(self.along)

    def masked(self, value: Any) -> Any:
        return value if self.mask is None else value * self.mask

    def sum(self, value: Tensor) -> Tensor:
        return value.sum(self.axes, keepdim=True)

    def mean(self, value: Tensor) -> Tensor:
        return value.mean(self.axes, keepdim=True)

    def gradients(self, ctx: Any, inputs: list[Any], count: int) -> Gradients:
        """Each in the shape and type of its input, and None for the attributes."""
        given: list[Tensor | None] = [None] * count
        needs = _needs(ctx, len(inputs))
        for k, (like, value) in enumerate(inputs):
            if needs[k] and like is not None and value is not None:
                given[k] = torch.broadcast_to(value, self.x.shape if like.dim() > 1 else self.vector(like).shape)
                given[k] = given[k].reshape(like.shape).to(like.dtype)  # type: ignore[union-attr]
        return tuple(given)


def _where_not_flat(
    ctx: Any,
    input: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    normalized: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Where the activation's derivative is 1: a tensor of booleans."""
    with torch.no_grad():
        if normalized is None:
            statistics = mean, variance, None
            normalized = call("batch_norm_inference", input, gamma, beta, *statistics, ctx.epsilon, ctx.activation)
        passes = ~(normalized <= 0)
        return passes & ~(normalized >= 6) if ctx.activation == "relu6" else passes


_TENSORS = "input gamma beta mean variance normalized_delta normalized"


def _set_up_backprop(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, epsilon, activation, _addend, _mask = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.epsilon, ctx.activation = epsilon, activation


def _given(*gradients: Tensor | None) -> Any:
    """None for a gradient that is missing, or that belongs to an output that was left out."""
    return (None if each is None or each.numel() == 0 else each for each in gradients)


def _training_backprop(ctx: Any, *gradients: Tensor | None) -> Gradients:
    r"""The gradient through mean and variance. These are the batch's own, so they have no gradients themselves.

    With :math:`P(v) = v - \overline{v} - \hat x \, \overline{v \hat x}` over the :math:`m` elements of a channel,

    .. math::

       \partial g &= \gamma r P(A) + B \hat x + D + E \\
       \partial\gamma &= r \sum A P(g) \\
       \partial x &= r P(W) - \frac{\gamma r^2}{m} \hat x \sum A P(g), \qquad
       W = B g - \gamma r (A \, \overline{g \hat x} + g \, \overline{A \hat x}) .
    """
    A, B, D, E = _given(*gradients)
    t = _Terms(ctx, _TENSORS)
    input, gamma, _, _, _, delta, _ = ctx.saved_tensors
    mean = t.mean(t.x)  # once more, for derivatives of a higher order
    r = (t.mean((t.x - mean) ** 2) + ctx.epsilon).rsqrt()
    xhat = (t.x - mean) * r

    def projected(v: Tensor) -> Any:
        return v - t.mean(v) - xhat * t.mean(v * xhat)

    dg = torch.zeros_like(t.x)
    w, dgamma, dx = None, None, None
    if A is not None:
        A = t.tensor(A)
        dg = dg + t.gamma * r * projected(A)
        both = t.sum(A * projected(t.g))
        dgamma = r * both
        w = -t.gamma * r * (A * t.mean(t.g * xhat) + t.g * t.mean(A * xhat))
        dx = -t.gamma * r**2 / (t.x.numel() // t.x.shape[1]) * xhat * both
    if B is not None:
        B = t.vector(B)
        dg = dg + B * xhat
        w = B * t.g if w is None else w + B * t.g
    dg = _with_sums(t, dg, D, E)
    if w is not None:
        dx = r * projected(w) if dx is None else dx + r * projected(w)
    inputs = [(input, dx), (gamma, dgamma), (None, None), (None, None), (None, None), (delta, t.masked(dg))]
    return t.gradients(ctx, inputs, 11)


def _with_sums(t: _Terms, dg: Tensor, D: Tensor | None, E: Tensor | None) -> Tensor:
    """Add the gradients of the outputs that are :math:`g` itself, or its sum."""
    if D is not None:
        dg = dg + t.vector(D)
    if E is not None:
        dg = dg + t.tensor(E)
    return dg


def _inference_backprop(ctx: Any, *gradients: Tensor | None) -> Gradients:
    r"""Mean and variance are constants, which have gradients of their own.

    .. math::

       \partial g &= \gamma r A + B \hat x + D + E, \qquad \partial\gamma = r \sum A g, \qquad \partial x = B g r \\
       \partial\mu &= -B r \sum g, \qquad
       \partial\sigma^2 = -\frac{r^2}{2} \left( \gamma r \sum A g + B \sum g \hat x \right) .
    """
    A, B, D, E = _given(*gradients)
    t = _Terms(ctx, _TENSORS)
    input, gamma, _, mean, variance, delta, _ = ctx.saved_tensors
    r = (t.vector(variance) + ctx.epsilon).rsqrt()
    xhat = (t.x - t.vector(mean)) * r
    dg = torch.zeros_like(t.x)
    dx = dgamma = dmean = None
    dr = torch.zeros_like(r)
    if A is not None:
        product = t.sum(t.tensor(A) * t.g)
        dg = dg + t.gamma * r * t.tensor(A)
        dgamma = r * product
        dr = dr + t.gamma * r * product
    if B is not None:
        B = t.vector(B)
        dg = dg + B * xhat
        dx = B * t.g * r
        dmean = -B * r * t.sum(t.g)
        dr = dr + B * t.sum(t.g * xhat)
    dg = _with_sums(t, dg, D, E)
    inputs = [
        (input, dx),
        (gamma, dgamma),
        (None, None),
        (mean, dmean),
        (variance, -(r**2) / 2 * dr),
        (delta, t.masked(dg)),
    ]
    return t.gradients(ctx, inputs, 11)


# ---------------------------------------------------------------- the halves


def _set_up_statistics(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _statistics(ctx: Any, mean_delta: Tensor | None, m2_delta: Tensor | None) -> Tensor | None:
    r""":math:`\partial x = \frac1m \partial\mathtt{mean} + 2 (x - \mathtt{mean}) \, \partial\mathtt{m2}`."""
    (input,) = ctx.saved_tensors
    axes = [axis for axis in range(input.dim()) if axis != 1]
    along = [-1 if axis == 1 else 1 for axis in range(input.dim())]
    x = input.to(torch.float64)
    dx = torch.zeros_like(x)
    if mean_delta is not None:
        dx = dx + mean_delta.reshape(along) / (x.numel() // x.shape[1])
    if m2_delta is not None:
        dx = dx + 2 * (x - x.mean(axes, keepdim=True)) * m2_delta.reshape(along)
    return dx.to(input.dtype)


def _set_up_reduce(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, epsilon, activation, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.epsilon, ctx.activation = epsilon, activation


def _reduce(ctx: Any, D: Tensor | None, C: Tensor | None) -> Gradients:
    r"""The sums are linear in :math:`g`, :math:`x` and :math:`\mu`.

    With :math:`D` and :math:`C` for the two gradients, :math:`\partial g = D + C (x - \mu)`, :math:`\partial x = C g`
    and :math:`\partial\mu = -C \sum g`.
    """
    t = _Terms(ctx, "input mean normalized_delta gamma beta variance normalized")
    input, mean, delta, *_ = ctx.saved_tensors
    dg = _with_sums(t, torch.zeros_like(t.x), D, None)
    dx = dmean = None
    if C is not None:
        C = t.vector(C)
        dg = dg + C * (t.x - t.vector(mean))
        dx = C * t.g
        dmean = -C * t.sum(t.g)
    return t.gradients(ctx, [(input, dx), (mean, dmean), (delta, t.masked(dg))], 10)


def _set_up_apply(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, count, epsilon, activation, _addend, _mask = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.count, ctx.epsilon, ctx.activation = count, epsilon, activation


def _apply(ctx: Any, *gradients: Tensor | None) -> Gradients:
    r"""All tensors are independent here.

    Let :math:`S` and :math:`C` be the two sums over the :math:`n` elements of a channel of the whole batch, and
    :math:`q = g - S / n - (x - \mu) r^2 C / n`, so that ``input_delta`` is :math:`\gamma r q`. Then

    .. math::

       \partial g &= \gamma r A + E, \qquad \partial\gamma = r \sum A q, \qquad
       \partial x = -\frac{\gamma r^3 C}{n} A, \qquad \partial\mu = -\sum \partial x \\
       \partial S &= D - \frac{\gamma r}{n} \sum A, \qquad
       \partial C = B r - \frac{\gamma r^3}{n} \sum A (x - \mu) \\
       \partial\sigma^2 &= -\frac{r^3}{2} \left( \gamma \sum A q - \frac{2 \gamma r^2 C}{n} \sum A (x - \mu) + B C
       \right) .
    """
    A, B, D, E = _given(*gradients)
    t = _Terms(ctx, "input gamma beta mean variance normalized_delta delta_sum delta_centered_sum normalized")
    input, gamma, _, mean, variance, delta, delta_sum, delta_centered_sum, _ = ctx.saved_tensors
    r = (t.vector(variance) + ctx.epsilon).rsqrt()
    centered = t.x - t.vector(mean)
    S, C = t.vector(delta_sum) / ctx.count, t.vector(delta_centered_sum) / ctx.count
    zero = torch.zeros_like(r)
    dg = torch.zeros_like(t.x)
    dx = dgamma = dmean = None
    dS, dC, dr = zero, zero, zero
    if A is not None:
        A = t.tensor(A)
        dg = dg + t.gamma * r * A
        product = t.sum(A * (t.g - S - centered * r**2 * C))
        dgamma = r * product
        dx = -t.gamma * r**3 * C * A
        dmean = -t.sum(dx)
        dS = -t.gamma * r / ctx.count * t.sum(A)
        dC = -t.gamma * r**3 / ctx.count * t.sum(A * centered)
        dr = t.gamma * product - 2 * t.gamma * r**2 * C * t.sum(A * centered)
    if B is not None:
        dC = dC + t.vector(B) * r
        dr = dr + t.vector(B) * C * ctx.count
    if D is not None:
        dS = dS + t.vector(D)
    dg = _with_sums(t, dg, None, E)
    inputs = [
        (input, dx),
        (gamma, dgamma),
        (None, None),
        (mean, dmean),
        (variance, -(r**3) / 2 * dr),
        (delta, t.masked(dg)),
        (delta_sum, dS),
        (delta_centered_sum, dC),
    ]
    return t.gradients(ctx, inputs, 14)


# ---------------------------------------------------------------- how an operator is called

# An operator of `torch.library` runs Python code when it passes autograd, with a gradient or without. The transforms of
# `torch.func` do not know it. It is called in this way only while PyTorch traces. Otherwise a call without a gradient
# goes below autograd, and a call with one goes to a function of `torch.autograd`. There are two of these functions. The
# one for the transforms is used only while one is at work: PyTorch binds its arguments by its signature, which takes
# longer than all the rest.

_below_autograd = torch._C._AutoDispatchBelowAutograd
_needs_gradient = torch._C._any_requires_grad
_transforming = torch._C._are_functorch_transforms_active
_compiling, _recording = torch.compiler.is_compiling, torch.jit.is_tracing  # type: ignore[attr-defined]

_OPERATORS: dict[str, Any] = {}
_DIFFERENTIABLE: dict[str, Callable[..., Any]] = {}
_TRANSFORMABLE: dict[str, Callable[..., Any]] = {}


def call(name: str, *arguments: Any) -> Any:
    """Call an operator."""
    if _compiling() or _recording():
        return _OPERATORS[name](*arguments)
    if _transforming():
        return _TRANSFORMABLE[name](*arguments)
    if torch.is_grad_enabled() and _needs_gradient(*arguments):
        return _DIFFERENTIABLE[name](*arguments)
    with _below_autograd():
        return _OPERATORS[name](*arguments)


def _register(name: str, backward: Callable[..., Any], set_up: Callable[..., None]) -> None:
    """Give an operator its gradient, for each way of calling it."""
    operator = getattr(operators, name).default

    def compute(*arguments: Any) -> Any:
        with _below_autograd():
            return operator(*arguments)

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = compute(*arguments)
        set_up(ctx, arguments, output)
        return output

    def function(**methods: Any) -> Callable[..., Any]:
        methods = {key: staticmethod(method) for key, method in methods.items()}
        kind = type(name, (torch.autograd.Function,), {**methods, "generate_vmap_rule": True})
        return kind.apply  # type: ignore[attr-defined, no-any-return]

    torch.library.register_autograd(f"bnbp::{name}", backward, setup_context=set_up)
    _OPERATORS[name] = operator
    _DIFFERENTIABLE[name] = function(forward=forward, backward=backward)
    _TRANSFORMABLE[name] = function(forward=compute, setup_context=set_up, backward=backward)


_register("batch_norm_training", _training, _set_up_training)
_register("batch_norm_inference", _inference, _set_up_inference)
_register("batch_norm_training_backprop", _training_backprop, _set_up_backprop)
_register("batch_norm_inference_backprop", _inference_backprop, _set_up_backprop)
_register("batch_norm_training_statistics", _statistics, _set_up_statistics)
_register("batch_norm_training_backprop_reduce", _reduce, _set_up_reduce)
_register("batch_norm_training_backprop_apply", _apply, _set_up_apply)
