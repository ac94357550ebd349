"""Activation memory: outputs that are computed again in the backward pass instead of kept.

The output y of a fused layer is cheap to compute from its input x, which the layer's own backward keeps anyway, but the
next convolution keeps y as well. ``recompute_activations`` sees what autograd is about to keep
(torch.autograd.graph.saved_tensors_hooks) and replaces each y by a recipe.

A y is recognised by its storage. The table of recipes refers to them weakly: a recipe lives as long as the layer's own
backward node is waiting, or somebody kept it in place of y. And a recipe refers to y's storage weakly, so that no
other storage can take its address meanwhile.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from . import backends, stages


class _Local(threading.local):
    choice: "_Choice | None" = None  # of the innermost recompute_activations in this thread


local = _Local()
# Address of a storage -> the recipe of the y in it.
_recipes: "weakref.WeakValueDictionary[int, _Recipe]" = weakref.WeakValueDictionary()


# Recomputing one output out of so many in a row of residual blocks would need all before it: one in between is kept.
_MAX_CHAIN = 16


class _Choice:
    """Which outputs are recomputed: of those that are large enough a share, spread over the model."""

    def __init__(self, share: float, min_bytes: int) -> None:
        self.share, self.min_bytes = share, min_bytes
        self.owed = 0.0  # bytes that the share of what came so far is ahead of what was recomputed of it

    def takes(self, y: torch.Tensor) -> bool:
        if y.nbytes < self.min_bytes:
            return False
        self.owed += self.share * y.nbytes
        if self.owed < y.nbytes:
            return False
        self.owed -= y.nbytes
        return True


@contextlib.contextmanager
def recompute_activations(share: float = 1.0, *, min_bytes: int = 1 << 20) -> Iterator[None]:
    """Around the forward pass: what the fused layers put out is computed again in the backward pass instead of kept.

    A chain convolution -> norm -> activation -> convolution keeps half as much, for one more read and write of each
    output in the backward pass (GroupNorm: also a second read). Gradients are bit-equal, and running statistics are
    updated once. Only layers that run on normfused's kernels take part (``normfused.info()``), in eager mode; other
    tensors are kept as usual. Within it, ``torch.utils.checkpoint`` and other saved_tensors_hooks come first, and
    torch.func's transforms raise, as they do with any such hooks. The backward pass may be outside.

    Args:
        share: how much of these outputs to recompute, in bytes, from 0 to 1; the rest is kept. Time and memory follow.
        min_bytes: outputs of fewer bytes are kept: the bookkeeping would cost more time than their memory is worth.

    Raises:
        ValueError: ``share`` is not from 0 to 1.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"recompute_activations: share must be from 0 to 1, got {share}")
    outer = local.choice
    local.choice = _Choice(share, min_bytes)
    try:
        with saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        local.choice = outer


def takes(y: torch.Tensor) -> bool:
    """Whether ``y``, which a layer just computed, is to be recomputed, and what autograd keeps passes through here."""
    if local.choice is None or torch.compiler.is_compiling() or not y.requires_grad:
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and hooks[0] is _pack and local.choice.takes(y)


def in_backward() -> bool:
    """Whether this code runs in a backward pass, as what torch.utils.checkpoint computes again does."""
    return torch._C._current_graph_task_id() != -1


def remember_batch_norm(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    activation: str | None,
    backend: str,
    pre_activation: str | None = None,
) -> None:
    """Let ``y``, which a fused BatchNorm just computed with these, be recomputed."""
    # Without an activation the layer's own backward does not keep residual, and nothing would be gained.
    if activation is not None or residual is None:
        # Copies, for an optimizer may change the parameters, and FSDP free them, before y is asked for.
        scale = stages.scale(None if weight is None else weight.detach(), invstd)
        bias = None if bias is None else bias.detach().clone()

        def apply(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
            return stages.apply(x, scale, bias, residual, mean, activation, backend, pre_activation)

        _remember(y, apply, (x, residual))


def remember_group_norm(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_groups: int,
    eps: float,
    activation: str | None,
    backend: str,
) -> None:
    """The same for a fused GroupNorm."""
    weight, bias = (None if t is None else t.detach().clone() for t in (weight, bias))

    def apply(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = backends.OPERATORS[backend].group_norm_act(x, weight, bias, num_groups, eps, activation)[0]
        return y

    _remember(y, apply, (x,))


def _remember(y: torch.Tensor, apply: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor | None, ...]) -> None:
    # x may be an earlier layer's y: then this recipe holds that recipe.
    packed = [None if t is None else _pack(t) for t in inputs]
    chain = 1 + max((p.recipe.chain for p in packed if isinstance(p, _Recomputed)), default=0)
    if chain <= _MAX_CHAIN:
        recipe = _Recipe(y, apply, packed, chain)
        _recipes[y.untyped_storage()._cdata] = recipe
        # The layer's backward node keeps the recipe until it runs (its backward lets it go), or is no more.
        cast(Any, y.grad_fn).recipe = recipe


class _Recipe:
    """How to compute a y again."""

    def __init__(
        self,
        y: torch.Tensor,
        apply: Callable[..., torch.Tensor],
        inputs: "list[_Recomputed | _Kept | None]",
        chain: int,
    ) -> None:
        storage = y.untyped_storage()
        self.storage, self.address = StorageWeakRef(storage), storage.data_ptr()
        self.dtype, self.version = y.dtype, y._version
        self.apply, self.inputs = apply, inputs
        self.chain = chain  # how many recipes have to follow each other, this one included
        self.y: torch.Tensor | None = None

    def makes(self, t: torch.Tensor) -> bool:
        """Whether ``t`` is the y, or a view of it, and has not been changed in place."""
        return (
            not self.storage.expired()
            and t.untyped_storage().data_ptr() == self.address
            and t.dtype == self.dtype
            and t._version == self.version
        )

    def result(self) -> torch.Tensor:
        """y. It stays until all who asked for the recipe have let it go, as long as y itself would have."""
        if self.y is None:
            self.y = self.apply(*(None if packed is None else packed.unpack() for packed in self.inputs))
        return self.y


class _Recomputed:
    """A tensor that a recipe makes."""

    __slots__ = "geometry", "recipe"

    def __init__(self, recipe: _Recipe, t: torch.Tensor) -> None:
        self.recipe = recipe
        self.geometry = t.size(), t.stride(), t.storage_offset()

    def unpack(self) -> torch.Tensor:
        return self.recipe.result().as_strided(*self.geometry)


class _Kept:
    """A tensor that is kept; with hooks autograd itself no longer watches over changes in place."""

    __slots__ = "tensor", "version"

    def __init__(self, t: torch.Tensor) -> None:
        # t may be the very output of the node that keeps this: without detach a cycle, which nobody collects in time.
        self.tensor = t.detach()
        self.version = t._version

    def unpack(self) -> torch.Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{self.tensor.type()} of shape {tuple(self.tensor.shape)} is at version {self.tensor._version}; "
                f"expected version {self.version} instead (recompute_activations)"
            )
        return self.tensor


def _pack(t: torch.Tensor) -> _Recomputed | _Kept:
    # Parameters, indices and the like are no output of a layer that wants a gradient: not worth a look.
    if t.grad_fn is not None and type(t) is torch.Tensor and t.layout is torch.strided:
        recipe = _recipes.get(t.untyped_storage()._cdata)
        if recipe is not None and recipe.makes(t):
            return _Recomputed(recipe, t)
    return _Kept(t)


def _unpack(packed: _Recomputed | _Kept) -> torch.Tensor:
    return packed.unpack()


def checkpoint_policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
    """A policy of selective checkpointing: what is expensive is saved, normalisation and activations are recomputed.

    Saved are convolutions, matrix products and attention; all else, fused layers among it, is computed again. A fused
    layer is one operator, so that its statistics are computed again too, to the same bits: one more read of x. For ::

        from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

        context_fn = functools.partial(create_selective_checkpoint_contexts, normfused.checkpoint_policy)
        y = checkpoint(block, x, use_reentrant=False, context_fn=context_fn)

    Returns:
        ``CheckpointPolicy.MUST_SAVE`` or ``PREFER_RECOMPUTE``.
    """
    from torch.utils.checkpoint import CheckpointPolicy

    return CheckpointPolicy.MUST_SAVE if op in _EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE


_EXPENSIVE = {
    getattr(torch.ops.aten, name).default
    for name in (
        "convolution",
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
}
