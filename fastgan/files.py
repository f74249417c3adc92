"""Image files through a generator: one file, or many with reading, computing and writing side by side.

What a file has besides its colours is kept: alpha, ICC profile, pages, depth and format. An output appears
whole or not at all, so that the same call again only does what is missing.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from fastgan import tiling
from fastgan.config import UsageError
from fastgan.data.encode import STACKS, WITH_ALPHA
from fastgan.data.errors import TooLarge
from fastgan.data.images import (
    DataError,
    Picture,
    from_unit,
    list_images,
    read_picture,
    to_unit,
    type_range,
    write_stack,
)
from fastgan.inference import Generator, enlarged

DEPTHS = {"8": np.uint8, "16": np.uint16, "float": np.float32}
# files that are read ahead of the computation, and results that may wait to be written
READERS = min(8, os.cpu_count() or 1)
AHEAD = READERS + 1


@dataclass(frozen=True, kw_only=True)
class Output:
    """How files are translated and written."""

    format: Literal["png", "jpg", "webp", "bmp", "tif", "npy"] | None = None  # default: as the input
    depth: Literal["8", "16", "float"] | None = None  # default: as the input
    quality: int = 95  # of .jpg
    samples: int = 1  # results of each image, NAME_000 and so on; with --dropout-at-test, or of MUNIT
    seed: int = 0  # of the samples
    tile: int | Literal["auto", "off"] = "auto"  # side in pixels of tiles; auto: where the memory demands it
    max_pixels: int = 2**27  # the most pixels of a file; beyond it a file is skipped
    overwrite: bool = False  # make again what is there and newer than the image and the weights


class Job(NamedTuple):
    """A file to translate, the file it becomes, the name from which its samples are drawn, and the labels to
    each of which it is translated, where there are several."""

    source: Path
    goal: Path
    name: str
    labels: tuple[str, ...] = ()


@dataclass
class Report:
    """What became of the files: numbers of those done and of those that were there, a line for each that
    could not be done, and remarks."""

    done: int = 0
    kept: int = 0
    bad: list[str] = field(default_factory=list)
    notes: set[str] = field(default_factory=set)
    seconds: float = 0.0


def plan(source: Path, target: Path, how: Output, labels: Sequence[str] = ()) -> list[Job]:
    """What is to be translated into what: a file, or every image below a folder with its name kept.

    labels: each file becomes one of each, NAME_<label>.

    Raises:
        DataError: nothing there, two images that would become one file, or one that would be overwritten.
    """
    if not source.exists():
        raise DataError(f"{source} does not exist")
    if source.is_file():
        as_file = bool(target.suffix) and not target.is_dir()
        goal = target if as_file else _named(target / source.name, how)
        jobs = [Job(source, goal, source.name)]
        if as_file and how.format and goal != _named(goal, how):
            raise DataError(f"--format {how.format} is not the format of {target}: leave one of them out")
    else:
        inside = target.resolve() != source.resolve() and target.resolve().is_relative_to(source.resolve())
        files = [file for file in list_images(source) if not (inside and file.is_relative_to(target))]
        if not files:
            raise DataError(f"{source} holds no images")
        names = [file.relative_to(source) for file in files]
        jobs = [Job(f, _named(target / name, how), name.as_posix()) for f, name in zip(files, names)]
    # a name may hold what a file's cannot
    endings = tuple(re.sub(r'[\\/:*?"<>|]', "_", label) for label in labels)
    jobs = [job._replace(labels=endings) for job in jobs]
    made: dict[Path, Path] = {}
    for job in jobs:
        for goal in _results(job, how):
            # Path.resolve raises on a link that points to itself
            if os.path.realpath(goal) == os.path.realpath(job.source):
                raise DataError(f"{goal} would overwrite its source: choose another OUTPUT")
            if goal in made:
                raise DataError(f"{made[goal]} and {job.source} would both become {goal}: rename one of them")
            made[goal] = job.source
    return jobs


def _named(goal: Path, how: Output) -> Path:
    same = {"jpg": (".jpg", ".jpeg", ".jfif"), "tif": (".tif", ".tiff")}
    if how.format is None or goal.suffix.lower() in same.get(how.format, (f".{how.format}",)):
        return goal
    return goal.with_suffix(f".{how.format}")


def _results(job: Job, how: Output) -> list[Path]:
    """The files that a job makes: one, or one of each label or sample."""
    if not job.labels and how.samples == 1:
        return [job.goal]
    endings = job.labels or [f"{k:03d}" for k in range(how.samples)]
    return [job.goal.with_name(f"{job.goal.stem}_{ending}{job.goal.suffix}") for ending in endings]


def _pages(goal: Path, count: int) -> list[Path]:
    """The files of so many pages where one file cannot hold them."""
    return [goal.with_name(f"{goal.stem}_page{k:03d}{goal.suffix}") for k in range(count)]


def is_done(job: Job, how: Output, weights: Path) -> bool:
    """Whether all results are there, newer than the image and the weights."""
    try:
        newest = max(job.source.stat().st_mtime, weights.stat().st_mtime)
        # the first page is written last
        found = [goal if goal.exists() else _pages(goal, 1)[0] for goal in _results(job, how)]
        return all(goal.stat().st_mtime >= newest for goal in found)
    except OSError:
        return False


def translate_file(generator: Generator, source: Path, target: Path, how: Output | None = None) -> set[str]:
    """Translate one file into another; returns remarks, such as what the format of `target` cannot hold.

    Raises:
        DataError: the file, its size or the disk; one line that names it.
    """
    how = how or Output()
    job = Job(Path(source), Path(target), Path(source).name)
    picture = _read(job, how)
    notes: set[str] = set()
    for goal, result in _compute(generator, picture, job, how):
        notes |= _write(goal, result, how)
    return notes


def translate_files(
    generator: Generator, jobs: Sequence[Job], how: Output, *, progress: bool = False
) -> Report:
    """Translate files, reading and writing others while one is computed. A file that cannot be done is
    reported on stderr and in the result, and the rest goes on.

    Raises:
        DataError: the disk is full.
    """
    report, start = Report(), time.monotonic()
    weights = Path(generator.name)
    todo = [job for job in jobs if how.overwrite or not is_done(job, how, weights)]
    report.kept = len(jobs) - len(todo)
    bar = tqdm(total=len(jobs), initial=report.kept, unit="img", disable=not progress, smoothing=0.1)
    reading: deque[tuple[Job, Future[Picture]]] = deque()
    writing: deque[tuple[Job, list[Future[set[str]]]]] = deque()
    readers, writers = (ThreadPoolExecutor(READERS, thread_name_prefix=name) for name in ("read", "write"))

    def attempt(job: Job, work: Callable[[], object]) -> bool:
        try:
            work()
        except (DataError, OSError) as error:
            if _full(error):
                raise DataError(f"{error}; make room, then the same command goes on") from error
            line = str(error) if str(job.source) in str(error) else f"{job.source}: {error}"
            report.bad.append(line)
            bar.update()
            if len(jobs) > 1:
                tqdm.write(f"skipped: {line}", file=sys.stderr)
            return False
        return True

    def collect(job: Job, results: list[Future[set[str]]]) -> None:
        if attempt(job, lambda: report.notes.update(*(each.result() for each in results))):
            report.done += 1
            bar.update()

    def compute(job: Job, picture: Picture) -> None:
        results = _compute(generator, picture, job, how)
        writing.append((job, [writers.submit(_write, goal, found, how) for goal, found in results]))

    try:
        rest = iter(todo)
        while True:
            while len(reading) < AHEAD and (job := next(rest, None)):
                reading.append((job, readers.submit(_read, job, how)))
            if not reading:
                break
            job, found = reading.popleft()
            # the image is held by nobody else, so that it goes when it has been translated
            attempt(job, lambda job=job, found=found: compute(job, found.result()))  # type: ignore[misc]
            while len(writing) > AHEAD or (writing and all(each.done() for each in writing[0][1])):
                collect(*writing.popleft())
        while writing:
            collect(*writing.popleft())
    finally:
        bar.close()
        readers.shutdown(cancel_futures=True)
        writers.shutdown()
    report.seconds = time.monotonic() - start
    return report


def _full(error: BaseException) -> bool:
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        found = found.__cause__
    return False


def _read(job: Job, how: Output) -> Picture:
    try:
        return read_picture(job.source, max_pixels=how.max_pixels)
    except TooLarge as error:
        raise DataError(f"{error}, or allow more with --max-pixels") from error


def _compute(generator: Generator, picture: Picture, job: Job, how: Output) -> Iterator[tuple[Path, Picture]]:
    """Every result of a file: where it goes and what it is."""
    joined = generator.pages == "channels" and len(picture.images) > 1
    images = picture.images
    if joined:
        if len({(image.shape[:2], image.dtype) for image in images}) > 1:
            raise DataError(f"{job.source}: its pages differ in size or type, so they are no channels")
        images = [np.concatenate(images, axis=2)]
    tile = None if how.tile == "off" else how.tile
    dtype = DEPTHS[how.depth] if how.depth else None
    job.goal.parent.mkdir(parents=True, exist_ok=True)
    for k, goal in enumerate(_results(job, how)):
        if job.labels:
            generator.set_label([k])
        found = []
        for x in images:
            if generator.random:
                # of the name, not of the order: the same in every process and after every stop, and for all
                # pages, so that they get one style
                torch.manual_seed(zlib.crc32(f"{how.seed}/{job.name}/{k}".encode()))
            found.append(generator(x, tile=tile, folder=job.goal.parent, dtype=dtype))
        alphas = [
            None if a is None else _as(enlarged(a, generator.scale), y.dtype)
            for a, y in zip(picture.alphas, found)
        ]
        same = found[0].shape[2] == images[0].shape[2]
        if joined:
            found = [np.ascontiguousarray(plane) for plane in np.split(found[0], found[0].shape[2], axis=2)]
            alphas = [None] * len(found)
        yield goal, Picture(found, alphas, picture.profile if same else None, picture.channels_first)


def _as(alpha: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return alpha if alpha.dtype == dtype else from_unit(to_unit(alpha, type_range(alpha.dtype)), dtype)


def _write(goal: Path, picture: Picture, how: Output) -> set[str]:
    suffix, images = goal.suffix.lower(), picture.images
    rest = {"quality": how.quality, "profile": picture.profile}
    if suffix in STACKS or len(images) == 1:
        first = picture.channels_first and suffix == ".npy"
        write_stack(goal, images, alphas=picture.alphas, channels_first=first, **rest)  # type: ignore[arg-type]
    else:
        pages = list(zip(_pages(goal, len(images)), images, picture.alphas))
        # the first page last: where it is, all are
        for page, image, alpha in reversed(pages):
            write_stack(page, [image], alphas=[alpha], **rest)  # type: ignore[arg-type]
    if suffix not in WITH_ALPHA and any(alpha is not None for alpha in picture.alphas):
        return {f"alpha is left out, {suffix} cannot hold it"}
    return set()


def check(generator: Generator, how: Output) -> None:
    """UsageError where the settings cannot be had from the generator."""
    if isinstance(how.tile, int):
        tiling.check_tile(how.tile, int(getattr(generator.net, "multiple", 1)))
        tiling.check_network(generator.net)
    if how.samples < 1 or not 1 <= how.quality <= 100 or how.max_pixels < 1:
        raise UsageError("--samples and --max-pixels must be at least 1, --quality 1 to 100")
    if how.samples > 1 and not generator.random:
        raise UsageError(
            f"--samples {how.samples}: this generator gives the same result every time; "
            "--dropout-at-test makes one with dropout random"
        )
