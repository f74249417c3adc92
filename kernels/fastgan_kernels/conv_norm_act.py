"""Padding, convolution, normalisation, residual, activation and dropout in one op.

    y = dropout(act(norm(conv(pad(x)) + bias) + residual))

One pass writes the padded image in the layout that the product reads; the product, a matrix product of
shifted rows (see _layout), takes the norm's statistics from its float32 accumulator; one pass normalises.
Without a norm the product adds the bias and applies the activation itself. A bias in front of an instance or
batch norm has no effect: the work is left out, and its gradient is 0.
Backward (see _block): sums of the norm, dz, input and weight gradient; no atomics, bitwise reproducible.
Second order: the backward op's own gradient is a composite of torch functions (automatic); any order works.
Layout: contiguous and channels_last in, the same out; inside NHWC.
"""

from torch import Tensor

from ._block_op import PADDINGS, Options, single
from ._op import require
from ._register import register

OP = "conv_norm_act"


def conv_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    padding_mode: str = "zeros",
    norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "none",
    slope: float = 0.2,
    residual: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """Convolves and does what follows the convolution.

    x: (N, C, H, W), float16, bfloat16, float32 or float64, contiguous or channels_last; N may be 0. Under
        autocast it is cast as torch casts for its convolution.
    weight: (O, C, k, k); or (S, O, C, k, k), weight sets: the first N / S samples meet the first set and so
        on, which runs S networks at once. The other parameters are then (S, O) instead of (O,).
    bias, norm_weight, norm_bias: (O,) or None. Parameters may have any float dtype.
    stride: 1 or 2. padding: pixels on every side. padding_mode: "zeros", "reflect" or "replicate".
    norm: "none", "instance" or "batch" (over N, H, W of each weight set).
    running_mean, running_var: (O,), of a batch norm: updated in place while training, used when not.
    momentum: weight of the new statistics in that update.
    eps: added to the variance, > 0. act: "none", "relu", "leaky_relu" or "tanh". slope: of leaky_relu.
    residual: (N, O, Ho, Wo), added before the activation; not together with dropout.
    dropout: probability, with torch's scaling by 1 / (1 - p). seed: (1,) int64 on the device of x, which
        decides the mask; None draws one from torch's generator.
    recompute: keep less for the backward pass and write the padded image again there.
    Returns (N, O, Ho, Wo) in the dtype and layout of x. Statistics are float32, float64 for float64 x.
    Raises ValueError for another shape, dtype, device or option.
    """
    require(stride in (1, 2), OP, "stride", "1 or 2", stride)
    require(isinstance(padding, int) and padding >= 0, OP, "padding", "an int >= 0", padding)
    require(padding_mode in PADDINGS, OP, "padding_mode", f"one of {', '.join(PADDINGS)}", repr(padding_mode))
    mode = "zeros" if padding == 0 else padding_mode
    return single(
        OP, x, (False, stride, padding, 0, mode),
        (weight, bias, norm_weight, norm_bias, running_mean, running_var),
        Options(norm, training, momentum, eps, act, slope, dropout), residual, seed, recompute,
    )  # fmt: skip


register("fastgan::conv_norm_act")
