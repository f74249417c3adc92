"""python -m fastgan.translate RUN_OR_CHECKPOINT INPUT OUTPUT: apply a trained generator to an image or a
folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

from fastgan import tiling
from fastgan.checkpoint import CheckpointError
from fastgan.config import UsageError, fail, parse
from fastgan.data.images import DataError, list_images, read_images, write_image
from fastgan.inference import Generator, load_generator


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
