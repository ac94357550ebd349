"""convert(model) fuses normalisation layers with the activations after them; revert(model) undoes it.

Nothing is fused on a guess: convert_trace.py records what each module's own forward does, convert_proof.py reads what
provably follows a layer, and convert_rewrite.py takes sums and functional activations out of a forward. The layers
themselves only change class.
"""

import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from . import convert_rewrite
from .convert_classes import (
    ACTIVATION_CLASS,
    activation_name,
    fused_class,
    inner_modules,
    is_norm,
    norm_kind,
    plain_class,
    why_not_convertible,
)
from .convert_proof import Places, Use, what_follows
from .convert_rewrite import Edit
from .distributed import SyncBatchNormAct, unsynchronise
from .modules import GroupNormAct


class Site(NamedTuple):
    """What convert made of one normalisation layer."""

    name: str  # its path in the model, "" for the model itself
    kind: str  # its class before the conversion
    outcome: str  # "fused with relu6", "fused with add, relu", "no activation" or "left"
    reason: str  # why it was left


class FusedActivation(nn.Identity):
    """Stands in the place of an activation that the normalisation layers before it compute since convert.

    Args:
        original: the activation module, for revert.
        num_norms: how many layers compute it.
    """

    def __init__(self, original: nn.Module, num_norms: int) -> None:
        super().__init__()
        # Not a registered child: modules() lists what it listed before.
        self.__dict__["original"] = original
        self.num_norms = num_norms
        self.training = original.training

    def extra_repr(self) -> str:
        return f"{self.original}, computed by the normalisation before it"


class _Origin(NamedTuple):
    """Where a layer's activation was before convert."""

    module: FusedActivation | None  # in the place of a module; None: in its parent's forward
    residual: bool  # the parent's forward also added something first


def convert(model: nn.Module, example_inputs: Any = None, *, report: bool | list[Site] = False) -> nn.Module:
    """Fuse every BatchNorm and GroupNorm of ``model`` with what provably follows it, in place.

    What follows may be an activation, as a module or a function, and for a BatchNorm the sum of a residual block before
    it. The layers change class, to BatchNormAct1d, 2d, 3d and GroupNormAct: parameters, buffers, hooks, state_dict and
    an optimizer built before stay valid. A layer that is fused with nothing changes class too, for the faster kernel.
    A module whose forward calls what is fused as a function, or adds, becomes an instance of a subclass of its class,
    of the same name, in whose forward those calls are left out. Only torch.nn's exact layers, and timm's, are touched.
    The proof holds for ``model`` and its attributes as they are now, in both modes; code outside it that calls or
    shares its layers is not seen.

    Args:
        model: any module, in any mode, on any device.
        example_inputs: what to call ``model`` with: a tuple of positional arguments, a dict of keyword arguments, or
            the only argument. A copy of ``model`` runs on them, in training and in evaluation, which proves more than
            symbolic traces do: for inputs that take the same course.
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
    follows = what_follows(model, names, places, example_inputs)
    sites = [
        Site(name, norm_kind(module), *_outcome(module, follows.get(module)))
        for module, name in names.items()
        if is_norm(module)
    ]
    uses = {norm: use if isinstance(use, Use) else Use() for norm, use in follows.items() if _changes(norm, use)}
    num_norms = Counter(use.module for use in uses.values() if use.module is not None)
    fused: dict[Any, FusedActivation] = {
        activation: FusedActivation(activation, n) for activation, n in num_norms.items()
    }
    edits: dict[Any, set[Edit]] = defaultdict(set)
    for norm, use in uses.items():
        _fuse(norm, use, fused.get(use.module))
        if use.edits:
            edits[use.parent] |= use.edits
    for parent, its_edits in edits.items():
        convert_rewrite.rewrite(parent, its_edits)
    _replace(fused, places)
    _tell(sites, report)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Turn the fused layers of ``model`` back into torch.nn's, in place; after convert, exactly what it was.

    A layer whose activation convert did not fuse (built as BatchNormAct2d, say) becomes an
    ``nn.Sequential(BatchNorm2d, ReLU6)`` of the same parameters, with ".0." in their state_dict keys, or an
    ``nn.Sequential(ReLU6, BatchNorm2d)`` for a pre_activation. So does a layer whose activation cannot come back
    because its place is not in ``model``, or serves layers outside it too. A Sequential cannot take the ``residual``
    argument.

    Args:
        model: any module, in any mode, on any device.

    Returns:
        ``model``; where ``model`` is itself a layer that becomes a Sequential, that Sequential.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.
        ValueError: a layer's sum stands in a forward outside ``model``, or a class was derived from a converted one
            (FSDP2 does that: revert before). Nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"revert: model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if type(module) is SyncBatchNormAct:
            unsynchronise(module)
    places = _places(model)
    norms = {module: name for name, module in model.named_modules() if plain_class(type(module)) is not None}
    rewritten = [module for module in places.keys() | {model} if convert_rewrite.is_rewritten(module)]
    in_forward = {norm for module in rewritten for norm in convert_rewrite.deferred_layers(module)}
    num_norms = Counter(origin.module for norm in norms if (origin := vars(norm).get("fused_from")) is not None)
    # An activation comes back once every layer that computes it is here to stop doing so.
    replaced: dict[nn.Module, Any] = {
        module: vars(module)["original"].train(module.training)
        for module in places
        if type(module) is FusedActivation and num_norms[module] == module.num_norms
    }

    def comes_back(norm: nn.Module) -> bool:
        origin = vars(norm).get("fused_from")
        if origin is None:
            return False
        back = norm in in_forward if origin.module is None else origin.module in replaced
        if origin.residual and not (back and norm in in_forward):
            name = norms[norm] or type(norm).__name__
            raise ValueError(f"revert: the sum after {name} is computed for a forward outside; revert the whole model")
        return back

    back = {norm: comes_back(norm) for norm in norms}
    for module in rewritten:
        convert_rewrite.restore(module)
    for norm in norms:
        names = [norm.pre_activation, None if back[norm] else norm.activation]
        _unfuse(norm)
        if names != [None, None]:
            before, after = ([] if name is None else [ACTIVATION_CLASS[name]()] for name in names)
            replaced[norm] = nn.Sequential(*before, norm, *after).train(norm.training)
    _replace(replaced, places)
    reverted: nn.Module = replaced.get(model, model)
    return reverted


def _changes(norm: Any, use: Any) -> bool:
    """Whether a layer changes class: one that holds its activation itself only where it is fused with it."""
    return isinstance(use, Use) or not activation_name(inner_modules(norm)[1])


def _fuse(norm: Any, use: Use, fused_activation: FusedActivation | None) -> None:
    norm.__class__ = fused_class(type(norm))
    norm.activation = use.activation
    if not isinstance(norm, GroupNormAct):
        norm.pre_activation = None
    if use.activation is not None:
        # For revert; not a registered child either.
        norm.__dict__["fused_from"] = _Origin(fused_activation, use.residual)


def _unfuse(norm: Any) -> None:
    norm.__class__ = plain_class(type(norm))
    for name in ("activation", "pre_activation", "fused_from"):
        norm.__dict__.pop(name, None)


def _places(model: nn.Module) -> Places:
    """Every (parent, name) that a module below ``model`` is registered at."""
    places = defaultdict(list)
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places[child].append((parent, name))
    return places


def _replace(replacements: Mapping[Any, nn.Module], places: Places) -> None:
    for module, replacement in replacements.items():
        for parent, name in places[module]:
            parent._modules[name] = replacement


def _outcome(norm: Any, use: Use | str | None) -> tuple[str, str]:
    """A Site's outcome and reason; ``use`` is what what_follows says of the layer."""
    if isinstance(use, Use):
        if use.activation is None:
            return "no activation", ""
        return f"fused with {'add, ' * use.residual}{use.activation}", ""
    if use is not None:
        return "left", use
    if plain_class(type(norm)) is not None and "forward" not in vars(norm):
        name = norm.activation or norm.pre_activation
        origin = vars(norm).get("fused_from")
        residual = origin is not None and origin.residual
        return "no activation" if name is None else f"fused with {'add, ' * residual}{name}", "already converted"
    if plain_class(type(norm)) is not None:
        return "left", "its forward is replaced on the instance"
    if fused_class(type(norm)) is not None:
        return "left", why_not_convertible(norm) or ""
    return "left", f"{type(norm).__module__}.{type(norm).__name__} is not a class that is fused"


def _tell(sites: list[Site], report: bool | list[Site]) -> None:
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
