"""Other people's generators: files of upstream, CUT and StarGAN beside plain-torch twins of them, folders,
directions, labels; and `fastgan.load`, which returns the kind of image that it is given."""

import re
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import fastgan
from fastgan.checkpoint import CheckpointError, load_generator, write_weights
from fastgan.config import UsageError
from fastgan.data.images import DataError
from fastgan.models import ResnetGenerator
from tests.reference_systems import ReferenceResidual, ReferenceResnet, ReferenceUnet

NOISE = np.random.default_rng(0).integers(0, 256, (16, 20, 3), np.uint8)
LABEL = [1.0, 0.0, 0.0, 1.0, 0.0]


class Blur(nn.Module):
    """CUT's Downsample and Upsample from their definition: one plane at a time, by slices."""

    def __init__(self, channels: int, up: bool) -> None:
        super().__init__()
        line = torch.tensor([1.0, 3.0, 3.0, 1.0] if up else [1.0, 2.0, 1.0])
        square = torch.outer(line, line)
        square = square / square.sum() * (4 if up else 1)
        self.register_buffer("filt", square[None, None].repeat(channels, 1, 1, 1))
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (1, 1, 1, 1), "replicate" if self.up else "reflect")
        n, c, h, w = x.shape
        taps = self.filt[0, 0]
        if self.up:
            y = x.new_zeros(n, c, 2 * h + 2, 2 * w + 2)
            for i in range(4):
                for j in range(4):
                    y[:, :, i : i + 2 * h : 2, j : j + 2 * w : 2] += taps[i, j] * x
            return y[:, :, 3:-3, 3:-3]
        return sum(
            taps[i, j] * x[:, :, i : h - 2 + i : 2, j : w - 2 + j : 2] for i in range(3) for j in range(3)
        )


class ReferenceCut(nn.Module):
    """CUT's antialiased ResNet generator as a chain of torch's layers."""

    def __init__(self, ngf: int, blocks: int, down: bool, up: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.ReflectionPad2d(3),
            nn.Conv2d(3, ngf, 7),
            nn.InstanceNorm2d(ngf),
            nn.ReLU(),
        ]
        for width in (ngf, 2 * ngf):
            conv = nn.Conv2d(width, 2 * width, 3, 1 if down else 2, 1)
            layers += [conv, nn.InstanceNorm2d(2 * width), nn.ReLU()] + [Blur(2 * width, False)] * down
        layers += [ReferenceResidual(4 * ngf, "instance", "reflect", False) for _ in range(blocks)]
        for width in (4 * ngf, 2 * ngf):
            if up:
                layers += [Blur(width, True), nn.Conv2d(width, width // 2, 3, 1, 1)]
            else:
                layers += [nn.ConvTranspose2d(width, width // 2, 3, 2, 1, output_padding=1)]
            layers += [nn.InstanceNorm2d(width // 2), nn.ReLU()]
        self.model = nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(ngf, 3, 7), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class StarBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.main = nn.Sequential(*star_conv(width, width, 3, 1), *star_conv(width, width, 3, 1)[:2])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.main(x)


def star_conv(cin: int, cout: int, kernel: int, stride: int, up: bool = False) -> list[nn.Module]:
    kind = nn.ConvTranspose2d if up else nn.Conv2d
    conv = kind(cin, cout, kernel, stride, (kernel - 1) // 2, bias=False)
    return [conv, nn.InstanceNorm2d(cout, affine=True, track_running_stats=True), nn.ReLU()]


class ReferenceStar(nn.Module):
    """StarGAN's generator in torch's layers; used in training mode, as by the official test code."""

    def __init__(self, width: int = 4, labels: int = 5, blocks: int = 2) -> None:
        super().__init__()
        layers = star_conv(3 + labels, width, 7, 1) + star_conv(width, 2 * width, 4, 2)
        layers += star_conv(2 * width, 4 * width, 4, 2) + [StarBlock(4 * width) for _ in range(blocks)]
        layers += star_conv(4 * width, 2 * width, 4, 2, up=True) + star_conv(2 * width, width, 4, 2, up=True)
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 3, 7, 1, 3, bias=False), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        planes = torch.tensor(LABEL).view(1, -1, 1, 1).expand(len(x), -1, *x.shape[2:])
        return self.main(torch.cat([x, planes], 1))


FOREIGN: dict[str, Callable[[], nn.Module]] = {
    "resnet_9blocks": lambda: ReferenceResnet(3, 3, 2, 9),
    "resnet_6blocks dropout": lambda: ReferenceResnet(3, 3, 4, 6, dropout=True),
    "resnet_6blocks batch": lambda: ReferenceResnet(1, 3, 4, 6, norm="batch"),
    "unet_256": lambda: ReferenceUnet(3, 3, 8, 2, dropout=True),
    "unet_128 instance": lambda: ReferenceUnet(3, 1, 7, 2, norm="instance"),
    "cut": lambda: ReferenceCut(4, 2, True, True),
    "cut no antialias": lambda: ReferenceCut(4, 2, False, False),
    "cut antialias down": lambda: ReferenceCut(4, 2, True, False),
    "cut antialias up": lambda: ReferenceCut(4, 2, False, True),
    "stargan": ReferenceStar,
}


def moved(net: nn.Module) -> nn.Module:
    """The network with running statistics and affine parameters other than the initial ones."""
    for name, value in net.state_dict().items():
        if "running" in name or value.ndim == 1 and value.is_floating_point():
            value.uniform_(0.5, 1.5)
    return net


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_compute_what_their_own_network_does(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = moved(FOREIGN[name]())
    path = tmp_path / ("200000-G.ckpt" if name == "stargan" else "latest_net_G.pth")
    torch.save(theirs.state_dict(), path)
    found = load_generator(path, label=LABEL if name == "stargan" else None)
    side = 256 if "unet" in name else 16
    x = torch.rand(1, found.channels[0], side, side + (0 if "unet" in name else 8)) * 2 - 1
    with torch.no_grad():
        y, expected = found.net(x), theirs.train(name == "stargan")(x)
    # float32 rounding, which the innermost norms of a tiny U-Net enlarge
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-4 if "unet" in name else 2e-5)
    assert found.weights.keys() == theirs.state_dict().keys() and not found.net.training


def test_files_of_old_pytorch(tmp_path: Path) -> None:
    net = ReferenceResnet(3, 3, 4, 1, norm="batch")
    state = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "latest_net_G.pth", _use_new_zipfile_serialization=False)
    assert load_generator(tmp_path / "latest_net_G.pth").channels == (3, 3)


def test_a_pickled_module_is_refused_with_the_reason(tmp_path: Path) -> None:
    for zipped in (True, False):
        torch.save(nn.Linear(1, 1), tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError) as error:
            load_generator(tmp_path / "net.pth")
        text = str(error.value)
        assert "it holds a pickled torch.nn.modules.linear.Linear" in text and "state_dict()" in text
        assert "weights_only" not in text and "\n" not in text


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    for name in ("3_net_G_A", "latest_net_G_A", "20_net_G_A", "3_net_G_B", "20_net_G_B", "20_net_D_A"):
        torch.save(ResnetGenerator(3, 3, ngf=2, blocks=1).state_dict(), tmp_path / f"{name}.pth")
    return tmp_path


def test_a_folder_of_upstream(upstream: Path) -> None:
    assert load_generator(upstream).path.name == "latest_net_G_A.pth"
    assert load_generator(upstream, "AtoB").path.name == "latest_net_G_A.pth"
    assert load_generator(upstream, "BtoA").path.name == "20_net_G_B.pth"
    assert load_generator(upstream / "3_net_G_B.pth").path.name == "3_net_G_B.pth"
    with pytest.raises(UsageError, match=re.escape("3_net_G_B.pth is the other way")):
        load_generator(upstream / "3_net_G_B.pth", "AtoB")
    for file in upstream.glob("*G_B*"):
        file.unlink()
    with pytest.raises(UsageError, match="--direction BtoA"):
        load_generator(upstream, "BtoA")


def test_labels(tmp_path: Path) -> None:
    torch.save(ReferenceStar().state_dict(), tmp_path / "9-G.ckpt")
    torch.save(ResnetGenerator(3, 3, ngf=2, blocks=1).state_dict(), tmp_path / "latest_net_G.pth")
    with pytest.raises(UsageError, match="a label of 5 numbers, got 0: give --label"):
        load_generator(tmp_path / "9-G.ckpt")
    with pytest.raises(UsageError, match="no --label"):
        load_generator(tmp_path / "latest_net_G.pth", label=[1.0])
    one, two = (
        fastgan.load(tmp_path / "9-G.ckpt", label=each, device="cpu") for each in (LABEL, LABEL[::-1])
    )
    assert not np.array_equal(one(NOISE), two(NOISE))


@pytest.fixture
def translate(tmp_path: Path) -> fastgan.inference.Translator:
    torch.manual_seed(0)
    net = ResnetGenerator(3, 3, ngf=4, blocks=1)
    for value in net.parameters():
        nn.init.normal_(value, 0, 0.2)
    torch.save(net.state_dict(), tmp_path / "latest_net_G.pth")
    return fastgan.load(tmp_path / "latest_net_G.pth", device="cpu", precision="fp32")


def test_every_kind_of_image_gives_the_same_translation(translate: fastgan.inference.Translator) -> None:
    y = translate(NOISE)
    assert type(y) is np.ndarray and y.dtype == np.uint8 and y.shape == NOISE.shape and y.std() > 20
    image = translate(Image.fromarray(NOISE))
    assert isinstance(image, Image.Image) and image.mode == "RGB" and np.array_equal(np.asarray(image), y)
    tensor = torch.from_numpy(NOISE).permute(2, 0, 1)
    z = translate(tensor)
    assert isinstance(z, Tensor) and z.dtype == torch.uint8 and np.array_equal(z.permute(1, 2, 0).numpy(), y)
    batch = translate(torch.stack([tensor, 255 - tensor]))
    assert batch.shape == (2, 3, 16, 20) and torch.equal(batch[0], z) and not torch.equal(batch[0], batch[1])
    assert np.array_equal(translate(NOISE[None])[0], y)
    for real in (np.float32, np.float64, np.float16):
        w = translate((NOISE / 255).astype(real))
        assert w.dtype == real
        np.testing.assert_allclose(w, y / 255, atol=0.6 / 255 if real is not np.float16 else 0.02)
    wide = translate(NOISE.astype(np.uint16) * 257)
    assert wide.dtype == np.uint16
    np.testing.assert_allclose(wide / 65535, y / 255, atol=0.6 / 255)
    half = translate((tensor / 255).bfloat16().requires_grad_())
    assert half.dtype == torch.bfloat16 and not half.requires_grad


def test_pillow_modes(translate: fastgan.inference.Translator) -> None:
    y = translate(NOISE)
    alpha = Image.fromarray(NOISE[..., 0])
    with_alpha = Image.fromarray(NOISE)
    with_alpha.putalpha(alpha)
    out = translate(with_alpha)
    assert out.mode == "RGBA" and np.array_equal(np.asarray(out), np.dstack([y, NOISE[..., 0]]))
    for mode in ("1", "L", "P", "CMYK", "YCbCr", "LA"):
        out = translate(Image.fromarray(NOISE).convert(mode))
        assert out.size == (20, 16) and out.mode == ("RGBA" if mode == "LA" else "RGB")
    # upright, as the file's EXIF says
    turned = Image.fromarray(np.rot90(NOISE).copy())
    turned.getexif()[0x0112] = 6
    assert np.array_equal(np.asarray(translate(turned)), y)
    with pytest.raises(DataError, match="cannot hold 3 channels of uint16"):
        translate(Image.fromarray(NOISE[..., 0].astype(np.uint16)))


def test_profiles_of_pillow_images(translate: fastgan.inference.Translator) -> None:
    adobe, srgb = (bytes(imagecodecs.cms_profile(name)) for name in ("adobergb", "srgb"))
    image = Image.fromarray(NOISE)
    plain = np.asarray(translate(image))
    image.info["icc_profile"] = srgb
    assert np.array_equal(np.asarray(translate(image)), plain)
    image.info["icc_profile"] = adobe
    out = translate(image)
    converted = imagecodecs.cms_transform(
        NOISE, adobe, srgb, colorspace="rgb", outcolorspace="rgb", intent=1, flags=0x2000
    )
    assert np.array_equal(np.asarray(out), translate(converted)) and not np.array_equal(
        np.asarray(out), plain
    )
    # without the second in which it was made
    assert out.info["icc_profile"] == srgb[:24] + bytes(12) + srgb[36:]


def test_grey_stays_grey(tmp_path: Path) -> None:
    torch.save(ResnetGenerator(1, 1, ngf=2, blocks=1).state_dict(), tmp_path / "latest_net_G.pth")
    translate = fastgan.load(tmp_path / "latest_net_G.pth", device="cpu")
    grey = NOISE[..., 0]
    y = translate(grey)
    assert y.shape == (16, 20) and translate(grey[..., None]).shape == (16, 20, 1)
    assert translate(Image.fromarray(grey)).mode == "L"
    assert translate(Image.fromarray(grey.astype(np.uint16) * 257)).mode.startswith("I;16")


def test_ranges_of_a_run_are_honoured(tmp_path: Path) -> None:
    about = {
        "network": "G", "ranges": [[0, 4095], [10.0, 20.0]], "dtypes": ["uint16", "float32"],
        "settings": {"output": "tanh", "direction": "AtoB"},
    }  # fmt: skip
    net = ResnetGenerator(2, 2, ngf=2, blocks=1)
    write_weights(tmp_path / "G.safetensors", net.state_dict(), about)
    translate = fastgan.load(tmp_path / "G.safetensors", device="cpu", precision="fp32")
    x = np.random.default_rng(1).integers(0, 4096, (8, 8, 2), np.uint16)
    with torch.no_grad():
        y = net(torch.from_numpy(x / 4095 * 2 - 1).float().permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    np.testing.assert_allclose(translate(x), (y.numpy() + 1) / 2 * 10 + 10, atol=1e-3)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("in.png", "PIL image, a NumPy array or a tensor, got str"),
        (np.zeros(3, np.uint8), "got (3,)"),
        (np.zeros((0, 4, 3), np.uint8), "got (0, 4, 3)"),
        (np.zeros((0, 4, 4, 3), np.uint8), "at least one image"),
        (np.zeros((4, 4, 3), np.int64), "got int64"),
        (np.full((4, 4, 3), np.nan), "NaN"),
        (np.zeros((4, 4, 5), np.uint8), "5 channels"),
        (torch.zeros(4, 4), "got (4, 4)"),
    ],
)
def test_what_is_no_image(image: object, said: str, translate: fastgan.inference.Translator) -> None:
    with pytest.raises(DataError, match=re.escape(said)):
        translate(image)  # type: ignore[type-var]
