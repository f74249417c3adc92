"""What a run computes is what its layers compute, whatever their settings and inputs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.testing import assert_close

from fastgan.accelerate import accelerate
from tests.accelerate_cases import (
    EXACT,
    Skip,
    SkipIntoInput,
    assert_same,
    batch,
    block,
    count_ops,
    generator,
    image,
    instance,
    pair,
)


def test_dropout(monkeypatch):
    """The mask is another one; how often it drops, its scale and where it acts are torch's."""
    calls = count_ops(monkeypatch)
    net = nn.Sequential(nn.Conv2d(1, 64, 1), nn.LeakyReLU(0.1), nn.Dropout(0.3))
    accelerate(net)
    x = torch.ones(4, 1, 32, 32)
    plain = F.leaky_relu(net[0](x), 0.1)
    y = net(x)
    dropped = y == 0
    # a share of 65536 draws: four standard deviations are 0.007
    assert abs(dropped.double().mean() - 0.3) < 0.01
    assert_close(y[~dropped], plain[~dropped] / 0.7)
    assert not torch.equal(net(x), y)
    assert_close(net.eval()(x), plain)
    assert calls["conv_norm_act"] == 3
    blocks = nn.Sequential(Skip(block(instance, drop=True)))
    accelerate(blocks)
    x = torch.randn(1, 4, 8, 8)
    assert not torch.equal(blocks(x), blocks(x))
    assert torch.equal(blocks.eval()(x), blocks(x))
    assert calls["residual_block"] == 4


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_convolutions(wrap, monkeypatch):
    calls = count_ops(monkeypatch)

    def make() -> nn.Module:
        return nn.Sequential(wrap(nn.Conv2d(3, 4, 3, padding=1)), nn.InstanceNorm2d(4), nn.ReLU()).double()

    torch.manual_seed(0)
    net = make().train()
    twin = copy.deepcopy(net)
    accelerate(net)
    assert_same(net, twin, image(2, 3, 8, 8))
    assert calls.total() == 1
    # set later, it is noticed: the class of the convolution is another one
    late = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.ReLU()).double()
    accelerate(late)
    wrap(late[0])
    late.load_state_dict(twin.state_dict())
    assert_close(late.eval()(image(2, 3, 8, 8)), twin.eval()(image(2, 3, 8, 8)), **EXACT)


def test_instance_norm_with_running_statistics(monkeypatch):
    calls = count_ops(monkeypatch)

    def norm(c: int) -> nn.Module:
        return nn.InstanceNorm2d(c, affine=True, track_running_stats=True)

    make = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), Skip(block(norm)))  # noqa: E731
    net, twin, report = pair(make)
    note = "in evaluation mode only, torch updates its running statistics"
    assert [entry.reason for entry in report.swapped] == [note, note]
    for training, ops in ((True, 0), (False, 2)):
        net.train(training)
        twin.train(training)
        calls.clear()
        assert_same(net, twin, image(2, 3, 8, 8))
        assert calls.total() == ops


def test_a_frozen_norm_among_trained_ones():
    net, twin, _ = pair(lambda: nn.Sequential(Skip(block(batch)), Skip(block(batch))))
    for model in (net, twin):
        model[1].body[5].eval()
    assert_same(net, twin, image(2, 4, 8, 8))


@pytest.mark.parametrize("track", [True, False])
def test_batch_norm_without_running_statistics(track):
    def make() -> nn.Module:
        norm = nn.BatchNorm2d(4, affine=False, track_running_stats=track)
        return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Tanh())

    net, twin, _ = pair(make)
    for model in (net, twin):
        model[1].track_running_stats = False
    for training in (True, False):
        net.train(training)
        twin.train(training)
        assert_same(net, twin, image(2, 3, 8, 8))


class Added(nn.Module):
    """act(norm(conv(x)) + other), with whatever other is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.InstanceNorm2d(4)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.tanh(torch.add(other, self.norm(self.conv(x))))


class AddedLast(Added):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + other


@pytest.mark.parametrize("shape", [(2, 4, 6, 6), (1, 4, 1, 1), ()])
@pytest.mark.parametrize("make", [Added, AddedLast])
def test_added_tensors_broadcast(make, shape):
    net, twin, report = pair(make)
    act = " + tanh" if make is Added else ""
    assert [entry.what for entry in report.swapped] == ["conv 3x3 + instance norm + residual" + act]
    x, other = image(2, 3, 6, 6), image(*shape)
    assert_close(net(x, other), twin(x, other), **EXACT)
    # torch's add promotes
    y = net.float()(x.float(), other)
    assert y.dtype == (torch.float64 if shape else torch.float32)
    assert_close(y, twin.float()(x.float(), other), rtol=1e-5, atol=1e-5)


def test_an_input_changed_in_place_is_changed_as_before():
    net, twin, report = pair(lambda: SkipIntoInput(block(instance)))
    assert "residual" not in str(report)
    x, y = image(1, 4, 8, 8), image(1, 4, 8, 8)
    assert_close(net(x), twin(y), **EXACT)
    assert_close(x, y, **EXACT)
    assert not torch.equal(x, image(1, 4, 8, 8))


class Between(nn.Module):
    """The shortcut works in place on what the convolution has read before."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.shortcut = nn.Sequential(nn.ReLU(inplace))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return y + self.shortcut(x)


def test_nothing_moves_past_work_in_place():
    net, twin, report = pair(lambda: Between(True))
    assert [entry.what for entry in report.swapped] == ["conv 3x3 + batch norm"]
    # torch itself refuses the gradient of this network
    assert_close(net(image(2, 3, 8, 8)), twin(image(2, 3, 8, 8)), **EXACT)
    net, twin, report = pair(lambda: Between(False))
    assert [entry.what for entry in report.swapped] == ["conv 3x3 + batch norm"]


class Readers(nn.Module):
    """What the first convolution and its norm return is read twice, the second time after work in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.tail = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.act = nn.ReLU(True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.norm(y)
        first = self.tail(z)
        return self.act(z) * y + self.act(first)


def test_values_that_others_read_stay():
    net, twin, report = pair(Readers)
    assert not report.swapped
    assert_close(net(image(2, 3, 8, 8)), twin(image(2, 3, 8, 8)), **EXACT)


@pytest.mark.parametrize(
    "body",
    [
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1)),
        nn.Sequential(nn.ReflectionPad2d(2), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)),
        nn.Sequential(nn.Conv2d(4, 2, 2, padding=1), nn.ReLU(), nn.Conv2d(2, 4, 2)),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3, 1, 1)),
    ],
)
def test_bodies_that_are_no_residual_block(body):
    net, twin, report = pair(lambda: Skip(body))
    assert "residual block" not in str(report)
    assert_same(net, twin, image(2, 4, 8, 8))


def test_bodies_with_odd_halves():
    """Halves that differ are residual blocks to the report, and run one by one."""
    norms = nn.InstanceNorm2d(6, affine=True), nn.InstanceNorm2d(4, eps=1e-2)
    convs = nn.Conv2d(4, 6, 5, padding=2), nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect", bias=False)
    net, twin, report = pair(lambda: Skip(nn.Sequential(convs[0], norms[0], nn.Tanh(), convs[1], norms[1])))
    assert "1 residual block of" in str(report)
    assert_same(net, twin, image(2, 4, 8, 8))


class AddedAndDropped(Added):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.drop(torch.tanh(self.norm(self.conv(x)) + other))


def test_dropout_behind_a_residual_stays_torchs():
    net = AddedAndDropped()
    net.drop = nn.Dropout(0.5)
    assert "dropout" not in str(accelerate(net))
    x, other = torch.randn(2, 3, 6, 6), torch.randn(2, 4, 6, 6)
    torch.manual_seed(0)
    first = net(x, other)
    torch.manual_seed(0)
    plain = torch.tanh(net.norm(net.conv(x)) + other)
    assert_close(first, F.dropout(plain, 0.5))


class TwoBlocks(nn.Module):
    """Two residual blocks; something else reads what the first returns, or works in place on what it read."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.first, self.second = Skip(block(instance)), Skip(block(instance))
        self.act, self.inplace = nn.ReLU(True), inplace

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        other = self.act(x) if self.inplace else torch.tanh(y)
        return torch.cat([self.second(y), other], 1)


@pytest.mark.parametrize("inplace", [False, True])
def test_blocks_are_not_joined_around_others(inplace):
    net, twin, report = pair(lambda: TwoBlocks(inplace))
    assert [entry.path for entry in report.swapped] == ["first", "second"]
    x, y = image(2, 4, 8, 8), image(2, 4, 8, 8)
    assert_close(net(x), twin(y), **EXACT)
    assert torch.equal(x, y)


def test_layouts_and_ranks():
    net, twin, _ = pair(lambda: generator(instance).to(memory_format=torch.channels_last))
    x = image(2, 3, 12, 16)
    assert net(x).is_contiguous(memory_format=torch.channels_last)
    assert_same(net, twin, x)
    assert_close(net(x[0]), twin(x[0]), **EXACT)
    net, twin, _ = pair(lambda: Added())
    assert_close(net(x[0], image(4, 12, 16)), twin(x[0], image(4, 12, 16)), **EXACT)


def test_autocast():
    torch.manual_seed(0)
    net = generator(instance)
    twin = copy.deepcopy(net)
    accelerate(net)
    x = torch.randn(1, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = net(x), twin(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits, and tanh does not exceed 1: a few roundings of 0.004
    assert_close(y, expected, rtol=0, atol=0.05)
