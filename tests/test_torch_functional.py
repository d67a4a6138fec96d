"""`bnbp.torch.batch_norm` beside PyTorch's: memory, errors, modes, gradients, transforms and tracing."""

import math
import threading
from types import SimpleNamespace

import pytest
from conftest import python

pytestmark = [
    pytest.mark.torch,
    # PyTorch's own use of it, when parts of it are imported for the first time.
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

ACTIVATIONS = [None, "relu", "relu6"]
TYPES = ["float16", "bfloat16", "float32", "float64"]


@pytest.fixture(scope="module")
def torch():
    import torch

    import bnbp.torch  # noqa: F401

    return torch


@pytest.fixture
def ours(torch):
    import bnbp.torch

    return bnbp.torch.batch_norm


@pytest.fixture
def theirs(torch):
    def batch_norm(*args, activation=None, addend=None, **kwargs):
        result = torch.nn.functional.batch_norm(*args, **kwargs)
        result = result if addend is None else result + addend
        return result if activation is None else getattr(torch.nn.functional, activation)(result)

    return batch_norm


@pytest.fixture
def data(torch):
    """A batch in float64 with parameters, statistics, an addend and an output's gradient."""
    return data_of(torch, torch.float64)


def data_of(torch, dtype, shape=(4, 3, 5)):
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape, least=-2.0):
        return (least + 4 * torch.rand(*shape, dtype=torch.float64, generator=generator)).to(dtype)

    channels = shape[1]
    return SimpleNamespace(
        x=tensor(*shape),
        addend=tensor(*shape),
        delta=tensor(*shape),
        weight=tensor(channels),
        bias=tensor(channels),
        mean=tensor(channels),
        var=tensor(channels, least=0.5),
    )


def both(theirs, ours, call):
    """What a call gives with PyTorch's function and with ours: a result, or an error's type and text."""
    outcomes = []
    for function in (theirs, ours):
        try:
            outcomes.append(call(function))
        except Exception as error:
            outcomes.append(f"{type(error).__name__}: {error}")
    return outcomes


def assert_equal(torch, got, expected, **tolerance):
    """Values, types and structure; errors by their text."""
    if isinstance(expected, (tuple, list)):
        assert len(got) == len(expected)
        for each in zip(got, expected, strict=True):
            assert_equal(torch, *each, **tolerance)
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(got, expected, equal_nan=True, **tolerance)
    else:
        assert got == expected


def statistics(data, training, always=False):
    """Running statistics that may be changed; in training none, unless they are to be there."""
    return (None, None) if training and not always else (data.mean.clone(), data.var.clone())


# ---------------------------------------------------------------- memory


def layouts(torch, dtype):
    """Tensors of every kind of layout, with names."""
    generator = torch.Generator().manual_seed(0)

    def new(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    def last(*shape):
        return new(*shape).to(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)

    return {
        "2-d": new(6, 4),
        "2-d transposed": new(4, 6).t(),
        "2-d sliced": new(12, 8)[::2, ::2],
        "3-d": new(3, 4, 5),
        "3-d channels last": new(3, 5, 4).transpose(1, 2),
        "3-d reversed": new(5, 4, 3).permute(2, 1, 0),
        "4-d": new(2, 4, 3, 5),
        "4-d channels last": last(2, 4, 3, 5),
        "4-d reversed": new(5, 3, 4, 2).permute(3, 2, 1, 0),
        "4-d channels first": new(4, 2, 3, 5).transpose(0, 1),
        "4-d batch third": new(3, 5, 2, 4).permute(2, 3, 0, 1),
        "5-d": new(2, 4, 3, 5, 2),
        "5-d channels last": last(2, 4, 3, 5, 2),
        "5-d channels last, sliced": last(2, 4, 6, 5, 2)[:, :, ::2],
        "6-d": new(2, 4, 3, 2, 1, 2),
        "6-d channels last": new(2, 3, 2, 1, 2, 4).movedim(-1, 1),
        "batch of 1": new(1, 4, 3, 5),
        "batch of 1, channels last": last(1, 4, 3, 5),
        "width 1": new(3, 4, 5, 1),
        "width 1, channels last": last(3, 4, 5, 1),
        "height 1": new(3, 4, 1, 5),
        "height 1, channels last": last(3, 4, 1, 5),
        "batch and height 1": new(1, 4, 1, 5),
        "batch and height 1, channels last": last(1, 4, 1, 5),
        "every second channel": new(2, 8, 3, 5)[:, ::2],
        "half the channels, channels last": last(2, 8, 3, 5)[:, :4],
        "every second channel, channels last": last(2, 8, 3, 5)[:, ::2],
        "every second column": new(2, 4, 3, 10)[..., ::2],
        "every second column, channels last": last(2, 4, 3, 10)[..., ::2],
        "every second image": new(4, 4, 3, 5)[1::2],
        "every second image, channels last": last(4, 4, 3, 5)[1::2],
        "expanded batch": new(1, 4, 3, 5).expand(3, 4, 3, 5),
        "expanded batch, channels last": last(1, 4, 3, 5).expand(3, 4, 3, 5),
        "expanded channels": new(3, 1, 3, 5).expand(3, 4, 3, 5),
        "expanded columns": new(3, 4, 3, 1).expand(3, 4, 3, 5),
        "expanded positions": new(3, 4, 1, 1).expand(3, 4, 3, 5),
        "expanded number": new(1, 1, 1, 1).expand(3, 4, 3, 5),
        "offset": new(123)[3:].view(2, 4, 3, 5),
        "offset, channels last": new(121)[1:].view(2, 3, 5, 4).permute(0, 3, 1, 2),
        "overlapping": new(40).as_strided((3, 4, 3, 2), (5, 3, 2, 1)),
        # Contiguous in both formats.
        "1 position": new(3, 4, 1, 1),
        "1 position, channels last": last(3, 4, 1, 1),
        "1 channel": new(3, 1, 4, 5),
        "1 channel, channels last": last(3, 1, 4, 5),
        "1 channel and position": new(3, 1, 1, 1),
        "1 position, 5-d, channels last": last(3, 4, 1, 1, 1),
        "1 channel, 5-d, channels last": last(3, 1, 4, 5, 2),
    }


def deltas(torch, output):
    """Gradients of an output in several layouts, as sums, transpositions and other layers leave them."""
    values = torch.linspace(-1, 2, output.numel(), dtype=torch.float64).reshape(output.shape).to(output.dtype)
    reversed_axes = tuple(range(output.dim()))[::-1]
    yield values
    yield values.permute(reversed_axes).contiguous().permute(reversed_axes)
    yield values.reshape(-1)[:1].reshape((1,) * output.dim()).expand(output.shape)
    if output.dim() == 4:
        yield values.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", TYPES)
def test_results_have_the_strides_of_pytorchs_in_every_layout(torch, ours, theirs, dtype, training):
    """And the values: outputs, and gradients from every layout of the output's gradient."""
    kind = getattr(torch, dtype)
    tolerance = 12 * torch.finfo(kind).eps
    for name, x in layouts(torch, kind).items():
        channels = x.shape[1]
        vectors = torch.linspace(0.5, 2, 4 * channels, dtype=torch.float64).view(4, channels)
        spread = x.double().transpose(0, 1).flatten(1).var(1, unbiased=False) if training else vectors[1]
        largest = float(4 * (spread + 1e-5).rsqrt().max())  # of the gradient's terms, which may cancel
        results = []
        for function, wide, exact in ((ours, kind, False), (theirs, kind, False), (theirs, torch.float64, True)):
            # PyTorch's gradient is wrong where the output's has strides that are contiguous by axes of length 1 only.
            leaf = (x.detach().to(wide).contiguous() if exact else x.detach()).requires_grad_()
            mean, var, weight, bias = vectors.to(wide)
            weight.requires_grad_()
            output = function(leaf, mean, var, weight, bias, training=training)
            results.append([output])
            for delta in deltas(torch, output.detach().to(kind)):
                delta = delta.to(wide).clone(memory_format=torch.contiguous_format) if exact else delta
                results[-1] += torch.autograd.grad(output, (leaf, weight), delta, retain_graph=True)
        for got, expected, exact in zip(*results, strict=True):
            assert got.dtype == expected.dtype
            assert got.stride() == expected.stride(), name
            size = max(largest, float(exact.detach().abs().max()))
            error, their_error = (float((each.detach() - exact.detach()).abs().max()) for each in (got, expected))
            assert error <= max(tolerance * size, their_error), name


def recorder():
    """A context that keeps the names of the operators that run below autograd."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        names = ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names += (str(function).rsplit(".", 1)[0],)
            return function(*args, **(kwargs or {}))

    return Recorder()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_call_is_one_operator_and_its_gradient_another(torch, ours, dtype, training, activation):
    """No copy, no conversion, no zeros: whatever the layouts, and with float32 parameters too."""
    kind = getattr(torch, dtype)
    for parameters in {kind, torch.float32} if torch.finfo(kind).bits == 16 else {kind}:
        for x in (each for each in layouts(torch, kind).values() if each.dim() > 2):
            x = x.detach().requires_grad_()
            weight, bias, *vectors = (torch.ones(x.shape[1], dtype=parameters) for _ in range(4))
            for vector in (weight, bias):
                vector.requires_grad_()
            addend = torch.randn(x.shape).to(kind).requires_grad_()
            running = (None, None) if training else vectors
            delta = torch.ones(1, dtype=kind).expand(x.shape)
            with recorder() as mode:
                y = ours(x, *running, weight, bias, training, addend=addend, activation=activation)
                torch.autograd.grad(y, (x, weight, bias, addend), delta)
            name = f"bnbp.batch_norm_{'training' if training else 'inference'}"
            names = [each for each in mode.names if each != "aten.detach"]  # which is a view
            assert names == [name, f"{name}_backprop"], mode.names


def test_the_running_statistics_take_three_operators_on_vectors(torch, ours, data):
    running = statistics(data, True, always=True)
    with recorder() as mode:
        ours(data.x, *running, training=True)
    names = [name for name in mode.names if name != "aten.detach"]
    assert names == ["bnbp.batch_norm_training", "aten.lerp_", "aten.lerp_", "aten.add_"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_tensor_is_copied_on_the_way_in_or_out(dtype):
    """Seen in the most memory that a process ever had: it grows by the results, and by less than half a tensor more."""
    code = f"""
import torch, bnbp.torch
def peak():
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
def tensor(n):
    return torch.ones(64, 48, n, n, dtype=torch.{dtype}).transpose(0, 3)[::2].requires_grad_()
def gradient(y, x):
    return torch.autograd.grad(y, x, torch.ones((), dtype=y.dtype).expand(y.shape))
first, x = tensor(32), tensor(64)
gradient(bnbp.torch.batch_norm(first, None, None, training=True), first)
size = x.numel() * x.element_size()
grown = [peak()]
y = bnbp.torch.batch_norm(x, torch.ones(48), torch.ones(48), torch.ones(48), training=True)
grown.append(peak())
result = gradient(y, x)
grown.append(peak())
print([round((after - before) / size, 1) for before, after in zip(grown, grown[1:])])
"""
    output, gradient = map(float, python(code).strip("[]").split(","))
    assert output < 1.5
    assert gradient < 1.5


# ---------------------------------------------------------------- the activation and the addend


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_addend", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activation_and_the_addend_are_those_of_separate_calls(
    torch, ours, theirs, data, activation, with_addend, training
):
    """Outputs, running statistics and the gradients of every input."""

    def call(function):
        leaves = [value.clone().requires_grad_() for value in (data.x, data.weight, data.bias, data.addend)]
        x, weight, bias, addend = leaves
        running = statistics(data, training, always=True)
        options = {"addend": addend if with_addend else None, "activation": activation}
        y = function(3 * x, *running, weight, bias, training, 0.3, 0.01, **options)
        return y, running, torch.autograd.grad(y, leaves[: 3 + with_addend], data.delta)

    expected, got = both(theirs, ours, call)
    assert_equal(torch, got, expected, rtol=1e-12, atol=1e-12)


def test_an_addend_is_broadcast_and_promoted_as_by_an_addition(torch, ours, theirs, data):
    """In float32, the result too becomes float64 with a float64 addend."""
    x = data.x.float()
    same = data.addend.float()
    for addend in (same[:1], same[0, 0], same[:, :1], data.addend[:1], data.addend, data.addend.int()):
        for activation in ACTIVATIONS:
            leaf = addend.clone().requires_grad_(addend.is_floating_point())

            def call(function, leaf=leaf, activation=activation):
                y = function(x, None, None, training=True, addend=leaf, activation=activation)
                return y, (torch.autograd.grad(y.sum(), leaf) if leaf.requires_grad else ())

            expected, got = both(theirs, ours, call)
            assert isinstance(expected, tuple)
            assert_equal(torch, got, expected)
    expected, got = both(theirs, ours, lambda function: function(x, None, None, training=True, addend=same[:3]))
    assert "must match the size" in expected
    assert got == expected


def test_an_unknown_activation_is_refused_before_anything_is_written(torch, ours, data):
    running = statistics(data, True, always=True)
    with pytest.raises(ValueError, match='activation: expected None, "relu" or "relu6", got \'tanh\''):
        ours(data.x, *running, training=True, activation="tanh")
    assert_equal(torch, running, (data.mean, data.var), rtol=0, atol=0)


# ---------------------------------------------------------------- what runs PyTorch's own code


def ragged(data):
    import torch

    return torch.nested.nested_tensor([data.x[0], data.x[1, :, :2]], layout=torch.jagged)


CALLS = {
    "integers": lambda d, t: {"input": d.x.int()},
    "complex numbers": lambda d, t: {"input": d.x * 1j},
    "no axis": lambda d, t: {"input": d.x[0, 0, 0]},
    "1 axis": lambda d, t: {"input": d.x[0, 0]},
    "no images": lambda d, t: {"input": d.x[:0]},
    "no positions": lambda d, t: {"input": d.x[..., :0]},
    "no channels": lambda d, t: {
        "input": d.x[:, :0], "running_mean": d.mean[:0], "running_var": d.var[:0], "weight": None, "bias": None
    },
    "1 value": lambda d, t: {"input": d.x[:1, :, :1]},
    "too many weights": lambda d, t: {"weight": d.x[0, 0]},
    "too few biases": lambda d, t: {"bias": d.bias[:2]},
    "a matrix of weights": lambda d, t: {"weight": d.weight[:, None]},
    "too many means": lambda d, t: {"running_mean": d.x[0, 0]},
    "too few variances": lambda d, t: {"running_var": d.var[:2]},
    "no statistics": lambda d, t: {"running_mean": None, "running_var": None},
    "no mean": lambda d, t: {"running_mean": None},
    "no variance": lambda d, t: {"running_var": None},
    "a mean that needs a gradient": lambda d, t: {"running_mean": d.mean.clone().requires_grad_()},
    "a variance that needs a gradient": lambda d, t: {"running_var": d.var.clone().requires_grad_()},
    "float32 parameters": lambda d, t: {"weight": d.weight.float(), "bias": d.bias.float()},
    "float32 statistics": lambda d, t: {"running_mean": d.mean.float(), "running_var": d.var.float()},
    "one float32 statistic": lambda d, t: {"running_var": d.var.float()},
    "only float32 statistics": lambda d, t: {
        "running_mean": d.mean.float(), "running_var": d.var.float(), "weight": None, "bias": None
    },
    "float32 input": lambda d, t: {"input": d.x.float()},
    "bfloat16 input": lambda d, t: {"input": d.x.bfloat16()},
    "bfloat16 input and parameters, float32 statistics": lambda d, t: {
        "input": d.x.bfloat16(), "weight": d.weight.bfloat16(), "bias": d.bias.bfloat16(),
        "running_mean": d.mean.float(), "running_var": d.var.float(),
    },
    "eps 0": lambda d, t: {"eps": 0.0},
    "eps -1": lambda d, t: {"eps": -1.0},
    "eps NaN": lambda d, t: {"eps": math.nan},
    "eps infinite": lambda d, t: {"eps": math.inf},
    "integral eps": lambda d, t: {"eps": 1},
    "integral momentum": lambda d, t: {"momentum": 1},
    "momentum None": lambda d, t: {"momentum": None},
    "momentum a tensor": lambda d, t: {"momentum": d.weight[0]},
    "momentum a string": lambda d, t: {"momentum": "0.1"},
    "training an integer": lambda d, t: {"training": int(t)},
    "training None": lambda d, t: {"training": None},
    "input None": lambda d, t: {"input": None},
    "weight a number": lambda d, t: {"weight": 1.0},
    "mean a list": lambda d, t: {"running_mean": [0.0] * 3},
    "sparse": lambda d, t: {"input": d.x.to_sparse()},
    "meta": lambda d, t: {
        "input": d.x.to("meta"), "running_mean": d.mean.to("meta"), "running_var": d.var.to("meta"),
        "weight": d.weight.to("meta"), "bias": d.bias.to("meta"),
    },
    "nested": lambda d, t: {"input": ragged(d)},
    "meta input": lambda d, t: {"input": d.x.to("meta")},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of sparse tensors
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("what", CALLS)
def test_unusual_calls_give_what_pytorch_gives(torch, ours, theirs, data, what, training):
    """A result of the same type and values, or the same error; and the same statistics afterwards."""

    def call(function):
        arguments = {
            "input": data.x,
            "running_mean": data.mean.clone(),
            "running_var": data.var.clone(),
            "weight": data.weight,
            "bias": data.bias,
            "training": training,
        }
        arguments.update(CALLS[what](data, training))
        result = function(**arguments)
        return result, arguments["running_mean"], arguments["running_var"]

    expected, got = both(theirs, ours, call)
    assert_equal(torch, got, expected)


def test_a_subclass_that_takes_over_functions_is_asked(torch, ours, data):
    seen = []

    class Asked(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append((function, len(args), sorted(kwargs or {})))
            return super().__torch_function__(function, types, args, kwargs)

    for changed in ("input", "weight", "addend"):
        arguments = {"input": data.x, "running_mean": data.mean, "running_var": data.var, "weight": data.weight}
        arguments["addend"] = data.addend
        plain = ours(**arguments)
        arguments[changed] = arguments[changed].as_subclass(Asked)
        result = ours(**arguments)
        assert seen[0][0] is ours
        assert type(result) is Asked
        assert_equal(torch, result.as_subclass(torch.Tensor), plain, rtol=0, atol=0)
        seen.clear()


def test_a_subclass_that_wraps_others_gets_pytorchs_operators(torch, ours, data):
    """Such as those of torch.distributed, which know no other operators."""

    class Wrapper(torch.Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl

        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        def __init__(self, inner):
            self.inner = inner

        def __tensor_flatten__(self):
            return ["inner"], None

        @staticmethod
        def __tensor_unflatten__(inner, context, size, stride):
            return Wrapper(inner["inner"])

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            assert function.namespace == "aten"
            results = function(*[arg.inner if isinstance(arg, Wrapper) else arg for arg in args], **(kwargs or {}))
            return tuple(cls(each) if each.dim() > 1 else each for each in results)

    for training in (True, False):
        result = ours(Wrapper(data.x), *statistics(data, training), training=training)
        assert_equal(torch, result.inner, ours(data.x, *statistics(data, training), training=training))


def test_fake_tensors_have_the_shapes_types_and_strides_of_real_ones(torch, ours, data):
    from torch._subclasses import FakeTensorMode

    for name, x in layouts(torch, torch.bfloat16).items():
        for training in (True, False):
            outcomes = []
            for mode in (None, FakeTensorMode()):
                convert = mode.from_tensor if mode else lambda value: value.clone()
                leaf = (mode.from_tensor(x) if mode else x).detach().requires_grad_()
                running = [convert(torch.ones(x.shape[1])) for _ in range(2)]
                weight = convert(torch.ones(x.shape[1])).requires_grad_()
                y = ours(leaf, *running, weight, training=training)
                gradients = torch.autograd.grad(y.sum(), (leaf, weight))
                outcomes.append([(each.shape, each.dtype, each.stride()) for each in (y, *gradients)])
            assert outcomes[0] == outcomes[1], name


# ---------------------------------------------------------------- modes


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "enable_grad"])
def test_gradient_modes_are_kept(torch, ours, theirs, data, mode, training):
    def call(function):
        x = data.x.clone().requires_grad_()
        with getattr(torch, mode)():
            y = function(x, *statistics(data, training), data.weight, data.bias, training)
        return y.requires_grad, y.is_inference(), y.is_leaf, y.detach().clone()

    expected, got = both(theirs, ours, call)
    assert_equal(torch, got, expected)


def test_inference_mode_updates_running_statistics(torch, ours, theirs, data):
    def call(function):
        with torch.inference_mode():
            running = statistics(data, True, always=True)
            return function(data.x, *running, training=True).clone(), *running

    with torch.inference_mode():
        expected, got = both(theirs, ours, call)
        assert_equal(torch, got, expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inside", ["bfloat16", "float16"])
def test_autocast_gives_pytorchs_types(torch, ours, theirs, data, inside, training):
    """For all types of the input and of the parameters; errors for those that do not fit."""
    compared = 0
    for dtype in TYPES:
        for parameters in (*TYPES, None):
            kind, other = (getattr(torch, name or "float32") for name in (dtype, parameters))
            vectors = (None, None) if parameters is None else (data.weight.to(other), data.bias.to(other))
            with torch.autocast("cpu", dtype=getattr(torch, inside)):

                def call(function, kind=kind, other=other, vectors=vectors):
                    leaf = data.x.to(kind).requires_grad_()
                    running = data.mean.to(other), data.var.to(other)
                    y = function(leaf, *running, *vectors, training)
                    return y, torch.autograd.grad(y.sum() * 3, leaf)[0], *running

                expected, got = both(theirs, ours, call)
            if isinstance(expected, str):
                assert got == expected
                continue
            compared += 1
            for mine, their in zip(got, expected, strict=True):
                assert mine.dtype == their.dtype
            assert_equal(torch, got[0].float(), expected[0].float(), rtol=0.02, atol=0.02)
    assert compared >= 8


# ---------------------------------------------------------------- gradients

NEEDED = [[bool(bits >> k & 1) for k in range(4)] for bits in range(16)]


@pytest.mark.parametrize("activation", [None, "relu6"])
@pytest.mark.parametrize("training", [True, False])
def test_only_the_gradients_that_are_needed_are_given(torch, ours, theirs, data, training, activation):
    """All combinations of inputs that need one."""
    for needed in NEEDED:

        def call(function, needed=needed):
            values = [data.x, data.weight, data.bias, data.addend]
            leaves = [value.clone().requires_grad_(need) for value, need in zip(values, needed, strict=True)]
            x, weight, bias, addend = leaves
            options = {"addend": addend, "activation": activation}
            y = function(x, *statistics(data, training), weight, bias, training, **options)
            if y.requires_grad:
                y.backward(data.delta)
            return y.requires_grad, [leaf.grad for leaf in leaves]

        expected, got = both(theirs, ours, call)
        assert_equal(torch, got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("missing", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("training", [True, False])
def test_parameters_may_be_left_out(torch, ours, theirs, data, training, missing):
    def call(function):
        parameters = [data.weight.clone().requires_grad_(), data.bias.clone().requires_grad_()]
        for k in missing:
            parameters[k] = None
        x = data.x.clone().requires_grad_()
        y = function(x, *statistics(data, training), *parameters, training)
        y.backward(data.delta)
        return y, x.grad, [each.grad for each in parameters if each is not None]

    expected, got = both(theirs, ours, call)
    assert_equal(torch, got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch.func of PyTorch 2.14 calls it
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_hessians_and_jacobians_are_pytorchs(torch, ours, theirs, data, training, activation):
    """The Jacobians in either mode."""

    def call(function):
        def loss(x, weight, bias, addend=data.addend[:2]):
            y = function(x, *statistics(data, training), weight, bias, training, addend=addend, activation=activation)
            return (y**3).sum() / 10

        inputs = data.x[:2], data.weight, data.bias
        return (
            torch.autograd.functional.hessian(loss, inputs),
            torch.func.jacrev(loss, (0, 1, 2, 3))(*inputs, data.addend[:2]),
            torch.func.jacfwd(loss, (0, 1, 2))(*inputs),
        )

    expected, got = both(theirs, ours, call)
    assert isinstance(expected, tuple), expected
    assert_equal(torch, got, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("training", [True, False])
def test_third_derivatives_are_those_of_the_formula(torch, ours, data, training):
    """PyTorch's own are others in training: there, the batch's mean and variance are constants in the second one."""

    def formula(x, mean, var, weight, bias, training):
        mean = x.mean((0, 2), keepdim=True) if training else mean.view(1, 3, 1)
        var = ((x - mean) ** 2).mean((0, 2), keepdim=True) if training else var.view(1, 3, 1)
        return (x - mean) / (var + 1e-5).sqrt() * weight.view(1, 3, 1) + bias.view(1, 3, 1)

    def third(function):
        def loss(x, weight):
            return (function(x, *statistics(data, training), weight, data.bias, training) ** 3).sum() / 10

        grad = torch.func.grad
        second = grad(lambda *a: (grad(loss)(*a) ** 2).sum(), 1)
        return grad(lambda *a: (second(*a) ** 2).sum() / 100, (0, 1))(data.x, data.weight)

    assert_equal(torch, third(ours), third(formula), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch.func of PyTorch 2.14 calls it
@pytest.mark.parametrize("training", [True, False])
def test_forward_mode_derivatives_are_pytorchs(torch, ours, theirs, data, training):
    from torch.autograd import forward_ad

    def call(function):
        with forward_ad.dual_level():
            x = forward_ad.make_dual(data.x, data.delta)
            weight = forward_ad.make_dual(data.weight, data.bias)
            y = function(x, *statistics(data, training), weight, data.bias, training, activation="relu")
            return tuple(forward_ad.unpack_dual(y))

    expected, got = both(theirs, ours, call)
    assert isinstance(expected, tuple)
    assert_equal(torch, got, expected)


@pytest.mark.parametrize("what", ["x", "weight"])
@pytest.mark.parametrize("training", [True, False])
def test_a_change_of_an_input_before_the_backward_pass_is_found(torch, ours, theirs, data, training, what):
    def call(function):
        values = {name: (getattr(data, name).clone().requires_grad_() * 1) for name in ("x", "weight")}
        y = function(values["x"], *statistics(data, training), values["weight"], data.bias, training)
        with torch.no_grad():
            values[what].add_(1)
        y.sum().backward()

    expected, got = both(theirs, ours, call)
    for error in (expected, got):
        assert error.startswith("RuntimeError: one of the variables needed for gradient computation has been modified")


def test_a_change_of_the_statistics_by_hand_before_the_backward_pass_is_found(torch, ours, theirs, data):
    def call(function):
        running = statistics(data, False)
        y = function(data.x, *running, data.weight.clone().requires_grad_(), data.bias)
        running[0].add_(1)
        y.sum().backward()

    expected, got = both(theirs, ours, call)
    for error in (expected, got):
        assert error.startswith("RuntimeError: one of the variables needed for gradient computation has been modified")


def test_the_update_of_running_statistics_is_no_such_change(torch, ours, theirs, data):
    """An evaluation, then training with the same statistics, then the gradients of both."""

    def call(function):
        running = statistics(data, False)
        x = data.x.clone().requires_grad_()
        weight = data.weight.clone().requires_grad_()
        before = function(x, *running, weight, data.bias, False)
        y = function(x, *running, weight, data.bias, True)
        after = function(x, *running, weight, data.bias, True)
        y.backward(data.delta)
        after.backward(data.delta)
        trained = x.grad.clone(), weight.grad.clone()
        assert before.requires_grad
        before.backward(data.delta)
        return trained, running

    expected, got = both(theirs, ours, call)
    assert isinstance(expected, tuple), expected
    assert_equal(torch, got, expected)


def test_a_graph_is_used_again_only_if_it_was_kept(torch, ours, theirs, data):
    def call(function, keep):
        x = data.x.clone().requires_grad_()
        y = function(x, None, None, data.weight, data.bias, True)
        y.backward(data.delta, retain_graph=keep)
        y.backward(data.delta)
        return x.grad

    for keep in (True, False):
        expected, got = both(theirs, ours, lambda function, keep=keep: call(function, keep))
        assert isinstance(expected, str) is not keep
        assert_equal(torch, got, expected)


def test_a_checkpointed_call_gives_the_same_gradient(torch, ours, data):
    from torch.utils.checkpoint import checkpoint

    def call(x):
        return ours(x, None, None, data.weight, data.bias, True, activation="relu")

    plain, saved = (data.x.clone().requires_grad_() for _ in range(2))
    call(plain).backward(data.delta)
    checkpoint(call, saved, use_reentrant=False).backward(data.delta)
    assert plain.grad.equal(saved.grad)


def test_several_threads_have_their_own_graphs(torch, ours, data):
    """Gradients are made in the threads that ask for them, with the bits of one thread alone."""
    inputs = [torch.randn(32, 8, 9, generator=torch.Generator().manual_seed(k)) for k in range(6)]

    def gradient(x):
        leaf = x.clone().requires_grad_()
        ours(leaf, None, None, training=True, activation="relu").square().sum().backward()
        return leaf.grad

    alone = list(map(gradient, inputs))
    together = [None] * len(inputs)

    def work(k):
        for _ in range(10):
            together[k] = gradient(inputs[k])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(mine.equal(own) for mine, own in zip(together, alone, strict=True))


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("training", [True, False])
def test_nan_and_infinity_stay_in_their_channels(torch, ours, theirs, dtype, training):
    data = data_of(torch, getattr(torch, dtype))
    x = data.x.clone()
    x[0, 0, 0], x[1, 1, 1] = math.nan, math.inf
    running = statistics(data, training, always=True)

    def call(function):
        leaf = x.clone().requires_grad_()
        mine = [each.clone() for each in running]
        y = function(leaf, *mine, data.weight, data.bias, training, activation="relu")
        y.backward(data.delta)
        return [each.detach().isfinite() for each in (y, leaf.grad, *mine)]

    expected, got = both(theirs, ours, call)
    assert_equal(torch, got, expected)


@pytest.mark.parametrize("types", [*((name, name) for name in TYPES), *((name, "float32") for name in TYPES[:2])])
@pytest.mark.parametrize("affine", [True, False])
def test_running_statistics_are_pytorchs(torch, ours, theirs, types, affine):
    """In their own type, with any momentum; those of 16-bit data are as close to the exact ones, or closer."""
    kind, other = (getattr(torch, name) for name in types)
    data = data_of(torch, torch.float64, (5, 3, 2, 7))
    for momentum in (0.0, 0.1, 0.5, 1.0, 1 / 3, 1.5, -0.5, 1):
        results = []
        for function, data_type, parameter in (
            (ours, kind, other),
            (theirs, kind, other),
            (theirs, torch.float64, torch.float64),
        ):
            running = [each.to(other).to(parameter) for each in (data.mean, data.var)]
            vectors = (data.weight.to(parameter), data.bias.to(parameter)) if affine else (None, None)
            for _ in range(3):
                function(data.x.to(kind).to(data_type), *running, *vectors, True, momentum)
            results.append(running)
        for got, expected, exact in zip(*results, strict=True):
            assert got.dtype == expected.dtype == other
            error, their_error = ((each.double() - exact).abs().max() for each in (got, expected))
            size = (1 + abs(momentum)) ** 3 * 4
            assert error <= max(4 * torch.finfo(other).eps * size, their_error)


def test_the_variance_of_the_running_statistics_is_unbiased_and_that_of_the_batch_is_not(torch, ours):
    """By hand: 1, 2, 6 have the biased variance 14 / 3, and 7 without the bias."""
    x = torch.tensor([[1.0], [2.0], [6.0]], dtype=torch.float64)
    mean, var = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    y = ours(x, mean, var, training=True, momentum=0.25, eps=1 / 3)
    torch.testing.assert_close(mean.item(), 0.75)
    torch.testing.assert_close(var.item(), 0.75 + 0.25 * 7)
    torch.testing.assert_close(y, (x - 3) / 5**0.5)


# ---------------------------------------------------------------- transforms and tracing


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("training", [True, False])
def test_vmap_gives_what_a_loop_gives(torch, ours, theirs, data, training, activation):
    """Over the input, the parameters, both, in two levels, and with gradients on either side."""
    generator = torch.Generator().manual_seed(3)
    xs = torch.randn(2, 3, *data.x.shape, dtype=torch.float64, generator=generator)
    weights = torch.randn(3, 3, dtype=torch.float64, generator=generator)
    vmap, grad = torch.func.vmap, torch.func.grad

    def call(function):
        def apply(x, weight):
            running = statistics(data, training)
            return function(x, *running, weight, data.bias, training, activation=activation)

        def loss(weight, x):
            return (apply(x, weight) ** 3).sum()

        return (
            vmap(apply)(xs[0], weights),
            vmap(apply, (0, None))(xs[0], data.weight),
            vmap(apply, (None, 0))(data.x, weights),
            vmap(apply, (2, 1), out_dims=3)(xs[0].movedim(0, 2), weights.t()),
            vmap(vmap(apply), (0, None))(xs, weights),
            vmap(grad(loss))(weights, xs[0]),
            vmap(grad(loss), (None, 0))(data.weight, xs[0]),
            grad(lambda weight: vmap(loss, (None, 0))(weight, xs[0]).sum())(data.weight),
        )

    expected, got = both(theirs, ours, call)
    assert isinstance(expected, tuple), expected
    assert_equal(torch, got, expected, rtol=1e-9, atol=1e-9)
    assert_equal(torch, got[1], torch.stack([got[1][k] for k in range(3)]))


def test_the_gradients_of_many_outputs_are_made_at_once(torch, ours, theirs, data):
    """Autograd maps its backward pass over them, as `vmap` does."""

    def call(function):
        x = data.x.clone().requires_grad_()
        y = function(x, None, None, data.weight, data.bias, True, activation="relu6")
        return torch.autograd.grad(y, x, torch.stack([data.delta, data.x, data.addend]), is_grads_batched=True)

    expected, got = both(theirs, ours, call)
    assert isinstance(expected, tuple), expected
    assert_equal(torch, got, expected)


def test_vmap_updates_the_running_statistics_of_each_example(torch, ours, theirs, data):
    """As an ensemble of models has them, with gradients and without."""
    xs = torch.randn(6, *data.x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def call(function):
        means, variances = torch.zeros(6, 3, dtype=torch.float64), torch.ones(6, 3, dtype=torch.float64)

        def loss(x, mean, var):
            return (function(x, mean, var, data.weight, data.bias, True) ** 3).sum()

        values = torch.func.vmap(loss)(xs, means, variances)
        gradients = torch.func.vmap(torch.func.grad(loss))(xs, means, variances)
        return values, gradients, means, variances

    expected, got = both(theirs, ours, call)
    assert isinstance(expected, tuple), expected
    assert_equal(torch, got, expected)


def test_vmap_refuses_to_update_statistics_that_the_examples_share(torch, ours, theirs, data):
    xs = data.x.expand(6, *data.x.shape)
    running = statistics(data, True, always=True)
    expected, got = both(
        theirs, ours, lambda function: torch.func.vmap(lambda x: function(x, *running, training=True))(xs)
    )
    assert expected.startswith("RuntimeError: Batch norm got a batched tensor as input while the running_mean")
    assert got == expected
    assert_equal(torch, running, (data.mean, data.var), rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_compiled_in_one_graph_it_gives_the_same(torch, ours, data, training, activation):
    """Results, gradients and running statistics, for new shapes too."""
    torch._dynamo.reset()

    def function(x, mean, var, weight, addend):
        return ours(2 * x, mean, var, weight, data.bias, training, addend=addend, activation=activation).sin()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 4, 3):
        outcomes = []
        for each in (function, compiled):
            leaves = [value.clone().requires_grad_() for value in (data.x[..., :length], data.weight)]
            addend = data.addend[..., :length].clone().requires_grad_()
            running = statistics(data, training, always=True)
            y = each(leaves[0], *running, leaves[1], addend)
            outcomes.append((y, running, torch.autograd.grad(y.sum(), (*leaves, addend))))
        assert_equal(torch, *outcomes, rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()


def test_a_compiled_graph_has_the_operators(torch, ours, data):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def function(x):
        return ours(x, None, None, training=True) + ours(x, data.mean, data.var)

    torch.compile(function, fullgraph=True, backend=backend)(data.x)
    (graph,) = graphs
    targets = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert {"bnbp.batch_norm_training.default", "bnbp.batch_norm_inference.default"} <= targets
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace")
@pytest.mark.parametrize("training", [True, False])
def test_a_trace_has_pytorchs_operator(torch, ours, data, training):
    """It is saved, run where bnbp is not, and exported; and it updates the running statistics."""
    traced = torch.jit.trace(
        lambda x, mean, var: ours(x, mean, var, training=training, activation="relu"),
        (data.x, *statistics(data, training, always=True)),
        check_trace=False,
    )
    assert "aten::batch_norm" in str(traced.graph)
    assert "bnbp" not in str(traced.graph)
    running, expected = (statistics(data, training, always=True) for _ in range(2))
    assert_equal(torch, traced(data.x, *running), ours(data.x, *expected, training=training, activation="relu"))
    assert_equal(torch, running, expected)
