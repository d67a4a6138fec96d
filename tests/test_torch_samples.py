"""PyTorch's own samples for batch norm, from the databases that its tests are made of: its results against ours.

The databases ship with PyTorch. An entry gives inputs for an operator or a module, and the errors that it must raise.
"""

import copy
import itertools
import math
from typing import NamedTuple

import pytest
from hypothesis import settings

pytestmark = pytest.mark.torch

TYPES = ["float16", "bfloat16", "float32", "float64"]
#: Where the arguments of an operator's sample go in ``batch_norm``, after the input.
ORDER = {
    "nn.functional.batch_norm": None,
    "native_batch_norm": ("weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
    "_native_batch_norm_legit": ("weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
    "_batch_norm_with_update": ("weight", "bias", "running_mean", "running_var", "momentum", "eps"),
}


@pytest.fixture(scope="module")
def torch():
    import torch

    import bnbp.torch  # noqa: F401

    return torch


@pytest.fixture(scope="module")
def databases(torch):
    """The entries for batch norm, by their names."""
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    settings.load_profile("bnbp")  # the import has loaded a profile of PyTorch's
    entries = {}
    for entry in (*op_db, *module_db):
        if "batch_norm" in entry.name or "BatchNorm" in entry.name:
            entries.setdefault(entry.name, []).append(entry)
    return entries


@pytest.fixture(scope="module")
def theirs(torch):
    return torch.nn.functional.batch_norm


@pytest.fixture(scope="module")
def ours():
    import bnbp.torch

    return bnbp.torch.batch_norm


# ---------------------------------------------------------------- a call and its outcome


def finfo(dtype):
    import torch

    return torch.finfo(dtype)


class Outcome(NamedTuple):
    """All that a call leaves behind: tensors by their names, or an error."""

    tensors: dict
    error: str | None


def outcome_of(function, inputs, state):
    """Call a function of `inputs`, and differentiate it. `state` are the tensors that the call changes."""
    import torch

    try:
        output = function(inputs)
    except Exception as error:
        return Outcome({}, f"{type(error).__name__}: {error}")
    tensors = {"output": output}
    if output.requires_grad:
        generator = torch.Generator().manual_seed(1)
        delta = torch.rand(output.shape, dtype=torch.float64, generator=generator).to(output.dtype)
        output.backward(delta)
        tensors.update({f"gradient of {name}": value.grad for name, value in inputs.items() if is_leaf(value)})
    tensors.update({f"{name} afterwards": value for name, value in state.items() if value is not None})
    return Outcome(tensors, None)


def is_leaf(value):
    return hasattr(value, "requires_grad") and value.requires_grad and value.is_leaf


def clones(values, dtype=None):
    """The same tensors with the same strides, in a type if it is given; what is no tensor stays."""
    import torch

    def clone(value):
        if not isinstance(value, torch.Tensor):
            return value
        new = torch.empty_strided(value.shape, value.stride(), dtype=dtype or value.dtype)
        return new.copy_(value.detach()).requires_grad_(value.requires_grad)

    return {name: clone(value) for name, value in values.items()}


def compare(got, expected, exact, magnitudes):
    """Shapes, types and strides are PyTorch's; numbers are as close to the exact ones as PyTorch's, or by a bound.

    The bound is three roundings of the largest number, or of the `magnitudes` of the terms, which may cancel.
    """
    assert got.error == expected.error
    assert got.tensors.keys() == expected.tensors.keys()
    for name, tensor in got.tensors.items():
        theirs = expected.tensors[name]
        assert (tensor is None) == (theirs is None), name
        if tensor is None:
            continue
        for what in ("shape", "dtype", "device", "requires_grad"):
            assert getattr(tensor, what) == getattr(theirs, what), (name, what)
        assert tensor.stride() == theirs.stride(), name
        if not tensor.dtype.is_floating_point:
            assert tensor.equal(theirs), name
        elif tensor.numel():
            reference = exact.tensors[name].detach()
            largest = float(reference.abs().max())
            assert math.isfinite(largest)
            error, their_error = (float((each.detach() - reference).abs().max()) for each in (tensor, theirs))
            bound = 3 * finfo(tensor.dtype).eps * max(largest, magnitudes.get(name, 0))
            assert error <= max(bound, their_error), name


def magnitudes_of(arguments):
    """How large the terms are that the results of a call of ``batch_norm`` are made of."""
    x, running_mean, running_var, weight = (
        value if value is None else value.detach().double()
        for value in map(arguments.get, ("input", "running_mean", "running_var", "weight"))
    )
    if x.dim() < 2 or not x.numel():
        return {}
    x = x.transpose(0, 1).flatten(1)  # a row for each channel
    variance, mean = x.var(1, unbiased=False), x.mean(1)
    momentum = arguments.get("momentum", 0.1)
    magnitudes = {}
    if arguments["training"]:
        if running_mean is not None:
            for name, old, new in (("mean", running_mean, mean), ("var", running_var, x.var(1))):
                both = float(old.abs().max() + new.abs().max())
                magnitudes[f"running_{name} afterwards"] = (1 + abs(momentum)) * both
    else:
        variance, mean = running_var, running_mean
    scale = (variance + arguments.get("eps", 1e-5)).rsqrt()
    magnitudes["gradient of weight"] = float(((x - mean[:, None]).abs().sum(1) * scale).max())
    magnitudes["gradient of input"] = float((scale if weight is None else scale * weight).abs().max())
    return magnitudes


# ---------------------------------------------------------------- operators


def samples_of(torch, entry, dtype):
    """The samples of an operator, each also with other strides, as arguments of ``batch_norm`` by their names."""
    names = ("running_mean", "running_var", "weight", "bias")
    for requires_grad in (False, True):
        for sample in entry.sample_inputs("cpu", dtype, requires_grad):
            for each in (sample, sample.noncontiguous()):
                order = ORDER[entry.name]
                if order and len(each.args) == 5:  # without running statistics
                    order = ("weight", "bias", *order[4:])
                given = dict(zip(order or names, each.args, strict=True)) | each.kwargs
                yield {"input": each.input, **dict.fromkeys(names), "training": "update" in entry.name, **given}


def run(function, arguments):
    running = {name: arguments[name] for name in ("running_mean", "running_var")}
    return outcome_of(lambda given: function(**given), arguments, running)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ORDER)
def test_the_samples_of_the_operators_give_what_pytorch_gives(torch, databases, theirs, ours, name, dtype):
    """Those of the operators below ``batch_norm`` too: they have its arguments in another order."""
    kind, count, computed = getattr(torch, dtype), 0, 0
    for entry in databases[name]:
        if kind not in entry.dtypes:
            continue
        for arguments in samples_of(torch, entry, kind):
            got, expected, exact = (
                run(function, clones(arguments, wide))
                for function, wide in ((ours, None), (theirs, None), (theirs, torch.float64))
            )
            compare(got, expected, exact, magnitudes_of(arguments))
            count += 1
            computed += expected.error is None
    print(f"{name}, {dtype}: {count} samples, of which {computed} have a result")
    assert count >= (48 if name == "nn.functional.batch_norm" else 30)
    assert computed >= 30


def test_the_operators_of_the_database_are_those_that_are_known(databases):
    """A new one in a later PyTorch is to be looked at."""
    assert {name for name in databases if "batch_norm" in name} == set(ORDER)


def test_the_database_has_no_errors_for_the_function(databases):
    """Those of a later PyTorch are to be run here."""
    assert all(entry.error_inputs_func is None for name in ORDER for entry in databases[name])


# ---------------------------------------------------------------- modules


def module_samples_of(entry, dtype, training):
    for requires_grad in (False, True):
        for sample in entry.module_inputs_func(entry, "cpu", dtype, requires_grad, training):
            yield sample.constructor_input, sample.forward_input.args[0], sample.desc


def fill(torch, module):
    """Parameters and statistics that are not the ones a module begins with."""
    generator = torch.Generator().manual_seed(2)
    for name, value in module.state_dict().items():
        if name != "num_batches_tracked":
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)


def run_module(torch, kind, constructor, state, input, dtype, training):
    """Two calls, for a running statistic depends on their number."""
    module = kind(*constructor.args, **constructor.kwargs, dtype=dtype)
    module.load_state_dict(state)
    module.train(training)
    inputs = {"input": input, **dict(module.named_parameters())}

    def twice(inputs):
        module(inputs["input"].detach())
        return module(inputs["input"])

    return outcome_of(twice, inputs, dict(module.named_buffers()))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("lazy", ["", "Lazy"])
@pytest.mark.parametrize("rank", ["1d", "2d", "3d"])
def test_the_samples_of_the_modules_give_what_pytorch_gives(torch, databases, rank, lazy, dtype):
    """In all types, though the database lists float32 and float64 only. A lazy module has those of its rank."""
    import bnbp.torch._modules as modules

    name, kind, count = f"BatchNorm{rank}", getattr(torch, dtype), 0
    for entry, training in itertools.product(databases[f"nn.{name}"], (True, False)):
        for constructor, input, _ in module_samples_of(entry, kind, training):
            arguments = {"input": input}
            whole = getattr(torch.nn, name)(*constructor.args, **constructor.kwargs, dtype=kind)
            fill(torch, whole)
            if lazy:
                constructor = copy.copy(constructor)
                constructor.args = constructor.args[1:]
            got, expected, exact = (
                run_module(
                    torch,
                    getattr(source, lazy + name),
                    constructor,
                    whole.state_dict(),
                    clones(arguments, wide)["input"],
                    wide or kind,
                    training,
                )
                for source, wide in ((modules, None), (torch.nn, None), (torch.nn, torch.float64))
            )
            assert got.error is None
            statistics = {name: getattr(whole, name) for name in ("running_mean", "running_var", "weight", "eps")}
            trains = training or whole.running_var is None
            magnitudes = magnitudes_of({**arguments, **statistics, "training": trains, "momentum": whole.momentum or 1})
            compare(got, expected, exact, magnitudes)
            count += 1
    print(f"{lazy}{name}, {dtype}: {count} samples")
    assert count >= 28


@pytest.mark.parametrize("rank", ["1d", "2d", "3d"])
def test_the_errors_of_the_modules_are_pytorchs(torch, databases, rank):
    import bnbp.torch

    count = 0
    for entry, training, dtype in itertools.product(databases[f"nn.BatchNorm{rank}"], (True, False), TYPES):
        kind = getattr(torch, dtype)
        for error in entry.module_error_inputs_func(entry, "cpu", kind, False, training):
            sample = error.module_error_input
            inputs = {"input": sample.forward_input.args[0]}
            outcomes = []
            for source in (torch.nn, bnbp.torch):
                module = getattr(source, f"BatchNorm{rank}")(
                    *sample.constructor_input.args, **sample.constructor_input.kwargs, dtype=kind
                )
                module.train(training)
                outcomes.append(outcome_of(lambda given, module=module: module(**given), inputs, {}))
            expected, got = outcomes
            assert got.error == expected.error
            if training:  # PyTorch takes an eps of 0 in evaluation
                with pytest.raises(error.error_type, match=error.error_regex):
                    module(*sample.forward_input.args)
            count += 1
    assert count >= 16
