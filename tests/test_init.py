"""Initial weights: N(0, gain) and its alternatives, zero biases, batch-norm weights around one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from fastgan.models import PatchDiscriminator, UnetGenerator, init_weights


def _split(net: nn.Module) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Convolution weights, norm weights, biases."""
    convs = [p for p in net.parameters() if p.dim() == 4]
    norms = [p for name, p in net.named_parameters() if p.dim() == 1 and name.endswith("weight")]
    return convs, norms, [p for name, p in net.named_parameters() if name.endswith("bias")]


@pytest.mark.parametrize("gain", [None, 0.05])
def test_normal_init(gain):
    torch.manual_seed(0)
    net = UnetGenerator(3, 3, levels=6, ngf=16)
    for p in net.parameters():
        nn.init.constant_(p, 7.0)
    init_weights(net) if gain is None else init_weights(net, "normal", gain)
    std = gain or 0.02
    convs, norms, biases = _split(net)
    assert len(convs) == 12 and len(norms) == 9 and len(biases) == 10
    for p in convs:
        # the spread of a sample of n has relative error 1 / sqrt(2 n); five of those
        assert p.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * p.numel()))
        assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel())
    joined = torch.cat(norms)
    assert joined.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * len(joined)))
    assert abs(joined.mean().item() - 1) < 5 * std / math.sqrt(len(joined))
    # normal, not uniform: some weights lie beyond three standard deviations
    assert (torch.cat([p.flatten() for p in convs]).abs() > 3 * std).float().mean().item() == pytest.approx(
        0.0027, rel=0.2
    )
    assert all(torch.equal(p, torch.zeros_like(p)) for p in biases)


def test_xavier_init():
    torch.manual_seed(0)
    net = PatchDiscriminator(3, ndf=32)
    init_weights(net, "xavier", 0.5)
    for p in _split(net)[0][:-1]:
        fan_out, fan_in = p.shape[0] * p[0, 0].numel(), p[0].numel()
        std = 0.5 * math.sqrt(2 / (fan_in + fan_out))
        assert p.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * p.numel()))
    assert all(not p.any() for p in _split(net)[2])


def test_kaiming_init_ignores_the_gain():
    net = PatchDiscriminator(3, ndf=32)
    draws = []
    for gain in (0.02, 3.0):
        torch.manual_seed(0)
        init_weights(net, "kaiming", gain)
        draws.append([p.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*draws))
    for p in _split(net)[0][:-1]:
        assert p.std().item() == pytest.approx(math.sqrt(2 / p[0].numel()), rel=5 / math.sqrt(2 * p.numel()))


def test_orthogonal_init():
    torch.manual_seed(0)
    net = PatchDiscriminator(3, ndf=8).double()
    init_weights(net, "orthogonal", 0.3)
    for p in _split(net)[0]:
        rows = p.flatten(1)
        assert_close(rows @ rows.T, 0.09 * torch.eye(len(rows), dtype=torch.float64), rtol=1e-10, atol=1e-10)


def test_unknown_init_is_refused():
    with pytest.raises(ValueError):
        init_weights(PatchDiscriminator(1, ndf=2), "uniform")
