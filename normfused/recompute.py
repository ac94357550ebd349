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
    depth = 0  # of recompute_activations in this thread


local = _Local()
# Address of a storage -> the recipe of the y in it.
_recipes: "weakref.WeakValueDictionary[int, _Recipe]" = weakref.WeakValueDictionary()


@contextlib.contextmanager
def recompute_activations() -> Iterator[None]:
    """Around the forward pass: what the fused layers put out is computed again in the backward pass instead of kept.

    A chain convolution -> norm -> activation -> convolution keeps half as much, for one more read and write of each
    output in the backward pass (GroupNorm: also a second read). Gradients are bit-equal, and running statistics are
    updated once. Only layers that run on normfused's kernels take part (``normfused.info()``), in eager mode; other
    tensors are kept as usual. Within it, ``torch.utils.checkpoint`` and other saved_tensors_hooks come first, and
    torch.func's transforms raise, as they do with any such hooks. The backward pass may be outside.
    """
    local.depth += 1
    try:
        with saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        local.depth -= 1


def is_on() -> bool:
    """Whether what autograd keeps now passes through here."""
    if not local.depth or torch.compiler.is_compiling():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and hooks[0] is _pack


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
        scale = stages.scale(weight, invstd).detach()
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
    recipe = _Recipe(y, apply, inputs)
    _recipes[y.untyped_storage()._cdata] = recipe
    cast(torch.autograd.graph.Node, y.grad_fn).register_prehook(_Owner(recipe))


class _Owner:
    """A hook of the layer's backward node that keeps the recipe until the node runs, or is no more."""

    def __init__(self, recipe: "_Recipe") -> None:
        self.recipe: _Recipe | None = recipe

    def __call__(self, grad_outputs: Any) -> None:
        self.recipe = None


class _Recipe:
    """How to compute a y again."""

    def __init__(
        self, y: torch.Tensor, apply: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor | None, ...]
    ) -> None:
        storage = y.untyped_storage()
        self.storage, self.address, self.dtype, self.version = (
            StorageWeakRef(storage),
            storage.data_ptr(),
            y.dtype,
            y._version,
        )
        self.apply = apply
        # x may be an earlier layer's y: then this recipe holds that recipe.
        self.inputs = [None if t is None else _pack(t) for t in inputs]
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

    def __init__(self, recipe: _Recipe, t: torch.Tensor) -> None:
        self.recipe = recipe
        self.geometry = t.size(), t.stride(), t.storage_offset()

    def unpack(self) -> torch.Tensor:
        return self.recipe.result().as_strided(*self.geometry)


class _Kept:
    """A tensor that is kept; with hooks autograd itself no longer watches over changes in place."""

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
    if type(t) in (torch.Tensor, torch.nn.Parameter) and t.layout is torch.strided:
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
