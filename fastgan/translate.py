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
from fastgan.models import build, missing_pixels, translate_any_size
from fastgan.recipes import RECIPES


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
    device: str = "auto",
    precision: str = "auto",
) -> Generator:
    """A generator from a run folder, one of its checkpoints, a .safetensors file or a .pth of the original
    release.

    Args:
        path: what to load. The averaged generator is taken where the run has one.
        direction: in terms of the data folder; default is the direction of training. A single file has one
            direction.
        device, precision: as in training.

    Raises:
        CheckpointError, UsageError: nothing there, not a generator, or a direction that was not trained.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: give a run folder, a checkpoint or a file of weights")
    if path.is_dir():
        path = _file_in_run(path, direction)
    state, header = checkpoint.read_weights(path)
    found = checkpoint.describe(state)
    if found.get("network") not in ("resnet", "unet", "encdec"):
        keys = ", ".join(list(state)[:3])
        raise CheckpointError(
            f"{path} is not a generator: it looks like {checkpoint.say(found)}; its keys are {keys}, ..."
        )
    settings = header.get("settings", {})
    # neither leaves a trace in the weights, so they come from the header
    extra = {"output": settings.get("output", "tanh")}
    if found["network"] == "resnet" and settings.get("padding"):
        extra["padding"] = settings["padding"]
    net = build(found | extra)
    checkpoint.load_into(net, state, str(path))
    where = pick_device(device)
    net = place(net, where).eval()
    # the header names domains as A and B; this generator's own order is input, output
    ends = (1, 0) if header.get("network", "").startswith("G_B") else (0, 1)
    ranges = [tuple(r) for r in header.get("ranges", [(0.0, 255.0)] * 2)]
    dtypes = [np.dtype(d) for d in header.get("dtypes", ["uint8", "uint8"])]
    return Generator(
        net, (found["in_channels"], found["out_channels"]), (ranges[ends[0]], ranges[ends[1]]),
        (dtypes[ends[0]], dtypes[ends[1]]), extra["output"], where, pick_precision(precision, where),
        str(path),
    )  # fmt: skip


def _file_in_run(path: Path, direction: str | None) -> Path:
    inside = checkpoint.checkpoints(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    folder = inside[-1] if inside else path
    if not (folder / "state.safetensors").is_file():
        raise CheckpointError(
            f"{path} holds no checkpoint: give a run folder, a checkpoint or a file of weights"
        )
    header = checkpoint.header(folder / "state.safetensors")
    recipe, trained = RECIPES[header["recipe"]], header["settings"]["direction"]
    inner = "AtoB" if direction in (None, trained) else "BtoA"
    if inner not in recipe.directions:
        raise UsageError(
            f"{path} was trained {trained} only: --direction {direction} is not possible with {recipe.name}"
        )
    name = recipe.directions[inner].net
    averaged = folder / f"{name}_ema.safetensors"
    return averaged if averaged.is_file() else folder / f"{name}.safetensors"


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

    run: tyro.conf.Positional[Path]  # run folder, checkpoint folder, .safetensors or .pth
    input: tyro.conf.Positional[Path]  # image or folder of images
    output: tyro.conf.Positional[Path]  # image or folder
    direction: Literal["AtoB", "BtoA"] | None = None  # in terms of the data folder; default: as trained
    device: str = "auto"  # cuda, cuda:1, mps, cpu
    precision: Literal["auto", "bf16", "fp32", "tf32"] = "auto"  # auto: bf16 where the hardware has it
    tile: int | Literal["auto"] | None = None  # side in pixels of the tiles of a large image; auto: by memory


def main(args: Sequence[str] | None = None) -> None:
    """Translate; exit code 0, or 2 with one line about what could not be done."""
    try:
        given = parse(Arguments, sys.argv[1:] if args is None else args, "python -m fastgan.translate")
        generator = load_generator(given.run, given.direction, device=given.device, precision=given.precision)
        bad = translate(generator, given.input, given.output, tile=given.tile)
    except (UsageError, DataError, CheckpointError) as error:
        fail(error)
    if bad:
        fail(bad[0] if len(bad) == 1 else f"{len(bad)} files could not be translated, the first: {bad[0]}")


if __name__ == "__main__":
    main()
