"""Transposed convolution, normalisation, residual, activation and dropout in one op.

    y = dropout(act(norm(conv_transpose(x) + bias) + residual))

A transposed convolution is the input gradient of the convolution from its output to its input: with stride
2 each of the four output phases has its own taps, and no zero is multiplied. The rest is conv_norm_act's.
Backward: the input gradient is a strided convolution of dz, the weight gradient has the operands exchanged.
Second order: the backward op's own gradient is a composite of torch functions (automatic); any order works.
Layout: contiguous and channels_last in, the same out; inside NHWC.
"""

from torch import Tensor

from ._block_op import Options, single
from ._op import require
from ._register import register

OP = "conv_transpose_norm_act"


def conv_transpose_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 2,
    padding: int = 0,
    output_padding: int = 0,
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
    """Convolves, transposed, and does what follows.

    x: (N, C, H, W), float16, bfloat16, float32 or float64, contiguous or channels_last; N may be 0. Under
        autocast it is cast as torch casts for its convolution.
    weight: (C, O, k, k); or (S, C, O, k, k), weight sets: the first N / S samples meet the first set and so
        on, which runs S networks at once. The other parameters are then (S, O) instead of (O,).
    bias, norm_weight, norm_bias: (O,) or None. Parameters may have any float dtype.
    stride: 1 or 2. padding: pixels that every side of the output loses. output_padding: pixels that it gains
        to the right and below, less than the stride.
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
    require(0 <= output_padding < stride, OP, "output_padding", "in 0 <= p < stride", output_padding)
    return single(
        OP, x, (True, stride, padding, output_padding, "zeros"),
        (weight, bias, norm_weight, norm_bias, running_mean, running_var),
        Options(norm, training, momentum, eps, act, slope, dropout), residual, seed, recompute,
    )  # fmt: skip


register("fastgan::conv_transpose_norm_act")
