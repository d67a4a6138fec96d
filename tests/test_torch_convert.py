"""`convert`: which batch norms are replaced, what is fused with them, and that a model computes what it did before."""

import collections
import copy
import gc
import inspect
import io
import math
import operator
import pickle
import random
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnbp.torch
from bnbp.cli.training import networks
from bnbp.torch import _modules, _sync, convert

pytestmark = pytest.mark.torch


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
        self.scale = 2.0
        self.config = {"flag": True}
        self.history = []
        for norm in (self.bn, self.bn2):
            nn.init.uniform_(norm.weight, 1, 3)
            nn.init.uniform_(norm.bias, 1, 3)

    def finish(self, x):
        return x * self.scale


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


@pytest.mark.parametrize("relu", ["nn.ReLU(inplace=True)", "F.relu", "torch.relu_", ".relu()", "F.relu6(inplace=True)"])
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
    count = x.size(0)
    return F.relu(self.bn(x) + count)


def buffer_changed(self, x):
    self.bn2.num_batches_tracked.add_(1)
    return F.relu(self.bn(x))


def broadcast_added(self, x):
    return F.relu(self.bn(x).add_(x.mean(0, keepdim=True)))


def loop(self, x):
    for layer in (self.bn, self.relu):
        x = layer(x)
    return x


def helper(self, x):
    return F.relu(self.bn(x))


def with_functions_of_python(self, x):
    scale = math.sqrt(x.size(1)) + max(operator.add(1, 2), len((1, 2)))
    return F.relu(self.bn(x)) * scale


def by_a_helper(self, x):
    return helper(self, x) + 1


def tensors_changed_in_place(self, x):
    view = x.mT
    view += self.bn2(x * 2)
    x += 1
    x.mul_(2)
    return F.relu(self.bn(x))


def fused_result_added(self, x):
    x = F.relu(self.bn(x))
    return F.relu6(self.bn2(x) + x)


def own_result_added(self, x):
    x = F.relu(self.bn(x))
    return F.relu6(x + self.bn(x))


FUSED = {
    both_norms: {"bn": 1, "bn add relu": 1},
    two_norms_of_the_same_input: {"bn": 1, "bn add relu": 1},
    parameter_added: {"bn add relu": 1},
    number_of_a_shape_added: {"bn": 1},
    broadcast_added: {"bn": 1},
    buffer_changed: {"bn relu": 1},
    loop: {"bn relu": 1},
    by_a_helper: {"bn relu": 1},
    with_functions_of_python: {"bn relu": 1},
    tensors_changed_in_place: {"bn": 1, "bn relu": 1},
    fused_result_added: {"bn relu": 1, "bn add relu6": 1},
    own_result_added: {"bn relu": 1, "bn add relu6": 1},
}


@pytest.mark.parametrize("forward", FUSED, ids=lambda forward: forward.__name__)
def test_is_fused_as_far_as_it_stays_right(forward, calls):
    converted(block(forward), *images())
    assert collections.Counter(calls) == {kind: 2 * count for kind, count in FUSED[forward].items()}


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


def multiplied_in_place(self, x):
    x *= 2
    return F.relu(self.bn(x))


def input_changed_before_the_addition(self, x):
    with_a_view = x[:]
    out = self.bn(x)
    with_a_view.add_(1)
    out = out + with_a_view
    return F.relu(out)


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
LAST = None


def configured_by_a_global(self, x):
    return F.relu(self.bn(x)) if FLAG else self.bn(x)


def configured_by_a_closure():
    flag = True

    def forward(self, x):
        return F.relu(self.bn(x)) if flag else self.bn(x)

    forward.__name__ = "configured_by_a_closure"
    return forward


def configured_by_a_default(self, x, config={"flag": True}):  # noqa: B006
    return F.relu(self.bn(x)) if config["flag"] else self.bn(x)


def sum_and_norm_used(self, x):
    out = self.bn(x)
    return F.relu(out + x) * out


def statistics_added(self, x):
    out = self.bn(self.conv(x))
    return F.relu(out + self.bn.running_mean.reshape(3, 1, 1) * 1)


def data_set(self, x):
    x = self.conv(x)
    x.data = x.data * 2
    return F.relu(self.bn(x))


def dictionary_changed(self, x):
    self.__dict__["last"] = x
    return F.relu(self.bn(x))


def global_set(self, x):
    global LAST
    LAST = None
    return F.relu(self.bn(x))


def imported(self, x):
    import math as module

    return F.relu(self.bn(x)) * module.pi


def helper_without_gradient(self, x):
    return F.relu(self.bn(constant(x)))


def constant(x):
    with torch.no_grad():
        return x * 2


@torch.fx.wrap
def applied(layer, x):
    return layer(x)


def module_given_to_a_function(self, x):
    return F.relu(self.bn(applied(self.conv, x)))


def tensor_made(self, x):
    return F.relu(self.bn(x)) * torch.ones(1)


def any_arguments(self, *xs):
    return F.relu(self.bn(xs[0]))


UNFUSED = [
    *(used_twice, sum_used_twice, added_to_itself, result_of_an_in_place_relu_not_used, argument_changed_in_place),
    *(multiplied_in_place, added_with_a_factor, number_added, subtracted, other_activation),
    *(branch_on_data, branch_on_a_type, branch_on_the_mode_of_gradients, without_gradient, decorated),
    *(function_with_its_own_gradient, checkpointed, exception, attribute_set, list_extended, buffer_counted),
    *(child_set_to_evaluation, configured, configured_by_the_class, configured_by_a_global, tensor_made, any_arguments),
    *(configured_by_a_closure(), configured_by_a_default, sum_and_norm_used, statistics_added, data_set),
    *(dictionary_changed, global_set, imported, helper_without_gradient, module_given_to_a_function),
]


@pytest.mark.parametrize("forward", UNFUSED, ids=lambda forward: forward.__name__)
def test_is_not_fused_and_computes_the_same(forward, calls):
    model = block(forward)
    state = {name: value for name, value in model.__dict__.items() if not name.startswith("_")}
    model, original = converted(model, *images())
    assert set(calls) <= {"bn"}
    assert len(model.history) == len(original.history)
    assert model.__dict__.keys() - {"last", "forward"} == state.keys() | nn.Module().__dict__.keys()


def sum_written_elsewhere(self, x):
    return F.relu(torch.add(self.bn(x * 2), x, out=x))


@pytest.mark.parametrize("forward", [input_changed_before_the_addition, sum_written_elsewhere])
def test_what_changes_a_tensor_that_a_gradient_needs_is_not_fused(forward, calls):
    model = block(forward)
    original = copy.deepcopy(model)
    convert(model)
    (x,) = images()
    mine, theirs = x.clone(), x.clone()
    with torch.no_grad():  # else PyTorch refuses it
        torch.testing.assert_close(model(mine), original(theirs))
    torch.testing.assert_close(mine, theirs)
    assert calls == ["bn"]


def shared_norm_added_to_itself(self, x):
    out = self.bn(self.conv(x))
    out += self.bn(x * 3)
    return F.relu(out)


def norm_shared_with_a_layer(self, x):
    out = self.bn(self.conv(x))
    out += self.inner(x)
    return F.relu(out)


@pytest.mark.parametrize("forward", [shared_norm_added_to_itself, norm_shared_with_a_layer])
def test_a_batch_norm_is_not_fused_later_than_another_use_of_it(forward, calls):
    model = block(forward)
    model.inner = nn.Sequential(nn.Conv2d(3, 3, 1), model.bn)
    converted(model, *images())
    assert set(calls) == {"bn"}


def drawing(self, x):
    x = F.dropout(x, 0.5, self.training)
    factor = random.random() < np.random.rand() * torch.rand(())  # noqa: NPY002
    return F.relu(self.bn(x)) * factor


def test_conversion_draws_no_random_numbers(calls):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    model = block(drawing)
    before = states()
    convert(model)
    assert states() == before
    model(*images())
    assert calls == ["bn"]


def test_a_branch_on_the_training_mode_is_right_in_both(calls):
    def forward(self, x):
        return F.relu(self.bn(x)) if self.training else F.relu6(self.bn2(x)) * 2

    converted(block(forward).eval(), *images(), modes=(True, False, True))
    assert calls == ["bn relu", "bn relu6", "bn relu"]


@pytest.mark.parametrize("mode", [True, False])
def test_conversion_leaves_the_training_mode_of_each_module(mode):
    def forward(self, x):
        return F.relu(self.bn(x)) if self.training else self.bn(x)

    model = block(forward).train(mode)
    model.bn2.train(not mode)
    before = [each.training for each in model.modules()]
    convert(model)
    assert [each.training for each in model.modules()] == before


# ---------------------------------------------------------------- what changes after the conversion


def flexible(self, x, factor=1.0, y=None):
    out = self.bn(self.conv(x))
    if y is not None:
        out += y
    if self.flag:
        out = self.relu(out)
    return self.finish(out) * factor


CHANGES = {
    "attribute": lambda model: setattr(model, "flag", False),
    "attribute that is a tensor now": lambda model: setattr(model, "scale", torch.linspace(1, 2, 5)),
    "method": lambda model: setattr(model, "finish", torch.tanh),
    "activation": lambda model: setattr(model, "relu", nn.Tanh()),
    "activation that is a function": lambda model: (delattr(model, "relu"), setattr(model, "relu", torch.tanh)),
    "batch norm": lambda model: setattr(model, "bn", nn.Identity()),
    "mode": lambda model: model.bn.eval(),
    "convolution": lambda model: setattr(model, "conv", nn.Conv2d(3, 3, 1, bias=False)),
    "parameter": lambda model: setattr(model.bn, "weight", nn.Parameter(torch.ones(3))),
    "forward of the ReLU": lambda model: setattr(model.relu, "forward", torch.tanh),
    "forward of the batch norm": lambda model: setattr(model.bn, "forward", torch.tanh),
    "forward of the class": lambda model: setattr(type(model), "forward", lambda self, x: self.relu(x)),
    "parametrisation": lambda model: nn.utils.parametrizations.weight_norm(model.conv),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_the_conversion_takes_effect(change):
    model, original = converted(block(flexible), *images())
    for each in (model, original):
        torch.manual_seed(1)
        CHANGES[change](each)
    modes = (False,) if change == "mode" else (True, False)
    assert_same(model, original, *images(), modes=modes)
    convert(model)
    assert_same(model, original, *images(), modes=modes)


def test_an_argument_that_may_be_left_out_can_be_given(calls):
    model, original = converted(block(flexible), *images())
    x, y = images(2)
    for arguments in [(x, 2.0), (x, 1.0, y)]:
        torch.testing.assert_close(model(*arguments), original(*arguments))
    torch.testing.assert_close(model(x, y=y), original(x, y=y))
    assert "bn add relu" not in calls
    calls.clear()
    torch.testing.assert_close(model(x=x), original(x=x))
    assert calls == ["bn relu"]


def test_an_argument_that_is_no_tensor_is_not_taken_for_one(calls):
    model, original = converted(block(lambda self, x, y: F.relu(self.bn(x) + (x if y is None else y))), *images(2))
    (x,) = images()
    for other in (None, 2):
        torch.testing.assert_close(model(x, other), original(x, other))
    assert calls[2:] == ["bn", "bn"]


def test_wrong_arguments_have_the_errors_that_they_had():
    model, original = converted(block(flexible), *images())
    (x,) = images()
    for args, kwargs in [((), {}), ((x,), {"x": x}), ((x,), {"z": x}), ((x, x, x, x), {}), ((), {"z": x}), ((1,), {})]:
        with pytest.raises(TypeError) as expected:
            original(*args, **kwargs)
        with pytest.raises(TypeError) as got:
            model(*args, **kwargs)
        assert str(got.value) == str(expected.value)


HOOKS = {
    "forward": lambda module, seen: module.register_forward_hook(lambda *_: seen.append(_[-1].detach().clone())),
    "forward, which changes the result": lambda module, seen: module.register_forward_hook(lambda m, x, y: y * 2),
    "before forward": lambda module, seen: module.register_forward_pre_hook(
        lambda m, x: seen.append(x[0].detach().clone())
    ),
    "backward": lambda module, seen: module.register_full_backward_hook(
        lambda m, before, after: seen.append(after[0].clone())
    ),
    "before backward": lambda module, seen: module.register_full_backward_pre_hook(
        lambda m, after: seen.append(after[0].clone())
    ),
    "of all modules": lambda module, seen: nn.modules.module.register_module_forward_hook(
        lambda m, x, y: seen.append(y.detach().clone()) if m is module else None
    ),
}


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("name", ["relu", "bn"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_sees_and_does_what_it_did(hook, name, early, calls):
    model = block(lambda self, x: self.relu(self.bn(x) + x))
    original = copy.deepcopy(model)
    if not early:
        convert(model)
    seen, expected = [], []
    handles = [HOOKS[hook](getattr(model, name), seen), HOOKS[hook](getattr(original, name), expected)]
    if early:
        convert(model)
    inputs = images()
    try:
        assert_same(model, original, *inputs)
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == len(expected)
    for got, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(got, wanted)
    assert set(calls) == {"bn"}
    calls.clear()
    assert_same(model, original, *inputs)
    assert set(calls) == {"bn add relu"}


class TestSequential:
    """The children of a Sequential are used one by one, too."""

    @pytest.fixture
    def layers(self):
        return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1))

    def test_each_child_computes_the_same_by_itself(self, layers, calls):
        original = copy.deepcopy(layers)
        convert(layers)
        (x,) = images()
        got = expected = x
        for mine, theirs in zip(layers, original, strict=True):
            got, expected = mine(got.clone()), theirs(expected.clone())
            torch.testing.assert_close(got, expected)
        torch.testing.assert_close(layers[:2](x), original[:2](x))
        assert set(calls) == {"bn"}

    @pytest.mark.parametrize(
        "change",
        [
            lambda layers: layers.append(nn.Tanh()),
            lambda layers: layers.insert(1, nn.Tanh()),
            lambda layers: layers.pop(2),
            lambda layers: layers.__setitem__(1, nn.Identity()),
        ],
        ids=["append", "insert", "pop", "replace"],
    )
    def test_a_change_of_the_children_takes_effect(self, layers, change):
        layers, original = converted(layers, *images())
        for each in (layers, original):
            change(each)
        assert_same(layers, original, *images())

    def test_layers_that_another_module_calls_are_fused_there(self, layers, calls):
        class Taps(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = layers
                self.stages = nn.ModuleList([nn.BatchNorm2d(3), nn.ReLU()])

            def forward(self, x):
                taps = []
                for layer in [*self.layers, *self.stages]:
                    x = layer(x)
                    if layer not in (self.layers[1], self.stages[0]):
                        taps.append(x)
                return torch.cat(taps)

        model, original = converted(Taps(), *images())
        assert set(calls) == {"bn relu"}
        for each in (model, original):
            each.stages.append(nn.Tanh())
        assert_same(model, original, *images())


def test_a_list_of_layers_that_was_empty_can_be_extended(calls):
    def forward(self, x):
        x = F.relu(self.bn(x))
        for layer in self.extra:
            x = layer(x)
        return x

    model = block(forward)
    model.extra = nn.ModuleList()
    model, original = converted(model, *images())
    assert set(calls) == {"bn relu"}
    for each in (model, original):
        each.extra.append(nn.Tanh())
    assert_same(model, original, *images())


# ---------------------------------------------------------------- what is replaced


@pytest.mark.parametrize(
    ("name", "shape"), [("1d", (4, 3)), ("1d", (4, 3, 5)), ("2d", (4, 3, 2, 2)), ("3d", (4, 3, 2, 2, 1))]
)
def test_a_batch_norm_itself_is_replaced(name, shape, calls):
    norm = getattr(nn, f"BatchNorm{name}")(3, eps=0.1, momentum=0.3)
    converted(norm, torch.randn(shape))
    assert type(norm) is getattr(bnbp.torch, f"BatchNorm{name}")
    assert calls == ["bn", "bn"]


@pytest.mark.parametrize("name", ["1d", "2d", "3d"])
def test_a_lazy_batch_norm_is_replaced_and_fused_once_it_knows_its_channels(name, calls):
    x = torch.randn((4, 3, 2, 2, 2)[: 2 + int(name[0])])
    model = nn.Sequential(getattr(nn, f"LazyBatchNorm{name}")(), nn.ReLU())
    convert(model)
    original = nn.Sequential(getattr(nn, f"BatchNorm{name}")(3), nn.ReLU())
    torch.testing.assert_close(model(x), original(x))
    assert type(model[0]) is getattr(bnbp.torch, f"BatchNorm{name}")
    assert calls in (["bn"], [])
    calls.clear()
    assert_same(model, original, x)
    assert calls == ["bn relu", "bn relu"]


def test_synchronised_batch_norms_are_called_in_the_order_of_processes_that_do_not_fuse(calls, monkeypatch):
    monkeypatch.setattr(_sync, "batch_norm", _modules.batch_norm)  # which is the spy
    blocks = [block(both_norms), block(two_norms_of_the_same_input)]
    model, _ = converted(nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(*blocks)), *images())
    assert type(model[0].bn) is bnbp.torch.SyncBatchNorm
    assert calls == ["bn", "bn", "bn", "bn add relu"] * 2


def test_a_shared_batch_norm_is_replaced_once_and_fused_everywhere(calls):
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(norm, nn.ReLU(), nn.Sequential(norm, nn.ReLU()), norm)
    model, _ = converted(model, *images())
    assert model[0] is model[3] is model[2][0] is norm
    assert calls == ["bn relu", "bn relu", "bn"] * 2


class Mine(nn.BatchNorm2d):
    """A user's."""

    def forward(self, input):
        return super().forward(input) * 2


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_what_is_no_batch_norm_of_pytorch_stays_and_is_named(capsys):
    parametrised = nn.BatchNorm2d(3)
    nn.utils.parametrize.register_parametrization(parametrised, "weight", nn.Softplus())
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    model = nn.Sequential(Mine(3), nn.ReLU(), parametrised, nn.ReLU(), scripted, nn.InstanceNorm2d(3))
    kinds = [type(each) for each in model.modules()]
    convert(model, report=True)
    assert [type(each) for each in model.modules()] == kinds
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["0", "2", "4.0"]
    assert "Mine" in lines[1]


def test_the_state_dict_the_parameters_and_the_optimiser_stay(calls):
    model = networks.small_convnet(4)
    original = copy.deepcopy(model)
    steps = [torch.optim.SGD(each.parameters(), 0.1, momentum=0.9) for each in (model, original)]
    names, modules = list(model.state_dict()), list(model.named_modules())
    convert(model)
    assert list(model.state_dict()) == names
    assert list(model.named_modules()) == modules
    x = torch.randn(2, 3, 32, 32)
    for _ in range(3):
        assert_same(model, original, x, modes=(True,))
        for step in steps:
            step.step()
    original.load_state_dict(model.state_dict())
    assert_same(model, original, x)
    fresh = convert(networks.small_convnet(4))
    fresh.load_state_dict(original.state_dict())
    assert_same(fresh, original, x)


def test_a_model_can_be_converted_again(calls):
    model, original = converted(networks.small_convnet(4), torch.randn(2, 3, 32, 32))
    kinds = [type(each) for each in model.modules()]
    calls.clear()
    convert(model)
    assert [type(each) for each in model.modules()] == kinds
    assert_same(model, original, torch.randn(2, 3, 32, 32), modes=(True,))
    assert calls == ["bn relu"] * 3


def test_nothing_is_fused_without_fuse(calls):
    model = networks.small_convnet(4)
    original = copy.deepcopy(model)
    convert(model, fuse=False)
    assert_same(model, original, torch.randn(2, 3, 32, 32))
    assert calls == ["bn"] * 6


def test_an_activation_of_its_own_is_not_fused_over(calls):
    model = nn.Sequential(bnbp.torch.BatchNorm2d(3, activation="relu6"), nn.ReLU())
    convert(model)
    (x,) = images()
    expected = F.relu6(nn.BatchNorm2d(3)(x))
    torch.testing.assert_close(model(x), expected)
    assert calls == ["bn relu6"]


def test_an_addend_of_its_own_stays(calls):
    def forward(self, x):
        return F.relu(self.bn(x, x) + x)

    model = block(forward)
    model.bn = bnbp.torch.BatchNorm2d(3)
    original = copy.deepcopy(model)
    assert_same(convert(model), original, *images())
    assert set(calls) == {"bn add"}


def test_an_activation_that_is_given_later_is_kept():
    model = convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    nn.init.constant_(model[0].weight, 20)
    model[0].activation = "relu6"
    (x,) = images()
    torch.testing.assert_close(model(x), F.relu6(nn.BatchNorm2d(3)(x) * 20))


def test_attributes_that_are_found_by_a_computed_name_are_compared(calls):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)
            self.flag = True

        def forward(self, x):
            return F.relu(self.bn(x)) if getattr(self, "fl" + "ag") else self.bn(x)

    model, original = converted(Named(), *images())
    assert set(calls) == {"bn relu"}
    model.flag = original.flag = False
    assert_same(model, original, *images())


def test_another_forward_of_the_instance_stays():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    model.forward = forward = lambda x: x + 1
    convert(model)
    assert model.forward is forward


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"module: expected a torch.nn.Module, got list"):
        convert([nn.BatchNorm2d(3)])


# ---------------------------------------------------------------- the report


def test_the_report_tells_what_became_of_each_batch_norm(capsys):
    def forward(self, x):
        x = self.relu(self.bn(x))
        return self.bn2(x) if self.training else F.relu6(self.bn2(x) + x)

    model = nn.Sequential(block(forward), block(branch_on_data), nn.BatchNorm2d(3))
    convert(model)
    assert capsys.readouterr().out == ""
    convert(model, report=True)
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    cells = [[cell.strip() for cell in line if cell] for line in lines]
    assert cells[0] == ["module", "was", "is", "fused with"]
    ours = "bnbp.torch.BatchNorm2d"
    assert cells[1:3] == [
        ["0.bn", ours, ours, "relu"],
        ["0.bn2", ours, ours, "nothing in training, add, relu6 in evaluation"],
    ]
    assert [line[0] for line in cells[3:]] == ["1.bn", "1.bn2", "2"]
    assert cells[3][3].startswith("nothing: Block.forward cannot be traced: ")
    assert cells[5][3] == "nothing"


# ---------------------------------------------------------------- copies, and PyTorch's own tools


def test_a_copy_is_fused_and_is_independent(calls):
    model, original = converted(networks.resnet50((2,), 4, 5), torch.randn(2, 3, 32, 32))
    other = copy.deepcopy(model)
    x = torch.randn(2, 3, 32, 32)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.layers[0][1].relu = nn.Tanh()
    other.eval()
    assert_same(model, original, x)
    calls.clear()
    other = copy.deepcopy(model)
    assert_same(other, original, x, modes=(False,))
    assert collections.Counter(calls) == {"bn relu": 5, "bn add relu": 2, "bn": 1}


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_a_converted_model_can_be_saved_and_converted_again(way, calls):
    model, original = converted(networks.resnet50((2,), 4, 5), torch.randn(2, 3, 32, 32))
    if way == "pickle":
        loaded = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    x = torch.randn(2, 3, 32, 32)
    for _ in range(2):
        calls.clear()
        assert_same(loaded, copy.deepcopy(original), x, modes=(False,))
        convert(loaded)
    assert collections.Counter(calls) == {"bn relu": 5, "bn add relu": 2, "bn": 1}
    assert_same(model, original, x)


def test_a_traced_model_can_be_converted_copied_and_saved(calls):
    model = torch.fx.symbolic_trace(networks.small_convnet(4))
    x = torch.randn(2, 3, 32, 32)
    model, original = converted(model, x)
    assert set(calls) == {"bn"}
    assert_same(copy.deepcopy(model), original, x, modes=(False,))
    assert_same(pickle.loads(pickle.dumps(model)), original, x, modes=(False,))


def test_a_converted_model_can_be_traced():
    model, original = converted(block(both_norms), *images())
    assert_same(torch.fx.symbolic_trace(model), original, *images(), modes=(False,))


def test_checkpoints_recompute_the_same(calls):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.layers, x, use_reentrant=False)

    model = Checkpointed()
    original = copy.deepcopy(model)
    (x,) = images()
    got, expected = (run(each, x) for each in (convert(model), original))
    for name in ("output", "gradient 0", "gradient layers.0.weight", "gradient layers.1.weight"):
        torch.testing.assert_close(got[name], expected[name])
    assert calls == ["bn relu"] * 2


def test_transforms_of_functions_see_their_parameters():
    model, original = converted(block(flexible), *images())
    (x,) = images()
    parameters = {name: each.detach() + 1 for name, each in model.named_parameters()}

    def loss(module):
        return lambda given: torch.func.functional_call(module, given, (x,)).square().sum()

    got, expected = (torch.func.grad(loss(each.eval()))(parameters) for each in (model, original))
    for name in parameters:
        torch.testing.assert_close(got[name], expected[name])


def test_autocast_gives_the_types_that_it_gave():
    def forward(self, x):
        out = self.bn(self.conv(x))
        out += x
        return self.relu(out)

    model = block(forward).to(torch.float32)
    original = copy.deepcopy(model)
    convert(model)
    x = images()[0].to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = model(x), original(x)
    assert got.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("mode", [True, False])
def test_a_compiled_model_has_the_fused_calls_and_follows_changes(mode):
    model, original = converted(nn.Sequential(block(flexible), block(both_norms)), *images())
    seen = []

    def backend(graph, inputs):
        seen.append([node.args[-1] for node in graph.graph.nodes if "batch_norm" in str(node.target)])
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = images()[0]
    torch.testing.assert_close(compiled.train(mode)(x), original.train(mode)(x))
    assert [activation for activation in seen[0] if isinstance(activation, str)] == ["relu", "relu"]
    for each in (model, original):
        each[0].flag = False
    torch.testing.assert_close(compiled(x), original(x))


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_model_has_the_fused_calls(strict, mode):
    model, original = converted(block(flexible), *images())
    x = images()[0]
    exported = torch.export.export(model.train(mode), (x,), strict=strict)
    assert not any("relu" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), original.train(mode)(x))


def test_the_signature_stays():
    model, original = block(flexible), block(flexible)
    convert(model)
    assert inspect.signature(model.forward) == inspect.signature(original.forward)


def test_a_converted_model_is_freed_when_it_is_not_used():
    model, _ = converted(block(flexible), *images())
    module = weakref.ref(model)
    forward = model.forward
    gc.collect()
    gc.disable()
    try:
        del model
        assert module() is None
    finally:
        gc.enable()
    with pytest.raises(ReferenceError, match="forward: the module that was converted is gone"):
        forward(*images())
