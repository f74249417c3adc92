"""The kernels of _gemm.py.

Arguments that belong together travel as tuples. out: (y, partial sums, bias). pending: (z, mean, rstd,
weight, bias, seed) of a Pointwise. sizes: (rows of the matrix, rows of an image, width of the grid, height
and width of y, height and width of z, samples of a weight set, samples). What is None is not compiled.
"""
# mypy: disable-error-code="no-untyped-def"
# (only the kernels: Triton reads their annotations)

from typing import NamedTuple

from ._op import tl, triton
from ._pointwise import activate, activation_slope, keep


class Product(NamedTuple):
    """What is compiled into a kernel, besides its blocks.

    taps_h, taps_w, k, n: of the packed weights. cell: pixels side by side in a row of the input, per axis.
    pitch, columns_in: columns of a pixel and of a row of the input. columns: of the result.
    part: columns that a program finishes at once: all of them would not fit the registers.
    crop: rows and columns that the result lacks before its first; pad: that it has before the first of z.
    """

    taps_h: int
    taps_w: int
    k: int
    n: int
    cell: int
    pitch: int
    columns_in: int
    columns: int
    precision: str
    tma: bool
    part: int
    crop: int = 0
    pad: int = 0
    mode: str = "zeros"
    act: str = "none"
    slope: float = 0.2
    threshold: int = 0
    scale: float = 1.0


@triton.jit
def _box(
    matrix, row, column, rows, COLUMNS: tl.constexpr, MASK: tl.constexpr, P: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # a block of a row-major matrix; with MASK, and always through a descriptor, rows outside of it are 0
    if P.tma:
        box = matrix.load([row, column])
    else:
        r = tl.arange(0, BLOCK_R)[:, None]
        c = tl.arange(0, BLOCK_C)[None, :]
        # the corner is a scalar: what is left is the same for every box and leaves the loop
        at = matrix + (row.to(tl.int64) * COLUMNS + column) + (r * COLUMNS + c)
        if MASK:
            box = tl.load(at, mask=(row + r >= 0) & (row + r < rows), other=0.0)
        else:
            box = tl.load(at)
    return box


@triton.jit
def _shift(u, v, grid_w, P: tl.constexpr):
    # of tap (u, v): how many rows further it reads, and from which column on
    shift = (u // P.cell) * grid_w + v // P.cell
    return shift, ((u % P.cell) * P.cell + v % P.cell) * P.pitch


@triton.jit
def _conv_forward_kernel(
    a, w, scratch, out, pending, sizes, P: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_N
    block = tl.program_id(1)
    part = tl.program_id(2) // sizes[8]
    image = tl.program_id(2) % sizes[8]
    row = image * sizes[1] + block * BLOCK_M
    w_row = image // sizes[7] * (P.taps_h * P.taps_w * P.k)
    OF_TAP: tl.constexpr = P.k // BLOCK_K
    ACC: tl.constexpr = tl.float64 if out[0].dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for step in range(STEPS):
        t = part * STEPS + step
        tap = t // OF_TAP
        shift, column = _shift(tap // P.taps_w, tap % P.taps_w, sizes[2], P)
        column += t % OF_TAP * BLOCK_K
        x = _box(a, row + shift, column, sizes[0], P.columns_in, True, P, BLOCK_M, BLOCK_K)
        y = _box(w, w_row + t * BLOCK_K, first, 0, P.n, False, P, BLOCK_K, BLOCK_N)
        acc = tl.dot(x, y, acc, input_precision=P.precision, out_dtype=ACC)
    _leave(acc, scratch, out, pending, sizes, image, 0, block, first, P, 1, BLOCK_M, BLOCK_N)


@triton.jit
def _add_taps(
    acc, a, w, row, w_row, ph, pw, part, sizes, P: tl.constexpr,
    OWN_H: tl.constexpr, OWN_W: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # the taps that reach place (ph, pw) of a cell, OWN_H times OWN_W of them
    OF_TAP: tl.constexpr = P.n // BLOCK_K
    STEPS: tl.constexpr = OWN_H * OWN_W * OF_TAP // PARTS
    for step in range(STEPS):
        t = part * STEPS + step
        tap = t // OF_TAP
        u = tap // OWN_W
        v = tap % OWN_W
        column = t % OF_TAP * BLOCK_K
        x = _box(a, row - u * sizes[2] - v, column, sizes[0], P.n, True, P, BLOCK_M, BLOCK_K)
        own = w_row + ((P.cell * u + ph) * P.taps_w + P.cell * v + pw) * P.k
        y = _box(w, own, column, 0, P.n, False, P, BLOCK_N, BLOCK_K)
        acc = tl.dot(x, y.T, acc, input_precision=P.precision, out_dtype=acc.dtype)
    return acc


@triton.jit
def _conv_input_gradient_kernel(
    a, w, scratch, out, pending, sizes, P: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_N
    block = tl.program_id(1)
    # the places of a cell are the slowest axis: those with the most taps start first
    image = tl.program_id(2) % sizes[8]
    part = tl.program_id(2) // sizes[8] % PARTS
    phase = tl.program_id(2) // sizes[8] // PARTS
    row = image * sizes[1] + block * BLOCK_M
    w_row = image // sizes[7] * (P.taps_h * P.taps_w * P.k) + first
    ACC: tl.constexpr = tl.float64 if out[0].dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    if P.taps_h % P.cell == 0:
        acc = _add_taps(
            acc, a, w, row, w_row, phase // 2, phase % 2, part, sizes, P,
            P.taps_h // P.cell, P.taps_w // P.cell, PARTS, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        # not as many taps for each place: loops of their own, since their bounds must be constants
        for place in tl.static_range(4):
            if phase == place:
                acc = _add_taps(
                    acc, a, w, row, w_row, place // 2, place % 2, part, sizes, P,
                    (P.taps_h + 1 - place // 2) // 2, (P.taps_w + 1 - place % 2) // 2, PARTS,
                    BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
    _leave(acc, scratch, out, pending, sizes, image, phase, block, first, P, P.cell, BLOCK_M, BLOCK_N)


@triton.jit
def _halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()


@triton.jit
def _store(acc, y, mask, P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    # y: (BLOCK_M,) pointers to the first column
    if P.part < BLOCK_N:
        left, right = _halves(acc, BLOCK_M, BLOCK_N)
        _store(left, y, mask, P, BLOCK_M, BLOCK_N // 2)
        _store(right, y + BLOCK_N // 2, mask, P, BLOCK_M, BLOCK_N // 2)
    else:
        n = tl.arange(0, BLOCK_N)
        tl.store(y[:, None] + n[None, :], acc, mask=mask[:, None])


@triton.jit
def _leave(
    acc, scratch, out, pending, sizes, image, phase, block, first, P: tl.constexpr, CELL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    if scratch is None:
        _finish(acc, out, pending, sizes, image, phase, block, first, P, CELL, BLOCK_M, BLOCK_N)
    else:
        r = (tl.program_id(2) * tl.num_programs(1) + block) * BLOCK_M + tl.arange(0, BLOCK_M)
        pitch = tl.num_programs(0) * BLOCK_N
        _store(acc, scratch + r.to(tl.int64) * pitch + first, r >= 0, P, BLOCK_M, BLOCK_N)


@triton.jit
def _conv_sum_kernel(
    scratch, out, pending, sizes, pitch, P: tl.constexpr, CELL: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # adds the parts of a product that was split along k
    first = tl.program_id(0) * BLOCK_N
    block = tl.program_id(1)
    image = tl.program_id(2) % sizes[8]
    phase = tl.program_id(2) // sizes[8]
    c = first + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), scratch.dtype.element_ty)
    for part in range(PARTS):
        place = (phase * PARTS + part) * sizes[8] + image
        r = (place * tl.num_programs(1) + block) * BLOCK_M + tl.arange(0, BLOCK_M)
        acc += tl.load(scratch + (r.to(tl.int64) * pitch)[:, None] + c[None, :])
    _finish(acc, out, pending, sizes, image, phase, block, first, P, CELL, BLOCK_M, BLOCK_N)


@triton.jit
def _finish(
    acc, out, pending, sizes, image, phase, block, first, P: tl.constexpr, CELL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    if P.part < BLOCK_N:
        left, right = _halves(acc, BLOCK_M, BLOCK_N)
        _finish(left, out, pending, sizes, image, phase, block, first, P, CELL, BLOCK_M, BLOCK_N // 2)
        first += BLOCK_N // 2
        _finish(right, out, pending, sizes, image, phase, block, first, P, CELL, BLOCK_M, BLOCK_N // 2)
    else:
        m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        n = first + tl.arange(0, BLOCK_N)
        h = m // sizes[2] * CELL + phase // 2 - P.crop
        w = m % sizes[2] * CELL + phase % 2 - P.crop
        inside = (m < sizes[1]) & (h >= 0) & (h < sizes[3]) & (w >= 0) & (w < sizes[4])
        weight_set = image // sizes[7]
        if out[2] is not None:
            acc += tl.load(out[2] + weight_set * P.columns + n, mask=n < P.columns, other=0.0)[None, :]
        if pending[0] is None:
            ACT: tl.constexpr = P.act
            SLOPE: tl.constexpr = P.slope
            acc = activate(acc, ACT, SLOPE)
        pixel = (image.to(tl.int64) * sizes[3] + h) * sizes[4] + w
        y = out[0] + (pixel * P.columns)[:, None] + n[None, :]
        mask = inside[:, None] & (n < P.columns)[None, :]
        tl.store(y, acc.to(out[0].dtype.element_ty), mask=mask)
        if out[1] is not None:
            if pending[0] is None:
                acc = tl.where(inside[:, None], acc, 0.0)
                other = acc
            else:
                acc, other = _due(acc, pending, sizes, image, weight_set, h, w, inside, n, P)
            place = (image * (CELL * CELL) + phase) * tl.num_programs(1) + block
            sums = out[1] + place.to(tl.int64) * (2 * P.columns) + n
            tl.store(sums, tl.sum(acc, axis=0), mask=n < P.columns)
            tl.store(sums + P.columns, tl.sum(acc * other, axis=0), mask=n < P.columns)


@triton.jit
def _source(i, size, P: tl.constexpr):
    # the pixel that a place of the padded image shows
    if P.mode == "reflect":
        i = tl.where(i < 0, -i, i)
        i = tl.where(i >= size, 2 * (size - 1) - i, i)
    return tl.minimum(tl.maximum(i, 0), size - 1)


@triton.jit
def _due(g, pending, sizes, image, weight_set, h, w, inside, n, P: tl.constexpr):
    # g * act' * dropout and xhat at the pixels that places (h, w) of the padded image show; beyond it g is 0
    height, width = sizes[5], sizes[6]
    h -= P.pad
    w -= P.pad
    if P.mode == "zeros":
        inside = inside & (h >= 0) & (h < height) & (w >= 0) & (w < width)
    h = _source(h, height, P)
    w = _source(w, width, P)
    used = n < P.columns
    pixel = (image.to(tl.int64) * height + h) * width + w
    z = pending[0] + (pixel * P.columns)[:, None] + n[None, :]
    xhat = tl.load(z, mask=inside[:, None] & used[None, :], other=0.0).to(g.dtype)
    if pending[1] is not None:
        xhat -= tl.load(pending[1] + image * P.columns + n, mask=used, other=0.0)[None, :]
        xhat *= tl.load(pending[2] + image * P.columns + n, mask=used, other=0.0)[None, :]
    pre = xhat
    if pending[3] is not None:
        pre *= tl.load(pending[3] + weight_set * P.columns + n, mask=used, other=0.0)[None, :]
    if pending[4] is not None:
        pre += tl.load(pending[4] + weight_set * P.columns + n, mask=used, other=0.0)[None, :]
    ACT: tl.constexpr = P.act
    SLOPE: tl.constexpr = P.slope
    g *= activation_slope(pre, False, ACT, SLOPE)
    if pending[5] is not None:
        THRESHOLD: tl.constexpr = P.threshold
        plane = image.to(tl.int64) * P.columns + n
        index = plane[None, :] * (height * width) + (h * width + w)[:, None]
        g = tl.where(keep(tl.load(pending[5]), index, THRESHOLD), g * P.scale, 0.0)
    return tl.where(inside[:, None], g, 0.0), xhat


@triton.jit
def _conv_weight_gradient_kernel(
    a, dz, partial_ptr, rows, of_group, grid_w, parts, P: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = P.n // BLOCK_N
    first_k = tl.program_id(0) // BLOCKS * BLOCK_M
    first_n = tl.program_id(0) % BLOCKS * BLOCK_N
    tap = tl.program_id(1)
    group = tl.program_id(2) // parts
    begin = tl.program_id(2) % parts * (STEPS * BLOCK_K)
    shift, column = _shift(tap // P.taps_w, tap % P.taps_w, grid_w, P)
    column += first_k
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for t in range(STEPS):
        q = begin + t * BLOCK_K
        x = _box(a, group * of_group + q + shift, column, rows, P.columns_in, True, P, BLOCK_K, BLOCK_M)
        # rows behind the group's end are 0
        if P.tma:
            y = dz.load([group, q, first_n]).reshape(BLOCK_K, BLOCK_N)
        else:
            own = dz + group.to(tl.int64) * of_group * P.n
            y = _box(own, q, first_n, of_group, P.n, True, P, BLOCK_K, BLOCK_N)
        acc = tl.dot(x.T, y, acc, input_precision=P.precision, out_dtype=ACC)
    k = first_k + tl.arange(0, BLOCK_M)
    at = ((tl.program_id(2) * tl.num_programs(1) + tap).to(tl.int64) * P.k + k) * P.n + first_n
    _store(acc, partial_ptr + at, k < P.k, P, BLOCK_M, BLOCK_N)
