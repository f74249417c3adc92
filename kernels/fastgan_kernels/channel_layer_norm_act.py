"""The layer norm of MUNIT, affine map and activation in one op.

    y = act(xhat * weight + bias),  xhat = (x - mean) * rstd,  rstd = 1 / (std + eps)

mean and std are those of an image over all its C * H * W values, weight and bias those of each channel. std
is the unbiased standard deviation, and eps is added to it, not under a root (Huang et al. 2018, release). One
value per image is legal and gives xhat = 0, where torch's std is NaN.

Backward: g = dy * act'(z), h = weight * g, S1 = mean(h), S2 = sum(h * xhat) / ((CHW - 1) * (1 - eps * rstd)),
over the values of an image, then
    dx = rstd * (h - S1 - xhat * S2),  dweight = sum(g * xhat),  dbias = sum(g).
Saved: x, mean, rstd, weight and bias, from which z is recomputed.
Second order: the backward op's own gradient is a composite of torch functions (automatic); any order works.
Layout: contiguous and channels_last; other strides are first brought to the one they lean to.

Two passes forward: statistics of an image as one row of values, in chunks that are combined in a fixed order
(_norm), and y (_halo). Two backward: the sums of each channel, from which those of the image follow, and dx.
No atomics, bitwise reproducible.
"""

from typing import Any

import torch
from torch import Tensor

from . import _norm, _norm_reference
from ._norm import IMAGE, Options
from ._norm_reference import deviation, per_plane
from ._op import layout, runs_kernel
from ._pointwise import accumulator, activation


def channel_layer_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    act: str = "none",
    slope: float = 0.2,
) -> Tensor:
    """Normalises each image of x over all its values, applies weight and bias of the channels, and activates.

    x: (N, C, H, W), float16, bfloat16, float32 or float64, contiguous or channels_last; N may be 0.
    weight, bias: (C,), or (S, C), a row for each of S equal groups of samples; cast to the dtype of x.
    eps: added to the standard deviation, > 0. act: "none", "relu", "leaky_relu" or "tanh". slope: of
        leaky_relu, >= 0.
    Returns y in the dtype and layout of x. Statistics are float32, float64 for float64 x.
    Raises ValueError for another shape, dtype, device or option.
    """
    parameters = {"weight": weight, "bias": bias}
    _norm.check("channel_layer_norm_act", x, parameters, None, None, None, _options(eps, act, slope))
    # autocast does not reach inside an op
    weight, bias = _norm.cast(x, weight, bias)
    if runs_kernel(x):
        return torch.ops.fastgan.channel_layer_norm_act.default(x, weight, bias, eps, act, slope)[0]
    return reference(x, weight, bias, eps, act, slope)


def reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, act: str, slope: float
) -> Tensor:
    kind = accumulator(x.dtype)
    value = x.to(kind)
    centred = value - value.mean((1, 2, 3), keepdim=True)
    scale = 1 / (deviation(centred) + eps)
    z = centred * (scale if weight is None else scale * per_plane(weight, x).to(kind))
    z = z if bias is None else z + per_plane(bias, x).to(kind)
    return activation(z, act, slope).to(x.dtype)


def _options(eps: float, act: str, slope: float) -> Options:
    return Options(eps, act, slope, 0.0, 0, "zeros")


@torch.library.custom_op("fastgan::channel_layer_norm_act", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, act: str, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    if x.numel() == 0:
        return _forward_fake(x, weight, bias, eps, act, slope)
    if not runs_kernel(x):
        y = reference(x, weight, bias, eps, act, slope).contiguous(memory_format=layout(x))
        value = x.to(accumulator(x.dtype))
        mean = value.mean((1, 2, 3), keepdim=True)
        rstd = 1 / (deviation(value - mean) + eps)
        return y, mean[:, 0, 0].repeat(1, x.shape[1]), rstd[:, 0, 0].repeat(1, x.shape[1])
    x = x.contiguous(memory_format=layout(x))
    mean, rstd = _norm.moments(x, eps, IMAGE)
    options = _options(eps, act, slope)
    return _norm.forward_passes(x, mean, rstd, weight, bias, None, None, None, options), mean, rstd


@torch.library.custom_op("fastgan::channel_layer_norm_act_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    options = _options(eps, act, slope)
    dx, dweight, dbias, nothing = _norm.new_gradients(x, weight, bias, False)
    if dx.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    if not runs_kernel(x):
        given = (dy, x, weight, bias, None, None, None, IMAGE, options)
        found = _norm_reference.reference_backward(*given)
        return _norm.fill((dx, dweight, dbias), found[:3])
    x = x.contiguous(memory_format=layout(x))
    sums = _norm.backward_passes(dy, x, mean, rstd, weight, bias, None, None, IMAGE, options, dx, nothing)
    return dx, *_norm.of_parameters(sums, weight, bias, x)


@_forward.register_fake
def _forward_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, act: str, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[:2], dtype=accumulator(x.dtype))
    return _norm.new_output(x, None, 0), mean, torch.empty_like(mean)


@_backward.register_fake
def _backward_fake(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _norm.new_gradients(x, weight, bias, False)[:3]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, *ctx.options = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, mean, rstd, weight, bias)


def _forward_gradient(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
    x, mean, rstd, weight, bias = ctx.saved_tensors
    backward = torch.ops.fastgan.channel_layer_norm_act_backward.default
    dx, dweight, dbias = backward(dy, x, mean, rstd, weight, bias, *ctx.options)
    parameters = [None if p is None else g for p, g in ((weight, dweight), (bias, dbias))]
    return dx, *parameters, None, None, None


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, x, _, _, weight, bias, *options = inputs
    ctx.options = _options(*options)
    ctx.save_for_backward(dy, x, weight, bias)


def _backward_gradient(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    # the statistics are functions of x, differentiated in ddx
    given = (*ctx.saved_tensors, None)
    ddy, ddx, ddweight, ddbias, _ = _norm_reference.second_order(
        given, grads, (None, None, IMAGE, ctx.options)
    )
    return ddy, ddx, None, None, ddweight, ddbias, None, None, None


_forward.register_autograd(_forward_gradient, setup_context=_setup_context)
_backward.register_autograd(_backward_gradient, setup_context=_setup_backward_context)
