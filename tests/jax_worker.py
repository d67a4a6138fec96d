"""Checks that need several devices: `python jax_worker.py NAME` runs one of them, on four parts of the CPU.

They are in processes of their own because the number of devices is fixed when JAX starts.
"""

import os
import sys
from functools import partial

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
from conftest import DTYPES, make_batch
from jax.sharding import Mesh, PartitionSpec

import bnbp
import bnbp.jax

P = PartitionSpec
WHOLE, EACH = P(), P("i")
MESH = Mesh(np.array(jax.devices()), ("i",))
SQUARE = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
SHAPE, EPSILON = (8, 3, 4, 5), 1e-3


def mapped(function, mesh, inputs, outputs, checked=True):
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=checked))


def plain(x, gamma, beta, addend, activation, axis_name):
    """Batch norm over a mapped axis as anybody would write it, after Flax."""
    mean = jax.lax.pmean(x.mean((0, 2, 3)), axis_name)
    variance = jax.lax.pmean(((x - mean[:, None, None]) ** 2).mean((0, 2, 3)), axis_name)
    y = (x - mean[:, None, None]) / jnp.sqrt(variance[:, None, None] + EPSILON)
    y = y * gamma[:, None, None] + beta[:, None, None] + addend
    return {None: lambda y: y, "relu": jax.nn.relu, "relu6": jax.nn.relu6}[activation](y), mean, variance


def ours(x, gamma, beta, addend, activation, axis_name):
    options = {"activation": activation, "addend": addend, "axis_name": axis_name}
    return tuple(bnbp.jax.batch_norm_training(x, gamma, beta, EPSILON, **options))


def loss(forward, activation, axis_name, x, gamma, beta, addend, delta):
    """A loss of one device's part; it depends on all three results."""
    y, mean, variance = forward(x, gamma, beta, addend, activation, axis_name)
    return (jnp.sin(y) * delta).sum() + (mean**2).sum() + (variance * mean).sum()


def assert_close(ours, expected, tolerance=1e-10):
    for each, value in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert np.abs(value).max() > 1e-3
        np.testing.assert_allclose(each, value, rtol=tolerance, atol=tolerance)


def data(dtype=np.float64, parameters=None):
    x, gamma, beta, _, _, delta = make_batch(SHAPE, dtype=dtype, parameters=parameters)
    return x, gamma, beta, make_batch(SHAPE, dtype=dtype, seed=1).input, delta


def check_forward_is_the_whole_batch():
    """Mean and variance have the bits of the halves in NumPy, merged in the order of the devices, in every type."""
    for dtype, parameters in [*zip(DTYPES, DTYPES, strict=True), (DTYPES[0], np.float32), (DTYPES[1], np.float32)]:
        x, gamma, beta, addend, _ = data(dtype, parameters)
        for activation in (None, "relu6"):
            function = partial(ours, activation=activation, axis_name="i")
            y, mean, variance = mapped(function, MESH, (EACH, WHOLE, WHOLE, EACH), (EACH, WHOLE, WHOLE))(
                x, gamma, beta, addend
            )
            parts = np.split(x, 4)
            whole = bnbp.merge_statistics(map(bnbp.batch_norm_training_statistics, parts))
            expected = whole.mean.astype(parameters), whole.variance.astype(parameters)
            for each, value in zip((mean, variance), expected, strict=True):
                assert each.dtype == value.dtype
                np.testing.assert_array_equal(np.asarray(each).view(np.uint8), value.view(np.uint8))
            options = {"activation": activation, "addend": addend}
            inference = bnbp.batch_norm_inference(x, gamma, beta, *expected, EPSILON, **options)
            np.testing.assert_array_equal(np.asarray(y).view(np.uint8), inference.view(np.uint8))


def check_gradient_inside():
    """`jax.grad` in the mapped function, with JAX's books on what differs where, and without."""
    for checked in (True, False):
        for activation in (None, "relu", "relu6"):
            results = []
            for forward in (ours, plain):
                gradient = jax.grad(partial(loss, forward, activation, "i"), (0, 1, 2, 3))

                def each(*operands, gradient=gradient):
                    x, gamma, beta, addend = gradient(*operands)
                    return x, gamma[None], beta[None], addend

                specs = (EACH, WHOLE, WHOLE, EACH, EACH), (EACH,) * 4
                results.append(mapped(each, MESH, *specs, checked)(*data()))
            assert_close(*results)


def check_gradient_outside():
    """`jax.grad` of a mapped function whose result is the same on all devices."""
    for checked in (True, False):
        results = []
        for forward in (ours, plain):

            def total(*operands, forward=forward):
                return jax.lax.psum(loss(forward, "relu", "i", *operands), "i")

            function = mapped(total, MESH, (EACH, WHOLE, WHOLE, EACH, EACH), WHOLE, checked)
            results.append(jax.jit(jax.grad(function, (0, 1, 2, 3)))(*data()))
        assert_close(*results)


def check_gradient_function():
    """The gradient function's sums are the device's own, its input_delta has those of all."""
    x, gamma, beta, addend, delta = data(np.float32)
    forward = bnbp.batch_norm_training(x, gamma, beta, EPSILON, activation="relu", addend=addend)

    def backward(x, gamma, beta, mean, variance, delta, normalized):
        options = {"axis_name": "i", "activation": "relu", "normalized": normalized, "addend": True}
        result = bnbp.jax.batch_norm_training_backprop(x, gamma, beta, mean, variance, delta, EPSILON, **options)
        return result._replace(
            gamma_delta=jax.lax.psum(result.gamma_delta, "i"), beta_delta=jax.lax.psum(result.beta_delta, "i")
        )

    specs = (EACH, *[WHOLE] * 4, EACH, EACH), (EACH, WHOLE, WHOLE, EACH)
    operands = x, gamma, beta, forward.batch_mean, forward.batch_variance, delta, forward.normalized
    result = mapped(lambda *operands: tuple(backward(*operands)), MESH, *specs)(*operands)
    options = {"activation": "relu", "normalized": forward.normalized, "addend": True}
    expected = bnbp.batch_norm_training_backprop(*operands[:6], EPSILON, **options)
    assert_close(result, tuple(expected), 1e-5)


def check_second_derivative():
    results = []
    for forward in (ours, plain):

        def total(x, gamma, beta, addend, delta, forward=forward):
            gradients = jax.grad(partial(loss, forward, "relu", "i"), (0, 1))(x, gamma, beta, addend, delta)
            return jax.lax.psum(sum((jnp.cos(each) ** 2).sum() for each in gradients), "i")

        function = mapped(total, MESH, (EACH, WHOLE, WHOLE, EACH, EACH), WHOLE)
        results.append(jax.jit(jax.grad(function, (0, 1, 2, 3)))(*data()))
    assert_close(*results, 1e-8)


def check_two_axes():
    """Over one of two axes of a mesh, over both, and none."""
    x, gamma, beta, addend, delta = data()
    for axes in ("a", "b", ("a", "b"), ("b", "a")):
        results = []
        for forward in (ours, plain):
            specs = (P(("a", "b")), WHOLE, WHOLE, P(("a", "b")), P(("a", "b")))

            def total(*operands, forward=forward, axes=axes):
                return jax.lax.psum(loss(forward, "relu", axes, *operands), ("a", "b"))

            function = mapped(total, SQUARE, specs, WHOLE)
            results.append(jax.jit(jax.value_and_grad(function, (0, 1, 2, 3)))(x, gamma, beta, addend, delta))
        assert_close(*results)


def check_without_axis_name():
    """Each device on its own, with parameters that all share."""

    def total(x, gamma, beta, delta):
        return jax.lax.psum((bnbp.jax.batch_norm_training(x, gamma, beta, EPSILON).normalized * delta).sum(), "i")

    x, gamma, beta, _, delta = data()
    function = mapped(total, MESH, (EACH, WHOLE, WHOLE, EACH), WHOLE)
    result = jax.grad(function, (0, 1, 2))(x, gamma, beta, delta)
    parts = []
    for part, d in zip(np.split(x, 4), np.split(delta, 4), strict=True):
        forward = bnbp.batch_norm_training(part, gamma, beta, EPSILON)
        parts.append(bnbp.batch_norm_training_backprop(part, gamma, beta, *forward[1:], d, EPSILON))
    expected = np.concatenate([each[0] for each in parts]), *(sum(each[k] for each in parts) for k in (1, 2))
    assert_close(result, expected)


def check_pmap_and_vmap():
    x, gamma, beta, addend, delta = data()
    x, addend, delta = (each.reshape(4, 2, *SHAPE[1:]) for each in (x, addend, delta))
    for mapping in (jax.pmap, jax.vmap):
        results = []
        for forward in (ours, plain):
            gradient = jax.value_and_grad(partial(loss, forward, "relu", "i"), (0, 1, 2, 3))
            results.append(
                mapping(gradient, axis_name="i", in_axes=(0, None, None, 0, 0))(x, gamma, beta, addend, delta)
            )
        assert_close(*results)


def check_cancelling_parts():
    """Parts whose means differ by much more than they spread: float32 collectives would lose the variance."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=SHAPE) + 1e4 * np.arange(8).reshape(-1, 1, 1, 1) // 2 * 2).astype(np.float32)
    x -= x.mean(dtype=np.float64).astype(np.float32)
    function = partial(bnbp.jax.batch_norm_training, axis_name="i")
    _, mean, variance = mapped(lambda x: tuple(function(x)), MESH, (EACH,), (EACH, WHOLE, WHOLE))(x)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(variance, exact.var((0, 2, 3)).astype(np.float32), rtol=6e-8)
    scale = np.abs(exact).max()
    np.testing.assert_allclose(mean, exact.mean((0, 2, 3)), rtol=6e-8, atol=scale * 2.0**-50)


def check_special_values():
    """A channel with a NaN or an infinity on one device is that on all, and leaves the others alone."""
    x = data(np.float32)[0]
    x[3, 0, 0, 0], x[5, 1, 1, 1] = np.nan, np.inf
    y, mean, variance = mapped(
        lambda x: tuple(bnbp.jax.batch_norm_training(x, axis_name="i")), MESH, (EACH,), (EACH, WHOLE, WHOLE)
    )(x)
    expected = bnbp.batch_norm_training(x)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected.normalized))
    np.testing.assert_allclose(mean, expected.batch_mean, rtol=1e-6)
    np.testing.assert_allclose(variance, expected.batch_variance, rtol=1e-6)


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}

if __name__ == "__main__":
    jax.config.update("jax_enable_x64", sys.argv[1] not in ("cancelling_parts", "special_values"))
    assert jax.device_count() == 4
    CHECKS[sys.argv[1]]()
    print("checked")
