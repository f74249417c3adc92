"""python -m fastgan.sample RUN OUTPUT: images from noise, of a run of dcgan, cgan, wgan or wgan-gp."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from fastgan.checkpoint import CheckpointError
from fastgan.config import UsageError, fail, parse
from fastgan.data.augment import from_tensor
from fastgan.data.images import DataError, type_range, write_image
from fastgan.device import pick_device
from fastgan.gallery import save_grid
from fastgan.generative import draw
from fastgan.trained import load_run

KEY = 5  # keeps these draws apart from others
AT_ONCE = 100  # images in memory
COLUMNS = 10  # of --grid where images have no label
DEPTHS = {"8": np.uint8, "16": np.uint16, "float": np.float32}


@dataclass(frozen=True)
class Arguments:
    """What `python -m fastgan.sample` takes."""

    run: tyro.conf.Positional[Path]  # run or checkpoint folder
    output: tyro.conf.Positional[Path]  # folder for the images
    count: int = 16  # images, of each label where there are some
    to: tuple[str, ...] = ()  # labels by name, or all; several attributes in one: Smiling+Young; default: all
    seed: int = 0  # of the noise: image k of a seed is always the same, and has the same noise in every label
    format: Literal["png", "jpg", "webp", "bmp", "tif", "npy"] = "png"
    depth: Literal["8", "16", "float"] | None = None  # default: as the training images
    quality: int = 95  # of .jpg
    grid: Path | None = None  # a picture of them all besides, a column per label
    device: str = "auto"  # cuda, cuda:1, mps, cpu


def labels_of(known: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The labels that are meant, in the order given.

    Raises:
        UsageError: one that is not known, or a system without labels.
    """
    if not known and wanted:
        raise UsageError("--to has no effect: this system has no labels")
    for name in (part for each in wanted for part in each.split("+")):
        if name not in known and name != "all":
            few = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
            raise UsageError(f"--to {name} is not a label of this run: choose of {few} or all")
    return list(known) if not wanted or "all" in wanted else list(dict.fromkeys(wanted))


def sample(given: Arguments) -> int:
    """Write the images; returns how many.

    Raises:
        CheckpointError, UsageError, DataError: what the person has to change, or a full disk.
    """
    if given.count < 1:
        raise UsageError(f"--count must be at least 1, got {given.count}")
    if not 1 <= given.quality <= 100:
        raise UsageError(f"--quality must be in 1..100, got {given.quality}")
    if given.output.exists() and not given.output.is_dir():
        raise UsageError(f"{given.output} is a file: give a folder")
    device = pick_device(given.device)
    recipe, nets, about = load_run(given.run, device)
    if recipe.directions or not recipe.noise:
        command = f"python -m fastgan.translate {given.run} INPUT OUTPUT"
        raise UsageError(f"{given.run} translates images: {command}")
    known = list(about.get("labels", [])) if recipe.labelled else []
    names = labels_of(known, given.to)
    dtype = np.dtype(about["dtypes"][0])
    span: tuple[float, float] = tuple(about["ranges"][0])
    if given.depth is not None and np.dtype(DEPTHS[given.depth]) != dtype:
        dtype = np.dtype(DEPTHS[given.depth])
        span = type_range(dtype)
    given.output.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Tensor] = {}
    with tqdm(total=given.count * max(1, len(names)), unit="img", disable=not sys.stderr.isatty()) as bar:
        for name in names or [""]:
            parts = name.split("+")
            label = torch.tensor([float(each in parts) for each in known])
            prefix = f"{name.replace('/', '_')}_" if name else ""
            for start in range(0, given.count, AT_ONCE):
                some = min(AT_ONCE, given.count - start)
                images = draw(
                    recipe, nets, some, seed=given.seed, key=KEY, device=device, skip=start,
                    labels=label.expand(some, -1) if name else None,
                )  # fmt: skip
                arrays = from_tensor(images, span, dtype, output_range=recipe.config.output)
                for k, array in enumerate(arrays, start):
                    path = given.output / f"{prefix}{k:05d}.{given.format}"
                    write_image(path, array, quality=given.quality)
                if given.grid is not None and start == 0:
                    columns[name] = images
                bar.update(some)
    if given.grid is not None:
        if not names:
            images = columns.pop("")
            columns = {" " * k: images[k::COLUMNS] for k in range(min(COLUMNS, len(images)))}
        title = f"{given.run.name}, seed {given.seed}"
        save_grid(given.grid, columns, title=title, output_range=recipe.config.output)
    return given.count * max(1, len(names))


def main(args: Sequence[str] | None = None) -> None:
    """Sample; exit code 0, 2 with one line about what is wrong, or 130 after Ctrl-C."""
    try:
        given = parse(Arguments, sys.argv[1:] if args is None else args, "python -m fastgan.sample")
        count = sample(given)
    except (UsageError, DataError, CheckpointError) as error:
        fail(error)
    except OSError as error:
        fail(f"{error.filename or 'a file'} cannot be written: {error.strerror}")
    except KeyboardInterrupt:
        fail("stopped; the same command makes the same images", 130)
    print(f"{count} images to {given.output}")


if __name__ == "__main__":
    main()
