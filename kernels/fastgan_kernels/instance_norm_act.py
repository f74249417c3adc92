"""Instance normalisation, affine map, residual and activation in one op.

    y = act(xhat * weight + bias + residual),   xhat = (x - mean) * rstd,   rstd = 1 / sqrt(var + eps)

mean and var (biased) are those of each (n, c) plane. One pixel per plane is legal and gives xhat = 0, so
y = act(bias + residual), where torch's F.instance_norm raises.

Backward: g = dy * act'(z), S1 = mean(g), S2 = mean(g * xhat), then
    dx = weight * rstd * (g - S1 - xhat * S2),  dweight = sum(g * xhat),  dbias = sum(g),  dresidual = g.
Saved: x, mean, rstd, weight and bias, from which the sign of z is recomputed; where a residual meets an
activation, y as well, whose sign is that of z.
Second order: the backward op's own gradient is a composite of torch functions (automatic); any order works.
The reference in channels_last is torch's batch norm, which is wrong from the third order on (pytorch#186256).
Layout: contiguous and channels_last; other strides are first brought to the one they lean to.

A plane that fits in one program is read once. A larger one is reduced in chunks, each to its mean and its sum
of squared deviations, which are combined in a fixed order (Chan, Golub and LeVeque 1983): no atomics, bitwise
reproducible.
"""
# mypy: disable-error-code="no-untyped-def"
# (only the kernels: Triton reads their annotations)

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import layout, require, require_image, runs_kernel, tl, triton
from ._tune import PlaneTile, ceil_div, plane_tile, power_of_two

ACTIVATIONS = ("none", "relu", "leaky_relu")


def instance_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    act: str = "none",
    slope: float = 0.2,
) -> Tensor:
    """Normalises each plane of x, applies weight and bias, adds a residual and applies an activation.

    x: (N, C, H, W), float16, bfloat16, float32 or float64, contiguous or channels_last; N may be 0, H * W 1.
    weight, bias: (C,), cast to the dtype of x.
    residual: (N, C, H, W), cast to the dtype of x and brought to its layout.
    eps: added to the variance, > 0. act: "none", "relu" or "leaky_relu". slope: of leaky_relu below 0, >= 0.
    Returns y in the shape, dtype and layout of x. Statistics are float32, float64 for float64 x.
    Raises ValueError for another shape, dtype, device or option.
    """
    op = "instance_norm_act"
    require_image(op, x)
    require(x.shape[2] * x.shape[3] > 0, op, "x", "at least one pixel", f"shape {tuple(x.shape)}")
    for name, shape, value in (
        ("weight", x.shape[1:2], weight),
        ("bias", x.shape[1:2], bias),
        ("residual", x.shape, residual),
    ):
        if value is not None:
            require(value.shape == shape, op, name, f"of shape {tuple(shape)}", tuple(value.shape))
            require(value.device == x.device, op, name, f"on {x.device}", value.device)
    require(eps > 0, op, "eps", "> 0", eps)
    require(act in ACTIVATIONS, op, "act", f"one of {', '.join(ACTIVATIONS)}", repr(act))
    require(slope >= 0, op, "slope", ">= 0", slope)
    # autocast does not reach inside an op
    weight = None if weight is None else weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    residual = None if residual is None else residual.to(x.dtype)
    if runs_kernel(x):
        return torch.ops.fastgan.instance_norm_act.default(x, weight, bias, residual, eps, act, slope)[0]
    return reference(x, weight, bias, residual, eps, act, slope)


def reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str,
    slope: float,
) -> Tensor:
    z = _reference_norm(x, weight, bias, eps)
    # z is fresh, and the functions that made it saved their input
    if residual is not None:
        z = z.add_(residual)
    if act == "relu":
        z = F.relu(z, inplace=True)
    elif act == "leaky_relu":
        z = F.leaky_relu(z, slope, inplace=True)
    return z


def _reference_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
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
    samples = [torch.batch_norm(s, w, b, None, None, True, 0.0, eps, False) for s in parts]
    return samples[0] if len(samples) == 1 else torch.cat(samples)


def reference_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    eps: float,
    act: str,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias, dresidual, written so that torch can differentiate it again."""
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    g, x32 = dy.to(accumulator), x.to(accumulator)
    w = x32.new_ones(x.shape[1]) if weight is None else weight.to(accumulator)
    w = w.view(1, -1, 1, 1)
    centred = x32 - x32.mean((2, 3), keepdim=True)
    rstd = (centred.square().mean((2, 3), keepdim=True) + eps).rsqrt()
    xhat = centred * rstd
    if act != "none":
        z = xhat * w if y is None else y
        if y is None and bias is not None:
            z = z + bias.to(accumulator).view(1, -1, 1, 1)
        g = torch.where(z.detach() > 0, g, g * (slope if act == "leaky_relu" else 0.0))
    s1 = g.mean((2, 3), keepdim=True)
    s2 = (g * xhat).mean((2, 3), keepdim=True)
    dx = (g - s1 - xhat * s2) * rstd * w
    return dx.to(x.dtype), (g * xhat).sum((0, 2, 3)).to(x.dtype), g.sum((0, 2, 3)).to(x.dtype), g.to(x.dtype)


@triton.jit
def _tile(C, HW, first_pixel, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    # axis 0 of the grid counts the blocks of channels of all samples; the tile is the same in either layout
    blocks = tl.cdiv(C, BLOCK_C)
    n = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]  # (BLOCK_C, 1)
    p = first_pixel + tl.arange(0, BLOCK_P)[None, :]  # (1, BLOCK_P)
    sample = n.to(tl.int64) * C * HW
    if CHANNELS_LAST:
        offset = sample + p.to(tl.int64) * C + c
    else:
        offset = sample + c.to(tl.int64) * HW + p
    return n * C + c, c, offset, c < C, (c < C) & (p < HW)


@triton.jit
def _affine(xhat, weight_ptr, bias_ptr, c, c_mask):
    z = xhat
    if weight_ptr is not None:
        z *= tl.load(weight_ptr + c, mask=c_mask, other=0.0).to(xhat.dtype)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + c, mask=c_mask, other=0.0).to(xhat.dtype)
    return z


@triton.jit
def _instance_norm_act_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, mean_ptr, rstd_ptr, C, HW,
    EPS: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    # WHOLE: the tile holds all pixels, so that the statistics are taken here; otherwise they are read
    accumulator = mean_ptr.dtype.element_ty
    plane, c, offset, c_mask, mask = _tile(C, HW, tl.program_id(1) * BLOCK_P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(accumulator)
    if WHOLE:
        mean = tl.sum(x, axis=1, keep_dims=True) / HW
        centred = tl.where(mask, x - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / HW + EPS)
        tl.store(mean_ptr + plane, mean, mask=c_mask)
        tl.store(rstd_ptr + plane, rstd, mask=c_mask)
    else:
        centred = x - tl.load(mean_ptr + plane, mask=c_mask, other=0.0)
        rstd = tl.load(rstd_ptr + plane, mask=c_mask, other=0.0)
    z = _affine(centred * rstd, weight_ptr, bias_ptr, c, c_mask)
    if residual_ptr is not None:
        z += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(accumulator)
    # written so that a NaN stays a NaN
    if ACT == "relu":
        z = tl.where(z <= 0, 0.0, z)
    elif ACT == "leaky_relu":
        z = tl.where(z > 0, z, z * SLOPE)
    tl.store(y_ptr + offset, z, mask=mask)


@triton.jit
def _instance_norm_act_fwd_partial_kernel(
    x_ptr, mean_ptr, m2_ptr, C, HW, chunks,
    CHANNELS_LAST: tl.constexpr, STEPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    accumulator = mean_ptr.dtype.element_ty
    chunk = tl.program_id(1)
    # each element of the tile keeps a running mean and squared deviation of its own: one reduction at the end
    mean = tl.zeros((BLOCK_C, BLOCK_P), accumulator)
    m2 = tl.zeros((BLOCK_C, BLOCK_P), accumulator)
    count = tl.zeros((BLOCK_C, BLOCK_P), accumulator)
    seen = tl.zeros((1, 1), accumulator)
    plane, c, offset, c_mask, mask = _tile(C, HW, 0, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    for step in range(STEPS):
        first = (chunk * STEPS + step) * BLOCK_P
        plane, c, offset, c_mask, mask = _tile(C, HW, first, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(accumulator)
        seen += 1.0
        delta = x - mean
        mean += tl.where(mask, delta * (1.0 / seen), 0.0)
        m2 += tl.where(mask, delta * (x - mean), 0.0)
        count += tl.where(mask, 1.0, 0.0)
    total = tl.minimum(HW - chunk * STEPS * BLOCK_P, STEPS * BLOCK_P)
    chunk_mean = tl.sum(mean * count, axis=1, keep_dims=True) / total
    spread = mean - chunk_mean
    chunk_m2 = tl.sum(m2 + count * spread * spread, axis=1, keep_dims=True)
    tl.store(mean_ptr + plane.to(tl.int64) * chunks + chunk, chunk_mean, mask=c_mask)
    tl.store(m2_ptr + plane.to(tl.int64) * chunks + chunk, chunk_m2, mask=c_mask)


@triton.jit
def _instance_norm_act_fwd_combine_kernel(
    chunk_mean_ptr, chunk_m2_ptr, mean_ptr, rstd_ptr, HW, chunks, chunk_pixels,
    EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0)
    chunk = tl.arange(0, BLOCK)
    offset = plane.to(tl.int64) * chunks + chunk
    mask = chunk < chunks
    chunk_mean = tl.load(chunk_mean_ptr + offset, mask=mask, other=0.0)
    chunk_m2 = tl.load(chunk_m2_ptr + offset, mask=mask, other=0.0)
    count = tl.where(mask, tl.minimum(HW - chunk * chunk_pixels, chunk_pixels), 0).to(chunk_mean.dtype)
    mean = tl.sum(chunk_mean * count, axis=0) / HW
    spread = chunk_mean - mean
    m2 = tl.sum(chunk_m2 + count * spread * spread, axis=0)
    tl.store(mean_ptr + plane, mean)
    tl.store(rstd_ptr + plane, tl.rsqrt(m2 / HW + EPS))


@triton.jit
def _gradient(
    dy_ptr, x_ptr, y_ptr, weight_ptr, bias_ptr, offset, mask, c, c_mask, mean, rstd,
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
            z = _affine(xhat, weight_ptr, bias_ptr, c, c_mask)
        if ACT == "relu":
            g = tl.where(z <= 0, 0.0, g)
        else:
            g = tl.where(z > 0, g, g * SLOPE)
    return g, xhat


@triton.jit
def _instance_norm_act_bwd_kernel(
    dy_ptr, x_ptr, y_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dresidual_ptr, sum_g_ptr, sum_gx_ptr, C, HW,
    ACT: tl.constexpr, SLOPE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    plane, c, offset, c_mask, mask = _tile(C, HW, tl.program_id(1) * BLOCK_P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    mean = tl.load(mean_ptr + plane, mask=c_mask, other=0.0)
    rstd = tl.load(rstd_ptr + plane, mask=c_mask, other=0.0)
    g, xhat = _gradient(
        dy_ptr, x_ptr, y_ptr, weight_ptr, bias_ptr, offset, mask, c, c_mask, mean, rstd, ACT, SLOPE
    )  # fmt: skip
    if WHOLE:
        sum_g = tl.sum(g, axis=1, keep_dims=True)
        sum_gx = tl.sum(g * xhat, axis=1, keep_dims=True)
        tl.store(sum_g_ptr + plane, sum_g, mask=c_mask)
        tl.store(sum_gx_ptr + plane, sum_gx, mask=c_mask)
    else:
        sum_g = tl.load(sum_g_ptr + plane, mask=c_mask, other=0.0)
        sum_gx = tl.load(sum_gx_ptr + plane, mask=c_mask, other=0.0)
    if weight_ptr is not None:
        rstd *= tl.load(weight_ptr + c, mask=c_mask, other=0.0).to(rstd.dtype)
    tl.store(dx_ptr + offset, (g - sum_g / HW - xhat * (sum_gx / HW)) * rstd, mask=mask)
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + offset, g, mask=mask)


@triton.jit
def _instance_norm_act_bwd_partial_kernel(
    dy_ptr, x_ptr, y_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, sum_g_ptr, sum_gx_ptr, C, HW, chunks,
    ACT: tl.constexpr, SLOPE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(1)
    plane, c, offset, c_mask, mask = _tile(C, HW, 0, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    mean = tl.load(mean_ptr + plane, mask=c_mask, other=0.0)
    rstd = tl.load(rstd_ptr + plane, mask=c_mask, other=0.0)
    sum_g = tl.zeros((BLOCK_C, BLOCK_P), mean.dtype)
    sum_gx = tl.zeros((BLOCK_C, BLOCK_P), mean.dtype)
    for step in range(STEPS):
        first = (chunk * STEPS + step) * BLOCK_P
        plane, c, offset, c_mask, mask = _tile(C, HW, first, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        g, xhat = _gradient(
            dy_ptr, x_ptr, y_ptr, weight_ptr, bias_ptr, offset, mask, c, c_mask, mean, rstd, ACT, SLOPE
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
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = _forward_fake(x, weight, bias, residual, eps, act, slope)
    if not runs_kernel(x):
        y = reference(x, weight, bias, residual, eps, act, slope).contiguous(memory_format=layout(x))
        x = x.to(mean.dtype)
        mean = x.mean((2, 3), keepdim=True)
        rstd = ((x - mean).square().mean((2, 3)) + eps).rsqrt()
        return y, mean[:, :, 0, 0].clone(), rstd
    if y.numel() == 0:
        return y, mean, rstd
    x = x.contiguous(memory_format=layout(x))
    residual = None if residual is None else residual.contiguous(memory_format=layout(x))
    n, c, pixels, tile, shape = _plane_tile(x)
    blocks = n * ceil_div(c, tile.block_c)
    with torch.cuda.device_of(x):
        if tile.chunks:
            partial = mean.new_empty((2, n, c, tile.chunks))
            _instance_norm_act_fwd_partial_kernel[(blocks, tile.chunks)](
                x, partial[0], partial[1], c, pixels, tile.chunks, STEPS=tile.steps, **shape
            )
            _instance_norm_act_fwd_combine_kernel[(n * c,)](
                partial[0], partial[1], mean, rstd, pixels, tile.chunks, tile.steps * tile.block_p,
                EPS=eps, BLOCK=power_of_two(tile.chunks), num_warps=1,
            )  # fmt: skip
        _instance_norm_act_fwd_kernel[(blocks, ceil_div(pixels, tile.block_p))](
            x, weight, bias, residual, y, mean, rstd, c, pixels,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dweight, dbias, dresidual = _backward_fake(dy, x, mean, rstd, weight, bias, y, eps, act, slope)
    if not runs_kernel(x):
        grads = reference_backward(dy, x, weight, bias, y, eps, act, slope)
        wanted = (True, weight is not None, bias is not None, y is not None)
        dx, dweight, dbias, dresidual = (g if want else g.new_empty(0) for g, want in zip(grads, wanted))
        dx = dx.contiguous(memory_format=layout(x))
        return dx, dweight, dbias, dresidual if y is None else dresidual.contiguous(memory_format=layout(x))
    if dx.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_(), dresidual
    dy = dy.contiguous(memory_format=layout(x))
    y = None if y is None else y.contiguous(memory_format=layout(x))
    x = x.contiguous(memory_format=layout(x))
    n, c, pixels, tile, shape = _plane_tile(x)
    blocks = n * ceil_div(c, tile.block_c)
    sums = mean.new_empty((2, n, c))
    inputs = (dy, x, y, weight, bias, mean, rstd)
    with torch.cuda.device_of(x):
        if tile.chunks:
            partial = mean.new_empty((2, n, c, tile.chunks))
            _instance_norm_act_bwd_partial_kernel[(blocks, tile.chunks)](
                *inputs, partial[0], partial[1], c, pixels, tile.chunks,
                ACT=act, SLOPE=slope, STEPS=tile.steps, **shape,
            )  # fmt: skip
            sums = partial.sum(-1)
        _instance_norm_act_bwd_kernel[(blocks, ceil_div(pixels, tile.block_p))](
            *inputs, dx, None if y is None else dresidual, sums[0], sums[1], c, pixels,
            ACT=act, SLOPE=slope, WHOLE=not tile.chunks, **shape,
        )  # fmt: skip
    if bias is not None:
        dbias = sums[0].sum(0).to(x.dtype)
    if weight is not None:
        dweight = sums[1].sum(0).to(x.dtype)
    return dx, dweight, dbias, dresidual


def _plane_tile(x: Tensor) -> tuple[int, int, int, PlaneTile, dict[str, int]]:
    n, c, height, width = x.shape
    channels_last = layout(x) == torch.channels_last
    tile = plane_tile(n, c, height * width, channels_last, x.element_size())
    shape = {"CHANNELS_LAST": channels_last, "BLOCK_C": tile.block_c, "BLOCK_P": tile.block_p}
    return n, c, height * width, tile, {**shape, "num_warps": tile.num_warps}


@_forward.register_fake
def _forward_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout(x))
    mean = x.new_empty(x.shape[:2], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return y, mean, torch.empty_like(mean)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # an op cannot return None: what nobody asked for is empty
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout(x))
    dweight = x.new_empty(0 if weight is None else x.shape[1])
    dbias = x.new_empty(0 if bias is None else x.shape[1])
    return dx, dweight, dbias, x.new_empty(0) if y is None else torch.empty_like(dx)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, residual, *ctx.options = inputs
    y, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.has_residual = residual is not None
    needs_y = ctx.has_residual and ctx.options[1] != "none"
    ctx.save_for_backward(x, mean, rstd, weight, bias, y if needs_y else None)


def _forward_gradient(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
    x, mean, rstd, weight, bias, y = ctx.saved_tensors
    backward = torch.ops.fastgan.instance_norm_act_backward.default
    dx, dweight, dbias, dresidual = backward(dy, x, mean, rstd, weight, bias, y, *ctx.options)
    if not ctx.has_residual:
        dresidual = None
    elif y is None:
        dresidual = dy
    grads = (dx, None if weight is None else dweight, None if bias is None else dbias, dresidual)
    return *grads, None, None, None


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, x, _, _, weight, bias, y, *ctx.options = inputs
    ctx.save_for_backward(dy, x, weight, bias, y)


def _backward_gradient(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    *tensors, y = ctx.saved_tensors
    with torch.enable_grad():
        # fresh nodes: the gradient stops here and does not run on through dy, which may depend on x
        fresh: list[Any] = [t if t is None else t.view_as(t).requires_grad_() for t in tensors]
        dy, x, weight, bias = fresh
        outputs = reference_backward(dy, x, weight, bias, y, *ctx.options)
    pairs = [(output, grad) for output, grad in zip(outputs, grads) if output.shape == grad.shape]
    outputs, grads = zip(*pairs)
    inputs = [t for t in fresh if t is not None]
    create_graph = torch.is_grad_enabled()
    found = iter(torch.autograd.grad(outputs, inputs, grads, create_graph=create_graph, allow_unused=True))
    ddy, ddx, ddweight, ddbias = (t if t is None else next(found) for t in fresh)
    # the statistics are functions of x, differentiated in ddx
    return ddy, ddx, None, None, ddweight, ddbias, None, None, None, None


_forward.register_autograd(_forward_gradient, setup_context=_setup_context)
_backward.register_autograd(_backward_gradient, setup_context=_setup_backward_context)
