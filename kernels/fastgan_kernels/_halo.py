"""The passes between convolutions: they move images in and out of a Layout and do the work that is due there.

    write, apply    y = dropout(act((z - mean) * rstd * weight + bias + residual)), into a layout or a tensor
    statistics      sums of x and x^2 of each plane; finish turns such sums into mean and 1 / sqrt(var + eps)
    fold            the transpose of write: each pixel gathers the places that hold it
    reduce          sums of G and G * xhat of each plane, G = g * act' * dropout, g gathered from a layout
    gradient        dz = weight * rstd * (G - mean(G) - xhat * mean(G * xhat)), into another layout

These are functions of tensors without autograd; the ops built on them are differentiable. Images are
NCHW-shaped views of any strides. Sums are partial sums of chunks of pixels, combined in a fixed order, and
gathers have a bounded number of terms: no atomics, bitwise reproducible.
CUDA tensors, or the CPU in Triton's interpreter.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._halo_kernels import (
    _halo_finish_kernel,
    _halo_fold_kernel,
    _halo_gradient_kernel,
    _halo_reduce_kernel,
    _halo_statistics_kernel,
    _halo_write_kernel,
)
from ._layout import Layout, image_layout
from ._pointwise import Pointwise, accumulator, threshold
from ._tune import ceil_div, power_of_two

NOTHING = Pointwise()


class Form(NamedTuple):
    """The part of a Layout that a kernel is compiled for; the sizes are arguments."""

    step: int
    sub_h: int
    sub_w: int
    back: bool
    pitch: int
    mode: str
    # places of the padded axis that hold one pixel, at most
    copies_h: int
    copies_w: int
    # one grid row: kernels then see that pixels lie next to each other
    flat: bool
    # no place lies beyond the padded image
    exact: bool


def write(x: Tensor, layout: Layout, pending: Pointwise = NOTHING, residual: Tensor | None = None) -> Tensor:
    """Does the pending work on x and writes it as the rows of a layout.

    x, residual: (N, C, H, W), any strides. Returns (N * layout.rows, layout.columns) in the dtype of x.
    """
    rows = x.new_empty((len(x) * layout.rows, layout.columns))
    place(x, layout, as_image(rows, layout), pending, residual)
    return rows


def apply(x: Tensor, out: Tensor, pending: Pointwise = NOTHING, residual: Tensor | None = None) -> None:
    """Does the pending work on x and writes it to out, (N, C, H, W) like x, of any strides and dtype."""
    place(x, image_layout(x.shape[2], x.shape[3], x.shape[1]), out, pending, residual)


def place(x: Tensor, layout: Layout, out: Tensor, pending: Pointwise, residual: Tensor | None) -> None:
    """Writes a layout to out, (N, columns, grid_h, grid_w) of any strides."""
    if out.numel() == 0:
        return
    layout = _flatten(layout, x, out, residual)
    block_r, block_k = _tile(len(x), layout, x, out)
    grid = (len(x) * ceil_div(layout.rows, block_r), ceil_div(layout.columns, block_k))
    with torch.cuda.device_of(x):
        _halo_write_kernel[grid](
            _strided(x), _strided(residual), _strided(out), _norm(pending), pending.seed,
            _sizes(layout), _per_set(x, pending), TO=_form(layout), ACT=pending.act, SLOPE=pending.slope,
            DROPOUT=pending.dropout, THRESHOLD=threshold(pending.dropout), BLOCK_R=block_r, BLOCK_K=block_k,
        )  # fmt: skip


def fold(
    rows: Tensor,
    layout: Layout,
    out: Tensor,
    bias: Tensor | None = None,
    act: str = "none",
    slope: float = 0.2,
) -> None:
    """out = act(sum over the places of the layout that hold the pixel + bias).

    rows: (N * layout.rows, layout.columns). out: (N, C, H, W), any strides and dtype. bias: (S, C).
    """
    if out.numel() == 0:
        return
    rows = as_image(rows, layout)
    image = image_layout(layout.height, layout.width, layout.channels)
    if layout == image:
        layout = image = _flatten(image, rows, out)
    block_r, block_k = _tile(len(out), image, rows, out)
    grid = (len(out) * ceil_div(image.rows, block_r), ceil_div(image.columns, block_k))
    with torch.cuda.device_of(out):
        _halo_fold_kernel[grid](
            _strided(rows), _strided(out), (None, None, None, bias), _sizes(layout), _sizes(image),
            1 if bias is None else len(out) // len(bias), FROM=_form(layout), TO=_form(image),
            ACT=act, SLOPE=slope, BLOCK_R=block_r, BLOCK_K=block_k,
        )  # fmt: skip


def statistics(x: Tensor) -> Tensor:
    """Sums of x and of x^2 over chunks of the pixels of (N, C, H, W): (N, chunks, 2, C), accumulator type."""
    image = _flatten(image_layout(x.shape[2], x.shape[3], x.shape[1]), x)
    block_r, block_k = _tile(len(x), image, x)
    chunks, steps = _chunks(len(x), image, block_r, block_k)
    partial = x.new_empty((len(x), chunks, 2, x.shape[1]), dtype=accumulator(x.dtype))
    if partial.numel() == 0:
        return partial
    with torch.cuda.device_of(x):
        _halo_statistics_kernel[(len(x) * chunks, ceil_div(image.columns, block_k))](
            _strided(x), partial, chunks, _sizes(image),
            TO=_form(image), STEPS=steps, BLOCK_R=block_r, BLOCK_K=block_k,
        )  # fmt: skip
    return partial


def finish(partial: Tensor, pixels: int, eps: float, groups: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of each plane, (N, C) each, from (N, chunks, 2, C) sums of x and x^2.

    pixels: of one plane. groups: the statistics are those of all samples of each of so many equal groups
    (batch norm), repeated for its samples. The variance is the biased one.
    """
    n, chunks, _, c = partial.shape
    # two tensors: an op that returns both may not return views of one
    mean, rstd = partial.new_empty((n, c)), partial.new_empty((n, c))
    if mean.numel() == 0:
        return mean, rstd
    samples = 1 if groups is None else n // groups
    block_t = min(512, power_of_two(samples * chunks))
    # 8 channels fill the 32-byte sector of a load
    block_c = min(8, power_of_two(c))
    with torch.cuda.device_of(partial):
        _halo_finish_kernel[(n // samples, ceil_div(c, block_c))](
            partial, mean, rstd, c, samples, samples * chunks, samples * pixels, EPS=eps,
            STEPS=power_of_two(ceil_div(samples * chunks, block_t)), BLOCK_N=power_of_two(samples),
            BLOCK_T=block_t, BLOCK_C=block_c, num_warps=8,
        )  # fmt: skip
    return mean, rstd


def reduce(
    rows: Tensor,
    layout: Layout,
    pending: Pointwise,
    z: Tensor | None = None,
    y: Tensor | None = None,
    skip: Tensor | None = None,
    total: bool | Tensor = False,
) -> tuple[Tensor, Tensor]:
    """Sums of G and of G * xhat over chunks of the pixels of each plane.

    G = g * act' * dropout, where g, the gradient of y, is the fold of rows plus skip, (N, C, H, W) of any
    strides. xhat = (z - mean) * rstd, or z without a norm, or 0 without z. act' is taken from y, the output,
    where it is given (it must be where a residual met the activation), else computed from z.
    total: G is returned too, as a channels_last (N, C, H, W) in the dtype of rows, or written to a given
    tensor of that shape. Returns (N, chunks, 2, C), accumulator type, and G, or an empty tensor.
    """
    n = _samples(rows, layout)
    grid = as_image(rows, layout)
    image = image_layout(layout.height, layout.width, layout.channels)
    shape = (n, image.height, image.width, image.channels)
    pre = total if isinstance(total, Tensor) else None
    if total is True:
        pre = rows.new_empty(shape).permute(0, 3, 1, 2)
    if layout == image:
        layout = image = _flatten(image, grid, z, y, skip, pre)
    block_r, block_k = _tile(n, image, grid)
    chunks, steps = _chunks(n, image, block_r, block_k)
    partial = rows.new_empty((n, chunks, 2, image.channels), dtype=accumulator(rows.dtype))
    if partial.numel():
        with torch.cuda.device_of(rows):
            _halo_reduce_kernel[(n * chunks, ceil_div(image.columns, block_k))](
                _strided(grid), _strided(z), _strided(y), _strided(skip), _strided(pre), _norm(pending),
                pending.seed, partial, chunks, _sizes(layout), _sizes(image), _per_set(grid, pending),
                FROM=_form(layout), TO=_form(image), ACT=pending.act, SLOPE=pending.slope,
                DROPOUT=pending.dropout, THRESHOLD=threshold(pending.dropout),
                STEPS=steps, BLOCK_R=block_r, BLOCK_K=block_k,
            )  # fmt: skip
    return partial, rows.new_empty(0) if pre is None else pre


def gradient(
    rows: Tensor,
    layout: Layout,
    pending: Pointwise,
    target: Layout,
    z: Tensor | None = None,
    y: Tensor | None = None,
    skip: Tensor | None = None,
    means: Tensor | None = None,
) -> Tensor:
    """The gradient of z, weight * rstd * (G - means[:, 0] - xhat * means[:, 1]), as the rows of a layout.

    The other arguments are those of reduce. means: (N, 2, C), the sums of reduce over the number of pixels,
    accumulator type; None: only G * weight * rstd. Returns (N * target.rows, target.columns) like rows.
    """
    out = rows.new_empty((_samples(rows, layout) * target.rows, target.columns))
    gradient_to(rows, layout, pending, target, as_image(out, target), z, y, skip, means)
    return out


def gradient_to(
    rows: Tensor,
    layout: Layout,
    pending: Pointwise,
    target: Layout,
    out: Tensor,
    z: Tensor | None = None,
    y: Tensor | None = None,
    skip: Tensor | None = None,
    means: Tensor | None = None,
    weighted: bool = False,
) -> None:
    """gradient into out, (N, columns, grid_h, grid_w) of any strides.

    weighted: the means are those of weight * G, and out is rstd * (weight * G - means[:, 0] - ...).
    """
    assert target.mode == "zeros", "a mirrored gradient is of no use"
    if out.numel() == 0:
        return
    grid = as_image(rows, layout)
    if layout == target:
        layout = target = _flatten(target, grid, z, y, skip, out)
    block_r, block_k = _tile(len(out), target, grid, out)
    with torch.cuda.device_of(rows):
        _halo_gradient_kernel[(len(out) * ceil_div(target.rows, block_r), ceil_div(target.columns, block_k))](
            _strided(grid), _strided(z), _strided(y), _strided(skip), _strided(out), _norm(pending),
            pending.seed, means, _sizes(layout), _sizes(target), _per_set(grid, pending),
            FROM=_form(layout), TO=_form(target), WEIGHTED=weighted, ACT=pending.act, SLOPE=pending.slope,
            DROPOUT=pending.dropout, THRESHOLD=threshold(pending.dropout), BLOCK_R=block_r, BLOCK_K=block_k,
        )  # fmt: skip


def as_image(rows: Tensor, layout: Layout) -> Tensor:
    """rows as (N, columns, grid_h, grid_w); a tensor that is of that shape already is returned as it is."""
    if rows.dim() == 4:
        return rows
    shape = (_samples(rows, layout), layout.grid_h, layout.grid_w, layout.columns)
    return rows.view(shape).permute(0, 3, 1, 2)


def _samples(rows: Tensor, layout: Layout) -> int:
    return len(rows) if rows.dim() == 4 else len(rows) // layout.rows


def _strided(x: Tensor | None) -> tuple[Any, ...] | None:
    # how a kernel takes an image: the pointer, and the strides of N, C, H and W
    return None if x is None else (x, *x.stride())


def _norm(pending: Pointwise) -> tuple[Tensor | None, ...]:
    return pending.mean, pending.rstd, pending.weight, pending.bias


def _per_set(x: Tensor, pending: Pointwise) -> int:
    parameter = pending.bias if pending.weight is None else pending.weight
    return 1 if parameter is None else len(x) // len(parameter)


def _form(layout: Layout) -> Form:
    after_h = layout.padded_h - layout.height - layout.top
    after_w = layout.padded_w - layout.width - layout.left
    exact = (
        not layout.back
        and layout.step * (layout.grid_h - 1) + layout.sub_h <= layout.padded_h
        and layout.step * (layout.grid_w - 1) + layout.sub_w <= layout.padded_w
    )
    return Form(
        layout.step, layout.sub_h, layout.sub_w, layout.back, layout.pitch, layout.mode,
        _copies(layout.mode, layout.height, layout.top, after_h),
        _copies(layout.mode, layout.width, layout.left, after_w), layout.grid_h == 1, exact,
    )  # fmt: skip


def _copies(mode: str, size: int, before: int, after: int) -> int:
    if mode == "zeros" or before + after == 0:
        return 1
    if mode == "replicate":
        return 1 + before + after
    # a pixel is reflected to both sides only where the two reflected bands overlap
    return 2 if before + after <= size - 2 else 3


def _sizes(layout: Layout) -> tuple[int, ...]:
    return (
        layout.height, layout.width, layout.channels, layout.grid_h, layout.grid_w, layout.columns,
        layout.top, layout.left, layout.padded_h, layout.padded_w,
    )  # fmt: skip


def _flatten(layout: Layout, *tensors: Tensor | None) -> Layout:
    """A plain image as one row of pixels, where all tensors have their rows one after the other."""
    plain = layout == image_layout(layout.height, layout.width, layout.channels)
    if plain and all(t is None or t.stride(2) == t.shape[3] * t.stride(3) for t in tensors):
        return image_layout(1, layout.height * layout.width, layout.channels)
    return layout


def _tile(n: int, layout: Layout, *tensors: Tensor) -> tuple[int, int]:
    """(rows, columns) of a program's tile: up to two 16-byte vectors for each thread of 4 warps."""
    rows, columns = power_of_two(layout.rows), power_of_two(layout.columns)
    elements = 4096 // tensors[0].element_size()
    while elements > 512 and n * rows * columns < 512 * elements:
        elements //= 2
    if all(t.stride(1) != 1 for t in tensors):
        block_r = min(elements, rows)
        return block_r, min(elements // block_r, columns)
    # 64 at most: Triton gives the parameters of 128 channels a layout of their own, and moves the tile there
    block_k = min(64, columns)
    if layout.sub_h * layout.sub_w > 1 and layout.pitch % 16 == 0:
        # a divisor of the pitch: the tile lies in one pixel of the cell
        block_k = min(64, layout.pitch & -layout.pitch)
    return min(elements // block_k, rows), block_k


def _chunks(n: int, image: Layout, block_r: int, block_k: int) -> tuple[int, int]:
    """Programs that share the pixels of a sample, and the tiles that each of them adds up."""
    # about 1024 programs fill every GPU in sight
    chunks = max(1, 1024 // (max(1, n) * ceil_div(image.columns, block_k)))
    steps = power_of_two(max(1, ceil_div(image.rows, chunks * block_r)))
    return ceil_div(image.rows, steps * block_r), steps
