"""Drop-in layers: arguments, state-dict keys, initial values and results of the torch layers they stand for.

Results are compared in float64, where two orders of summation differ by some 1e-15 of a value of order one,
so that a tolerance of 1e-10 still sees any difference of definition.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from fastgan import layers

EXACT = {"rtol": 1e-10, "atol": 1e-10}

# layer, positional and keyword arguments of both, input
PLAIN = [
    ("ReflectionPad2d", ((1, 2, 3, 0),), {}, (2, 3, 6, 5)),
    ("InstanceNorm2d", (3,), {"eps": 1e-3}, (2, 3, 6, 5)),
    ("InstanceNorm2d", (3,), {"affine": True}, (2, 3, 6, 5)),
    ("Conv2d", (3, 4, 3), {}, (2, 3, 6, 5)),
    ("Conv2d", (4, 6, (3, 1), 2, (1, 0), 1, 2, False, "reflect"), {}, (2, 4, 6, 5)),
    ("Conv2d", (2, 4), {"kernel_size": 7, "padding": 3}, (1, 2, 8, 9)),
    ("Conv2d", (8, 3, 7), {}, (1, 8, 9, 8)),
    ("Conv2d", (3, 8, 5), {"bias": False}, (1, 3, 9, 8)),
    ("ConvTranspose2d", (3, 4, 3, 2, 1, 1), {}, (2, 3, 6, 5)),
    ("ConvTranspose2d", (4, 6, 4), {"stride": 2, "groups": 2, "bias": False, "dilation": 2}, (2, 4, 3, 5)),
]


def _image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _gradients(y: Tensor, x: Tensor, *modules: nn.Module) -> tuple[Tensor, ...]:
    parameters = [p for module in modules for p in module.parameters()]
    dy = _image(*y.shape, seed=1)
    return torch.autograd.grad(y, [x, *parameters], dy, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize(("name", "args", "kwargs", "shape"), PLAIN)
def test_torch_twin(name, args, kwargs, shape):
    torch.manual_seed(0)
    twin = getattr(nn, name)(*args, **kwargs)
    torch.manual_seed(0)
    layer = getattr(layers, name)(*args, **kwargs)
    assert isinstance(layer, getattr(nn, name))
    assert repr(layer).startswith(repr(twin)[:-1])
    assert list(layer.state_dict()) == list(twin.state_dict())
    assert all(torch.equal(layer.state_dict()[k], v) for k, v in twin.state_dict().items())
    layer.double()
    twin.double()
    x1, x2 = _image(*shape).requires_grad_(), _image(*shape).requires_grad_()
    y1, y2 = layer(x1), twin(x2)
    assert_close(y1, y2, **EXACT)
    assert_close(_gradients(y1, x1, layer), _gradients(y2, x2, twin), **EXACT)


def test_output_size():
    layer = layers.ConvTranspose2d(3, 4, 3, 2)
    x = torch.randn(1, 3, 5, 6)
    assert layer(x, [12, 14]).shape == (1, 4, 12, 14)
    assert torch.equal(layer(x, [12, 14]), nn.ConvTranspose2d.forward(layer, x, [12, 14]))
    followed = layers.ConvTranspose2d(3, 4, 3, 2, act="relu")
    with pytest.raises(ValueError, match="output_size must be None where a norm or act follows"):
        followed(x, [12, 14])


ACTS = {
    "none": lambda x: x,
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.3),
    "tanh": torch.tanh,
}
NORMS = {
    "none": None,
    "instance": nn.InstanceNorm2d(4),
    "affine": nn.InstanceNorm2d(4, affine=True),
    "batch": nn.BatchNorm2d(4, eps=1e-3, momentum=0.3),
    "cumulative": nn.BatchNorm2d(4, momentum=None),
    "no statistics": nn.BatchNorm2d(4, track_running_stats=False),
}
CONVS = {
    "padded": (nn.Conv2d, (3, 4, 7), {"padding": 3, "padding_mode": "reflect"}),
    "strided": (nn.Conv2d, (3, 4, 4, 2, 1), {"padding_mode": "replicate"}),
    "same": (nn.Conv2d, (3, 4, 5), {"padding": "same", "bias": False}),
    "up": (nn.ConvTranspose2d, (3, 4, 3, 2, 1, 1), {}),
    "wide": (nn.ConvTranspose2d, (3, 4, 4), {"bias": False}),
}


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("act", ACTS)
def test_what_follows(conv, norm, act):
    """Convolution, norm, residual and activation as layers of their own, in training and in evaluation."""
    torch.manual_seed(0)
    cls, args, kwargs = CONVS[conv]
    plain, own = cls(*args, **kwargs).double(), copy.deepcopy(NORMS[norm])
    layer = getattr(layers, cls.__name__)(
        *args, norm=copy.deepcopy(own), act=act, slope=0.3, **kwargs
    ).double()
    keys = [*plain.state_dict(), *(f"norm.{key}" for key in (own.state_dict() if own else ()))]
    assert list(layer.state_dict()) == keys
    layer.load_state_dict(plain.state_dict(), strict=False)
    norms = [] if own is None else [own.double()]
    for training in (True, True, False):
        layer.train(training)
        for module in norms:
            module.train(training)
        for added in (False, True):
            x1, x2 = _image(2, 3, 9, 8).requires_grad_(), _image(2, 3, 9, 8).requires_grad_()
            y2 = plain(x2) if own is None else own(plain(x2))
            residual = _image(*y2.shape, seed=2) if added else None
            y2 = ACTS[act](y2 if residual is None else y2 + residual)
            y1 = layer(x1, residual=residual)
            assert_close(y1, y2, **EXACT)
            assert_close(_gradients(y1, x1, layer), _gradients(y2, x2, plain, *norms), **EXACT)
            if own is not None:
                assert_close(dict(layer.norm.named_buffers()), dict(own.named_buffers()), **EXACT)


def test_dropout():
    torch.manual_seed(0)
    layer = layers.Conv2d(1, 64, 1, act="relu", dropout=0.25)
    x = torch.ones(4, 1, 32, 32)
    whole = layer.eval()(x)
    y = layer.train()(x)
    used = whole > 0
    # of some 130000 draws: four standard deviations are 0.005
    assert abs((y[used] == 0).double().mean() - 0.25) < 0.01
    assert_close(y[y > 0], whole[y > 0] / 0.75)
    assert "act=relu, dropout=0.25" in repr(layer)


def test_autocast():
    torch.manual_seed(0)
    norm = nn.InstanceNorm2d(4)
    layer = layers.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", norm=norm, act="relu")
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits of values up to 4
    assert_close(y.float(), layer(x), rtol=0, atol=0.1)


def test_layout_follows_the_weight(monkeypatch):
    """The ops return the layout of their input, so that one has to be brought to that of the weight."""
    seen = []
    monkeypatch.setattr(layers, "conv_norm_act", lambda x, *args, **kwargs: seen.append(x.stride()))
    layer, x = layers.Conv2d(3, 4, 3, act="relu"), torch.randn(2, 3, 8, 8)
    layer(x)
    layer.to(memory_format=torch.channels_last)(x)
    assert seen == [(192, 64, 8, 1), (192, 1, 24, 3)]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"groups": 3, "act": "relu"},
            "Conv2d: with a norm, act or dropout the fused op does not take groups=3",
        ),
        ({"dilation": 2, "dropout": 0.5}, "does not take groups=1, dilation=\\(2, 2\\)"),
        (
            {"norm": nn.GroupNorm(1, 3)},
            "norm must be BatchNorm2d, or InstanceNorm2d without running statistics",
        ),
        ({"norm": nn.InstanceNorm2d(3, track_running_stats=True)}, "without running statistics"),
        ({"norm": layers.InstanceNorm2d(3, act="relu")}, "without running statistics"),
    ],
)
def test_bad_input(kwargs, message):
    with pytest.raises(ValueError, match=message):
        layers.Conv2d(3, 3, 3, **kwargs)
    assert layers.Conv2d(3, 3, 3, groups=3, dilation=2)(torch.zeros(1, 3, 8, 8)).shape == (1, 3, 4, 4)


def test_a_converted_norm():
    """A norm over all processes is not the op's: an error, no statistics of one process."""
    layer = layers.Conv2d(3, 3, 3, norm=nn.BatchNorm2d(3))
    nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    with pytest.raises(
        ValueError, match="norm must be a BatchNorm2d or an InstanceNorm2d, got SyncBatchNorm"
    ):
        layer(torch.zeros(1, 3, 8, 8))


def test_unknown_activation():
    with pytest.raises(ValueError, match="act must be one of none, relu, leaky_relu, tanh, got 'gelu'"):
        layers.Conv2d(3, 3, 3, act="gelu")(torch.zeros(1, 3, 8, 8))


def test_a_large_smooth_plane_on_the_cpu_is_exact_without_gradients():
    """A sky: sums of many alike values, where adding up one by one loses three digits."""
    ramp = torch.linspace(3, 5, 384).view(1, 1, 384, 1) + torch.linspace(0, 0.1, 384)
    x = (ramp * torch.tensor([1.0, -2.0, 7.0]).view(1, 3, 1, 1)).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        found = layers.InstanceNorm2d(3)(x)
    # a rounding of the mean, 5e-7 of 30, over a standard deviation of 4
    torch.testing.assert_close(found.double(), F.instance_norm(x.double()), rtol=0, atol=5e-6)


def _munit(x: Tensor, layer: layers.ChannelLayerNorm) -> Tensor:
    """The release's layer norm as it stands there, for more than one image."""
    mean, std = (t.view(-1, 1, 1, 1) for t in (x.flatten(1).mean(1), x.flatten(1).std(1)))
    return (x - mean) / (std + layer.eps) * layer.gamma.view(1, -1, 1, 1) + layer.beta.view(1, -1, 1, 1)


@pytest.mark.parametrize("act", ACTS)
def test_channel_layer_norm(act):
    torch.manual_seed(0)
    drawn = torch.rand(5)
    torch.manual_seed(0)
    layer = layers.ChannelLayerNorm(5, 1e-2, act, 0.3)
    assert {k: v.tolist() for k, v in layer.state_dict().items()} == {
        "gamma": drawn.tolist(),
        "beta": [0] * 5,
    }
    assert repr(layer) == f"ChannelLayerNorm(5, eps=0.01, act={act})"
    layer.double()
    nn.init.normal_(layer.beta)
    x1, x2 = _image(2, 5, 4, 3).requires_grad_(), _image(2, 5, 4, 3).requires_grad_()
    y1, y2 = layer(x1), ACTS[act](_munit(x2, layer))
    assert_close(y1, y2, **EXACT)
    assert_close(_gradients(y1, x1, layer), _gradients(y2, x2, layer), **EXACT)


def test_channel_layer_norm_keeps_its_definition():
    # the defaults are the release's, and under autocast the parameters stay float32
    layer, x = layers.ChannelLayerNorm(3), 1e-3 * torch.randn(2, 3, 5, 4)
    assert_close(layer(x), _munit(x, layer))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), _munit(x.bfloat16().float(), layer), rtol=0, atol=2**-7)
    y.sum().backward()
    assert layer.gamma.grad is not None and layer.gamma.grad.dtype == torch.float32
