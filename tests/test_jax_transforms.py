"""What JAX does with the operators: differentiates, compiles, maps, checkpoints, scans, places and donates them."""

import itertools
import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_batch

import bnbp
import bnbp.jax
from bnbp.jax import _formulas
from bnbp.jax._calls import Options

pytestmark = pytest.mark.jax

SHAPE, AXIS, EPSILON = (6, 4, 5), 1, 1e-3


@pytest.fixture(autouse=True)
def _x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def batch():
    return [jnp.asarray(each) for each in make_batch(SHAPE, AXIS)]


def plain(x, gamma, beta, mean=None, variance=None, addend=None, activation=None):
    """The forward operators, as anybody would write them."""
    along = (1, -1, 1)
    if mean is None:
        mean, variance = x.mean((0, 2)), x.var((0, 2))
    y = (x - mean.reshape(along)) / jnp.sqrt(variance.reshape(along) + EPSILON)
    y = y * gamma.reshape(along) + beta.reshape(along) + (0 if addend is None else addend)
    return {None: lambda y: y, "relu": jax.nn.relu, "relu6": jax.nn.relu6}[activation](y), mean, variance


def loss_of(forward, delta, weights=(0.0, 0.0)):
    """A loss that depends on all three results, and not linearly."""

    def loss(*operands):
        y, mean, variance = forward(*operands)
        return (delta * jnp.sin(y)).sum() + weights[0] * (mean**2).sum() + weights[1] * (variance**2).sum()

    return loss


def training(x, gamma, beta, addend=None, activation=None):
    return bnbp.jax.batch_norm_training(x, gamma, beta, EPSILON, activation=activation, addend=addend)


def inference(x, gamma, beta, mean, variance, addend=None, activation=None):
    options = {"activation": activation, "addend": addend}
    return bnbp.jax.batch_norm_inference(x, gamma, beta, mean, variance, EPSILON, **options), mean, variance


def assert_close(ours, expected, tolerance=1e-11):
    assert any(np.abs(each).max() > 1e-3 for each in jax.tree.leaves(expected))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), ours, expected)


ACTIVATIONS = pytest.mark.parametrize("activation", [None, "relu", "relu6"])


@ACTIVATIONS
@pytest.mark.parametrize(("added", "weights"), [*itertools.product([False, True], [(0.0, 0.0), (0.7, 0.3)])])
def test_gradient_of_training(batch, activation, added, weights):
    x, gamma, beta, *_, delta = batch
    operands = (x, gamma, beta + 3, *([x[::-1]] if added else []))

    def theirs(x, gamma, beta, addend=None):
        return plain(x, gamma, beta, None, None, addend, activation)

    arguments = tuple(range(len(operands)))
    ours = jax.value_and_grad(loss_of(partial(training, activation=activation), delta, weights), arguments)
    expected = jax.value_and_grad(loss_of(theirs, delta, weights), arguments)
    assert_close(ours(*operands), expected(*operands))
    assert_close(jax.jit(ours)(*operands), expected(*operands))
    assert_close(jax.jit(jax.checkpoint(ours))(*operands), expected(*operands))


@ACTIVATIONS
@pytest.mark.parametrize("added", [False, True])
def test_gradient_of_inference(batch, activation, added):
    x, gamma, beta, mean, variance, delta = batch
    operands = (x, gamma, beta + 3, mean, variance, *([x[::-1]] if added else []))
    arguments = tuple(range(len(operands)))
    ours = jax.grad(loss_of(partial(inference, activation=activation), delta), arguments)
    expected = jax.grad(loss_of(partial(plain, activation=activation), delta), arguments)
    assert_close(jax.jit(ours)(*operands), expected(*operands))


@ACTIVATIONS
def test_second_derivatives(batch, activation):
    x, gamma, beta, mean, variance, delta = batch
    for ours, given in ((training, (x, gamma, beta)), (inference, (x, gamma, beta, mean, variance))):
        arguments = tuple(range(len(given)))

        def twice(forward, arguments=arguments):
            gradients = jax.grad(loss_of(partial(forward, activation=activation), delta, (0.2, 0.1)), arguments)

            def of_gradient(*tensors):
                return sum((jnp.cos(each) ** 2).sum() for each in gradients(*tensors))

            return jax.jit(jax.grad(of_gradient, arguments))

        def theirs(x, gamma, beta, mean=None, variance=None, activation=None):
            return plain(x, gamma, beta, mean, variance, activation=activation)

        assert_close(twice(ours)(*given), twice(theirs)(*given), 1e-9)


def test_gradient_functions_are_differentiable(batch):
    """Those who write their backward pass themselves may differentiate it."""
    x = batch[0]
    for name in ("training_backprop", "inference_backprop"):
        options = {"activation": "relu", "normalized": x, "addend": True}
        formula = getattr(_formulas, name)

        def ours(*operands, name=name, options=options):
            return getattr(bnbp.jax, f"batch_norm_{name}")(*operands, EPSILON, **options)

        def theirs(*operands, formula=formula):
            return formula(Options(EPSILON, 1, "relu", True), *operands, x)

        def summed(function):
            return jax.grad(lambda *operands: sum(jnp.sin(each).sum() for each in function(*operands)), range(6))

        assert_close(summed(ours)(*batch), summed(theirs)(*batch))


def test_forward_mode_is_a_clear_error(batch):
    x, gamma, beta, *_ = batch
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: training(x, gamma, beta)[0], (x,), (x,))


def test_vmap(batch):
    x, gamma, beta, *_, delta = batch
    many = jnp.stack([x, 2 * x + 1, x[::-1]])

    def gradients(x, gamma):
        return jax.grad(lambda x, gamma: (training(x, gamma, beta, activation="relu")[0] * delta).sum(), (0, 1))(
            x, gamma
        )

    expected = [gradients(each, gamma) for each in many]
    mapped = jax.jit(jax.vmap(gradients, (0, None)))(many, gamma)
    inner = jax.vmap(gradients, (1, None))(jnp.moveaxis(many, 0, 1), gamma)
    for k, (input_delta, gamma_delta) in enumerate(expected):
        for each in (mapped, inner):
            np.testing.assert_array_equal(each[0][k], input_delta)
            np.testing.assert_array_equal(each[1][k], gamma_delta)


def test_scan(batch):
    x, gamma, beta, *_ = batch
    gammas = jnp.stack([gamma, gamma + 1, gamma - 1])

    def scanned(x, gammas):
        return jax.lax.scan(lambda x, gamma: (training(x, gamma, beta, activation="relu")[0] + x, None), x, gammas)[0]

    def looped(x, gammas):
        for gamma in gammas:
            x = plain(x, gamma, beta, activation="relu")[0] + x
        return x

    def gradient(function):
        return jax.jit(jax.grad(lambda *operands: jnp.sin(function(*operands)).sum(), (0, 1)))(x, gammas)

    assert_close(gradient(scanned), gradient(looped), 1e-9)


def test_options_are_constants_of_their_own_program(batch):
    x = batch[0]
    jitted = jax.jit(lambda x, axis, epsilon: bnbp.jax.batch_norm_training(x, None, None, epsilon, channel_axis=axis),
                     static_argnums=(1, 2))  # fmt: skip
    for axis, epsilon in itertools.product((0, 1, -1), (1e-5, 0.5)):
        expected = bnbp.batch_norm_training(np.asarray(x), None, None, epsilon, channel_axis=axis)
        for each in (jitted(x, axis, epsilon), bnbp.jax.batch_norm_training(x, None, None, epsilon, channel_axis=axis)):
            np.testing.assert_array_equal(each.normalized, expected.normalized)


# ---------------------------------------------------------------- the compiled program


def program(function, *operands, **options):
    return jax.jit(function, **options).lower(*operands).compile().as_text()


def test_program_is_one_call_and_no_copies(batch):
    x, gamma, beta, mean, variance, delta = batch
    for text in (
        program(training, x, gamma, beta),
        program(bnbp.jax.batch_norm_training_backprop, x, gamma, beta, mean, variance, delta),
        program(bnbp.jax.batch_norm_inference, x, gamma, beta, mean, variance),
    ):
        assert text.count(" custom-call(") == 1
        assert " copy(" not in text
        assert "transpose(" not in text


@pytest.mark.parametrize(("name", "donated"), [("training_backprop", 5), ("training_backprop", 0), ("inference", 0)])
def test_donated_memory_is_reused(batch, name, donated):
    operands = batch[:5] if name == "inference" else batch
    function = getattr(bnbp.jax, f"batch_norm_{name}")
    expected = jax.tree.leaves(function(*operands))
    address = operands[donated].unsafe_buffer_pointer()
    results = jax.tree.leaves(jax.jit(function, donate_argnums=donated)(*operands))
    assert operands[donated].is_deleted()
    assert results[0].unsafe_buffer_pointer() == address
    for ours, value in zip(results, expected, strict=True):
        np.testing.assert_array_equal(ours, value)


def test_donated_memory_that_is_read_later_is_kept(batch):
    """A donated argument that the rest of the program still needs."""
    x, gamma, beta, *_ = batch

    def both(x):
        return training(x, gamma, beta)[0], x.sum(), training(2 * x, gamma, beta)[0], jnp.sin(x)

    expected = jax.jit(both)(x)
    for ours, value in zip(jax.jit(both, donate_argnums=0)(x + 0), expected, strict=True):
        np.testing.assert_array_equal(ours, value)


def test_gradient_of_addition_is_not_copied(batch):
    """Without an activation the addend's gradient is what has arrived."""
    x, gamma, beta, *_, delta = batch

    def backward(x, gamma, beta, addend, delta):
        return jax.vjp(lambda *operands: training(*operands)[0], x, gamma, beta, addend)[1](delta)

    call = next(line for line in program(backward, x, gamma, beta, x, delta).splitlines() if "_backprop" in line)
    assert call.partition(" custom-call(")[0].count("f64[6,4,5]") == 1


def test_without_the_loss_depending_on_statistics_no_pass_is_added(batch):
    x, gamma, beta, *_, delta = batch
    text = program(jax.grad(lambda x: (training(x, gamma, beta)[0] * delta).sum()), x)
    assert " reduce(" not in text


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_other_platforms_run_the_formula(batch, platform):
    x, gamma, beta, *_, delta = [each.astype(jnp.float32) for each in batch]
    gradient = jax.jit(jax.grad(lambda x: (training(x, gamma, beta, activation="relu")[0] * delta).sum()))
    text = gradient.trace(x).lower(lowering_platforms=(platform,)).as_text()
    assert "bnbp" not in text.replace("jit_bnbp", "")
    assert "custom_call" not in text
    assert "bnbp." in gradient.trace(x).lower(lowering_platforms=("cpu",)).as_text()


@ACTIVATIONS
def test_formula_computes_the_same(batch, activation):
    """What other platforms run, run here."""
    x, gamma, beta, mean, variance, delta = batch
    options = Options(EPSILON, 1, activation, True)
    assert_close(
        list(_formulas.training(options, x, gamma, beta, x[::-1])),
        list(bnbp.jax.batch_norm_training(x, gamma, beta, EPSILON, activation=activation, addend=x[::-1])),
    )
    operands = x, gamma, beta, mean, variance, delta
    for name in ("training_backprop", "inference_backprop"):
        theirs = list(getattr(_formulas, name)(options, *operands, x))
        theirs[3] = delta if theirs[3] is None else theirs[3]
        ours = getattr(bnbp.jax, f"batch_norm_{name}")
        ours = ours(*operands, EPSILON, activation=activation, normalized=x, addend=True)
        assert_close(theirs, list(ours))


# ---------------------------------------------------------------- threads


def test_python_runs_during_a_call():
    """A thread of Python's goes on while a handler computes; were the GIL held, it would stand still."""
    x = jnp.ones((64, 64, 64, 32))
    forward = jax.jit(lambda x: bnbp.jax.batch_norm_training(x).normalized)
    forward(x).block_until_ready()
    counted, done = [0], threading.Event()

    def count():
        while not done.is_set():
            counted[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    before = counted[0]
    forward(x).block_until_ready()
    after = counted[0]
    done.set()
    thread.join()
    assert after > before


def test_many_threads_at_once(batch):
    function = jax.jit(bnbp.jax.batch_norm_training_backprop)
    expected = bnbp.batch_norm_training_backprop(*map(np.asarray, batch))
    wrong = []

    def work():
        for _ in range(50):
            for ours, value in zip(function(*batch), expected, strict=True):
                if not np.array_equal(ours, value):
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
