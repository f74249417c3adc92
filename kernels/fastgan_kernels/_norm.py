"""What instance_norm_act, batch_norm_act and channel_layer_norm_act share.

    z = (x - mean) * rstd * weight + bias + residual,   y = dropout(act(z)), padded or behind other channels

Statistics: each chunk of pixels to its mean and its sum of squared deviations, which are combined in a fixed
order (Chan, Golub and LeVeque 1983), over a plane (instance norm), over the samples of a weight set (batch
norm) or over an image with all its channels (layer norm). The pointwise work, the padding and the two passes
of the backward are those of _halo; the second order is that of _norm_reference.
"""
# mypy: disable-error-code="no-untyped-def"
# (only the kernels: Triton reads their annotations)

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _halo
from ._layout import MODES, Layout, image_layout
from ._op import layout, require, require_image, tl, triton
from ._pointwise import ACTIVATIONS, Pointwise, accumulator
from ._tune import PlaneTile, ceil_div, plane_tile, power_of_two


class Options(NamedTuple):
    """The options of an op, as its arguments have them."""

    eps: float
    act: str
    slope: float
    dropout: float
    pad: int
    padding_mode: str

    @property
    def moves_only(self) -> bool:
        """The gradient of the residual is dy itself."""
        return self.act == "none" and self.dropout == 0 and self.pad == 0


# in place of the number of groups: the statistics are those of an image, all its channels
IMAGE = -1


def check(
    op: str,
    x: Tensor,
    parameters: Mapping[str, Tensor | None],
    residual: Tensor | None,
    seed: Tensor | None,
    concat: Tensor | None,
    options: Options,
) -> int:
    """Raises ValueError for what the ops do not take; returns the number of weight sets."""
    require_image(op, x)
    require(x.shape[2] * x.shape[3] > 0, op, "x", "at least one pixel", f"shape {tuple(x.shape)}")
    n, c, height, width = x.shape
    given = {name: value for name, value in parameters.items() if value is not None}
    sets = sets_of(*given.values())
    for name, value in given.items():
        rule = f"of shape ({c},) or (S, {c}), one S for all"
        legal = value.shape == (c,) or value.shape == (sets, c)
        require(legal, op, name, rule, tuple(value.shape))
    require(n % sets == 0, op, "x", f"a batch that {sets} weight sets can share", f"{n} samples")
    if residual is not None:
        require(
            residual.shape == x.shape, op, "residual", f"of shape {tuple(x.shape)}", tuple(residual.shape)
        )
        given["residual"] = residual
    if concat is not None:
        legal = concat.dim() == 4 and (len(concat), *concat.shape[2:]) == (n, height, width)
        require(legal, op, "concat", f"of shape ({n}, C2, {height}, {width})", tuple(concat.shape))
        given["concat"] = concat
    if seed is not None:
        legal = seed.shape == (1,) and seed.dtype == torch.int64
        require(legal, op, "seed", "(1,) int64", f"{tuple(seed.shape)} {seed.dtype}")
        given["seed"] = seed
    for name, value in given.items():
        require(value.device == x.device, op, name, f"on {x.device}", value.device)
    _check_options(op, options, min(height, width), concat is not None)
    return sets


def _check_options(op: str, options: Options, size: int, has_concat: bool) -> None:
    eps, act, slope, probability, pad, mode = options
    require(eps > 0, op, "eps", "> 0", eps)
    require(act in ACTIVATIONS, op, "act", f"one of {', '.join(ACTIVATIONS)}", repr(act))
    require(slope >= 0, op, "slope", ">= 0", slope)
    require(0 <= probability < 1, op, "dropout", "in 0 <= p < 1", probability)
    require(mode in MODES, op, "padding_mode", f"one of {', '.join(MODES)}", repr(mode))
    require(isinstance(pad, int) and pad >= 0, op, "pad", "an int >= 0", pad)
    require(mode != "reflect" or pad < size, op, "pad", f"below the size {size}", pad)
    require(pad == 0 or not has_concat, op, "pad", "0 with concat", pad)


def draw(x: Tensor, seed: Tensor | None, probability: float) -> Tensor | None:
    """The seed of a dropout: the given one, or one of torch's generator."""
    if probability == 0:
        return None
    return torch.randint(2**62, (1,), device=x.device) if seed is None else seed


def cast(x: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(x.dtype) for t in tensors]


def sets_of(*parameters: Tensor | None) -> int:
    """Rows of the parameters, each for so many equal groups of samples."""
    return max([1, *(len(t) for t in parameters if t is not None and t.dim() == 2)])


def by_set(
    x: Tensor, sets: int, parameters: tuple[Tensor | None, ...], function: Callable[..., Any]
) -> list[Any]:
    """function(samples, *parameters) for each weight set, with its own row of (S, C) parameters."""
    rows = [[t if t is None or t.dim() == 1 else t[s] for t in parameters] for s in range(sets)]
    if sets == 1 or len(x) == 0:
        return [function(x, *rows[0])]
    return [function(part, *row) for part, row in zip(x.chunk(sets), rows)]


def new_output(x: Tensor, concat: Tensor | None, pad: int) -> Tensor:
    n, c, height, width = x.shape
    channels = c if concat is None else c + concat.shape[1]
    size = (n, channels, height + 2 * pad, width + 2 * pad)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout(x))


def new_gradients(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, needs_residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias, dresidual; an op cannot return None: what nobody asked for is empty."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout(x))
    dweight, dbias = (x.new_empty(0 if t is None else t.shape) for t in (weight, bias))
    return dx, dweight, dbias, torch.empty_like(dx) if needs_residual else x.new_empty(0)


def fill(outputs: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return tuple(o.copy_(f) if o.shape == f.shape else o for o, f in zip(outputs, found))


def stand_in(x: Tensor, residual: Tensor | None, needs_residual: bool) -> Tensor | None:
    """The residual, or, where only its gradient is of interest, one that changes nothing."""
    return torch.zeros_like(x) if residual is None and needs_residual else residual


def save(
    ctx: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    concat: Tensor | None,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """What a backward pass needs; ctx.options is set."""
    ctx.mark_non_differentiable(mean, rstd)
    ctx.has_residual, ctx.has_concat = residual is not None, concat is not None
    act = ctx.options.act
    y_or_none = y if ctx.has_residual and act != "none" else None
    # only the second derivative of tanh is not 0
    residual = residual if act == "tanh" else None
    ctx.save_for_backward(x, mean, rstd, weight, bias, y_or_none, seed, residual)


def before_backward(
    ctx: Any, dy: Tensor, x: Tensor, y: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, bool]:
    """The gradient of this op's own part of the output, that part itself, the gradient of concat, and whether
    that of the residual has to be computed."""
    channels = dy.shape[1] - x.shape[1]
    own, dconcat = (dy[:, channels:], dy[:, :channels]) if ctx.has_concat else (dy, None)
    y = None if y is None else inner(y, x, ctx.options.pad)
    return own, y, dconcat, ctx.has_residual and not ctx.options.moves_only


def after_backward(
    ctx: Any, dy: Tensor, weight: Tensor | None, bias: Tensor | None, found: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """dx, dweight, dbias, dresidual as autograd takes them."""
    dx, dweight, dbias, dresidual = found
    if ctx.options.moves_only:
        dresidual = dy
    wanted = (True, weight is not None, bias is not None, ctx.has_residual)
    return tuple(g if want else None for g, want in zip((dx, dweight, dbias, dresidual), wanted))


def inner(y: Tensor, x: Tensor, pad: int) -> Tensor:
    """The part of an output that lies where x does: behind `concat`, within the padding."""
    height, width = x.shape[2:]
    return y[:, y.shape[1] - x.shape[1] :, pad : pad + height, pad : pad + width]


def extend(y: Tensor, concat: Tensor | None, pad: int, mode: str) -> Tensor:
    """Padding or concatenation, in torch functions."""
    if concat is not None:
        return torch.cat([concat, y], 1)
    if pad == 0:
        return y
    # autocast would turn a bfloat16 copy into float32 passes
    with torch.autocast(y.device.type, enabled=False):
        return F.pad(y, (pad,) * 4, mode="constant" if mode == "zeros" else mode)


def per_sample(parameter: Tensor, x: Tensor) -> Tensor:
    """(C,) or (S, C) as (N, C)."""
    rows = parameter.view(-1, parameter.shape[-1])
    return rows.repeat_interleave(len(x) // len(rows), 0)


def _padded(x: Tensor, options: Options) -> Layout:
    """The padded image, a row per pixel."""
    n, c, height, width = x.shape
    p = options.pad
    if p == 0:
        return image_layout(height, width, c)
    size = (height + 2 * p, width + 2 * p)
    return Layout(height, width, c, *size, 1, 1, 1, False, c, c, p, p, *size, options.padding_mode)


def _pending(
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    options: Options,
) -> Pointwise:
    c = mean.shape[1]
    w, b = (None if t is None else t.view(-1, c) for t in (weight, bias))
    return Pointwise(mean, rstd, w, b, options.act, options.slope, options.dropout, seed)


def forward_passes(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    concat: Tensor | None,
    options: Options,
) -> Tensor:
    """y from given statistics, in one pass; with concat, another one copies that."""
    y = new_output(x, concat, options.pad)
    channels = y.shape[1] - x.shape[1]
    if concat is not None:
        y[:, :channels].copy_(concat)
    _halo.place(
        x, _padded(x, options), y[:, channels:], _pending(mean, rstd, weight, bias, seed, options), residual
    )
    return y


def backward_passes(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    seed: Tensor | None,
    groups: int | None,
    options: Options,
    dx: Tensor,
    dresidual: Tensor,
) -> Tensor:
    """Fills dx and, unless it is empty, dresidual; returns the sums of G and of G * xhat, (N, 2, C).

    dy: like y without concat, any strides. groups: of a batch norm; 0 for given statistics; IMAGE for those
    of each image; None for those of each plane.
    """
    pending, padded = _pending(mean, rstd, weight, bias, seed, options), _padded(x, options)
    total = dresidual if dresidual.numel() else False
    partial, _ = _halo.reduce(dy, padded, pending, x, y, None, total)
    sums = partial.sum(1)
    n, _, c = sums.shape
    means = None
    if groups == IMAGE:
        means = sums if weight is None else sums * per_sample(weight, x)[:, None].to(sums.dtype)
        count = c * x.shape[2] * x.shape[3]
        means = (means.sum(2, keepdim=True) / count).repeat(1, 1, c)
        means[:, 1] *= deviation_factor(rstd, options.eps, count)
    elif groups is None:
        means = sums / (x.shape[2] * x.shape[3])
    elif groups:
        means = sums.view(groups, -1, 2, c).mean(1) / (x.shape[2] * x.shape[3])
        means = means.repeat_interleave(n // groups, 0)
    image = image_layout(x.shape[2], x.shape[3], c)
    _halo.gradient_to(dy, padded, pending, image, dx, x, y, None, means, weighted=groups == IMAGE)
    return sums


def deviation_factor(rstd: Tensor, eps: float, count: int) -> Tensor:
    """What multiplies the mean of g * xhat where rstd is 1 / (unbiased standard deviation + eps)."""
    # where all values are equal, eps * rstd is 1 and xhat 0
    rest = (1 - eps * rstd).clamp(min=torch.finfo(rstd.dtype).eps)
    return count / (max(1, count - 1) * rest)


def of_parameters(
    sums: Tensor, weight: Tensor | None, bias: Tensor | None, x: Tensor
) -> tuple[Tensor, Tensor]:
    """dweight and dbias from the (N, 2, C) sums; empty for what is not there."""
    found = []
    for k, parameter in ((1, weight), (0, bias)):
        if parameter is None:
            found.append(x.new_empty(0))
        else:
            sets = parameter.numel() // parameter.shape[-1]
            total = sums[:, k].reshape(sets, -1, sums.shape[2]).sum(1)
            found.append(total.view(parameter.shape).to(parameter.dtype))
    return found[0], found[1]


def moments(x: Tensor, eps: float, groups: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps), (N, C) each, of every plane, or of equal groups of samples.

    x: contiguous or channels_last, not empty. groups: IMAGE: mean and 1 / (standard deviation + eps) of every
    image with all its channels, the unbiased deviation.
    """
    n, c = x.shape[:2]
    samples = copies = 1 if groups is None else n // groups
    if groups == IMAGE:
        samples, copies = 1, c
        # in either layout the values of an image lie next to each other: a plane of one channel
        count = x.numel() // n
        x = x.as_strided((n, 1, count, 1), (count, count, 1, 1))
    _, channels, pixels, tile, shape = tile_of(x, 1024 if groups == IMAGE else 256)
    chunks = max(1, tile.chunks)
    partial = x.new_empty((2, n, channels, chunks), dtype=accumulator(x.dtype))
    # not views of one tensor: an op must not return those
    mean, rstd = (partial.new_empty((n, c)) for _ in range(2))
    with torch.cuda.device_of(x):
        _norm_partial_kernel[(n * ceil_div(channels, tile.block_c), chunks)](
            x, partial[0], partial[1], channels, pixels, chunks, STEPS=tile.steps, **shape
        )
        _norm_combine_kernel[(n // samples, channels)](
            partial[0], partial[1], mean, rstd, channels, samples, copies, pixels, chunks,
            tile.steps * tile.block_p, EPS=eps, DEVIATION=groups == IMAGE,
            BLOCK=power_of_two(samples * chunks), BLOCK_N=power_of_two(copies),
            num_warps=max(1, min(8, samples * chunks // 256)),
        )  # fmt: skip
    return mean, rstd


def tile_of(x: Tensor, most: int = 256) -> tuple[int, int, int, PlaneTile, dict[str, int]]:
    """The sizes of x, its tile of at most so many chunks, and what kernels are launched with for it."""
    n, c, height, width = x.shape
    channels_last = layout(x) == torch.channels_last
    tile = plane_tile(n, c, height * width, channels_last, x.element_size(), most)
    shape = {"CHANNELS_LAST": channels_last, "BLOCK_C": tile.block_c, "BLOCK_P": tile.block_p}
    return n, c, height * width, tile, {**shape, "num_warps": tile.num_warps}


@triton.jit
def tile_place(C, HW, first_pixel, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
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
    return n, c, offset, c < C, (c < C) & (p < HW)


@triton.jit
def _norm_partial_kernel(
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
    n, c, offset, c_mask, mask = tile_place(C, HW, 0, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    for step in range(STEPS):
        first = (chunk * STEPS + step) * BLOCK_P
        n, c, offset, c_mask, mask = tile_place(C, HW, first, CHANNELS_LAST, BLOCK_C, BLOCK_P)
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
    plane = (n * C + c).to(tl.int64) * chunks + chunk
    tl.store(mean_ptr + plane, chunk_mean, mask=c_mask)
    tl.store(m2_ptr + plane, chunk_m2, mask=c_mask)


@triton.jit
def _norm_combine_kernel(
    chunk_mean_ptr, chunk_m2_ptr, mean_ptr, rstd_ptr, C, samples, copies, HW, chunks, chunk_pixels,
    EPS: tl.constexpr, DEVIATION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * samples
    c = tl.program_id(1)
    term = tl.arange(0, BLOCK)
    chunk = term % chunks
    mask = term < samples * chunks
    offset = ((first + term // chunks) * C + c).to(tl.int64) * chunks + chunk
    chunk_mean = tl.load(chunk_mean_ptr + offset, mask=mask, other=0.0)
    chunk_m2 = tl.load(chunk_m2_ptr + offset, mask=mask, other=0.0)
    count = tl.where(mask, tl.minimum(HW - chunk * chunk_pixels, chunk_pixels), 0).to(chunk_mean.dtype)
    mean = tl.sum(chunk_mean * count, axis=0) / HW / samples
    spread = chunk_mean - mean
    m2 = tl.sum(chunk_m2 + count * spread * spread, axis=0)
    n = tl.arange(0, BLOCK_N)
    offset = (tl.program_id(0) * copies + n) * C + c
    if DEVIATION:
        rstd = 1 / (tl.sqrt(m2 / tl.maximum(HW - 1, 1)) + EPS)
    else:
        rstd = tl.rsqrt(m2 / HW / samples + EPS)
    tl.store(mean_ptr + offset, tl.full((BLOCK_N,), 0.0, mean.dtype) + mean, mask=n < copies)
    tl.store(rstd_ptr + offset, tl.full((BLOCK_N,), 0.0, mean.dtype) + rstd, mask=n < copies)
