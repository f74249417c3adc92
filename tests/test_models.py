"""The networks are the published ones: sizes, names, geometry, and the numbers of plain torch layers.

Where networks are compared the arithmetic is float64, so that two orders of summation differ by some 1e-15 of
a value of order one and a tolerance of 1e-10 still sees any difference of definition.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from fastgan.layers import Conv2d
from fastgan.models import PatchDiscriminator, ResnetGenerator, UnetGenerator
from tests.reference_systems import ReferenceResnet, ReferenceUnet, reference_discriminator

EXACT = {"rtol": 1e-10, "atol": 1e-10}
NORMS = ["instance", "batch", "none"]


def _parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def _lively(net: nn.Module, seed: int = 0) -> nn.Module:
    """Float64, weights large enough for every layer to matter, norm parameters away from one and zero."""
    generator = torch.Generator().manual_seed(seed)
    net.double()
    with torch.no_grad():
        for name, p in net.named_parameters():
            draw = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            if p.dim() == 4:
                p.copy_(draw / math.sqrt(p[0].numel()))
            else:
                p.copy_(0.5 * draw + (1.0 if name.endswith("weight") else 0.0))
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator, dtype=buffer.dtype))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype))
    return net


def _images(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def _assert_same_function(net: nn.Module, twin: nn.Module, x: Tensor) -> None:
    """Same state dict, then: output in both modes, gradients of the input and of every parameter."""
    _lively(net)
    twin.double().load_state_dict(net.state_dict(), strict=True)
    for training in (False, True):
        net.train(training)
        twin.train(training)
        x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
        y1, y2 = net(x1), twin(x2)
        assert_close(y1, y2, **EXACT)
        dy = torch.randn_like(y2) / math.sqrt(y2.numel())
        # a bias that the following norm removes may be left out of the graph: its gradient is zero
        got = torch.autograd.grad(y1, [x1, *net.parameters()], dy, allow_unused=True, materialize_grads=True)
        named = dict(net.named_parameters())
        expected = torch.autograd.grad(y2, [x2, *(dict(twin.named_parameters())[k] for k in named)], dy)
        for name, a, b in zip(["input", *named], got, expected):
            assert_close(a, b, **EXACT, msg=lambda m, name=name: f"gradient of {name}: {m}")
    assert_close(dict(net.named_buffers()), dict(twin.named_buffers()), **EXACT)


# sizes: the figures were obtained by instantiating the original release's networks


@pytest.mark.parametrize(
    ("blocks", "norm", "expected"),
    [(9, "instance", 11_378_179), (9, "batch", 11_383_427), (6, "instance", 7_837_699)],
)
def test_resnet_parameters(blocks, norm, expected):
    with torch.device("meta"):
        assert _parameters(ResnetGenerator(3, 3, blocks=blocks, norm=norm)) == expected


@pytest.mark.parametrize(
    ("levels", "norm", "expected"),
    [(8, "batch", 54_413_955), (8, "instance", 54_409_603), (7, "batch", 41_828_995)],
)
def test_unet_parameters(levels, norm, expected):
    with torch.device("meta"):
        assert _parameters(UnetGenerator(3, 3, levels=levels, norm=norm)) == expected


@pytest.mark.parametrize(
    ("channels", "field", "norm", "expected"),
    [
        (3, 70, "instance", 2_764_737),
        (6, 1, "batch", 9_024),
        (6, 16, "batch", 139_585),
        (6, 34, "batch", 666_433),
        (6, 70, "batch", 2_768_705),
        (6, 142, "batch", 6_964_033),
        (6, 286, "batch", 11_159_361),
    ],
)
def test_patch_parameters(channels, field, norm, expected):
    with torch.device("meta"):
        assert _parameters(PatchDiscriminator(channels, receptive_field=field, norm=norm)) == expected


def test_defaults():
    with torch.device("meta"):
        assert _parameters(ResnetGenerator(3, 3)) == 11_378_179
        assert _parameters(UnetGenerator(3, 3)) == 54_413_955
        assert _parameters(PatchDiscriminator(3)) == 2_764_737


# names of the state dict


def _with_bias(*layers: str) -> list[str]:
    return [f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")]


def _batch_norm(*layers: str) -> list[str]:
    leaves = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return [f"{layer}.{leaf}" for layer in layers for leaf in leaves]


@pytest.mark.parametrize(("blocks", "after"), [(9, (19, 22, 26)), (6, (16, 19, 23))])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_resnet_keys(blocks, after, dropout, norm):
    second = 6 if dropout else 5
    inner = [f"model.{10 + i}.conv_block.{j}" for i in range(blocks) for j in (1, second)]
    convs = ["model.1", "model.4", "model.7", *inner, f"model.{after[0]}", f"model.{after[1]}"]
    last = _with_bias(f"model.{after[2]}")
    if norm == "instance":
        expected = _with_bias(*convs) + last
        assert blocks != 9 or len(expected) == 48
    else:
        expected = [f"{conv}.weight" for conv in convs] + last
    if norm == "batch":
        norms = [f"model.{10 + i}.conv_block.{j}" for i in range(blocks) for j in (2, second + 1)]
        around = ["model.2", "model.5", "model.8", f"model.{after[0] + 1}", f"model.{after[1] + 1}"]
        expected += _batch_norm(*around, *norms)
        assert blocks != 9 or len(expected) == 140
    net = ResnetGenerator(3, 3, ngf=2, blocks=blocks, norm=norm, dropout=dropout)
    assert sorted(net.state_dict()) == sorted(expected)


@pytest.mark.parametrize("levels", [8, 7])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_unet_keys(levels, dropout, norm):
    prefix = ["model"]
    for k in range(1, levels):
        prefix.append("model.model.1" if k == 1 else prefix[-1] + ".model.3")
    bottom = levels - 1
    convs = ["model.model.0"]
    norms = []
    for p in prefix[1:bottom]:
        convs += [f"{p}.model.1", f"{p}.model.5"]
        norms += [f"{p}.model.2", f"{p}.model.6"]
    convs += [f"{prefix[bottom]}.model.1", f"{prefix[bottom]}.model.3"]
    norms.append(f"{prefix[bottom]}.model.4")
    last = _with_bias("model.model.3")
    if norm == "instance":
        expected = _with_bias(*convs) + last
        assert levels != 8 or len(expected) == 32
    else:
        expected = [f"{conv}.weight" for conv in convs] + last
    if norm == "batch":
        expected += _batch_norm(*norms)
        assert levels != 8 or len(expected) == 82
    net = UnetGenerator(3, 3, levels=levels, ngf=2, norm=norm, dropout=dropout)
    assert sorted(net.state_dict()) == sorted(expected)


@pytest.mark.parametrize(
    ("field", "inner"),
    [(16, (2,)), (34, (2, 5)), (70, (2, 5, 8)), (142, (2, 5, 8, 11)), (286, (2, 5, 8, 11, 14))],
)
@pytest.mark.parametrize("norm", NORMS)
def test_patch_keys(field, inner, norm):
    expected = _with_bias("model.0", f"model.{inner[-1] + 3}")
    for i in inner:
        expected += _with_bias(f"model.{i}") if norm == "instance" else [f"model.{i}.weight"]
        if norm == "batch":
            expected += _batch_norm(f"model.{i + 1}")
    net = PatchDiscriminator(3, ndf=2, receptive_field=field, norm=norm)
    assert sorted(net.state_dict()) == sorted(expected)


@pytest.mark.parametrize("norm", NORMS)
def test_pixel_keys(norm):
    expected = _with_bias("net.0") + (_with_bias("net.2", "net.5") if norm == "instance" else [])
    if norm != "instance":
        expected += ["net.2.weight", "net.5.weight"]
    if norm == "batch":
        expected += _batch_norm("net.3")
    assert sorted(PatchDiscriminator(3, ndf=2, receptive_field=1, norm=norm).state_dict()) == sorted(expected)


def test_transposed_weights_are_stored_input_first():
    with torch.device("meta"):
        unet, resnet = UnetGenerator(3, 3).state_dict(), ResnetGenerator(3, 3).state_dict()
    assert unet["model.model.3.weight"].shape == (128, 3, 4, 4)
    assert unet["model.model.1.model.5.weight"].shape == (256, 64, 4, 4)
    assert unet["model.model.1.model.3.model.3.model.3.model.5.weight"].shape == (1024, 512, 4, 4)
    assert resnet["model.19.weight"].shape == (256, 128, 3, 3)


# geometry


@pytest.mark.parametrize(("field", "side"), [(1, 256), (16, 126), (34, 62), (70, 30), (142, 14), (286, 6)])
def test_patch_output_size(field, side):
    net = PatchDiscriminator(3, ndf=2, receptive_field=field)
    with torch.no_grad():
        assert net(torch.zeros(1, 3, 256, 256)).shape == (1, 1, side, side)


@pytest.mark.parametrize("field", [1, 16, 34, 70, 142, 286])
def test_patch_receptive_field(field):
    """A verdict in the middle sees exactly field x field pixels; positive weights let nothing cancel."""
    net = PatchDiscriminator(1, ndf=1, receptive_field=field, norm="none").double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(p.abs() + 0.1)
    x = torch.rand(1, 1, 480, 480, dtype=torch.float64, requires_grad=True)
    y = net(x)
    (dx,) = torch.autograd.grad(y[0, 0, y.shape[2] // 2, y.shape[3] // 2], x)
    touched = dx[0, 0] != 0
    assert touched.any(1).sum() == field
    assert touched.any(0).sum() == field
    assert touched.sum() == field * field


@pytest.mark.parametrize(("blocks", "reach"), [(9, 84), (6, 60)])
def test_resnet_reach(blocks, reach):
    """The farthest input an output can see; all four phases of the stride are tried."""
    net = ResnetGenerator(1, 1, ngf=1, blocks=blocks, norm="none").double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_((p.abs() + 0.1) / p[0].numel())
    x = torch.rand(1, 1, 200, 200, dtype=torch.float64, requires_grad=True)
    y = net(x)
    far = 0
    for phase in range(4):
        at = 100 + phase
        (dx,) = torch.autograd.grad(y[0, 0, at, at], x, retain_graph=True)
        rows = (dx[0, 0] != 0).any(1).nonzero().flatten()
        far = max(far, at - int(rows[0]), int(rows[-1]) - at)
    assert far == reach


@pytest.mark.parametrize("size", [(256, 256), (12, 20)])
def test_resnet_keeps_the_size(size):
    net = ResnetGenerator(1, 5, ngf=2, blocks=1)
    with torch.no_grad():
        assert net(torch.zeros(2, 1, *size)).shape == (2, 5, *size)


@pytest.mark.parametrize(("levels", "size"), [(8, (256, 256)), (7, (128, 256)), (5, (32, 96))])
def test_unet_keeps_the_size(levels, size):
    net = UnetGenerator(1, 5, levels=levels, ngf=2)
    with torch.no_grad():
        assert net(torch.zeros(2, 1, *size)).shape == (2, 5, *size)


@pytest.mark.parametrize(("levels", "expected"), [(8, [16, 8, 4]), (7, [8, 4])])
def test_unet_dropout_places(levels, expected):
    """Outputs 4x4, 8x8 and 16x16 of unet_256, each closing levels 4, 5, 6; unet_128 has two."""
    net = UnetGenerator(3, 3, levels=levels, ngf=2, dropout=True)
    found = {name: module for name, module in net.named_modules() if isinstance(module, nn.Dropout)}
    names = ["model.model.1" + ".model.3" * (k - 1) + ".model.7" for k in range(4, levels - 1)]
    assert list(found) == names or sorted(found) == sorted(names)
    assert all(module.p == 0.5 for module in found.values())
    sizes = {}
    for name, module in found.items():
        module.register_forward_hook(lambda m, x, y, name=name: sizes.__setitem__(name, y.shape[-1]))
    with torch.no_grad():
        net.train()(torch.zeros(1, 3, 2**levels, 2**levels))
    if sizes:  # a fused level may bypass the module; the dropout itself is checked below
        assert [sizes[name] for name in names] == expected


def test_no_dropout_layers_unless_asked():
    for net in (UnetGenerator(3, 3, ngf=2), ResnetGenerator(3, 3, ngf=2, blocks=2)):
        assert not any(isinstance(module, nn.Dropout) for module in net.modules())
    net = ResnetGenerator(3, 3, ngf=2, blocks=3, dropout=True)
    places = [name for name, module in net.named_modules() if isinstance(module, nn.Dropout)]
    assert places == [f"model.{10 + i}.conv_block.4" for i in range(3)]


@pytest.mark.parametrize("kind", ["resnet", "unet"])
def test_dropout_acts_in_training_only(kind):
    if kind == "resnet":
        net = ResnetGenerator(2, 2, ngf=4, blocks=2, dropout=True)
    else:
        net = UnetGenerator(2, 2, levels=6, ngf=4, norm="instance", dropout=True)
    x = _images(1, 2, 64, 64)
    _lively(net).train()
    with torch.no_grad():
        assert not torch.equal(net(x), net(x))
        net.eval()
        assert torch.equal(net(x), net(x))


# the same function as a chain of torch's own layers


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("padding", ["reflect", "replicate", "zero"])
def test_resnet_is_the_reference(norm, padding):
    net = ResnetGenerator(2, 3, ngf=5, blocks=2, norm=norm, padding=padding)
    twin = ReferenceResnet(2, 3, ngf=5, blocks=2, norm=norm, padding=padding)
    _assert_same_function(net, twin, _images(2, 2, 12, 20))


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("padding", ["reflect", "zero"])
def test_resnet_with_dropout_is_the_reference_in_eval(norm, padding):
    net = ResnetGenerator(3, 1, ngf=4, blocks=2, norm=norm, padding=padding, dropout=True, output="sigmoid")
    twin = ReferenceResnet(3, 1, 4, 2, norm, padding, dropout=True, output="sigmoid").double()
    twin.load_state_dict(_lively(net).state_dict(), strict=True)
    x = _images(2, 3, 16, 16)
    with torch.no_grad():
        assert_close(net.eval()(x), twin.eval()(x), **EXACT)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize(("levels", "size"), [(4, (16, 32)), (6, (64, 64))])
def test_unet_is_the_reference(norm, skips, levels, size):
    net = UnetGenerator(2, 3, levels=levels, ngf=3, norm=norm, skips=skips)
    twin = ReferenceUnet(2, 3, levels, 3, norm, skips=skips)
    _assert_same_function(net, twin, _images(2, 2, *size))


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_unet_with_dropout_is_the_reference_in_eval(norm):
    net = UnetGenerator(3, 1, levels=6, ngf=3, norm=norm, dropout=True, output="sigmoid")
    twin = ReferenceUnet(3, 1, 6, 3, norm, dropout=True, output="sigmoid").double()
    twin.load_state_dict(_lively(net).state_dict(), strict=True)
    x = _images(2, 3, 64, 64)
    with torch.no_grad():
        assert_close(net.eval()(x), twin.eval()(x), **EXACT)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("field", "size"), [(1, (7, 5)), (16, (16, 11)), (34, (22, 17)), (70, (33, 40))])
def test_patch_is_the_reference(norm, field, size):
    net = PatchDiscriminator(4, ndf=3, receptive_field=field, norm=norm)
    _assert_same_function(net, reference_discriminator(4, 3, field, norm), _images(2, 4, *size))


@pytest.mark.parametrize("field", [142, 286])
def test_deep_patch_is_the_reference(field):
    net = PatchDiscriminator(1, ndf=2, receptive_field=field, norm="batch")
    _assert_same_function(net, reference_discriminator(1, 2, field, "batch"), _images(2, 1, 128, 96))


def test_encoder_decoder_halves_the_input_of_the_up_convolutions():
    with torch.device("meta"):
        plain = UnetGenerator(3, 3, skips=False).state_dict()
        unet = UnetGenerator(3, 3).state_dict()
    assert list(plain) == list(unet)
    bottom = "model.model.1" + ".model.3" * 6
    up = {"model.model.3.weight"}
    up |= {"model.model.1" + ".model.3" * k + ".model.5.weight" for k in range(6)}
    for name, value in unet.items():
        expected = (value.shape[0] // 2, *value.shape[1:]) if name in up else value.shape
        assert plain[name].shape == expected, name
    assert plain[f"{bottom}.model.3.weight"].shape == (512, 512, 4, 4)


def test_resnet_pads_zero_in_the_down_convolutions_and_reflects_outside():
    """A constant image stays constant through reflection; averaging kernels show the zero-padded rows."""
    net = ResnetGenerator(1, 1, ngf=1, blocks=1, norm="none").double()
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(1.0 / p[0].numel() if p.dim() == 4 else 0.0)
    seen = {}
    for i in (1, 4, 7):
        net.get_submodule(f"model.{i}").register_forward_hook(lambda m, x, y, i=i: seen.__setitem__(i, y))
    with torch.no_grad():
        net(torch.ones(1, 1, 16, 16, dtype=torch.float64))
    if 1 in seen:  # fused chains do not call the layers one by one
        assert_close(seen[1], torch.ones_like(seen[1]), **EXACT)
    if 4 in seen:
        assert_close(seen[4][0, 0, 0, 0].item(), 4 / 9)
        assert_close(seen[4][0, 0, 0, 1].item(), 6 / 9)
        assert_close(seen[4][0, 0, 1:, 1:], torch.ones(7, 7, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("kind", ["resnet", "unet", "patch"])
def test_instance_norm_keeps_samples_apart(kind):
    net = {
        "resnet": lambda: ResnetGenerator(3, 3, ngf=4, blocks=2),
        "unet": lambda: UnetGenerator(3, 3, levels=5, ngf=4, norm="instance"),
        "patch": lambda: PatchDiscriminator(3, ndf=4, receptive_field=34),
    }[kind]()
    x = _images(2, 3, 32, 32)
    with torch.no_grad():
        y = _lively(net).train()(x)
        assert_close(y, torch.cat([net(x[:1]), net(x[1:])]), **EXACT)


def test_instance_norm_uses_the_image_in_both_modes():
    net = _lively(ResnetGenerator(1, 1, ngf=4, blocks=1))
    x = _images(1, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(net.train()(x), net.eval()(x))


@pytest.mark.parametrize(("output", "low", "high"), [("tanh", -1.0, 1.0), ("sigmoid", 0.0, 1.0)])
@pytest.mark.parametrize("kind", ["resnet", "unet"])
def test_output_range(output, low, high, kind):
    if kind == "resnet":
        net = ResnetGenerator(3, 2, ngf=4, blocks=1, output=output)
    else:
        net = UnetGenerator(3, 2, levels=4, ngf=4, output=output)
    with torch.no_grad():
        y = _lively(net)(_images(2, 3, 16, 16))
    assert low <= y.min() < y.max() <= high
    # it fills the range: values on both sides of the middle
    assert y.min() < (low + high) / 2 < y.max()


@pytest.mark.parametrize("channels", [(1, 5), (4, 2), (7, 1)])
def test_any_channels(channels):
    into, out = channels
    x = torch.zeros(1, into, 32, 32)
    with torch.no_grad():
        assert ResnetGenerator(into, out, ngf=3, blocks=1)(x).shape == (1, out, 32, 32)
        assert UnetGenerator(into, out, levels=5, ngf=3)(x).shape == (1, out, 32, 32)
        assert PatchDiscriminator(into, ndf=3, receptive_field=34)(x).shape == (1, 1, 6, 6)


def test_repr():
    nets = [ResnetGenerator(1, 1, ngf=2, blocks=1), UnetGenerator(1, 1, ngf=2), PatchDiscriminator(1, ndf=2)]
    for net in nets:
        text = repr(net)
        assert type(net).__name__ in text
        assert "Conv" in text


@pytest.mark.parametrize(
    "make",
    [
        lambda: ResnetGenerator(3, 3, ngf=2, blocks=1, norm="layer"),
        lambda: ResnetGenerator(3, 3, ngf=2, blocks=1, padding="same"),
        lambda: ResnetGenerator(3, 3, ngf=2, blocks=1, output="relu"),
        lambda: UnetGenerator(3, 3, ngf=2, norm="layer"),
        lambda: UnetGenerator(3, 3, ngf=2, output="relu"),
        lambda: PatchDiscriminator(3, ndf=2, norm="layer"),
        lambda: PatchDiscriminator(3, ndf=2, receptive_field=50),
    ],
)
def test_bad_choice_is_refused(make):
    with pytest.raises(ValueError):
        make()


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 8), (8, 3), (1, 2), (4, 4), (5, 6)])
@pytest.mark.parametrize("needs_input_gradient", [True, False])
def test_wide_convolutions_with_few_channels_are_torch_convolutions(inputs, outputs, needs_input_gradient):
    # narrow ends are computed another way on a CPU; values, gradients and second order are those of torch
    torch.manual_seed(0)
    ours = Conv2d(inputs, outputs, 7).double()
    theirs = nn.Conv2d(inputs, outputs, 7).double()
    theirs.load_state_dict(ours.state_dict())
    x = _images(2, inputs, 9, 12).requires_grad_(needs_input_gradient)
    dy = _images(2, outputs, 3, 6, seed=2)
    for net, found in ((ours, seen := []), (theirs, wanted := [])):
        y = net(x)
        leaves = [*net.parameters()] + ([x] if needs_input_gradient else [])
        grads = torch.autograd.grad(y, leaves, dy, create_graph=True)
        found += [y, *grads]
        if needs_input_gradient:
            found += torch.autograd.grad(grads[-1].square().sum(), [net.weight])
    for a, b in zip(seen, wanted, strict=True):
        assert_close(a, b, **EXACT)
