"""instance_norm_act at the shapes of CycleGAN's ResNet-9 generator and 70x70 PatchGAN at 256x256.

Without a GPU, torch and the op (which is then its reference) run at one small shape.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fastgan_kernels import instance_norm_act
from torch import Tensor

CUDA = torch.cuda.is_available()
# shape, activation, residual
SHAPES = [
    ((1, 64, 256, 256), "relu", False),  # generator: after the first and before the last 7x7 convolution
    ((1, 128, 128, 128), "relu", False),  # generator: after the first stride
    ((1, 256, 64, 64), "relu", False),  # generator: first convolution of a residual block
    ((1, 256, 64, 64), "none", True),  # generator: end of a residual block
    ((4, 256, 64, 64), "relu", False),  # the same, both generators with the identity images
    ((1, 128, 64, 64), "leaky_relu", False),  # PatchGAN
    ((1, 256, 32, 32), "leaky_relu", False),  # PatchGAN
    ((1, 512, 31, 31), "leaky_relu", False),  # PatchGAN
]
SMALL_SHAPES = [((1, 32, 32, 32), "relu", True)]


def norm_torch(x: Tensor, residual: Tensor | None, act: str) -> Tensor:
    z = F.instance_norm(x)
    if residual is not None:
        z = z + residual
    if act == "relu":
        return F.relu(z, inplace=True)
    return F.leaky_relu(z, 0.2, inplace=True) if act == "leaky_relu" else z


def norm_fastgan(x: Tensor, residual: Tensor | None, act: str) -> Tensor:
    return instance_norm_act(x, residual=residual, act=act)


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor | None, str], Tensor]] = {
    "triton": norm_fastgan,
    "reference": norm_fastgan,
    "torch": norm_torch,
    "compile": torch.compile(norm_torch, dynamic=False),
}


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape, act, has_residual", SHAPES if CUDA else SMALL_SHAPES)
def bench_instance_norm_act(measure, shape, act, has_residual, implementation, direction, dtype, layout):
    if implementation in ("triton", "compile") and not CUDA:
        pytest.skip("no GPU")
    if implementation == "reference" and CUDA:
        pytest.skip("serves the CPU")
    device = "cuda" if CUDA else "cpu"
    memory_format = getattr(torch, layout)
    x, residual, dy = (
        torch.randn(shape, device=device, dtype=getattr(torch, dtype)).contiguous(memory_format=memory_format)
        for _ in range(3)
    )
    leaves = [x, residual] if has_residual else [x]
    for leaf in leaves:
        leaf.requires_grad_()
    function = IMPLEMENTATIONS[implementation]
    given = residual if has_residual else None
    y = function(x, given, act)
    # tensors of the size of x. forward: x, residual, y. backward: dy, x, dx; y and dresidual too where a
    # residual meets an activation
    tensors = {"fwd": 2 + has_residual, "bwd": 3 + 2 * (has_residual and act != "none")}[direction]

    def forward() -> None:
        with torch.no_grad():
            function(x, given, act)

    calls = {"fwd": forward, "bwd": lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)}
    name = "x".join(map(str, shape)) + f" {act}" + " residual" * has_residual
    bytes_moved = tensors * x.numel() * x.element_size()
    measure(calls[direction], bytes_moved, f"instance_norm_act {direction} {name} {dtype} {layout}")
