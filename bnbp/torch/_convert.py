"""`convert`: replaces a model's batch norms with bnbp's, and fuses each with what follows it.

A batch norm gets another class, and stays the same object. Fusion does not remove or change a module either, so all
children can still be reached, hooked and called by themselves. Instead, the module whose `forward` calls a batch norm
and then a ReLU gets a `_FusedForward`, which makes one call of the two. Its code is generated from a graph of
``torch.fx``. Three things can make such a graph wrong, and each has its guard:

- `forward` depends on something that changes later: `_Plan.fits` compares it at each call;
- `forward` does something beside calling modules and PyTorch's functions: `_Watch` refuses it;
- a tensor is changed in place between the steps that become one: `_may_be_later` refuses it.

If a guard is in doubt, the module's own `forward` runs.
"""

import copy
import dis
import enum
import functools
import inspect
import operator
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.fx.proxy import Attribute
from torch.nn.modules.module import _has_any_global_hook

from . import _modules, _sync
from ._functional import Activation, activate

__all__ = ["convert"]

Model = TypeVar("Model", bound=nn.Module)

_SWAPS: dict[type, type] = {
    nn.BatchNorm1d: _modules.BatchNorm1d,
    nn.BatchNorm2d: _modules.BatchNorm2d,
    nn.BatchNorm3d: _modules.BatchNorm3d,
    nn.LazyBatchNorm1d: _modules.LazyBatchNorm1d,
    nn.LazyBatchNorm2d: _modules.LazyBatchNorm2d,
    nn.LazyBatchNorm3d: _modules.LazyBatchNorm3d,
    nn.SyncBatchNorm: _sync.SyncBatchNorm,
}
_OURS = tuple(_SWAPS.values())


def convert(module: Model, *, fuse: bool = True, report: bool = False) -> Model:
    """Replace the batch norms of a model with bnbp's, and fuse each with the addition and the ReLU that follow it.

    Parameters
    ----------
    module : torch.nn.Module
        The model, or a batch norm itself. It is changed in place.
    fuse : bool, default True
        Whether a batch norm, an addition and a ReLU become one call where the data flow shows that nothing else uses
        the values in between. Otherwise only the batch norms are replaced.
    report : bool, default False
        Whether to print what was done, a line for each batch norm.

    Returns
    -------
    torch.nn.Module
        `module`.

    Notes
    -----
    Every ``torch.nn.BatchNorm1d``, ``2d``, ``3d`` and ``SyncBatchNorm``, and every lazy one, becomes a module of bnbp.
    It stays the same object: its parameters, buffers and hooks, the state dict and the references of optimisers do not
    change. Subclasses of these classes, parametrised batch norms and scripted modules are not replaced.

    ``bn -> relu``, ``bn -> relu6`` and ``bn -> add -> relu`` are fused, in a ``Sequential`` and in modules whose
    `forward` can be traced by ``torch.fx``. The ReLU may be a module, a function or a method, in place or not. The
    addition may be an operator, a function or a method. All children stay, and compute the same when they are called by
    themselves. A module's own `forward` runs, without the fusion, if

    - `forward` cannot be traced, or does more than to call modules and PyTorch's functions;
    - an attribute that `forward` reads, or a child, is not what it was when the model was converted;
    - the batch norm or the ReLU has a hook, or there is a hook for all modules;
    - an argument is not a tensor, or an optional argument is given.

    So you may set hooks before or after the conversion. To fuse a model that has been changed, or was loaded as a whole
    by ``torch.load``, call `convert` again. Convert a shallow copy of a module by itself. Compile a model after you
    convert it. No other thread may use a module while `convert` runs, because ``torch.fx`` replaces methods of
    ``torch.nn.Module``.

    Examples
    --------
    >>> import torch, bnbp.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.ReLU())
    >>> _ = bnbp.torch.convert(model, report=True)
    module  was                   is                      fused with
    1       torch.nn.BatchNorm1d  bnbp.torch.BatchNorm1d  relu
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    names = {each: name for name, each in module.named_modules()}
    was = {each: type(each) for each in names if _is_batch_norm(each)}
    for each, kind in was.items():
        each.__class__ = _SWAPS.get(kind, kind)
    notes = _fuse_all(names) if fuse else {}
    if report:
        print(_table([(names[each], kind, type(each), notes.get(each, "nothing")) for each, kind in was.items()]))
    return module


def _is_batch_norm(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return "BatchNorm" in getattr(module, "original_name", "")
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _table(rows: list[tuple[str, type, type, str]]) -> str:
    """The report, in columns."""
    lines = [("module", "was", "is", "fused with")]
    lines += [(name or "(itself)", _full_name(was), _full_name(now), note) for name, was, now, note in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _full_name(kind: type) -> str:
    """The name under which users import it."""
    for package, name in ((nn, "torch.nn"), (_modules, "bnbp.torch"), (_sync, "bnbp.torch")):
        if getattr(package, kind.__name__, None) is kind:
            return f"{name}.{kind.__name__}"
    return kind.__qualname__


# ---------------------------------------------------------------- the forward pass of a fused module


class _Absent:
    """Stands for a missing attribute. It is a class, so it is never copied."""


class _Plan:
    """A forward pass with fused calls, and the state of the modules for which it is right."""

    def __init__(self, compute: Callable[..., Any], parameters: list[str]) -> None:
        self.compute = compute
        self.parameters = parameters
        #: Children and attributes of modules that must not have changed. None stands for the module that has the plan.
        #: A reference to itself would keep it from being freed at once.
        self.children: list[tuple[nn.Module | None, list[tuple[str, nn.Module | None]]]] = []
        self.attributes: list[tuple[nn.Module | None, str, Any]] = []
        #: The batch norms and ReLUs that became one call. They must have no hooks.
        self.unhooked: list[nn.Module] = []
        #: Whether training and evaluation have different plans.
        self.depends_on_mode = True
        #: The report's note on each batch norm.
        self.notes: dict[nn.Module, str] = {}

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """The tensors of a call in order, or None if the call does not have exactly the required parameters."""
        if len(args) + len(kwargs) != len(self.parameters):
            return None
        for name in self.parameters[len(args) :]:
            if name not in kwargs:
                return None
            args = (*args, kwargs[name])
        for each in args:
            if not isinstance(each, Tensor):
                return None
        return args

    def fits(self, module: nn.Module) -> bool:
        """Whether nothing has changed, and no hook looks at values that are no longer computed."""
        for owner, children in self.children:
            if [*(module if owner is None else owner)._modules.items()] != children:
                return False
        for owner, name, value in self.attributes:
            now = (module if owner is None else owner).__dict__.get(name, _Absent)
            if now is not value and (type(now) is not type(value) or now != value):
                return False
        for each in self.unhooked:
            if each._forward_hooks or each._forward_pre_hooks or each._backward_hooks or each._backward_pre_hooks:
                return False
        return not _has_any_global_hook()


class _FusedForward:
    """The `forward` of a module, fused where possible. It is an attribute of the module, and is copied with it."""

    def __init__(self, module: nn.Module, plans: dict[bool, _Plan]) -> None:
        self.reference = weakref.ref(module)
        self.forward = type(module).forward  # which was traced
        self.plans = plans  # for training, and for evaluation

    def module(self) -> nn.Module:
        module = self.reference()
        if module is None:
            raise ReferenceError("forward: the module that was converted is gone; expected one that is kept")
        return module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module()
        forward = type(module).forward
        plan = self.plans.get(module.training)
        if plan is not None and forward is self.forward:
            given = plan.arguments(args, kwargs)
            if given is not None and plan.fits(module):
                return plan.compute(module, *given)
        return forward(module, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Attributes of a method, such as its code, are taken from the module's own `forward`."""
        return getattr(self.forward.__get__(self.module()), name)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.forward.__get__(self.module()))

    def __deepcopy__(self, memo: dict[int, Any]) -> "_FusedForward":
        return _FusedForward(copy.deepcopy(self.module(), memo), copy.deepcopy(self.plans, memo))

    def __reduce__(self) -> Any:
        """Leave out the plans, because the classes may have changed when the model is loaded."""
        return _FusedForward, (self.module(), {})


# ---------------------------------------------------------------- which modules are fused


def _fuse_all(modules: Iterable[nn.Module]) -> dict[nn.Module, str]:
    """Fuse the calls of the modules, and note for each batch norm what it was fused with, or why with nothing."""
    fused: dict[nn.Module, str] = {}
    reasons: dict[nn.Module, str] = {}
    for module in modules:
        norms = [each for each in _within_reach(module) if type(each) in _OURS]
        if not norms or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        try:
            plans = _plans(module)
        except _RefusedError as error:
            reasons |= dict.fromkeys(norms, f"nothing: {type(module).__qualname__}.forward {error}")
            continue
        if any(plan.notes for plan in plans.values()):
            module.__dict__["forward"] = _FusedForward(module, plans)
        for norm in norms:
            training, evaluation = (plans[mode].notes.get(norm) for mode in (True, False))
            if training == evaluation and training is not None:
                fused[norm] = training
            elif training is not None or evaluation is not None:
                fused[norm] = f"{training or 'nothing'} in training, {evaluation or 'nothing'} in evaluation"
    return reasons | fused


def _within_reach(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that `forward` may call one by one."""
    for child in module.children():
        yield child
        if isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            yield from _within_reach(child)


def _plans(module: nn.Module) -> dict[bool, _Plan]:
    """What the module does in training and in evaluation, fused."""
    if isinstance(module.__dict__.get("forward"), _FusedForward):
        del module.__dict__["forward"]  # of an earlier conversion
    if "forward" in module.__dict__:
        raise _RefusedError("is an attribute of the module")
    for name in ("__deepcopy__", "__reduce__", "__reduce_ex__"):
        if getattr(type(module), name, None) is not getattr(object, name, None):
            raise _RefusedError(f"would be copied with the module, whose class has a {name} of its own")
    modes = {each: each.training for each in module.modules()}
    plans = {}
    try:
        for training in (True, False):
            for each in modes:
                each.training = training
            plans[training] = plan = _plan(module)
            if not plan.depends_on_mode:
                return {True: plan, False: plan}
    finally:
        for each, mode in modes.items():
            each.training = mode
    return plans


def _plan(module: nn.Module) -> _Plan:
    """Trace the module in the mode in which it is, and fuse."""
    watch = _Watch(module)
    try:
        tracer = _Tracer(module)
        with watch:
            graph = tracer.trace(module)
    except _RefusedError:
        raise
    except Exception as error:  # of any kind, for `forward` has run
        lines = str(error).splitlines() or [type(error).__name__]
        raise _RefusedError(f"cannot be traced: {lines[0]}") from error
    calls = _fuse_graph(graph, module)
    plan = _Plan(_compiled(graph, f"<fused {type(module).__qualname__}.forward>"), tracer.parameters)
    plan.depends_on_mode = "training" in watch.names
    owners = {module, *(each for each in _within_reach(module) if isinstance(each, (nn.ModuleList, nn.ModuleDict)))}
    owners |= {module.get_submodule(str(n.target).rpartition(".")[0]) for n in graph.nodes if n.op == "call_module"}
    plan.children = [(None if owner is module else owner, [*owner._modules.items()]) for owner in owners]
    plan.attributes = [(None if owner is module else owner, *rest) for owner, *rest in watch.attributes()]
    for (norm, *relu), note in calls:
        plan.notes[norm] = note
        plan.unhooked += [each for each in (norm, *relu) if each not in plan.unhooked]
        plan.attributes.append((norm, "activation", norm.__dict__.get("activation", _Absent)))
    plan.attributes += [(each, "forward", _Absent) for each in plan.unhooked]
    return plan


def _compiled(graph: Graph, name: str) -> Callable[..., Any]:
    """The function that computes a graph."""
    for node in graph.nodes:
        node.type = None  # an annotation may be anything
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, name, "exec"), namespace)
    return namespace["forward"]  # type: ignore[no-any-return]


# ---------------------------------------------------------------- tracing


class _RefusedError(Exception):
    """Why a `forward` is not replaced: a sentence with `forward` as its subject."""


def _add_in_place(value: Any, other: Any) -> Any:
    """``value += other``, as a step of a trace."""
    return operator.iadd(value, other)


class _Proxy(Proxy):
    """Stands for a tensor in a trace. The proxy of ``torch.fx`` itself takes ``+=`` for ``+``, and so on."""

    def __getattr__(self, name: str) -> Attribute:
        return _Attribute(self, name)

    def __iadd__(self, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", _add_in_place, (self, other), {})

    def _refuse(self, other: Any) -> Any:
        raise _RefusedError("uses an operator in place other than +=")

    __isub__ = __imul__ = __itruediv__ = __ifloordiv__ = __imod__ = __ipow__ = __imatmul__ = _refuse
    __iand__ = __ior__ = __ixor__ = __ilshift__ = __irshift__ = _refuse


class _Attribute(_Proxy, Attribute):
    """Stands for an attribute of a tensor."""


class _Tracer(Tracer):
    """Traces one module. Each call that the module makes is a single step."""

    proxy_buffer_attributes = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.parameters: list[str] = []
        for name, parameter in inspect.signature(type(module).forward.__get__(module)).parameters.items():
            if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
                raise _RefusedError(f"has the parameter {parameter}")
            if parameter.default is parameter.empty:
                self.parameters.append(name)
            elif not _is_constant(parameter.default):
                raise _RefusedError(f"has a default that may change: {name}")

    def proxy(self, node: Node) -> Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """The required arguments are tensors, and the others keep their defaults."""
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in self.parameters)]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, nn.Module):
            raise _RefusedError("gives a module to a function")
        return super().create_arg(a)


#: The types of values that cannot change.
_CONSTANTS = (
    *(bool, int, float, complex, str, bytes, type(None), type(...), enum.Enum),
    *(torch.dtype, torch.device, torch.memory_format, torch.layout),
)
#: Functions with the same result for a tensor and for its proxy in a trace, or with an error for the proxy.
_PURE: frozenset[Any] = frozenset(
    (
        *(abs, all, any, dict, enumerate, filter, getattr, iter, len, list, map, max, min, next, OrderedDict, range),
        *(reversed, set, slice, sorted, sum, super, tuple, zip),
    )
)
#: Attributes that `_Watch` cannot compare.
_UNKNOWN = frozenset(["__class__", "__dict__", *nn.Module().__dict__]) - {"training", "_modules"}
#: Modules whose functions give way to a proxy.
_TRACERS = (__name__, "torch.nn.functional", "torch.functional", "torch._jit_internal")
#: Packages whose functions may depend on anything and change it, unless they are known here.
_WITH_EFFECTS = frozenset(["torch", *sys.stdlib_module_names])
#: Methods of modules and containers that change nothing.
_LOOKS = frozenset(["__contains__", "__getattr__", "__getitem__", "__iter__", "__len__", "_get_abs_string_index"])
_LOOKS |= {"_get_item_by_idx", "children", "forward", "items", "keys", "named_children", "values"}


def _is_constant(value: Any) -> bool:
    if isinstance(value, (tuple, frozenset)):
        return all(map(_is_constant, value))
    return isinstance(value, _CONSTANTS)


@functools.cache
def _dispatching() -> frozenset[Any]:
    """The functions of PyTorch that give way to a proxy, and the one that tells whether this is a script."""
    return frozenset((*torch.overrides.get_testing_overrides(), torch.relu_, F.hardswish, torch.jit.is_scripting))  # type: ignore[attr-defined]


def _may_be_used(value: Any) -> bool:
    """Whether `forward` may use a value that cannot be compared later. It must not change or have unwatched effects."""
    if isinstance(value, type):
        return value in _PURE or issubclass(value, (nn.Module, BaseException, enum.Enum))
    if isinstance(value, (BuiltinFunctionType, FunctionType)) and (value in _PURE or value in _dispatching()):
        return True
    if isinstance(value, FunctionType):
        package = value.__globals__.get("__name__", "")
        return package.startswith("torch.fx.") or package.partition(".")[0] not in _WITH_EFFECTS
    if isinstance(value, BuiltinFunctionType):
        return value.__module__ == "_operator"
    return isinstance(value, (torch.dtype, torch.memory_format, torch.layout))


class _Watch:
    """While it is entered, refuses every function that `forward` calls if a trace of it would not be right later.

    It refuses a function that does more than compute, or that depends on something that `_Plan` cannot compare. It
    looks at a function when it begins, so that nothing is changed. Python's hook for profilers finds the functions that
    are called.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.watched: set[CodeType] = {_FusedForward.__call__.__code__}  # which goes on to a child's own `forward`
        self.names: set[str] = set()
        self.holders: dict[str, list[nn.Module]] = {}  # of an attribute that is no module, parameter or buffer
        for each in module.modules():
            for name in each.__dict__:
                if (name not in _UNKNOWN and name != "_modules") and (each is not module or name != "training"):
                    self.holders.setdefault(name, []).append(each)

    def __enter__(self) -> None:
        self.before = sys.getprofile()
        sys.setprofile(self.profile)

    def __exit__(self, *_: Any) -> None:
        sys.setprofile(self.before)

    def attributes(self) -> Iterator[tuple[nn.Module, str, Any]]:
        """The attributes that the functions may have read, apart from the children."""
        for name in self.names - {"forward"}:
            for module in self.holders.get(name, ()):
                yield module, name, module.__dict__[name]
            if name not in self.module.__dict__ and hasattr(type(self.module), name):
                yield self.module, name, _Absent  # so that the class's is read

    def profile(self, frame: FrameType, event: str, _: Any) -> None:
        """Called by Python at each call of a function, and for other events."""
        if event != "call" or frame.f_code in self.watched:
            return
        caller = frame.f_back
        if frame.f_code is type(self.module).forward.__code__:
            self.check(frame)
        elif caller is not None and caller.f_code in self.watched:
            package, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
            if package in _TRACERS or package.startswith("torch.fx."):
                return
            if package in ("torch.nn.modules.module", "torch.nn.modules.container") and name in _LOOKS:
                return
            if package.partition(".")[0] in _WITH_EFFECTS:
                raise _RefusedError(f"calls {package}.{name}")
            self.check(frame)

    def check(self, frame: FrameType) -> None:
        """Look at a function before its first step."""
        code = frame.f_code
        for name, value in _globals(frame):
            if not _may_be_used(value):
                raise _RefusedError(f"uses {name}")
        names = set(code.co_names)
        if unknown := names & _UNKNOWN:
            raise _RefusedError(f"uses {min(unknown)}")
        if "getattr" in names:
            names |= {"training", *(name for name, holders in self.holders.items() if self.module in holders)}
        for name in names - {"forward"}:
            values = [module.__dict__[name] for module in self.holders.get(name, ())]
            shared = inspect.getattr_static(type(self.module), name, _Absent)
            if not (shared is _Absent or hasattr(shared, "__get__") or _may_be_used(shared)):
                raise _RefusedError(f"uses .{name} of the class, which may change")
            if not all(_is_constant(value) or _may_be_used(value) for value in values):
                raise _RefusedError(f"uses .{name}, which may change")
        self.names |= names
        self.watched.add(code)


def _globals(frame: FrameType) -> Iterator[tuple[str, Any]]:
    """What a function uses that is neither an argument nor a local variable, by the names that lead there."""
    code = frame.f_code
    instructions = [each for each in dis.get_instructions(code) if each.opname != "EXTENDED_ARG"]
    for place, each in enumerate(instructions):
        if each.opname.startswith(("STORE_ATTR", "DELETE_ATTR")):
            raise _RefusedError(f"assigns to .{each.argval}")
        if each.opname in ("STORE_GLOBAL", "DELETE_GLOBAL", "IMPORT_NAME"):
            raise _RefusedError(f"changes or imports {each.argval}")
        if each.opname == "PUSH_EXC_INFO":
            raise _RefusedError("has a statement `with` or `try`")
        if each.opname == "LOAD_GLOBAL":
            name = each.argval
            value = frame.f_globals.get(name, frame.f_builtins.get(name))
            while isinstance(value, ModuleType) and instructions[place + 1].opname in ("LOAD_ATTR", "LOAD_METHOD"):
                place += 1
                attribute = instructions[place].argval
                name, value = f"{name}.{attribute}", getattr(value, attribute, None)
            yield name, value
    enclosing = frame.f_back.f_code.co_consts if frame.f_back is not None else ()
    if code not in enclosing:
        for name in code.co_freevars:
            if name != "__class__":
                yield name, frame.f_locals.get(name)


# ---------------------------------------------------------------- the graph

_RELUS: dict[Any, Activation] = {
    **{nn.ReLU: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu: "relu", "relu": "relu", "relu_": "relu"},
    **{nn.ReLU6: "relu6", F.relu6: "relu6"},
}
_ADDITIONS = {operator.add: False, torch.add: False, "add": False, _add_in_place: True, "add_": True}  # in place?


def _fuse_graph(graph: Graph, module: nn.Module) -> list[tuple[list[nn.Module], str]]:
    """Make one call of each batch norm and what follows it. Return the modules of each call, and the report's note."""
    calls = []
    for relu in list(graph.nodes):
        activation = _RELUS.get(_kind(relu, module))
        if activation is None or len(relu.all_input_nodes) != 1 or len(relu.all_input_nodes[0].users) != 1:
            continue
        steps = [relu, *relu.all_input_nodes]
        norm = steps[1]
        if _is_norm(norm, module):
            with graph.inserting_before(norm):
                fused = graph.call_module(norm.target, norm.args, {**norm.kwargs, "activation": activation})
        elif (norm := _norm_of(steps[1], module)) is not None:
            steps.append(norm)
            (addend,) = (each for each in steps[1].all_input_nodes if each is not norm)
            in_place = _ADDITIONS[steps[1].target]
            with graph.inserting_before(steps[1]):
                arguments = graph.get_attr(str(norm.target)), *norm.all_input_nodes, addend, activation, in_place
                fused = graph.call_function(_normalise_add_activate, arguments)
        else:
            continue
        relu.replace_all_uses_with(fused)
        for step in steps:
            graph.erase_node(step)
        note = activation if len(steps) == 2 else f"add, {activation}"
        calls.append(([each for each in (_called(norm, module), _called(relu, module)) if each is not None], note))
    return calls


def _called(node: Node, module: nn.Module) -> nn.Module | None:
    """The module that a node calls, if it calls one."""
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _kind(node: Node, module: nn.Module) -> Any:
    """What a node calls: the type of a module, a function, or the name of a method."""
    if node.op == "call_module":
        return type(_called(node, module))
    return node.target if node.op in ("call_function", "call_method") else None


def _is_norm(node: Node, module: nn.Module) -> bool:
    """Whether a node calls a batch norm that has nothing fused yet."""
    if _kind(node, module) not in _OURS or len(node.args) + len(node.kwargs) != 1 or len(node.all_input_nodes) != 1:
        return False
    return getattr(_called(node, module), "activation", None) is None


def _norm_of(addition: Node, module: nn.Module) -> Node | None:
    """The batch norm that can be fused with an addition: of two, the later one."""
    operands = addition.all_input_nodes
    in_place = _ADDITIONS.get(_kind(addition, module))
    if in_place is None or len(operands) != 2 or "out" in addition.kwargs or addition.kwargs.get("alpha", 1) != 1:
        return None
    if in_place:
        operands = operands[:1]  # which is changed; the other one must not be
    order = list(addition.graph.nodes)
    for norm in sorted(operands, key=order.index, reverse=True):
        if _is_norm(norm, module) and len(norm.users) == 1:
            between = order[order.index(norm) + 1 : order.index(addition)]
            if _may_be_later(norm, between, module):
                return norm
    return None


def _may_be_later(norm: Node, between: list[Node], module: nn.Module) -> bool:
    """Whether a batch norm gives the same after some other steps.

    These steps must not change its input, nor use its statistics. Nothing can change the input if nothing else has it.
    """
    if any(node.op == "get_attr" and str(node.target).startswith(f"{norm.target}.") for node in norm.graph.nodes):
        return False
    if _kind(norm, module) is _sync.SyncBatchNorm:
        return all(node.op == "get_attr" for node in between)  # for a process that does not fuse has another order
    called = [each for node in between if (each := _called(node, module)) is not None]
    if any(_called(norm, module) is each for parent in called for each in parent.modules()):
        return False
    (input,) = norm.all_input_nodes
    private = len(input.users) == 1 and _gives_new_memory(input, module)
    return private or all(node.op == "get_attr" or _gives_new_memory(node, module) for node in between)


def _gives_new_memory(node: Node, module: nn.Module) -> bool:
    """Whether a node calls a layer whose output shares no memory with another tensor, and which changes no input."""
    kind = _kind(node, module)
    layers = (nn.modules.conv._ConvNd, nn.Linear)
    return isinstance(kind, type) and (
        kind in _OURS or (issubclass(kind, layers) and kind.__module__.startswith("torch.nn."))
    )


def _normalise_add_activate(
    norm: nn.Module, input: Tensor, addend: Any, activation: Activation, in_place: bool
) -> Tensor:
    """One call in a fused `forward`; three if the addend is not a tensor, or if the addition must keep the type."""
    if isinstance(addend, Tensor) and (not in_place or (addend.dtype, addend.shape) == (input.dtype, input.shape)):
        return norm(input, addend, activation=activation)  # type: ignore[no-any-return]
    result = norm(input)
    result = operator.iadd(result, addend) if in_place else result + addend
    return activate(result, activation, None)
