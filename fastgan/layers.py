"""nn.Modules over the fused ops; arguments, attribute names, state-dict keys and initial values are those of
the torch layers they stand for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from fastgan_kernels import (
    channel_layer_norm_act,
    conv_norm_act,
    conv_transpose_norm_act,
    instance_norm_act,
    reflect_pad2d,
)
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


class ChannelLayerNorm(nn.Module):
    """The layer norm of MUNIT's decoder (Huang et al. 2018), with the activation that follows it.

    Mean and unbiased standard deviation are those of each image over all its values; gamma (drawn from
    U(0, 1)) and beta (0) are per channel, under the names of the release.

    Args:
        channels: C.
        eps: added to the standard deviation.
        act: "none", "relu", "leaky_relu" or "tanh".
        slope: negative slope of "leaky_relu".
    """

    def __init__(self, channels: int, eps: float = 1e-5, act: str = "none", slope: float = 0.2) -> None:
        super().__init__()
        self.eps, self.act, self.slope = eps, act, slope
        self.gamma, self.beta = nn.Parameter(torch.rand(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, input: Tensor) -> Tensor:
        """act(gamma * (input - mean) / (std + eps) + beta), (N, C, H, W) in and out."""
        return self._run(input, self.gamma, self.beta)

    @staticmethod
    def stacked(norms: Sequence[ChannelLayerNorm], x: Tensor) -> Tensor:
        """This layer of several networks; see `fastgan.stack`."""
        gamma, beta = torch.stack([n.gamma for n in norms]), torch.stack([n.beta for n in norms])
        return norms[0]._run(x, gamma, beta)

    def _run(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return channel_layer_norm_act(x, gamma, beta, eps=self.eps, act=self.act, slope=self.slope)

    def extra_repr(self) -> str:
        return f"{len(self.gamma)}, eps={self.eps}, act={self.act}"


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d`, with what follows it in one op; and one that can leave its bias out of the work.

    An instance norm that follows removes any constant per channel, so the bias has no effect and no gradient
    there; it stays a parameter because checkpoints of the original release hold one. `idle_bias` says that
    such a norm follows as a layer of its own.

    Args:
        args, kwargs: those of `torch.nn.Conv2d`.
        norm: torch's InstanceNorm2d without running statistics or BatchNorm2d; its state is `norm.*`.
        act: "none", "relu", "leaky_relu" or "tanh", after the norm and the residual add.
        slope: negative slope of "leaky_relu".
        dropout: probability of a dropout behind the activation; acts in training only.

    Raises:
        ValueError: with a norm, act or dropout, where the ops do not take the convolution or the norm.
    """

    def __init__(
        self,
        *args: Any,
        norm: nn.Module | None = None,
        act: str = "none",
        slope: float = 0.2,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.norm, self.act, self.slope, self.dropout = norm, act, slope, dropout
        _check(self)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """dropout(act(norm(convolution) + residual)), (N, C, H, W) in and out."""
        return super().forward(input) if _is_plain(self, residual) else _follow(self, input, residual)

    def extra_repr(self) -> str:
        return super().extra_repr() + _extra_repr(self)

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
    """`torch.nn.ConvTranspose2d` with the same additions as `Conv2d`."""

    idle_bias = False

    def __init__(
        self,
        *args: Any,
        norm: nn.Module | None = None,
        act: str = "none",
        slope: float = 0.2,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.norm, self.act, self.slope, self.dropout = norm, act, slope, dropout
        _check(self)

    def forward(
        self, input: Tensor, output_size: list[int] | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """dropout(act(norm(transposed convolution) + residual)), (N, C, H, W) in and out; `output_size` is
        for a layer without norm, act and dropout."""
        if not _is_plain(self, residual):
            if output_size is not None:
                raise ValueError("ConvTranspose2d: output_size must be None where a norm or act follows")
            return _follow(self, input, residual)
        if output_size is not None:
            return super().forward(input, output_size)
        bias = None if self.idle_bias else self.bias
        pad = (int(self.padding[0]), int(self.padding[1]))
        return F.conv_transpose2d(
            input, self.weight, bias, self.stride, pad, self.output_padding, self.groups, self.dilation
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + _extra_repr(self)


def refusal(conv: nn.Conv2d | nn.ConvTranspose2d) -> str | None:
    """Why the fused ops do not take a convolution as it is set, None where they do."""
    kernel, stride, pad = conv.kernel_size, conv.stride, conv.padding
    if conv.groups != 1 or conv.dilation != (1, 1):
        return f"groups={conv.groups}, dilation={conv.dilation}"
    if kernel[0] != kernel[1] or kernel[0] > 7 or stride not in ((1, 1), (2, 2)):
        return f"kernel_size={kernel}, stride={stride}"
    # an even kernel at padding="same" has one side wider
    if pad == "same" and kernel[0] % 2 == 0 or not isinstance(pad, str) and pad[0] != pad[1]:
        return f"padding={pad!r}"
    if conv.padding_mode not in ("zeros", "reflect", "replicate"):
        return f"padding_mode={conv.padding_mode!r}"
    if isinstance(conv, nn.ConvTranspose2d) and conv.output_padding not in ((0, 0), (1, 1)):
        return f"output_padding={conv.output_padding}"
    return None


def run_conv(
    x: Tensor,
    conv: nn.Conv2d | nn.ConvTranspose2d,
    pad: nn.Module | None = None,
    norm: nn.Module | None = None,
    act: str = "none",
    slope: float = 0.2,
    dropout: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """dropout(act(norm(conv(pad(x))) + residual)) as one op, with the parameters and settings of the layers.

    x: (N, C, H, W); see `like_weight`.
    conv: one that has no `refusal`. pad: torch's ReflectionPad2d, ReplicationPad2d or ZeroPad2d, equal on all
        sides, in front of a convolution without padding. norm: a BatchNorm2d, or an InstanceNorm2d that does
        not update running statistics.
    """
    # read once: a parametrized weight is computed anew, and differently, every time
    weight = conv.weight
    x = like_weight(x, weight)
    options: dict[str, Any] = {"act": act, "slope": slope, "residual": residual, "dropout": dropout}
    options |= norm_options(norm)
    stride = conv.stride[0]
    if isinstance(conv, nn.ConvTranspose2d):
        options |= {"padding": conv.padding[0], "output_padding": conv.output_padding[0]}
        return conv_transpose_norm_act(x, weight, conv.bias, stride=stride, **options)
    width, mode = padding(conv, pad)
    return conv_norm_act(x, weight, conv.bias, stride=stride, padding=width, padding_mode=mode, **options)


def like_weight(x: Tensor, weight: Tensor) -> Tensor:
    """x in channels_last where the weight is, as torch's convolution brings it."""
    last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    return x.contiguous(memory_format=torch.channels_last) if last else x


def padding(conv: nn.Conv2d | nn.ConvTranspose2d, pad: nn.Module | None = None) -> tuple[int, str]:
    """Pixels on every side and their kind, of a convolution or of the padding layer in front of it."""
    if isinstance(pad, nn.ReflectionPad2d):
        return pad.padding[0], "reflect"
    if isinstance(pad, nn.ReplicationPad2d):
        return pad.padding[0], "replicate"
    if isinstance(pad, nn.ZeroPad2d):
        return pad.padding[0], "zeros"
    if isinstance(conv.padding, str):
        return (conv.kernel_size[0] // 2 if conv.padding == "same" else 0), conv.padding_mode
    return int(conv.padding[0]), conv.padding_mode


def norm_options(norm: Any) -> dict[str, Any]:
    """The arguments of the fused ops for a norm layer of torch; counts the batch as the layer would.

    Raises:
        ValueError: another norm, such as the SyncBatchNorm that stands where a BatchNorm2d was.
    """
    if norm is None:
        return {}
    if not isinstance(norm, (nn.BatchNorm2d, nn.InstanceNorm2d)):
        raise ValueError(f"norm_options: norm must be a BatchNorm2d or an InstanceNorm2d, got {norm}")
    options = {"norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}
    if isinstance(norm, nn.InstanceNorm2d) and not norm.track_running_stats:
        return {**options, "norm": "instance"}
    # an instance norm with running statistics is a batch norm in evaluation mode
    training, momentum = norm.training, norm.momentum
    if training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        momentum = 1.0 / float(norm.num_batches_tracked) if momentum is None else momentum
    if norm.track_running_stats or not training:
        options |= {"running_mean": norm.running_mean, "running_var": norm.running_var}
    return {
        **options,
        "norm": "batch",
        "training": training or norm.running_mean is None,
        "momentum": momentum or 0.0,
    }


def _is_plain(conv: Any, residual: Tensor | None) -> bool:
    return conv.norm is None and residual is None and conv.act == "none" and conv.dropout == 0


def _check(conv: Any) -> None:
    if _is_plain(conv, None):
        return
    name, norm, why = type(conv).__name__, conv.norm, refusal(conv)
    if why is not None:
        raise ValueError(f"{name}: with a norm, act or dropout the fused op does not take {why}")
    own = InstanceNorm2d.forward, nn.InstanceNorm2d.forward, nn.BatchNorm2d.forward
    known = norm is None or type(norm).forward in own
    if isinstance(norm, nn.InstanceNorm2d):
        known &= not norm.track_running_stats and getattr(norm, "act", "none") == "none"
    if not known:
        raise ValueError(
            f"{name}: norm must be BatchNorm2d, or InstanceNorm2d without running statistics, got {norm}"
        )


def _follow(conv: Any, x: Tensor, residual: Tensor | None) -> Tensor:
    dropout = conv.dropout if conv.training else 0.0
    return run_conv(x, conv, None, conv.norm, conv.act, conv.slope, dropout, residual)


def _extra_repr(conv: Any) -> str:
    return "" if conv.act == "none" and conv.dropout == 0 else f", act={conv.act}, dropout={conv.dropout}"


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


class MinibatchStd(nn.Module):
    """Adds a channel that holds how much the images of a batch differ (Karras et al. 2018, section 3).

    The standard deviation over the batch of every value, averaged over all of them: one number, everywhere.
    """

    mixes_batch = True

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C + 1, H, W)."""
        # under the root, so that equal images have a gradient
        spread = (x.float() if x.dtype == torch.bfloat16 else x).var(0, correction=0).add(1e-8).sqrt().mean()
        return torch.cat([x, spread.to(x.dtype).expand(len(x), 1, *x.shape[2:])], 1)


def spectral_norm(net: nn.Module) -> nn.Module:
    """Divide the weight of every convolution and linear layer by its largest singular value, in place
    (Miyato et al. 2018, arXiv 1802.05957); one power iteration a pass in training mode. Returns the network.
    """
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.utils.parametrizations.spectral_norm(module)
    return net


def skip_idle_biases(net: nn.Module) -> None:
    """Mark every convolution whose output goes straight into an instance norm."""
    for module in net.modules():
        if isinstance(module, nn.Sequential):
            for first, second in zip(module, list(module)[1:]):
                if isinstance(first, (Conv2d, ConvTranspose2d)) and isinstance(second, InstanceNorm2d):
                    first.idle_bias = True


@contextmanager
def frozen(nets: Iterable[nn.Module]) -> Iterator[None]:
    """No gradients for the parameters of `nets`: backward then computes input gradients only."""
    params = [p for net in nets for p in net.parameters() if p.requires_grad]
    for p in params:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in params:
            p.requires_grad_(True)


def place(net: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to a device and store its convolution weights NHWC, the layout its activations then
    follow."""
    return net.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
