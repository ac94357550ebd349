"""timm's normalisation layers, fused: subclasses of both, for convert to turn layers into, never constructed.

timm's GroupNorm classes take their arguments in another order than torch.nn's; since a layer only changes class, no
constructor runs. Their ``act`` stays where it was, as a FusedActivation.
"""

from timm import layers

from .modules import BatchNormAct2d as _BatchNormAct2d
from .modules import GroupNormAct as _GroupNormAct


def _fused(base: type, plain: type) -> tuple[type, type]:
    fused = type(
        plain.__name__, (base, plain), {"__module__": __name__, "plain_class": plain, "__doc__": plain.__doc__}
    )
    globals()[plain.__name__] = fused  # where pickle looks for it
    return plain, fused


_BATCH_NORMS = ("BatchNormAct2d",)
_GROUP_NORMS = ("GroupNorm", "GroupNorm1", "GroupNormAct", "GroupNorm1Act")
FUSED_CLASS = dict(
    _fused(base, getattr(layers, name))
    for base, names in ((_BatchNormAct2d, _BATCH_NORMS), (_GroupNormAct, _GROUP_NORMS))
    for name in names
    if hasattr(layers, name)
)
