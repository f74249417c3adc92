"""adam_step on the parameters of pix2pix (unet_256 and its discriminator) and of CycleGAN's two ResNet-9.

Bytes that must move, per parameter in float32: read p, g, m, v, write p, m, v: 28; gradients in bfloat16: 26;
a copy of the parameters in bfloat16: 2 more, which the peers write in a pass of their own. Predictions at
4.3 TB/s, with copies and gradients in float32, not measured: pix2pix 0.40 ms, CycleGAN 0.16 ms.
"""

import pytest
import torch
from fastgan_kernels import adam_step
from torch import nn

from fastgan.models import PatchDiscriminator, ResnetGenerator, UnetGenerator

NETWORKS = {
    "pix2pix": lambda: [UnetGenerator(3, 3), PatchDiscriminator(6)],
    "cyclegan": lambda: [ResnetGenerator(3, 3) for _ in range(2)],
}
IMPLEMENTATIONS = ("triton", "torch", "foreach")
CASES = [
    pytest.param(name, copies, grad, marks=[pytest.mark.quick] if (name, copies) == ("pix2pix", True) else [])
    for name in NETWORKS
    for copies, grad in ((False, "float32"), (True, "float32"), (True, "bfloat16"))
]


def shapes(name: str) -> list[torch.Size]:
    with torch.device("meta"):
        nets: list[nn.Module] = NETWORKS[name]()
    return [p.shape for net in nets for p in net.parameters()]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name, copies, grad", CASES)
def bench_adam_step(measure, name, copies, grad, implementation):
    params = [torch.randn(s, device="cuda", requires_grad=True) for s in shapes(name)]
    halves = [torch.empty_like(p, dtype=torch.bfloat16) for p in params] if copies else []
    # torch's own Adam wants the gradients in the type of the parameters
    kind = getattr(torch, grad) if implementation == "triton" else torch.float32
    grads = [torch.randn_like(p).to(kind) for p in params]
    fused = implementation == "torch"
    adam = torch.optim.Adam(params, lr=torch.tensor(2e-4), fused=fused, foreach=not fused, capturable=True)
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    steps = [torch.zeros((), device="cuda") for _ in params]
    lr = torch.full((), 2e-4, device="cuda")
    for p, g in zip(params, grads):
        p.grad = g if implementation != "triton" else None

    @torch.no_grad()
    def ours() -> None:
        adam_step(params, grads, *moments, steps, lr, copies=halves)

    @torch.no_grad()
    def theirs() -> None:
        adam.step()
        if halves:
            torch._foreach_copy_(halves, params)

    count = sum(p.numel() for p in params)
    measure(
        ours if implementation == "triton" else theirs,
        op="adam_step",
        case=f"{name} {'with' if copies else 'without'} copies, gradients {grad}",
        direction="step",
        implementation=implementation,
        bytes_moved=count * (24 + (2 if grad == "bfloat16" else 4) + (2 if copies else 0)),
    )
