import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from fastgan import stack
from fastgan.layers import ChannelLayerNorm
from fastgan.models import PatchDiscriminator, ResnetGenerator, UnetGenerator
from fastgan.stack import run_layers, run_together, stackable

MAKERS = {
    "resnet": lambda norm: ResnetGenerator(3, 3, ngf=3, blocks=2, norm=norm),
    "resnet zero": lambda norm: ResnetGenerator(3, 2, ngf=2, blocks=1, norm=norm, padding="zero"),
    "unet": lambda norm: UnetGenerator(3, 3, ngf=3, levels=3, norm=norm),
    "encdec": lambda norm: UnetGenerator(3, 3, ngf=3, levels=3, norm=norm, skips=False),
    "patchgan": lambda norm: PatchDiscriminator(3, ndf=3, receptive_field=34, norm=norm),
    "pixelgan": lambda norm: PatchDiscriminator(3, ndf=3, receptive_field=1, norm=norm),
}


def pair(name: str, norm: str, dtype: torch.dtype = torch.float64) -> list[nn.Module]:
    torch.manual_seed(0)
    nets = [MAKERS[name](norm).to(dtype) for _ in range(2)]
    for net in nets:
        for p in net.parameters():
            nn.init.normal_(p, 0.0, 0.3)
    return nets


def gradients(outputs: list[Tensor], nets: list[nn.Module], inputs: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    leaves = inputs + [p for net in nets for p in net.parameters()]
    dy = [torch.randn(y.shape, dtype=y.dtype) for y in outputs]
    return list(torch.autograd.grad(outputs, leaves, dy, allow_unused=True, materialize_grads=True))


def test_a_layer_norm_keeps_its_own_parameters():
    torch.manual_seed(0)
    nets = [
        nn.Sequential(nn.Conv2d(2, 3, 3), ChannelLayerNorm(3, act="relu"), nn.Conv2d(3, 1, 1)).double()
        for _ in range(2)
    ]
    inputs = [torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True) for _ in nets]
    expected = [net(x) for net, x in zip(nets, inputs)]
    found = list(run_layers(nets, torch.cat(inputs)).chunk(2))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    pair = gradients(found, nets, inputs), gradients(expected, nets, inputs)
    torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["instance", "none"])
@pytest.mark.parametrize("name", MAKERS)
def test_stack_is_the_networks_one_by_one(name, norm, monkeypatch):
    nets = pair(name, norm)
    inputs = [torch.randn(2, 3, 16, 24, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    expected = [nets[0](inputs[0]), nets[0](inputs[1]), nets[1](inputs[2]), nets[1](inputs[3])]
    passes = []
    run = stack.run_layers
    monkeypatch.setattr(
        stack, "run_layers", lambda lines, *args: passes.append(len(lines)) or run(lines, *args)
    )
    found = run_together([(nets[0], inputs[:2]), (nets[1], inputs[2:])], stack=True)
    # a level of a U-Net runs its inside by the same function
    assert set(passes) == {2}
    found = [y for outputs in found for y in outputs]
    for a, b in zip(found, expected):
        # float64: sums in another order
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    for a, b in zip(gradients(found, nets, inputs), gradients(expected, nets, inputs)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
@pytest.mark.parametrize("name", MAKERS)
def test_fused_layers_are_the_network(name, norm):
    """What a GPU runs for a single network, running statistics included."""
    nets = pair(name, norm)
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    expected, found = nets[0](x), run_layers([nets[1].line], x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    for (key, a), b in zip(nets[1].state_dict().items(), nets[0].state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=key)
    for net in nets:
        net.eval()
    torch.testing.assert_close(run_layers([nets[1].line], x), nets[0](x), rtol=0, atol=1e-11)


def test_batch_norm_never_sees_two_batches():
    nets = pair("patchgan", "batch")
    real, fake = (torch.randn(2, 3, 16, 16, dtype=torch.float64) + shift for shift in (0, 5))
    (found,) = run_together([(nets[0], [real, fake])])
    for x, y in zip((real, fake), found):
        torch.testing.assert_close(y, nets[0](x), rtol=0, atol=1e-12)
    assert not stackable(nets)


def test_instance_norm_takes_batches_as_one(monkeypatch):
    (net, _) = pair("patchgan", "instance")
    seen = []
    net.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    xs = [torch.randn(n, 3, 16, 16, dtype=torch.float64) for n in (1, 3)]
    (found,) = run_together([(net, xs)])
    assert seen == [4]
    assert [len(y) for y in found] == [1, 3]
    run_together([(net, [xs[0], xs[1][..., :12]])])
    assert seen[1:] == [1, 3]  # another size: another pass


def test_only_equal_architectures_stack():
    a, b = pair("resnet", "instance")
    assert stackable([a, b])
    assert not stackable([a, pair("resnet zero", "instance")[0]])
    assert not stackable([a, ResnetGenerator(3, 3, ngf=4, blocks=2).double()])
    b.model[1].register_forward_hook(lambda *_: None)
    assert not stackable([a, b])


KERNELS = """
import torch
from fastgan.models import PatchDiscriminator, ResnetGenerator, UnetGenerator
from fastgan.stack import run_together
torch.manual_seed(0)
for make in (
    lambda: ResnetGenerator(3, 3, ngf=3, blocks=1),
    lambda: UnetGenerator(3, 3, ngf=3, levels=2, norm="instance"),
    lambda: PatchDiscriminator(3, ndf=3, receptive_field=16),
):
    nets = [make().double() for _ in range(2)]
    xs = [torch.randn(1, 3, 8, 12, dtype=torch.float64, requires_grad=True) for _ in nets]
    leaves = xs + [p for net in nets for p in net.parameters()]
    found = [y for (y,) in run_together([(net, [x]) for net, x in zip(nets, xs)])]
    expected = [net.line[0](x) if len(net.line) == 1 else net.line(x) for net, x in zip(nets, xs)]
    dy = [torch.randn_like(y) for y in expected]
    options = {"allow_unused": True, "materialize_grads": True}
    grads = [torch.autograd.grad(ys, leaves, dy, **options) for ys in (found, expected)]
    for a, b in zip([*found, *grads[0]], [*expected, *grads[1]]):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    print("ok")
"""


def test_whole_networks_through_the_kernels():
    """Two networks in one pass through the Triton kernels, in the interpreter, against their layers."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-c", KERNELS],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.stdout.split() == ["ok"] * 3, run.stdout + run.stderr[-3000:]
