"""Residual blocks of two convolutions in one op, any number in a row.

    y = x + norm(conv(act(norm(conv(x)))))

The trunk of a ResNet generator is one node: between its convolutions nothing is written but the layout that
the next product reads, the skip is read from there, and all weight gradients are one launch. Everything else
is as in conv_norm_act.
Backward (see _block): the sums of the first norm of a block are taken by the input gradient, those of the
second in the pass that adds the skip's gradient. Bitwise reproducible.
Second order: the backward op's own gradient is a composite of torch functions (automatic); any order works.
Layout: contiguous and channels_last in, the same out; inside NHWC.
"""

from collections.abc import Sequence

from torch import Tensor

from ._block import NONE, Layer, Parameters
from ._block_op import PADDINGS, Options, run, stacked
from ._op import require, require_image
from ._register import register

OP = "residual_block"


def residual_block(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] = (),
    norm_weights: Sequence[Tensor] = (),
    norm_biases: Sequence[Tensor] = (),
    *,
    padding_mode: str = "reflect",
    norm: str = "instance",
    running_means: Sequence[Tensor] = (),
    running_vars: Sequence[Tensor] = (),
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
    slope: float = 0.2,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """Applies residual blocks: padded convolution, norm, activation, dropout, padded convolution, norm, skip.

    x: (N, C, H, W), float16, bfloat16, float32 or float64, contiguous or channels_last; N may be 0. Under
        autocast it is cast as torch casts for its convolution.
    weights: two of (C, C, k, k) per block, k odd, in order; or (S, C, C, k, k), weight sets: the first N / S
        samples meet the first set and so on. The width between the two may differ from C.
    biases, norm_weights, norm_biases: as many as weights, each (C,) or (S, C), or none at all.
    padding_mode: "reflect", "zeros" or "replicate", (k - 1) / 2 pixels on every side.
    norm, running_means, running_vars, training, momentum, eps, act, slope, recompute: see conv_norm_act.
    dropout: probability, between the two convolutions. seed: (1,) int64 on the device of x, or None.
    Returns (N, C, H, W) in the dtype and layout of x.
    Raises ValueError for another shape, dtype, device or option.
    """
    require_image(OP, x)
    options = Options(norm, training, momentum, eps, act, slope, dropout)
    options.check(OP)
    require(padding_mode in PADDINGS, OP, "padding_mode", f"one of {', '.join(PADDINGS)}", repr(padding_mode))
    require(len(weights) > 0 and len(weights) % 2 == 0, OP, "weights", "two per block", len(weights))
    sets = 1 if weights[0].dim() == 4 else len(weights[0])
    groups = [_stack("weights", x, weights, 4, sets, len(weights))]
    kernel, channels = groups[0][0].shape[-1], [weight.shape[1] for weight in groups[0]]
    require(kernel % 2 == 1, OP, "weights", "of an odd kernel", f"shape {tuple(weights[0].shape)}")
    require(
        all(c == x.shape[1] for c in channels[1::2]),
        OP,
        "weights",
        f"back to {x.shape[1]} channels",
        channels,
    )
    for name, group in (
        ("biases", biases),
        ("norm_weights", norm_weights if norm != "none" else ()),
        ("norm_biases", norm_biases if norm != "none" else ()),
        ("running_means", running_means if norm == "batch" else ()),
        ("running_vars", running_vars if norm == "batch" else ()),
    ):
        groups.append(_stack(name, x, group, 1, sets, len(weights)))
        for value, c in zip(groups[-1], channels):
            require(value.shape[1] == c, OP, name, f"for {c} channels", f"shape {tuple(value.shape)}")
    pad = kernel // 2
    common = (False, 1, pad, 0, padding_mode if pad else "zeros", options.layer_norm(len(groups[4]) > 0))
    layers = []
    for block in range(0, len(weights), 2):
        layers.append(Layer(*common, act, slope, dropout, eps, NONE, False))
        layers.append(Layer(*common, "none", slope, 0.0, eps, block, False))
    return run(OP, x, layers, Parameters(*groups), options, None, seed, recompute)


def _stack(name: str, x: Tensor, group: Sequence[Tensor], dims: int, sets: int, count: int) -> list[Tensor]:
    require(len(group) in (0, count), OP, name, f"{count}, one per convolution, or none", len(group))
    found = [stacked(OP, name, x, value, dims, sets) for value in group]
    return [value for value in found if value is not None]


register("fastgan::residual_block")
