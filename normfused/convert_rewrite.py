"""Takes calls out of a module's forward that the fused layers make, and leaves all the rest of it as it is written.

What changes is a copy of the function's syntax tree, at exactly the calls that a trace has shown (``Edit``), compiled
with the line numbers of the original. The module becomes an instance of a subclass of its class that has this forward:
``self`` stays what it is in copies and replicas, and code that torch.compile has to follow stays plain Python.
"""

import __future__

import ast
import copy
import functools
import inspect
import textwrap
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from . import native

_FEATURES = functools.reduce(lambda flags, name: flags | getattr(__future__, name).compiler_flag,
                             __future__.all_feature_names, 0)  # fmt: skip
_SUBCLASSES: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()
# A call's line, end line (counted from the function's first), column and end column.
Position: TypeAlias = tuple[int, int, int, int]


class Edit(NamedTuple):
    """One change at one call."""

    action: (
        str  # "drop": the call becomes its input; "defer": likewise, a layer's; "add": a sum becomes the layer's call
    )
    position: Position
    layer: str  # the name of the layer that does the work instead
    target: object = None  # "drop": the function or the name of the method that is called
    first: bool = True  # "add": the layer's output is the first operand


def add_and_activate(layer: Any, input: torch.Tensor, residual: Any) -> torch.Tensor:
    """``activation(norm(input) + residual)`` by a layer with an activation, whatever PyTorch can add."""
    if (
        isinstance(residual, torch.Tensor)
        and residual.shape == input.shape
        and residual.dtype == input.dtype
        and residual.device == input.device
    ):
        y: torch.Tensor = layer(input, residual)
        return y
    # Broadcast, or of another dtype: step by step, on the same parameters and buffers.
    plain = copy.copy(layer)
    plain.activation = None
    return native.activate(plain(input) + residual, layer.activation)


class Forward:
    """The forward of a class, as its source shows it.

    Raises:
        ValueError: what it runs cannot be changed, with the reason.
    """

    def __init__(self, cls: Any) -> None:
        self.cls = cls
        self.function = cls.forward
        if not isinstance(self.function, types.FunctionType):
            raise ValueError(f"{cls.__name__}.forward is not a plain function")
        if not hasattr(self.function.__code__, "co_positions"):
            raise ValueError("finding a call in the source takes Python 3.11")
        try:
            lines, first = inspect.getsourcelines(self.function.__code__)
            self.source = "".join(lines)
            # Under "if", so that an indented function parses with its columns.
            indented = lines[0][0].isspace()
            tree: Any = ast.parse(("if True:\n" if indented else "") + self.source)
        except (OSError, SyntaxError, IndexError) as error:
            raise ValueError(f"{cls.__name__}.forward has no source to read") from error
        ast.increment_lineno(tree, first - 1 - indented)
        self.definition = tree.body[0].body[0] if indented else tree.body[0]
        if not isinstance(self.definition, ast.FunctionDef):
            raise ValueError(f"{cls.__name__}.forward is not written as a function")
        self.nodes: dict[Position, list[Any]] = {}
        for node in ast.walk(self.definition):
            if isinstance(node, (ast.Call, ast.BinOp, ast.AugAssign)):
                self.nodes.setdefault(_position(node, first), []).append(node)
        if _essence(self._compile(self.definition)) != _essence(self.function.__code__):
            raise ValueError(f"{cls.__name__}.forward is not what its source says")

    def why_not(self, module: nn.Module, edit: Edit) -> str | None:
        """Why an edit cannot be made to the forward of ``module``, or None."""
        nodes = self.nodes.get(edit.position, ())
        if len(nodes) != 1 or (edit.action != "drop" and not edit.layer.isidentifier()):
            return "the call that follows is not found in the source"
        (node,) = nodes
        line = f"line {node.lineno} of {self.cls.__name__}.forward"
        if edit.action == "drop":
            if not isinstance(node, ast.Call) or not self._calls(node, module, edit.target):
                return f"the activation in {line} is called in a way that is not understood"
            arguments = [*node.args[not isinstance(edit.target, str) :], *(k.value for k in node.keywords)]
            if not all(_is_plain(argument) for argument in arguments):
                return f"the activation's arguments in {line} are computed there"
        elif edit.action == "defer":
            expected = f"{self._self()}.{edit.layer}"
            if not isinstance(node, ast.Call) or ast.unparse(node.func) != expected:
                return f"the layer is not called by its name in {line}"
            if len(node.args) != 1 or node.keywords or isinstance(node.args[0], ast.Starred):
                return f"the layer gets more than one argument in {line}"
        elif not _is_sum(node, edit.first):
            return f"the sum in {line} is written in a way that is not understood"
        return None

    def edited(self, edits: Iterable[Edit]) -> types.FunctionType:
        """The function with ``edits`` made."""
        first = self.function.__code__.co_firstlineno
        definition = _Editor(edits, self._self(), first).visit(copy.deepcopy(self.definition))
        code = self._compile(ast.fix_missing_locations(definition))
        function = self.function
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        cells[_ADD] = types.CellType(add_and_activate)
        closure = tuple(cells[name] for name in code.co_freevars)
        twin = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
        twin.__kwdefaults__ = function.__kwdefaults__
        functools.update_wrapper(twin, function)
        del twin.__wrapped__  # type: ignore[attr-defined]
        return twin

    def _self(self) -> str:
        arguments = self.definition.args
        first: ast.arg = [*arguments.posonlyargs, *arguments.args, ast.arg("")][0]
        return first.arg

    def _compile(self, definition: ast.FunctionDef) -> types.CodeType:
        """The code of a definition, with the original's free variables and its class around it."""
        code = self.function.__code__
        definition = copy.copy(definition)
        definition.decorator_list = []
        body: list[Any] = [definition]
        outer = ("", *self.function.__qualname__.split("."))[-2]
        if outer and outer != "<locals>":  # for super() and private names
            body = [ast.ClassDef(outer, [], [], body, [], type_params=[])]  # type: ignore[call-arg]
        names = [name for name in (*code.co_freevars, _ADD) if name != "__class__"]
        factory: Any = ast.parse(f"def factory({', '.join(names)}): pass")
        factory.body[0].body = body
        module = compile(
            ast.fix_missing_locations(factory), code.co_filename, "exec", code.co_flags & _FEATURES, dont_inherit=True
        )
        found = _code_named(module, definition.name, code.co_firstlineno)
        assert found is not None  # what was just compiled
        return found.replace(co_qualname=code.co_qualname)

    def _calls(self, node: ast.Call, module: nn.Module, target: Any) -> bool:
        """Whether the call is one of ``target``, a function or a method's name."""
        if isinstance(target, str):
            return isinstance(node.func, ast.Attribute) and node.func.attr == target
        if not node.args or isinstance(node.args[0], ast.Starred):
            return False
        return self._value(node.func, module) is target

    def _value(self, node: ast.AST, module: nn.Module) -> Any:
        """What a name or a dotted name stands for, None where that is a local variable."""
        function = self.function
        if isinstance(node, ast.Attribute):
            return getattr(self._value(node.value, module), node.attr, None)
        if not isinstance(node, ast.Name):
            return None
        if node.id == self._self():
            return module
        if node.id in function.__code__.co_varnames + function.__code__.co_cellvars:
            return None
        if node.id in function.__code__.co_freevars:
            return inspect.getclosurevars(function).nonlocals.get(node.id)
        return function.__globals__.get(node.id)


def called_elsewhere(forward: Forward, layer: str) -> str | None:
    """Which other method of the class calls a layer, and would get its activation unawares; None if none does."""
    for cls in forward.cls.__mro__[: forward.cls.__mro__.index(torch.nn.Module)]:
        for name, method in vars(cls).items():
            method = inspect.unwrap(getattr(method, "__func__", method))
            if name == "forward" or not isinstance(method, types.FunctionType):
                continue  # A base class's forward shows in the trace.
            if layer in method.__code__.co_names and _calls_attribute(method, layer):
                return f"{cls.__name__}.{name} calls it too"
    return None


def _calls_attribute(function: types.FunctionType, attribute: str) -> bool:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        return True
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any(isinstance(func, ast.Attribute) and func.attr == attribute for func in calls)


def rewrite(module: nn.Module, edits: Iterable[Edit]) -> None:
    """Give ``module`` the forward that ``edits`` make of its own, which why_not found nothing against."""
    # Functions do not all pickle, and are known by the call's place now.
    edits = frozenset(e._replace(target=e.target if isinstance(e.target, str) else None) for e in edits)
    module.__class__ = _subclass(type(module), edits)


def restore(module: nn.Module) -> None:
    """Undo ``rewrite``, if it was done."""
    if is_rewritten(module):
        module.__class__ = vars(type(module))["_normfused_original"]


def is_rewritten(module: nn.Module) -> bool:
    cls = type(module)
    if hasattr(cls, "_normfused_original") and "_normfused_original" not in vars(cls):
        raise ValueError(f"{cls.__name__} is derived from a converted class, which cannot be reverted under it")
    return hasattr(cls, "_normfused_original")


def deferred_layers(module: nn.Module) -> list[nn.Module]:
    """The layers that the rewritten forward of ``module`` relies on."""
    names = {edit.layer for edit in vars(type(module))["_normfused_edits"]}
    return [layer for name in names if (layer := module._modules.get(name)) is not None]


def _subclass(cls: type, edits: frozenset[Edit], source: str | None = None) -> Any:
    """The subclass of ``cls`` with these edits, which were found in ``source``."""
    if (cls, edits) not in _SUBCLASSES:
        forward = Forward(cls)
        if source not in (None, forward.source):
            raise RuntimeError(
                f"{cls.__module__}.{cls.__qualname__}.forward has changed since this converted model was saved; "
                "save a state_dict, or the model after normfused.revert"
            )
        namespace = {
            "forward": forward.edited(edits),
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            "__reduce_ex__": _reduce,
            "_normfused_original": cls,
            "_normfused_edits": edits,
            "_normfused_source": forward.source,
        }
        _SUBCLASSES[cls, edits] = subclass = type(cls)(cls.__name__, (cls,), namespace)
        return subclass
    return _SUBCLASSES[cls, edits]


def _reduce(self: Any, protocol: int) -> tuple[Any, ...]:
    # Pickle finds a class by its name, which names the original.
    cls = type(self)
    make, arguments, *rest = super(cls, self).__reduce_ex__(max(protocol, 2))
    if arguments[:1] != (cls,):
        return make, arguments, *rest
    recipe = cls._normfused_original, cls._normfused_edits, cls._normfused_source
    return _make, (make, recipe, arguments[1:]), *rest


def _make(make: Callable[..., Any], recipe: tuple[Any, ...], arguments: tuple[Any, ...]) -> Any:
    return make(_subclass(*recipe), *arguments)


_ADD = "_normfused_add_and_activate"


def _position(node: Any, first: int) -> Position:
    return node.lineno - first, node.end_lineno - first, node.col_offset, node.end_col_offset


def _is_plain(node: ast.AST) -> bool:
    """Whether leaving an expression out changes nothing."""
    return all(
        isinstance(part, (ast.Constant, ast.Name, ast.Attribute, ast.UnaryOp, ast.expr_context, ast.unaryop))
        for part in ast.walk(node)
    )


def _is_sum(node: Any, first: bool) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Add)
    if isinstance(node, ast.AugAssign):
        # In place: its first operand must be what nobody else has, the layer's output.
        return isinstance(node.op, ast.Add) and isinstance(node.target, ast.Name) and first
    if (
        isinstance(node.func, ast.Attribute)
        and not node.keywords
        and not any(isinstance(a, ast.Starred) for a in node.args)
    ):
        if ast.unparse(node.func) == "torch.add":
            return len(node.args) == 2
        return len(node.args) == 1 and (node.func.attr == "add" or (node.func.attr == "add_" and first))
    return False


def _operands(node: Any) -> Any:
    if isinstance(node, ast.BinOp):
        return node.left, node.right
    if isinstance(node, ast.AugAssign):
        return ast.Name(node.target.id, ast.Load()), node.value  # type: ignore[union-attr]
    return (node.func.value, *node.args)[-2:]


def _essence(code: types.CodeType) -> tuple[Any, ...]:
    """What tells whether two code objects come from the same text; the instructions depend on the module around it."""
    constants = [repr(constant) for constant in code.co_consts if not isinstance(constant, types.CodeType)]
    return code.co_names, code.co_varnames, code.co_freevars, constants, set(code.co_positions())


def _code_named(code: types.CodeType, name: str, line: int) -> types.CodeType | None:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            if constant.co_name == name and constant.co_firstlineno == line:
                return constant
            found = _code_named(constant, name, line)
            if found is not None:
                return found
    return None


class _Editor(ast.NodeTransformer):
    def __init__(self, edits: Iterable[Edit], self_name: str, first: int) -> None:
        self.edits = {edit.position: edit for edit in edits}
        self.self_name, self.first = self_name, first

    def visit(self, node: Any) -> Any:
        edit = None
        if isinstance(node, (ast.Call, ast.BinOp, ast.AugAssign)):
            edit = self.edits.get(_position(node, self.first))
        node = self.generic_visit(node)
        if edit is None:
            return node
        if edit.action == "defer":
            return node.args[0]
        if edit.action == "drop":
            return node.func.value if isinstance(edit.target, str) else node.args[0]
        layer = ast.Attribute(ast.Name(self.self_name, ast.Load()), edit.layer, ast.Load())
        # By keyword, so that the operands are computed in their order.
        names = ("input", "residual") if edit.first else ("residual", "input")
        operands = [ast.keyword(name, operand) for name, operand in zip(names, _operands(node), strict=True)]
        call = ast.copy_location(ast.Call(ast.Name(_ADD, ast.Load()), [layer], operands), node)
        if isinstance(node, ast.AugAssign):
            return ast.copy_location(ast.Assign([node.target], call), node)
        return call
