"""The modules: what PyTorch's have, do, keep and refuse, and what other parts of PyTorch do with them."""

import copy
import inspect
import io
import pickle

import pytest

pytestmark = [
    pytest.mark.torch,
    # PyTorch's own use of it, when parts of it are imported for the first time.
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

RANKS = ["1d", "2d", "3d"]
TYPES = ["float16", "bfloat16", "float32", "float64"]
SHAPES = {"1d": (4, 3, 5), "2d": (4, 3, 5, 2), "3d": (4, 3, 2, 3, 2)}


@pytest.fixture(scope="module")
def torch():
    import torch

    import bnbp.torch  # noqa: F401

    return torch


@pytest.fixture(params=RANKS)
def rank(request):
    return request.param


@pytest.fixture
def pair(torch, rank):
    """Makes PyTorch's module and ours, with the same state; and a batch that fits, if it is called for one."""
    from bnbp.torch import _modules

    def make(*args, lazy="", activation=None, **kwargs):
        name = f"{lazy}BatchNorm{rank}"
        theirs = getattr(torch.nn, name)(*args, **kwargs)
        ours = getattr(_modules, name)(*args, **kwargs, **({"activation": activation} if activation else {}))
        if not lazy:
            with torch.no_grad():
                for k, value in enumerate((*theirs.parameters(), theirs.running_mean, theirs.running_var)):
                    if value is not None:
                        value.copy_(torch.linspace(0.5, 1.5 + k, len(value)))
            ours.load_state_dict(theirs.state_dict())
        return theirs, ours

    return make


def batch(torch, rank, dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPES[rank], generator=generator, dtype=torch.float64).to(dtype or torch.float32)


def trained(torch, module, rank, count=3, dtype=None):
    """What a module gives and is after some steps of training and an evaluation."""
    parameters = list(module.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1) if parameters else None
    results = []
    for seed in range(count):
        x = batch(torch, rank, dtype, seed).requires_grad_()
        module.train()
        (module(x).float() ** 3).mean().backward()
        results.append(x.grad)
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
    module.eval()
    with torch.no_grad():
        results.append(module(batch(torch, rank, dtype)))
    return results, dict(module.state_dict())


def assert_alike(torch, ours, theirs, **tolerance):
    torch.testing.assert_close(ours, theirs, **tolerance)


# ---------------------------------------------------------------- construction


def test_the_modules_are_pytorchs_and_have_its_defaults(torch, rank, pair):
    theirs, ours = pair(3)
    assert isinstance(ours, type(theirs))
    for name in ("num_features", "eps", "momentum", "affine", "track_running_stats", "training"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.activation is None
    fresh, reference = type(ours)(3), type(theirs)(3)
    assert_alike(torch, dict(fresh.state_dict()), dict(reference.state_dict()), rtol=0, atol=0)


def test_the_signature_is_pytorchs_with_an_activation(rank, pair):
    theirs, ours = (
        [(each.name, each.kind, each.default) for each in inspect.signature(type(module)).parameters.values()]
        for module in pair(3)
    )
    assert ours == [*theirs, ("activation", inspect.Parameter.KEYWORD_ONLY, None)]


def test_all_arguments_may_be_given_by_position(torch, rank, pair):
    theirs, ours = pair(3, 1e-3, 0.2, True, True, "cpu", torch.float64)
    assert ours.extra_repr() == theirs.extra_repr()
    assert ours.weight.dtype is torch.float64


OPTIONS = [
    {},
    {"momentum": None},
    {"momentum": 0.7, "eps": 0.1},
    {"momentum": 0.0},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_and_evaluation_are_pytorchs(torch, rank, pair, options):
    """Gradients, parameters, running statistics and the number of batches."""
    theirs, ours = pair(3, dtype=torch.float64, **options)
    expected, got = (trained(torch, module, rank, dtype=torch.float64) for module in (theirs, ours))
    assert_alike(torch, got, expected)
    if ours.track_running_stats:
        assert got[1]["num_batches_tracked"] == 3
        assert got[1]["num_batches_tracked"].dtype is torch.int64


@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_is_trained(torch, rank, pair, dtype):
    """Parameters and statistics keep the type."""
    kind = getattr(torch, dtype)
    theirs, ours = (module.to(kind) for module in pair(3))
    expected, got = (trained(torch, module, rank, dtype=kind) for module in (theirs, ours))
    bound = 16 * torch.finfo(kind).eps
    assert_alike(torch, got, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float32_modules_take_batches_of_16_bits(torch, rank, pair, dtype):
    kind = getattr(torch, dtype)
    theirs, ours = pair(3)
    expected, got = (trained(torch, module, rank, dtype=kind) for module in (theirs, ours))
    assert got[1]["running_mean"].dtype is torch.float32
    assert_alike(torch, got[0], expected[0], rtol=4 * torch.finfo(kind).eps, atol=4 * torch.finfo(kind).eps)
    assert_alike(torch, got[1], expected[1], rtol=1e-3, atol=1e-3)


def test_without_running_statistics_an_evaluation_uses_the_batch(torch, rank, pair):
    _, ours = pair(3, track_running_stats=False, affine=False)
    x = batch(torch, rank)
    assert_alike(torch, ours.eval()(x), ours.train()(x), rtol=0, atol=0)


def test_statistics_that_are_not_tracked_any_more_are_used_as_pytorch_uses_them(torch, rank, pair):
    """The flag may be changed later, and the number of batches may be taken away."""
    outcomes = []
    for module in pair(3):
        module.track_running_stats = False
        x = batch(torch, rank)
        outcomes.append([module(x), module.running_mean.clone(), module.eval()(x)])
        module.track_running_stats, module.num_batches_tracked = True, None
        outcomes[-1] += [module.train()(x), module.running_mean]
    assert_alike(torch, *outcomes)


@pytest.mark.parametrize("shape", [
    (), (3,), (1, 3), (4, 3), (4, 3, 5), (4, 5, 3), (4, 3, 2, 2), (4, 3, 2, 2, 2), (1, 3, 1), (1, 3, 1, 1),
    (4, 2, 2, 2), (0, 3, 2), (0, 3, 2, 2), (2, 3, 1, 1, 1, 1),
])  # fmt: skip
@pytest.mark.parametrize("training", [True, False])
def test_the_same_shapes_are_taken_and_the_same_refused(torch, rank, pair, shape, training):
    outcomes = []
    for module in pair(3):
        module.train(training)
        try:
            outcomes.append([module(torch.linspace(-1, 1, 1).expand(shape).clone()), *module.buffers()])
        except Exception as error:
            outcomes.append(f"{type(error).__name__}: {error}")
    theirs, ours = outcomes
    if isinstance(theirs, str):
        assert ours == theirs
    else:
        assert_alike(torch, ours, theirs)


def test_a_batch_that_is_refused_is_counted_as_pytorch_counts_it(torch, rank, pair):
    for module in pair(3):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            module(torch.ones(1, 3, *[1] * (len(SHAPES[rank]) - 2)))
    expected = dict(pair(3)[0].state_dict()) | {"num_batches_tracked": torch.tensor(1)}
    assert_alike(torch, dict(module.state_dict()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_the_activation_and_the_addend_follow(torch, rank, pair, activation):
    """In training and in evaluation; an activation may be given to a call, or to the module."""
    theirs, ours = pair(3, activation=activation)
    _, plain = pair(3)
    x, addend = 4 * batch(torch, rank), 4 * batch(torch, rank, seed=1)
    function = getattr(torch.nn.functional, activation)
    for training in (True, False):
        for module in (theirs, ours, plain):
            module.train(training)
        expected, got, given = function(theirs(x) + addend), ours(x, addend), plain(x, addend, activation)
        assert_alike(torch, got, expected)
        assert_alike(torch, given, got, rtol=0, atol=0)


def test_an_unknown_activation_is_refused(rank, pair):
    with pytest.raises(ValueError, match='activation: expected None, "relu" or "relu6", got \'gelu\''):
        pair(3, activation="gelu")


def test_the_representation_is_pytorchs_with_the_activation(torch, rank, pair):
    for options in OPTIONS:
        theirs, ours = pair(3, **options)
        assert repr(ours) == repr(theirs)
        assert repr(torch.nn.Sequential(ours)) == repr(torch.nn.Sequential(theirs))
    theirs, ours = pair(3, activation="relu")
    assert repr(ours) == repr(theirs)[:-1] + ", activation='relu')"


# ---------------------------------------------------------------- state


def test_the_state_goes_either_way(torch, rank, pair):
    """With nothing missing or left over, and with the version by which PyTorch tells old states."""
    theirs, ours = pair(3)
    trained(torch, ours, rank)
    state = ours.state_dict()
    assert list(state) == list(theirs.state_dict())
    assert state._metadata == theirs.state_dict()._metadata
    assert theirs.load_state_dict(state, strict=True) is not None
    assert_alike(torch, theirs.eval()(batch(torch, rank)), ours.eval()(batch(torch, rank)))
    fresh = type(ours)(3)
    fresh.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    assert_alike(torch, dict(fresh.state_dict()), dict(state), rtol=0, atol=0)


def test_an_old_state_has_no_number_of_batches(torch, rank, pair):
    """As PyTorch 0.4 saved it; the module keeps its own number then."""
    theirs, ours = pair(3)
    state = theirs.state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    ours.num_batches_tracked += 5
    ours.load_state_dict(state)
    assert ours.num_batches_tracked == 5


@pytest.mark.parametrize("way", ["pickle", "deepcopy", "copy", "torch.save"])
def test_a_copy_is_the_same_and_apart(torch, rank, pair, way):
    _, ours = pair(3, 0.1, 0.3, activation="relu6")
    ours.eval()
    if way == "pickle":
        copied = pickle.loads(pickle.dumps(ours))
    elif way == "torch.save":
        buffer = io.BytesIO()
        torch.save(ours, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    else:
        copied = getattr(copy, way)(ours)
    assert type(copied) is type(ours)
    assert repr(copied) == repr(ours)
    assert not copied.training
    x = 9 * batch(torch, rank)
    assert_alike(torch, copied(x), ours(x), rtol=0, atol=0)
    if way != "copy":
        trained(torch, copied, rank)
        assert ours.num_batches_tracked == 0


def test_reset_begins_again(torch, rank, pair):
    _, ours = pair(3)
    trained(torch, ours, rank)
    ours.reset_parameters()
    assert_alike(torch, dict(ours.state_dict()), dict(type(ours)(3).state_dict()), rtol=0, atol=0)


def test_moves_between_types_and_devices(torch, rank, pair):
    """The meta device gives shapes and types; what comes back from it has memory."""
    for change in ("half", "bfloat16", "double", "float", "cpu"):
        theirs, ours = (getattr(module, change)() for module in pair(3))
        assert [value.dtype for value in ours.state_dict().values()] == [
            value.dtype for value in theirs.state_dict().values()
        ]
    theirs, ours = (module.to("meta") for module in pair(3))
    x = batch(torch, rank).to("meta")
    for training in (True, False):
        got, expected = ours.train(training)(x), theirs.train(training)(x)
        assert (got.device, got.shape, got.stride(), got.dtype) == (
            expected.device, expected.shape, expected.stride(), expected.dtype
        )  # fmt: skip
    ours = ours.to_empty(device="cpu")
    ours.reset_parameters()
    assert ours.train()(batch(torch, rank)).isfinite().all()
    with torch.device("meta"):
        assert type(ours)(3).weight.is_meta
    assert not torch.nn.utils.skip_init(type(ours), 3).weight.is_meta


def test_memory_may_be_shared_and_in_another_format(torch, rank, pair):
    _, ours = pair(3)
    ours.share_memory()
    before = ours.running_mean.data_ptr()
    trained(torch, ours, rank)
    assert ours.running_mean.data_ptr() == before
    assert ours.running_mean.is_shared()


# ---------------------------------------------------------------- lazy modules


def test_a_lazy_module_becomes_ours_with_its_first_batch(torch, rank, pair):
    """And computes that batch as ours."""
    theirs, ours = pair(lazy="Lazy", eps=0.1)
    assert isinstance(ours.weight, torch.nn.UninitializedParameter)
    x = batch(torch, rank)
    y = ours(x)
    assert_alike(torch, y, theirs(x))
    assert type(ours) is type(pair(3)[1])
    assert ours.activation is None
    assert repr(ours) == repr(theirs)
    assert_alike(torch, dict(ours.state_dict()), dict(theirs.state_dict()))
    assert_alike(torch, ours(x), y, rtol=0, atol=0)


def test_a_lazy_module_takes_a_state_and_is_pickled(torch, rank, pair):
    """Before its first batch."""
    _, filled = pair(3)
    _, lazy = pair(lazy="Lazy")
    lazy = pickle.loads(pickle.dumps(lazy))
    lazy.load_state_dict(filled.state_dict())
    x = batch(torch, rank)
    assert_alike(torch, lazy.eval()(x), filled.eval()(x), rtol=0, atol=0)


# ---------------------------------------------------------------- what PyTorch does with modules


def test_hooks_see_what_pytorchs_see(torch, rank, pair):
    """Before and after, forwards and backwards; what a hook returns takes the place."""
    outcomes = []
    for module in pair(3, dtype=torch.float64):
        seen = []
        module.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args) or (2 * args[0],))
        module.register_forward_hook(lambda module, args, output, seen=seen: seen.append((args, output)) or output + 1)
        module.register_full_backward_pre_hook(lambda module, grad, seen=seen: seen.append(grad))
        module.register_full_backward_hook(lambda module, inputs, outputs, seen=seen: seen.append((inputs, outputs)))
        x = batch(torch, rank, torch.float64).requires_grad_()
        y = module(x)
        (y**2).sum().backward()
        outcomes.append([seen, y, x.grad])
    theirs, ours = outcomes
    assert len(ours[0]) == 4
    assert_alike(torch, ours, theirs)


def test_parameters_are_frozen(torch, rank, pair):
    """Without gradients for them, the input's is the same."""
    outcomes = []
    for module in pair(3, dtype=torch.float64):
        module.requires_grad_(False)
        x = batch(torch, rank, torch.float64).requires_grad_()
        (module(x) ** 3).sum().backward()
        outcomes.append([x.grad, module.weight.grad is None])
    assert_alike(torch, outcomes[1][0], outcomes[0][0])
    assert outcomes[1][1]


def test_the_statistics_are_made_again_for_averaged_weights(torch, rank, pair):
    """By ``torch.optim.swa_utils``, which finds batch norms by their type, and sets the momentum to None."""
    from torch.optim.swa_utils import AveragedModel, update_bn

    outcomes = []
    for module in pair(3):
        averaged = AveragedModel(torch.nn.Sequential(module))
        update_bn([batch(torch, rank, seed=seed) for seed in range(3)], averaged)
        outcomes.append(dict(averaged.module[0].state_dict()))
        assert averaged.module[0].momentum == 0.1
    theirs, ours = outcomes
    assert_alike(torch, ours, theirs)


def test_models_are_made_functions_and_stacked(torch, rank, pair):
    """An ensemble by `vmap`, with the gradients of each model, in training and in evaluation."""
    from torch.func import functional_call, grad, stack_module_state, vmap

    outcomes = []
    for module in pair(3, dtype=torch.float64):
        models = [copy.deepcopy(module) for _ in range(3)]
        with torch.no_grad():
            for k, each in enumerate(models):
                each.weight.mul_(k + 1)
        results = []
        for training in (True, False):
            for each in models:
                each.train(training)
            parameters, buffers = stack_module_state(models)
            x = torch.stack([batch(torch, rank, torch.float64, seed) for seed in range(3)])

            def loss(parameters, buffers, x, model=models[0]):
                return (functional_call(model, (parameters, buffers), (x,)) ** 3).mean()

            results += [vmap(loss)(parameters, buffers, x), vmap(grad(loss))(parameters, buffers, x), buffers]
        outcomes.append(results)
    theirs, ours = outcomes
    assert_alike(torch, ours, theirs)


def test_batch_norms_are_replaced_for_vmap(torch, rank, pair):
    _, ours = pair(3)
    torch.func.replace_all_batch_norm_modules_(torch.nn.Sequential(ours))
    assert ours.running_mean is None
    x = batch(torch, rank)
    together = torch.func.vmap(ours)(torch.stack([x, 2 * x]))
    assert_alike(torch, together, torch.stack([ours(x), ours(2 * x)]))


def test_batch_norms_of_several_processes_take_their_place(torch, rank, pair):
    theirs, ours = (torch.nn.SyncBatchNorm.convert_sync_batchnorm(module) for module in pair(3))
    assert type(ours) is type(theirs) is torch.nn.SyncBatchNorm
    assert_alike(torch, dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)


# ---------------------------------------------------------------- tracing


def test_in_a_symbolic_trace_a_module_is_one_node(torch, rank, pair):
    """As PyTorch's are; it counts its batches when the graph runs, and may be put into evaluation later."""
    _, ours = pair(3, activation="relu")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(ours, copy.deepcopy(ours))

        def forward(self, x):
            return self.layers[1](self.layers(x), x) + 1

    model = Model()
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == [
        "layers.0", "layers.1", "layers.1"
    ]  # fmt: skip
    assert traced.layers.get_submodule("0").num_batches_tracked == 0
    x = batch(torch, rank)
    for training in (True, False):
        assert_alike(torch, traced.train(training)(x), model.train(training)(x), rtol=0, atol=0)
    assert_alike(torch, dict(traced.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_module_is_one_graph_and_trains_the_same(torch, training, options):
    from bnbp.torch import BatchNorm2d

    torch._dynamo.reset()
    plain = BatchNorm2d(3, activation="relu", dtype=torch.float64, **options).train(training)
    compiled = copy.deepcopy(plain)
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        outcomes = []
        for module, function in ((plain, plain), (compiled, call)):
            module.zero_grad()
            x, addend = (batch(torch, "2d", torch.float64, seed + k).requires_grad_() for k in range(2))
            y = function(x, addend)
            (y**2).sum().backward()
            gradients = [value.grad for value in (x, addend, *module.parameters())]
            outcomes.append([y, gradients, dict(module.state_dict())])
        assert_alike(torch, outcomes[1], outcomes[0], rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()


def test_the_default_backend_compiles_a_model(torch):
    """Training with gradients; nothing is left for its code generator but what surrounds the batch norm."""
    from bnbp.torch import BatchNorm2d

    torch._dynamo.reset()
    plain = BatchNorm2d(3)
    compiled = copy.deepcopy(plain)
    outcomes = []
    for module, function in ((plain, plain), (compiled, torch.compile(compiled, fullgraph=True))):
        x = batch(torch, "2d").requires_grad_()
        y = function(x)
        y.backward(batch(torch, "2d", seed=1))
        outcomes.append([y, x.grad, module.weight.grad, dict(module.state_dict())])
    assert_alike(torch, outcomes[1], outcomes[0])
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_an_exported_model_gives_the_same_and_updates_its_statistics(torch, training, strict):
    """For batches of any length; what is exported has bnbp's operators, and is saved and loaded."""
    from bnbp.torch import BatchNorm2d

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), BatchNorm2d(4, activation="relu")).train(training)
    x = batch(torch, "2d")
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: length},), strict=strict)
    name = f"bnbp.batch_norm_{'training' if training else 'inference'}.default"
    assert name in {str(node.target) for node in program.graph.nodes}
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module(check_guards=False)
    for length in (4, 3):
        expected, got = model(x[:length]), loaded(x[:length])
        assert_alike(torch, got, expected)
    state = dict(model.state_dict())
    if not training:
        del state["1.num_batches_tracked"]  # which no evaluation uses
    assert_alike(torch, {name: loaded.state_dict()[name] for name in state}, state)
    assert model[1].num_batches_tracked == (2 if training else 0)
