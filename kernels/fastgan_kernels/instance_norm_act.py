"""Instance norm, affine map, residual, activation and dropout in one op, with padding or concatenation.

    y = dropout(act(xhat * weight + bias + residual)),  xhat = (x - mean) * rstd,  rstd = 1 / sqrt(var + eps)

mean and var (biased) are those of each (n, c) plane. One pixel per plane is legal and gives xhat = 0, so
y = act(bias + residual), where torch's F.instance_norm raises.

Backward: g = dy * dropout * act'(z), S1 = mean(g), S2 = mean(g * xhat), then
    dx = weight * rstd * (g - S1 - xhat * S2),  dweight = sum(g * xhat),  dbias = sum(g),  dresidual = g.
Saved: x, mean, rstd, weight and bias, from which z is recomputed; where a residual meets an activation, y as
well, whose sign is that of z (and, with tanh, the residual, for the second order).
Second order: the backward op's own gradient is a composite of torch functions (automatic); any order works.
The reference in channels_last is torch's batch norm, which is wrong from the third order on (pytorch#186256).
Layout: contiguous and channels_last; other strides are first brought to the one they lean to.

A plane that fits in one program is read once; a larger one is reduced in chunks. With tanh, dropout, padding
or concatenation, the statistics are a pass of their own (_norm), and the next writes y to its place (_halo).
No atomics, bitwise reproducible.
"""
# mypy: disable-error-code="no-untyped-def"
# (only the kernels: Triton reads their annotations)

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _norm, _norm_reference
from ._norm import Options, tile_of, tile_place
from ._op import layout, runs_kernel, tl, triton
from ._pointwise import accumulator, activate
from ._pointwise import dropout as drop
from ._tune import ceil_div


def instance_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    act: str = "none",
    slope: float = 0.2,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    pad: int = 0,
    padding_mode: str = "zeros",
    concat: Tensor | None = None,
) -> Tensor:
    """Normalises each plane of x, applies weight and bias, adds a residual, applies activation and dropout.

    x: (N, C, H, W), float16, bfloat16, float32 or float64, contiguous or channels_last; N may be 0, H * W 1.
    weight, bias: (C,), or (S, C), a row for each of S equal groups of samples; cast to the dtype of x.
    residual: (N, C, H, W), cast to the dtype of x and brought to its layout.
    eps: added to the variance, > 0. act: "none", "relu", "leaky_relu" or "tanh". slope: of leaky_relu, >= 0.
    dropout: probability, with torch's scaling by 1 / (1 - p). seed: (1,) int64 on the device of x, which
        decides the mask; None draws one from torch's generator.
    pad: y gets so many pixels on every side. padding_mode: "zeros", "reflect" or "replicate".
    concat: (N, C2, H, W), cast to the dtype of x: y comes behind it, in (N, C2 + C, H, W); not with pad.
    Returns y in the dtype and layout of x. Statistics are float32, float64 for float64 x.
    Raises ValueError for another shape, dtype, device or option.
    """
    options = Options(eps, act, slope, dropout, pad, padding_mode)
    _norm.check("instance_norm_act", x, {"weight": weight, "bias": bias}, residual, seed, concat, options)
    # autocast does not reach inside an op
    weight, bias, residual, concat = _norm.cast(x, weight, bias, residual, concat)
    arguments = (x, weight, bias, residual, *options, _norm.draw(x, seed, dropout), concat)
    if runs_kernel(x):
        return torch.ops.fastgan.instance_norm_act.default(*arguments)[0]
    return reference(*arguments)


def reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str,
    slope: float,
    dropout: float = 0.0,
    pad: int = 0,
    padding_mode: str = "zeros",
    seed: Tensor | None = None,
    concat: Tensor | None = None,
) -> Tensor:
    parts = _norm.by_set(x, _norm.sets_of(weight, bias), (weight, bias), partial(_reference_norm, eps=eps))
    # z is fresh, and the functions that made it saved their input
    z = parts[0] if len(parts) == 1 else torch.cat(parts)
    if residual is not None:
        z = z.add_(residual)
    if act == "relu":
        z = F.relu(z, inplace=True)
    elif act == "leaky_relu":
        z = F.leaky_relu(z, slope, inplace=True)
    elif act == "tanh":
        z = z.tanh_()
    if seed is not None:
        z = drop(z, dropout, seed)
    return _norm.extend(z, concat, pad, padding_mode)


def _reference_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float) -> Tensor:
    c = x.shape[1]
    # on the CPU, parameters in a half type would make torch keep half-precision statistics for backward
    dtype = torch.float32 if x.is_cpu and x.dtype != torch.float64 else x.dtype
    w = x.new_ones(c, dtype=dtype) if weight is None else weight.to(dtype)
    b = x.new_zeros(c, dtype=dtype) if bias is None else bias.to(dtype)
    if x.shape[2:] == (1, 1):
        # xhat is 0; torch would subtract two large numbers, as rstd is 1 / sqrt(eps)
        y = (x - x) * w.view(1, -1, 1, 1) + b.view(1, -1, 1, 1)
        return y.to(x.dtype)
    if layout(x) == torch.contiguous_format:
        return torch.group_norm(x.contiguous(), c, w, b, eps)
    x = x.contiguous(memory_format=torch.channels_last)
    # torch's channels_last group norm takes the variance as E[x^2] - E[x]^2 (1 % off at |mean| = 100 std) and
    # its F.instance_norm loses the layout. Time over that of F.instance_norm, one CPU thread, ReLU, fwd +
    # bwd, (4, 256, 64, 64): contiguous 1/2.7 (float32) and 1/1.1 (bfloat16), channels_last 1/6 for both
    parts = x.split(1) if len(x) > 1 else [x]  # a split of one would still copy its gradient
    given: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(parts)
    if not torch.is_grad_enabled():
        # batch norm adds all pixels up one by one: 2e-3 off at 384x384 pixels of a photograph, in float32
        given = [_statistics(part) for part in parts]
    samples = [
        torch.batch_norm(part, w, b, mean, var, mean is None, 0.0, eps, False)
        for part, (mean, var) in zip(parts, given)
    ]
    return samples[0] if len(samples) == 1 else torch.cat(samples)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of (1, C, H, W), row by row first."""
    rows = x[0].permute(1, 2, 0).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    pixels = rows.shape[0] * rows.shape[1]
    mean = rows.sum(1).sum(0) / pixels
    return mean, (rows - mean).square_().sum(1).sum(0) / pixels


@triton.jit
def _affine(xhat, weight_ptr, bias_ptr, row, c, c_mask):
    z = xhat
    if weight_ptr is not None:
        z *= tl.load(weight_ptr + row + c, mask=c_mask, other=0.0).to(xhat.dtype)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + row + c, mask=c_mask, other=0.0).to(xhat.dtype)
    return z


@triton.jit
def _instance_norm_act_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, mean_ptr, rstd_ptr, C, HW, per_set,
    EPS: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    # WHOLE: the tile holds all pixels, so that the statistics are taken here; otherwise they are read
    accumulator = mean_ptr.dtype.element_ty
    n, c, offset, c_mask, mask = tile_place(
        C, HW, tl.program_id(1) * BLOCK_P, CHANNELS_LAST, BLOCK_C, BLOCK_P
    )
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(accumulator)
    if WHOLE:
        mean = tl.sum(x, axis=1, keep_dims=True) / HW
        centred = tl.where(mask, x - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / HW + EPS)
        tl.store(mean_ptr + n * C + c, mean, mask=c_mask)
        tl.store(rstd_ptr + n * C + c, rstd, mask=c_mask)
    else:
        centred = x - tl.load(mean_ptr + n * C + c, mask=c_mask, other=0.0)
        rstd = tl.load(rstd_ptr + n * C + c, mask=c_mask, other=0.0)
    z = _affine(centred * rstd, weight_ptr, bias_ptr, n // per_set * C, c, c_mask)
    if residual_ptr is not None:
        z += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(accumulator)
    tl.store(y_ptr + offset, activate(z, ACT, SLOPE), mask=mask)


@triton.jit
def _gradient(
    dy_ptr, x_ptr, y_ptr, weight_ptr, bias_ptr, row, offset, mask, c, c_mask, mean, rstd,
    ACT: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    # g and xhat of a tile; outside the mask g is 0 and xhat is not
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(mean.dtype)
    g = tl.load(dy_ptr + offset, mask=mask, other=0.0).to(mean.dtype)
    xhat = (x - mean) * rstd
    if ACT != "none":
        if y_ptr is not None:
            z = tl.load(y_ptr + offset, mask=mask, other=0.0).to(mean.dtype)
        else:
            z = _affine(xhat, weight_ptr, bias_ptr, row, c, c_mask)
        if ACT == "relu":
            g = tl.where(z <= 0, 0.0, g)
        else:
            g = tl.where(z > 0, g, g * SLOPE)
    return g, xhat


@triton.jit
def _instance_norm_act_bwd_kernel(
    dy_ptr, x_ptr, y_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dresidual_ptr, sum_g_ptr, sum_gx_ptr, C, HW, per_set,
    ACT: tl.constexpr, SLOPE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, c, offset, c_mask, mask = tile_place(
        C, HW, tl.program_id(1) * BLOCK_P, CHANNELS_LAST, BLOCK_C, BLOCK_P
    )
    plane, row = n * C + c, n // per_set * C
    mean = tl.load(mean_ptr + plane, mask=c_mask, other=0.0)
    rstd = tl.load(rstd_ptr + plane, mask=c_mask, other=0.0)
    g, xhat = _gradient(
        dy_ptr, x_ptr, y_ptr, weight_ptr, bias_ptr, row, offset, mask, c, c_mask, mean, rstd, ACT, SLOPE
    )  # fmt: skip
    if WHOLE:
        sum_g = tl.sum(g, axis=1, keep_dims=True)
        sum_gx = tl.sum(g * xhat, axis=1, keep_dims=True)
        tl.store(sum_g_ptr + plane, sum_g, mask=c_mask)
        tl.store(sum_gx_ptr + plane, sum_gx, mask=c_mask)
    else:
        sum_g = tl.load(sum_g_ptr + plane, mask=c_mask, other=0.0)
        sum_gx = tl.load(sum_gx_ptr + plane, mask=c_mask, other=0.0)
    rstd = _affine(rstd, weight_ptr, None, row, c, c_mask)
    tl.store(dx_ptr + offset, (g - sum_g / HW - xhat * (sum_gx / HW)) * rstd, mask=mask)
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + offset, g, mask=mask)


@triton.jit
def _instance_norm_act_bwd_partial_kernel(
    dy_ptr, x_ptr, y_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, sum_g_ptr, sum_gx_ptr,
    C, HW, per_set, chunks,
    ACT: tl.constexpr, SLOPE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(1)
    n, c, offset, c_mask, mask = tile_place(C, HW, 0, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    plane, row = n * C + c, n // per_set * C
    mean = tl.load(mean_ptr + plane, mask=c_mask, other=0.0)
    rstd = tl.load(rstd_ptr + plane, mask=c_mask, other=0.0)
    sum_g = tl.zeros((BLOCK_C, BLOCK_P), mean.dtype)
    sum_gx = tl.zeros((BLOCK_C, BLOCK_P), mean.dtype)
    for step in range(STEPS):
        first = (chunk * STEPS + step) * BLOCK_P
        n, c, offset, c_mask, mask = tile_place(C, HW, first, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        g, xhat = _gradient(
            dy_ptr, x_ptr, y_ptr, weight_ptr, bias_ptr, row, offset, mask, c, c_mask, mean, rstd, ACT, SLOPE
        )  # fmt: skip
        sum_g += g
        sum_gx += g * xhat
    offset = plane.to(tl.int64) * chunks + chunk
    tl.store(sum_g_ptr + offset, tl.sum(sum_g, axis=1, keep_dims=True), mask=c_mask)
    tl.store(sum_gx_ptr + offset, tl.sum(sum_gx, axis=1, keep_dims=True), mask=c_mask)


@torch.library.custom_op("fastgan::instance_norm_act", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str,
    slope: float,
    dropout: float = 0.0,
    pad: int = 0,
    padding_mode: str = "zeros",
    seed: Tensor | None = None,
    concat: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(eps, act, slope, dropout, pad, padding_mode)
    if not runs_kernel(x):
        y = reference(x, weight, bias, residual, *options, seed, concat)
        mean = x.to(accumulator(x.dtype)).mean((2, 3))
        variance = (x - mean[:, :, None, None]).square().mean((2, 3))
        return y.contiguous(memory_format=layout(x)), mean, (variance + eps).rsqrt()
    y, mean, rstd = _forward_fake(x, weight, bias, residual, *options, seed, concat)
    if mean.numel() == 0:
        return y, mean, rstd
    x = x.contiguous(memory_format=layout(x))
    n, c, pixels, tile, shape = tile_of(x)
    apart = _apart(options) or concat is not None
    if tile.chunks or apart:
        mean, rstd = _norm.moments(x, eps)
    if apart:
        return _norm.forward_passes(x, mean, rstd, weight, bias, residual, seed, concat, options), mean, rstd
    residual = None if residual is None else residual.contiguous(memory_format=layout(x))
    with torch.cuda.device_of(x):
        _instance_norm_act_fwd_kernel[(n * ceil_div(c, tile.block_c), ceil_div(pixels, tile.block_p))](
            x, weight, bias, residual, y, mean, rstd, c, pixels, n // _norm.sets_of(weight, bias),
            EPS=eps, ACT=act, SLOPE=slope, WHOLE=not tile.chunks, **shape,
        )  # fmt: skip
    return y, mean, rstd


@torch.library.custom_op("fastgan::instance_norm_act_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    eps: float,
    act: str,
    slope: float,
    dropout: float = 0.0,
    pad: int = 0,
    padding_mode: str = "zeros",
    seed: Tensor | None = None,
    residual: Tensor | None = None,
    needs_residual: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = Options(eps, act, slope, dropout, pad, padding_mode)
    dx, dweight, dbias, dresidual = _backward_fake(
        dy, x, mean, rstd, weight, bias, y, *options, seed, residual, needs_residual
    )
    if not runs_kernel(x):
        shift = _norm.stand_in(x, residual, needs_residual)
        found = _norm_reference.reference_backward(dy, x, weight, bias, shift, y, seed, None, options)
        return _norm.fill((dx, dweight, dbias, dresidual), found)
    if dx.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_(), dresidual
    x = x.contiguous(memory_format=layout(x))
    if _apart(options) or not dy.is_contiguous(memory_format=layout(x)):
        sums = _norm.backward_passes(dy, x, mean, rstd, weight, bias, y, seed, None, options, dx, dresidual)
        return dx, *_norm.of_parameters(sums, weight, bias, x), dresidual
    y = None if y is None else y.contiguous(memory_format=layout(x))
    n, c, pixels, tile, shape = tile_of(x)
    blocks = n * ceil_div(c, tile.block_c)
    sums = mean.new_empty((2, n, c))
    inputs = (dy, x, y, weight, bias, mean, rstd)
    sizes = (c, pixels, n // _norm.sets_of(weight, bias))
    switches = {"ACT": act, "SLOPE": slope}
    with torch.cuda.device_of(x):
        if tile.chunks:
            sums_of_chunks = mean.new_empty((2, n, c, tile.chunks))
            _instance_norm_act_bwd_partial_kernel[(blocks, tile.chunks)](
                *inputs, *sums_of_chunks, *sizes, tile.chunks, STEPS=tile.steps, **switches, **shape
            )
            sums = sums_of_chunks.sum(-1)
        _instance_norm_act_bwd_kernel[(blocks, ceil_div(pixels, tile.block_p))](
            *inputs, dx, dresidual if needs_residual else None, *sums, *sizes,
            WHOLE=not tile.chunks, **switches, **shape,
        )  # fmt: skip
    return dx, *_norm.of_parameters(sums.transpose(0, 1), weight, bias, x), dresidual


def _apart(options: Options) -> bool:
    # tanh would spill registers in a program that holds a whole plane
    return options.pad > 0 or options.dropout > 0 or options.act == "tanh"


@_forward.register_fake
def _forward_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str,
    slope: float,
    dropout: float = 0.0,
    pad: int = 0,
    padding_mode: str = "zeros",
    seed: Tensor | None = None,
    concat: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[:2], dtype=accumulator(x.dtype))
    return _norm.new_output(x, concat, pad), mean, torch.empty_like(mean)


@_backward.register_fake
def _backward_fake(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    eps: float,
    act: str,
    slope: float,
    dropout: float = 0.0,
    pad: int = 0,
    padding_mode: str = "zeros",
    seed: Tensor | None = None,
    residual: Tensor | None = None,
    needs_residual: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _norm.new_gradients(x, weight, bias, needs_residual)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, residual, *options, seed, concat = inputs
    ctx.options = Options(*options)
    _norm.save(ctx, x, weight, bias, residual, seed, concat, *output)


def _forward_gradient(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
    x, mean, rstd, weight, bias, y, seed, residual = ctx.saved_tensors
    own, y, dconcat, needs_residual = _norm.before_backward(ctx, dy, x, y)
    backward = torch.ops.fastgan.instance_norm_act_backward.default
    dx, dweight, dbias, dresidual = backward(
        own, x, mean, rstd, weight, bias, y, *ctx.options, seed, residual, needs_residual
    )
    grads = _norm.after_backward(ctx, own, weight, bias, (dx, dweight, dbias, dresidual))
    return *grads, *[None] * len(ctx.options), None, dconcat


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, x, _, _, weight, bias, y, *options, seed, residual, ctx.needs_residual = inputs
    ctx.options = Options(*options)
    ctx.save_for_backward(dy, x, weight, bias, residual, y, seed)


def _backward_gradient(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    dy, x, weight, bias, residual, y, seed = ctx.saved_tensors
    # the statistics are functions of x, differentiated in ddx
    given = (dy, x, weight, bias, _norm.stand_in(x, residual, ctx.needs_residual))
    ddy, ddx, ddweight, ddbias, ddresidual = _norm_reference.second_order(
        given, grads, (y, seed, None, ctx.options)
    )
    ddresidual = None if residual is None else ddresidual
    return ddy, ddx, None, None, ddweight, ddbias, None, *[None] * len(ctx.options), None, ddresidual, None


_forward.register_autograd(_forward_gradient, setup_context=_setup_context)
_backward.register_autograd(_backward_gradient, setup_context=_setup_backward_context)
