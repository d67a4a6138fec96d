"""A small convolutional network in NumPy, to see what batch normalisation does for training.

Read it from top to bottom: the layers, each with the formulas of its forward and its backward pass; the loss; the
network; training; and last, what ``bnbp demo`` measures and draws. It needs NumPy and an implementation of the
batch-norm operators, :mod:`bnbp` or :mod:`bnbp.reference`, which is an argument of the :class:`BatchNorm` layer.

Images are arrays of shape (N, C, H, W): N images, C channels, H rows, W columns. ``dy`` is the gradient of the loss
with respect to a layer's output, ``dx`` that with respect to its input.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

import bnbp

Array = NDArray[np.floating[Any]]
Labels = NDArray[np.integer[Any]]
Activation = Literal["relu"] | None
Result = TypeVar("Result")


# The layers


class Operators(Protocol):
    """What the network asks of an implementation of batch normalisation, such as the module bnbp."""

    def batch_norm_training(
        self, input: Array, gamma: Array, beta: Array, epsilon: float, /, *, activation: Activation
    ) -> tuple[Array, Array, Array]:
        """See :func:`bnbp.batch_norm_training`."""

    def batch_norm_training_backprop(
        self,
        input: Array,
        gamma: Array,
        beta: Array,
        mean: Array,
        variance: Array,
        normalized_delta: Array,
        epsilon: float,
        /,
        *,
        activation: Activation,
    ) -> tuple[Array, ...]:
        """See :func:`bnbp.batch_norm_training_backprop`."""

    def batch_norm_inference(
        self,
        input: Array,
        gamma: Array,
        beta: Array,
        mean: Array,
        variance: Array,
        epsilon: float,
        /,
        *,
        activation: Activation,
    ) -> Array:
        """See :func:`bnbp.batch_norm_inference`."""


class Layer:
    """A step of the network: a function, its gradient, and the parameters that training changes."""

    def __init__(self, **parameters: Array) -> None:
        self.parameters = parameters
        self.gradients: dict[str, Array] = {}

    def forward(self, x: Array, training: bool) -> Array:
        """Compute the output ``y``, and keep what the backward pass will need."""
        raise NotImplementedError

    def backward(self, dy: Array) -> Array:
        """Set ``gradients`` and return ``dx``; comes after ``forward`` in training."""
        raise NotImplementedError


class Convolution(Layer):
    """Convolution with 3 x 3 filters and a border of zeros: every filter times every 3 x 3 patch of the image."""

    def __init__(self, channels: int, filters: int, rng: np.random.Generator) -> None:
        super().__init__(weight=he_normal(filters, channels * 9, rng), bias=np.zeros(filters, np.float32))

    def forward(self, x: Array, training: bool) -> Array:
        """``y = weight patches + bias``."""
        n, _, h, w = self.shape = x.shape
        self.patches = im2col(x)
        y: Array = self.parameters["weight"] @ self.patches + self.parameters["bias"][:, np.newaxis]
        return y.reshape(n, -1, h, w)

    def backward(self, dy: Array) -> Array:
        """``dweight = dy patches^T``, ``dbias = sum(dy)``, ``dx = col2im(weight^T dy)``."""
        dy = dy.reshape(*dy.shape[:2], -1)
        self.gradients["weight"] = np.sum(dy @ self.patches.transpose(0, 2, 1), axis=0)
        self.gradients["bias"] = np.sum(dy, axis=(0, 2))
        return col2im(self.parameters["weight"].T @ dy, self.shape)


class BatchNorm(Layer):
    """Batch normalisation of each channel: with the batch's own statistics in training, running averages after it.

    A ReLU may be a part of it. The backward pass needs nothing more for that: the operator finds out where the output
    was 0 from what the forward pass has kept.
    """

    epsilon = 1e-5
    decay = 0.9  # of the running averages, at each batch

    def __init__(self, channels: int, operators: Operators, activation: Activation = None) -> None:
        super().__init__(gamma=np.ones(channels, np.float32), beta=np.zeros(channels, np.float32))
        self.operators, self.activation = operators, activation
        self.running_mean: Array = np.zeros(channels, np.float32)
        self.running_variance: Array = np.ones(channels, np.float32)

    def forward(self, x: Array, training: bool) -> Array:
        """``y = gamma (x - mean) / sqrt(variance + epsilon) + beta``; with a ReLU the positive part of that."""
        gamma, beta = self.parameters["gamma"], self.parameters["beta"]
        if not training:
            return self.operators.batch_norm_inference(
                x, gamma, beta, self.running_mean, self.running_variance, self.epsilon, activation=self.activation
            )
        self.x = x
        y, self.mean, self.variance = self.operators.batch_norm_training(
            x, gamma, beta, self.epsilon, activation=self.activation
        )
        self.running_mean = self.decay * self.running_mean + (1 - self.decay) * self.mean
        self.running_variance = self.decay * self.running_variance + (1 - self.decay) * self.variance
        return y

    def backward(self, dy: Array) -> Array:
        """All three gradients come from one operator, the subject of this package."""
        gamma, beta = self.parameters["gamma"], self.parameters["beta"]
        dx, self.gradients["gamma"], self.gradients["beta"] = self.operators.batch_norm_training_backprop(
            self.x, gamma, beta, self.mean, self.variance, dy, self.epsilon, activation=self.activation
        )
        return dx


class Relu(Layer):
    """The positive part: ``y = max(x, 0)``."""

    def forward(self, x: Array, training: bool) -> Array:
        """``y = x`` where ``x`` is positive, else 0."""
        self.positive = x > 0
        return x * self.positive

    def backward(self, dy: Array) -> Array:
        """``dx = dy`` where ``x`` was positive, else 0."""
        return dy * self.positive


class MaxPool(Layer):
    """The largest value of each 2 x 2 tile: half the height, half the width."""

    def forward(self, x: Array, training: bool) -> Array:
        """``y = max(tile)``."""
        n, c, h, w = x.shape
        tiles = x.reshape(n, c, h // 2, 2, w // 2, 2)
        y: Array = tiles.max(axis=(3, 5), keepdims=True)
        is_largest = tiles == y
        self.share = is_largest / is_largest.sum(axis=(3, 5), keepdims=True, dtype=x.dtype)
        return y.reshape(n, c, h // 2, w // 2)

    def backward(self, dy: Array) -> Array:
        """The gradient goes to the largest value; equal ones share it."""
        n, c, h, w = dy.shape
        dx: Array = self.share * dy.reshape(n, c, h, 1, w, 1)
        return dx.reshape(n, c, 2 * h, 2 * w)


class Dense(Layer):
    """All inputs to all outputs: a matrix product and a bias."""

    def __init__(self, inputs: int, outputs: int, rng: np.random.Generator) -> None:
        super().__init__(weight=he_normal(outputs, inputs, rng), bias=np.zeros(outputs, np.float32))

    def forward(self, x: Array, training: bool) -> Array:
        """``y = x weight^T + bias``, with each image flattened to a row."""
        self.shape = x.shape
        self.rows = x.reshape(len(x), -1)
        y: Array = self.rows @ self.parameters["weight"].T + self.parameters["bias"]
        return y

    def backward(self, dy: Array) -> Array:
        """``dweight = dy^T x``, ``dbias = sum(dy)``, ``dx = dy weight``."""
        self.gradients["weight"] = dy.T @ self.rows
        self.gradients["bias"] = dy.sum(axis=0)
        dx: Array = dy @ self.parameters["weight"]
        return dx.reshape(self.shape)


def he_normal(outputs: int, inputs: int, rng: np.random.Generator) -> Array:
    """Random weights of variance ``2 / inputs``, which keeps the signal's scale through a ReLU (He et al., 2015)."""
    return rng.normal(0, np.sqrt(2 / inputs), (outputs, inputs)).astype(np.float32)


def im2col(x: Array) -> Array:
    """The 3 x 3 patch round every pixel, as a column: (N, C, H, W) -> (N, 9 C, H W)."""
    n, c, h, w = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))  # (N, C, H, W, 3, 3)
    return patches.transpose(0, 1, 4, 5, 2, 3).reshape(n, 9 * c, h * w)


def col2im(columns: Array, shape: tuple[int, ...]) -> Array:
    """The transpose of :func:`im2col`: every pixel gets the sum of its copies."""
    n, c, h, w = shape
    patches = columns.reshape(n, c, 3, 3, h, w)
    padded = np.zeros((n, c, h + 2, w + 2), columns.dtype)
    for i in range(3):
        for j in range(3):
            padded[:, :, i : i + h, j : j + w] += patches[:, :, i, j]
    return padded[:, :, 1:-1, 1:-1]


def softmax_cross_entropy(logits: Array, labels: Labels) -> tuple[float, Array]:
    """Mean of ``-log(softmax(logits)[label])`` over the images, and its gradient, ``(softmax - one_hot) / N``."""
    image = np.arange(len(labels))
    shifted = logits - logits.max(axis=1, keepdims=True)  # softmax does not change; exp cannot overflow
    log_softmax = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    delta = np.exp(log_softmax)
    delta[image, labels] -= 1
    return -float(log_softmax[image, labels].mean()), delta / len(labels)


# The network and its training


class Network:
    """Layers, one after the other."""

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers

    def forward(self, x: Array, training: bool) -> Array:
        """From images to one number for each image and digit."""
        for layer in self.layers:
            x = layer.forward(x, training)
        return x

    def backward(self, dy: Array) -> None:
        """Set the gradients of every layer: the chain rule, from the last layer to the first."""
        for layer in reversed(self.layers):
            dy = layer.backward(dy)

    def loss(self, images: Array, labels: Labels) -> float:
        """Loss of a training batch; sets the gradients of every layer."""
        loss, delta = softmax_cross_entropy(self.forward(images, training=True), labels)
        self.backward(delta)
        return loss

    def accuracy(self, images: Array, labels: Labels) -> float:
        """Share of the images whose largest output is that of their label."""
        return float(np.mean(self.forward(images, training=False).argmax(axis=1) == labels))


def build_network(operators: Operators | None, seed: int) -> Network:
    """Four convolutions on 8 x 8 images; batch norm before the ReLU of each if there are operators for it."""
    rng = np.random.default_rng(seed)

    def block(channels: int, filters: int) -> list[Layer]:
        relu = BatchNorm(filters, operators, activation="relu") if operators else Relu()
        return [Convolution(channels, filters, rng), relu]

    first = [*block(1, 16), *block(16, 16), MaxPool()]  # 16 channels of 4 x 4
    second = [*block(16, 32), *block(32, 32), MaxPool()]  # 32 channels of 2 x 2
    return Network([*first, *second, Dense(32 * 2 * 2, 10, rng)])


class MomentumDescent:
    """Stochastic gradient descent with momentum."""

    def __init__(self, network: Network, learning_rate: float, momentum: float) -> None:
        self.network, self.learning_rate, self.momentum = network, learning_rate, momentum
        self.velocities = [
            {name: np.zeros_like(value) for name, value in layer.parameters.items()} for layer in network.layers
        ]

    def step(self) -> None:
        """``velocity = momentum velocity - learning_rate gradient; parameter += velocity``."""
        for layer, velocity in zip(self.network.layers, self.velocities, strict=True):
            for name, gradient in layer.gradients.items():
                velocity[name] = self.momentum * velocity[name] - self.learning_rate * gradient
                layer.parameters[name] = layer.parameters[name] + velocity[name]


@dataclass(frozen=True)
class Digits:
    """Images, (N, 1, 8, 8) in [0, 1], and labels: a part to train with and a part to test with."""

    images: Array
    labels: Labels
    test_images: Array
    test_labels: Labels


LEARNING_RATE = 0.05  # high for this network without batch norm, and yet one with which it still learns
MOMENTUM = 0.9
BATCH = 64


def train(network: Network, digits: Digits, epochs: int, seed: int) -> Iterator[float]:
    """Train the network, and yield its test accuracy after each epoch."""
    rng = np.random.default_rng(seed)
    descent = MomentumDescent(network, LEARNING_RATE, MOMENTUM)
    for _ in range(epochs):
        order = rng.permutation(len(digits.images))
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            network.loss(digits.images[batch], digits.labels[batch])
            descent.step()
        yield network.accuracy(digits.test_images, digits.test_labels)


# What `bnbp demo` measures and draws


class TimedOperators:
    """The operators of :mod:`bnbp`, with a number of threads, and the seconds that their calls have taken."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self.seconds = 0.0

    def batch_norm_training(self, *arguments: Any, activation: Activation) -> tuple[Array, Array, Array]:
        """See :func:`bnbp.batch_norm_training`."""
        return self._timed(bnbp.batch_norm_training, arguments, activation)

    def batch_norm_training_backprop(self, *arguments: Any, activation: Activation) -> tuple[Array, ...]:
        """See :func:`bnbp.batch_norm_training_backprop`."""
        return self._timed(bnbp.batch_norm_training_backprop, arguments, activation)

    def batch_norm_inference(self, *arguments: Any, activation: Activation) -> Array:
        """See :func:`bnbp.batch_norm_inference`."""
        return self._timed(bnbp.batch_norm_inference, arguments, activation)

    def _timed(self, operator: Callable[..., Result], arguments: tuple[Any, ...], activation: Activation) -> Result:
        start = time.perf_counter()
        result = operator(*arguments, activation=activation, num_threads=self.num_threads)
        self.seconds += time.perf_counter() - start
        return result


def load_digits(seed: int) -> Digits:
    """The handwritten digits of scikit-learn: 1,437 images to train with and 360 to test with."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images[:, np.newaxis] / 16).astype(np.float32)
    test, training = np.split(np.random.default_rng(seed).permutation(len(images)), [360])
    return Digits(images[training], bunch.target[training], images[test], bunch.target[test])


def as_type(network: Network, dtype: type[np.floating[Any]]) -> Network:
    """Convert the parameters, and with them everything that the network computes."""
    for layer in network.layers:
        layer.parameters = {name: value.astype(dtype) for name, value in layer.parameters.items()}
    return network


def gradient_deviation(operators: Operators, digits: Digits, seed: int, dtype: type[np.floating[Any]]) -> float:
    """How far the network's gradients are from those of the same network with :mod:`bnbp.reference` in float64.

    In each layer the largest absolute deviation is divided by the largest gradient of that layer; the result is the
    largest such quotient. By layer and not by array, because the bias of a convolution that a batch norm follows has
    the gradient 0, up to rounding. On the first training batch of an untrained network, because a trained one has
    gradients near 0, which the rounding of the softmax dominates.
    """
    images, labels = digits.images[:BATCH], digits.labels[:BATCH]
    network = as_type(build_network(operators, seed), dtype)
    network.loss(images.astype(dtype), labels)
    exact = as_type(build_network(bnbp.reference, seed), np.float64)
    exact.loss(images.astype(np.float64), labels)

    def flat(layer: Layer) -> Array:
        return np.concatenate([gradient.ravel() for gradient in layer.gradients.values()])

    pairs = [(flat(a), flat(b)) for a, b in zip(network.layers, exact.layers, strict=True) if a.gradients]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def draw_learning_curves(file: BinaryIO, file_format: str, curves: dict[str, list[float]]) -> None:
    """Draw the test accuracy after each epoch, a line for each network."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for (name, accuracies), colour, marker in zip(curves.items(), ("tab:orange", "tab:blue"), "so", strict=True):
        axes.plot(range(1, len(accuracies) + 1), accuracies, color=colour, marker=marker, markersize=4, label=name)
    axes.set_title("Handwritten digits: learning with and without batch norm", loc="left")
    axes.set_xlabel("epoch")
    axes.set_ylabel("test accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(file, format=file_format, dpi=150)
