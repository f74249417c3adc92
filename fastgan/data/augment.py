"""From decoded images to tensors: resize and crop rules, channel rules, flips and value ranges.

Sizes follow the original release (and CUT for scale_shortside). Training, before the random crop:

    resize_and_crop            load_size x load_size
    crop                       as it is
    scale_width[_and_crop]     width load_size, height in proportion but at least crop_size
    scale_shortside_and_crop   enlarged until the shorter side is load_size; larger images stay
    square_and_crop            the largest square in the centre, to load_size x load_size
    none                       each side rounded to a multiple of 4

Testing: the same with load_size = crop_size and the crop in the centre. Resizing is Pillow's antialiased
bicubic: on 8-bit grey and RGB the same bytes as the original release, otherwise channel by channel in
float32, clipped to the values of the image. The tensors' flip and mapping run on their device for a whole
batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastgan.config import Preprocess
from fastgan.data.images import DataError

OutputRange = Literal["tanh", "sigmoid"]
_MODES: tuple[str, ...] = get_args(Preprocess)


@dataclass(frozen=True)
class Geometry:
    """How an image is resized, and the side of the square cut out of it afterwards."""

    preprocess: Preprocess
    load_size: int
    crop_size: int

    def __post_init__(self) -> None:
        if self.preprocess not in _MODES:
            raise DataError(f"--preprocess {self.preprocess}: must be one of {', '.join(_MODES)}")
        if self.crop_size < 1 or self.load_size < 1:
            raise DataError(f"--load-size {self.load_size} --crop-size {self.crop_size}: must be at least 1")
        resized = self.preprocess not in ("crop", "none", "scale_width")
        if resized and self.load_size < self.crop_size:
            raise DataError(f"--load-size {self.load_size} is smaller than --crop-size {self.crop_size}")

    @property
    def crop(self) -> int | None:
        """Side of the square that a batch holds, or None where whole images are used."""
        return self.crop_size if self.preprocess.endswith("crop") else None

    def at_test(self) -> "Geometry":
        """Return the rule for test images."""
        return Geometry(self.preprocess, self.crop_size, self.crop_size)

    def part(self, image: np.ndarray) -> np.ndarray:
        """Return the part of (H, W, C) that is resized."""
        return centre_crop(image, min(image.shape[:2]) if self.preprocess == "square_and_crop" else None)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) an image is resized to."""
        mode, load = self.preprocess, self.load_size
        if mode in ("resize_and_crop", "square_and_crop"):
            return load, load
        if mode.startswith("scale_width"):
            if width == load and height >= self.crop_size:
                return height, width
            return int(max(load * height / width, self.crop_size)), load
        if mode == "scale_shortside_and_crop" and min(height, width) < load:
            scale = load / min(height, width)
            return round(height * scale), round(width * scale)
        if mode == "none":
            return max(4, round(height / 4) * 4), max(4, round(width / 4) * 4)
        return height, width


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W, C) of uint8, uint16 or float32 to (height, width) in the same type."""
    if image.shape[:2] == size:
        return image
    shape = (size[1], size[0])
    if image.dtype == np.uint8:
        if image.shape[2] == 3:
            return np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.BICUBIC))
        planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in image.transpose(2, 0, 1)]
        return np.stack(
            [np.asarray(plane.resize(shape, Image.Resampling.BICUBIC)) for plane in planes], axis=2
        )
    floats = [Image.fromarray(np.ascontiguousarray(plane, np.float32)) for plane in image.transpose(2, 0, 1)]
    out = np.stack([np.asarray(plane.resize(shape, Image.Resampling.BICUBIC)) for plane in floats], axis=2)
    # a cubic kernel overshoots at edges
    out = np.clip(out, np.float32(image.min()), np.float32(image.max()))
    return np.rint(out).astype(image.dtype) if image.dtype == np.uint16 else out


def match_channels(image: np.ndarray, channels: int) -> np.ndarray | None:
    """Repeat grey to RGB, weigh RGB to grey (ITU-R BT.601); None for other changes of the count."""
    have = image.shape[2]
    if have == channels:
        return image
    if have == 1 and channels == 3:
        return image.repeat(channels, axis=2)
    if have == 3 and channels == 1:
        if image.dtype == np.float32:
            red, green, blue = (
                image[..., i : i + 1] * np.float32(w) for i, w in enumerate((0.299, 0.587, 0.114))
            )
            return red + green + blue
        # the integer weights of Pillow, so that 8-bit images come out as in the original release
        wide = image.astype(np.uint32)
        grey = (wide[..., 0] * 19595 + wide[..., 1] * 38470 + wide[..., 2] * 7471 + 0x8000) >> 16
        return grey.astype(image.dtype)[..., None]
    return None


def match_dtype(image: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray | None:
    """Widen 8 to 16 bits with the same black and white; None for other changes of type."""
    if image.dtype == dtype:
        return image
    if image.dtype == np.uint8 and dtype == np.uint16:
        return image.astype(np.uint16) * np.uint16(257)
    return None


def centre_crop(image: np.ndarray, side: int | None) -> np.ndarray:
    """Cut the middle square out of (H, W, C); None leaves the image as it is."""
    if side is None:
        return image
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[top : top + side, left : left + side]


def to_tensor(
    images: np.ndarray,
    value_range: tuple[float, float],
    *,
    device: torch.device | str = "cpu",
    output_range: OutputRange = "tanh",
    flips: Sequence[bool] = (),
    clamp: bool = False,
) -> Tensor:
    """Bring (N, H, W, C) of uint8, uint16 or float32 to a device as float32 (N, C, H, W), channels last.

    value_range lands on [-1, 1] ("tanh") or [0, 1] ("sigmoid"). flips: which images to mirror left-right,
    empty for none. clamp: cut off what lies outside of the range.
    """
    x = to_device(images, torch.device(device))
    return map_values(x, value_range, output_range=output_range, flips=flips, clamp=clamp)


def to_device(images: np.ndarray, device: torch.device) -> Tensor:
    """Bring uint8, uint16 or float32 to a device as uint8, int16 with the bits of uint16, or float32."""
    if not images.flags.writeable:
        images = images.copy()
    # torch has next to no operations on uint16
    host = torch.from_numpy(images.view(np.int16) if images.dtype == np.uint16 else images)
    if device.type == "cuda":
        # from pageable memory the copy would wait for everything queued on the device
        host = host.pin_memory()
    return host.to(device, non_blocking=device.type == "cuda")


def map_values(
    x: Tensor,
    value_range: tuple[float, float],
    *,
    output_range: OutputRange = "tanh",
    flips: Sequence[bool] = (),
    clamp: bool = False,
) -> Tensor:
    """The half of `to_tensor` on the device, of (N, H, W, C) from `to_device`; a fresh tensor."""
    if any(flips):
        mirrored = x.flip(2)
        if all(flips):
            x = mirrored
        else:
            x = torch.stack([(mirrored if flip else x)[i] for i, flip in enumerate(flips)])
    integer = x.dtype != torch.float32
    x = x.to(torch.int32).bitwise_and_(0xFFFF).to(torch.float32) if x.dtype == torch.int16 else x.float()
    low, high = value_range
    # a float32 tensor may still be the caller's memory, so this must copy; integers have been copied above
    x = (x.sub_(low) if low else x) if integer else x - low
    # by a tensor: a GPU would multiply with the reciprocal of a number, and round otherwise than a CPU
    x = x.div_(x.new_full((), high - low))
    if clamp:
        x = x.clamp_(0, 1)
    if output_range == "tanh":
        x = x.mul_(2).sub_(1)
    return x.permute(0, 3, 1, 2)


def from_tensor(
    x: Tensor,
    value_range: tuple[float, float],
    dtype: np.dtype[Any] | type,
    *,
    output_range: OutputRange = "tanh",
) -> np.ndarray:
    """Bring (N, C, H, W) in [-1, 1] or [0, 1] back to (N, H, W, C) in value_range, clipped and rounded."""
    dtype = np.dtype(dtype)
    low, high = value_range
    x = x.detach().float()
    unit = ((x + 1) / 2 if output_range == "tanh" else x).clamp(0, 1)
    values = (unit * (high - low) + low).permute(0, 2, 3, 1).cpu().numpy()
    if dtype.kind != "f":
        values = np.rint(np.clip(values, 0, np.iinfo(dtype).max))
    return np.ascontiguousarray(values.astype(dtype))
