"""python -m fastgan.translate RUN_OR_CHECKPOINT INPUT OUTPUT: apply a trained generator to an image or a
folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import nn
from tqdm import tqdm

from fastgan import checkpoint, tiling
from fastgan.checkpoint import CheckpointError
from fastgan.config import UsageError, fail, parse
from fastgan.data.augment import OutputRange, from_tensor, match_channels, to_tensor
from fastgan.data.images import DataError, list_images, read_images, type_range, write_image
from fastgan.device import pick_device, pick_precision
from fastgan.layers import place
from fastgan.memory import free_bytes
from fastgan.models import missing_pixels, translate_any_size


@dataclass(frozen=True)
class Generator:
    """A trained generator with what its images mean; call it with an array of one image.

    net: the network in evaluation mode. channels, ranges, dtypes: of the input and of the output domain as
    trained; output: "tanh" or "sigmoid". name: where it came from.
    """

    net: nn.Module
    channels: tuple[int, int]
    ranges: tuple[tuple[float, float], tuple[float, float]]
    dtypes: tuple[np.dtype[Any], np.dtype[Any]]
    output: OutputRange
    device: torch.device
    autocast: torch.dtype | None
    name: str

    @torch.inference_mode()
    def __call__(
        self, image: np.ndarray, *, tile: int | Literal["auto"] | None = None, folder: Path | None = None
    ) -> np.ndarray:
        """Translate one image.

        Args:
            image: (H, W, C) uint8, uint16 or float32, any size; grey and RGB are converted to the trained
                channels.
            tile: side in pixels of the tiles in which the network runs, with the result of the whole image,
                see `fastgan.tiling`; "auto": by the free memory; None: the whole image at once.
            folder: of the temporary files that tiles need; default: the system's.

        Returns:
            (H, W, C of the output domain). An image of the type it was trained on gives the type and values
            of the output domain; any other type is taken at its full range and returned as it came.

        Raises:
            DataError: channels that do not fit, or a disk that is too small for the temporary files.
            UsageError: a tile that cannot be, or a network that cannot run in tiles.
        """
        own = image.dtype == self.dtypes[0]
        range_in = self.ranges[0] if own else type_range(image.dtype)
        range_out, dtype_out = (self.ranges[1], self.dtypes[1]) if own else (range_in, image.dtype)
        fitting = match_channels(image, self.channels[0])
        if fitting is None:
            have, want = image.shape[2], self.channels[0]
            raise DataError(f"the image has {have} channels, {self.name} was trained on {want}")
        if tile == "auto":
            tile = tiling.pick_tile(self.net, image.shape[:2], free_bytes(self.device))
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            if tile is not None:
                return self._in_tiles(fitting, tile, folder, range_in, range_out, dtype_out)
            x = to_tensor(fitting[None], range_in, device=self.device, output_range=self.output, clamp=True)
            y = translate_any_size(self.net, x)
        return from_tensor(y, range_out, dtype_out, output_range=self.output)[0]

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
        out = np.empty((h, w, self.channels[1]), dtype_out)

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


def load_generator(
    path: Path | str,
    direction: Literal["AtoB", "BtoA"] | None = None,
    *,
    label: Sequence[float] | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> Generator:
    """A generator ready to translate images.

    Args:
        path, direction, label: see `fastgan.checkpoint.load_generator`.
        device, precision: as in training.

    Raises:
        CheckpointError, UsageError: nothing there, not a generator, or a direction that was not trained.
    """
    found = checkpoint.load_generator(path, direction, label)
    where = pick_device(device)
    return Generator(
        place(found.net, where), found.channels, found.ranges, found.dtypes, found.output, where,
        pick_precision(precision, where), str(found.path),
    )  # fmt: skip


def translate(
    generator: Generator, source: Path, target: Path, *, tile: int | Literal["auto"] | None = None
) -> list[str]:
    """Translate a file or every image below a folder, keeping names; returns a line for each file that could
    not be. tile: as `Generator` takes it; the temporary files lie beside the result.

    Raises:
        DataError: nothing to translate, or the target would overwrite the source.
        UsageError: a tile that cannot be, or a network that cannot run in tiles.
    """
    if isinstance(tile, int):
        # before anything is read or made
        tiling.check_tile(tile, int(getattr(generator.net, "multiple", 1)))
        tiling.stages(generator.net)
    if not source.exists():
        raise DataError(f"{source} does not exist")
    files = [source] if source.is_file() else list_images(source)
    if not files:
        raise DataError(f"{source} holds no images")
    as_file = source.is_file() and bool(target.suffix) and not target.is_dir()
    bad = []
    for file in tqdm(files, unit="img", disable=len(files) == 1 or not sys.stderr.isatty()):
        goal = target if as_file else target / (file.name if source.is_file() else file.relative_to(source))
        if goal.resolve() == file.resolve():
            raise DataError(f"{goal} would overwrite its source: choose another OUTPUT")
        try:
            goal.parent.mkdir(parents=True, exist_ok=True)
            images = read_images(file)
            for k, image in enumerate(images):
                page = goal if len(images) == 1 else goal.with_name(f"{goal.stem}_page{k:03d}{goal.suffix}")
                write_image(page, generator(image, tile=tile, folder=goal.parent))
        except (DataError, OSError) as error:
            bad.append(str(error) if str(file) in str(error) else f"{file}: {error}")
    return bad


@dataclass(frozen=True)
class Arguments:
    """What `python -m fastgan.translate` takes."""

    run: tyro.conf.Positional[Path]  # run folder, checkpoint folder, .safetensors, .pth or .ckpt
    input: tyro.conf.Positional[Path]  # image or folder of images
    output: tyro.conf.Positional[Path]  # image or folder
    direction: Literal["AtoB", "BtoA"] | None = None  # in terms of the data folder; default: as trained
    label: tuple[float, ...] | None = None  # one number per label, for StarGAN
    device: str = "auto"  # cuda, cuda:1, mps, cpu
    precision: Literal["auto", "bf16", "fp32", "tf32"] = "auto"  # auto: bf16 where the hardware has it
    tile: int | Literal["auto"] | None = None  # side in pixels of the tiles of a large image; auto: by memory


def main(args: Sequence[str] | None = None) -> None:
    """Translate; exit code 0, or 2 with one line about what could not be done."""
    try:
        given = parse(Arguments, sys.argv[1:] if args is None else args, "python -m fastgan.translate")
        generator = load_generator(
            given.run, given.direction, label=given.label, device=given.device, precision=given.precision
        )
        bad = translate(generator, given.input, given.output, tile=given.tile)
    except (UsageError, DataError, CheckpointError) as error:
        fail(error)
    if bad:
        fail(bad[0] if len(bad) == 1 else f"{len(bad)} files could not be translated, the first: {bad[0]}")


if __name__ == "__main__":
    main()
