"""reflect_pad2d at the shapes of the ResNet-9 generator of CycleGAN at 256x256."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fastgan_kernels import reflect_pad2d
from torch import Tensor

SHAPES = [
    ((1, 3, 256, 256), 3),  # image -> first 7x7 convolution
    ((1, 256, 64, 64), 1),  # in front of each 3x3 convolution of the residual blocks
    ((4, 256, 64, 64), 1),  # the same, both generators with the identity images
    ((1, 64, 256, 256), 3),  # in front of the last 7x7 convolution
]


def pad_torch(x: Tensor, pad: int) -> Tensor:
    return F.pad(x, (pad,) * 4, mode="reflect")


IMPLEMENTATIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "triton": reflect_pad2d,
    "torch": pad_torch,
    "compile": pad_torch,
}
# the layout and dtype of training, in the trunk
QUICK = (*SHAPES[2], "bfloat16", "channels_last")
CASES = [
    pytest.param(*case, marks=[pytest.mark.quick] if case == QUICK else [])
    for shape in SHAPES
    for dtype in ("bfloat16", "float32")
    for layout in ("contiguous_format", "channels_last")
    for case in [(*shape, dtype, layout)]
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("shape, pad, dtype, layout", CASES)
def bench_reflect_pad2d(measure, shape, pad, dtype, layout, direction, implementation):
    image = torch.randn(shape, device="cuda", dtype=getattr(torch, dtype))
    image = image.contiguous(memory_format=getattr(torch, layout))
    x = image.detach().requires_grad_()
    function = IMPLEMENTATIONS[implementation]
    if implementation == "compile":
        function = torch.compile(function, dynamic=False)
    y = function(x, pad)
    dy = torch.randn_like(y)
    calls = {
        "fwd": lambda: function(image, pad),
        "bwd": lambda: torch.autograd.grad(y, x, dy, retain_graph=True),
    }
    measure(
        calls[direction],
        op="reflect_pad2d",
        case=f"{'x'.join(map(str, shape))} pad {pad} {dtype} {layout}",
        direction=direction,
        implementation=implementation,
        # both directions read one of x and y and write the other
        bytes_moved=(x.numel() + y.numel()) * x.element_size(),
    )
