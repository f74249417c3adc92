"""SRGAN and SRCNN are what their definitions say, and what they make of images of any kind is larger; see
test_recipes.py for the method."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

import fastgan
from fastgan import evaluate, export, inference, train, translate
from fastgan.checkpoint import write_weights
from fastgan.config import UsageError
from fastgan.data.images import read_picture
from fastgan.inference import load_generator
from fastgan.metrics import learned
from fastgan.models import SRCNN, SRGANDiscriminator, SRResNet, features, srgan
from fastgan.models.srgan import enlarge, luma, reduce
from fastgan.models.vgg import VGGFeatures, layer_names, recognise
from fastgan.recipes.srgan import SRGAN, SRGANConfig
from fastgan.stack import set_memory
from fastgan.step import Step
from tests.reference_enlarging import (
    ReferenceSRCNN,
    ReferenceSRDiscriminator,
    ReferenceSRGAN,
    ReferenceSRResNet,
    imresize,
    normalised,
    reference_vgg,
)
from tests.system_cases import CLOSE, FACTORS, double, make_batches


def noise(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# resizing


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 9)])
def test_resizing_is_matlabs(scale, size):
    """The border too, where Pillow and torch leave out what is not there; images below the kernel's size."""
    x = noise(2, 3, *(scale * side for side in size))
    assert_close(reduce(x, scale), imresize(x, 1 / scale), rtol=0, atol=1e-12)
    assert_close(enlarge(x, scale), imresize(x, scale), rtol=0, atol=1e-12)


def test_reduction_needs_whole_pixels():
    with pytest.raises(ValueError, match="multiples of 4"):
        reduce(noise(1, 1, 8, 9), 4)


def test_luma_is_matlabs():
    """rgb2ycbcr of black, white and the colours."""
    x = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]).double()[:, :, None, None]
    assert_close((luma(x) * 255).flatten().round(), torch.tensor([16, 235, 81, 145, 41]).double())
    assert torch.equal(luma(x[:, :1]), x[:, :1])


# networks


def test_parameters_are_the_published_ones():
    nets = SRResNet(3), SRCNN(), SRCNN(width=5)
    first, *others = (sum(p.numel() for p in net.parameters()) for net in nets)
    assert round(first / 1e6, 2) == 1.55
    assert others == [8129, 57281]
    assert SRGANDiscriminator(3, ndf=4)(torch.rand(2, 3, 96, 96)).shape == (2, 1)


NETS: dict[str, Any] = {
    "srresnet": lambda: SRResNet(2, ngf=4, blocks=2),
    "twice": lambda: SRResNet(3, scale=2, ngf=3, blocks=1, norm="none"),
    "srcnn": lambda: SRCNN(),
    "9-5-5": lambda: SRCNN(scale=3, width=5),
}
TWINS: dict[str, Any] = {
    "srresnet": lambda: ReferenceSRResNet(2, 4, 4, 2, "batch"),
    "twice": lambda: ReferenceSRResNet(3, 2, 3, 1, "none"),
    "srcnn": lambda: ReferenceSRCNN(4, 1),
    "9-5-5": lambda: ReferenceSRCNN(3, 5),
}


def lively(net: nn.Module) -> nn.Module:
    """With statistics and weights that matter."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
    return net


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", [True, False])
def test_networks_are_the_reference(name, training):
    torch.manual_seed(0)
    net, twin = lively(NETS[name]()).double().train(training), TWINS[name]().double().train(training)
    twin.load_state_dict(net.state_dict())
    x = noise(2, 2 if name == "srresnet" else 3, 9, 6) * 2 - 1
    assert_close(net(x), twin(x), rtol=0, atol=1e-6 if name in ("srcnn", "9-5-5") else 1e-12)


@pytest.mark.parametrize("name", NETS)
def test_reach_is_what_a_pixel_depends_on(name):
    """No pixel depends on more; SRResNet's on no less."""
    net = NETS[name]().double().eval()
    side, found = 2 * net.reach + 9, 0
    x = (
        torch.zeros(1, 2 if name == "srresnet" else 3, side, side, dtype=torch.float64)
        .normal_()
        .requires_grad_()
    )
    y, middle = net(x), side // 2
    for shift in range(net.scale):
        place = middle * net.scale + shift
        (slope,) = torch.autograd.grad(y[0, 0, place, place], x, retain_graph=True)
        rows = slope[0].abs().sum((0, 2)).nonzero().flatten()
        found = max(found, middle - int(rows.min()), int(rows.max()) - middle)
    assert found == net.reach if name in ("srresnet", "twice") else 0 < found <= net.reach


@pytest.mark.parametrize("memory", ["fast", "low", "least"])
def test_fused_and_computed_again_it_is_the_same(memory, monkeypatch):
    """The path of the ops that a GPU takes, on their reference."""
    torch.manual_seed(0)
    nets = lively(SRResNet(3, ngf=4, blocks=2)), SRGANDiscriminator(3, side=64, ndf=4)
    plain, fused = (copy.deepcopy(nn.Sequential(*nets)).double() for _ in range(2))
    set_memory([fused], memory)
    x, found = noise(2, 3, 16, 16), []
    for net in (plain, fused):
        if net is fused:
            for module in (srgan, features):
                monkeypatch.setattr(module, "runs_fused", lambda x: True)
        y = net(x)
        y.square().mean().backward()
        found.append([y, *(p.grad for p in net.parameters()), *net.buffers()])
    assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["vgg16", "vgg19"])
def test_vgg_has_torchvisions_layout(kind):
    torch.manual_seed(0)
    whole = reference_vgg(kind)
    state = {f"features.{key}": value for key, value in whole.state_dict().items()}
    state |= {"classifier.6.weight": torch.zeros(1)}
    assert recognise(state) == kind
    # LPIPS takes the one and not the other
    assert learned.recognise(state) == ("vgg16" if kind == "vgg16" else "")
    taps = ["relu2_2", "conv3_1", "pool2", "relu5_1"]
    net = VGGFeatures.load(state, taps, kind=kind).double()
    x = noise(1, 3, 32, 40) * 2 - 1
    h, expected = normalised(x), {}
    for name, layer in zip(layer_names(kind), whole.double(), strict=True):
        h = expected[name] = layer(h)
    for name, mine in zip(taps, net(x), strict=True):
        # mean and spread of ImageNet are float32
        assert_close(mine, expected[name], rtol=0, atol=1e-6)
    assert not any(p.requires_grad for p in net.parameters())
    bright = VGGFeatures.load(state, taps, kind=kind, output="sigmoid").double()
    assert_close(bright((x + 1) / 2)[3], expected["relu5_1"], rtol=0, atol=1e-6)
    assert_close(net(x[:, :1])[3], net(x[:, :1].expand(-1, 3, -1, -1))[3])


# the system

SMALL: dict[str, Any] = {"ngf": 4, "ndf": 4, "blocks": 2, "crop_size": 16, "lr": 0.01, "init": "torch"}
CASES: dict[str, dict[str, Any]] = {
    "pixels": {"stage": "pixels"},
    "added to bicubic": {"stage": "pixels", "add_bicubic": True, "norm": "none"},
    "gan of pixels": {"lambda_gan": 0.5},
    "vgg54": {"content_loss": "vgg54", "lambda_gan": 0.1, "lambda_vgg": 2.0},
    "vgg22, twice": {"content_loss": "vgg22", "scale": 2, "norm": "none", "beta1": 0.5},
    "weights": {"d_real_weight": 0.25, "real_label": 0.9, "lr_d": 0.003, "ema": 0.9, "beta2": 0.9},
    "srcnn": {"stage": "pixels", "architecture": "srcnn", "filters": "9-5-5", "scale": 2, "lr": 1e-3},
}


@pytest.fixture(scope="module")
def vgg19() -> nn.Sequential:
    """With features that differ, also in the last layers."""
    torch.manual_seed(3)
    net = reference_vgg("vgg19")
    for layer in net:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    return net


@pytest.fixture(scope="module")
def vgg19_file(vgg19: nn.Sequential, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    torch.save({f"features.{k}": v for k, v in vgg19.state_dict().items()}, path)
    return path


@pytest.mark.parametrize("case", CASES)
def test_srgan_is_the_reference(case, vgg19, vgg19_file):
    settings = {**SMALL, **CASES[case]}
    content = settings.get("content_loss", "pixels")
    if content != "pixels":
        settings["vgg"] = vgg19_file
    config = SRGANConfig(**settings)
    recipe = SRGAN(config)
    torch.manual_seed(0)
    nets = double(recipe.networks(3, 0))
    steps = make_batches(3, size=16, n=2)
    recipe.prepare(steps[0][0])
    if recipe._vgg is not None:
        recipe._vgg.double()
    twins: dict[str, nn.Module] = {
        "G": ReferenceSRResNet(3, config.scale, 4, 2, config.norm, config.add_bicubic)
    }
    if config.architecture == "srcnn":
        twins["G"] = ReferenceSRCNN(config.scale, 5)
    if config.stage == "gan":
        twins["D"] = ReferenceSRDiscriminator(3, 16, 4, config.norm)
    for name, twin in twins.items():
        twin.double().load_state_dict(nets[name].state_dict(), strict=True)
    names = (
        "gan_mode real_label d_real_weight d_fake_weight lr lr_d beta1 beta2 ema scale lambda_gan lambda_vgg"
    )
    reference = ReferenceSRGAN(
        twins, content=content, vgg=None if content == "pixels" else copy.deepcopy(vgg19).double(),
        **{name: getattr(config, name) for name in names.split()},
    )  # fmt: skip
    # the mean and spread of ImageNet are float32
    close = CLOSE if content == "pixels" else {"rtol": 1e-5, "atol": 1e-6}
    step = Step(recipe, nets, device=torch.device("cpu"))
    for index, batches in enumerate(steps):
        terms = step(batches, index, FACTORS[index])
        for name, value in reference.step(batches, FACTORS[index]).items():
            assert_close(float(terms[name]), value, **close, msg=lambda m, at=(index, name): f"{at}: {m}")
        for name, twin in twins.items():
            for (key, p), mine in zip(twin.named_parameters(), nets[name].parameters(), strict=True):
                assert_close(mine, p, **close, msg=lambda m, at=(index, name, key): f"{at}: {m}")


def test_batch_norm_never_mixes():
    recipe = SRGAN(SRGANConfig(**SMALL))
    nets, batch = recipe.networks(3, 0), make_batches(1, size=16, n=3)[0][0]
    seen: list[int] = []
    nets["D"].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    Step(recipe, nets, device=torch.device("cpu"))([{"A": batch["A"].float()}], 0)
    assert seen == [3, 3, 3]


# images


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    nets = {"g": lively(SRResNet(3, ngf=8, blocks=2)), "c": SRCNN(scale=2)}
    for name, net in nets.items():
        about = {"channels": [3, 0], "settings": {"output": "tanh", "direction": "AtoB", "scale": 2}}
        write_weights(tmp_path / f"{name}.safetensors", net.state_dict(), about)
    return {name: Path(f"{name}.safetensors") for name in nets}


@pytest.mark.parametrize(("name", "scale"), [("g", 4), ("c", 2)])
def test_tiles_are_exact(weights, name, scale):
    x = noise(70, 97, 3).float().numpy()
    generator = load_generator(weights[name], device="cpu", precision="fp32")
    whole, tiles = (generator(x, tile=tile, dtype=np.float32) for tile in (None, 32))
    assert whole.shape == (70 * scale, 97 * scale, 3) and whole.std() > 0.01
    assert np.abs(whole - tiles).max() < 1e-5


def test_tiles_are_chosen_by_the_free_memory(weights, monkeypatch):
    """Whole where it fits into half of what is free; else the largest tiles that do, halo included."""
    generator = load_generator(weights["g"], device="cpu", precision="fp32")
    each = generator._bytes_of_a_pixel
    assert 16 * 8 * 4 * 2 < each < 16 * 8 * 4 * 20
    for side, expected in ((10_000, None), (900, 512), (100, 64), (10, 64)):
        monkeypatch.setattr(inference, "free_bytes", lambda device, side=side: 2 * int(each * side**2))
        assert generator._fitting_tile((1000, 1000)) == expected


def test_tiles_need_statistics_of_training(weights):
    generator = load_generator(weights["g"], device="cpu", bn_stats="batch")
    with pytest.raises(UsageError, match="statistics of the whole image"):
        generator(np.zeros((64, 64, 3), np.uint8), tile=32)


def test_files_become_larger_with_all_they_hold(weights):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (10, 7, 4), np.uint8), "RGBA").save("a.png")
    translate.main(["g.safetensors", "a.png", "b.png", "--device", "cpu"])
    picture = read_picture("b.png")
    assert picture.images[0].shape == (40, 28, 3) and picture.alphas[0].shape[:2] == (40, 28)
    alpha = torch.from_numpy(np.array(Image.open("a.png"))[None, None, ..., 3].astype(np.float64))
    expected = imresize(alpha, 4).clamp(0, 255).round()[0, 0]
    assert np.abs(np.array(Image.open("b.png"))[..., 3] - expected.numpy()).max() <= 1
    translate.main(["c.safetensors", "a.png", "b.tif", "--depth", "16", "--device", "cpu"])
    picture = read_picture("b.tif")
    assert picture.images[0].shape == (20, 14, 3) and picture.images[0].dtype == np.uint16
    result = fastgan.load("g.safetensors", device="cpu")(Image.open("a.png"))
    assert result.mode == "RGBA" and result.size == (28, 40)


@pytest.mark.parametrize("name", ["g", "c"])
def test_exports(weights, name, capsys):
    export.main([str(weights[name]), "g.pt2", "--format", "torch-export"])
    assert "from PyTorch" in capsys.readouterr().out
    export.main([str(weights[name]), "again.safetensors", "--format", "safetensors"])
    x = np.random.default_rng(0).integers(0, 256, (9, 8, 3), np.uint8)
    first, second = (fastgan.load(path, device="cpu")(x) for path in (weights[name], "again.safetensors"))
    assert np.array_equal(first, second)


# runs


def test_a_run_is_measured_beside_bicubic(tmp_path, monkeypatch, capsys):
    """Held-out images stay whole, are cut to multiples of the scale, and lose a border of its width."""
    monkeypatch.chdir(tmp_path)
    x = np.kron(np.random.default_rng(0).integers(0, 256, (4, 12, 12, 3)), np.ones((1, 5, 5, 1))).astype(
        np.uint8
    )
    for folder, images in (("train", x[:2]), ("test", x[2:])):
        Path(f"d/{folder}").mkdir(parents=True)
        for k, image in enumerate(images):
            Image.fromarray(image[: 60 - k, : 58 + k]).save(f"d/{folder}/{k}.png")
    words = ["srgan", "--data", "d", "--stage", "pixels", "--ngf", "4", "--blocks", "1", "--crop-size", "32"]
    words += [
        "--add-bicubic",
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--name",
        "r",
    ]
    train.main(words)
    evaluate.main(["runs/r", "--measures", "psnr_db", "psnr_y_db", "psnr_db_bicubic", "psnr_y_db_bicubic"])
    assert "psnr_y_db_bicubic" in capsys.readouterr().out
    system = json.loads(Path("runs/r/evaluation.json").read_text())
    found = {"psnr_db_bicubic": [], "psnr_y_db_bicubic": []}
    for k, image in enumerate(x[2:]):
        image = image[: 60 - k, : 58 + k]
        height, width = (side // 4 * 4 for side in image.shape[:2])
        true = torch.from_numpy(image[:height, :width].astype(np.float64) / 255).permute(2, 0, 1)[None]
        again = imresize(imresize(true, 0.25), 4).clamp(0, 1)
        a, b = (z[..., 4:-4, 4:-4] for z in (true, again))
        found["psnr_db_bicubic"].append(-10 * ((a - b) ** 2).mean().log10().item())
        weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64).view(1, 3, 1, 1) / 255
        found["psnr_y_db_bicubic"].append(-10 * (((a - b) * weights).sum(1) ** 2).mean().log10().item())
    for name, values in found.items():
        assert system[name] == pytest.approx(np.mean(values), abs=1e-3)
    assert system["psnr_db"] != system["psnr_db_bicubic"]
    assert system["details"]["enlarging"] == {"scale": 4, "border": 4, "images": 2}
    with pytest.raises(SystemExit):
        evaluate.main([str(next(Path("runs/r/checkpoints").glob("*/G.safetensors"))), "--data", "d"])
    assert "enlarges images" in capsys.readouterr().err
    # the second stage starts from the first one's weights
    train.main(
        [*[w for w in words if w not in ("--stage", "pixels")][:-1], "gan", "--start", "runs/r", "--lr", "0"]
    )
    first, second = (load_generator(Path(f"runs/{name}"), device="cpu").net for name in ("r", "gan"))
    assert first.add_bicubic
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


REFUSED = {
    "no file": (["--content-loss", "vgg54"], "--content-loss vgg54 needs --vgg FILE"),
    "missing": (["--vgg", "nothing.pth"], "nothing.pth does not exist"),
    "idle": (["--stage", "pixels", "--vgg", "v.pth"], "--vgg has no effect"),
    "another network": (["--vgg", "other.pth"], "--vgg other.pth: it is not torchvision's VGG19"),
    "another size": (["--vgg", "vgg16.pth"], "--vgg vgg16.pth: it holds VGG16, not VGG19"),
    "whole images": (["--preprocess", "none"], "D needs images cropped"),
    "generator": (["--generator", "unet"], "--generator has no effect"),
    "start": (["--start", "nothing"], "nothing does not exist"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_one_line(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "another" in case:
        states = {
            "other.pth": SRCNN().state_dict(),
            "vgg16.pth": {f"features.{k}": v for k, v in reference_vgg("vgg16").state_dict().items()},
        }
        torch.save(states[REFUSED[case][0][1]], REFUSED[case][0][1])
    words, said = REFUSED[case]
    with pytest.raises(SystemExit) as stop:
        train.main(["srgan", *words, "--device", "cpu", "--steps", "1"])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and said in lines[-1] and lines[-1].startswith("error: ")
    assert not list(tmp_path.glob("runs"))
