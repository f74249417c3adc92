"""channel_layer_norm_act at the shapes of MUNIT's decoder at 256x256, with the ReLU that follows.

Peers: the release's form, with its two cases of one and of more images, as it is and under torch.compile; a
group norm of one group, a near relative (biased variance, eps under the root), which torch has as one op.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fastgan_kernels import channel_layer_norm_act
from torch import Tensor

# behind the 5x5 convolution of each upsampling
SHAPES = [(n, c, size, size) for c, size in ((128, 128), (64, 256)) for n in (1, 2, 4)]


def norm_upstream(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    # reshape where the release has view, which refuses channels_last
    if len(x) == 1:
        mean, std = x.reshape(-1).mean().view(1, 1, 1, 1), x.reshape(-1).std().view(1, 1, 1, 1)
    else:
        rows = x.reshape(len(x), -1)
        mean, std = rows.mean(1).view(-1, 1, 1, 1), rows.std(1).view(-1, 1, 1, 1)
    x = (x - mean) / (std + 1e-5)
    return F.relu(x * gamma.view(1, -1, 1, 1) + beta.view(1, -1, 1, 1), inplace=True)


def norm_group(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.relu(F.group_norm(x, 1, gamma, beta), inplace=True)


def norm_fastgan(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return channel_layer_norm_act(x, gamma, beta, act="relu")


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "triton": norm_fastgan,
    "upstream": norm_upstream,
    "compile": norm_upstream,
    "group_norm": norm_group,
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_channel_layer_norm_act(measure, shape, layout, dtype, direction, implementation):
    kind, memory_format = getattr(torch, dtype), getattr(torch, layout)
    x, dy = (
        torch.randn(shape, device="cuda", dtype=kind).contiguous(memory_format=memory_format)
        for _ in range(2)
    )
    gamma, beta = (torch.rand(shape[1], device="cuda", dtype=kind) for _ in range(2))
    leaves = [x.requires_grad_(), gamma.requires_grad_(), beta.requires_grad_()]
    function = IMPLEMENTATIONS[implementation]
    if implementation == "compile":
        function = torch.compile(function, dynamic=False)
    y = function(x, gamma, beta)
    # the floor: tensors of the size of x, each moved once. forward: x, y. backward: dy, x, dx. As the
    # statistics come before anything can be written, a tensor beyond the L2 cache is read twice: 3 and 5
    tensors = {"fwd": 2, "bwd": 3}[direction]

    def forward() -> None:
        with torch.no_grad():
            function(x, gamma, beta)

    calls = {"fwd": forward, "bwd": lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)}
    measure(
        calls[direction],
        op="channel_layer_norm_act",
        case=f"{'x'.join(map(str, shape))} relu {dtype} {layout}",
        direction=direction,
        implementation=implementation,
        bytes_moved=tensors * x.numel() * x.element_size(),
    )
