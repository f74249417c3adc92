"""The kernels of _halo.py, and the helpers that find where a Layout holds a pixel.

An image is passed as a tuple (pointer, stride of N, of C, of H, of W), a norm as (mean, rstd, weight, bias),
a Layout as its sizes (arguments) and its Form (compiled in).
"""
# mypy: disable-error-code="no-untyped-def"
# (only the kernels: Triton reads their annotations)

from ._op import tl, triton
from ._pointwise import activate, activation_slope, keep


@triton.jit
def _mirror(i, size, TO: tl.constexpr):
    if TO.mode == "reflect":
        i = tl.where(i < 0, -i, i)
        i = tl.where(i >= size, 2 * (size - 1) - i, i)
    elif TO.mode == "replicate":
        i = tl.minimum(tl.maximum(i, 0), size - 1)
    return i


@triton.jit
def _place(first, sizes, TO: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    # the tile's grid positions (i, j), columns and pixels (c, h, w), whether they are in the matrix, whether
    # they hold a pixel, and the first and last image row
    H, W, C, grid_h, grid_w, columns, top, left, padded_h, padded_w = sizes
    row = first + tl.arange(0, BLOCK_R)[:, None]  # (BLOCK_R, 1)
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]  # (1, BLOCK_K)
    if TO.flat:
        i, j = tl.zeros_like(row), row
        span = (0, 0)
    else:
        i, j = row // grid_w, row % grid_w
        last = (first + BLOCK_R - 1) // grid_w * TO.step + TO.sub_h - 1
        span = (first // grid_w * TO.step - top, last - top)
    h, w, c = i * TO.step - top, j * TO.step - left, column
    used = (row < grid_h * grid_w) & (column < columns)
    inside = used
    if TO.sub_h * TO.sub_w > 1:
        if TO.pitch % BLOCK_K == 0:
            # one pixel of the cell for the whole tile
            cell = tl.program_id(1) * BLOCK_K // TO.pitch
        else:
            cell = column // TO.pitch
        c = column - cell * TO.pitch
        if TO.sub_h > 1:
            h += cell // TO.sub_w
            cell = cell % TO.sub_w
        w = w - cell if TO.back else w + cell
        used &= column < TO.sub_h * TO.sub_w * TO.pitch
    used &= c < C
    if TO.mode == "zeros":
        used &= (h >= 0) & (h < H) & (w >= 0) & (w < W)
    elif not TO.exact:
        used &= (h + top < padded_h) & (w + left >= 0) & (w + left < padded_w)
    return i, j, column, c, _mirror(h, H, TO), _mirror(w, W, TO), inside, used, span


@triton.jit
def _pointer(image, n, c, h, w):
    offset = h.to(tl.int64) * image[3] + w.to(tl.int64) * image[4]
    return image[0] + n.to(tl.int64) * image[1] + c.to(tl.int64) * image[2] + offset


@triton.jit
def _copy_of(i, size, before, after, COPY: tl.constexpr, COPIES: tl.constexpr, FROM: tl.constexpr):
    # where the padded axis holds copy number COPY of position i, and whether it holds one
    if COPY == 0:
        return i + before, (i >= 0) & (i < size)
    if FROM.mode == "replicate":
        # first those before the image, then those after it
        low = (i == 0) & (before >= COPY)
        high = (i == size - 1) & (before < COPY)
        return tl.where(low, before, size - 1) + tl.where(low, -COPY, COPY), low | high
    low = (i >= 1) & (i <= before)
    high = (i >= size - 1 - after) & (i < size - 1)
    if COPIES == 2:
        return before + tl.where(low, -i, 2 * (size - 1) - i), low | high
    if COPY == 1:
        return before - i, low
    return before + 2 * (size - 1) - i, high


@triton.jit
def _gather(
    rows, n, c, h, w, mask, span, sizes, FROM: tl.constexpr, SHAPE: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    # the sum of the places of a layout that hold each pixel
    total = tl.zeros(SHAPE, DTYPE)
    total = _add_copies(total, rows, n, c, h, w, mask, sizes, 0, FROM, DTYPE)
    COPIES_H: tl.constexpr = FROM.copies_h
    if COPIES_H > 1:
        # only some tiles hold rows that were copied into the padding
        if (span[0] <= sizes[6]) | (span[1] >= sizes[0] - 1 - (sizes[8] - sizes[0] - sizes[6])):
            for copy_h in tl.static_range(1, COPIES_H):
                total = _add_copies(total, rows, n, c, h, w, mask, sizes, copy_h, FROM, DTYPE)
    return total


@triton.jit
def _add_copies(
    total, rows, n, c, h, w, mask, sizes, COPY_H: tl.constexpr, FROM: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    H, W, C, grid_h, grid_w, columns, top, left, padded_h, padded_w = sizes
    COPIES_H: tl.constexpr = FROM.copies_h
    COPIES_W: tl.constexpr = FROM.copies_w
    p, in_h = _copy_of(h, H, top, padded_h - H - top, COPY_H, COPIES_H, FROM)
    for copy_w in tl.static_range(COPIES_W):
        q, in_w = _copy_of(w, W, left, padded_w - W - left, copy_w, COPIES_W, FROM)
        for term in range((FROM.sub_w + FROM.step - 1) // FROM.step):
            b = term if FROM.back else q % FROM.step + term * FROM.step
            j = q + term if FROM.back else q // FROM.step - term
            column = ((p % FROM.step) * FROM.sub_w + b) * FROM.pitch + c
            held = mask & in_h & in_w & (b < FROM.sub_w) & (j >= 0) & (j < grid_w)
            value = tl.load(_pointer(rows, n, column, p // FROM.step, j), mask=held, other=0.0)
            total += value.to(DTYPE)
    return total


@triton.jit
def _parameters(norm, n, c, C, per_set, DTYPE: tl.constexpr):
    # mean, rstd, weight, bias of the tile's channels; 0 where there is none: no function can return None
    mean, rstd, weight, bias = 0.0, 0.0, 0.0, 0.0
    if norm[0] is not None:
        mean = tl.load(norm[0] + n * C + c, mask=c < C, other=0.0)
        rstd = tl.load(norm[1] + n * C + c, mask=c < C, other=0.0)
    if norm[2] is not None:
        weight = tl.load(norm[2] + n // per_set * C + c, mask=c < C, other=0.0).to(DTYPE)
    if norm[3] is not None:
        bias = tl.load(norm[3] + n // per_set * C + c, mask=c < C, other=0.0).to(DTYPE)
    return mean, rstd, weight, bias


@triton.jit
def _scale(x, norm, parameters):
    # one factor, of the small tensors
    if norm[1] is not None:
        scale = parameters[1]
        if norm[2] is not None:
            scale *= parameters[2]
        x *= scale
    elif norm[2] is not None:
        x *= parameters[2]
    return x


@triton.jit
def _kept(seed_ptr, n, c, h, w, sizes, THRESHOLD: tl.constexpr):
    plane = n.to(tl.int64) * sizes[2] + c
    return keep(tl.load(seed_ptr), (plane * sizes[0] + h) * sizes[1] + w, THRESHOLD)


@triton.jit
def _halo_write_kernel(
    x, residual, out, norm, seed_ptr, sizes, per_set,
    TO: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr, DROPOUT: tl.constexpr, THRESHOLD: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(sizes[3] * sizes[4], BLOCK_R)
    n = tl.program_id(0) // tiles
    i, j, column, c, h, w, inside, used, span = _place(
        tl.program_id(0) % tiles * BLOCK_R, sizes, TO, BLOCK_R, BLOCK_K
    )
    dtype: tl.constexpr = tl.float64 if x[0].dtype.element_ty == tl.float64 else tl.float32
    parameters = _parameters(norm, n, c, sizes[2], per_set, dtype)
    y = tl.load(_pointer(x, n, c, h, w), mask=used, other=0.0).to(dtype)
    if norm[0] is not None:
        y -= parameters[0]
    y = _scale(y, norm, parameters)
    if norm[3] is not None:
        y += parameters[3]
    if residual is not None:
        y += tl.load(_pointer(residual, n, c, h, w), mask=used, other=0.0).to(y.dtype)
    y = activate(y, ACT, SLOPE)
    if DROPOUT > 0:
        y = tl.where(_kept(seed_ptr, n, c, h, w, sizes, THRESHOLD), y * (1 / (1 - DROPOUT)), 0.0)
    tl.store(_pointer(out, n, column, i, j), tl.where(used, y, 0.0), mask=inside)


@triton.jit
def _halo_fold_kernel(
    rows, out, norm, sizes, out_sizes, per_set,
    FROM: tl.constexpr, TO: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(out_sizes[3] * out_sizes[4], BLOCK_R)
    n = tl.program_id(0) // tiles
    i, j, column, c, h, w, inside, used, span = _place(
        tl.program_id(0) % tiles * BLOCK_R, out_sizes, TO, BLOCK_R, BLOCK_K
    )
    dtype: tl.constexpr = tl.float64 if rows[0].dtype.element_ty == tl.float64 else tl.float32
    y = _gather(rows, n, c, h, w, used, span, sizes, FROM, (BLOCK_R, BLOCK_K), dtype)
    if norm[3] is not None:
        y += _parameters(norm, n, c, sizes[2], per_set, dtype)[3]
    tl.store(_pointer(out, n, column, i, j), activate(y, ACT, SLOPE), mask=inside)


@triton.jit
def _halo_statistics_kernel(
    x, partial_ptr, chunks, sizes,
    TO: tl.constexpr, STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    dtype: tl.constexpr = partial_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_R, BLOCK_K), dtype)
    squares = tl.zeros((BLOCK_R, BLOCK_K), dtype)
    for step in range(STEPS):
        i, j, column, c, h, w, inside, used, span = _place(
            (chunk * STEPS + step) * BLOCK_R, sizes, TO, BLOCK_R, BLOCK_K
        )
        value = tl.load(_pointer(x, n, c, h, w), mask=used, other=0.0).to(dtype)
        total += value
        squares += value * value
    _store_partial(partial_ptr, sizes[2], total, squares, BLOCK_K)


@triton.jit
def _store_partial(partial_ptr, C, first, second, BLOCK_K: tl.constexpr):
    c = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    offset = tl.program_id(0).to(tl.int64) * 2 * C + c
    tl.store(partial_ptr + offset, tl.sum(first, axis=0), mask=c < C)
    tl.store(partial_ptr + offset + C, tl.sum(second, axis=0), mask=c < C)


@triton.jit
def _halo_finish_kernel(
    partial_ptr, mean_ptr, rstd_ptr, C, samples, terms, count,
    EPS: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # float64: E[x^2] - E[x]^2 cancels, and these are few numbers
    first = tl.zeros((BLOCK_T, BLOCK_C), tl.float64)
    second = tl.zeros((BLOCK_T, BLOCK_C), tl.float64)
    group = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]  # (1, BLOCK_C)
    for step in range(STEPS):
        term = step * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]  # (BLOCK_T, 1)
        offset = (group * terms + term) * (2 * C) + c
        mask = (term < terms) & (c < C)
        first += tl.load(partial_ptr + offset, mask=mask, other=0.0).to(tl.float64)
        second += tl.load(partial_ptr + offset + C, mask=mask, other=0.0).to(tl.float64)
    mean = tl.sum(first, axis=0, keep_dims=True) / count
    variance = tl.maximum(tl.sum(second, axis=0, keep_dims=True) / count - mean * mean, 0.0)
    n = tl.arange(0, BLOCK_N)[:, None]
    offset = (group * samples + n) * C + c
    mask = (n < samples) & (c < C)
    tl.store(mean_ptr + offset, tl.broadcast_to(mean, (BLOCK_N, BLOCK_C)), mask=mask)
    tl.store(rstd_ptr + offset, tl.broadcast_to(tl.rsqrt(variance + EPS), (BLOCK_N, BLOCK_C)), mask=mask)


@triton.jit
def _before_activation(
    g, z, y, skip, norm, parameters, seed_ptr, n, c, h, w, used, sizes,
    ACT: tl.constexpr, SLOPE: tl.constexpr, DROPOUT: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    # G and xhat
    xhat = tl.zeros_like(g)
    if z is not None:
        xhat = tl.load(_pointer(z, n, c, h, w), mask=used, other=0.0).to(g.dtype)
        if norm[0] is not None:
            xhat = (xhat - parameters[0]) * parameters[1]
    if skip is not None:
        g += tl.load(_pointer(skip, n, c, h, w), mask=used, other=0.0).to(g.dtype)
    if ACT != "none":
        if y is not None:
            u = tl.load(_pointer(y, n, c, h, w), mask=used, other=0.0).to(g.dtype) * (1 - DROPOUT)
        else:
            u = xhat
            if norm[2] is not None:
                u *= parameters[2]
            if norm[3] is not None:
                u += parameters[3]
        g *= activation_slope(u, y is not None, ACT, SLOPE)
    if DROPOUT > 0:
        g = tl.where(_kept(seed_ptr, n, c, h, w, sizes, THRESHOLD), g * (1 / (1 - DROPOUT)), 0.0)
    return g, xhat


@triton.jit
def _halo_reduce_kernel(
    rows, z, y, skip, pre, norm, seed_ptr, partial_ptr, chunks, sizes, out_sizes, per_set,
    FROM: tl.constexpr, TO: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr,
    DROPOUT: tl.constexpr, THRESHOLD: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    dtype: tl.constexpr = partial_ptr.dtype.element_ty
    first = tl.zeros((BLOCK_R, BLOCK_K), dtype)
    second = tl.zeros((BLOCK_R, BLOCK_K), dtype)
    channel = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]  # (1, BLOCK_K)
    parameters = _parameters(norm, n, channel, sizes[2], per_set, dtype)
    for step in range(STEPS):
        i, j, column, c, h, w, inside, used, span = _place(
            (chunk * STEPS + step) * BLOCK_R, out_sizes, TO, BLOCK_R, BLOCK_K
        )
        g = _gather(rows, n, c, h, w, used, span, sizes, FROM, (BLOCK_R, BLOCK_K), dtype)
        g, xhat = _before_activation(
            g, z, y, skip, norm, parameters, seed_ptr, n, c, h, w, used, sizes, ACT, SLOPE, DROPOUT, THRESHOLD
        )
        first += g
        second += g * xhat
        if pre is not None:
            tl.store(_pointer(pre, n, c, h, w), g, mask=used)
    _store_partial(partial_ptr, sizes[2], first, second, BLOCK_K)


@triton.jit
def _halo_gradient_kernel(
    rows, z, y, skip, out, norm, seed_ptr, means_ptr, sizes, out_sizes, per_set,
    FROM: tl.constexpr, TO: tl.constexpr, WEIGHTED: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr,
    DROPOUT: tl.constexpr, THRESHOLD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(out_sizes[3] * out_sizes[4], BLOCK_R)
    n = tl.program_id(0) // tiles
    i, j, column, c, h, w, inside, used, span = _place(
        tl.program_id(0) % tiles * BLOCK_R, out_sizes, TO, BLOCK_R, BLOCK_K
    )
    dtype: tl.constexpr = tl.float64 if rows[0].dtype.element_ty == tl.float64 else tl.float32
    C = sizes[2]
    parameters = _parameters(norm, n, c, C, per_set, dtype)
    g = _gather(rows, n, c, h, w, used, span, sizes, FROM, (BLOCK_R, BLOCK_K), dtype)
    g, xhat = _before_activation(
        g, z, y, skip, norm, parameters, seed_ptr, n, c, h, w, used, sizes, ACT, SLOPE, DROPOUT, THRESHOLD
    )
    if WEIGHTED:
        if norm[2] is not None:
            g *= parameters[2]
    if means_ptr is not None:
        g -= tl.load(means_ptr + n * 2 * C + c, mask=c < C, other=0.0)
        g -= xhat * tl.load(means_ptr + n * 2 * C + C + c, mask=c < C, other=0.0)
    g = g * parameters[1] if WEIGHTED else _scale(g, norm, parameters)
    tl.store(_pointer(out, n, column, i, j), tl.where(used, g, 0.0), mask=inside)
