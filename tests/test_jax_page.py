"""What docs/jax.rst shows: its code runs, and the modules for Flax do what Flax's own do."""

import re
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.jax

flax = pytest.importorskip("flax")

PAGE = Path(__file__).parents[1] / "docs" / "jax.rst"


@pytest.fixture(scope="module")
def page():
    """The names that the page's code defines."""
    names = {"__name__": "page"}
    blocks = re.findall(r"\.\. code-block:: python\n\n((?:   .*\n|\n)+)", PAGE.read_text())
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(textwrap.dedent(block), PAGE.name, "exec"), names)
    return names


@pytest.fixture
def x():
    return 3 + 2 * jax.random.normal(jax.random.key(0), (8, 5, 5, 4))


def assert_close(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), ours, theirs)


def test_example_is_the_gradient_of_the_formula(page):
    def loss(x, gamma, beta, target):
        mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
        y = (x - mean) / jnp.sqrt(variance + 1e-5) * gamma.reshape(-1, 1, 1) + beta.reshape(-1, 1, 1)
        return jnp.mean((jax.nn.relu(y) - target) ** 2)

    expected = jax.grad(loss, (0, 1, 2))(page["x"], jnp.ones(3), jnp.zeros(3), page["target"])
    assert_close(page["gradients"], expected)


def test_linen_module(page, x):
    linen = page["nn"]

    def train(module, relu):
        variables = module.init(jax.random.key(1), x, use_running_average=False)

        def loss(params):
            y, updates = module.apply(
                {**variables, "params": params}, x, use_running_average=False, mutable=["batch_stats"]
            )
            return (relu(y) * jnp.sin(x)).sum(), (relu(y), updates)

        (_, (y, updates)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
        later = relu(module.apply({**variables, **updates}, x, use_running_average=True))
        return y, updates, gradients, later

    assert_close(train(page["BatchNorm"](activation="relu"), lambda y: y), train(linen.BatchNorm(), jax.nn.relu))


def test_nnx_module(page, x):
    nnx = page["nnx"]

    def train(module, **options):
        @nnx.jit
        def step(module):
            def loss(module):
                y = module(x, **options)
                y = y if options else jax.nn.relu(y)
                return (y * jnp.sin(x)).sum(), y

            return nnx.value_and_grad(loss, has_aux=True)(module)

        (_, y), gradients = step(module)
        later = module(x, use_running_average=True, **options)
        leaves = [gradients["scale"][...], gradients["bias"][...], module.mean[...], module.var[...]]
        return y, leaves, later if options else jax.nn.relu(later)

    ours, theirs = (kind(4, rngs=nnx.Rngs(0)) for kind in (page["NnxBatchNorm"], nnx.BatchNorm))
    assert_close(train(ours, activation="relu"), train(theirs))
