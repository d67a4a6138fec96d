"""The demo's network: its gradients are right, it learns, and the command shows what it should."""

import re
import subprocess
import sys

import numpy as np
import pytest

import bnbp
from bnbp import reference
from bnbp.cli import network as demo


@pytest.fixture(scope="module")
def digits():
    return demo.load_digits(seed=0)


@pytest.fixture(scope="module")
def batch(digits):
    return digits.images[:6].astype(np.float64), digits.labels[:6]


def test_the_digits_are_real_and_split(digits):
    assert digits.images.shape == (1437, 1, 8, 8)
    assert digits.test_images.shape == (360, 1, 8, 8)
    assert (digits.images.min(), digits.images.max()) == (0, 1)
    assert np.all(np.bincount(digits.labels) > 100)
    assert np.all(np.bincount(digits.test_labels) > 20)
    everything = np.concatenate([digits.images, digits.test_images]).reshape(1797, 64)
    assert len(np.unique(everything, axis=0)) == 1797  # no image is in both parts


@pytest.mark.parametrize("operators", [None, bnbp, reference], ids=["without", "bnbp", "reference"])
def test_gradients_agree_with_finite_differences(batch, operators):
    network = demo.as_type(demo.build_network(operators, seed=1), np.float64)
    rng = np.random.default_rng(2)
    for layer in network.layers:  # away from 1 and 0, where a wrong gamma or bias would not show
        for name, value in layer.parameters.items():
            layer.parameters[name] = value + rng.normal(0, 0.1, value.shape)
    network.loss(*batch)
    gradients = [dict(layer.gradients) for layer in network.layers]
    step = 1e-7  # larger ones cross kinks of ReLU and pooling
    largest = 0.0
    for layer, gradient in zip(network.layers, gradients, strict=True):
        assert gradient.keys() == layer.parameters.keys()
        for name, value in layer.parameters.items():
            direction = rng.normal(size=value.shape)
            layer.parameters[name] = value + step * direction
            above = network.loss(*batch)
            layer.parameters[name] = value - step * direction
            below = network.loss(*batch)
            layer.parameters[name] = value
            slope = np.sum(gradient[name] * direction)
            assert slope == pytest.approx((above - below) / (2 * step), rel=1e-6, abs=1e-7), (layer, name)
            largest = max(largest, abs(slope))
    assert largest > 0.1  # the loss does depend on the parameters


def test_col2im_is_the_transpose_of_im2col():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, 3, 4, 6))
    columns = rng.normal(size=(2, 27, 24))
    assert np.vdot(demo.im2col(x), columns) == pytest.approx(np.vdot(x, demo.col2im(columns, x.shape)), rel=1e-13)


def test_convolution_agrees_with_its_definition():
    rng = np.random.default_rng(4)
    layer = demo.Convolution(2, 3, rng)
    layer.parameters["bias"] = bias = np.float32([1, 2, 3])
    x = rng.normal(size=(2, 2, 4, 5)).astype(np.float32)
    weight = layer.parameters["weight"].reshape(3, 2, 3, 3)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    y = layer.forward(x, training=True)
    for i, j in np.ndindex(4, 5):
        expected = np.tensordot(padded[:, :, i : i + 3, j : j + 3], weight, axes=((1, 2, 3), (1, 2, 3))) + bias
        np.testing.assert_allclose(y[:, :, i, j], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_norm_with_relu_is_the_two_layers(training):
    rng = np.random.default_rng(6)
    x, dy = rng.normal(size=(2, 8, 3, 4, 5)).astype(np.float32)
    fused, apart = demo.BatchNorm(3, bnbp, activation="relu"), demo.BatchNorm(3, bnbp)
    for layer in (fused, apart):
        layer.parameters = {"gamma": np.float32([1, -2, 3]), "beta": np.float32([0, 1, -2])}
        layer.running_mean = np.float32([0.1, 0.2, 0.3])
    relu = demo.Relu()
    y = fused.forward(x, training)
    assert 0.2 < np.mean(y == 0) < 0.8
    np.testing.assert_allclose(y, relu.forward(apart.forward(x, training), training), atol=1e-5)
    if training:
        np.testing.assert_allclose(fused.backward(dy), apart.backward(relu.backward(dy)), atol=1e-5)
        for name, gradient in apart.gradients.items():
            np.testing.assert_allclose(fused.gradients[name], gradient, atol=1e-4)


def test_relu_is_a_part_of_the_batch_norm_where_there_is_one():
    kinds = {
        bool(operators): [type(layer) for layer in demo.build_network(operators, 0).layers]
        for operators in (None, bnbp)
    }
    assert [kind for kind in kinds[True] if kind is demo.Relu] == []
    assert [demo.Relu if kind is demo.BatchNorm else kind for kind in kinds[True]] == kinds[False]
    assert kinds[True].count(demo.BatchNorm) == 4


def test_equal_values_share_the_gradient_of_a_pool():
    layer = demo.MaxPool()
    x = np.array([[5, 1, 0, 2], [1, 0, 2, 1]], np.float32).reshape(1, 1, 2, 4)
    np.testing.assert_array_equal(layer.forward(x, training=True), [[[[5, 2]]]])
    dx = layer.backward(np.float32([[[[3, 4]]]]))
    np.testing.assert_array_equal(dx, [[[[3, 0, 0, 2], [0, 0, 2, 0]]]])


def test_batch_norm_tests_with_running_averages():
    rng = np.random.default_rng(5)
    layer = demo.BatchNorm(3, bnbp)
    x = rng.normal([1, 2, 3], [1, 2, 3], size=(64, 3)).astype(np.float32)
    for _ in range(200):
        layer.forward(x, training=True)
    np.testing.assert_allclose(layer.running_mean, x.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(layer.running_variance, x.var(axis=0), rtol=1e-5)
    one = layer.forward(x[:1], training=False)  # one image alone would have variance 0
    np.testing.assert_allclose(one, layer.forward(x, training=True)[:1], atol=1e-4)


@pytest.mark.parametrize("operators", [None, bnbp], ids=["without", "with"])
def test_an_epoch_of_training_teaches_it_something(digits, operators):
    network = demo.build_network(operators, seed=0)
    assert network.accuracy(digits.test_images, digits.test_labels) < 0.3
    (accuracy,) = demo.train(network, digits, epochs=1, seed=0)
    assert accuracy > 0.6
    arrays = [value for layer in network.layers for value in layer.parameters.values()]
    assert {array.dtype for array in arrays} == {np.dtype(np.float32)}


def test_gradients_are_as_near_the_reference_as_their_type_allows(digits):
    assert 0 < demo.gradient_deviation(bnbp, digits, 0, np.float32) < 1e-5
    assert 0 < demo.gradient_deviation(bnbp, digits, 0, np.float64) < 1e-13
    assert demo.gradient_deviation(reference, digits, 0, np.float64) < 1e-13


def test_the_command_shows_a_table_and_saves_a_plot(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "bnbp", "demo", "--epochs", "2", "--seed", "3", "--plot", "curves.png"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"test accuracy after 2 epochs +\d\d\.\d% +\d\d\.\d%", done.stdout)
    assert re.search(r"of that in bnbp +\d+\.\d%", done.stdout)
    assert re.search(r"gradient deviation in float32 +\d\.\de-0\d", done.stdout)
    assert "plot saved in curves.png" in done.stdout.splitlines()
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("plot", ["no/plot.png", "folder.png"])
def test_the_command_refuses_a_plot_it_could_not_save_before_it_trains(tmp_path, plot):
    (tmp_path / "folder.png").mkdir()
    command = [sys.executable, "-m", "bnbp", "demo", "--plot", plot]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"bnbp: cannot write {plot}: .*\n", done.stderr)
