"""What is measured, as data: shapes, layouts and dtypes."""

from dataclasses import dataclass

import torch

# (C, H = W) of every distinct BatchNorm + ReLU6 in MobileNetV2 1.0 at 224x224 (Sandler et al. 2018, arXiv:1801.04381).
BATCH_NORM_SHAPES = (
    (32, 112),
    (96, 112),
    (96, 56),
    (144, 56),
    (144, 28),
    (192, 28),
    (192, 14),
    (384, 14),
    (576, 14),
    (576, 7),
    (960, 7),
    (1280, 7),
)
BATCH_NORM_BATCH = 32

# (C, H = W) of the GroupNorms on the way down a latent-diffusion U-Net.
GROUP_NORM_SHAPES = ((320, 64), (640, 32), (1280, 16))
GROUP_NORM_BATCH = 8
GROUPS = 32

# So little data that only the host's work for a call is left.
TINY_SHAPE = (2, 4, 2, 2)

FAMILIES = ("batch_norm", "group_norm", "tiny")
LAYOUTS = ("contiguous", "channels_last")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODES = ("forward", "forward+backward")

# Full tensors that must move through memory: forward reads x and writes y, backward reads x and dy and writes dx.
FLOOR_TENSORS = {"forward": 2, "forward+backward": 5}


@dataclass(frozen=True)
class Case:
    """One tensor and the layer applied to it.

    ``shape`` is (N, C, H, W); ``dtype`` that of x (parameters are float32); ``form`` "module" or "functional";
    ``groups`` is None for BatchNorm + ReLU6, the number of groups for GroupNorm (without activation).
    """

    family: str
    shape: tuple[int, int, int, int]
    dtype: str
    layout: str
    groups: int | None = None
    form: str = "module"

    @property
    def bytes(self) -> int:
        """S, the bytes of x."""
        n, c, h, w = self.shape
        return n * c * h * w * DTYPES[self.dtype].itemsize

    def floor_bytes(self, mode: str) -> int:
        """Bytes that any implementation must move: 2 S forward, 3 S more backward."""
        return FLOOR_TENSORS[mode] * self.bytes

    def __str__(self):
        size = "x".join(map(str, self.shape))
        groups = "" if self.groups is None else f"/{self.groups}"
        return f"{self.family} {size}{groups} {self.dtype} {self.layout} {self.form}"


def select(families=FAMILIES, shapes=None, batch=None, dtypes=None, layouts=LAYOUTS):
    """The cases of the given families.

    Args:
        families: names out of FAMILIES.
        shapes: (C, H = W) pairs that take the place of a family's own; the tiny family has one shape only.
        batch: N in place of a family's own.
        dtypes: names out of DTYPES; None means all for batch_norm, float32 for group_norm.
        layouts: names out of LAYOUTS.

    Returns:
        A list of Case, by family, dtype, layout and shape.
    """
    cases = []
    for family in families:
        if family == "tiny":
            if "float32" in (dtypes or DTYPES) and "contiguous" in layouts:
                cases += [Case("tiny", TINY_SHAPE, "float32", "contiguous", form=f) for f in ("functional", "module")]
            continue
        grouped = family == "group_norm"
        n = batch or (GROUP_NORM_BATCH if grouped else BATCH_NORM_BATCH)
        cases += [
            Case(family, (n, c, size, size), dtype, layout, GROUPS if grouped else None)
            for dtype in (dtypes or (("float32",) if grouped else DTYPES))
            for layout in layouts
            for c, size in (shapes or (GROUP_NORM_SHAPES if grouped else BATCH_NORM_SHAPES))
        ]
    return cases


def inputs(case, seed=0):
    """(x, dy) for a case: x requires its gradient, dy has y's layout.

    Both are seeded and of the case's shape, dtype and layout; x is about N(0.5, 2), dy N(0, 1).
    """
    generator = torch.Generator().manual_seed(seed)
    memory_format = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    x, dy = (
        torch.randn(case.shape, generator=generator).to(DTYPES[case.dtype]).contiguous(memory_format=memory_format)
        for _ in range(2)
    )
    return x.mul_(2).add_(0.5).requires_grad_(), dy
