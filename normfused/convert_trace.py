"""Records what a module's own forward does, as torch.fx graphs: symbolically, and on example inputs.

The modules that a forward calls are single nodes, whatever they do inside. A node whose call stands in the forward's
own source knows where: ``node.meta["position"]`` is (line, end line, column, end column), the lines counted from the
function's first; otherwise None.
"""

import contextlib
import copy
import inspect
import itertools
import random
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .convert_rewrite import Position

# Reading a value into Python: what happens next may depend on it.
_READS = {"__bool__", "__float__", "__int__", "__index__", "__complex__", "__contains__", "item", "tolist", "numpy"}
_READS |= {"equal", "allclose", "is_nonzero"}

# Objects with attributes that are not searched for tensors.
_NO_CONTAINERS = (torch.Tensor, nn.Module, type, types.FunctionType, types.ModuleType)


class DataDependent(Exception):
    """Python looked at a value, or drew a random number, so that a trace shows one course of several."""


def trace_symbolically(
    parent: nn.Module, is_opaque: Callable[[nn.Module | None], object], read: Callable[[fx.Graph], None]
) -> None:
    """Trace the parent's forward in training and evaluation, with its optional arguments and without.

    Args:
        is_opaque: says of a child whether a forward may reach it only through its registered name.
        read: called with each graph. A trace that breaks off still shows the calls up to there.

    Raises:
        Exception: whatever the forward raises on symbolic input.
    """
    parameters = inspect.signature(type(parent).forward).parameters.values()
    absent = {p.name: None for p in parameters if p.default is None}
    for training in (True, False):
        for arguments in ({}, absent) if absent else ({},):
            for is_tensor in (False, True):
                tracer = _Tracer(forward_code(parent), is_tensor)
                stand_in = _stand_in(parent, training, is_opaque)
                try:
                    with _NoReading(), _no_drawing():
                        tracer.trace(stand_in, arguments)
                    # What forward keeps on the module is a use of it.
                    leaves = pytree.tree_leaves(vars(stand_in))
                    kept = [leaf.node for leaf in leaves if isinstance(leaf, fx.Proxy)]
                    tracer.graph.call_function(tuple, (kept,))
                finally:
                    read(tracer.graph)
                if not tracer.asked_for_type:
                    break


def why_opaque(parent: nn.Module) -> str | None:
    """Why the parent's class does not say what it runs, or None."""
    cls = type(parent)
    if cls.forward is nn.Module.forward:
        return f"{cls.__name__} has no forward"
    if "forward" in vars(parent) or cls.__call__ is not nn.Module.__call__:
        return f"{cls.__name__} runs more than its forward"
    # Tracing torch's own wrappers (DistributedDataParallel, say) would have effects.
    if cls.forward is not nn.Sequential.forward and (cls.forward.__module__ or "").startswith("torch."):
        return f"{cls.__name__}.forward is PyTorch's own"
    return None


def forward_code(module: nn.Module) -> types.CodeType | None:
    """The code of the module's forward, None where that is no plain function."""
    return getattr(type(module).forward, "__code__", None)


def _position(code: types.CodeType | None) -> Position | None:
    """Where in ``code`` the call under way stands; None in a function that it calls, or before Python 3.11."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and _is_ours_or_torchs(frame):
        frame = frame.f_back
    # fx runs a copy of the code where there are keyword-only arguments.
    if frame is None or code is None or _place(frame.f_code) != _place(code) or not hasattr(code, "co_positions"):
        return None
    line, end_line, column, end_column = next(itertools.islice(code.co_positions(), frame.f_lasti // 2, None))
    if line is None or end_line is None or column is None or end_column is None:
        return None
    return line - code.co_firstlineno, end_line - code.co_firstlineno, column, end_column


def _is_ours_or_torchs(frame: types.FrameType) -> bool:
    return (frame.f_globals.get("__name__") or "").partition(".")[0] in ("torch", __package__)


def _place(code: types.CodeType | None) -> tuple[str, int, str] | None:
    return code and (code.co_filename, code.co_firstlineno, code.co_name)


class _NoReading(TorchFunctionMode):
    """Raises where Python reads a tensor's value: a random one, say, since a symbolic one has none."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", None) in _READS:
            raise DataDependent(f"it reads a tensor's value ({func.__name__})")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _no_drawing() -> Iterator[None]:
    """Raises where Python's or NumPy's random numbers are used: they may decide what a forward does."""
    state = _random_state()
    try:
        yield
        if _random_state() != state:
            raise DataDependent("it draws random numbers in Python")
    finally:
        _set_random_state(state)


def _random_state() -> tuple[Any, Any]:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return random.getstate(), None
    kind, keys, *rest = numpy.random.get_state()
    return random.getstate(), (kind, keys.tobytes(), *rest)


def _set_random_state(state: tuple[Any, Any]) -> None:
    python, numpy = state
    random.setstate(python)
    if numpy is not None:
        kind, keys, *rest = numpy
        sys.modules["numpy"].random.set_state((kind, sys.modules["numpy"].frombuffer(keys, "uint32"), *rest))


class Proxy(fx.Proxy):
    """A symbolic value, of which ``isinstance(value, torch.Tensor)`` is what its tracer says."""

    tracer: "_Tracer"

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        if not _is_ours_or_torchs(sys._getframe(1)):
            self.tracer.asked_for_type = True
            if self.tracer.is_tensor:
                return torch.Tensor
        return type(self)


class _Tracer(fx.Tracer):
    """Records the calls that one forward makes to the modules below it, none of which is entered."""

    proxy_buffer_attributes = True  # A buffer that forward updates is left alone.

    def __init__(self, code: types.CodeType | None, is_tensor: bool) -> None:
        super().__init__()
        self.code, self.is_tensor, self.asked_for_type = code, is_tensor, False

    def proxy(self, node: fx.Node) -> Proxy:
        return Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        # One that is not registered is entered: a slice of a Sequential, say, calls some that are.
        if m not in (self.submodule_paths or {}):
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["position"] = _position(self.code)
        return node


def _stand_in(parent: nn.Module, training: bool, is_opaque: Callable[[nn.Module | None], object]) -> Any:
    """A copy of ``parent`` to trace, so that what its forward assigns or appends is not kept."""
    stand_in = object.__new__(type(parent))
    for name, value in vars(parent).items():
        stand_in.__dict__[name] = copy.copy(value) if isinstance(value, (dict, list, set)) else value
    stand_in.__dict__["training"] = training
    # An activation that is reached past its registered name (in a list, say) must not pass for it.
    for name, child in parent._modules.items():
        if is_opaque(child):
            stand_in._modules[name] = copy.copy(child)
    return stand_in


# On example inputs


def example_graphs(
    model: nn.Module, example_inputs: Any, watched: list[nn.Module]
) -> tuple[dict[nn.Module, list[fx.Graph]], dict[nn.Module, str]]:
    """Run a copy of ``model`` on example inputs, once in training and once in evaluation, and record.

    Args:
        example_inputs: a tuple of positional arguments, a dict of keyword arguments, or the only argument.
        watched: the modules of ``model`` whose forward is to be recorded.

    Returns:
        ({module: [graph of each call]}, {module: why its graphs do not show everything}).
    """
    args, kwargs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,), {}
    if isinstance(example_inputs, dict):
        args, kwargs = (), example_inputs
    graphs: dict[nn.Module, list[fx.Graph]] = {module: [] for module in watched}
    unproven: dict[nn.Module, str] = {}
    state = _random_state()
    for training in (True, False):
        # A copy, because a forward changes running statistics and whatever else it likes.
        try:
            twin = copy.deepcopy(model).train(training)
        except Exception as exception:  # What deepcopy raises has no common class.
            return {}, dict.fromkeys(watched, f"the model cannot be copied to try it out ({_first_line(exception)})")
        original = dict(zip(twin.modules(), model.modules(), strict=True))
        recorder = _Recorder(original, set(watched))
        inputs = copy.deepcopy((args, kwargs))
        error = None
        try:
            with recorder, torch.no_grad():
                twin(*inputs[0], **inputs[1])
        except Exception as exception:  # Whatever a user's code raises.
            error = _first_line(exception)
        mode = "training" if training else "evaluation"
        for module in watched:
            if module in recorder.data_dependent:
                unproven.setdefault(module, f"what it does depends on {recorder.data_dependent[module]}")
            elif module in recorder.under_way():
                unproven.setdefault(module, f"the example inputs fail in {mode} ({error})")
            elif not recorder.graphs[module]:
                unproven.setdefault(module, f"the example inputs do not reach it in {mode}")
            graphs[module] += recorder.graphs[module]
    _set_random_state(state)
    return graphs, unproven


def _first_line(exception: Exception) -> str:
    message = str(exception).partition("\n")[0]
    return f"{type(exception).__name__}: {message}"


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested containers, and in the attributes of other objects there."""
    yield from (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))
    yield from _hidden_tensors(value)


def _hidden_tensors(value: Any, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """The tensors in the attributes of objects that are no containers."""
    seen = set() if seen is None else seen
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, slice):
            yield from (part for part in (leaf.start, leaf.stop, leaf.step) if isinstance(part, torch.Tensor))
        elif (
            id(leaf) not in seen and not isinstance(leaf, (torch.Tensor, nn.Module, type)) and hasattr(leaf, "__dict__")
        ):
            seen.add(id(leaf))
            attributes = list(vars(leaf).values())
            yield from (inner for inner in pytree.tree_leaves(attributes) if isinstance(inner, torch.Tensor))
            yield from _hidden_tensors(attributes, seen)


class _Frame:
    """One call of a module that is under way; ``graph`` is None where the module is not watched."""

    def __init__(self, module: nn.Module, watched: bool) -> None:
        self.module = module
        self.graph: Any = fx.Graph() if watched else None
        self.random_state = _random_state() if watched else None
        self.code = forward_code(module)
        self.names = {child: name for name, child in module.named_modules()} if watched else {}
        self.nodes: dict[int, fx.Node] = {}  # id of a tensor -> the node that computed it
        self.tensors: list[torch.Tensor] = []  # keeps them alive, so that ids stay unique

    def record(self, op: str, target: Any, args: Any, kwargs: Any, result: Any, position: Position | None) -> None:
        args, kwargs, hidden = pytree.tree_map(self._node, (args, kwargs, list(_hidden_tensors((args, kwargs)))))
        node = self.graph.create_node(op, target, tuple(args), {**kwargs, "hidden": hidden} if hidden else kwargs)
        node.meta["position"] = position
        for tensor in _tensors(result):
            self._define(tensor, node)

    def _node(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__
        if id(value) not in self.nodes:
            self._define(value, self.graph.placeholder("input"))
        return self.nodes[id(value)]

    def _define(self, tensor: torch.Tensor, node: fx.Node) -> None:
        self.nodes[id(tensor)] = node
        self.tensors.append(tensor)


class _Recorder(TorchFunctionMode):
    """While active, records the calls of a twin's modules, and of torch's functions between them."""

    def __init__(self, original: dict[nn.Module, nn.Module], watched: set[nn.Module]) -> None:
        super().__init__()
        self.original = original
        self.graphs: dict[nn.Module, list[fx.Graph]] = {module: [] for module in watched}
        self.data_dependent: dict[nn.Module, str] = {}
        self.stack: list[_Frame] = []
        for module in original:
            # A user's hooks are not to see the twin.
            for hooks in (
                module._forward_hooks,
                module._forward_pre_hooks,
                module._backward_hooks,
                module._backward_pre_hooks,
            ):
                hooks.clear()
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave, with_kwargs=True)

    def under_way(self) -> set[nn.Module]:
        return {self.original[frame.module] for frame in self.stack}

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.stack.append(_Frame(module, self.original[module] in self.graphs))

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        frame = self.stack.pop()
        if frame.graph is not None:
            if frame.random_state != _random_state():
                self.data_dependent[self.original[module]] = "random numbers in Python"
            kept = [tensor for tensor in _tensors(vars(module)) if id(tensor) in frame.nodes]
            frame.record("call_function", tuple, (result, kept), {}, None, None)
            self.graphs[self.original[module]].append(frame.graph)
        if self.stack and self.stack[-1].graph is not None:
            caller = self.stack[-1]
            name = caller.names.get(module)
            op, target = ("call_module", name) if name else ("call_function", type(module).forward)
            caller.record(op, target, args, kwargs, result, _position(caller.code))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if not self.stack:
            return result
        frame = self.stack[-1]
        if name in _READS and not type(frame.module).__module__.startswith("torch."):
            for caller in self.stack:
                self.data_dependent[self.original[caller.module]] = f"a tensor's value ({name})"
        # Asking for a shape or a dtype is no use of a tensor's value.
        asks = isinstance(result, (int, torch.Size, torch.dtype, torch.device))
        if frame.graph is not None and not asks:
            method = getattr(torch.Tensor, name, None) is func
            op, target = ("call_method", name) if method else ("call_function", func)
            frame.record(op, target, args, kwargs or {}, result, _position(frame.code))
        return result
