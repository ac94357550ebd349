"""convert(model) fuses normalisation layers with the activations after them; revert(model) undoes it.

Nothing is fused on a guess. torch.fx traces each module's own forward, with the modules below it as opaque
calls. A layer is fused when all it computes goes into one activation module that serves nothing else.
"""

import copy
import inspect
import warnings
from collections import Counter, defaultdict
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from .distributed import SyncBatchNormAct, unsynchronise
from .modules import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, GroupNormAct

_FUSED_CLASS = {
    nn.BatchNorm1d: BatchNormAct1d,
    nn.BatchNorm2d: BatchNormAct2d,
    nn.BatchNorm3d: BatchNormAct3d,
    nn.GroupNorm: GroupNormAct,
}
_PLAIN_CLASS = {fused: plain for plain, fused in _FUSED_CLASS.items()} | {SyncBatchNormAct: nn.SyncBatchNorm}
_NORM_BASES = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
_NORM_NAMES = {plain.__name__ for plain in _FUSED_CLASS}

_ACTIVATION_CLASS = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "sigmoid": nn.Sigmoid,
    "leaky_relu": nn.LeakyReLU,
}
_ACTIVATION_NAME = {cls: name for name, cls in _ACTIVATION_CLASS.items()}
_FUNCTIONAL = {*_ACTIVATION_CLASS, "hardtanh", "clamp"}

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Site(NamedTuple):
    """What convert made of one normalisation layer."""

    name: str  # its path in the model, "" for the model itself
    kind: str  # its class before the conversion
    outcome: str  # "fused with relu6", "no activation" or "left"
    reason: str  # why it was left


class FusedActivation(nn.Identity):
    """Stands in the place of an activation that the normalisation layers before it compute since convert.

    Args:
        original: the activation module, for revert.
        num_norms: how many layers compute it.
    """

    def __init__(self, original, num_norms):
        super().__init__()
        # Not a registered child: modules() lists what it listed before.
        self.__dict__["original"] = original
        self.num_norms = num_norms
        self.training = original.training

    def extra_repr(self):
        return f"{self.original}, computed by the normalisation before it"


def convert(model, *, report=False):
    """Fuse every BatchNorm and GroupNorm of ``model`` with the activation that provably follows it, in place.

    The layers change class, to BatchNormAct1d, 2d, 3d and GroupNormAct: parameters, buffers, hooks,
    state_dict and an optimizer built before stay valid. A layer that is fused with nothing changes class too,
    for the faster kernel. Only torch.nn's exact classes are touched. The proof holds for ``model`` and its
    attributes as they are now, in both modes; code outside it that calls or shares its layers is not seen.

    Args:
        model: any module, in any mode, on any device.
        report: True prints a line for each normalisation layer; a list is extended by a ``Site`` for each.

    Returns:
        ``model``, which computes the same numbers.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    names = {module: name for name, module in model.named_modules()}
    places = _places(model)
    follows = _what_follows(model, names, places)
    sites = [
        Site(name, _kind(module), *_outcome(module, follows.get(module)))
        for module, name in names.items()
        if isinstance(module, _NORM_BASES) or _kind(module) in _NORM_NAMES
    ]
    num_norms = Counter(after for after in follows.values() if isinstance(after, nn.Module))
    fused = {activation: FusedActivation(activation, n) for activation, n in num_norms.items()}
    for norm, after in follows.items():
        _fuse(norm, fused.get(after))
    _replace(fused, places)
    _tell(sites, report)
    return model


def revert(model):
    """Turn the fused layers of ``model`` back into torch.nn's, in place; after convert, exactly what it was.

    A layer whose activation convert did not fuse (built as BatchNormAct2d, say) becomes an
    ``nn.Sequential(BatchNorm2d, ReLU6)`` of the same parameters, with ".0." in their state_dict keys, or an
    ``nn.Sequential(ReLU6, BatchNorm2d)`` for a pre_activation. So does a layer whose FusedActivation is not
    in ``model``, or serves layers outside it too. A Sequential cannot take the ``residual`` argument.

    Args:
        model: any module, in any mode, on any device.

    Returns:
        ``model``; where ``model`` is itself a layer that becomes a Sequential, that Sequential.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"revert: model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if type(module) is SyncBatchNormAct:
            unsynchronise(module)
    places = _places(model)
    norms = [module for module in model.modules() if type(module) in _PLAIN_CLASS]
    num_norms = Counter(vars(norm).get("fused_activation") for norm in norms)
    # An activation comes back once every layer that computes it is here to stop doing so.
    replaced = {
        module: module.original.train(module.training)
        for module in places
        if type(module) is FusedActivation and num_norms[module] == module.num_norms
    }
    for norm in norms:
        comes_back = vars(norm).get("fused_activation") in replaced
        names = [norm.pre_activation, None if comes_back else norm.activation]
        _unfuse(norm)
        if names != [None, None]:
            before, after = ([] if name is None else [_ACTIVATION_CLASS[name]()] for name in names)
            replaced[norm] = nn.Sequential(*before, norm, *after).train(norm.training)
    _replace(replaced, places)
    return replaced.get(model, model)


def _fuse(norm, fused_activation):
    norm.__class__ = _FUSED_CLASS[type(norm)]
    norm.activation = None
    if not isinstance(norm, GroupNormAct):
        norm.pre_activation = None
    if fused_activation is not None:
        norm.activation = _activation_name(fused_activation.original)
        # Tells revert where the activation was; not a registered child either.
        norm.__dict__["fused_activation"] = fused_activation


def _unfuse(norm):
    norm.__class__ = _PLAIN_CLASS[type(norm)]
    for name in ("activation", "pre_activation", "fused_activation"):
        norm.__dict__.pop(name, None)


def _places(model):
    """Every (parent, name) that a module below ``model`` is registered at."""
    places = defaultdict(list)
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places[child].append((parent, name))
    return places


def _replace(replacements, places):
    for module, replacement in replacements.items():
        for parent, name in places[module]:
            parent._modules[name] = replacement


def _is_convertible(module):
    # A forward on the instance (accelerate's hooks put one there) would go on calling the old class's.
    return type(module) in _FUSED_CLASS and "forward" not in vars(module)


def _activation_name(module):
    """Our name of an activation module, None for anything else."""
    if module is None or "forward" in vars(module):
        return None
    cls = type(module)
    if cls is nn.Hardtanh:
        return "relu6" if (module.min_val, module.max_val) == (0, 6) else None
    if cls is nn.LeakyReLU and module.negative_slope != 0.01:
        return None
    return _ACTIVATION_NAME.get(cls)


def _has_hooks(module):
    return any(getattr(module, hooks, None) for hooks in _HOOKS)


def _kind(module):
    return module.original_name if isinstance(module, torch.jit.ScriptModule) else type(module).__name__


def _outcome(norm, after):
    """A Site's outcome and reason; ``after`` is what _what_follows says of the layer."""
    if _is_convertible(norm):
        if isinstance(after, nn.Module):
            return f"fused with {_activation_name(after)}", ""
        return ("no activation", "") if after is None else ("left", after)
    if type(norm) in _PLAIN_CLASS:
        name = norm.activation or norm.pre_activation
        return "no activation" if name is None else f"fused with {name}", "already converted"
    if type(norm) in _FUSED_CLASS:
        return "left", "its forward is replaced on the instance"
    return "left", f"{type(norm).__module__}.{type(norm).__name__} is not a class that is fused"


def _tell(sites, report):
    counts = Counter(site.outcome.split()[0] for site in sites)
    if report is True:
        for name, kind, outcome, reason in sites:
            print(f"{name or '(model)'}: {kind} {outcome}{reason and f': {reason}'}")
        print(f"{counts['fused']} fused, {counts['no']} without an activation, {counts['left']} left")
    elif report is not False:
        report.extend(sites)
    if not counts["fused"]:
        warnings.warn(
            f"normfused.convert fused nothing: of the model's {len(sites)} normalisation layers, none is "
            "provably followed by an activation that it can be fused with (report=True says why)",
            stacklevel=3,
        )


# The proof


class _Seen(NamedTuple):
    """What the traces show."""

    after: dict  # layer -> what follows each call: the activation module, None, or why that is unclear
    before: dict  # activation -> the module that feeds each call, None for anything else
    unproven: dict  # parent -> why its traces do not show everything


def _what_follows(model, names, places):
    """For each convertible layer: the activation module to fuse it with, None, or why it is left."""
    seen = _Seen(defaultdict(list), defaultdict(list), {})
    # A forward that draws random numbers must not change the caller's.
    with torch.random.fork_rng(devices=()), torch.no_grad():
        for parent in model.modules():
            if any(_is_convertible(m) or _activation_name(m) for m in parent.modules() if m is not parent):
                _watch(parent, seen)
    follows = {norm: _follower(norm, seen, places[norm]) for norm in names if _is_convertible(norm)}
    vetoes = {
        activation: _veto(activation, names[activation], seen, places[activation], follows)
        for activation in follows.values()
        if isinstance(activation, nn.Module)
    }
    return {norm: vetoes.get(after) or after for norm, after in follows.items()}


def _follower(norm, seen, places):
    """What follows one layer, by its own parent alone; as _what_follows."""
    if not places:
        return None  # The layer is the model.
    if len(places) > 1:
        return f"registered {len(places)} times"
    ((parent, _),) = places
    if parent in seen.unproven:
        return f"cannot prove what follows: {seen.unproven[parent]}"
    if norm not in seen.after:
        return f"{type(parent).__name__}.forward does not call it"
    after, *others = dict.fromkeys(seen.after[norm])
    if others:
        reasons = (reason for reason in (after, *others) if isinstance(reason, str))
        return next(reasons, "what follows depends on the mode or on optional arguments")
    if isinstance(after, nn.Module) and _has_hooks(norm):
        return "it has hooks, which would see another output"
    return after


def _veto(activation, name, seen, places, follows):
    """Why an activation cannot be taken away, or None."""
    if _has_hooks(activation):
        return f"its activation {name} has hooks"
    for parent, _ in places:
        if parent in seen.unproven:
            return f"its activation {name} is shared, and who uses it unproven: {seen.unproven[parent]}"
    if any(follows.get(norm) is not activation for norm in seen.before[activation]):
        return f"its activation {name} is used elsewhere too"
    return None


def _watch(parent, seen):
    """Trace the parent's forward in training and evaluation, with its optional arguments and without."""
    cls = type(parent)
    reason = _why_opaque(parent)
    if reason is not None:
        seen.unproven[parent] = reason
        return
    try:
        parameters = inspect.signature(cls.forward).parameters.values()
        absent = {p.name: None for p in parameters if p.default is None}
        for training in (True, False):
            for arguments in ({}, absent) if absent else ({},):
                tracer = _Tracer()
                stand_in = _stand_in(parent, training)
                try:
                    tracer.trace(stand_in, arguments)
                    # What forward keeps on the module is a use of it.
                    leaves = pytree.tree_leaves(vars(stand_in))
                    kept = [leaf.node for leaf in leaves if isinstance(leaf, fx.Proxy)]
                    tracer.graph.call_function(tuple, (kept,))
                finally:
                    # A trace that breaks off still shows the calls up to there.
                    _read(tracer.graph, parent, seen)
    except Exception as error:  # Whatever a user's code raises on symbolic input.
        message = str(error).partition("\n")[0]
        seen.unproven[parent] = f"{cls.__name__}.forward cannot be traced ({type(error).__name__}: {message})"


def _why_opaque(parent):
    """Why the parent's class does not say what it runs, or None."""
    cls = type(parent)
    if cls.forward is nn.Module.forward:
        return f"{cls.__name__} has no forward"
    if "forward" in vars(parent) or cls.__call__ is not nn.Module.__call__:
        return f"{cls.__name__} runs more than its forward"
    # Tracing torch's own wrappers (DistributedDataParallel, say) would have effects.
    if cls.forward is not nn.Sequential.forward and cls.forward.__module__.startswith("torch."):
        return f"{cls.__name__}.forward is PyTorch's own"
    return None


class _Tracer(fx.Tracer):
    """Records the calls that one forward makes to the modules below it, none of which is entered."""

    proxy_buffer_attributes = True  # A buffer that forward updates is left alone.

    def is_leaf_module(self, m, module_qualified_name):
        return True

    def call_module(self, m, forward, args, kwargs):
        # One that is not registered is entered: a slice of a Sequential, say, calls some that are.
        if m not in self.submodule_paths:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


def _stand_in(parent, training):
    """A copy of ``parent`` to trace, so that what its forward assigns or appends is not kept."""
    stand_in = object.__new__(type(parent))
    for name, value in vars(parent).items():
        stand_in.__dict__[name] = copy.copy(value) if isinstance(value, (dict, list, set)) else value
    stand_in.__dict__["training"] = training
    # An activation that is reached past its registered name (in a list, say) must not pass for it.
    for name, child in parent._modules.items():
        if _activation_name(child) is not None:
            stand_in._modules[name] = copy.copy(child)
    return stand_in


def _read(graph, parent, seen):
    """Note the calls of layers and activations in one graph."""
    called = {node: parent.get_submodule(node.target) for node in graph.nodes if node.op == "call_module"}
    num_calls = Counter(called.values())
    for node, module in called.items():
        if _activation_name(module) is not None:
            seen.before[module].append(called.get(node.args[0]) if node.args else None)
        elif _is_convertible(module):
            if "." in node.target:
                after = f"{type(parent).__name__}.forward calls it past its parent"
            else:
                after = _after(node, called) if num_calls[module] == 1 else "called more than once"
            seen.after[module].append(after)


def _after(node, called):
    """What consumes the output of a layer's call: the activation module, None, or why that is unclear."""
    users = list(node.users)
    activations = [user for user in users if _activation_name(called.get(user)) is not None]
    if len(users) > 1 and activations:
        return f"its output has another use besides {activations[0].target}"
    if activations:
        (user,) = activations
        return called[user] if "." not in user.target else f"its activation {user.target} is not its sibling"
    for user in users:
        name = getattr(user.target, "__name__", user.target).rstrip("_")
        if user.op in ("call_function", "call_method") and name in _FUNCTIONAL:
            return f"functional activation ({name}), not fused yet"
    return None
