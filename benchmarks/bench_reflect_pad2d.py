"""reflect_pad2d at the shapes of the ResNet-9 generator of CycleGAN at 256x256.

Without a GPU, torch and the op (which is then its reference) run at one small shape.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fastgan_kernels import reflect_pad2d
from torch import Tensor

CUDA = torch.cuda.is_available()
SHAPES = [
    ((1, 3, 256, 256), 3),  # image -> first 7x7 convolution
    ((1, 256, 64, 64), 1),  # in front of each 3x3 convolution of the residual blocks
    ((4, 256, 64, 64), 1),  # the same, both generators with the identity images
    ((1, 64, 256, 256), 3),  # in front of the last 7x7 convolution
]
SMALL_SHAPES = [((1, 32, 32, 32), 1)]


def pad_torch(x: Tensor, pad: int) -> Tensor:
    return F.pad(x, (pad,) * 4, mode="reflect")


IMPLEMENTATIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "triton": reflect_pad2d,
    "reference": reflect_pad2d,
    "torch": pad_torch,
    "compile": torch.compile(pad_torch, dynamic=False),
}


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape, pad", SHAPES if CUDA else SMALL_SHAPES)
def bench_reflect_pad2d(measure, shape, pad, implementation, direction, dtype, layout):
    if implementation in ("triton", "compile") and not CUDA:
        pytest.skip("no GPU")
    if implementation == "reference" and CUDA:
        pytest.skip("serves the CPU")
    device = "cuda" if CUDA else "cpu"
    image = torch.randn(shape, device=device, dtype=getattr(torch, dtype))
    image = image.contiguous(memory_format=getattr(torch, layout))
    x = image.detach().requires_grad_()
    function = IMPLEMENTATIONS[implementation]
    y = function(x, pad)
    dy = torch.randn_like(y)
    # both directions read one of x and y and write the other
    bytes_moved = (x.numel() + y.numel()) * x.element_size()
    calls = {
        "fwd": lambda: function(image, pad),
        "bwd": lambda: torch.autograd.grad(y, x, dy, retain_graph=True),
    }
    name = "x".join(map(str, shape))
    measure(calls[direction], bytes_moved, f"reflect_pad2d {direction} {name} {dtype} {layout}")
