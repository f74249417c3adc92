"""What happens to each element between convolutions, in kernels and in torch: norm, activation, dropout."""
# mypy: disable-error-code="no-untyped-def"
# (only the kernels: Triton reads their annotations)

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import tl, triton

ACTIVATIONS = ("none", "relu", "leaky_relu", "tanh")


class Pointwise(NamedTuple):
    """The work that is still due on a raw convolution output z of N samples and C channels:

        y = dropout(act((z - mean) * rstd * weight + bias + residual))

    mean, rstd: (N, C) in the accumulator type, or None (no norm). weight, bias: (S, C) in the accumulator
    type, one row for each of S equal groups of samples, or None. dropout: probability. seed: (1,) int64.
    """

    mean: Tensor | None = None
    rstd: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    act: str = "none"
    slope: float = 0.2
    dropout: float = 0.0
    seed: Tensor | None = None


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type of sums and statistics."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@triton.jit
def activate(z, ACT: tl.constexpr, SLOPE: tl.constexpr):
    # written so that a NaN stays a NaN
    if ACT == "relu":
        z = tl.where(z <= 0, 0.0, z)
    elif ACT == "leaky_relu":
        z = tl.where(z > 0, z, z * SLOPE)
    elif ACT == "tanh":
        # of the absolute value, so that exp cannot overflow
        e = tl.exp(-2 * tl.abs(z))
        z = tl.where(z < 0, -1.0, 1.0) * (1 - e) / (1 + e)
    return z


@triton.jit
def activation_slope(z, OF_OUTPUT: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr):
    # act'(z); OF_OUTPUT: z is y = act(z), whose sign is the same
    one = tl.full(z.shape, 1.0, z.dtype)
    if ACT == "relu":
        return tl.where(z <= 0, 0.0, one)
    if ACT == "leaky_relu":
        return tl.where(z > 0, one, SLOPE)
    if ACT == "tanh":
        y = z if OF_OUTPUT else activate(z, "tanh", 0.0)
        return one - y * y
    return one


@triton.jit
def _mix(h):
    # "lowbias32" of C. Wellons' hash prospector
    h ^= h >> 16
    h *= 0x7FEB352D
    h ^= h >> 15
    h *= 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def keep(seed, index, THRESHOLD: tl.constexpr):
    """Whether dropout keeps element `index` (int64) of the contiguous NCHW tensor; THRESHOLD: p * 2 ** 32."""
    high = _mix((seed + (index >> 32) * 0x9E3779B1).to(tl.uint32))
    return _mix(index.to(tl.uint32) ^ high) >= THRESHOLD


def _mix_torch(h: Tensor) -> Tensor:
    h = h & 0xFFFFFFFF
    h = h ^ (h >> 16)
    h = (h * 0x7FEB352D) & 0xFFFFFFFF
    h = h ^ (h >> 15)
    # the factor has its highest bit set: in two halves, int64 cannot overflow
    h = ((h * 0x46CA68B) + ((h << 31) & 0xFFFFFFFF)) & 0xFFFFFFFF
    return h ^ (h >> 16)


def keep_mask(seed: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """The mask that `keep` gives, as a bool tensor of a contiguous (N, C, H, W) shape."""
    index = torch.arange(math.prod(shape), device=seed.device)
    high = _mix_torch(seed + (index >> 32) * 0x9E3779B1)
    return (_mix_torch(index ^ high) >= threshold(p)).view(*shape)


def threshold(p: float) -> int:
    return min(int(p * 2**32), 2**32 - 1)


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """torch's inverted dropout with the mask of `seed`."""
    return torch.where(keep_mask(seed, x.shape, p), x / (1 - p), 0.0)


def activation(z: Tensor, act: str, slope: float) -> Tensor:
    if act == "relu":
        return F.relu(z)
    if act == "leaky_relu":
        return F.leaky_relu(z, slope)
    return torch.tanh(z) if act == "tanh" else z
