"""What is measured, as data: shapes, layouts, dtypes and modes."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Family:
    """Layers of one kind: ``layers`` are (C, H = W) or (C, D, H, W), ``residual`` those that add a residual too."""

    about: str
    layers: tuple[tuple[int, ...], ...]
    batches: tuple[int, ...]
    activation: str | None
    groups: int | None = None  # None: BatchNorm
    residual: tuple[tuple[int, ...], ...] = ()
    pre_activation: str | None = None


# So little data that only the host's work for a call is left.
TINY_SHAPE = (2, 4, 2, 2)
GROUPS = 32

# Every distinct one of MobileNetV2 1.0 at 224x224 (Sandler et al. 2018, arXiv:1801.04381).
_MOBILENET_V2 = (
    *((32, 112), (96, 112), (96, 56), (144, 56), (144, 28), (192, 28)),
    *((192, 14), (384, 14), (576, 14), (576, 7), (960, 7), (1280, 7)),
)

FAMILIES = {
    "batch_norm": Family(
        "BatchNorm + ReLU6 of MobileNetV2",
        _MOBILENET_V2,
        (32,),
        "relu6",
    ),
    "pre_activation": Family(
        "ReLU6, then BatchNorm: the same layers in the other order",
        _MOBILENET_V2,
        (32,),
        None,
        pre_activation="relu6",
    ),
    # ResNet-50 at 224x224 (He et al. 2015, arXiv:1512.03385), strides in the 3x3 convolutions as in torchvision.
    "resnet50": Family(
        "BatchNorm + ReLU of ResNet-50, with the residual where it has one",
        ((64, 112), (64, 56), (128, 56), (128, 28), (256, 28), (256, 14), (512, 14), (512, 7)),
        (32,),
        "relu",
        residual=((256, 56), (512, 28), (1024, 14), (2048, 7)),
    ),
    # EfficientNet-Lite0 at 224x224: EfficientNet-B0 (arXiv:1905.11946) without squeeze-and-excitation, with ReLU6.
    "efficientnet_lite": Family(
        "BatchNorm + ReLU6 of EfficientNet-Lite0",
        (
            *((32, 112), (96, 112), (96, 56), (144, 56), (144, 28), (240, 28)),
            *((240, 14), (480, 14), (672, 14), (672, 7), (1152, 7), (1280, 7)),
        ),
        (32,),
        "relu6",
    ),
    "group_norm": Family(
        "GroupNorm on the way down a latent-diffusion U-Net, without activation",
        ((320, 64), (640, 32), (1280, 16)),
        (8,),
        None,
        GROUPS,
    ),
    "diffusion": Family(
        "GroupNorm + SiLU of latent diffusion's U-Nets",
        tuple((c, size) for size in (64, 32, 16, 8) for c in (320, 640, 1280)),
        (2, 16),
        "silu",
        GROUPS,
    ),
    "video": Family(
        "GroupNorm + SiLU of a video autoencoder (a group is 20 MB in float32)",
        ((128, 20, 256, 256),),
        (1,),
        "silu",
        GROUPS,
    ),
    "work": Family(
        "BatchNorm + ReLU6 of 8 MB to 800 MB (in float32): whether the cost of a byte grows",
        ((96, 56),),
        (7, 21, 66, 208, 664),
        "relu6",
    ),
    "tiny": Family("host time of a call", (), (), "relu6"),
}
DEFAULT_FAMILIES = {
    "cpu": ("batch_norm", "group_norm", "tiny"),
    "cuda": ("batch_norm", "resnet50", "diffusion", "video", "tiny"),
}

LAYOUTS = ("contiguous", "channels_last")
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# forward: training, the graph recorded. eval: without gradients. host: forward + backward of a tiny tensor.
MODES = ("forward", "eval", "backward", "forward+backward", "host")
DEFAULT_MODES = {"cpu": ("forward", "forward+backward", "host"), "cuda": MODES}

# Full tensors that must move through memory: forward reads x and writes y, backward reads x and dy and writes dx.
_FLOOR_TENSORS = {"forward": 2, "eval": 2, "backward": 3, "forward+backward": 5, "host": 5}
# A residual is read; backward writes its gradient, and needs no more of it than a bit per element.
_FLOOR_RESIDUAL = {"forward": 1, "eval": 1, "backward": 1, "forward+backward": 2, "host": 2}


@dataclass(frozen=True)
class Case:
    """One tensor and the layer applied to it.

    ``shape`` is (N, C, H, W) or (N, C, D, H, W); ``dtype`` that of x (parameters are float32); ``groups`` is None for
    BatchNorm, the number of groups for GroupNorm; ``form`` "module" or "functional" (BatchNorm without a residual).
    """

    family: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    groups: int | None = None
    activation: str | None = "relu6"
    residual: bool = False
    form: str = "module"
    pre_activation: str | None = None

    @property
    def bytes(self) -> int:
        """S, the bytes of x."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def values_per_channel(self) -> int:
        return math.prod(self.shape) // self.shape[1]

    def floor_tensors(self, mode: str) -> int:
        """Full tensors that any implementation must move."""
        return _FLOOR_TENSORS[mode] + _FLOOR_RESIDUAL[mode] * self.residual

    def floor_bytes(self, mode: str) -> int:
        """Bytes that any implementation must move: 2 S forward, 3 S more backward; a residual adds S to both."""
        return self.floor_tensors(mode) * self.bytes

    @property
    def layer(self) -> str:
        """The layer in words, "BatchNorm + residual + relu"; what comes before the norm stands before it."""
        norm = "BatchNorm" if self.groups is None else f"GroupNorm/{self.groups}"
        parts = [self.pre_activation, norm, "residual" if self.residual else None, self.activation]
        return " + ".join(part for part in parts if part is not None)

    def __str__(self):
        return f"{self.family} {'x'.join(map(str, self.shape))} {self.layer} {self.dtype} {self.layout} {self.form}"


def modes_of(case, modes):
    """Those of ``modes`` that ``case`` is measured in: a tiny one in "host" only, no other in that."""
    return [mode for mode in MODES if mode in modes and (mode == "host") == (case.family == "tiny")]


def default_dtypes(family, device_type):
    """Names of the dtypes that a family is measured in by default."""
    if device_type != "cpu":
        return ("float16", "bfloat16", "float32") if FAMILIES[family].groups is None else ("bfloat16", "float16")
    return ("float32",) if FAMILIES[family].groups else ("float32", "bfloat16")


def _spatial(layer):
    return (layer[0], layer[1], layer[1]) if len(layer) == 2 else layer


def select(families, batches=None, dtypes=None, layouts=LAYOUTS, device_type="cpu", layers=None):
    """The cases of the given families.

    Args:
        families: names out of FAMILIES.
        batches: values of N in place of a family's own.
        dtypes: names out of DTYPES; None means the family's default on ``device_type``.
        layouts: names out of LAYOUTS.
        layers: (C, H = W) that take the place of a family's own; the tiny family has one shape only.

    Returns:
        A list of Case, by family, batch size, dtype, layout and shape.
    """
    selected = []
    for name in families:
        family = FAMILIES[name]
        if name == "tiny":
            if "float32" in (dtypes or DTYPES) and "contiguous" in layouts:
                forms = ("functional", "module")
                selected += [Case(name, TINY_SHAPE, "float32", "contiguous", form=form) for form in forms]
            continue
        own = [(layer, False) for layer in family.layers] + [(layer, True) for layer in family.residual]
        selected += [
            Case(
                name,
                (n, *_spatial(layer)),
                dtype,
                layout,
                family.groups,
                family.activation,
                residual,
                pre_activation=family.pre_activation,
            )
            for n in batches or family.batches
            for dtype in dtypes or default_dtypes(name, device_type)
            for layout in layouts
            for layer, residual in ([(layer, False) for layer in layers] if layers else own)
        ]
    return selected


def own(shapes, dtypes, layouts, groups=None, activation="relu6", residual=False):
    """Cases of one's own shapes, (N, C, H, W) or (N, C, D, H, W)."""
    return [
        Case("own", tuple(shape), dtype, layout, groups, activation, residual)
        for dtype in dtypes
        for layout in layouts
        for shape in shapes
    ]


def memory_format(case):
    """The torch.memory_format of a case's tensors."""
    if case.layout == "contiguous":
        return torch.contiguous_format
    return torch.channels_last if len(case.shape) == 4 else torch.channels_last_3d


@dataclass(frozen=True)
class Inputs:
    """What a layer is called on: x and the residual (or None) require gradients, dy has y's layout."""

    x: torch.Tensor
    dy: torch.Tensor
    residual: torch.Tensor | None

    @property
    def arguments(self):
        """The arguments of the layer."""
        return (self.x,) if self.residual is None else (self.x, self.residual)

    def clone(self):
        """The same values in other memory."""
        x, residual = (None if t is None else t.detach().clone().requires_grad_() for t in (self.x, self.residual))
        return Inputs(x, self.dy.clone(), residual)


def inputs(case, device="cpu", seed=0):
    """The Inputs of a case: seeded, of its shape, dtype and layout; x is about N(0.5, 2), dy and residual N(0, 1)."""
    generator = torch.Generator(device).manual_seed(seed)
    x, dy, residual = (
        torch.randn(case.shape, generator=generator, device=device)
        .to(DTYPES[case.dtype])
        .contiguous(memory_format=memory_format(case))
        if wanted
        else None
        for wanted in (True, True, case.residual)
    )
    x.mul_(2).add_(0.5)
    return Inputs(x.requires_grad_(), dy, None if residual is None else residual.requires_grad_())
