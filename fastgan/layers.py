"""nn.Modules over the fused ops; arguments, parameter names and initial values are those of the torch layers
they stand for."""

from __future__ import annotations

import torch
from fastgan_kernels import instance_norm_act, reflect_pad2d
from torch import Tensor, nn
from torch.nn import functional as F


class ReflectionPad2d(nn.ReflectionPad2d):
    """`torch.nn.ReflectionPad2d` on (N, C, H, W) through the fused op; keeps channels_last."""

    def forward(self, input: Tensor) -> Tensor:
        """Pad (N, C, H, W) by `self.padding` (left, right, top, bottom) pixels; ValueError where a side is
        too small."""
        return reflect_pad2d(input, self.padding)


class InstanceNorm2d(nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` without running statistics, with the activation and residual add that follow
    it.

    Args:
        num_features: channels C.
        eps: added to the variance.
        affine: learn a weight and a bias per channel.
        act: "none", "relu" or "leaky_relu", applied after the residual add.
        slope: negative slope of "leaky_relu".
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = False,
        *,
        act: str = "none",
        slope: float = 0.2,
    ) -> None:
        super().__init__(num_features, eps=eps, affine=affine)
        self.act, self.slope = act, slope

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """act(norm(input) + residual), (N, C, H, W) in and out, in the dtype and layout of `input`."""
        return instance_norm_act(
            input, self.weight, self.bias, residual, eps=self.eps, act=self.act, slope=self.slope
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act}"


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` that can leave its bias out of the work.

    An instance norm that follows removes any constant per channel, so the bias has no effect and no gradient
    there; it stays a parameter because checkpoints of the original release hold one. `idle_bias` says that
    such a norm follows.
    """

    idle_bias = False

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if self.idle_bias else bias
        plain = self.stride == self.dilation == (1, 1) and self.padding == (0, 0) and self.groups == 1
        if plain and input.device.type == "cpu" and self.kernel_size[1] > 4:
            if self.out_channels <= 4:
                return _narrow_conv(input, weight, bias)
            if self.in_channels <= 4 and input.requires_grad:
                return _shallow_conv(input, weight, bias)
        return super()._conv_forward(input, weight, bias)


def _narrow_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution with few outputs: kh x 1 with an output per column of taps, then their shifted sum.

    CPU kernels work on blocks of 16 output channels, of which 3 would be used: at 64 -> 3 channels, 7x7,
    128x128, bf16 on two AMD EPYC cores with avx512_bf16 2.0 times as fast, forward and backward together.
    """
    outputs, inputs, height, width = weight.shape
    tall = weight.permute(0, 3, 1, 2).reshape(outputs * width, inputs, height, 1)
    columns = F.conv2d(x, tall.contiguous(memory_format=torch.channels_last))
    # a convolution by the identity adds the columns in float32, whatever the dtype of x
    shift = torch.eye(width, dtype=columns.dtype, device=x.device).view(1, width, 1, width)
    return F.conv2d(columns, shift.repeat(outputs, 1, 1, 1), bias, groups=outputs)


def _shallow_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution with few inputs: a channel per column of taps, then kh x 1.

    At 3 -> 64 channels, 7x7, 128x128, bf16 on two AMD EPYC cores with avx512_bf16 2.1 times as fast backward,
    where the input needs a gradient, and equal forward.
    """
    outputs, inputs, height, width = weight.shape
    side = x.shape[3] - width + 1
    columns = torch.cat([x[..., k : k + side] for k in range(width)], 1)
    tall = weight.permute(0, 3, 1, 2).reshape(outputs, width * inputs, height, 1)
    return F.conv2d(columns, tall.contiguous(memory_format=torch.channels_last), bias)


class ConvTranspose2d(nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` with the same switch as `Conv2d`; output size is the layer's own (no
    `output_size`)."""

    idle_bias = False

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Transposed convolution of (N, C, H, W)."""
        if output_size is not None:
            return super().forward(input, output_size)
        bias = None if self.idle_bias else self.bias
        pad = (int(self.padding[0]), int(self.padding[1]))
        return F.conv_transpose2d(
            input, self.weight, bias, self.stride, pad, self.output_padding, self.groups, self.dilation
        )


def norm_act(norm: str, channels: int, act: str = "none", slope: float = 0.2) -> list[nn.Module]:
    """A norm layer and the place of its activation: always two modules, so that later indices stay those of
    upstream.

    Args:
        norm: "instance", "batch" or "none".
        channels: channels of the input.
        act: "none", "relu" or "leaky_relu"; with instance norm it runs inside the fused op and its place is
            an Identity.
        slope: negative slope of "leaky_relu".

    Raises:
        ValueError: unknown norm.
    """
    if norm not in ("instance", "batch", "none"):
        raise ValueError(f"norm_act: norm must be instance, batch or none, got {norm!r}")
    after = {
        "none": nn.Identity(),
        "relu": nn.ReLU(inplace=True),
        "leaky_relu": nn.LeakyReLU(slope, inplace=True),
    }[act]
    if norm == "instance":
        return [InstanceNorm2d(channels, act=act, slope=slope), nn.Identity()]
    return [nn.BatchNorm2d(channels) if norm == "batch" else nn.Identity(), after]


def skip_idle_biases(net: nn.Module) -> None:
    """Mark every convolution whose output goes straight into an instance norm."""
    for module in net.modules():
        if isinstance(module, nn.Sequential):
            for first, second in zip(module, list(module)[1:]):
                if isinstance(first, (Conv2d, ConvTranspose2d)) and isinstance(second, InstanceNorm2d):
                    first.idle_bias = True


def place(net: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to a device and store its convolution weights NHWC, the layout its activations then
    follow."""
    return net.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
