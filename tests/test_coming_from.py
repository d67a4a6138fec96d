"""What docs/coming_from.rst says of other libraries: its code does what theirs does, its table has their defaults."""

import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bnbp

PAGE = Path(__file__).parents[1] / "docs" / "coming_from.rst"
TEXT = PAGE.read_text("utf-8")


def function(name: str) -> Callable[..., Any]:
    """A function that the page defines."""
    blocks = re.findall(r"\.\. code-block:: python\n\n((?:   .*\n|\n)+)", TEXT)
    (code,) = (block for block in blocks if f"def {name}(" in block)
    names: dict[str, Any] = {"bnbp": bnbp}
    exec(compile(textwrap.dedent(code), PAGE.name, "exec"), names)
    found: Callable[..., Any] = names[name]
    return found


def row(library: str) -> list[str]:
    """A library's conventions, without mark-up."""
    table = TEXT.partition("\nConventions\n")[2].partition("They agree")[0]
    (found,) = (each for each in table.split("\n   * - ")[1:] if each.startswith(f"{library}\n"))
    return [" ".join(cell.replace("``", "").replace("**", "").split()) for cell in found.split("\n     -")]


def default(library: str) -> tuple[float, float]:
    """Momentum and epsilon of a library, as the table has them."""
    cells = row(library)
    return float(cells[1].partition("; ")[2]), float(cells[3])


def near(ours: Any, theirs: Any, rtol: float = 1e-4) -> None:
    """Compare sequences of arrays; None where an output was not wanted."""
    assert len(ours) == len(theirs)
    for first, second in zip(ours, theirs, strict=True):
        assert (first is None) == (second is None)
        if first is not None:
            np.testing.assert_allclose(np.asarray(first), np.asarray(second), rtol, rtol)


@pytest.fixture
def arrays() -> Callable[..., tuple[np.ndarray, ...]]:
    """Some tensors and some vectors; four samples make the biased and the unbiased variance differ."""

    def make(shape: tuple[int, ...], axis: int) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng(0)
        x, dy = rng.normal(0.5, 2, (2, *shape)).astype(np.float32)
        vectors = rng.uniform(0.5, 2, (4, shape[axis])).astype(np.float32)
        return x, dy, *vectors

    return make


def test_onnx(arrays: Any) -> None:
    """The formulas of ONNX's page: population variance, and the old average times the momentum."""
    x, _, scale, shift, old_mean, old_variance = arrays((4, 3, 2), 1)
    names = inspect.signature(function("batch_normalization")).parameters
    assert (names["momentum"].default, names["epsilon"].default) == default("ONNX") == (0.9, 1e-5)
    along = (slice(None), None)

    def normalized(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
        return (x - mean[along]) / np.sqrt(variance[along] + 0.5) * scale[along] + shift[along]

    given = x, scale, shift, old_mean, old_variance
    ours = function("batch_normalization")(*given, epsilon=0.5, momentum=0.8, training_mode=1)
    mean, variance = x.mean((0, 2)), x.var((0, 2))
    near(ours, (normalized(mean, variance), 0.8 * old_mean + 0.2 * mean, 0.8 * old_variance + 0.2 * variance))
    near([function("batch_normalization")(*given, epsilon=0.5)], [normalized(old_mean, old_variance)])


@pytest.mark.torch
def test_torch_layer(arrays: Any) -> None:
    import torch

    x, dy, weight, bias, mean, variance = map(torch.from_numpy, arrays((4, 3, 2, 1), 1))
    layer = torch.nn.BatchNorm2d(3)
    assert (layer.momentum, layer.eps) == default("PyTorch")
    layer.load_state_dict(
        {
            **layer.state_dict(),
            **{"weight": weight, "bias": bias, "running_mean": mean, "running_var": variance},
        }
    )
    layer.eps, layer.momentum = 0.5, 0.2
    y, gradients, *averages = function("training_step")(layer, x, dy)
    theirs = layer(x.requires_grad_())
    theirs.backward(dy)
    near([y], [theirs.detach()])
    near(gradients, [x.grad, layer.weight.grad, layer.bias.grad])
    near(averages, [layer.running_mean, layer.running_var])


@pytest.mark.torch
@pytest.mark.parametrize("mask", [[True, True, True], [False, True, False], [True, False, True]])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_torch_gradient_operator(arrays: Any, dtype: str, train: bool, mask: list[bool]) -> None:
    import torch

    x, dy, weight, bias, *running = map(torch.from_numpy, arrays((4, 3, 2, 2), 1))
    type_ = getattr(torch, dtype)
    x, dy = x.to(type_), dy.to(type_)
    if dtype == "float64":
        weight, bias, *running = (each.double() for each in (weight, bias, *running))
    aten = torch.ops.aten
    _, save_mean, save_invstd = aten.native_batch_norm(x, weight, bias, *[r.clone() for r in running], train, 0.1, 0.5)
    if train:
        mean, variance = bnbp.batch_norm_training(x, weight, bias, 0.5)[1:]
        near([save_mean, save_invstd], [mean, 1 / np.sqrt(variance + 0.5)])
    given = (dy, x, weight, *running, save_mean, save_invstd, train, 0.5, mask)
    assert list(inspect.signature(function("native_batch_norm_backward")).parameters) == [
        argument.name for argument in aten.native_batch_norm_backward.default._schema.arguments
    ]
    ours = function("native_batch_norm_backward")(*given)
    theirs = aten.native_batch_norm_backward(*given)
    rtol = 1e-2 if dtype == "bfloat16" else 1e-4
    theirs = [each.float() if wanted else None for each, wanted in zip(theirs, mask, strict=True)]
    near([None if each is None else each.astype(np.float64) for each in ours], theirs, rtol)


@pytest.mark.jax
def test_flax(arrays: Any) -> None:
    import flax.linen
    import flax.nnx

    momentum, epsilon = default("Flax (JAX)")
    for kind in (flax.linen.BatchNorm, flax.nnx.BatchNorm):
        names = inspect.signature(kind.__init__).parameters
        assert (names["momentum"].default, names["epsilon"].default, names["axis"].default) == (momentum, epsilon, -1)
        assert names["use_fast_variance"].default
    x, _, scale, bias, mean, var = arrays((4, 2, 3), -1)
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": {"mean": mean, "var": var}}
    layer = flax.linen.BatchNorm(use_running_average=False, momentum=0.7, epsilon=0.5)
    y, updates = layer.apply(variables, x, mutable=["batch_stats"])
    ours, stats = function("linen_training_step")(variables, x, 0.7, 0.5)
    assert stats.keys() == updates.keys()
    near([ours], [y])
    near([stats["batch_stats"][name] for name in ("mean", "var")], [updates["batch_stats"][n] for n in ("mean", "var")])


@pytest.mark.framework
@pytest.mark.parametrize("training", [True, False])
def test_tensorflow_operator(arrays: Any, training: bool) -> None:
    import tensorflow as tf

    x, dy, scale, offset, mean, variance = arrays((4, 2, 1, 3), -1)
    names = inspect.signature(tf.raw_ops.FusedBatchNormV3).parameters
    expected = names["exponential_avg_factor"].default, names["epsilon"].default
    assert expected == default("TensorFlow")
    options = {"epsilon": 0.5, "is_training": training}
    forward = tf.raw_ops.FusedBatchNormV3(
        x=x, scale=scale, offset=offset, mean=mean, variance=variance, exponential_avg_factor=0.2, **options
    )
    kept = [each.numpy() for each in (forward.reserve_space_1, forward.reserve_space_2)]
    if training:
        m = x.size // 3
        ours = bnbp.batch_norm_training(x, scale, offset, 0.5, channel_axis=-1)
        near([*kept, forward.y], [ours.batch_mean, ours.batch_variance, ours.normalized])
        averages = 0.8 * mean + 0.2 * ours.batch_mean, 0.8 * variance + 0.2 * ours.batch_variance * m / (m - 1)
        near([forward.batch_mean, forward.batch_variance], averages)
    else:
        kept = [mean, variance]  # what the forward operator returns in their place is memory that nobody has set
    gradients = tf.raw_ops.FusedBatchNormGradV3(
        y_backprop=dy, x=x, scale=scale, reserve_space_1=kept[0], reserve_space_2=kept[1], reserve_space_3=[], **options
    )
    near(function("fused_batch_norm_grad")(dy, x, scale, *kept, **options), gradients[:3])


@pytest.mark.framework
def test_keras(arrays: Any) -> None:
    import keras

    x, _, *weights = arrays((4, 2, 1, 3), -1)
    layer = keras.layers.BatchNormalization()
    assert (layer.momentum, layer.epsilon) == default("Keras")
    layer.build(x.shape)
    layer.set_weights(weights)
    layer.momentum, layer.epsilon = 0.7, 0.5
    y, *averages = function("keras_training_step")(layer, x)
    near([y], [layer(x, training=True)])
    near(averages, [layer.moving_mean, layer.moving_variance])
