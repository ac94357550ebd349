"""Proves what follows each normalisation layer, from graphs of what its parent's forward does."""

from collections import Counter, defaultdict
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import fx, nn

from .convert_classes import (
    activation_name,
    called_activation,
    has_hooks,
    inner_modules,
    is_clamp,
    is_convertible,
    is_identity,
    is_sum,
)
from .convert_rewrite import Edit, Forward, Position, called_elsewhere
from .convert_trace import example_graphs, trace_symbolically, why_opaque

# Functions and methods that may return a view.
_VIEWS = {"getitem", "getattr", "view", "view_as", "reshape", "flatten", "squeeze", "unsqueeze", "permute", "transpose"}
_VIEWS |= {"expand", "expand_as", "chunk", "split", "unbind", "narrow", "select", "detach", "contiguous", "to", "float"}
_VIEWS |= {"type_as", "t", "T", "movedim", "swapaxes", "unflatten", "diagonal", "alias", "tuple", "double", "half"}


class Use(NamedTuple):
    """What a layer can do besides normalising."""

    activation: str | None = None
    module: nn.Module | None = None  # the module whose place the activation has, None for a function
    residual: bool = False  # whether a sum comes before the activation
    parent: Any = None  # whose forward has to change
    edits: frozenset[Edit] = frozenset()  # how


# An fx.Node; only its op tells of what type its target and arguments are.
Node: TypeAlias = Any
# The nodes that call a module.
Called: TypeAlias = dict[Node, nn.Module]
# Module -> every (parent, name) that it is registered at.
Places: TypeAlias = dict[nn.Module, list[tuple[nn.Module, str]]]
# Layer -> its Use, or why it has none.
Follows: TypeAlias = dict[nn.Module | None, Any]


class _Seen(NamedTuple):
    """What the graphs show."""

    after: dict[nn.Module, list[Use | str]]  # layer -> for each call a Use, or why none
    before: dict[
        nn.Module, list[nn.Module | None]
    ]  # activation module -> for each call the layer that it follows, None for anything else
    edited: dict[
        tuple[nn.Module, Position], list[tuple[nn.Module, Edit] | None]
    ]  # (parent, position) -> for each node there (layer, Edit), or None
    unproven: dict[nn.Module, str]  # parent -> why its graphs do not show everything
    forwards: dict[type, Forward | str]  # class -> its Forward, or why there is none
    tried_out: set[nn.Module]  # parents whose graphs come from example inputs alone


def what_follows(model: nn.Module, names: dict[nn.Module, str], places: Places, example_inputs: Any) -> Follows:
    """For each convertible layer: its Use, or why it has none.

    Args:
        names: module -> its path in the model.
        places: module -> every (parent, name) that it is registered at.
        example_inputs: as convert's.
    """
    seen = _Seen(defaultdict(list), defaultdict(list), defaultdict(list), {}, {}, set())
    watched = [
        parent
        for parent in model.modules()
        if not is_convertible(parent)
        and any(is_convertible(m) or activation_name(m) for m in parent.modules() if m is not parent)
    ]
    graphs: dict[nn.Module, list[fx.Graph]] = defaultdict(list)
    # A forward that draws random numbers must not change the caller's.
    with torch.random.fork_rng(devices=()), torch.no_grad():
        for parent in watched:
            _watch(parent, graphs[parent], seen.unproven)
        if example_inputs is not None:
            _try_out(model, example_inputs, graphs, seen)
    for parent in watched:
        for graph in graphs[parent]:
            _read(graph, parent, seen)
    follows: Follows = {norm: _follower(norm, seen, places[norm]) for norm in names if is_convertible(norm)}
    # What one layer cannot have, others may depend on.
    while True:
        vetoes = {
            norm: veto
            for norm, use in follows.items()
            if isinstance(use, Use) and (veto := _veto(norm, use, names, seen, places, follows)) is not None
        }
        if not vetoes:
            return follows
        follows |= vetoes


def _follower(norm: nn.Module, seen: _Seen, places: list[tuple[nn.Module, str]]) -> Use | str:
    """What follows one layer, by its own parent alone; as what_follows."""
    _, act = inner_modules(norm)
    if activation_name(act):
        return Use(activation_name(act), act)
    if not places:
        return Use()  # The layer is the model.
    if len(places) > 1:
        return f"registered {len(places)} times"
    ((parent, _),) = places
    if parent in seen.unproven:
        return f"cannot prove what follows: {seen.unproven[parent]}"
    if norm not in seen.after:
        return f"{type(parent).__name__}.forward does not call it"
    uses: list[Any] = list(dict.fromkeys(seen.after[norm]))
    if any(isinstance(use, str) for use in uses):
        return next(use for use in uses if isinstance(use, str))
    if len({use._replace(parent=None, edits=None) for use in uses}) > 1:
        return "what follows depends on the mode or on optional arguments"
    use: Use = uses[0]._replace(edits=frozenset().union(*(use.edits for use in uses)))
    if use.activation is not None and has_hooks(norm):
        return "it has hooks, which would see another output"
    return use


def _veto(
    norm: Any, use: Use, names: dict[nn.Module, str], seen: _Seen, places: Places, follows: Follows
) -> str | None:
    """Why a layer cannot do what ``use`` says, or None."""
    if use.module is not None:
        name = names[use.module]
        if has_hooks(use.module):
            return f"its activation {name} has hooks"
        for parent, _ in places[use.module]:
            if parent in seen.unproven:
                return f"its activation {name} is shared, and who uses it unproven: {seen.unproven[parent]}"
        for other in seen.before[use.module]:
            if not isinstance(follows.get(other), Use) or follows[other].module is not use.module:
                return f"its activation {name} is used elsewhere too"
    if use.edits:
        forward = _forward(type(use.parent), seen)
        if isinstance(forward, str):
            return f"{_what(use)} follows it in a forward that cannot be changed: {forward}"
        for edit in use.edits:
            why_not = forward.why_not(use.parent, edit) or called_elsewhere(forward, edit.layer)
            if why_not is not None:
                return why_not
            # A line that runs several times has to mean the same each time.
            for wanted in seen.edited[use.parent, edit.position]:
                if wanted is None or not isinstance(follows.get(wanted[0]), Use) or not _same(wanted[1], edit):
                    return f"the line with the {_what(use)} after it serves others too"
    return None


def _same(edit: Edit, other: Edit) -> bool:
    """Whether two edits leave the same code: where a call is dropped, it does not matter which layer does the work."""
    return edit == other or edit.action == other.action == "drop"


def _what(use: Use) -> str | None:
    return f"sum and {use.activation}" if use.residual else use.activation


def _forward(cls: type, seen: _Seen) -> Forward | str:
    if cls not in seen.forwards:
        try:
            seen.forwards[cls] = Forward(cls)
        except ValueError as error:
            seen.forwards[cls] = str(error)
    return seen.forwards[cls]


def _watch(parent: nn.Module, graphs: list[fx.Graph], unproven: dict[nn.Module, str]) -> None:
    """Trace the parent's forward on symbolic input."""
    reason = why_opaque(parent)
    if reason is not None:
        unproven[parent] = reason
        return
    try:
        trace_symbolically(parent, activation_name, graphs.append)
    except Exception as error:  # Whatever a user's code raises on symbolic input.
        message = str(error).partition("\n")[0]
        name = type(parent).__name__
        unproven[parent] = f"{name}.forward cannot be traced ({type(error).__name__}: {message})"


def _try_out(model: nn.Module, example_inputs: Any, graphs: dict[nn.Module, list[fx.Graph]], seen: _Seen) -> None:
    """Add what the example inputs show; it proves what symbolic traces could not."""
    examples, failures = example_graphs(model, example_inputs, list(graphs))
    for parent in graphs:
        if parent not in seen.unproven:
            graphs[parent] += examples.get(parent, [])
        elif parent in failures:
            seen.unproven[parent] += f"; {failures[parent]}"
        else:
            del seen.unproven[parent]
            seen.tried_out.add(parent)
            graphs[parent] = examples[parent]


def _read(graph: fx.Graph, parent: nn.Module, seen: _Seen) -> None:
    """Note the calls of layers and activations in one graph."""
    called = {node: parent.get_submodule(node.target) for node in graph.nodes if node.op == "call_module"}
    num_calls = Counter(called.values())
    wanted: dict[Node, tuple[nn.Module, Edit]] = {}
    for node, module in called.items():
        if is_convertible(module):
            if "." in node.target:
                use: Use | str = f"{type(parent).__name__}.forward calls it past its parent"
            elif num_calls[module] > 1:
                use = "called more than once"
            else:
                use, edits = _use(node, parent, called, parent in seen.tried_out)
                wanted |= {place: (module, edit) for place, edit in edits.items()}
            seen.after[module].append(use)
        elif activation_name(module) is not None:
            seen.before[module].append(_layer_before(node, called))
    for node in graph.nodes:
        position = node.meta.get("position")
        if position is not None:
            seen.edited[parent, position].append(wanted.get(node))


def _use(node: Node, parent: nn.Module, called: Called, tried_out: bool) -> tuple[Use | str, dict[Node, Edit]]:
    """(what consumes the output of a layer's call, as a Use or why that is unclear; {node: Edit})."""
    consumers = _consumers(node, called)
    activation = next((user for user in consumers if _applies(user, called)), None)
    if activation is not None:
        if len(consumers) > 1:
            return f"its output has another use besides {_describe(activation)}", {}
        return _checked(parent, called, node.target, activation)
    if len(consumers) != 1:
        return Use(), {}
    (sum_,) = consumers
    if is_clamp(sum_):
        return "followed by clamp, which is no activation: its gradient is 1 at the very bounds", {}
    if isinstance(called[node], nn.GroupNorm) or not is_sum(sum_):
        return Use(), {}
    if tried_out and _name(sum_) in ("__iadd__", "iadd", "add_"):
        return "a sum in place follows it, and an example does not show under which names it is used", {}
    operands = [_source(operand, called) for operand in sum_.args]
    if operands[0] is operands[1]:
        return Use(), {}
    first = operands[0] is node
    if not first and is_convertible(called.get(operands[0])) and len(_consumers(operands[0], called)) == 1:
        return Use(), {}  # The sum is the other layer's.
    consumers = _consumers(sum_, called)
    if len(consumers) != 1 or not _applies(consumers[0], called):
        return Use(), {}
    # The layer will be called at the sum: until then its input must stay what it is.
    source: Node = node.args[0] if len(node.args) == 1 else None
    if not _makes_fresh(called.get(source)) or len(source.users) != 1:
        return (
            "its input is not the output of a convolution for it alone, which could wait for the sum that follows",
            {},
        )
    # The other operand is kept for backward, which native does not do: nobody may change it in place.
    if _is_used_after(operands[first], sum_, called):
        return "the other operand of the sum that follows is used again, and might change in place", {}
    return _checked(parent, called, node.target, consumers[0], {node: "defer", sum_: "add"}, first)


def _makes_fresh(module: Any) -> bool:
    """Whether a module's output is a tensor of its own: a convolution's, or of a Sequential that ends with one."""
    if type(module).__call__ is not nn.Module.__call__ or has_hooks(module):
        return False
    if type(module).forward is nn.Sequential.forward and "forward" not in vars(module):
        return len(module) > 0 and _makes_fresh(module[-1])
    return isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))


def _is_used_after(value: Any, node: Node, called: Called) -> bool:
    """Whether a value, or what may share its memory, is used after a node."""
    if not isinstance(value, fx.Node):
        return False
    family: list[Node] = [value]
    while _may_share_memory(family[0], called):
        family.insert(0, family[0].args[0])
    for member in family:  # grows
        for user in member.users:
            if user is node or user in family:
                continue
            if node < user:
                return True
            if user.args and user.args[0] is member and _may_share_memory(user, called):
                family.append(user)
    return False


def _may_share_memory(node: Node, called: Called) -> Any:
    """Whether a node's value may lie in its first argument's memory: a view, or the same tensor, changed or not."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    module = called.get(node)
    if module is not None:
        return is_identity(module) or bool(getattr(module, "inplace", False))
    # "+=" reads as a sum in a symbolic trace.
    return node.op in ("call_function", "call_method") and (
        is_sum(node) or node.kwargs.get("inplace", False) or _describe(node) != _name(node) or _describe(node) in _VIEWS
    )


def _checked(
    parent: nn.Module,
    called: Called,
    layer: str,
    activation: Node,
    sum_: dict[Node, str] | None = None,
    first: bool = True,
) -> tuple[Use | str, dict[Node, Edit]]:
    """As _use, for an activation that one layer alone feeds, maybe by way of a sum."""
    actions, module = dict(sum_ or {}), called.get(activation)
    if module is None:
        actions[activation] = "drop"
    elif "." in activation.target:
        return f"its activation {activation.target} is not its sibling", {}
    edits = {}
    for node, action in actions.items():
        if node.meta["position"] is None:
            return f"no line of the forward's own shows {_describe(node)}, which follows it", {}
        target = node.target if action == "drop" else None
        edits[node] = Edit(action, node.meta["position"], layer, target, first)
    name = called_activation(activation) if module is None else activation_name(module)
    return Use(name, module, sum_ is not None, parent if edits else None, frozenset(edits.values())), edits


def _applies(node: Node, called: Called) -> bool:
    """Whether a node is an activation that can be fused."""
    return activation_name(called.get(node)) is not None or called_activation(node) is not None


def _name(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _describe(node: Node) -> str:
    return _name(node).rstrip("_")


def _consumers(node: Node, called: Called) -> list[Node]:
    """The nodes that compute with a node's value; an nn.Identity only hands it on."""
    consumers = []
    for user in node.users:
        if is_identity(called.get(user)):
            consumers += _consumers(user, called)
        elif not _asks(user):
            consumers.append(user)
    return consumers


def _source(node: Any, called: Called) -> Any:
    """The node whose value this is."""
    while isinstance(node, fx.Node) and is_identity(called.get(node)) and node.args:
        node = node.args[0]
    return node


def _layer_before(node: Node, called: Called) -> nn.Module | None:
    """The layer whose value, maybe in a sum, an activation gets; None for anything else."""
    source = _source(node.args[0], called) if node.args else None
    if source is not None and isinstance(source, fx.Node) and is_sum(source):
        operands = [_source(operand, called) for operand in source.args]
        return next((called[o] for o in operands if o in called and is_convertible(called[o])), None)
    return called.get(source)


def _asks(node: Node) -> Any:
    """Whether a node asks a tensor for what does not depend on its value."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel", "stride")
    return (
        node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "dtype", "device", "ndim")
    )
