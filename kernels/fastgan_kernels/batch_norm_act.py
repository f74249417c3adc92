"""Batch norm, affine map, residual, activation and dropout in one op, with padding or concatenation.

    y = dropout(act(xhat * weight + bias + residual)),  xhat = (x - mean) * rstd,  rstd = 1 / sqrt(var + eps)

mean and var (biased) are those of each channel over the samples and pixels of a weight set, or the running
ones. One value per channel is legal and gives xhat = 0, where torch's F.batch_norm raises. The running
statistics are updated outside the op, with the unbiased variance.

Backward: g = dy * dropout * act'(z), S1 = mean(g), S2 = mean(g * xhat), over what mean and var are of, then
    dx = weight * rstd * (g - S1 - xhat * S2),  dweight = sum(g * xhat),  dbias = sum(g),  dresidual = g;
without S1 and S2 where the statistics are the running ones.
Saved: x, mean, rstd, weight and bias, from which z is recomputed; where a residual meets an activation, y as
well, whose sign is that of z (and, with tanh, the residual, for the second order).
Second order: the backward op's own gradient is a composite of torch functions (automatic); any order works.
The reference in channels_last is torch's batch norm, which is wrong from the third order on (pytorch#186256).
Layout: contiguous and channels_last; other strides are first brought to the one they lean to.

The statistics are partial ones of chunks, combined in a fixed order (_norm); one more pass writes y (_halo).
No atomics, bitwise reproducible.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _norm, _norm_reference
from ._norm import Options
from ._op import layout, require, runs_kernel
from ._pointwise import accumulator, activation
from ._pointwise import dropout as drop


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "none",
    slope: float = 0.2,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    pad: int = 0,
    padding_mode: str = "zeros",
    concat: Tensor | None = None,
) -> Tensor:
    """Normalises each channel of x, applies weight and bias, adds a residual, applies activation and dropout.

    x: (N, C, H, W), float16, bfloat16, float32 or float64, contiguous or channels_last; N may be 0.
    weight, bias: (C,); or (S, C), a row for each of S equal groups of samples, each of which then has
        statistics of its own. Cast to the dtype of x.
    residual: (N, C, H, W), cast to the dtype of x.
    running_mean, running_var: (C,) or (S, C), updated in place while training, used when not; both or none.
        Without them the statistics are always those of x.
    momentum: weight of the new statistics in that update.
    eps: added to the variance, > 0. act: "none", "relu", "leaky_relu" or "tanh". slope: of leaky_relu, >= 0.
    dropout: probability, with torch's scaling by 1 / (1 - p). seed: (1,) int64 on the device of x, which
        decides the mask; None draws one from torch's generator.
    pad: y gets so many pixels on every side. padding_mode: "zeros", "reflect" or "replicate".
    concat: (N, C2, H, W), cast to the dtype of x: y comes behind it, in (N, C2 + C, H, W); not with pad.
    Returns y in the dtype and layout of x. Statistics are float32, float64 for float64 x.
    Raises ValueError for another shape, dtype, device or option.
    """
    op = "batch_norm_act"
    options = Options(eps, act, slope, dropout, pad, padding_mode)
    running = {"running_mean": running_mean, "running_var": running_var}
    sets = _norm.check(op, x, {"weight": weight, "bias": bias, **running}, residual, seed, concat, options)
    for name, value in running.items():
        rule = "given where the other running statistic is, a row for each weight set"
        legal = all(t is None for t in running.values()) or (
            value is not None and value.numel() // x.shape[1] == sets
        )
        require(legal, op, name, rule, value if value is None else tuple(value.shape))
    # autocast does not reach inside an op
    weight, bias, residual, concat = _norm.cast(x, weight, bias, residual, concat)
    given = (None, None) if training else (running_mean, running_var)
    arguments = (x, weight, bias, residual, *given, sets, *options, _norm.draw(x, seed, dropout), concat)
    if runs_kernel(x):
        y, mean, rstd = torch.ops.fastgan.batch_norm_act.default(*arguments)
    else:
        y, mean, rstd = reference(*arguments)
    if training and running_mean is not None and running_var is not None and len(x) > 0:
        count = x.numel() // (x.shape[1] * sets)
        _update(running_mean, running_var, mean, rstd, momentum, eps, count)
    return y


@torch.no_grad()
def _update(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    rstd: Tensor,
    momentum: float,
    eps: float,
    count: int,
) -> None:
    rows = running_mean.numel() // mean.shape[1]
    # every sample of a set carries the statistics of the set
    mean, rstd = (t[:: len(t) // rows].reshape(running_mean.shape) for t in (mean, rstd))
    var = (rstd**-2 - eps).clamp(min=0) * (count / max(1, count - 1))
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_(var.to(running_var.dtype), momentum)


def reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    sets: int,
    eps: float,
    act: str,
    slope: float,
    dropout: float,
    pad: int,
    padding_mode: str,
    seed: Tensor | None,
    concat: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the mean and rstd of each plane."""
    parts = _norm.by_set(x, sets, (weight, bias, mean, var), partial(_reference_norm, eps=eps))
    z, mean, rstd = (p[0] if len(p) == 1 else torch.cat(p) for p in zip(*parts))
    # z is fresh, and the function that made it saved its input
    z = z if residual is None else z.add_(residual)
    z = activation(z, act, slope)
    if seed is not None:
        z = drop(z, dropout, seed)
    return _norm.extend(z, concat, pad, padding_mode), mean, rstd


def _reference_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    *,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    n, c = x.shape[:2]
    kind = accumulator(x.dtype)
    # on the CPU, parameters in a half type would make torch keep half-precision statistics for backward
    w, b, mean, var = (
        None if t is None else t.to(kind if x.is_cpu else x.dtype) for t in (weight, bias, mean, var)
    )
    if mean is not None and var is not None:
        y = torch.batch_norm(x, w, b, mean, var, False, 0.0, eps, False)
        rstd = (var.to(kind) + eps).rsqrt()
        return y, mean.to(kind).expand(n, c), rstd.expand(n, c)
    if n == 0:
        # torch refuses it; the parameters still get a gradient, of 0
        y = x * (1 if w is None else w.view(1, -1, 1, 1)) + (0 if b is None else b.view(1, -1, 1, 1))
        return y.to(x.dtype), x.new_zeros((0, c), dtype=kind), x.new_zeros((0, c), dtype=kind)
    y, mean, rstd = torch.native_batch_norm(x, w, b, None, None, True, 0.0, eps)
    return y, mean.expand(n, c), rstd.expand(n, c)


@torch.library.custom_op("fastgan::batch_norm_act", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    given_mean: Tensor | None,
    given_var: Tensor | None,
    sets: int,
    eps: float,
    act: str,
    slope: float,
    dropout: float,
    pad: int,
    padding_mode: str,
    seed: Tensor | None,
    concat: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(eps, act, slope, dropout, pad, padding_mode)
    if not runs_kernel(x):
        y, mean, rstd = reference(
            x, weight, bias, residual, given_mean, given_var, sets, *options, seed, concat
        )
        kind = accumulator(x.dtype)
        return y.contiguous(memory_format=layout(x)), mean.to(kind, copy=True), rstd.to(kind, copy=True)
    if x.numel() == 0:
        return _forward_fake(x, weight, bias, residual, given_mean, given_var, sets, *options, seed, concat)
    x = x.contiguous(memory_format=layout(x))
    if given_mean is not None and given_var is not None:
        mean = _norm.per_sample(given_mean, x).to(accumulator(x.dtype))
        rstd = (_norm.per_sample(given_var, x).to(accumulator(x.dtype)) + eps).rsqrt()
    else:
        mean, rstd = _norm.moments(x, eps, sets)
    return _norm.forward_passes(x, mean, rstd, weight, bias, residual, seed, concat, options), mean, rstd


@torch.library.custom_op("fastgan::batch_norm_act_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    groups: int,
    eps: float,
    act: str,
    slope: float,
    dropout: float,
    pad: int,
    padding_mode: str,
    seed: Tensor | None,
    residual: Tensor | None,
    needs_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # groups: 0 where the statistics are given ones
    options = Options(eps, act, slope, dropout, pad, padding_mode)
    dx, dweight, dbias, dresidual = _norm.new_gradients(x, weight, bias, needs_residual)
    if dx.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_(), dresidual
    if not runs_kernel(x):
        shift = _norm.stand_in(x, residual, needs_residual)
        statistics = groups or (mean, rstd)
        found = _norm_reference.reference_backward(dy, x, weight, bias, shift, y, seed, statistics, options)
        return _norm.fill((dx, dweight, dbias, dresidual), found)
    x = x.contiguous(memory_format=layout(x))
    sums = _norm.backward_passes(dy, x, mean, rstd, weight, bias, y, seed, groups, options, dx, dresidual)
    return dx, *_norm.of_parameters(sums, weight, bias, x), dresidual


@_forward.register_fake
def _forward_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    given_mean: Tensor | None,
    given_var: Tensor | None,
    sets: int,
    eps: float,
    act: str,
    slope: float,
    dropout: float,
    pad: int,
    padding_mode: str,
    seed: Tensor | None,
    concat: Tensor | None,
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
    groups: int,
    eps: float,
    act: str,
    slope: float,
    dropout: float,
    pad: int,
    padding_mode: str,
    seed: Tensor | None,
    residual: Tensor | None,
    needs_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _norm.new_gradients(x, weight, bias, needs_residual)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, residual, given_mean, _, sets, *options, seed, concat = inputs
    ctx.groups, ctx.options = sets if given_mean is None else 0, Options(*options)
    _norm.save(ctx, x, weight, bias, residual, seed, concat, *output)


def _forward_gradient(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
    x, mean, rstd, weight, bias, y, seed, residual = ctx.saved_tensors
    own, y, dconcat, needs_residual = _norm.before_backward(ctx, dy, x, y)
    found = torch.ops.fastgan.batch_norm_act_backward.default(
        own, x, mean, rstd, weight, bias, y, ctx.groups, *ctx.options, seed, residual, needs_residual
    )
    grads = _norm.after_backward(ctx, own, weight, bias, found)
    return *grads, None, None, None, *[None] * len(ctx.options), None, dconcat


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, x, mean, rstd, weight, bias, y, ctx.groups, *options, seed, residual, ctx.needs_residual = inputs
    ctx.options = Options(*options)
    ctx.save_for_backward(dy, x, mean, rstd, weight, bias, y, seed, residual)


def _backward_gradient(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    dy, x, mean, rstd, weight, bias, y, seed, residual = ctx.saved_tensors
    # the statistics are functions of x, differentiated in ddx, or given
    given = (dy, x, weight, bias, _norm.stand_in(x, residual, ctx.needs_residual))
    rest = (y, seed, ctx.groups or (mean, rstd), ctx.options)
    ddy, ddx, ddweight, ddbias, ddresidual = _norm_reference.second_order(given, grads, rest)
    ddresidual = None if residual is None else ddresidual
    nothing = [None] * (1 + len(ctx.options) + 1)
    return ddy, ddx, None, None, ddweight, ddbias, None, *nothing, ddresidual, None


_forward.register_autograd(_forward_gradient, setup_context=_setup_context)
_backward.register_autograd(_backward_gradient, setup_context=_setup_backward_context)
