"""How a shape is divided among programs: pure Python, a function of the shape and memory format alone.

Both families see x as B samples of N x C x S (contiguous) or N x S x C (channels_last) in G groups of channels that
share their statistics: BatchNorm is one sample (B = 1) in C groups, GroupNorm has N = 1. A row is what all channels
have at one n and s. A program works on tiles of block_n x block_s rows by block_c channels.

What is compiled for (the block sizes, ``wide``) does not depend on the batch size.
"""

from typing import NamedTuple

# Elements of a tile: with 4 warps 16 for each thread, so that two accumulators of a tile fit into its registers.
TILE = 2048
NUM_WARPS = 4
# Channels of a channels_last tile: 128 bytes or more of 16-bit values side by side.
CHANNELS = 64
# Small planes of a contiguous tile, at most.
PLANES = 8
# Programs that fill a large GPU several times over.
PROGRAMS = 512
# Fewer units than this leave a GPU idle, unless there is little work anyway: their reduction is split.
MIN_UNITS = 256
# Tiles that one program reads at least before a split pays for its second stage.
MIN_SPLIT_TILES = 2
SMALL_TILES = 8
# Tiles of one program in the apply stages of the split path.
APPLY_TILES = 4
# Tile of the second stages: partials by groups or channels.
FINISH_ROWS = FINISH_COLUMNS = 32
# Beyond this, 32-bit offsets (of lanes past the end as well) could overflow.
MAX_NARROW = 2**31 - 2**24


class Extent(NamedTuple):
    """B samples of N x C x S or N x S x C, in G groups of C / G channels."""

    B: int
    N: int
    C: int
    S: int
    G: int
    channels_last: bool


class Plan(NamedTuple):
    """The tiles of a launch; ``splits`` programs of ``split_tiles`` tiles share a sample's ``tiles``."""

    channels_last: bool
    block_n: int
    block_s: int
    block_c: int
    # Channels that a program takes: block_c, or those of one group.
    channels: int
    # Programs side by side over the channels.
    blocks: int
    tiles: int
    split_tiles: int
    splits: int
    # One program does all stages of its channels or group.
    fused: bool
    wide: bool

    def divided(self, split_tiles):
        """This plan with another number of tiles a program."""
        return self._replace(split_tiles=split_tiles, splits=divide_up(self.tiles, split_tiles))


def divide_up(a, b):
    return (a + b - 1) // b


def next_power_of_2(n):
    return 1 << (int(n) - 1).bit_length()


def _plan(extent, channels, block_c, fused):
    _, n, c, s, _, channels_last = extent
    if channels_last:
        block_n, block_s = 1, max(TILE // block_c, 1)
        if n == 1:
            block_s = min(block_s, next_power_of_2(s))
        tiles = divide_up(n * s, block_s)
    else:
        block_s = min(next_power_of_2(s), max(TILE // block_c, 1))
        block_n = 1 if n == 1 else max(TILE // (block_c * block_s), 1)
        tiles = divide_up(n, block_n) * divide_up(s, block_s)
    wide = bool(n * c * s > MAX_NARROW)
    blocks = divide_up(c, channels)
    return Plan(channels_last, block_n, block_s, block_c, channels, blocks, tiles, tiles, 1, fused, wide)


def _channels_side_by_side(c, s, channels_last):
    """Channels of a tile that need not end where a group does."""
    most = CHANNELS if channels_last else min(TILE // min(next_power_of_2(s), TILE), PLANES)
    return min(next_power_of_2(c), most)


def plan(extent):
    """The Plan for a non-empty Extent: one program per unit (channel block or group), or a split reduction."""
    b, _, c, s, g, channels_last = extent
    # A plane of one element, or a single channel, is laid out as columns are.
    if s == 1 or c == 1:
        extent, channels_last = extent._replace(channels_last=True), True
    block_c = _channels_side_by_side(c, s, channels_last)
    if c == g:
        unit = _plan(extent, block_c, block_c, True)
    else:
        unit = _plan(extent, c // g, next_power_of_2(c // g), True)
    fits = unit.block_n * unit.block_s * unit.block_c <= TILE
    if fits and (unit.tiles <= SMALL_TILES or b * unit.blocks >= MIN_UNITS):
        return unit
    split = _plan(extent, block_c, block_c, False)
    wanted = divide_up(PROGRAMS, b * split.blocks)
    return split.divided(max(split.tiles // wanted, min(MIN_SPLIT_TILES, split.tiles)))
