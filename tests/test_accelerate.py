"""Networks of somebody else with fused ops: same outputs, gradients, state; an honest report; a way back."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import fastgan
from fastgan.accelerate import accelerate
from tests.accelerate_cases import (
    EXACT,
    NETWORKS,
    Cell,
    Level,
    Skip,
    SkipLast,
    affine,
    assert_same,
    batch,
    block,
    cells,
    count_ops,
    generator,
    image,
    instance,
    lively,
    pair,
)


@pytest.mark.parametrize("name", NETWORKS)
def test_same_function(name, monkeypatch):
    calls = count_ops(monkeypatch)
    make, shape, ops = NETWORKS[name]
    net, twin, _ = pair(make)
    for training in (True, False, True):
        net.train(training)
        twin.train(training)
        calls.clear()
        assert_same(net, twin, image(*shape))
        assert calls.total() == ops


@pytest.mark.parametrize("name", NETWORKS)
def test_state_and_undo(name):
    make, shape, _ = NETWORKS[name]
    net, twin, report = pair(make)
    before = {path: type(m) for path, m in twin.named_modules()}
    assert repr(net) == repr(twin)
    assert list(net.state_dict()) == list(twin.state_dict())
    assert [n for n, _ in net.named_modules()] == [n for n, _ in twin.named_modules()]
    other = {k: v + 1 if v.is_floating_point() else v for k, v in twin.state_dict().items()}
    net.load_state_dict(other, strict=True)
    twin.load_state_dict(other, strict=True)
    assert_same(net, twin, image(*shape))
    report.undo()
    report.undo()
    assert {path: type(m) for path, m in net.named_modules()} == before
    assert all(set(vars(a)) == set(vars(b)) for a, b in zip(net.modules(), twin.modules()))
    assert torch.equal(net(image(*shape)), twin(image(*shape)))
    assert str(accelerate(net)) == str(report)


def test_report():
    net = generator(instance)
    net.add_module("last", nn.Sequential(Cell(3, 4, 3, 1, nn.GroupNorm(1, 4), "relu"), nn.Conv2d(4, 1, 1)))
    report = accelerate(net)
    assert str(report) == (
        "swapped\n"
        "  1            reflect pad 3 + conv 7x7 + instance norm + relu\n"
        "  4            conv 3x3 stride 2 + instance norm + relu\n"
        "  7 ... 8      2 residual blocks of reflect pad 1 + conv 3x3 + instance norm + relu"
        " + reflect pad 1 + conv 3x3 + instance norm\n"
        "  9            transposed conv 3x3 stride 2 + instance norm + relu\n"
        "  13           replicate pad 1 + conv 3x3\n"
        "  15           zero pad 1 + conv 3x3 + tanh\n"
        "  last.0.conv  reflect pad 1 + conv 3x3: last.0.norm is not taken, GroupNorm\n"
        "left\n"
        "  last.0.norm  GroupNorm: not a norm that the ops have\n"
        "  last.1       conv 1x1: nothing to fuse\n"
        "swapped 7 runs (28 modules), left 2"
    )
    assert report.swapped[0].path == "1"
    assert report.swapped[0].modules == ("0", "1", "2", "3")
    assert (
        str(accelerate(nn.Conv2d(3, 3, 3))) == "left\n    conv 3x3: alone\nswapped 0 runs (0 modules), left 1"
    )


def test_it_says_that_dropout_differs():
    report = accelerate(nn.Sequential(Skip(block(instance, drop=True))))
    assert [entry.reason for entry in report.swapped] == ["dropout draws its own mask"]


class Odd(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).abs()


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.InstanceNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.conv.weight))


def _hooked() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU())
    net[0].register_forward_hook(lambda *args: None)
    return net


def _old_spectral_norm() -> nn.Module:
    return nn.Sequential(torch.nn.utils.spectral_norm(nn.Conv2d(3, 3, 3)), nn.ReLU())


def _conv(*args: object, **kwargs: object) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(4, 4, *args, **kwargs), nn.ReLU())


REFUSED = {
    "groups=2, dilation=(1, 1)": _conv(3, groups=2),
    "groups=1, dilation=(2, 2)": _conv(3, dilation=2),
    "kernel_size=(1, 3), stride=(1, 1)": _conv((1, 3)),
    "kernel_size=(9, 9), stride=(1, 1)": _conv(9),
    "kernel_size=(3, 3), stride=(3, 3)": _conv(3, 3),
    "kernel_size=(3, 3), stride=(1, 2)": _conv(3, (1, 2)),
    "padding=(1, 0)": _conv(3, padding=(1, 0)),
    "padding='same'": _conv(4, padding="same"),
    "padding_mode='circular'": _conv(3, padding=1, padding_mode="circular"),
    "output_padding=(1, 0)": lambda: nn.Sequential(
        nn.ConvTranspose2d(3, 3, 3, 2, output_padding=(1, 0)), nn.ReLU()
    ),
    "padding=(1, 0, 1, 0)": lambda: nn.Sequential(nn.ZeroPad2d((1, 0, 1, 0)), nn.Conv2d(3, 3, 3)),
    "has hooks": _hooked,
    "has hooks ": _old_spectral_norm,
    "a subclass with a forward of its own": lambda: nn.Sequential(Odd(3, 3, 3), nn.ReLU()),
    "nothing to fuse": lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Sigmoid(), nn.Dropout2d()),
    "not a norm that the ops have": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4)),
    "no convolution that can be fused goes directly before": lambda: nn.Sequential(
        nn.Conv2d(3, 3, 3), nn.PReLU(), nn.BatchNorm2d(3)
    ),
    "no convolution without padding follows directly": lambda: nn.Sequential(
        nn.ReflectionPad2d(1), nn.Conv2d(3, 3, 3, padding=1)
    ),
    "not called by the forward of the model": Unused,
    "no convolution in 1": lambda: nn.Sequential(nn.Conv2d(3, 3, 3), nn.Sequential(nn.BatchNorm2d(3))),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason):
    report = accelerate(REFUSED[reason]())
    assert not report.swapped
    reasons = [entry.reason.removeprefix("the ops do not take ") for entry in report.left]
    assert reason.strip() in reasons


@pytest.mark.parametrize("name", ["has hooks ", "padding=(1, 0, 1, 0)", "nothing to fuse"])
def test_refused_layers_still_work(name):
    net = lively(REFUSED[name]()).eval()
    twin = copy.deepcopy(net)
    accelerate(net)
    assert torch.equal(net(image(1, 3, 8, 8)), twin(image(1, 3, 8, 8)))


# what a user may do afterwards


def test_layers_called_one_by_one_are_the_original_ones():
    net, twin, _ = pair(lambda: generator(instance))
    x = y = image(1, 3, 12, 16)
    for a, b in zip(net[:9], twin[:9]):
        x, y = a(x), b(y)
        assert_close(x, y, **EXACT)
    assert torch.equal(net[:7](image(1, 3, 12, 16)), twin[:7](image(1, 3, 12, 16)))
    assert torch.equal(net[4:7](x), twin[4:7](x))


def test_a_hook_set_later_is_called(monkeypatch):
    calls = count_ops(monkeypatch)
    net, twin, _ = pair(lambda: generator(instance))
    x = image(1, 3, 12, 16)
    seen = []
    # what is fused below the module whose run a hook keeps from being one
    for path, ops in {"1": 2, "7": 2, "7.body": 3, "8.body.2": 1}.items():
        handle = net.get_submodule(path).register_forward_hook(lambda m, args, y, p=path: seen.append(p))
        calls.clear()
        assert_close(net(x), twin(x), **EXACT)
        assert seen == [path]
        assert calls.total() == ops
        handle.remove()
        seen.clear()
    calls.clear()
    net(x)
    assert calls.total() == 6


@pytest.mark.parametrize(
    ("hooked", "blocks"), [("7", ["7", "8"]), ("8.body", ["7", "8.body.1", "8.body.5"]), ("8", ["7", "8"])]
)
def test_a_hook_set_before_keeps_its_module_out(hooked, blocks, monkeypatch):
    """A module with a hook of its own is fused inside, and not joined with others."""
    calls, seen = count_ops(monkeypatch), []
    net = lively(generator(instance))
    twin = copy.deepcopy(net)
    net.get_submodule(hooked).register_forward_hook(lambda m, args, y: seen.append(hooked))
    report = accelerate(net)
    assert [entry.path for entry in report.swapped] == ["1", "4", *blocks, "9", "13", "15"]
    assert_close(net(image(2, 3, 12, 16)), twin(image(2, 3, 12, 16)), **EXACT)
    assert seen == [hooked]
    assert calls.total() == len(report.swapped)


class Choosing(nn.Module):
    """Branches on a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.on = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), True

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return torch.tanh(x) if self.on else x


class ChoosingBody(nn.Sequential):
    """The body of a block that branches on a plain attribute."""

    on = True

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x if self.on else x * 2


def _changing() -> nn.Module:
    blocks = SkipLast(block(instance)), Skip(ChoosingBody(*block(instance)))
    return nn.Sequential(*cells()[:2], *blocks, nn.Conv2d(4, 3, 1), nn.ReLU(), Choosing())


CHANGES = {
    "layer": lambda net: setattr(net[0], "conv", nn.Conv2d(3, 4, 7).double()),
    "another kind of layer": lambda net: setattr(net[0], "act", nn.PReLU().double()),
    "no norm": lambda net: setattr(net[1], "norm", None),
    "forward of a layer": lambda net: setattr(net[0].act, "forward", torch.sigmoid),
    "appended": lambda net: net.append(nn.Sigmoid()),
    "appended to a block": lambda net: net[2].body.append(nn.Sigmoid()),
    "norm over all processes": nn.SyncBatchNorm.convert_sync_batchnorm,
    "branch": lambda net: setattr(net[6], "on", False),
    "branch in a block": lambda net: setattr(net[3].body, "on", False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_changed_later_is_noticed(change):
    net, twin, report = pair(_changing)
    assert [entry.path for entry in report.swapped] == ["0.conv", "1.conv", "2 ... 3", "4", "6.conv"]
    for model in (net, twin):
        CHANGES[change](model)
    net.load_state_dict(twin.state_dict())
    assert_close(net(image(2, 3, 12, 16)), twin(image(2, 3, 12, 16)), **EXACT)


def test_a_replica_follows_its_own_parameters():
    """As nn.DataParallel makes them: a shallow copy with other children."""
    net, twin, _ = pair(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    replica = net._replicate_for_data_parallel()
    replica._modules = {name: copy.deepcopy(child) for name, child in net.named_children()}
    for tensor in (p.data for child in replica._modules.values() for p in child.parameters()):
        tensor.mul_(1.5)
    for tensor in (p.data for p in twin.parameters()):
        tensor.mul_(1.5)
    assert_close(replica(image(2, 3, 8, 8)), twin(image(2, 3, 8, 8)), **EXACT)


def test_copies(monkeypatch):
    calls = count_ops(monkeypatch)
    net, twin, report = pair(lambda: nn.Sequential(*cells(), Level(4, None, batch)))
    x = image(2, 3, 16, 16)
    clone = copy.deepcopy(net)
    report.undo()
    with torch.no_grad():
        net[0].conv.weight.zero_()
    calls.clear()
    assert_same(clone, twin, x)
    assert calls.total() == 5
    # a pickle is the model as it was, whole or in parts
    buffer = io.BytesIO()
    torch.save(clone, buffer)
    buffer.seek(0)
    for loaded in (
        torch.load(buffer, weights_only=False),
        pickle.loads(pickle.dumps(clone)),
        copy.copy(clone),
    ):
        assert type(loaded) is nn.Sequential
        assert_close(loaded(x), clone(x), **EXACT)
    assert type(pickle.loads(pickle.dumps(clone[2])).body[0]) is Cell
    assert b"fastgan.accelerate" not in pickle.dumps(clone)


@pytest.mark.parametrize("name", ["instance", "batch", "cells", "functional"])
def test_compile_has_no_graph_break(name):
    make, shape, _ = NETWORKS[name]
    net, twin, _ = pair(make)
    net.compile(fullgraph=True, backend="aot_eager")
    assert_same(net, twin, image(*shape))


def test_a_second_time():
    net = nn.Sequential(generator(instance), nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()))
    first = accelerate(net, leave=["1"])
    assert [(e.path, e.reason) for e in first.left] == [("1", "named in leave")]
    second = accelerate(net)
    assert [e.path for e in second.swapped] == ["1.0"]
    assert [e.path for e in second.left] == ["0", "0.7.body", "0.8.body"]
    assert {e.reason for e in second.left} == {"already swapped"}


def test_leave():
    net, twin, report = pair(lambda: generator(instance), leave=["7", "1?"])
    assert [entry.path for entry in report.swapped] == ["1", "4", "8"]
    assert {e.path for e in report.left if e.reason == "named in leave"} >= {"7", "10", "13", "15", "16"}
    assert_same(net, twin, image(2, 3, 12, 16))
    with pytest.raises(ValueError, match=r"accelerate: leave must match names of modules, got 'encoder\.\*'"):
        accelerate(net, leave=["encoder.*"])


def test_training_goes_on():
    """An optimiser made before sees the same parameters after."""
    net = lively(generator(affine))
    twin = copy.deepcopy(net)
    optimizers = [torch.optim.SGD(m.parameters(), 0.01, 0.9) for m in (net, twin)]
    accelerate(net)
    for _ in range(3):
        for model, optimizer in zip((net, twin), optimizers):
            optimizer.zero_grad()
            model(image(2, 3, 12, 16)).square().mean().backward()
            optimizer.step()
    assert_close(net.state_dict(), twin.state_dict(), **EXACT)


def test_public_name():
    assert fastgan.accelerate is accelerate
