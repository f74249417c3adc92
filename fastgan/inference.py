"""A trained generator as a function of images: of arrays (`Generator`), or of any kind of image
(`fastgan.load`)."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from fastgan import checkpoint, tiling
from fastgan.checkpoint import Label, Labels
from fastgan.config import UsageError
from fastgan.data.augment import OutputRange, from_tensor, match_channels, to_tensor
from fastgan.data.colour import cmyk_to_srgb, to_srgb
from fastgan.data.images import DataError, Pages, from_unit, to_unit, type_range
from fastgan.device import pick_device, pick_precision
from fastgan.layers import place
from fastgan.memory import GB, free_bytes, translation_bytes
from fastgan.models import missing_pixels, translate_any_size
from fastgan.models.srgan import enlarge
from fastgan.parallel import Ranks

SMALLER = "give a smaller image, or --tile for a network that can run in tiles"
Kind = TypeVar("Kind", Image.Image, np.ndarray, Tensor)


@dataclass(frozen=True)
class Generator:
    """A trained generator with what its images mean; call it with an array of one image.

    net: the network in evaluation mode. channels, ranges, dtypes: of the input and of the output domain as
    trained; output: "tanh" or "sigmoid". name: the file it came from. pages: what the pages of a file were in
    training. random: whether every call gives another result. batch_norm_of_others: whether the file is not
    of fastgan and has batch norm, which upstream leaves in training mode. labels: what `set_label` takes.
    """

    net: nn.Module
    channels: tuple[int, int]
    ranges: tuple[tuple[float, float], tuple[float, float]]
    dtypes: tuple[np.dtype[Any], np.dtype[Any]]
    output: OutputRange
    device: torch.device
    autocast: torch.dtype | None
    name: str
    pages: Pages = "images"
    random: bool = False
    batch_norm_of_others: bool = False
    labels: Labels = Labels()

    def set_label(self, numbers: Sequence[int]) -> None:
        """Ask for another label: the places of its ones; of a generator that takes labels."""
        label = torch.zeros(len(self.labels.names), device=self.device)
        label[list(numbers)] = 1
        self.net.label = label

    @property
    def scale(self) -> int:
        """How many times as long the sides of a result are."""
        return int(getattr(self.net, "scale", 1))

    @torch.inference_mode()
    def __call__(
        self,
        image: np.ndarray,
        *,
        tile: int | Literal["auto"] | None = None,
        folder: Path | None = None,
        dtype: np.dtype[Any] | type | None = None,
    ) -> np.ndarray:
        """Translate one image.

        Args:
            image: (H, W, C) uint8, uint16 or float32, any size; grey and RGB are converted to the trained
                channels.
            tile: side in pixels of the tiles in which the network runs, with the result of the whole image,
                see `fastgan.tiling`; "auto": by the free memory; None: the whole image at once.
            folder: of the temporary files that tiles need; default: the system's.
            dtype: of the result, at the full range of the type: uint8, uint16 or float32 (0..1).

        Returns:
            (H, W, C of the output domain); a network with a `scale` makes it that many times as large. An
            image of the type it was trained on gives the type and values of the output domain; any other type
            is taken at its full range and returned as it came.

        Raises:
            DataError: channels that do not fit, or too little memory, or a disk that is too small for the
                temporary files.
            UsageError: a tile that cannot be, or a network that cannot run in tiles.
        """
        own = image.dtype == self.dtypes[0]
        range_in = self.ranges[0] if own else type_range(image.dtype)
        range_out, dtype_out = (self.ranges[1], self.dtypes[1]) if own else (range_in, image.dtype)
        if dtype is not None and np.dtype(dtype) != dtype_out:
            range_out, dtype_out = type_range(dtype), np.dtype(dtype)
        fitting = match_channels(image, self.channels[0])
        if fitting is None:
            have, want = image.shape[2], self.channels[0]
            raise DataError(f"the image has {have} channels, {self.name} was trained on {want}")
        if tile == "auto":
            tile = self._fitting_tile(image.shape[:2])
        try:
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                if tile is not None:
                    return self._in_tiles(fitting, tile, folder, range_in, range_out, dtype_out)
                x = to_tensor(
                    fitting[None], range_in, device=self.device, output_range=self.output, clamp=True
                )
                y = translate_any_size(self.net, x)
            return from_tensor(y, range_out, dtype_out, output_range=self.output)[0]
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate" not in str(error):
                raise
            raise DataError(
                f"{image.shape[1]}x{image.shape[0]} pixels need more memory than {self.device} has: {SMALLER}"
            ) from error

    @torch.inference_mode()
    def style_of(self, image: np.ndarray) -> tuple[float, ...]:
        """The numbers of the style of an image of the target domain, (H, W, C) as in a call.

        Raises:
            UsageError: a network without styles.
            DataError: channels that do not fit, or an image that is too small.
        """
        find = getattr(self.net, "style_of", None)
        if find is None:
            raise UsageError(f"the network of {self.name} has no styles")
        fitting = match_channels(image, self.channels[1])
        if fitting is None:
            have, want = image.shape[2], self.channels[1]
            raise DataError(f"the image of the style has {have} channels, {self.name} makes {want}")
        limits = self.ranges[1] if image.dtype == self.dtypes[1] else type_range(image.dtype)
        x = to_tensor(fitting[None], limits, device=self.device, output_range=self.output, clamp=True)
        try:
            return tuple(find(x)[0].tolist())
        except ValueError as error:
            raise DataError(f"the image of the style: {error}") from error

    def _fitting_tile(self, size: tuple[int, int]) -> int | None:
        """The tile for an image by the free memory, None for the whole image at once.

        Raises:
            DataError: the network cannot run in tiles, and the image is too large for it.
        """
        free = free_bytes(self.device)
        local = hasattr(self.net, "reach")
        tile = self._local_tile(size, free) if local else tiling.pick_tile(self.net, size, free)
        # below that no machine is too small; a GPU says itself that it is full, a system just ends a process
        if tile is None and free is not None and size[0] * size[1] > 2**21 and self.device.type == "cpu":
            need = translation_bytes(self.net, (self.channels[0], *size), self.autocast)
            if need > free:
                raise DataError(
                    f"{size[1]}x{size[0]} pixels need about {need / GB:.1f} GB of memory, "
                    f"{free / GB:.1f} GB are free: {SMALLER}"
                )
        return tile

    def _local_tile(self, size: tuple[int, int], free: int | None) -> int | None:
        """As `_fitting_tile`, of a network whose tiles need no files."""
        try:
            reach = tiling.local_reach(self.net)
        except UsageError:
            reach = None
        if reach is None or free is None:
            return None
        # the other half is left to the images and to other programs
        most = free / 2 / self._bytes_of_a_pixel
        if size[0] * size[1] <= most:
            return None
        return next((side for side in (1024, 512, 256, 128) if (side + 2 * reach) ** 2 <= most), 64)

    @functools.cached_property
    def _bytes_of_a_pixel(self) -> float:
        side = 64
        return translation_bytes(self.net, (self.channels[0], side, side), self.autocast) / side**2

    def _in_tiles(
        self,
        image: np.ndarray,
        tile: int,
        folder: Path | None,
        range_in: tuple[float, float],
        range_out: tuple[float, float],
        dtype_out: np.dtype[Any],
    ) -> np.ndarray:
        h, w = image.shape[:2]
        bottom, right, mode = missing_pixels(self.net, h, w)
        padded = np.pad(image, ((0, bottom), (0, right), (0, 0)), "reflect" if mode == "reflect" else "edge")
        out = np.empty((h * self.scale, w * self.scale, self.channels[1]), dtype_out)

        def read(box: tiling.Box) -> torch.Tensor:
            part = padded[None, box.top : box.bottom, box.left : box.right]
            return to_tensor(part, range_in, device=self.device, output_range=self.output, clamp=True)

        def write(box: tiling.Box, y: torch.Tensor) -> None:
            place = out[box.top : box.bottom, box.left : box.right]
            part = from_tensor(y, range_out, dtype_out, output_range=self.output)[0]
            place[...] = part[: place.shape[0], : place.shape[1]]

        show = sys.stderr.isatty()
        tiling.run_tiles(self.net, read, write, padded.shape[:2], tile, folder=folder, progress=show)
        return out


def enlarged(plane: np.ndarray, scale: int) -> np.ndarray:
    """(H, W, 1), such as alpha, bicubically enlarged in its type; as it is where the scale is 1."""
    if scale == 1:
        return plane
    x = torch.from_numpy(to_unit(plane, type_range(plane.dtype))).movedim(-1, 0)[None]
    return from_unit(enlarge(x, scale)[0].clamp(0, 1).movedim(0, -1).numpy(), plane.dtype)


def load_generator(
    path: Path | str,
    direction: Literal["AtoB", "BtoA"] | None = None,
    *,
    label: Label | None = None,
    style: Sequence[float] | np.ndarray | None = None,
    device: str = "auto",
    precision: str = "auto",
    dropout_at_test: bool = False,
    bn_stats: Literal["running", "batch"] = "running",
    ranks: Ranks | None = None,
) -> Generator:
    """A generator ready to translate images.

    Args:
        path, direction, label: see `fastgan.checkpoint.load_generator`.
        style: for MUNIT alone, the numbers of a style, or an image (H, W, C) of the target domain whose style
            is taken; without one every call draws another.
        device, precision: as in training.
        dropout_at_test: dropout stays on, as in pix2pix's paper, and every call gives another result.
        bn_stats: what batch norm normalises by: the statistics gathered in training, or those of the image.
        ranks: the processes among which this one shares the GPUs of a machine.

    Raises:
        CheckpointError: nothing there, or not a generator.
        UsageError: a direction that was not trained, or a network without dropout, batch norm or styles.
        DataError: an image that has no style here.
    """
    found = checkpoint.load_generator(path, direction, label, dropout=dropout_at_test)
    where = pick_device(device, ranks.local, ranks.local_size) if ranks else pick_device(device)
    drops = [m for m in found.net.modules() if isinstance(m, nn.Dropout)]
    norms = [m for m in found.net.modules() if isinstance(m, nn.BatchNorm2d)]
    if dropout_at_test and not drops:
        raise UsageError(f"--dropout-at-test: the network of {found.path} has no dropout")
    if bn_stats == "batch" and not norms:
        raise UsageError(f"--bn-stats batch: the network of {found.path} has no batch norm")
    for layer in drops:
        layer.train(dropout_at_test)
    for norm in norms if bn_stats == "batch" else ():
        norm.running_mean = norm.running_var = None
    styles = int(getattr(found.net, "style_size", 0))
    generator = Generator(
        place(found.net, where), found.channels, found.ranges, found.dtypes, found.output, where,
        pick_precision(precision, where), str(found.path),
        pages=found.about.get("settings", {}).get("pages", "images"),
        random=dropout_at_test or (styles > 0 and style is None),
        batch_norm_of_others=not found.about and bool(norms), labels=found.labels,
    )  # fmt: skip
    if style is not None:
        if not styles:
            raise UsageError(f"the network of {found.path} has no styles")
        numbers = generator.style_of(style) if isinstance(style, np.ndarray) else tuple(style)
        if len(numbers) != styles:
            raise UsageError(f"{found.path} takes a style of {styles} numbers, got {len(numbers)}")
        generator.net.style = torch.tensor(numbers, device=where)
    return generator


class Translator:
    """A trained generator; call it with an image and get one of the same kind.

    generator: what it calls, with the network, its channels and value ranges.
    """

    def __init__(self, generator: Generator) -> None:
        self.generator = generator

    def __call__(self, image: Kind) -> Kind:
        """Translate an image of any size.

        Args:
            image: a PIL image: upright by its EXIF, palettes become RGB, colours of another ICC profile sRGB,
                alpha is kept aside. Or an array (H, W), (H, W, C) or (N, H, W, C), or a tensor (C, H, W) or
                (N, C, H, W) on any device: uint8, uint16 or floating. Grey and RGB become the trained
                channels. Values of the type that the generator was trained on are in its range; others are
                in 0..255, 0..65535, or 0..1 for floating, of tensors too.

        Returns:
            The same kind, and size unless the network enlarges; the type is that of the output domain where
            the image has that of the input domain, else its own. Computed without gradients, tensors by way
            of host memory.

        Raises:
            DataError: another shape, type or number of channels, or what the kind of image cannot hold.
        """
        if isinstance(image, Image.Image):
            return self._pillow(image)
        if isinstance(image, np.ndarray):
            return self._array(image)
        if isinstance(image, Tensor):
            if image.ndim not in (3, 4):
                raise DataError(f"a tensor must be (C, H, W) or (N, C, H, W), got {tuple(image.shape)}")
            half = image.dtype == torch.bfloat16  # NumPy has no such type
            array = (image.float() if half else image).detach().movedim(-3, -1).cpu().numpy()
            y = torch.from_numpy(self._array(array)).movedim(-1, -3)
            return y.to(image.device, torch.bfloat16 if half else y.dtype).contiguous()
        raise DataError(
            f"an image must be a PIL image, a NumPy array or a tensor, got {type(image).__name__}"
        )

    def _array(self, x: np.ndarray) -> np.ndarray:
        if x.ndim not in (2, 3, 4) or 0 in x.shape[-3:]:
            raise DataError(f"an array must be (H, W), (H, W, C) or (N, H, W, C), got {x.shape}")
        if x.dtype not in (np.uint8, np.uint16) and x.dtype.kind != "f":
            raise DataError(f"an image must be uint8, uint16 or floating, got {x.dtype}")
        if x.dtype.kind == "f":
            if not np.isfinite(x).all():
                raise DataError("the image holds NaN or infinite values: replace them")
            x_type, x = x.dtype, x.astype(np.float32)
        else:
            x_type = x.dtype
        images = [x[..., None]] if x.ndim == 2 else list(x) if x.ndim == 4 else [x]
        results = [self.generator(each) for each in images]
        if not results:
            raise DataError("a batch must hold at least one image")
        y = np.stack(results) if x.ndim == 4 else results[0]
        y = y.astype(x_type) if y.dtype.kind == x_type.kind == "f" else y
        return y[..., 0] if x.ndim == 2 and y.shape[-1] == 1 else y

    def _pillow(self, image: Image.Image) -> Image.Image:
        image = ImageOps.exif_transpose(image)
        profile, alpha = image.info.get("icc_profile"), None
        if image.mode == "P":
            image = image.convert("RGBA" if "transparency" in image.info else "RGB")
        if image.mode in ("RGBA", "LA"):
            alpha = image.getchannel("A")
            image = image.convert(image.mode[:-1])
        if image.mode == "CMYK":
            x, profile = cmyk_to_srgb(image, profile)
        else:
            if image.mode not in ("L", "RGB", "F", "I;16"):
                # 1, YCbCr and others
                image = image.convert("L" if image.mode == "1" else "RGB")
            x = np.asarray(image)
        x, profile = to_srgb(x[..., None] if x.ndim == 2 else x, profile)
        y = self._array(x)
        if not (y.shape[-1] == 1 or (y.dtype == np.uint8 and y.shape[-1] == 3)):
            raise DataError(
                f"a PIL image cannot hold {y.shape[-1]} channels of {y.dtype}: give the image as an array"
            )
        result = Image.fromarray(y[..., 0] if y.shape[-1] == 1 else y)
        if alpha is not None:
            if alpha.size != result.size:
                alpha = alpha.resize(result.size, Image.Resampling.BICUBIC)
            result.putalpha(alpha)
        if profile is not None and y.shape[2] == x.shape[2]:
            # Pillow writes it into the files that can hold one
            result.info["icc_profile"] = profile
        return result


def load(
    path: Path | str,
    direction: Literal["AtoB", "BtoA"] | None = None,
    *,
    label: Label | None = None,
    style: Sequence[float] | np.ndarray | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> Translator:
    """A trained generator as a function: `fastgan.load("latest_net_G.pth")(Image.open("in.png"))`.

    Args:
        path: a run or checkpoint folder, .safetensors, .pth or .ckpt of pix2pix, CycleGAN, CUT or StarGAN, or
            MUNIT's gen_*.pt.
        direction: in terms of the data folder; default is the direction of training.
        label: for StarGAN alone, one number per label, or the name or names of those that are 1.
        style: for MUNIT alone, the numbers of a style, or an array (H, W, C) whose style is taken; without
            one every call draws another from torch's generator.
        device: "auto", "cuda", "cuda:1", "mps" or "cpu". precision: "auto", "bf16", "fp32" or "tf32".

    Raises:
        CheckpointError: nothing there, pickled objects, or not a generator.
        UsageError: a direction, label, style or device that cannot be had.
    """
    return Translator(
        load_generator(path, direction, label=label, style=style, device=device, precision=precision)
    )
