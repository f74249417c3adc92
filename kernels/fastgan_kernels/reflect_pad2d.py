"""Reflection padding of the last two axes, torch's ReflectionPad2d.

    y[n, c, i, j] = x[n, c, m(i - top, H), m(j - left, W)]
    m(i, S) = -i where i < 0, 2 (S - 1) - i where i >= S, else i

Backward is the transpose: each pixel of dx gathers the places it was copied to, at most two per axis (three
where the reflections of both sides overlap), in a fixed order. No atomics, so it is bitwise reproducible.
Second order: the op is linear, so the backward op's own gradient is the forward op; any order works.
Layout: contiguous and channels_last; other strides are first brought to the one they lean to.
"""
# mypy: disable-error-code="no-untyped-def"
# (only the kernels: Triton reads their annotations)

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import layout, require, require_image, runs_kernel, tl, triton
from ._tune import ceil_div, row_tile


def reflect_pad2d(x: Tensor, pad: int | tuple[int, int, int, int]) -> Tensor:
    """Pads the borders of a batch of images with their reflection, the border pixel itself not repeated.

    x: (N, C, H, W), float16, bfloat16, float32 or float64, contiguous or channels_last.
    pad: pixels on every side, or (left, right, top, bottom); 0 <= left, right < W and 0 <= top, bottom < H.
    Returns (N, C, top + H + bottom, left + W + right) in the dtype and layout of x.
    Raises ValueError for another shape or dtype and for a pad that is out of range.
    """
    require_image("reflect_pad2d", x)
    sides = tuple(pad) if isinstance(pad, (tuple, list)) else (pad,) * 4
    height, width = x.shape[2:]
    limits = (width, width, height, height)
    legal = len(sides) == 4 and all(isinstance(s, int) and 0 <= s < limit for s, limit in zip(sides, limits))
    rule = "an int or (left, right, top, bottom) in 0 <= pad < size"
    require(legal, "reflect_pad2d", "pad", f"{rule} of {height}x{width}", pad)
    if runs_kernel(x):
        return torch.ops.fastgan.reflect_pad2d.default(x, sides)
    return reference(x, sides)


def reference(x: Tensor, pad: tuple[int, ...]) -> Tensor:
    # autocast would turn a bfloat16 copy into three float32 passes
    with torch.autocast("cpu", enabled=False):
        return F.pad(x, pad, mode="reflect")


def reference_backward(dy: Tensor, pad: tuple[int, ...]) -> Tensor:
    left, right, top, bottom = pad
    height, width = dy.shape[2] - top - bottom, dy.shape[3] - left - right
    g = dy if dy.dtype == torch.float64 else dy.float()
    rows = g[:, :, top : top + height].clone()
    rows[:, :, 1 : top + 1] += g[:, :, :top].flip(2)
    rows[:, :, height - 1 - bottom : height - 1] += g[:, :, top + height :].flip(2)
    dx = rows[..., left : left + width].clone()
    dx[..., 1 : left + 1] += rows[..., :left].flip(3)
    dx[..., width - 1 - right : width - 1] += rows[..., left + width :].flip(3)
    return dx.to(dy.dtype)


@triton.jit
def _reflect(i, size):
    i = tl.where(i < 0, -i, i)
    return tl.where(i >= size, 2 * (size - 1) - i, i)


@triton.jit
def _reflect_pad2d_fwd_kernel(
    x_ptr, y_ptr, rows, H, W, Ho, Wo, top, left,
    INNER: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    # a row is an image row of one plane (contiguous, INNER = 1) or of all channels (channels_last, INNER = C)
    row = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]  # (BLOCK_H, 1)
    column = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]  # (1, BLOCK_W)
    mask = (row < rows) & (column < Wo * INNER)
    x_row = (row // Ho).to(tl.int64) * H + _reflect(row % Ho - top, H)
    x_column = _reflect(column // INNER - left, W) * INNER + column % INNER
    x = tl.load(x_ptr + x_row * (W * INNER) + x_column, mask=mask)
    tl.store(y_ptr + row.to(tl.int64) * (Wo * INNER) + column, x, mask=mask)


@triton.jit
def _copy_of(i, size, before, after, term: tl.constexpr, TERMS: tl.constexpr):
    # where the padded axis holds copy number `term` of position i, and whether it holds one
    if term == 0:
        return i + before, i < size
    low = (i >= 1) & (i <= before)
    high = (i >= size - 1 - after) & (i < size - 1)
    if TERMS == 2:
        return before + tl.where(low, -i, 2 * (size - 1) - i), low | high
    if term == 1:
        return before - i, low
    return before + 2 * (size - 1) - i, high


@triton.jit
def _reflect_pad2d_bwd_kernel(
    dy_ptr, dx_ptr, rows, H, W, Ho, Wo, top, bottom, left, right,
    INNER: tl.constexpr, TERMS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]  # (BLOCK_H, 1)
    column = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]  # (1, BLOCK_W)
    mask = (row < rows) & (column < W * INNER)
    plane = (row // H).to(tl.int64) * Ho
    accumulator = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    dx = tl.zeros((BLOCK_H, BLOCK_W), accumulator)
    for i in tl.static_range(TERMS):
        h, in_h = _copy_of(row % H, H, top, bottom, i, TERMS)
        for j in tl.static_range(TERMS):
            w, in_w = _copy_of(column // INNER, W, left, right, j, TERMS)
            offset = (plane + h) * (Wo * INNER) + w * INNER + column % INNER
            dx += tl.load(dy_ptr + offset, mask=mask & in_h & in_w, other=0.0).to(accumulator)
    tl.store(dx_ptr + row.to(tl.int64) * (W * INNER) + column, dx, mask=mask)


@torch.library.custom_op("fastgan::reflect_pad2d", mutates_args=())
def _forward(x: Tensor, pad: list[int]) -> Tensor:
    if not runs_kernel(x):
        return reference(x, tuple(pad)).contiguous(memory_format=layout(x))
    y = _forward_fake(x, pad)
    if y.numel() == 0:
        return y
    x = x.contiguous(memory_format=layout(x))
    left, _, top, _ = pad
    n, c, height, width = x.shape
    planes, inner = (n, c) if layout(x) == torch.channels_last else (n * c, 1)
    rows = planes * y.shape[2]
    block_h, block_w = row_tile(y.shape[3] * inner)
    grid = (ceil_div(rows, block_h), ceil_div(y.shape[3] * inner, block_w))
    with torch.cuda.device_of(x):
        _reflect_pad2d_fwd_kernel[grid](
            x, y, rows, height, width, y.shape[2], y.shape[3], top, left,
            INNER=inner, BLOCK_H=block_h, BLOCK_W=block_w,
        )  # fmt: skip
    return y


@torch.library.custom_op("fastgan::reflect_pad2d_backward", mutates_args=())
def _backward(dy: Tensor, pad: list[int]) -> Tensor:
    if not runs_kernel(dy):
        return reference_backward(dy, tuple(pad)).contiguous(memory_format=layout(dy))
    dx = _backward_fake(dy, pad)
    if dx.numel() == 0:
        return dx
    dy = dy.contiguous(memory_format=layout(dy))
    left, right, top, bottom = pad
    n, c, height, width = dx.shape
    planes, inner = (n, c) if layout(dy) == torch.channels_last else (n * c, 1)
    rows = planes * height
    # a pixel is copied to both sides only where the two reflected bands overlap
    terms = 2 if left + right <= width - 2 and top + bottom <= height - 2 else 3
    block_h, block_w = row_tile(width * inner)
    grid = (ceil_div(rows, block_h), ceil_div(width * inner, block_w))
    with torch.cuda.device_of(dy):
        _reflect_pad2d_bwd_kernel[grid](
            dy, dx, rows, height, width, dy.shape[2], dy.shape[3], top, bottom, left, right,
            INNER=inner, TERMS=terms, BLOCK_H=block_h, BLOCK_W=block_w,
        )  # fmt: skip
    return dx


@_forward.register_fake
def _forward_fake(x: Tensor, pad: list[int]) -> Tensor:
    left, right, top, bottom = pad
    n, c, height, width = x.shape
    size = (n, c, top + height + bottom, left + width + right)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout(x))


@_backward.register_fake
def _backward_fake(dy: Tensor, pad: list[int]) -> Tensor:
    left, right, top, bottom = pad
    n, c, height, width = dy.shape
    size = (n, c, height - top - bottom, width - left - right)
    return torch.empty(size, dtype=dy.dtype, device=dy.device, memory_format=layout(dy))


def _setup_context(ctx: Any, inputs: tuple[Tensor, list[int]], output: Tensor) -> None:
    x, ctx.pad = inputs
    ctx.layout = layout(x)


def _forward_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    # dy may arrive in another layout (a broadcast scalar, say); dx takes the one it is given
    dy = dy.contiguous(memory_format=ctx.layout)
    return torch.ops.fastgan.reflect_pad2d_backward.default(dy, ctx.pad), None


def _backward_gradient(ctx: Any, ddx: Tensor) -> tuple[Tensor, None]:
    ddx = ddx.contiguous(memory_format=ctx.layout)
    return torch.ops.fastgan.reflect_pad2d.default(ddx, ctx.pad), None


_forward.register_autograd(_forward_gradient, setup_context=_setup_context)
_backward.register_autograd(_backward_gradient, setup_context=_setup_context)
