"""The operators in a framework of your choice, here autograd. ``python examples/howto/custom_gradient.py``.

Needs ``pip install autograd``.
"""

import autograd
import autograd.numpy as anp
import numpy as np
from autograd.extend import defvjp_argnums, primitive

import bnbp


@primitive
def training(x, gamma, beta, epsilon):
    """The forward operator. It also returns what the gradient will need."""
    return tuple(bnbp.batch_norm_training(x, gamma, beta, epsilon))


def training_gradient(wanted, results, arguments, options):
    """What autograd asks for: a function that takes the gradients of the results to those of the arguments."""
    x, gamma, beta, epsilon = arguments
    _, mean, variance = results
    mask = [k in wanted for k in range(3)]

    def gradient(deltas):
        dy, *_ = deltas
        given = x, gamma, beta, mean, variance, dy, epsilon
        found = bnbp.batch_norm_training_backprop(*given, output_mask=mask)
        return [found[k] for k in wanted]

    return gradient


defvjp_argnums(training, training_gradient)


def batch_norm(x, gamma, beta, epsilon=1e-5):
    """Normalise a batch with its own statistics; autograd can differentiate it."""
    return training(x, gamma, beta, epsilon)[0]


def formula(x, gamma, beta, epsilon=1e-5):
    """The same as a formula, which autograd differentiates step by step."""
    mean = anp.mean(x, (0, 2, 3), keepdims=True)
    variance = anp.var(x, (0, 2, 3), keepdims=True)
    xhat = (x - mean) / anp.sqrt(variance + epsilon)
    return xhat * gamma[:, None, None] + beta[:, None, None]


rng = np.random.default_rng(0)
arguments = rng.normal(size=(6, 3, 4, 4)), rng.normal(size=3), rng.normal(size=3)
factors = rng.normal(size=(6, 3, 4, 4))


def gradients(operator):
    """The gradients of a loss in which the operator is one step of several."""

    def loss(x, gamma, beta):
        return anp.sum(factors * anp.tanh(operator(anp.sin(x), gamma, beta)))

    return autograd.grad(loss, (0, 1, 2))(*arguments)


pairs = zip(gradients(batch_norm), gradients(formula), strict=True)
for name, (ours, theirs) in zip(("x", "gamma", "beta"), pairs, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    print(f"gradient of {name}: shape {ours.shape}, agrees with the formula")
