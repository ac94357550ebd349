"""The stages of both families: stats, apply, backward_reduce, backward_apply.

plan.py holds the vocabulary (B, N, C, S, G, rows, tiles). A forward or backward is one kernel where one program can do
all stages of its channels or group, otherwise a kernel per stage with partial results in between, which the ``finish``
kernels combine. Every order of summation is fixed by the shape: results are bitwise repeatable.

ACC is the arithmetic type of elements: float64 for float64, float32 for all others. What is left of many elements, one
number per channel, is float64.
"""

import triton
import triton.language as tl

from . import activations


@triton.jit
def _unit(channels, blocks, splits, split_tiles, tiles, C, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    """This program's sample, split, channels and tiles: (b, split, c, which channels exist, begin, end)."""
    pid = tl.program_id(0)
    k = tl.arange(0, BLOCK_C)
    c = (pid % blocks) * channels + k
    exists = (k < channels) & (c < C)
    split = (pid // blocks) % splits
    b = (pid // blocks) // splits
    if WIDE:
        c = c.to(tl.int64)
        split = split.to(tl.int64)
    begin = split * split_tiles
    return b, split, c, exists, begin, tl.minimum(begin + split_tiles, tiles)


@triton.jit
def _rows(t, N, C, S, rows, CHANNELS_LAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """Offsets of the rows of tile t, and which of them exist."""
    i = tl.arange(0, BLOCK_N * BLOCK_S)
    if CHANNELS_LAST:
        row = t * (BLOCK_N * BLOCK_S) + i
        offset = row * C
        exists = row < rows
    else:
        planes = tl.cdiv(S, BLOCK_S)
        n = (t // planes) * BLOCK_N + i // BLOCK_S
        s = (t % planes) * BLOCK_S + i % BLOCK_S
        offset = n * C * S + s
        exists = (n < N) & (s < S)
    return offset, exists


@triton.jit
def _tile(t, columns, c_exists, N, C, S, rows, CL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """Offsets of the elements of tile t, which of them exist, and which rows do."""
    row_offset, row_exists = _rows(t, N, C, S, rows, CL, BLOCK_N, BLOCK_S)
    return row_offset[:, None] + columns[None, :], row_exists[:, None] & c_exists[None, :], row_exists


@triton.jit
def _columns(c, S, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        columns = c
    else:
        columns = c * S
    return columns


@triton.jit
def _per_channel(pointer, c, exists, default: tl.constexpr, ACC: tl.constexpr):
    if pointer is None:
        values = tl.full(c.shape, default, ACC)
    else:
        values = tl.load(pointer + c, mask=exists, other=0.0).to(ACC)
    return values


@triton.jit
def _load(x, offset, mask, PRE_ACTIVATION: tl.constexpr, ACC: tl.constexpr):
    """What is normalised, and x as it is: PRE_ACTIVATION comes between them, rounded to the dtype of x."""
    raw = tl.load(x + offset, mask=mask, other=0.0).to(ACC)
    values = raw
    if PRE_ACTIVATION is not None:
        values = activations.forward(raw, PRE_ACTIVATION).to(x.dtype.element_ty).to(ACC)
        values = tl.where(mask, values, 0.0)
    return values, raw


@triton.jit
def _z(x, values, residual, offset, mask, mean, scale, bias, ACC: tl.constexpr):
    """z, rounded to the dtype of x: where the output is at a kink, so is the gradient."""
    z = (values - mean[None, :]) * scale[None, :] + bias[None, :]
    if residual is not None:
        z += tl.load(residual + offset, mask=mask, other=0.0).to(ACC)
    return z.to(x.dtype.element_ty).to(ACC)


# stats


@triton.jit
def _moments(
    x, begin, end, columns, c_exists, N, C, S, rows,
    PRE_ACTIVATION: tl.constexpr, ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Count, mean and m2 (sum of squared deviations from the mean) of each channel over tiles [begin, end).

    Sums of deviations from a shift, the mean of the first tile: with k of n values averaged into the shift,
    cancellation costs a variance at most 1 + n / k units of rounding, whatever the mean. Where squares overflow
    float32, the values are summed again in float64.
    """
    BLOCK_M: tl.constexpr = BLOCK_N * BLOCK_S
    offset, mask, _ = _tile(begin, columns, c_exists, N, C, S, rows, CHANNELS_LAST, BLOCK_N, BLOCK_S)
    first, _ = _load(x, offset, mask, PRE_ACTIVATION, ACC)
    shift = tl.sum(first, 0) / tl.maximum(tl.sum(mask.to(ACC), 0), 1)
    s1 = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    s2 = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    counts = tl.zeros([BLOCK_M], tl.float32)
    for t in range(begin, end):
        offset, mask, row_exists = _tile(t, columns, c_exists, N, C, S, rows, CHANNELS_LAST, BLOCK_N, BLOCK_S)
        values, _ = _load(x, offset, mask, PRE_ACTIVATION, ACC)
        d = values - shift[None, :]
        d = tl.where(mask, d, 0.0)
        s1 += d
        s2 += d * d
        counts += row_exists.to(tl.float32)
    count = tl.sum(counts.to(tl.float64), 0)
    total = tl.sum(s1, 0).to(tl.float64)
    m2 = tl.sum(s2, 0).to(tl.float64) - total * total / count
    # Not maximum: NaN stays.
    m2 = tl.where(m2 < 0, 0.0, m2)
    mean = shift.to(tl.float64) + total / count
    if ACC != tl.float64:
        if tl.max((m2 - m2 != 0).to(tl.int32), 0) != 0:
            exact = tl.zeros([BLOCK_M, BLOCK_C], tl.float64)
            for t in range(begin, end):
                offset, mask, _ = _tile(t, columns, c_exists, N, C, S, rows, CHANNELS_LAST, BLOCK_N, BLOCK_S)
                values, _ = _load(x, offset, mask, PRE_ACTIVATION, ACC)
                exact += values.to(tl.float64)
            mean = tl.sum(exact, 0) / count
            exact = tl.zeros([BLOCK_M, BLOCK_C], tl.float64)
            for t in range(begin, end):
                offset, mask, _ = _tile(t, columns, c_exists, N, C, S, rows, CHANNELS_LAST, BLOCK_N, BLOCK_S)
                values, _ = _load(x, offset, mask, PRE_ACTIVATION, ACC)
                e = values.to(tl.float64) - mean[None, :]
                e = tl.where(mask, e, 0.0)
                exact += e * e
            m2 = tl.sum(exact, 0)
    return count, mean, m2


@triton.jit
def _finish_statistics(
    index, write, count, mean, m2, saved_mean, saved_rstd, running_mean, running_var, num_batches_tracked,
    momentum_high, momentum_low, eps_high, eps_low,
):  # fmt: skip
    """Save mean and rstd, move the running statistics; returns rstd."""
    rstd = 1.0 / tl.sqrt(m2 / count + eps_low + eps_high)
    tl.store(saved_mean + index, mean.to(saved_mean.dtype.element_ty), mask=write)
    tl.store(saved_rstd + index, rstd.to(saved_rstd.dtype.element_ty), mask=write)
    if running_mean is not None:
        if num_batches_tracked is not None:
            factor = 1.0 / tl.load(num_batches_tracked).to(tl.float64)
        else:
            factor = tl.zeros_like(mean) + momentum_low + momentum_high
        _move(running_mean, index, write, mean, factor)
        _move(running_var, index, write, m2 / (count - 1), factor)
    return rstd


@triton.jit
def _move(running, index, write, value, factor):
    before = tl.load(running + index, mask=write, other=0.0).to(tl.float64)
    after = (1 - factor) * before + factor * value
    if running.dtype.element_ty != tl.float64:
        # There is no conversion from float64 to 16 bits.
        after = after.to(tl.float32)
    tl.store(running + index, after.to(running.dtype.element_ty), mask=write)


@triton.jit
def stats_kernel(
    x, partial, stride, sample, channels, blocks, splits, split_tiles, tiles, N, C, S, rows,
    PRE_ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Count, mean and m2 of each channel over one split: partial[3, B, splits, C]."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    b, split, c, exists, begin, end = _unit(channels, blocks, splits, split_tiles, tiles, C, BLOCK_C, WIDE)
    columns = _columns(c, S, CHANNELS_LAST)
    count, mean, m2 = _moments(
        x + b.to(tl.int64) * sample, begin, end, columns, exists, N, C, S, rows,
        PRE_ACTIVATION, ACC, CHANNELS_LAST, BLOCK_N, BLOCK_S, BLOCK_C,
    )  # fmt: skip
    to = partial + (b.to(tl.int64) * splits + split) * C + c
    tl.store(to, tl.zeros([BLOCK_C], tl.float64) + count, mask=exists)
    tl.store(to + stride, mean, mask=exists)
    tl.store(to + 2 * stride, m2, mask=exists)


@triton.jit
def _partials(j, b, g, g_exists, G, C, group, splits, BLOCK_J: tl.constexpr):
    """Offsets of partials j, j + 1, ... of each group g (they go by split, then by channel), and which exist."""
    i = j + tl.arange(0, BLOCK_J)
    rows = (b.to(tl.int64) * splits + i // group) * C + i % group
    return rows[:, None] + (g * group)[None, :], (i < splits * group)[:, None] & g_exists[None, :]


@triton.jit
def stats_finish_kernel(
    partial, stride, saved_mean, saved_rstd, running_mean, running_var, num_batches_tracked,
    momentum_high, momentum_low, eps_high, eps_low, G, C, group, splits,
    BLOCK_J: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Combine the partials of each group in two passes: the mean of means, then the squares around it."""
    blocks = tl.cdiv(G, BLOCK_G)
    b = tl.program_id(0) // blocks
    g = (tl.program_id(0) % blocks) * BLOCK_G + tl.arange(0, BLOCK_G)
    exists = g < G
    count = tl.zeros([BLOCK_G], tl.float64)
    total = tl.zeros([BLOCK_G], tl.float64)
    for j in range(0, splits * group, BLOCK_J):
        offset, mask = _partials(j, b, g, exists, G, C, group, splits, BLOCK_J)
        counts = tl.load(partial + offset, mask=mask, other=0.0)
        means = tl.load(partial + stride + offset, mask=mask, other=0.0)
        count += tl.sum(counts, 0)
        total += tl.sum(counts * means, 0)
    count = tl.where(exists, count, 1.0)
    mean = total / count
    m2 = tl.zeros([BLOCK_G], tl.float64)
    for j in range(0, splits * group, BLOCK_J):
        offset, mask = _partials(j, b, g, exists, G, C, group, splits, BLOCK_J)
        counts = tl.load(partial + offset, mask=mask, other=0.0)
        means = tl.load(partial + stride + offset, mask=mask, other=0.0)
        squares = tl.load(partial + 2 * stride + offset, mask=mask, other=0.0)
        d = means - mean[None, :]
        m2 += tl.sum(tl.where(mask, squares + counts * d * d, 0.0), 0)
    _finish_statistics(
        b.to(tl.int64) * G + g, exists, count, mean, m2, saved_mean, saved_rstd,
        running_mean, running_var, num_batches_tracked, momentum_high, momentum_low, eps_high, eps_low,
    )  # fmt: skip


# apply


@triton.jit
def _apply(
    x, residual, y, begin, end, columns, c_exists, mean, scale, bias, N, C, S, rows,
    ACTIVATION: tl.constexpr, PRE_ACTIVATION: tl.constexpr, ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    for t in range(begin, end):
        offset, mask, _ = _tile(t, columns, c_exists, N, C, S, rows, CHANNELS_LAST, BLOCK_N, BLOCK_S)
        values, _ = _load(x, offset, mask, PRE_ACTIVATION, ACC)
        z = _z(x, values, residual, offset, mask, mean, scale, bias, ACC)
        tl.store(y + offset, activations.forward(z, ACTIVATION).to(y.dtype.element_ty), mask=mask)


@triton.jit
def apply_kernel(
    x, residual, weight, bias, mean, rstd, saved_mean, saved_rstd, y, eps_high, eps_low,
    sample, channels, blocks, splits, split_tiles, tiles, N, C, S, rows, G, group,
    ACTIVATION: tl.constexpr, PRE_ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = activation((x - mean) * rstd * weight + bias + residual).

    In evaluation mean and rstd are the running mean and variance, of which saved_mean and saved_rstd are made.
    """
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    b, split, c, exists, begin, end = _unit(channels, blocks, splits, split_tiles, tiles, C, BLOCK_C, WIDE)
    index = b.to(tl.int64) * G + c // group
    if saved_mean is not None:
        var = tl.load(rstd + index, mask=exists, other=1.0).to(tl.float64)
        scale = (1.0 / tl.sqrt(var + eps_low + eps_high)).to(ACC)
        center = _per_channel(mean, index, exists, 0.0, ACC)
        first = exists & (c * 0 + split == 0)
        tl.store(saved_mean + index, center, mask=first)
        tl.store(saved_rstd + index, scale, mask=first)
    else:
        scale = _per_channel(rstd, index, exists, 1.0, ACC)
        center = _per_channel(mean, index, exists, 0.0, ACC)
    scale *= _per_channel(weight, c, exists, 1.0, ACC)
    base = b.to(tl.int64) * sample
    _apply(
        x + base, residual, y + base, begin, end, _columns(c, S, CHANNELS_LAST), exists,
        center, scale, _per_channel(bias, c, exists, 0.0, ACC), N, C, S, rows,
        ACTIVATION, PRE_ACTIVATION, ACC, CHANNELS_LAST, BLOCK_N, BLOCK_S,
    )  # fmt: skip


@triton.jit
def forward_kernel(
    x, residual, weight, bias, y, saved_mean, saved_rstd, running_mean, running_var, num_batches_tracked,
    momentum_high, momentum_low, eps_high, eps_low,
    sample, channels, blocks, splits, split_tiles, tiles, N, C, S, rows, G, group,
    GROUPED: tl.constexpr, ACTIVATION: tl.constexpr, PRE_ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All stages of a forward for one block of channels, or one group (GROUPED)."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    b, _, c, exists, begin, end = _unit(channels, blocks, splits, split_tiles, tiles, C, BLOCK_C, WIDE)
    columns = _columns(c, S, CHANNELS_LAST)
    base = b.to(tl.int64) * sample
    count, mean, m2 = _moments(
        x + base, begin, end, columns, exists, N, C, S, rows,
        PRE_ACTIVATION, ACC, CHANNELS_LAST, BLOCK_N, BLOCK_S, BLOCK_C,
    )  # fmt: skip
    if GROUPED:
        group_mean = tl.sum(mean, 0) / group
        d = mean - group_mean
        m2 = tl.sum(tl.where(exists, m2 + count * d * d, 0.0), 0) + tl.zeros([BLOCK_C], tl.float64)
        mean = group_mean + tl.zeros([BLOCK_C], tl.float64)
        count *= group
    rstd = _finish_statistics(
        b.to(tl.int64) * G + c // group, exists & (c % group == 0), count, mean, m2, saved_mean, saved_rstd,
        running_mean, running_var, num_batches_tracked, momentum_high, momentum_low, eps_high, eps_low,
    )  # fmt: skip
    _apply(
        x + base, residual, y + base, begin, end, columns, exists,
        mean.to(ACC), rstd.to(ACC) * _per_channel(weight, c, exists, 1.0, ACC),
        _per_channel(bias, c, exists, 0.0, ACC), N, C, S, rows,
        ACTIVATION, PRE_ACTIVATION, ACC, CHANNELS_LAST, BLOCK_N, BLOCK_S,
    )  # fmt: skip


# backward_reduce


@triton.jit
def _gradient_sums(
    x, dy, residual, begin, end, columns, c_exists, mean, scale, bias, N, C, S, rows,
    ACTIVATION: tl.constexpr, PRE_ACTIVATION: tl.constexpr, ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of dz and of dz (x - mean) of each channel."""
    s1 = tl.zeros([BLOCK_N * BLOCK_S, BLOCK_C], ACC)
    s2 = tl.zeros([BLOCK_N * BLOCK_S, BLOCK_C], ACC)
    for t in range(begin, end):
        offset, mask, _ = _tile(t, columns, c_exists, N, C, S, rows, CHANNELS_LAST, BLOCK_N, BLOCK_S)
        values, _ = _load(x, offset, mask, PRE_ACTIVATION, ACC)
        z = _z(x, values, residual, offset, mask, mean, scale, bias, ACC)
        dz = activations.backward(z, tl.load(dy + offset, mask=mask, other=0.0).to(ACC), ACTIVATION)
        dz = tl.where(mask, dz, 0.0)
        s1 += dz
        s2 += dz * (values - mean[None, :])
    return tl.sum(s1, 0).to(tl.float64), tl.sum(s2, 0).to(tl.float64)


@triton.jit
def backward_reduce_kernel(
    x, dy, residual, weight, bias, mean, rstd, partial, stride,
    sample, channels, blocks, splits, split_tiles, tiles, N, C, S, rows, G, group,
    ACTIVATION: tl.constexpr, PRE_ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of dz and of dz (x - mean) of each channel over one split: partial[2, B, splits, C]."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    b, split, c, exists, begin, end = _unit(channels, blocks, splits, split_tiles, tiles, C, BLOCK_C, WIDE)
    index = b.to(tl.int64) * G + c // group
    center = _per_channel(mean, index, exists, 0.0, ACC)
    scale = _per_channel(rstd, index, exists, 1.0, ACC) * _per_channel(weight, c, exists, 1.0, ACC)
    base = b.to(tl.int64) * sample
    sum_dz, sum_dz_deviation = _gradient_sums(
        x + base, dy + base, residual, begin, end, _columns(c, S, CHANNELS_LAST), exists,
        center, scale, _per_channel(bias, c, exists, 0.0, ACC), N, C, S, rows,
        ACTIVATION, PRE_ACTIVATION, ACC, CHANNELS_LAST, BLOCK_N, BLOCK_S, BLOCK_C,
    )  # fmt: skip
    to = partial + (b.to(tl.int64) * splits + split) * C + c
    tl.store(to, sum_dz, mask=exists)
    tl.store(to + stride, sum_dz_deviation, mask=exists)


@triton.jit
def backward_finish_kernel(
    partial, stride, weight, rstd, offset_out, slope_out, dweight, dbias, values, G, C, group, splits,
    GROUPED: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """From a group's partial sums what backward_apply subtracts; from those of a channel its parameter gradients."""
    blocks = tl.cdiv(G, BLOCK_G)
    b = tl.program_id(0) // blocks
    g = (tl.program_id(0) % blocks) * BLOCK_G + tl.arange(0, BLOCK_G)
    exists = g < G
    sum_dz = tl.zeros([BLOCK_G], tl.float64)
    sum_dz_deviation = tl.zeros([BLOCK_G], tl.float64)
    for j in range(0, splits * group, BLOCK_J):
        offset, mask = _partials(j, b, g, exists, G, C, group, splits, BLOCK_J)
        dz = tl.load(partial + offset, mask=mask, other=0.0)
        dz_deviation = tl.load(partial + stride + offset, mask=mask, other=0.0)
        if GROUPED and weight is not None:
            c = (g * group)[None, :] + ((j + tl.arange(0, BLOCK_J)) % group)[:, None]
            w = tl.load(weight + c, mask=mask, other=0.0).to(tl.float64)
            dz *= w
            dz_deviation *= w
        sum_dz += tl.sum(dz, 0)
        sum_dz_deviation += tl.sum(dz_deviation, 0)
    index = b.to(tl.int64) * G + g
    r = tl.load(rstd + index, mask=exists, other=0.0).to(tl.float64)
    if dweight is not None:
        tl.store(dweight + index, (sum_dz_deviation * r).to(dweight.dtype.element_ty), mask=exists)
    if dbias is not None:
        tl.store(dbias + index, sum_dz.to(dbias.dtype.element_ty), mask=exists)
    if offset_out is not None:
        offset, slope = _coefficients(sum_dz, sum_dz_deviation, r, values)
        tl.store(offset_out + index, offset.to(offset_out.dtype.element_ty), mask=exists)
        tl.store(slope_out + index, slope.to(slope_out.dtype.element_ty), mask=exists)


@triton.jit
def _coefficients(sum_dz, sum_dz_deviation, rstd, values):
    """(offset, slope): through the statistics of ``values`` values, dx loses offset + (x - mean) * slope."""
    return sum_dz / values, sum_dz_deviation * rstd * rstd / values


@triton.jit
def parameter_gradients_kernel(
    partial, stride, rstd, dweight, dbias, B, C, G, group, splits, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr
):
    """dweight and dbias of channels whose partial sums come from several samples."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = c < C
    sum_dz = tl.zeros([BLOCK_C], tl.float64)
    sum_dz_x_hat = tl.zeros([BLOCK_C], tl.float64)
    for j in range(0, B * splits, BLOCK_J):
        i = (j + tl.arange(0, BLOCK_J)).to(tl.int64)
        mask = (i < B * splits)[:, None] & exists[None, :]
        offset = (i * C)[:, None] + c[None, :]
        index = ((i // splits) * G)[:, None] + (c // group)[None, :]
        r = tl.load(rstd + index, mask=mask, other=0.0).to(tl.float64)
        sum_dz += tl.sum(tl.load(partial + offset, mask=mask, other=0.0), 0)
        sum_dz_x_hat += tl.sum(tl.load(partial + stride + offset, mask=mask, other=0.0) * r, 0)
    if dweight is not None:
        tl.store(dweight + c, sum_dz_x_hat.to(dweight.dtype.element_ty), mask=exists)
    if dbias is not None:
        tl.store(dbias + c, sum_dz.to(dbias.dtype.element_ty), mask=exists)


# backward_apply


@triton.jit
def _backward_apply(
    x, dy, residual, dx, dresidual, begin, end, columns, c_exists, mean, scale, bias, inner, outer, minus, slope,
    N, C, S, rows,
    STATISTICS: tl.constexpr, ACTIVATION: tl.constexpr, PRE_ACTIVATION: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dx = outer * (dz * inner - minus - (x - mean) * slope); inner * outer = scale. Then through PRE_ACTIVATION.

    outer stays outside: slope times it falls below the smallest float where x is about 1e20.
    """
    for t in range(begin, end):
        offset, mask, _ = _tile(t, columns, c_exists, N, C, S, rows, CHANNELS_LAST, BLOCK_N, BLOCK_S)
        values, raw = _load(x, offset, mask, PRE_ACTIVATION, ACC)
        z = _z(x, values, residual, offset, mask, mean, scale, bias, ACC)
        dz = activations.backward(z, tl.load(dy + offset, mask=mask, other=0.0).to(ACC), ACTIVATION)
        if dresidual is not None:
            tl.store(dresidual + offset, dz.to(dresidual.dtype.element_ty), mask=mask)
        if dx is not None:
            if STATISTICS:
                through = minus[None, :] + (values - mean[None, :]) * slope[None, :]
                gradient = (dz * inner[None, :] - through) * outer[None, :]
            else:
                gradient = dz * scale[None, :]
            gradient = activations.backward(raw, gradient, PRE_ACTIVATION)
            tl.store(dx + offset, gradient.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _inner_and_outer(rstd, weight, GROUPED: tl.constexpr):
    """A channel's weight belongs into the sums over its group; where it is the group, it may stay outside of them."""
    if GROUPED:
        inner = weight
        outer = rstd
    else:
        inner = tl.full(rstd.shape, 1.0, rstd.dtype)
        outer = rstd * weight
    return inner, outer


@triton.jit
def backward_apply_kernel(
    x, dy, residual, weight, bias, mean, rstd, minus, slope, dx, dresidual,
    sample, channels, blocks, splits, split_tiles, tiles, N, C, S, rows, G, group,
    GROUPED: tl.constexpr, STATISTICS: tl.constexpr, ACTIVATION: tl.constexpr, PRE_ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx, and dresidual = dz. STATISTICS: mean and rstd are functions of x."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    b, _, c, exists, begin, end = _unit(channels, blocks, splits, split_tiles, tiles, C, BLOCK_C, WIDE)
    index = b.to(tl.int64) * G + c // group
    r = _per_channel(rstd, index, exists, 1.0, ACC)
    w = _per_channel(weight, c, exists, 1.0, ACC)
    inner, outer = _inner_and_outer(r, w, GROUPED)
    base = b.to(tl.int64) * sample
    if dx is not None:
        dx += base
    _backward_apply(
        x + base, dy + base, residual, dx, dresidual, begin, end, _columns(c, S, CHANNELS_LAST), exists,
        _per_channel(mean, index, exists, 0.0, ACC), r * w, _per_channel(bias, c, exists, 0.0, ACC), inner, outer,
        _per_channel(minus, index, exists, 0.0, ACC), _per_channel(slope, index, exists, 0.0, ACC),
        N, C, S, rows, STATISTICS, ACTIVATION, PRE_ACTIVATION, ACC, CHANNELS_LAST, BLOCK_N, BLOCK_S,
    )  # fmt: skip


@triton.jit
def backward_kernel(
    x, dy, residual, weight, bias, mean, rstd, partial, stride, dweight, dbias, dx, dresidual, values,
    sample, channels, blocks, splits, split_tiles, tiles, N, C, S, rows, G, group,
    GROUPED: tl.constexpr, STATISTICS: tl.constexpr, ACTIVATION: tl.constexpr, PRE_ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All stages of a backward for one block of channels, or one group (GROUPED).

    The sums of channels that other samples have too go to partial[2, B, C].
    """
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    b, _, c, exists, begin, end = _unit(channels, blocks, splits, split_tiles, tiles, C, BLOCK_C, WIDE)
    columns = _columns(c, S, CHANNELS_LAST)
    index = b.to(tl.int64) * G + c // group
    r = _per_channel(rstd, index, exists, 1.0, ACC)
    w = _per_channel(weight, c, exists, 1.0, ACC)
    center = _per_channel(mean, index, exists, 0.0, ACC)
    shift = _per_channel(bias, c, exists, 0.0, ACC)
    base = b.to(tl.int64) * sample
    sum_dz, sum_dz_deviation = _gradient_sums(
        x + base, dy + base, residual, begin, end, columns, exists, center, r * w, shift, N, C, S, rows,
        ACTIVATION, PRE_ACTIVATION, ACC, CHANNELS_LAST, BLOCK_N, BLOCK_S, BLOCK_C,
    )  # fmt: skip
    if partial is not None:
        to = partial + b.to(tl.int64) * C + c
        tl.store(to, sum_dz, mask=exists)
        tl.store(to + stride, sum_dz_deviation, mask=exists)
    if dweight is not None:
        tl.store(dweight + c, (sum_dz_deviation * r).to(dweight.dtype.element_ty), mask=exists)
    if dbias is not None:
        tl.store(dbias + c, sum_dz.to(dbias.dtype.element_ty), mask=exists)
    if dx is not None or dresidual is not None:
        if GROUPED:
            sum_dz = tl.sum(tl.where(exists, sum_dz * w, 0.0), 0) + tl.zeros([BLOCK_C], tl.float64)
            sum_dz_deviation = tl.sum(tl.where(exists, sum_dz_deviation * w, 0.0), 0) + tl.zeros([BLOCK_C], tl.float64)
        minus, slope = _coefficients(sum_dz, sum_dz_deviation, r.to(tl.float64), values)
        inner, outer = _inner_and_outer(r, w, GROUPED)
        if dx is not None:
            dx += base
        _backward_apply(
            x + base, dy + base, residual, dx, dresidual, begin, end, columns, exists, center, r * w, shift,
            inner, outer, minus.to(ACC), slope.to(ACC), N, C, S, rows,
            STATISTICS, ACTIVATION, PRE_ACTIVATION, ACC, CHANNELS_LAST, BLOCK_N, BLOCK_S,
        )  # fmt: skip
