"""What the tests of the convolution ops share: the formula, written with torch's plainest functions, and the
comparison with it."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from fastgan_kernels._op import INTERPRET, runs_kernel
from torch import Tensor

Tensors = dict[str, Tensor]
# the interpreter multiplies the bits of bfloat16
HALVES = [torch.float16] if INTERPRET else [torch.float16, torch.bfloat16]


def case_id(values: tuple[object, ...]) -> str:
    """A name that stays the same when cases are added."""
    return "_".join(map(str, values))


def pad(x: Tensor, size: int, mode: str) -> Tensor:
    return F.pad(x, (size,) * 4, mode={"zeros": "constant"}.get(mode, mode)) if size else x


def of_set(tensor: Tensor | None, dims: int, sample: int, samples: int) -> Tensor | None:
    """The parameter of the weight set that a sample belongs to."""
    if tensor is None or tensor.dim() == dims:
        return tensor
    return tensor[sample // (samples // len(tensor))]


def normalise(
    z: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, sets: int, eps: float = 1e-5
) -> Tensor:
    """Instance norm, or batch norm of each weight set, with (C,) or (S, C) weight and bias."""
    if kind == "none" or len(z) == 0:
        return z
    if kind == "instance":
        mean = z.mean((2, 3), keepdim=True)
        variance = (z - mean).square().mean((2, 3), keepdim=True)
    else:
        groups = z.view(sets, -1, *z.shape[1:])
        mean = groups.mean((1, 3, 4), keepdim=True)
        variance = (groups - mean).square().mean((1, 3, 4), keepdim=True)
        mean, variance = (t.expand_as(groups[:, :, :, :1, :1]).flatten(0, 1) for t in (mean, variance))
    y = (z - mean) / (variance + eps).sqrt()
    for value, join in ((weight, torch.mul), (bias, torch.add)):
        if value is not None:
            per_sample = torch.stack([of_set(value, 1, i, len(z)) for i in range(len(z))])
            y = join(y, per_sample[:, :, None, None])
    return y


def act(z: Tensor, kind: str) -> Tensor:
    return {"none": z, "relu": F.relu(z), "leaky_relu": F.leaky_relu(z, 0.2), "tanh": torch.tanh(z)}[kind]


def per_sample(x: Tensor, weight: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A convolution sample by sample, each with the weight of its set."""
    if len(x) == 0:
        return function(x, weight if weight.dim() == 4 else weight[0])
    return torch.cat([function(x[i : i + 1], of_set(weight, 4, i, len(x))) for i in range(len(x))])


def bias_of(bias: Tensor | None, z: Tensor) -> Tensor:
    if bias is None or len(z) == 0:
        return z
    return z + torch.stack([of_set(bias, 1, i, len(z)) for i in range(len(z))])[:, :, None, None]


def assert_matches(
    op: Callable[[Tensors], Tensor], formula: Callable[[Tensors], Tensor], tensors: Tensors, tolerance: float
) -> None:
    """y and every gradient against the formula in float64, both relative to the largest value."""
    own = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    exact = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    y, y64 = op(own), formula(exact)
    assert y.shape == y64.shape
    assert y.dtype == tensors["x"].dtype
    dy = torch.randn(y.shape, device=y.device).to(y.dtype)
    found = torch.autograd.grad(y, list(own.values()), dy)
    expected = torch.autograd.grad(
        y64, list(exact.values()), dy.double(), allow_unused=True, materialize_grads=True
    )
    for name, a, b in zip(["y", *tensors], (y, *found), (y64, *expected)):
        scale = b.abs().max().clamp(min=1).item() if b.numel() else 1.0
        where = partial("{}: {}".format, name)
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * scale, msg=where)
    layout = torch.contiguous_format if own["x"].is_contiguous() else torch.channels_last
    assert y.is_contiguous(memory_format=layout)
    # torch's own autograd follows dy
    assert not runs_kernel(y) or found[0].is_contiguous(memory_format=layout)
