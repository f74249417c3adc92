"""What conv_norm_act, conv_transpose_norm_act and residual_block share: checks, reference and registration.

Running statistics are updated and implementations chosen out here; the op itself is a function.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _block
from ._block import EXTERNAL, NONE, Layer, Parameters, Plan, Run, Saved
from ._op import INTERPRET, require, require_image, runs_kernel
from ._pointwise import ACTIVATIONS, accumulator, activation, dropout
from ._tune import bucket, bucket_count, choose
from .instance_norm_act import reference as instance_norm_reference

PADDINGS = ("zeros", "reflect", "replicate")
NORMS = ("none", "instance", "batch")


class Options(NamedTuple):
    """The keyword arguments that the three ops share."""

    norm: str
    training: bool
    momentum: float
    eps: float
    act: str
    slope: float
    dropout: float

    def check(self, op: str) -> None:
        require(self.norm in NORMS, op, "norm", f"one of {', '.join(NORMS)}", repr(self.norm))
        require(self.act in ACTIVATIONS, op, "act", f"one of {', '.join(ACTIVATIONS)}", repr(self.act))
        require(self.eps > 0, op, "eps", "> 0", self.eps)
        require(self.slope >= 0, op, "slope", ">= 0", self.slope)
        require(0 <= self.dropout < 1, op, "dropout", "in 0 <= p < 1", self.dropout)

    def layer_norm(self, running: bool) -> str:
        """The norm of a layer: a batch norm that is not trained has given statistics, if there are any."""
        return "fixed" if self.norm == "batch" and running and not self.training else self.norm


def stacked(
    op: str, name: str, x: Tensor, value: Tensor | None, dims: int, sets: int | None
) -> Tensor | None:
    """A parameter with its leading dimension of weight sets, (S, ...), in the device of x."""
    if value is None:
        return None
    require(value.device == x.device, op, name, f"on {x.device}", value.device)
    if value.dim() == dims:
        value = value.unsqueeze(0)
    rule = f"of {dims} dimensions, or {dims + 1} with the weight sets first"
    require(value.dim() == dims + 1, op, name, rule, f"shape {tuple(value.shape)}")
    if sets is not None:
        require(len(value) == sets, op, name, f"of {sets} weight sets", f"shape {tuple(value.shape)}")
    return value


def compute_type(x: Tensor) -> torch.dtype:
    """The type to compute in: autocast does not reach inside an op."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def single(
    op: str,
    x: Tensor,
    geometry: tuple[bool, int, int, int, str],
    tensors: Sequence[Tensor | None],
    options: Options,
    residual: Tensor | None,
    seed: Tensor | None,
    recompute: bool,
) -> Tensor:
    """An op of one layer. geometry: transposed, stride, pad, output_pad, mode. tensors: weight, bias,
    norm_weight, norm_bias, running_mean, running_var."""
    options.check(op)
    require_image(op, x)
    weight = stacked(op, "weight", x, tensors[0], 4, None)
    assert weight is not None
    sets = len(weight)
    bias, *of_norm = (
        stacked(op, name, x, value, 1, sets)
        for name, value in zip(
            ("bias", "norm_weight", "norm_bias", "running_mean", "running_var"), tensors[1:]
        )
    )
    channels = weight.shape[2 if geometry[0] else 1]
    for name, value in zip(
        ("bias", "norm_weight", "norm_bias", "running_mean", "running_var"), (bias, *of_norm)
    ):
        if value is not None:
            require(
                value.shape[1] == channels,
                op,
                name,
                f"for {channels} channels",
                f"shape {tuple(value.shape)}",
            )
    if options.norm != "batch":
        of_norm[2:] = None, None
    if options.norm == "none":
        of_norm = [None] * 4
    require(residual is None or options.dropout == 0, op, "dropout", "0 with a residual", options.dropout)
    lists = [[] if value is None else [value] for value in (weight, bias, *of_norm)]
    layer = Layer(
        *geometry, options.layer_norm(of_norm[2] is not None), options.act, options.slope, options.dropout,
        options.eps, NONE if residual is None else EXTERNAL, False,
    )  # fmt: skip
    return run(op, x, [layer], Parameters(*lists), options, residual, seed, recompute)


def run(
    op: str,
    x: Tensor,
    layers: Sequence[Layer],
    parameters: Parameters,
    options: Options,
    residual: Tensor | None = None,
    seed: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """Checks what all ops have in common, draws a seed, and computes: by the op where kernels run, else by
    the reference."""
    require_image(op, x)
    sets = len(parameters.weights[0])
    require(len(x) % sets == 0, op, "x", f"a batch that {sets} weight sets can share", f"{len(x)} samples")
    image = _check_sizes(op, x, layers, parameters)
    x = x.to(compute_type(x))
    if residual is not None:
        rule = f"of shape {(len(x), *image)}"
        require(residual.shape == (len(x), *image), op, "residual", rule, tuple(residual.shape))
        require(residual.device == x.device, op, "residual", f"on {x.device}", residual.device)
        residual = residual.to(x.dtype)
    if options.dropout > 0:
        if seed is None:
            seed = torch.randint(2**62, (1,), device=x.device)
        require(
            seed.dtype == torch.int64 and seed.shape == (1,),
            op,
            "seed",
            "(1,) int64",
            f"{seed.dtype} {tuple(seed.shape)}",
        )
        seed = seed + torch.arange(len(layers), device=seed.device)
    else:
        seed = None
    update = options.norm == "batch" and options.training and len(parameters.means) > 0
    if not runs_kernel(x):
        momentum = options.momentum if update else None
        return reference(x, residual, seed, parameters, Plan(tuple(layers), "all"), momentum)
    tensors = [x, residual, *(t for group in parameters.all() for t in group)]
    keep = "raw" if recompute else "all"
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        keep = "none"
    layers = _implementations(x, layers, parameters.weights)
    lists = [list(group) for group in parameters.all()]
    if update:
        # the op reads them only where they are given statistics
        lists[4:] = [], []
    overload = getattr(torch.ops.fastgan, op).default
    outputs = overload(x, residual, seed, *lists, Plan(tuple(layers), keep).text())
    if update:
        _update(x, layers, parameters, options, Saved.of(outputs, len(layers)))
    return outputs[0]


def _check_sizes(op: str, x: Tensor, layers: Sequence[Layer], parameters: Parameters) -> tuple[int, int, int]:
    """Raises where a layer does not fit the one before; returns the channels and the size of the output."""
    channels, height, width = x.shape[1:]
    for weight, layer in zip(parameters.weights, layers):
        outputs, inputs, kernel = (weight.shape[k] for k in ((2, 1, 3) if layer.transposed else (1, 2, 3)))
        require(weight.shape[3] == weight.shape[4], op, "weight", "square", f"shape {tuple(weight.shape)}")
        require(
            inputs == channels, op, "weight", f"for {channels} input channels", f"shape {tuple(weight.shape)}"
        )
        size = f"{height}x{width}"
        if layer.mode == "reflect":
            require(layer.pad < min(height, width), op, "padding", f"below the size {size}", layer.pad)
        require(min(height, width) > 0, op, "x", "at least one pixel", f"shape {tuple(x.shape)}")
        if not layer.transposed:
            smallest = min(height, width) + 2 * layer.pad
            require(smallest >= kernel, op, "x", f"at least as large, padded, as the kernel {kernel}", size)
            height, width = ((s + 2 * layer.pad - kernel) // layer.stride + 1 for s in (height, width))
        else:
            grow = kernel + layer.output_pad - 2 * layer.pad - layer.stride
            height, width = (s * layer.stride + grow for s in (height, width))
            require(min(height, width) > 0, op, "padding", "small enough to leave a pixel", layer.pad)
        channels = outputs
    return channels, height, width


class _Shape(NamedTuple):
    """A convolution as the launch table knows it: sizes and sample counts in buckets."""

    transposed: bool
    kernel: int
    stride: int
    pad: int
    output_pad: int
    mode: str
    norm: str
    inputs: int
    outputs: int
    height: int
    width: int
    samples: int
    sets: int
    dtype: str


def _plain(key: tuple[Any, ...], device: torch.device) -> bool:
    """Whether cuDNN takes a convolution (key: a _Shape): where ours has no tensor-core form of the type,
    where it was measured to be faster, and where nothing may be measured."""
    shape = _Shape(*key)
    if shape.kernel < shape.stride:
        return True
    if INTERPRET:
        return False
    if shape.dtype == "float64" or (shape.dtype == "float32" and not torch.backends.cudnn.allow_tf32):
        return True
    return choose("conv", shape, ("cudnn", "triton"), _trial(shape, device), device) == "cudnn"


# what torch.compiler.assume_constant_result does, without importing the compiler: two seconds at every start
_plain._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _implementations(x: Tensor, layers: Sequence[Layer], weights: Sequence[Tensor]) -> list[Layer]:
    found = []
    height, width = x.shape[2:]
    for layer, conv, weight in zip(layers, _block.convolutions(x.shape, weights, layers), weights):
        sets = len(weight)
        channels = (conv.outputs, conv.inputs) if layer.transposed else (conv.inputs, conv.outputs)
        shape = _Shape(
            layer.transposed, conv.kernel, conv.stride, conv.pad, layer.output_pad, conv.mode, layer.norm,
            *channels, bucket(height), bucket(width), bucket_count(len(x) // sets), sets,
            str(x.dtype).removeprefix("torch."),
        )  # fmt: skip
        found.append(layer._replace(plain=_plain(tuple(shape), x.device)))
        height, width = (conv.height, conv.width) if layer.transposed else (conv.out_h, conv.out_w)
    return found


def _trial(shape: _Shape, device: torch.device) -> Callable[[str], None]:
    """A function that runs the layer forward and backward by either implementation."""
    tensors: list[Tensor] = []

    def call(implementation: str) -> None:
        if not tensors:
            size = (shape.samples * shape.sets, shape.inputs, shape.height, shape.width)
            x = torch.randn(size, device=device, dtype=getattr(torch, shape.dtype))
            channels = (shape.inputs, shape.outputs) if shape.transposed else (shape.outputs, shape.inputs)
            weight = torch.randn((shape.sets, *channels, shape.kernel, shape.kernel), device=device)
            tensors.extend((x.contiguous(memory_format=torch.channels_last), weight))
        norm = shape.norm if shape.norm in ("instance", "batch") else "none"
        layer = Layer(
            shape.transposed, shape.stride, shape.pad, shape.output_pad, shape.mode, norm, "none", 0.0, 0.0,
            1e-5, NONE, implementation == "cudnn",
        )  # fmt: skip
        run = Run(tensors[0], None, None, Parameters([tensors[1]], (), (), (), (), ()), Plan((layer,), "all"))
        saved = _block.forward(run)
        _block.backward(run, saved, saved.y, True, True)

    return call


@torch.no_grad()
def _update(
    x: Tensor, layers: Sequence[Layer], parameters: Parameters, options: Options, saved: Saved
) -> None:
    """Moves the running statistics towards those of the batch, as torch's batch norm does."""
    images = _block.Run(x, None, None, parameters, Plan(tuple(layers), "all"))
    for i, (mean, variance) in enumerate(zip(parameters.means, parameters.variances)):
        size = len(x) // len(mean)
        if size == 0:
            continue
        pixels = size * images.image(i).height * images.image(i).width
        # every sample of a set carries the statistics of the set
        new_mean, rstd = (t[::size] for t in (saved.mean[i], saved.rstd[i]))
        new_variance = (rstd**-2 - options.eps) * (pixels / max(1, pixels - 1))
        if parameters.biases:
            # z lacks the idle bias, the running mean of torch's layer does not
            new_mean = new_mean + parameters.biases[i]
        mean.lerp_(new_mean.to(mean.dtype), options.momentum)
        variance.lerp_(new_variance.to(variance.dtype), options.momentum)


def reference(
    x: Tensor,
    residual: Tensor | None,
    seed: Tensor | None,
    parameters: Parameters,
    plan: Plan,
    momentum: float | None = None,
) -> Tensor:
    """The layers in torch functions; with a momentum, running statistics are updated in place."""
    inputs = [x]
    for i, layer in enumerate(plan.layers):
        parts = []
        for s, part in enumerate(_parts(inputs[-1], len(parameters.weights[i]))):
            own = Parameters(*([t[i][s]] if t else [] for t in parameters.all()))
            parts.append(_reference_norm(_reference_conv(part, own, layer), own, layer, momentum))
        z = parts[0] if len(parts) == 1 else torch.cat(parts)
        if layer.residual != NONE:
            z = z + (residual if layer.residual == EXTERNAL else inputs[layer.residual])  # type: ignore[operator]
        y = activation(z, layer.act, layer.slope)
        if seed is not None and layer.dropout > 0:
            y = dropout(y, layer.dropout, seed[i : i + 1])
        inputs.append(y)
    return inputs[-1]


def _parts(x: Tensor, sets: int) -> list[Tensor]:
    return list(x.split(len(x) // sets)) if len(x) and sets > 1 else [x] * sets


def _reference_conv(x: Tensor, own: Parameters, layer: Layer) -> Tensor:
    # under autocast torch casts the weight, once for all uses
    kind = x.device.type
    cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == x.dtype
    weight = own.weights[0] if cast else own.weights[0].to(x.dtype)
    if weight._base is not None:
        # one of several sets: torch's float64 convolution takes a slice in no other layout
        weight = weight.contiguous()
    # a norm takes a constant away again, except one with given statistics
    idle = not own.biases or layer.norm in ("instance", "batch")
    bias = None if idle else own.biases[0].to(weight.dtype)
    if layer.transposed:
        return F.conv_transpose2d(x, weight, bias, layer.stride, layer.pad, layer.output_pad)
    if layer.mode == "zeros":
        return F.conv2d(x, weight, bias, layer.stride, layer.pad)
    # autocast would turn a bfloat16 copy into three float32 passes
    with torch.autocast(kind, enabled=False):
        x = F.pad(x, (layer.pad,) * 4, mode=layer.mode)
    return F.conv2d(x, weight, bias, layer.stride)


def _reference_norm(z: Tensor, own: Parameters, layer: Layer, momentum: float | None) -> Tensor:
    if layer.norm == "none":
        return z
    kind = accumulator(z.dtype)
    weight, bias = (t[0].to(kind) if t else None for t in (own.norm_weights, own.norm_biases))
    if own.biases and layer.norm != "fixed":
        # the idle bias: its gradient is 0, not absent
        idle = 0 * own.biases[0].to(kind)
        bias = idle if bias is None else bias + idle
    if len(z) == 0:
        # torch's norms refuse it; the parameters still get a gradient, of 0
        for value in (weight, bias):
            z = z if value is None else z + value.view(1, -1, 1, 1).to(z.dtype)
        return z
    if layer.norm == "instance":
        return instance_norm_reference(z, weight, bias, None, layer.eps, "none", 0.0)
    mean = variance = None
    if own.means and (layer.norm == "fixed" or momentum is not None):
        # copies: batch_norm keeps them for its backward pass, and the originals are written below
        mean, variance = (t[0].to(kind, copy=layer.norm == "batch") for t in (own.means, own.variances))
    # not F.batch_norm: it refuses one value per channel, which an op need not
    train = layer.norm == "batch"
    y = torch.batch_norm(z, weight, bias, mean, variance, train, momentum or 0.0, layer.eps, True)
    if train and mean is not None and variance is not None:
        # z lacks the idle bias, the running mean of torch's layer does not
        shift = momentum * own.biases[0].detach() if own.biases else 0.0  # type: ignore[operator]
        own.means[0].copy_(mean + shift)
        own.variances[0].copy_(variance)
    return y
