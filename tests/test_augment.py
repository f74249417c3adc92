"""Sizes, resampling, channel and value rules, against the original release and Pillow."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan.data.augment import Geometry, from_tensor, match_channels, resize, to_tensor
from fastgan.data.dataset import Data, open_data
from fastgan.data.images import write_image


def _random(height: int, width: int, channels: int = 3, dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, np.iinfo(dtype).max, (height, width, channels), endpoint=True).astype(dtype)


def _write(root: Path, images: dict[str, np.ndarray]) -> Path:
    for name, image in images.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, image)
    return root


def _values(data: Data, batch: dict[str, torch.Tensor], domain: str = "A") -> np.ndarray:
    number = "AB".index(domain)
    return from_tensor(batch[domain], data.ranges[number], data.dtypes[number])


def _upstream_size(mode: str, width: int, height: int, load: int, crop: int) -> tuple[int, int]:
    """The size rules of the original release and of CUT, as (width, height)."""
    if mode == "resize_and_crop":
        return load, load
    if mode in ("scale_width", "scale_width_and_crop"):
        return (
            (width, height)
            if width == load and height >= crop
            else (load, int(max(load * height / width, crop)))
        )
    if mode == "scale_shortside_and_crop":
        short = min(width, height)
        scale = 1 if short >= load else load / short
        return round(width * scale), round(height * scale)
    if mode == "none":
        return int(round(width / 4) * 4), int(round(height / 4) * 4)
    return width, height


@pytest.mark.parametrize("size", [(40, 50), (218, 178), (45, 36)])
def test_a_square_is_cut_before_it_is_resized(tmp_path: Path, size: tuple[int, int]) -> None:
    """As StarGAN's code does: CelebA's 178x218 are cut to 178x178; its resize alone is bilinear."""
    image, side = _random(*size), min(size)
    _write(tmp_path, {f"{name}/0.png": image for name in ("trainA", "trainB", "testA", "testB")})
    data = open_data(
        tmp_path, paired=False, preprocess="square_and_crop", load_size=32, crop_size=32, flip=False
    )
    left, top = (size[1] - side) // 2, (size[0] - side) // 2
    wanted = Image.fromarray(image).crop((left, top, left + side, top + side))
    wanted = np.asarray(wanted.resize((32, 32), Image.Resampling.BICUBIC))
    for split in (data.train, data.test):
        assert np.array_equal(_values(data, split.test_batch(0, 1))[0], wanted)
    assert np.array_equal(_values(data, data.train.batch(0, 1, seed=0))[0], wanted)


MODES = ["resize_and_crop", "crop", "scale_width", "scale_width_and_crop", "scale_shortside_and_crop", "none"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(40, 50), (50, 40), (33, 71), (36, 36), (45, 36), (46, 58)])
def test_geometry_and_pixels_are_those_of_the_original_release(
    tmp_path: Path, mode: str, size: tuple[int, int]
) -> None:
    """Test images against Pillow's resize, centre crop and (x / 255 - 0.5) / 0.5, bit for bit."""
    height, width = size
    image = _random(height, width)
    geometry = Geometry(mode, 36, 32)  # type: ignore[arg-type]
    assert geometry.size(height, width)[::-1] == _upstream_size(mode, width, height, 36, 32)
    _write(tmp_path, {f"{name}/0.png": image for name in ("trainA", "trainB", "testA", "testB")})
    data = open_data(tmp_path, paired=False, preprocess=mode, load_size=36, crop_size=32)  # type: ignore[arg-type]
    wanted = Image.fromarray(image)
    new = _upstream_size(mode, width, height, 32, 32)
    if new != wanted.size:
        wanted = wanted.resize(new, Image.Resampling.BICUBIC)
    if mode.endswith("crop"):
        left, top = (wanted.width - 32) // 2, (wanted.height - 32) // 2
        wanted = wanted.crop((left, top, left + 32, top + 32))
    expected = torch.from_numpy(np.asarray(wanted).copy()).permute(2, 0, 1).float().div(255).sub(0.5).div(0.5)
    assert torch.equal(data.test.images("A", 0, 1)[0], expected)
    batch = data.train.batch(0, 1, seed=0)["A"]
    train = _upstream_size(mode, width, height, 36, 32)
    assert batch.shape[2:] == ((32, 32) if mode.endswith("crop") else train[::-1])
    assert data.size == (32 if mode.endswith("crop") else None)


def test_training_pixels_are_a_crop_of_the_resized_image(tmp_path: Path) -> None:
    image = _random(50, 40)
    _write(tmp_path, {"A/0.png": image, "B/0.png": image})
    data = open_data(tmp_path, paired=True, load_size=36, crop_size=32, flip=False)
    resized = np.asarray(Image.fromarray(image).resize((36, 36), Image.Resampling.BICUBIC))
    crops = {resized[y : y + 32, x : x + 32].tobytes() for y in range(5) for x in range(5)}
    assert len({_values(data, data.train.batch(k, 1, seed=0)).tobytes() for k in range(200)} | crops) == 25


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_resize_of_other_types_agrees_with_eight_bits(dtype: str, channels: int) -> None:
    # kept from black and white, because with 8 bits the first of the two passes is clipped there
    image = _random(30, 40, channels) // 2 + 64
    expected = resize(image, (20, 52)).astype(float)
    assert expected.shape == (20, 52, channels)
    if dtype == "uint8":
        plane = np.asarray(Image.fromarray(image[..., 0]).resize((52, 20), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(expected[..., 0], plane)
    factor = {"uint8": 1, "uint16": 257, "float32": 0.01}[dtype]
    scaled = (image.astype(np.float64) * factor).astype(dtype)
    got = resize(scaled, (20, 52))
    assert got.dtype == np.dtype(dtype)
    if dtype != "uint8":
        expected = expected.clip(image.min(), image.max())
    # 8 bits round after both passes; the weights of the second add up to at most 1.5 in absolute value
    np.testing.assert_allclose(got / factor, expected, atol=1.25)


def test_grey_weights_are_pillows() -> None:
    image = _random(30, 40)
    grey = match_channels(image, 1)
    assert grey is not None
    np.testing.assert_array_equal(grey[..., 0], np.asarray(Image.fromarray(image).convert("L")))
    wide = match_channels(image.astype(np.uint16) * np.uint16(257), 1)
    floats = match_channels(image.astype(np.float32), 1)
    assert wide is not None and floats is not None
    np.testing.assert_allclose(wide / 257, grey, atol=0.51)
    np.testing.assert_allclose(floats, grey, atol=0.51)
    for count, wanted in ((4, 3), (3, 4), (1, 2), (2, 1)):
        assert match_channels(_random(4, 4, count), wanted) is None


def test_to_tensor_and_back() -> None:
    for dtype in ("uint8", "uint16"):
        images = np.stack([_random(6, 8, 5, dtype, seed) for seed in range(4)])
        before = images.copy()
        limits = (0.0, float(np.iinfo(dtype).max))
        flips = [True, False, False, True]
        x = to_tensor(images, limits, flips=flips)
        wanted = [image[:, ::-1] if flip else image for image, flip in zip(images, flips)]
        np.testing.assert_array_equal(from_tensor(x, limits, dtype), np.stack(wanted))
        y = to_tensor(images, limits, output_range="sigmoid", flips=[True] * 4)
        np.testing.assert_array_equal(
            from_tensor(y, limits, dtype, output_range="sigmoid"), images[:, :, ::-1]
        )
        np.testing.assert_array_equal(images, before)
    floats = np.random.default_rng(0).normal(size=(2, 4, 4, 1)).astype(np.float32)
    before = floats.copy()
    floats.setflags(write=False)
    x = to_tensor(floats, (-4, 4))
    np.testing.assert_array_equal(floats, before)
    np.testing.assert_allclose(from_tensor(x, (-4, 4), np.float32), floats, atol=1e-6)
