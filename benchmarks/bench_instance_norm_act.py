"""instance_norm_act at the shapes of CycleGAN's ResNet-9 generator and 70x70 PatchGAN at 256x256."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fastgan_kernels import instance_norm_act
from torch import Tensor

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
    "torch": norm_torch,
    "compile": norm_torch,
}
# the layout and dtype of training, at an end of a generator and in its trunk
QUICK = [(*SHAPES[i], "bfloat16", "channels_last") for i in (0, 4)]
CASES = [
    pytest.param(*case, marks=[pytest.mark.quick] if case in QUICK else [])
    for shape in SHAPES
    for dtype in ("bfloat16", "float32")
    for layout in ("contiguous_format", "channels_last")
    for case in [(*shape, dtype, layout)]
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("shape, act, has_residual, dtype, layout", CASES)
def bench_instance_norm_act(measure, shape, act, has_residual, dtype, layout, direction, implementation):
    x, residual, dy = (
        torch.randn(shape, device="cuda", dtype=getattr(torch, dtype)).contiguous(
            memory_format=getattr(torch, layout)
        )
        for _ in range(3)
    )
    leaves = [x, residual] if has_residual else [x]
    for leaf in leaves:
        leaf.requires_grad_()
    function = IMPLEMENTATIONS[implementation]
    if implementation == "compile":
        function = torch.compile(function, dynamic=False)
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
    measure(
        calls[direction],
        op="instance_norm_act",
        case=f"{name} {dtype} {layout}",
        direction=direction,
        implementation=implementation,
        bytes_moved=tensors * x.numel() * x.element_size(),
    )
