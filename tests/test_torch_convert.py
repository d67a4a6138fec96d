"""`convert`: which batch norms are replaced, what is fused with them, and that a model computes what it did before."""

import collections
import copy
import io
import pickle
import random

import numpy as np
import pytest

pytestmark = pytest.mark.torch

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import bnbp.torch  # noqa: E402
from bnbp.cli.training import networks  # noqa: E402
from bnbp.torch import _modules  # noqa: E402
from bnbp.torch._convert import convert  # noqa: E402


@pytest.fixture(autouse=True)
def _double():
    """Everything in float64, so that a difference is a mistake."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def calls(monkeypatch):
    """What each call of a batch norm of bnbp has in it: "bn", "bn relu", "bn add relu" ..."""
    made = []
    batch_norm = _modules.batch_norm

    def spy(*args, activation=None, addend=None, **kwargs):
        parts = ["bn", "add" if addend is not None else "", activation or ""]
        made.append(" ".join(filter(None, parts)))
        return batch_norm(*args, activation=activation, addend=addend, **kwargs)

    monkeypatch.setattr(_modules, "batch_norm", spy)
    return made


def run(model, *inputs):
    """What a model gives: outputs, gradients and buffers. What it does to its arguments is seen too."""
    inputs = [each.detach().clone().requires_grad_() for each in inputs]
    model.zero_grad()
    arguments = [each * 1 for each in inputs]  # which may be changed in place
    output = model(*arguments)
    weights = torch.linspace(-1, 2, output.numel()).reshape(output.shape)
    if output.requires_grad:
        (output * weights).sum().backward()
    named = {"output": output.detach(), **dict(model.named_buffers())}
    named |= {f"argument {k}": each.detach() for k, each in enumerate(arguments)}
    named |= {f"gradient {k}": each.grad for k, each in enumerate(inputs)}
    named |= {f"gradient {name}": each.grad for name, each in model.named_parameters()}
    return {name: None if each is None else each.clone() for name, each in named.items()}


def assert_same(model, original, *inputs, modes=(True, False)):
    for mode in modes:
        got, expected = run(model.train(mode), *inputs), run(original.train(mode), *inputs)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            if value is None:
                assert got[name] is None, name
            else:
                torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-10, msg=lambda text, at=name: at + text)


def converted(model, *inputs, modes=(True, False)):
    """The model, converted; and an untouched copy with which it agrees."""
    original = copy.deepcopy(model)
    assert convert(model) is model
    assert_same(model, original, *inputs, modes=modes)
    return model, original


class Base(nn.Module):
    """What the small models of this file are made of."""

    class_flag = True

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)
        self.bn2 = nn.BatchNorm2d(3)
        self.relu = nn.ReLU()
        self.relu_in_place = nn.ReLU(inplace=True)
        self.relu6 = nn.ReLU6()
        self.relu6_in_place = nn.ReLU6(inplace=True)
        self.flag = True
        self.config = {"flag": True}
        self.history = []
        for norm in (self.bn, self.bn2):
            nn.init.uniform_(norm.weight, 1, 3)
            nn.init.uniform_(norm.bias, 1, 3)


def block(forward):
    return type("Block", (Base,), {"forward": forward})()


def images(count=1):
    return torch.randn(count, 4, 3, 5, 5).unbind()


# ---------------------------------------------------------------- networks

NETWORKS = {
    # stem, two ReLUs and one addition in each of 3 blocks; the two downsamplings are added, and nothing follows
    "resnet": (lambda: networks.resnet50((2, 1), 4, 5), (2, 3, 64, 64), {"bn relu": 7, "bn add relu": 3, "bn": 2}),
    # stem, and two in each of 2 blocks
    "mobilenet_v1": (lambda: networks.mobilenet_v1(((2, 1), (4, 2)), 4, 5), (2, 3, 16, 16), {"bn relu": 5}),
    # stem, 1 + 2 * 2 in 3 blocks, and the last; a projection in each block has no activation
    "mobilenet_v2": (
        lambda: networks.mobilenet_v2(((1, 4, 1, 1), (2, 4, 2, 2)), 4, 8, 5),
        (2, 3, 32, 32),
        {"bn relu6": 7, "bn": 3},
    ),
    # stem, two in each of 4 layers, and a transition; the ReLU after the last is not in the same module
    "densenet": (lambda: networks.densenet121((2, 2), 4, 5), (2, 3, 64, 64), {"bn relu": 10, "bn": 1}),
    # stem, 2 + 3 * 2 in 3 blocks, and the last: all of them before SiLU or nothing
    "efficientnet": (
        lambda: networks.efficientnet(((1, 4, 1, 1, 3), (2, 4, 2, 1, 3)), 4, 8, 5),
        (2, 3, 16, 16),
        {"bn": 10},
    ),
    # two in each of 3 blocks on the way down and 2 on the way up
    "unet": (lambda: networks.unet(4, 2), (2, 3, 16, 16), {"bn relu": 10}),
    "generator": (lambda: networks.gan(5, 2)[0], (3, 5, 1, 1), {"bn relu": 4}),
    "discriminator": (lambda: networks.gan(5, 2)[1], (3, 3, 64, 64), {"bn": 3}),
    "mlp": (lambda: networks.mlp(8), (9, 8), {"bn relu": 4}),
    "small_convnet": (lambda: networks.small_convnet(4), (2, 3, 32, 32), {"bn relu": 3}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_computes_the_same_with_what_its_architecture_lets_fuse(name, calls):
    build, shape, expected = NETWORKS[name]
    model, _ = converted(build(), torch.randn(shape))
    assert collections.Counter(calls) == {kind: 2 * count for kind, count in expected.items()}  # in two modes
    assert not any(type(each).__module__.startswith("torch.nn.modules.batchnorm") for each in model.modules())


# ---------------------------------------------------------------- what is fused

RELUS = {
    "nn.ReLU": lambda self, x: self.relu(x),
    "nn.ReLU(inplace=True)": lambda self, x: self.relu_in_place(x),
    "F.relu": lambda self, x: F.relu(x),
    "F.relu(inplace=True)": lambda self, x: F.relu(x, inplace=True),
    "F.relu(input=)": lambda self, x: F.relu(input=x),
    "F.relu_": lambda self, x: F.relu_(x),
    "torch.relu": lambda self, x: torch.relu(x),
    "torch.relu_": lambda self, x: torch.relu_(x),
    ".relu()": lambda self, x: x.relu(),
    ".relu_()": lambda self, x: x.relu_(),
    "nn.ReLU6": lambda self, x: self.relu6(x),
    "nn.ReLU6(inplace=True)": lambda self, x: self.relu6_in_place(x),
    "F.relu6": lambda self, x: F.relu6(x),
    "F.relu6(inplace=True)": lambda self, x: F.relu6(x, True),
}


def plus_assigned(x, y):
    x += y
    return x


ADDITIONS = {
    "+": lambda x, y: x + y,
    "+ in the other order": lambda x, y: y + x,
    "+=": plus_assigned,
    "torch.add": lambda x, y: torch.add(x, y),
    "torch.add in the other order": lambda x, y: torch.add(y, x),
    "torch.add(other=)": lambda x, y: torch.add(input=x, other=y, alpha=1),
    ".add()": lambda x, y: x.add(y),
    ".add() in the other order": lambda x, y: y.add(x),
    ".add_()": lambda x, y: x.add_(y),
}


@pytest.mark.parametrize("relu", RELUS)
def test_a_relu_is_fused_in_every_form(relu, calls):
    activate = RELUS[relu]
    converted(block(lambda self, x: activate(self, self.bn(x)) * 2), *images())
    assert set(calls) == {"bn relu6" if "6" in relu else "bn relu"}


@pytest.mark.parametrize("relu", RELUS)
@pytest.mark.parametrize("addition", ADDITIONS)
def test_an_addition_is_fused_in_every_form(addition, relu, calls):
    add, activate = ADDITIONS[addition], RELUS[relu]
    converted(block(lambda self, x, y: activate(self, add(self.bn(x), y)) * 2), *images(2))
    assert set(calls) == {"bn add relu6" if "6" in relu else "bn add relu"}


def both_norms(self, x):
    out = self.bn(self.conv(x))
    identity = self.bn2(x)
    out += identity
    return self.relu(out)


def two_norms_of_the_same_input(self, x):
    return F.relu(self.bn(x) + self.bn2(x))


def parameter_added(self, x):
    return F.relu(self.conv.bias.reshape(3, 1, 1) + self.bn(x))


def number_of_a_shape_added(self, x):
    return F.relu(self.bn(x) + x.size(0))


def broadcast_added(self, x):
    return F.relu(self.bn(x).add_(x.mean(0, keepdim=True)))


def loop(self, x):
    for layer in (self.bn, self.relu):
        x = layer(x)
    return x


def helper(self, x):
    return F.relu(self.bn(x))


def by_a_helper(self, x):
    return helper(self, x) + 1


ADDED = {
    both_norms: {"bn": 1, "bn add relu": 1},
    two_norms_of_the_same_input: {"bn": 1, "bn add relu": 1},
    parameter_added: {"bn add relu": 1},
    number_of_a_shape_added: {"bn": 1},
    broadcast_added: {"bn": 1},
    loop: {"bn relu": 1},
    by_a_helper: {"bn relu": 1},
}


@pytest.mark.parametrize("forward", ADDED, ids=lambda forward: forward.__name__)
def test_what_is_added_may_come_from_anywhere(forward, calls):
    converted(block(forward), *images())
    assert collections.Counter(calls) == {kind: 2 * count for kind, count in ADDED[forward].items()}


# ---------------------------------------------------------------- what is not fused


def used_twice(self, x):
    out = self.bn(x)
    return F.relu(out) * out


def sum_used_twice(self, x):
    out = self.bn(x) + x
    return F.relu(out) * out


def added_to_itself(self, x):
    out = self.bn(x)
    return F.relu(out + out)


def result_of_an_in_place_relu_not_used(self, x):
    out = self.bn(x)
    torch.relu_(out)
    return out


def argument_changed_in_place(self, x):
    x += self.bn(x * 2)
    return F.relu(x)


def added_with_a_factor(self, x):
    return F.relu(torch.add(self.bn(x), x, alpha=2))


def number_added(self, x):
    return F.relu(self.bn(x) + 1.5)


def subtracted(self, x):
    return F.relu(self.bn(x) - x)


def other_activation(self, x):
    return F.leaky_relu(self.bn(x))


def branch_on_data(self, x):
    out = self.bn(x)
    return F.relu(out) if out.sum() > 0 else out


def branch_on_a_type(self, x):
    return F.relu(self.bn(x if isinstance(x, torch.Tensor) else x[0]))


def branch_on_the_mode_of_gradients(self, x):
    return F.relu(self.bn(x)) if not torch.is_grad_enabled() else F.relu(self.bn(x)) * 2


def without_gradient(self, x):
    with torch.no_grad():
        x = self.conv(x)
    return F.relu(self.bn(x))


@torch.no_grad()
def decorated(self, x):
    return F.relu(self.bn(x))


class Reversal(torch.autograd.Function):
    """The identity, with a gradient of its own."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, delta):
        return -delta


def function_with_its_own_gradient(self, x):
    return F.relu(self.bn(Reversal.apply(x)))


def checkpointed(self, x):
    return F.relu(self.bn(torch.utils.checkpoint.checkpoint(self.conv, x, use_reentrant=False)))


def exception(self, x):
    try:
        x = self.missing(x)
    except AttributeError:
        x = self.bn(x)
    return F.relu(x)


def attribute_set(self, x):
    self.last = x
    return F.relu(self.bn(x))


def list_extended(self, x):
    self.history.append(1)
    return F.relu(self.bn(x))


def buffer_counted(self, x):
    self.bn2.num_batches_tracked += 1
    return F.relu(self.bn(x))


def child_set_to_evaluation(self, x):
    self.bn.eval()
    return F.relu(self.bn(x))


def configured(self, x):
    return F.relu(self.bn(x)) if self.config["flag"] else self.bn(x)


def configured_by_the_class(self, x):
    return F.relu(self.bn(x)) if self.class_flag else self.bn(x)


FLAG = True


def configured_by_a_global(self, x):
    return F.relu(self.bn(x)) if FLAG else self.bn(x)


def counting():
    count = 0

    def forward(self, x):
        nonlocal count
        count += 1
        return F.relu(self.bn(x)) * count

    return forward


def tensor_made(self, x):
    return F.relu(self.bn(x)) * torch.ones(1)


def any_arguments(self, *xs):
    return F.relu(self.bn(xs[0]))


UNFUSED = [
    *(used_twice, sum_used_twice, added_to_itself, result_of_an_in_place_relu_not_used, argument_changed_in_place),
    *(added_with_a_factor, number_added, subtracted, other_activation),
    *(branch_on_data, branch_on_a_type, branch_on_the_mode_of_gradients, without_gradient, decorated),
    *(function_with_its_own_gradient, checkpointed, exception, attribute_set, list_extended, buffer_counted),
    *(child_set_to_evaluation, configured, configured_by_the_class, configured_by_a_global, tensor_made, any_arguments),
]


@pytest.mark.parametrize("forward", UNFUSED, ids=lambda forward: forward.__name__)
def test_is_not_fused_and_computes_the_same(forward, calls):
    model = block(forward)
    state = {name: value for name, value in model.__dict__.items() if not name.startswith("_")}
    model, original = converted(model, *images())
    assert set(calls) <= {"bn"}
    assert len(model.history) == len(original.history)
    assert model.__dict__.keys() - {"last", "forward"} == state.keys() | nn.Module().__dict__.keys()
