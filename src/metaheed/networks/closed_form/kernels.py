"""The kernels of `cuda.py`, in Triton: convolutions with what follows them, and the passes in between.

The symbols are those of `cpu.py`. Sums over a plane are taken in two steps and without atomics: first a partial sum for
each block of places, then the sum of these (in float64 for vectors). So the bits of a result do not depend on the order
in which blocks run.

Legend: B tasks, n images each, C channels in, O channels out. A plane is (B, n, H, W, C), contiguous: channels-last,
and each task by itself. M = n·H·W is the number of places of a task. A weight is (B, 9, C, O), whose second axis are
the taps. Vectors are (B, O).

Importing this module needs Triton, which PyTorch's builds for CUDA on Linux include. With TRITON_INTERPRET=1 in the
environment before the import, everything here works on CPU tensors, slowly; the tests use that.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_DENSE = 8
"""From this number of channels on, a tap's channels fill a matrix product; below it, all nine taps share one."""
_SMALL = 1 << 16
"""A plane with fewer places than this, over all tasks, counts as small."""
_SUMMED = 32
"""The places that one product of a weight's gradient sums over."""
_TILE = 32
"""The places that a program of an elementwise pass handles."""


def precision(x: Tensor) -> str:
    """How products of float32 are computed on a tensor's device: "ieee", "tf32x3" or "tf32".

    In full float32, unless PyTorch's own switch for matrix products allows TF32, which keeps 11 of its 24 bits. If the
    device has units for TF32, they compute a float32 product as three of theirs: that of the upper parts, and those of
    each upper part with the other's lower part. What this leaves out is smaller than float32's own rounding: measured
    against float64, convolutions of 32 channels are off by 1.4e-7 so and by 3e-7 with float32 units, those of 3
    channels by 1.3e-7 and 0.9e-7.
    """
    if not x.is_cuda or torch.version.hip is not None or torch.cuda.get_device_capability(x.device) < (8, 0):
        return "ieee"
    matmul = torch.backends.cuda.matmul
    try:
        tf32 = matmul.allow_tf32
    except RuntimeError:  # the older switch cannot be read after the newer one was used
        tf32 = matmul.fp32_precision == "tf32"  # type: ignore[attr-defined,unused-ignore]
    return "tf32" if tf32 else "tf32x3"


def _padded(channels: int) -> int:
    """The next power of 2, and at least 16: the sizes that matrix products take."""
    return max(16, int(triton.next_power_of_2(channels)))


# Kernels are not specialised to these values: they change from layer to layer, and each variant would be compiled.
_SIZES = ["M", "H", "W", "blocks", "task_step", "image_step", "channel_step", "row_step", "column_step"]


@triton.jit
def _tap(
    x, w, acc, task, m, ok, row, col, image, M, H, W, task_step, image_step, channel_step, row_step, column_step,
    IN: tl.constexpr, K: tl.constexpr, OUT: tl.constexpr, P: tl.constexpr,
    FEW: tl.constexpr, FLIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc (places, P) plus the convolution of x with w at these places."""
    k = tl.arange(0, K)
    o = tl.arange(0, P)
    weights = w + task * (9 * IN * OUT)
    if FEW:  # K runs over taps and channels
        down = k // (3 * IN) - 1
        across = k // IN % 3 - 1
        r = row[:, None] + down[None, :]
        c = col[:, None] + across[None, :]
        inside = ok[:, None] & (k < 9 * IN)[None, :] & (r >= 0) & (r < H) & (c >= 0) & (c < W)
        base = x + task.to(tl.int64) * task_step
        pixel = image * image_step + row * row_step + col * column_step
        shift = down * row_step + across * column_step + k % IN * channel_step
        a = tl.load(base + pixel[:, None] + shift[None, :], mask=inside, other=0.0)
        b = tl.load(weights + k[:, None] * OUT + o[None, :], mask=(k < 9 * IN)[:, None] & (o < OUT)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        base = x + task.to(tl.int64) * M * IN
        for tap in range(9):  # not unrolled: the products would not fit into the registers
            r = row + (tap // 3 - 1)
            c = col + (tap % 3 - 1)
            inside = ok & (r >= 0) & (r < H) & (c >= 0) & (c < W)
            at = m + (tap // 3 - 1) * W + (tap % 3 - 1)
            a = tl.load(base + at[:, None] * IN + k[None, :], mask=inside[:, None] & (k < IN)[None, :], other=0.0)
            source = weights + ((8 - tap) if FLIP else tap) * (IN * OUT)
            b = tl.load(source + k[:, None] * OUT + o[None, :], mask=(k < IN)[:, None] & (o < OUT)[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=_SIZES)
def _convolution(
    x, w, x2, w2, out, p1, p2, p3, p4, mean, r, sums, M, H, W, blocks,
    task_step, image_step, channel_step, row_step, column_step,
    IN: tl.constexpr, K: tl.constexpr, OUT: tl.constexpr, P: tl.constexpr, FEW: tl.constexpr, FLIP: tl.constexpr,
    TWO: tl.constexpr, THEN: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See `convolve`; a program computes BM places of a task."""
    block = tl.program_id(0)
    task = tl.program_id(1)
    m = block * BM + tl.arange(0, BM)
    ok = m < M
    col = m % W
    row = (m // W) % H
    image = m // (W * H)
    acc = tl.zeros((BM, P), tl.float32)
    acc = _tap(
        x, w, acc, task, m, ok, row, col, image, M, H, W, task_step, image_step, channel_step, row_step, column_step,
        IN, K, OUT, P, FEW, FLIP, PRECISION,
    )  # fmt: skip
    if TWO:
        acc = _tap(
            x2, w2, acc, task, m, ok, row, col, image, M, H, W, 0, 0, 0, 0, 0, IN, K, OUT, P, False, FLIP, PRECISION
        )
    o = tl.arange(0, P)
    there = ok[:, None] & (o < OUT)[None, :]
    plane = task.to(tl.int64) * M * OUT
    at = m[:, None] * OUT + o[None, :]
    vector = task * OUT + o
    first = acc
    second = acc
    if THEN == "moments":
        # About the block's own mean, so that nothing cancels.
        total = tl.sum(acc, 0)
        middle = total / tl.minimum(M - block * BM, BM)
        off = tl.where(ok[:, None], acc - middle[None, :], 0.0)
        second = off * off
    elif THEN == "dots":
        y = tl.load(p1 + plane + at, mask=there, other=0.0)
        mu = tl.load(mean + vector, mask=o < OUT, other=0.0)
        scale = tl.load(r + vector, mask=o < OUT, other=0.0)
        second = acc * ((y - mu[None, :]) * scale[None, :])
    elif THEN == "slope" or THEN == "slope_dot":
        z = tl.load(p1 + plane + at, mask=there, other=0.0)
        q = tl.load(p2 + plane + at, mask=there, other=0.0)
        acc = tl.where(z > 0, acc, 0.0)
        first = acc
        second = acc * q
        if THEN == "slope_dot":
            e = tl.load(p3 + plane + at, mask=there, other=0.0)
            q_dot = tl.load(p4 + plane + at, mask=there, other=0.0)
            second += e * q_dot
    tl.store(out + plane + at, acc, mask=there)
    spot = vector * blocks + block
    tl.store(sums + spot, tl.sum(first, 0), mask=o < OUT)
    tl.store(sums + tl.num_programs(1) * OUT * blocks + spot, tl.sum(second, 0), mask=o < OUT)


@triton.jit(do_not_specialize=["M", "blocks", "BO"])
def _finish(sums, out, M, blocks, BO, eps, N: tl.constexpr, BM: tl.constexpr, MOMENTS: tl.constexpr):
    """Partial sums (2, B·O, blocks) -> their totals (2, B·O); for moments: μ and r."""
    channel = tl.program_id(0)
    i = tl.arange(0, N)
    there = i < blocks
    first = tl.load(sums + channel * blocks + i, mask=there, other=0.0).to(tl.float64)
    second = tl.load(sums + (BO + channel) * blocks + i, mask=there, other=0.0).to(tl.float64)
    total = tl.sum(first, 0)
    if MOMENTS:
        count = tl.minimum(M - i * BM, BM).to(tl.float64)
        mean = total / M
        off = tl.where(there, first / count - mean, 0.0)
        variance = tl.sum(second + count * off * off, 0) / M
        tl.store(out + channel, mean.to(tl.float32))
        tl.store(out + BO + channel, (1.0 / tl.sqrt(variance + eps)).to(tl.float32))
    else:
        tl.store(out + channel, total.to(tl.float32))
        tl.store(out + BO + channel, tl.sum(second, 0).to(tl.float32))


@triton.jit(do_not_specialize=["M", "H", "W", "h", "w", "full"])
def _pool(
    y, mean, r, gain, shift, z, q, place, M, H, W, h, w, full,
    OUT: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """The maxima of γ y, normed, scaled, rectified. M: pooled places of a task; `full`: those before the pooling."""
    task = tl.program_id(1)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    o = tl.arange(0, P)
    there = (m < M)[:, None] & (o < OUT)[None, :]
    corner = ((m // (h * w)) * H + 2 * ((m // w) % h)) * W + 2 * (m % w)
    vector = task * OUT + o
    mu = tl.load(mean + vector, mask=o < OUT, other=0.0)
    scale = tl.load(r + vector, mask=o < OUT, other=0.0)
    gamma = tl.load(gain + vector, mask=o < OUT, other=0.0)
    beta = tl.load(shift + vector, mask=o < OUT, other=0.0)
    # If γ is zero all places are equal, and the first is taken, as in PyTorch.
    sign = tl.where(gamma > 0, 1.0, tl.where(gamma < 0, -1.0, 0.0))
    start = y + task.to(tl.int64) * full * OUT
    at = corner[:, None] * OUT + o[None, :]
    best = tl.load(start + at, mask=there, other=0.0)
    which = tl.zeros((BM, P), tl.int32)
    for k in tl.static_range(1, 4):
        value = tl.load(start + at + ((k // 2) * W + k % 2) * OUT, mask=there, other=0.0)
        larger = sign[None, :] * value > sign[None, :] * best
        best = tl.where(larger, value, best)
        which = tl.where(larger, k, which)
    normed = (best - mu[None, :]) * scale[None, :]
    value = gamma[None, :] * normed + beta[None, :]
    value = tl.where(value <= 0, 0.0, value)  # NaN stays
    to = task.to(tl.int64) * M * OUT + m[:, None] * OUT + o[None, :]
    tl.store(z + to, value, mask=there)
    if KEEP:
        tl.store(q + to, normed, mask=there)
        tl.store(place + to, which.to(tl.int8), mask=there)


@triton.jit(do_not_specialize=["M", "H", "W", "h", "w", "full", "BO", "count"])
def _pool_dots(
    y_dot, z, q, place, r, gain, gain_dot, shift_dot, T, z_dot, q_dot, M, H, W, h, w, full, BO, count,
    OUT: tl.constexpr, P: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """q̇ and ż at the pooled places, from T (2, B·O); `count` is the number of full-size places."""
    task = tl.program_id(1)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    o = tl.arange(0, P)
    there = (m < M)[:, None] & (o < OUT)[None, :]
    corner = ((m // (h * w)) * H + 2 * ((m // w) % h)) * W + 2 * (m % w)
    vector = task * OUT + o
    scale = tl.load(r + vector, mask=o < OUT, other=0.0)[None, :]
    gamma = tl.load(gain + vector, mask=o < OUT, other=0.0)[None, :]
    gamma_dot = tl.load(gain_dot + vector, mask=o < OUT, other=0.0)[None, :]
    beta_dot = tl.load(shift_dot + vector, mask=o < OUT, other=0.0)[None, :]
    T0 = tl.load(T + vector, mask=o < OUT, other=0.0)[None, :]
    T1 = tl.load(T + BO + vector, mask=o < OUT, other=0.0)[None, :]
    here = task.to(tl.int64) * M * OUT + m[:, None] * OUT + o[None, :]
    k = tl.load(place + here, mask=there, other=0).to(tl.int32)
    at = (corner[:, None] + (k // 2) * W + k % 2) * OUT + o[None, :]
    p_dot = tl.load(y_dot + task.to(tl.int64) * full * OUT + at, mask=there, other=0.0)
    normed = tl.load(q + here, mask=there, other=0.0)
    on = tl.load(z + here, mask=there, other=0.0) > 0
    moved = scale * (p_dot - (T0 + normed * T1) / count)
    tl.store(q_dot + here, moved, mask=there)
    tl.store(z_dot + here, tl.where(on, gamma_dot * normed + gamma * moved + beta_dot, 0.0), mask=there)


@triton.jit(do_not_specialize=["M", "blocks"])
def _slope(
    dz, z, q, e, q_dot, out, sums, M, blocks, OUT: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, DOT: tl.constexpr
):
    """What `_convolution` does after the convolution with "slope" or "slope_dot", for a given ∂L/∂z."""
    block = tl.program_id(0)
    task = tl.program_id(1)
    m = block * BM + tl.arange(0, BM)
    o = tl.arange(0, P)
    there = (m < M)[:, None] & (o < OUT)[None, :]
    at = task.to(tl.int64) * M * OUT + m[:, None] * OUT + o[None, :]
    on = tl.load(z + at, mask=there, other=0.0) > 0
    first = tl.where(on, tl.load(dz + at, mask=there, other=0.0), 0.0)
    second = first * tl.load(q + at, mask=there, other=0.0)
    if DOT:
        slope = tl.load(e + at, mask=there, other=0.0)
        second += slope * tl.load(q_dot + at, mask=there, other=0.0)
    tl.store(out + at, first, mask=there)
    spot = (task * OUT + o) * blocks + block
    tl.store(sums + spot, tl.sum(first, 0), mask=o < OUT)
    tl.store(sums + tl.num_programs(1) * OUT * blocks + spot, tl.sum(second, 0), mask=o < OUT)


@triton.jit(do_not_specialize=["M", "H", "W", "h", "w", "pooled", "BO"])
def _spread(
    y, e, place, mean, r, gain, S, y_dot, e_dot, gain_dot, T, S_dot, out, M, H, W, h, w, pooled, BO,
    OUT: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """∂L/∂y by (1), or its derivative along the direction. M: full-size places; `pooled`: those after the pooling."""
    task = tl.program_id(1)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    o = tl.arange(0, P)
    there = (m < M)[:, None] & (o < OUT)[None, :]
    col = m % W
    row = (m // W) % H
    down = row // 2
    across = col // 2
    vector = task * OUT + o
    mu = tl.load(mean + vector, mask=o < OUT, other=0.0)[None, :]
    scale = tl.load(r + vector, mask=o < OUT, other=0.0)[None, :]
    gamma = tl.load(gain + vector, mask=o < OUT, other=0.0)[None, :]
    S0 = tl.load(S + vector, mask=o < OUT, other=0.0)[None, :]
    S1 = tl.load(S + BO + vector, mask=o < OUT, other=0.0)[None, :]
    at = task.to(tl.int64) * M * OUT + m[:, None] * OUT + o[None, :]
    above = ((m // (W * H)) * h + down) * w + across
    to = task.to(tl.int64) * pooled * OUT + above[:, None] * OUT + o[None, :]
    seen = there & ((down < h) & (across < w))[:, None]  # the last line of an odd side is in no window
    mine = tl.load(place + to, mask=seen, other=-1).to(tl.int32) == ((row % 2) * 2 + col % 2)[:, None]
    value = tl.load(y + at, mask=there, other=0.0)
    slope = tl.where(mine, tl.load(e + to, mask=seen, other=0.0), 0.0)
    normed = (value - mu) * scale
    c = gamma * scale
    inner = slope - (S0 + S1 * normed) / M
    if DOT:
        gamma_dot = tl.load(gain_dot + vector, mask=o < OUT, other=0.0)[None, :]
        T0 = tl.load(T + vector, mask=o < OUT, other=0.0)[None, :]
        T1 = tl.load(T + BO + vector, mask=o < OUT, other=0.0)[None, :]
        S0_dot = tl.load(S_dot + vector, mask=o < OUT, other=0.0)[None, :]
        S1_dot = tl.load(S_dot + BO + vector, mask=o < OUT, other=0.0)[None, :]
        moved = tl.load(y_dot + at, mask=there, other=0.0)
        slope_dot = tl.where(mine, tl.load(e_dot + to, mask=seen, other=0.0), 0.0)
        c_dot = gamma_dot * scale - gamma * scale * scale * T1 / M
        normed_dot = scale * (moved - (T0 + T1 * normed) / M)
        inner_dot = slope_dot - (S0_dot + S1_dot * normed + S1 * normed_dot) / M
        tl.store(out + at, c_dot * inner + c * inner_dot, mask=there)
    else:
        tl.store(out + at, c * inner, mask=there)


@triton.jit(do_not_specialize=_SIZES)
def _weights(
    x, dy, x2, dy2, out, M, H, W, task_step, image_step, channel_step, row_step, column_step,
    IN: tl.constexpr, K: tl.constexpr, OUT: tl.constexpr, P: tl.constexpr, FEW: tl.constexpr, TWO: tl.constexpr,
    BK: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A partial sum of ∂L/∂W over STEPS·BK places: out (B, blocks, 9, C, O); a program handles a row of taps."""
    block = tl.program_id(0)
    g = tl.program_id(1)
    task = tl.program_id(2)
    k = tl.arange(0, K)
    o = tl.arange(0, P)
    seen = (o < OUT)[None, :]
    plane = task.to(tl.int64) * M * OUT
    to = out + (task * tl.num_programs(0) + block).to(tl.int64) * (9 * IN * OUT)
    if FEW:
        acc = tl.zeros((K, P), tl.float32)
        down = k // (3 * IN) - 1
        across = k // IN % 3 - 1
        shift = down * row_step + across * column_step + k % IN * channel_step
        base = x + task.to(tl.int64) * task_step + shift[:, None]
        for i in range(STEPS):
            m = (block * STEPS + i) * BK + tl.arange(0, BK)
            ok = m < M
            d = tl.load(dy + plane + m[:, None] * OUT + o[None, :], mask=ok[:, None] & seen, other=0.0)
            row = (m // W) % H
            col = m % W
            r = row[None, :] + down[:, None]
            c = col[None, :] + across[:, None]
            inside = ok[None, :] & (k < 9 * IN)[:, None] & (r >= 0) & (r < H) & (c >= 0) & (c < W)
            pixel = m // (W * H) * image_step + row * row_step + col * column_step
            a = tl.load(base + pixel[None, :], mask=inside, other=0.0)
            acc = tl.dot(a, d, acc, input_precision=PRECISION)
        tl.store(to + k[:, None] * OUT + o[None, :], acc, mask=(k < 9 * IN)[:, None] & seen)
    else:
        left = tl.zeros((K, P), tl.float32)
        middle = tl.zeros((K, P), tl.float32)
        right = tl.zeros((K, P), tl.float32)
        inner = (k < IN)[:, None]
        source = task.to(tl.int64) * M * IN
        for i in range(STEPS):
            m = (block * STEPS + i) * BK + tl.arange(0, BK)
            row = (m // W) % H + (g - 1)
            col = m % W
            ok = (m < M) & (row >= 0) & (row < H)
            west = ok & (col >= 1)
            east = ok & (col + 1 < W)
            d = tl.load(dy + plane + m[:, None] * OUT + o[None, :], mask=(m < M)[:, None] & seen, other=0.0)
            at = source + (m + (g - 1) * W)[None, :] * IN + k[:, None]
            a = tl.load(x + at - IN, mask=west[None, :] & inner, other=0.0)
            left = tl.dot(a, d, left, input_precision=PRECISION)
            a = tl.load(x + at, mask=ok[None, :] & inner, other=0.0)
            middle = tl.dot(a, d, middle, input_precision=PRECISION)
            a = tl.load(x + at + IN, mask=east[None, :] & inner, other=0.0)
            right = tl.dot(a, d, right, input_precision=PRECISION)
            if TWO:
                d = tl.load(dy2 + plane + m[:, None] * OUT + o[None, :], mask=(m < M)[:, None] & seen, other=0.0)
                a = tl.load(x2 + at - IN, mask=west[None, :] & inner, other=0.0)
                left = tl.dot(a, d, left, input_precision=PRECISION)
                a = tl.load(x2 + at, mask=ok[None, :] & inner, other=0.0)
                middle = tl.dot(a, d, middle, input_precision=PRECISION)
                a = tl.load(x2 + at + IN, mask=east[None, :] & inner, other=0.0)
                right = tl.dot(a, d, right, input_precision=PRECISION)
        to += g * (3 * IN * OUT) + k[:, None] * OUT + o[None, :]
        tl.store(to, left, mask=inner & seen)
        tl.store(to + IN * OUT, middle, mask=inner & seen)
        tl.store(to + 2 * IN * OUT, right, mask=inner & seen)


@triton.jit(do_not_specialize=["n", "F"])
def _logits(
    x, w, x2, w2, bias, out, n, F, N: tl.constexpr, FP: tl.constexpr, TWO: tl.constexpr
):  # fmt: skip
    """See `head`; a program computes the logits of an image."""
    image = tl.program_id(0)
    task = tl.program_id(1)
    f = tl.arange(0, FP)
    row = (task * n + image) * F + f
    a = tl.load(x + row, mask=f < F, other=0.0)
    a2 = a
    if TWO:
        a2 = tl.load(x2 + row, mask=f < F, other=0.0)
    for k in range(N):
        at = (task * N + k) * F + f
        products = a * tl.load(w + at, mask=f < F, other=0.0)
        if TWO:
            products += a2 * tl.load(w2 + at, mask=f < F, other=0.0)
        total = tl.sum(products, 0) + tl.load(bias + task * N + k)
        tl.store(out + (task * n + image) * N + k, total)


@triton.jit(do_not_specialize=["rows", "n"])
def _cross_entropy(logits, y, p, slope, loss, rows, n, N: tl.constexpr, P: tl.constexpr, BM: tl.constexpr):
    """See `cross_entropy`; a program handles BM images."""
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.arange(0, P)
    ok = r < rows
    there = ok[:, None] & (k < N)[None, :]
    at = r[:, None] * N + k[None, :]
    # In float64, whose exp and log are exact to float32's last bit; there are few values.
    v = tl.load(logits + at, mask=there, other=float("-inf")).to(tl.float64)
    v = tl.where(ok[:, None], v, 0.0)
    top = tl.max(v, 1)
    e = tl.exp(v - top[:, None])
    total = tl.sum(e, 1)
    share = e / total[:, None]
    label = tl.load(y + r, mask=ok, other=0)
    a_class = (label >= 0) & (label < N)  # a label that is no class gives NaN
    share = tl.where(a_class[:, None], share, float("nan"))
    hit = k[None, :] == label[:, None]
    tl.store(p + at, share.to(tl.float32), mask=there)
    tl.store(slope + at, ((share - tl.where(hit, 1.0, 0.0)) / n).to(tl.float32), mask=there)
    chosen = tl.sum(tl.where(hit, v, 0.0), 1)
    nats = tl.where(a_class, tl.log(total) + top - chosen, float("nan"))
    tl.store(loss + r, nats.to(tl.float32), mask=ok)


class _Tile(NamedTuple):
    """How a convolution is divided into programs; measured on an H200."""

    places: int
    warps: int
    stages: int


def _tile(B: int, M: int, channels: int, few: bool, exact: bool) -> _Tile:
    """The division for B tasks of M places, by what was fastest."""
    if few:
        return _Tile(128, 4, 2)
    stages = 3 if channels <= 32 else 2  # more would not fit into shared memory
    if B * M < _SMALL:  # idle threads cost less than idle multiprocessors
        return _Tile(32, 2, stages)
    return _Tile(128, 8, stages) if exact else _Tile(64, 2, stages)


def _few(channels: int) -> bool:
    """Whether channels are so few that all nine taps share a matrix product."""
    return channels < _DENSE


def _inner(channels: int, few: bool) -> int:
    """The inner size of the matrix products, padded."""
    return _padded(9 * channels if few else channels)


def _strides(x: Tensor) -> tuple[int, ...]:
    """The strides of a plane in the order that kernels take: task, image, channel, row, column."""
    task, image, row, column, channel = x.stride()
    return task, image, channel, row, column


def as_source(x: Tensor) -> Tensor:
    """Images (B, n, C, H, W) as a plane that convolutions read: a view if channels are few, otherwise a copy."""
    plane = x.permute(0, 1, 3, 4, 2)
    return plane if _few(x.shape[2]) else plane.contiguous()


def convolve(
    x: Tensor,
    weight: Tensor,
    second: tuple[Tensor, Tensor] | None = None,
    transposed: bool = False,
    then: str = "moments",
    beside: tuple[Tensor, ...] = (),
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The 3×3 convolution (padding 1) of x with a weight, plus that of a second pair if given; and sums over the
    result.

    Args:
        x: a plane of the weight's C channels; with `transposed`, of its O channels.
        weight: (B, 9, C, O); with `transposed` (B, 9, O, C), see `turned`.
        second: another plane and weight of the same shapes.
        transposed: compute the vector-Jacobian product instead, from O channels to C.
        then: what is done to the result y, and what is summed over it:
            "moments": nothing is done; the sums are turned into the mean μ and r = (variance + eps)^(-1/2);
            "dots": nothing is done; Σ y and Σ y ŷ, with ŷ the normed plane `beside`;
            "slope": y becomes e = y [z > 0]; Σ e and Σ e q, with z, q = `beside`;
            "slope_dot": y becomes ė = y [z > 0]; Σ ė and Σ (ė q + e q̇), with z, q, e, q̇ = `beside`.
        beside: planes of the result's shape.
        norm: (2, B, O), μ and r of the plane `beside`, for "dots".
        eps: for "moments".

    Returns:
        The result (B, n, H, W, ·), and the sums (2, B, ·).
    """
    B, n, H, W, IN = x.shape
    OUT = weight.shape[3]
    M = n * H * W
    few = _few(IN) and not transposed and second is None
    products = precision(x)
    tile = _tile(B, M, max(IN, OUT), few, products == "tf32x3")
    blocks = triton.cdiv(M, tile.places)
    out = weight.new_empty(B, n, H, W, OUT)
    sums = weight.new_empty(2, B * OUT, blocks)
    x2, w2 = (x, weight) if second is None else second
    p1, p2, p3, p4 = (*beside, *(out,) * (4 - len(beside)))
    mean, r = (out, out) if norm is None else norm
    _convolution[(blocks, B)](
        *(x, weight, x2, w2, out, p1, p2, p3, p4, mean, r, sums, M, H, W, blocks, *_strides(x)),
        *(IN, _inner(IN, few), OUT, _padded(OUT), few, transposed, second is not None, then, tile.places, products),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out, _totals(sums, B, M, tile.places, eps, then == "moments")


def turned(weight: Tensor) -> Tensor:
    """A weight (B, 9, C, O) as transposed convolutions need it: (B, 9, O, C)."""
    return weight.transpose(2, 3).contiguous()


def _totals(sums: Tensor, B: int, M: int, places: int, eps: float, moments: bool) -> Tensor:
    """(2, B, O) from partial sums (2, B·O, blocks), each over `places` of the M places; for moments: μ and r."""
    _, BO, blocks = sums.shape
    out = sums.new_empty(2, B, BO // B)
    N = max(16, triton.next_power_of_2(blocks))
    _finish[(BO,)](sums, out, M, blocks, BO, eps, N, places, moments, num_warps=4 if N <= 4096 else 8)
    return out


def pool(
    y: Tensor, norm: Tensor, gain: Tensor, shift: Tensor, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """z and, if they are to be kept, q and which place of each window is the maximum (int8, 0 … 3)."""
    B, n, H, W, OUT = y.shape
    h, w = H // 2, W // 2
    z = y.new_empty(B, n, h, w, OUT)
    q = torch.empty_like(z) if keep else None
    place = torch.empty_like(z, dtype=torch.int8) if keep else None
    M = n * h * w
    _pool[(triton.cdiv(M, _TILE), B)](
        *(y, *norm, gain, shift, z, z if q is None else q, z if place is None else place),
        *(M, H, W, h, w, n * H * W, OUT, _padded(OUT), _TILE, keep),
    )
    return z, q, place


def pool_dots(
    y_dot: Tensor,
    z: Tensor,
    q: Tensor,
    place: Tensor,
    norm: Tensor,
    gain: Tensor,
    moved: tuple[Tensor, Tensor],
    T: Tensor,
) -> tuple[Tensor, Tensor]:
    """ż and q̇, from ẏ and T (2, B, O); `moved` are γ̇ and β̇."""
    B, n, H, W, OUT = y_dot.shape
    h, w = H // 2, W // 2
    z_dot, q_dot = torch.empty_like(z), torch.empty_like(z)
    M, full = n * h * w, n * H * W
    _pool_dots[(triton.cdiv(M, _TILE), B)](
        *(y_dot, z, q, place, norm[1], gain, *moved, T, z_dot, q_dot),
        *(M, H, W, h, w, full, B * OUT, full, OUT, _padded(OUT), _TILE),
    )
    return z_dot, q_dot


def slope(dz: Tensor, z: Tensor, q: Tensor, dots: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """e = ∂L/∂z [z > 0] and S (2, B, O); with `dots`, which are e and q̇, their derivatives: see "slope_dot" of
    `convolve`.
    """
    B, n, h, w, OUT = z.shape
    M = n * h * w
    blocks = triton.cdiv(M, _TILE)
    out, sums = torch.empty_like(z), z.new_empty(2, B * OUT, blocks)
    e, q_dot = dots or (z, z)
    _slope[(blocks, B)](dz, z, q, e, q_dot, out, sums, M, blocks, OUT, _padded(OUT), _TILE, dots is not None)
    return out, _totals(sums, B, M, _TILE, 0.0, False)


def spread(
    y: Tensor,
    e: Tensor,
    place: Tensor,
    norm: Tensor,
    gain: Tensor,
    S: Tensor,
    dots: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """∂L/∂y from e and S (2, B, O). With `dots`, which are ẏ, ė, γ̇, T and Ṡ: its derivative along the direction."""
    B, n, H, W, OUT = y.shape
    h, w = H // 2, W // 2
    out = torch.empty_like(y)
    M = n * H * W
    y_dot, e_dot, gain_dot, T, S_dot = dots or (y, e, gain, S, S)
    _spread[(triton.cdiv(M, _TILE), B)](
        *(y, e, place, *norm, gain, S, y_dot, e_dot, gain_dot, T, S_dot, out),
        *(M, H, W, h, w, n * h * w, B * OUT, OUT, _padded(OUT), _TILE, dots is not None),
    )
    return out


def weight_gradient(x: Tensor, dy: Tensor, second: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """∂L/∂W (B, 9, C, O) of a convolution of x, from ∂L/∂y; plus that of a second pair if given."""
    B, n, H, W, IN = x.shape
    OUT = dy.shape[-1]
    M = n * H * W
    steps = 2 if B * M < _SMALL // 2 else 16
    blocks = triton.cdiv(M, _SUMMED * steps)
    out = dy.new_empty(B, blocks, 9, IN, OUT)
    x2, dy2 = (x, dy) if second is None else second
    few = _few(IN) and second is None
    products = precision(x)
    if few and products == "tf32x3":
        products = "ieee"  # not slower here, where patches are gathered
    narrow = max(IN, OUT) <= 32
    _weights[(blocks, 1 if few else 3, B)](
        *(x, dy, x2, dy2, out, M, H, W, *_strides(x)),
        *(IN, _inner(IN, few), OUT, _padded(OUT), few, second is not None, _SUMMED, steps, products),
        num_warps=2 if narrow else 8,
        num_stages=3 if narrow else 2,
    )
    return out.sum(1) if blocks > 1 else out.squeeze(1)


def head(features: Tensor, weight: Tensor, bias: Tensor, second: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Logits (B, n, N) from features (B, n, F), by a head's weight (B, N, F) and bias (B, N); plus the products of a
    second pair.

    A library's matrix product would leave such few outputs of such long sums to a handful of multiprocessors.
    """
    B, n, F = features.shape
    N = weight.shape[1]
    out = features.new_empty(B, n, N)
    x2, w2 = (features, weight) if second is None else second
    FP = max(32, triton.next_power_of_2(F))
    _logits[(n, B)](
        *(features, weight.contiguous(), x2, w2.contiguous(), bias.contiguous(), out),
        *(n, F, N, FP, second is not None),
        num_warps=min(8, max(1, FP // 256)),
    )
    return out


def cross_entropy(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each image (B, n) in nats, the probabilities (B, n, N), and the gradient of the tasks' mean losses
    (B, n, N).

    If a label is not in [0, N), all three are NaN for its image, because the host does not check the labels.

    Args:
        logits: (B, n, N).
        y: labels (B, n).

    Raises:
        ValueError: the labels have another shape, or are not integers.
    """
    if y.shape != logits.shape[:2] or y.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"labels are {tuple(y.shape)} of {y.dtype}, but logits {tuple(logits.shape)} need "
            f"{tuple(logits.shape[:2])} of torch.int64: one class in [0, {logits.shape[2]}) for each image"
        )
    B, n, N = logits.shape
    p, slope_of, loss = torch.empty_like(logits), torch.empty_like(logits), logits.new_empty(B, n)
    rows, BM = B * n, 16
    _cross_entropy[(triton.cdiv(rows, BM),)](
        *(logits, y.contiguous(), p, slope_of, loss, rows, n, N, max(16, triton.next_power_of_2(N)), BM)
    )
    return loss, p, slope_of
