"""Read the image files of a folder into four stores: domains A and B, for training and for testing.

First all headers are read, because the channels and the type of a domain must be known before its first pixel
is written; then every file is decoded once, in threads. What belongs together (a pair, the halves of one
file) is read, or left out, together.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastgan.data.augment import Geometry, centre_crop, match_channels, match_dtype, resize
from fastgan.data.folders import Files, Layout, Source, find_layout
from fastgan.data.images import DataError, Pages, Probe, probe, read_images
from fastgan.data.store import Images, Writer, cache_key, in_order, load_index, save_index, writing


class Wanted(NamedTuple):
    """The options that decide what is read from the files."""

    paired: bool
    channels: tuple[int | None, int | None]
    geometry: Geometry
    pages: Pages
    max_images: int | None
    skip_bad: bool
    whole_tests: bool = False  # test images are not cropped, and may be smaller than a crop


@dataclass(frozen=True)
class Rules:
    """How files become images: per domain channels and type, then geometry; test images are cropped here."""

    channels: tuple[int, int]
    dtypes: tuple[np.dtype[Any], np.dtype[Any]]
    geometry: Geometry
    testing: bool
    paired: bool
    pages: Pages
    max_images: int | None


@dataclass(frozen=True)
class Job:
    """Files that are read together: a pair, the two halves of one file, or a single image of one domain."""

    a: Source | None
    b: Source | None


def _jobs_of(files: Files, together: bool) -> list[Job]:
    """List the jobs of a split; together: entry i of A and of B form one job."""
    if together:
        return [Job(a, b) for a, b in zip(files.A, files.B, strict=True)]
    return [Job(a, None) for a in files.A] + [Job(None, b) for b in files.B]


def read_folder(
    root: Path,
    wanted: Wanted,
    cache: Path | None,
    progress: bool,
    notes: list[str],
    layout: Layout | None = None,
) -> dict[str, Images]:
    """Read the four stores of a folder, from the cache if there is a whole one. layout: where it is known;
    without images of B its stores are empty."""
    layout = layout or find_layout(root, paired=wanted.paired)
    splits = {"train": layout.train, "test": layout.test}
    if wanted.max_images is not None:
        n = wanted.max_images
        splits = {name: Files(files.A[:n], files.B[:n]) for name, files in splits.items()}
    key = ""
    if cache is not None:
        options: list[Any] = [wanted.paired, wanted.channels, vars(wanted.geometry), *wanted[3:6]]
        options += ["whole tests"] if wanted.whole_tests else []
        groups = {f"{name}_{d}": getattr(files, d) for name, files in splits.items() for d in "AB"}
        key = cache_key({"options": options}, root, groups)
        found = load_index(cache, key)
        if found is not None:
            stores, extra = found
            notes += extra["notes"]
            return stores
        with writing(cache):
            cache.mkdir(parents=True, exist_ok=True)
    stores, own_notes = _decode(splits, layout, wanted, cache and cache / f"images-{key}", progress)
    if cache is not None:
        save_index(cache, key, stores, {"notes": own_notes})
    notes += own_notes
    return stores


def _decode(
    splits: dict[str, Files], layout: Layout, wanted: Wanted, stem: Path | None, progress: bool
) -> tuple[dict[str, Images], list[str]]:
    probes, faults = _probed(splits, wanted, progress)
    total = len(probes) + len(faults)
    if faults and not wanted.skip_bad:
        raise _bad_files(faults, total)
    channels: list[int] = []
    dtypes: list[np.dtype[Any]] = []
    for domain in (0, 1):
        sources = [source for files in splits.values() for source in (files.A, files.B)[domain]]
        known = {source.path: probes[source.path] for source in sources if source.path in probes}
        if not sources:
            channels.append(channels[0])
            dtypes.append(dtypes[0])
            continue
        if not known:
            raise DataError(f"{sources[0].path.parent}: none of the {len(sources)} images can be read")
        channels.append(wanted.channels[domain] or _common_channels(known, domain))
        dtypes.append(_common_dtype(known))
    stores: dict[str, Images] = {}
    broken = {str(fault): fault for fault in faults}
    at_test = replace(wanted.geometry, crop_size=1) if wanted.whole_tests else wanted.geometry.at_test()
    for name, files in splits.items():
        rules = Rules(
            channels=(channels[0], channels[1]),
            dtypes=(dtypes[0], dtypes[1]),
            geometry=wanted.geometry if name == "train" else at_test,
            testing=name == "test" and not wanted.whole_tests,
            paired=wanted.paired,
            pages=wanted.pages,
            max_images=wanted.max_images,
        )
        paths = None
        if stem is not None:
            paths = (stem.with_name(f"{stem.name}_{name}_A.npy"), stem.with_name(f"{stem.name}_{name}_B.npy"))
        jobs = _jobs_of(files, wanted.paired or layout.side_by_side)
        a, b, faults = _build(jobs, rules, paths=paths, label=f"reading {name} images", progress=progress)
        if faults and not wanted.skip_bad:
            raise _bad_files(faults, total)
        broken |= {str(fault): fault for fault in faults}
        stores |= {f"{name}_A": a, f"{name}_B": b}
    for letter in "AB" if layout.train.B else "A":
        if not len(stores[f"train_{letter}"]):
            first = next(iter(broken.values()))
            raise DataError(
                f"no training image of domain {letter} can be used; {len(broken)} faults, the first: {first}"
            )
    notes = []
    if broken:
        shown = "; ".join(list(broken)[:3])
        notes.append(f"skipped {len(broken)} bad files: {shown}{'; ...' if len(broken) > 3 else ''}")
    if layout.side_by_side and not wanted.paired:
        notes.append("side-by-side images: left halves are A, right halves are B")
    return stores, notes


def _bad_files(faults: list[DataError], total: int) -> DataError:
    if total == 1:
        return faults[0]
    return DataError(
        f"{len(faults)} of {total} files cannot be used (--skip-bad leaves them out), the first: {faults[0]}"
    )


def _probed(
    splits: dict[str, Files], wanted: Wanted, progress: bool
) -> tuple[dict[Path, Probe], list[DataError]]:
    """Read the headers of all files: channels and types must be known before the first pixel is written."""
    paths = list(dict.fromkeys(s.path for files in splits.values() for s in (*files.A, *files.B)))

    def look(path: Path) -> Probe | DataError:
        try:
            return probe(path, pages=wanted.pages)
        except DataError as error:
            return error

    results = in_order(look, paths, total=len(paths), label="checking files", progress=progress)
    probes, faults = {}, []
    for path, result in zip(paths, results):
        if isinstance(result, DataError):
            faults.append(result)
        else:
            probes[path] = result
    return probes, faults


def _common_channels(probes: dict[Path, Probe], domain: int) -> int:
    first: dict[int, Path] = {}
    for path, found in probes.items():
        first.setdefault(found.channels, path)
    if len(first) > 1 and set(first) != {1, 3}:
        (n, path), (n2, path2) = list(first.items())[:2]
        flag = "--channels-b" if domain else "--channels"
        raise DataError(
            f"{path} has {n} channels, {path2} has {n2}: a domain needs one count; {flag} turns RGB to grey "
            "and grey to RGB, with --skip-bad it leaves out what does not fit"
        )
    return max(first)


def _common_dtype(probes: dict[Path, Probe]) -> np.dtype[Any]:
    first: dict[np.dtype[Any], Path] = {}
    for path, found in probes.items():
        first.setdefault(found.dtype, path)
    if len(first) > 1 and np.dtype(np.float32) in first:
        floating = first.pop(np.dtype(np.float32))
        dtype, path = next(iter(first.items()))
        raise DataError(
            f"{floating} holds float values, {path} {dtype}: save the images of a domain in one type"
        )
    return max(first, key=lambda dtype: dtype.itemsize)


def _build(
    jobs: list[Job], rules: Rules, *, paths: tuple[Path, Path] | None, label: str, progress: bool
) -> tuple[Images, Images, list[DataError]]:
    """Read all files of a split into two stores, in memory or in the files `paths`, and list the faults.

    Raises DataError when the cache cannot be written.
    """
    writers = [Writer(rules.channels[i], rules.dtypes[i], paths and paths[i]) for i in (0, 1)]
    faults: list[DataError] = []

    def read(job: Job) -> tuple[list[tuple[str, np.ndarray]], ...] | DataError:
        try:
            return _read_job(job, rules)
        except DataError as error:
            return error

    try:
        for result in in_order(read, jobs, total=len(jobs), label=label, progress=progress):
            if isinstance(result, DataError):
                faults.append(result)
                continue
            for writer, images in zip(writers, result):
                for name, image in images:
                    if rules.max_images is None or len(writer) < rules.max_images:
                        writer.append(name, image)
        a, b = (writer.finish() for writer in writers)
    finally:
        for writer in writers:
            writer.close()
    return a, b, faults


def _read_job(job: Job, rules: Rules) -> tuple[list[tuple[str, np.ndarray]], ...]:
    """Read the images of one job for A and B, named after their files and pages."""
    decoded: dict[Path, list[np.ndarray]] = {}
    result: list[list[tuple[str, np.ndarray]]] = []
    for domain, source in enumerate((job.a, job.b)):
        images: list[tuple[str, np.ndarray]] = []
        if source is not None:
            if source.path not in decoded:
                decoded[source.path] = read_images(source.path, pages=rules.pages)
            pages = decoded[source.path]
            for number, image in enumerate(pages):
                name = source.name if len(pages) == 1 else f"{source.name}_{number}"
                images.append((name, _prepared(image, source, rules, domain)))
        result.append(images)
    if rules.paired and job.a is not None and job.b is not None:
        shapes = [[image.shape[:2] for _, image in images] for images in result]
        if len(shapes[0]) != len(shapes[1]):
            raise DataError(
                f"{job.a.path}: {len(shapes[0])} images, but its partner {job.b.path} {len(shapes[1])}"
            )
        if shapes[0] != shapes[1]:
            (h, w), (h2, w2) = next(pair for pair in zip(*shapes) if pair[0] != pair[1])
            raise DataError(f"{job.a.path}: {w}x{h} pixels, but its partner {job.b.path} has {w2}x{h2}")
    return tuple(result)


def _prepared(image: np.ndarray, source: Source, rules: Rules, domain: int) -> np.ndarray:
    """Half, channels, type, size: everything about an image that does not change from pass to pass."""
    path, geometry = source.path, rules.geometry
    if source.half:
        width = image.shape[1]
        if width % 2:
            raise DataError(f"{path}: {width} pixels wide; two images side by side need an even width")
        image = image[:, : width // 2] if source.half == "left" else image[:, width // 2 :]
    right = match_channels(image, rules.channels[domain])
    if right is None:
        flag = "--channels" if domain == 0 else "--channels-b"
        raise DataError(f"{path}: has {image.shape[2]} channels and {flag} is {rules.channels[domain]}")
    typed = match_dtype(right, rules.dtypes[domain])
    if typed is None:
        raise DataError(f"{path}: holds {image.dtype}, other images of the domain {rules.dtypes[domain]}")
    part = geometry.part(typed)
    image = resize(np.ascontiguousarray(part), geometry.size(*part.shape[:2]))
    height, width = image.shape[:2]
    side = geometry.crop
    if side is not None and min(height, width) < side:
        raise DataError(
            f"{path}: {width}x{height} pixels are smaller than --crop-size {side}; use a smaller one or "
            "--preprocess resize_and_crop"
        )
    return centre_crop(image, side) if rules.testing else image
