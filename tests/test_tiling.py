"""Translation in tiles: the result of the whole image, in the memory of a tile, and nothing left behind."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.tiling import steps
from fastgan import tiling, translate
from fastgan.config import UsageError
from fastgan.data.images import read_images
from fastgan.inference import Generator, load_generator
from fastgan.models import ResnetGenerator, UnetGenerator, init_weights
from fastgan.models.resnet import ResnetBlock

# float32 sums in another order; the statistics of a plane differ in the last bits
CLOSE = {"rtol": 0, "atol": 3e-5}


def network(seed: int = 0, channels: tuple[int, int] = (3, 2), **options: object) -> ResnetGenerator:
    torch.manual_seed(seed)
    net = ResnetGenerator(*channels, **({"ngf": 4, "blocks": 2} | options))  # type: ignore[arg-type]
    # outputs spread over (-1, 1), so that an error anywhere inside is seen
    init_weights(net, "kaiming")
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0.0, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and module.bias is not None:
            nn.init.normal_(module.bias)
    return net.eval()


def image(*size: int) -> Tensor:
    """Noise on a brightness that changes across the image, so that no tile has its statistics."""
    torch.manual_seed(7)
    ramp = torch.linspace(-0.7, 0.7, size[1]) * torch.linspace(0, 1, size[0])[:, None]
    return ramp + 0.3 * torch.randn(1, 3, *size)


def tiled(net: nn.Module, x: Tensor, tile: int, **options: object) -> Tensor:
    out: list[tuple[tiling.Box, Tensor]] = []

    def read(box: tiling.Box) -> Tensor:
        return x[:, :, box.top : box.bottom, box.left : box.right]

    size = (x.shape[2], x.shape[3])
    tiling.run_tiles(net, read, lambda box, y: out.append((box, y)), size, tile, **options)
    result = torch.full((1, out[0][1].shape[1], *size), torch.nan, dtype=out[0][1].dtype)
    for box, y in out:
        result[:, :, box.top : box.bottom, box.left : box.right] = y
    return result


@pytest.mark.parametrize("padding", ["reflect", "replicate", "zero"])
@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
def test_tiles_give_the_whole_image(norm: str, padding: str) -> None:
    net = network(norm=norm, padding=padding, dropout=True)
    # a remainder of 4 pixels, one tile only, a strip lower than the halo of a 7x7 layer is wide
    for size, tile in (((68, 100), 32), ((40, 24), 64), ((8, 132), 32)):
        x = image(*size)
        with torch.no_grad():
            y = net(x)
        assert y.std() > 0.2
        torch.testing.assert_close(tiled(net, x, tile), y, **CLOSE)


def test_tiles_of_their_own_statistics_would_be_far_off() -> None:
    """The tolerance above can tell: a halo beyond the reach of the network is not enough."""
    net, x = network(blocks=1), image(160, 160)
    with torch.no_grad():
        y, alone = net(x), net(x[:, :, :128, :128])
    # 16 pixels from the new border on nothing but the statistics differs
    assert (y[:, :, :64, :64] - alone[:, :, :64, :64]).abs().max() > 100 * CLOSE["atol"]


def test_the_paper_s_network() -> None:
    net, x = network(ngf=8, blocks=9), image(256, 256)
    with torch.no_grad():
        y = net(x)
    torch.testing.assert_close(tiled(net, x, 96), y, rtol=0, atol=1e-4)


def test_batch_norm_of_the_image_at_hand() -> None:
    """In training mode, batch size 1, a batch norm is given the statistics of the whole image."""
    net, x = network(norm="batch"), image(68, 72)
    for module in net.modules():
        module.training = isinstance(module, nn.BatchNorm2d)
    y = tiled(net, x, 32)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(y, net(x), **CLOSE)


def test_affine_and_mean_far_from_zero() -> None:
    """Torch's own layers, a scale and a shift per channel, and a mean of hundreds of times the spread."""
    torch.manual_seed(0)
    line = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.InstanceNorm2d(4, affine=True), nn.LeakyReLU(0.1),
        nn.Sequential(nn.ReplicationPad2d(1), nn.Conv2d(4, 2, 3)), nn.InstanceNorm2d(2), nn.Sigmoid(),
    ).eval()  # fmt: skip
    nn.init.normal_(line[1].weight)
    nn.init.normal_(line[1].bias)
    nn.init.constant_(line[0].bias, 300.0)
    net = nn.Module()
    net.line = line
    x = image(70, 45)
    with torch.inference_mode():
        exact = line.double()(x.double()).float()
        line.float()
        # float32 keeps 5 digits of the spread
        torch.testing.assert_close(tiled(net, x, 32), exact, rtol=0, atol=1e-3)


def test_half_precision_is_that_of_the_whole_image() -> None:
    net, x = network(channels=(3, 3)), image(64, 96)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = net(x)
        z = tiled(net, x, 32)
    assert z.dtype == y.dtype == torch.bfloat16
    with torch.no_grad():
        exact = net(x)
    # bfloat16 changes the output by this much; tiles add nothing of note to it
    assert (z - exact).abs().mean() < 1.1 * (y - exact).abs().mean() < 0.1


def test_no_layer_sees_more_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = network(), image(264, 520)
    seen, lengths = [], []
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.register_forward_pre_hook(lambda _, args: seen.append(max(args[0].shape[2:])))
    close = tiling._Spill.close

    def closing(spill: tiling._Spill) -> None:
        lengths.append((spill.file.seek(0, 2), spill))
        close(spill)

    monkeypatch.setattr(tiling._Spill, "close", closing)
    tiled(net, x, 64)
    # the tile, its halo, and what the layer pads
    assert len(seen) == 10 * 5 * 9 and max(seen) <= 64 + 2 * 3 + 2 * 3
    # every layer's file is closed once, and none is larger than the most that is stated
    assert len({id(spill) for _, spill in lengths}) == len(lengths) == 10 + 2
    assert max(length for length, _ in lengths) <= tiling.disk_bytes(net, (264, 520))


def test_stated_disk_is_what_the_files_take(monkeypatch: pytest.MonkeyPatch) -> None:
    live: dict[int, int] = {}
    most = [0]
    write, close = tiling._Spill.write, tiling._Spill.close

    def writing(spill: tiling._Spill, box: tiling.Box, x: Tensor) -> None:
        write(spill, box, x)
        live[id(spill)] = spill.file.seek(0, 2)
        most[0] = max(most[0], sum(live.values()))

    def closing(spill: tiling._Spill) -> None:
        live.pop(id(spill), None)
        close(spill)

    monkeypatch.setattr(tiling._Spill, "write", writing)
    monkeypatch.setattr(tiling._Spill, "close", closing)
    # residual blocks at full size hold two layers more than a convolution does
    wide = nn.Module()
    block = ResnetBlock(8, norm="instance", padding="reflect", dropout=False)
    wide.line = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), block, block, nn.Conv2d(8, 3, 1)).eval()
    for net in (network(), network(ngf=2, blocks=0), wide):
        most[0] = 0
        tiled(net, image(64, 96), 32)
        assert most[0] == tiling.disk_bytes(net, (64, 96))
        assert not live


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = network(), image(64, 64)
    write, calls = tiling._Spill.write, iter(range(100))

    def full(spill: tiling._Spill, box: tiling.Box, part: Tensor) -> None:
        write(spill, box, part)
        if next(calls) == 6:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tiling._Spill, "write", full)
    with pytest.raises(OSError, match="No space left"):
        tiled(net, x, 32, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = network(), image(64, 96)
    need = tiling.disk_bytes(net, (64, 96))
    for free, fits in ((need, True), (need - 1, False)):
        monkeypatch.setattr(tiling.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if fits:
            tiled(net, x, 32, folder=tmp_path)
        else:
            with pytest.raises(OSError, match=f"temporary files in {tmp_path}"):
                tiled(net, x, 32, folder=tmp_path)


def test_brightness_steps_are_counted() -> None:
    whole = image(64, 96).clamp(-1, 1)
    other = whole.clone()
    other[:, :, 32:, :32] += 4 / 127.5
    found = steps(other, whole, 32)
    # of 7 pairs of neighbours two differ, by four levels
    assert found["step_max_levels"] == pytest.approx(4, abs=1e-3)
    assert found["step_mean_levels"] == pytest.approx(8 / 7, abs=1e-3)
    assert steps(whole, whole, 32) == dict.fromkeys(found, 0.0)


def generator(net: nn.Module) -> Generator:
    kinds = (np.dtype("uint8"), np.dtype("uint8"))
    full = ((0.0, 255.0), (0.0, 255.0))
    return Generator(net, (3, 3), full, kinds, "tanh", torch.device("cpu"), None, "net")


@pytest.mark.parametrize("size", [(67, 101), (5, 70), (64, 64)])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_arrays_of_any_size_and_type(size: tuple[int, int], kind: type) -> None:
    net = network(channels=(3, 3))
    call = generator(net)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(kind)
    pixels = pixels / kind(255) if kind is np.float32 else pixels * kind(257 if kind is np.uint16 else 1)
    whole, parts = call(pixels), call(pixels, tile=32)
    assert parts.dtype == whole.dtype and parts.shape == whole.shape
    # rounding at the edge of a half, or 3e-5 of the range
    step = {np.uint8: 1, np.uint16: 2, np.float32: 3e-5}[kind]
    assert np.abs(parts.astype(np.float64) - whole).max() <= step
    assert whole.std() > 0


@pytest.fixture()
def weights(tmp_path: Path) -> Path:
    torch.save(network(channels=(3, 3), blocks=1).state_dict(), tmp_path / "latest_net_G.pth")
    return tmp_path / "latest_net_G.pth"


def test_the_flag(weights: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    common = [str(weights), str(tmp_path / "in.png")]
    precise = ["--device", "cpu", "--precision", "fp32"]
    for name, flags in (("whole", []), ("tiles", ["--tile", "32"]), ("auto", ["--tile", "auto"])):
        translate.main([*common, str(tmp_path / "out" / f"{name}.png"), *precise, *flags])
    whole, tiles, auto = (
        read_images(tmp_path / "out" / f"{name}.png")[0].astype(int) for name in ("whole", "tiles", "auto")
    )
    assert np.array_equal(whole, auto)
    assert whole.std() > 0 and np.abs(whole - tiles).max() <= 1
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"whole.png", "tiles.png", "auto.png"}


@pytest.mark.parametrize("tile", ["30", "16", "0", "-64", "many", "1e3"])
def test_tiles_that_cannot_be(
    tile: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "in.png")
    with pytest.raises(SystemExit) as stop:
        translate.main(
            [str(weights), str(tmp_path / "in.png"), str(tmp_path / "out/a.png"), f"--tile={tile}"]
        )
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and "--tile" in lines[0] and tile in lines[0]
    assert not (tmp_path / "out").exists()


def test_networks_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(UnetGenerator(3, 3, ngf=2, levels=3).state_dict(), tmp_path / "latest_net_G.pth")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "in.png")
    files = [str(tmp_path / name) for name in ("latest_net_G.pth", "in.png", "out/a.png")]
    with pytest.raises(SystemExit) as stop:
        translate.main([*files, "--tile", "32"])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1
    assert "--tile: a UnetGenerator" in lines[0] and "whole image" in lines[0]
    assert not (tmp_path / "out").exists()
    # auto leaves it as it is
    assert tiling.pick_tile(load_generator(files[0], device="cpu").net, (10**5, 10**5), 10**6) is None


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ([nn.AvgPool2d(2)], "only convolutions"),
        ([nn.Conv2d(3, 3, 3)], "keep the size"),
        ([nn.ConvTranspose2d(3, 3, 4, 2)], "keep the size"),
        ([nn.Conv2d(3, 3, 3, padding=2, dilation=2)], "dilation"),
        ([nn.InstanceNorm2d(3), nn.Conv2d(3, 3, 1)], "does not follow a convolution"),
        ([nn.Conv2d(3, 3, 1), nn.ReLU(), nn.InstanceNorm2d(3)], "does not follow a convolution"),
        ([nn.ReflectionPad2d(1), nn.ReLU(), nn.Conv2d(3, 3, 3)], "between a padding"),
        ([nn.Conv2d(3, 3, 1), nn.Dropout(0.5)], "another mask"),
    ],
)
def test_layers_that_cannot_be(layers: list[nn.Module], why: str) -> None:
    net = nn.Module()
    net.line = nn.Sequential(*layers)
    with pytest.raises(UsageError, match=why):
        tiling.stages(net)


def test_auto_takes_the_largest_that_fits() -> None:
    net = network(ngf=64, blocks=1)
    whole = [tiling.pick_tile(net, (side, side), 4 * 2**30) for side in (512, 8192)]
    assert whole[0] is None and whole[1] is not None and whole[1] >= 512
    sides = [tiling.pick_tile(net, (8192, 8192), free) for free in (2**27, 2**29, 2**31, 2**40)]
    assert sides[-1] is None and sides[:-1] == sorted(sides[:-1]) and len(set(sides)) == 4
    assert tiling.pick_tile(net, (8192, 8192), None) is None
