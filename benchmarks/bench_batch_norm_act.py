"""batch_norm_act at the shapes of pix2pix's unet_256 generator and 70x70 PatchGAN at 256x256."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fastgan_kernels import batch_norm_act
from torch import Tensor

# shape, activation
SHAPES = [
    ((1, 128, 64, 64), "leaky_relu"),  # U-Net: second level down; PatchGAN
    ((1, 512, 16, 16), "leaky_relu"),  # U-Net: fourth level down
    ((1, 512, 4, 4), "relu"),  # U-Net: sixth level up
    ((1, 64, 128, 128), "relu"),  # U-Net: second level up
    ((4, 128, 64, 64), "leaky_relu"),  # batch 4
]


def norm_torch(x: Tensor, weight: Tensor, bias: Tensor, act: str) -> Tensor:
    z = F.batch_norm(x, None, None, weight, bias, training=True)
    return F.relu(z, inplace=True) if act == "relu" else F.leaky_relu(z, 0.2, inplace=True)


def norm_fastgan(x: Tensor, weight: Tensor, bias: Tensor, act: str) -> Tensor:
    return batch_norm_act(x, weight, bias, act=act)


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, str], Tensor]] = {
    "triton": norm_fastgan,
    "torch": norm_torch,
    "compile": norm_torch,
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("shape, act", SHAPES)
def bench_batch_norm_act(measure, shape, act, layout, dtype, direction, implementation):
    kind, memory_format = getattr(torch, dtype), getattr(torch, layout)
    x, dy = (
        torch.randn(shape, device="cuda", dtype=kind).contiguous(memory_format=memory_format)
        for _ in range(2)
    )
    # torch's norm takes its parameters in float32 beside a half type
    weight, bias = (torch.randn(shape[1], device="cuda") for _ in range(2))
    leaves = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    function = IMPLEMENTATIONS[implementation]
    if implementation == "compile":
        function = torch.compile(function, dynamic=False)
    y = function(x, weight, bias, act)
    # tensors of the size of x. forward: x, y. backward: dy, x, dx
    tensors = {"fwd": 2, "bwd": 3}[direction]

    def forward() -> None:
        with torch.no_grad():
            function(x, weight, bias, act)

    calls = {"fwd": forward, "bwd": lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)}
    measure(
        calls[direction],
        op="batch_norm_act",
        case=f"{'x'.join(map(str, shape))} {act} {dtype} {layout}",
        direction=direction,
        implementation=implementation,
        bytes_moved=tensors * x.numel() * x.element_size(),
    )
