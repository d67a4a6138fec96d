"""The operators in PyTorch's dispatcher: what they compute, what PyTorch may ask of them, and their derivatives."""

import itertools
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import python

import bnbp

pytestmark = pytest.mark.torch

ACTIVATIONS = [None, "relu", "relu6"]
OPERATORS = [name for name in bnbp.__all__ if name.startswith("batch_norm_")]
TYPES = ["float16", "bfloat16", "float32", "float64"]


@pytest.fixture(scope="module")
def torch():
    import torch

    import bnbp.torch  # noqa: F401  (registers the operators)

    return torch


@pytest.fixture
def data(torch):
    """Tensors of every role, in float64. They need gradients; `normalized` is away from the corners at 0 and 6."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape, least=-2.0, most=8.0):
        values = torch.rand(*shape, dtype=torch.float64, generator=generator)
        return (least + (most - least) * values).requires_grad_()

    x, delta, addend = (tensor(3, 4, 5) for _ in range(3))
    gamma, beta, S, C = (tensor(4) for _ in range(4))
    mean, variance = tensor(4), tensor(4, least=0.5)
    normalized = tensor(3, 4, 5).detach()
    return SimpleNamespace(**{name: value for name, value in locals().items() if isinstance(value, torch.Tensor)})


def arguments(data, activation="relu", given=False, addend=False, mask=(True,) * 4):
    """Of every operator, in the order of its schema."""
    normalized = data.normalized if given else None
    vectors = data.x, data.gamma, data.beta
    statistics = *vectors, data.mean, data.variance
    gradient = 1e-5, activation, addend, list(mask)
    return {
        "batch_norm_training": (*vectors, data.addend if addend else None, 1e-5, activation),
        "batch_norm_training_backprop": (*statistics, data.delta, normalized, *gradient),
        "batch_norm_training_statistics": (data.x,),
        "batch_norm_training_backprop_reduce": (
            *(data.x, data.mean, data.delta, data.gamma, data.beta, data.variance, normalized),
            *gradient[:3],
        ),
        "batch_norm_training_backprop_apply": (*statistics, data.delta, data.S, data.C, normalized, 20, *gradient),
        "batch_norm_inference": (*statistics, data.addend if addend else None, 1e-5, activation),
        "batch_norm_inference_backprop": (*statistics, data.delta, normalized, *gradient),
    }


def test_every_operator_is_in_the_dispatcher_with_the_inputs_of_its_page(torch, data):
    from bnbp.torch._library import OPERATORS as THEIRS

    assert sorted(THEIRS) == sorted(OPERATORS)
    assert arguments(data).keys() == set(OPERATORS)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by PyTorch 2.14 itself
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", OPERATORS)
def test_pytorch_finds_nothing_wrong(torch, data, name, activation, given):
    """Schema, fake kernels with dynamic shapes, autograd, and what `torch.compile` makes of it."""
    operator = getattr(torch.ops.bnbp, name).default
    for addend, mask in ((False, (True, True, True, False)), (given, (False, True, False, True))):
        results = torch.library.opcheck(operator, arguments(data, activation, given, addend, mask)[name])
        assert set(results.values()) == {"SUCCESS"}
        assert len(results) == 4


@pytest.mark.parametrize("layout", ["first", "last", "any"])
@pytest.mark.parametrize("dtype", TYPES)
def test_the_bits_are_those_of_the_functions_on_arrays(torch, dtype, layout):
    """In any layout and every type, with every option: the same kernels are called with the same arguments."""
    generator = torch.Generator().manual_seed(1)
    kind = getattr(torch, dtype)

    def tensor(*shape):
        value = (2 * torch.randn(*shape, generator=generator) + 1).to(kind)
        if layout == "last":
            return value.to(memory_format=torch.channels_last)
        return value.transpose(0, 3).contiguous().transpose(0, 3)[:, ::2] if layout == "any" else value[:, ::2]

    def array(value):
        if isinstance(value, list):
            return list(map(array, value))
        return value if not isinstance(value, torch.Tensor) else bnbp_array(torch, value)

    x, delta, addend = (tensor(5, 6, 7, 3) for _ in range(3))
    channels = x.shape[1]
    parameter = torch.float32 if dtype == "bfloat16" else kind
    gamma, beta, mean = torch.randn(3, channels, generator=generator).to(parameter)
    variance = torch.rand(channels, generator=generator).to(parameter) + 0.5
    operators, tensors = torch.ops.bnbp, (x, gamma, beta)
    for activation in ACTIVATIONS:
        forward = operators.batch_norm_training(*tensors, addend, 1e-3, activation)
        expected = bnbp.batch_norm_training(*map(array, tensors), 1e-3, activation=activation, addend=array(addend))
        assert_same_bits(torch, forward, expected)
        normalized = operators.batch_norm_inference(*tensors, mean, variance, None, 1e-3, activation)
        statistics = *map(array, tensors), array(mean), array(variance)
        assert_same_bits(torch, [normalized], [bnbp.batch_norm_inference(*statistics, 1e-3, activation=activation)])
        for kind_of in ("training", "inference"):
            name = f"batch_norm_{kind_of}_backprop"
            for given, with_addend in itertools.product((None, normalized), (False, True)):
                if given is None and with_addend and activation:
                    continue
                mask = [True, True, True, with_addend]
                got = getattr(operators, name)(
                    *tensors, mean, variance, delta, given, 1e-3, activation, with_addend, mask
                )
                options = {"activation": activation, "normalized": array(given), "addend": with_addend}
                expected = getattr(bnbp, name)(*statistics, array(delta), 1e-3, **options)
                assert_same_bits(torch, got[: len(expected)], expected)
                assert with_addend or got[3].shape == (0,)


def bnbp_array(torch, tensor):
    """The same memory as an array; NumPy has no bfloat16 of its own."""
    if tensor.dtype is torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def assert_same_bits(torch, tensors, arrays):
    for tensor, array in zip(tensors, arrays, strict=True):
        assert bnbp_array(torch, tensor.contiguous()).tobytes() == np.ascontiguousarray(array).tobytes()


def test_the_halves_are_the_whole(torch, data):
    """Two parts of a batch, as two processes have them; the oracle is PyTorch's autograd on the whole batch."""
    operators = torch.ops.bnbp
    x, gamma, delta = data.x, data.gamma, data.delta.detach()
    normalized = torch.nn.functional.batch_norm(x, None, None, gamma, data.beta, training=True)
    expected = torch.autograd.grad(torch.relu(normalized), (x, gamma, data.beta), delta)
    parts = [slice(0, 1), slice(1, 3)]
    statistics = [operators.batch_norm_training_statistics(x[part]) for part in parts]
    merged = bnbp.merge_statistics(
        *(
            bnbp.BatchNormStatistics(5 * (part.stop - part.start), mean.detach().numpy(), m2.detach().numpy())
            for part, (mean, m2) in zip(parts, statistics, strict=True)
        )
    )
    mean, variance = torch.from_numpy(merged.mean), torch.from_numpy(merged.variance)
    rest = gamma, data.beta, variance, None, 1e-5, "relu", False
    sums = [operators.batch_norm_training_backprop_reduce(x[part], mean, delta[part], *rest) for part in parts]
    S, C = map(sum, zip(*sums, strict=True))
    whole = [
        operators.batch_norm_training_backprop_apply(
            *(x[part], gamma, data.beta, mean, variance, delta[part], S, C, None, 15, 1e-5, "relu")
        )
        for part in parts
    ]
    torch.testing.assert_close(torch.cat([each[0] for each in whole]), expected[0])
    for each in whole:
        torch.testing.assert_close(each[1], expected[1])
        torch.testing.assert_close(each[2], expected[2])


# ---------------------------------------------------------------- derivatives

MASKS = [mask for mask in itertools.product((True, False), repeat=3) if any(mask)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_addend", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_first_and_second_derivatives_are_those_of_finite_differences(torch, data, activation, with_addend, training):
    """Of `batch_norm`, with respect to all it is given."""
    statistics = [None, None] if training else [data.mean.detach(), data.variance.detach()]

    def function(x, gamma, beta, addend):
        options = {"training": training, "activation": activation, "addend": addend}
        return bnbp.torch.batch_norm(x, *statistics, gamma, beta, **options)

    inputs = data.x, data.gamma, data.beta, data.addend if with_addend else None
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_second_derivative_is_right_for_every_combination_of_outputs(torch, data, activation, mask):
    """Against PyTorch's autograd through the formula, which it differentiates term by term."""
    vectors = data.gamma, data.beta

    def by_operator(x, gamma, beta, delta):
        # The statistics are the batch's own: the operator's gradient with respect to `input` goes through them.
        mean, variance = x.detach().mean((0, 2)), x.detach().var((0, 2), unbiased=False)
        backprop = torch.ops.bnbp.batch_norm_training_backprop
        outputs = backprop(x, gamma, beta, mean, variance, delta, None, 1e-5, activation, False, [*mask, False])
        return [output for output, wanted in zip(outputs, mask, strict=False) if wanted]

    def by_autograd(x, gamma, beta, delta):
        y = torch.nn.functional.batch_norm(x, None, None, gamma, beta, training=True)
        y = y if activation is None else getattr(torch.nn.functional, activation)(y)
        outputs = torch.autograd.grad(y, (x, gamma, beta), delta, create_graph=True)
        return [output for output, wanted in zip(outputs, mask, strict=True) if wanted]

    def second(outputs):
        weighted = sum(
            (output * (k + torch.arange(output.numel()).view_as(output)).sin()).sum()
            for k, output in enumerate(outputs)
        )
        return torch.autograd.grad(weighted, (data.x, data.gamma, data.delta), allow_unused=True)

    got = second(by_operator(data.x, *vectors, data.delta))
    expected = second(by_autograd(data.x, *vectors, data.delta))
    assert expected[2] is not None
    for ours, theirs in zip(got, expected, strict=True):
        zero = torch.zeros(1, dtype=torch.float64)
        torch.testing.assert_close(
            *torch.broadcast_tensors(zero if ours is None else ours, zero if theirs is None else theirs)
        )


@pytest.mark.parametrize(("activation", "given", "with_addend"), [
    (None, False, False), (None, False, True), ("relu", False, False), ("relu", True, True), ("relu6", False, False),
    ("relu6", True, False), ("relu6", True, True),
])  # fmt: skip
@pytest.mark.parametrize("name", ["reduce", "apply", "inference"])
def test_the_derivatives_of_the_halves_and_of_inference(torch, data, name, activation, given, with_addend):
    """By finite differences, with respect to every tensor that an output is a smooth function of."""
    name = "batch_norm_inference_backprop" if name == "inference" else f"batch_norm_training_backprop_{name}"
    whole = arguments(data, activation, given, with_addend, (True, True, True, with_addend))[name]
    outputs = 2 if name.endswith("reduce") else 4 if with_addend else 3
    smooth = [k for k, value in enumerate(whole) if isinstance(value, torch.Tensor) and value is not data.beta]

    def function(*tensors):
        filled = list(whole)
        for k, tensor in zip(smooth, tensors, strict=True):
            filled[k] = tensor
        return getattr(torch.ops.bnbp, name)(*filled)[:outputs]

    assert torch.autograd.gradcheck(function, tuple(whole[k] for k in smooth))


def test_the_derivatives_of_the_statistics(torch, data):
    assert torch.autograd.gradcheck(torch.ops.bnbp.batch_norm_training_statistics, (data.x,))
    assert torch.autograd.gradgradcheck(torch.ops.bnbp.batch_norm_training_statistics, (data.x,))


def test_the_forward_operators_derivatives_for_mean_and_variance(torch, data):
    function = lambda mean, variance: torch.ops.bnbp.batch_norm_inference(  # noqa: E731
        data.x, data.gamma, data.beta, mean, variance, None, 1e-5, "relu"
    )
    assert torch.autograd.gradcheck(function, (data.mean, data.variance))
    assert torch.autograd.gradgradcheck(function, (data.mean, data.variance))


# ---------------------------------------------------------------- errors, memory, the process


@pytest.mark.parametrize(("change", "message"), [
    ({1: "short"}, r"gamma: expected shape \(4,\) for the 4 channels of input \(3, 4, 5\), got \(3,\)"),
    ({5: -1.0}, "epsilon: expected a finite number >= 0, got -1"),
    ({6: "tanh"}, 'activation: expected None, "relu" or "relu6", got "tanh"'),
    ({0: "integers"}, "input: expected float16, bfloat16, float32 or float64"),
])  # fmt: skip
def test_the_operators_say_what_is_wrong(torch, data, change, message):
    given = dict(enumerate([data.x, data.gamma, data.beta, data.mean, data.variance, 1e-5, None]))
    wrong = {"short": data.gamma[:3], "integers": data.x.to(torch.int32)}
    given.update({k: wrong.get(v, v) if isinstance(v, str) else v for k, v in change.items()})
    *tensors, epsilon, activation = given.values()
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        torch.ops.bnbp.batch_norm_inference(*tensors, None, epsilon, activation)


def test_no_call_keeps_memory():
    """Tensors, strings and lists that come on PyTorch's stack belong to the kernel, also when it fails."""
    code = """
import torch, bnbp.torch
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])
x = torch.randn(64, 16, 16)
g = torch.ones(16)
m, v = torch.zeros(16), torch.ones(16)
wrong = torch.ones(3)
def work(n):
    for _ in range(n):
        torch.ops.bnbp.batch_norm_training(x, g, g, x, 1e-5, "relu")
        torch.ops.bnbp.batch_norm_training_backprop(x, g, g, m, v, x, x, 1e-5, "relu6", True, [True] * 4)
        try:
            torch.ops.bnbp.batch_norm_training(x, wrong, None, None, 1e-5, "relu")
        except ValueError:
            pass
work(2000)
before = peak()
work(20000)
print(peak() - before < 2000)
"""
    assert python(code) == "True"


def test_without_pytorch_the_import_says_so(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    code = "import bnbp.torch"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.stderr.strip().endswith(
        "ImportError: bnbp.torch: PyTorch is missing; install it with `pip install torch`"
    )


def test_an_older_pytorch_is_refused(tmp_path):
    (tmp_path / "torch.py").write_text("__version__ = '2.9.1+cpu'\n")
    code = "import bnbp.torch"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.stderr.strip().endswith("ImportError: bnbp.torch: expected PyTorch 2.10 or later, got 2.9.1+cpu")


def test_the_core_does_not_import_pytorch():
    assert python("import sys, bnbp; print('torch' in sys.modules, 'bnbp.torch' in sys.modules)") == "False False"


def test_the_number_of_threads_changes_no_bit_and_is_pytorchs(torch):
    """Seen in a process of its own: with one thread, no other one is started."""
    code = """
import os, torch, bnbp.torch
x = torch.randn(16, 32, 40, 40)
results = []
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    y, mean, variance = torch.ops.bnbp.batch_norm_training(x, None, None)
    dx, *_ = torch.ops.bnbp.batch_norm_training_backprop(x, None, None, mean, variance, y, None, 1e-5)
    results.append((y.numpy().tobytes(), dx.numpy().tobytes(), len(os.listdir("/proc/self/task"))))
started = [tasks - results[0][2] for *_, tasks in results]
print(len({(y, dx) for y, dx, _ in results}), started)
"""
    assert python(code) == "1 [0, 1, 2]"
