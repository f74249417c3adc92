"""python -m fastgan.evaluate RUN_OR_CHECKPOINT: measure a trained system on its held-out images; or
--real DIR --fake DIR: two folders of images, whoever made them. A table, and the same as a JSON file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from fastgan import checkpoint, metrics
from fastgan.checkpoint import CheckpointError
from fastgan.config import Config, UsageError, fail, from_json, parse, write_text
from fastgan.data.augment import Geometry
from fastgan.data.dataset import open_data
from fastgan.data.folders import find_layout
from fastgan.data.images import DataError, list_images, read_images, to_unit
from fastgan.data.labelled import open_labelled
from fastgan.device import pick_device
from fastgan.measure import Found, Pairs, System, Tools, inception, measure, prepare
from fastgan.recipes.base import Direction
from fastgan.recipes.stargan import StarGANConfig
from fastgan.trained import load_run
from fastgan.trainer import open_images

GEOMETRY = ("preprocess", "load_size", "crop_size", "pages")  # settings that say what an image becomes
SHORTEST = 24  # columns of the names in the table


@dataclass(frozen=True)
class Arguments:
    """What `python -m fastgan.evaluate` takes."""

    run: tyro.conf.Positional[Path | None] = None  # run or checkpoint folder, or one file of weights
    data: Path | None = None  # folder with the images, as in training; default: those of the run
    real: Path | None = None  # folder of real images, in place of a run
    fake: Path | None = None  # folder of generated images; equal names make pairs
    measures: tuple[str, ...] = ()  # names from the table of README; default: all that need no further file
    weights: tuple[Path, ...] = ()  # Inception network for fid ..., AlexNet or VGG16 for lpips
    palette: str = ""  # cityscapes, or a file of the colours of classes, for label maps
    samples: int = 0  # translations of one image with dropout, for diversity
    range: tuple[float, float] | None = None  # values of --real and --fake that are black and white
    direction: Literal["AtoB", "BtoA"] | None = None  # of one file of weights
    max_images: int | None = None  # use only the first images
    output: Path | None = None  # the JSON file; default: evaluation.json in the run
    device: str = "auto"  # cuda, cuda:1, mps, cpu


@contextlib.contextmanager
def _of_run(given: Arguments, run: Path, device: torch.device) -> Iterator[tuple[System, int | None]]:
    """The system of a run or checkpoint folder of ours, and its step."""
    recipe, nets, about = load_run(run, device)
    changes = {"data": given.data} if given.data else {}
    if given.max_images:
        changes["max_images"] = given.max_images  # type: ignore[assignment]
    own = run if (run / "config.json").is_file() else run.resolve().parents[1]
    with contextlib.ExitStack() as stack:
        if changes or not (own / "config.json").is_file():
            recipe = type(recipe)(dataclasses.replace(recipe.config, **changes))
            own = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        yield (
            System.of(recipe, nets, open_images(recipe, own, progress=sys.stderr.isatty()), device),
            about["step"],
        )


@contextlib.contextmanager
def _of_file(given: Arguments, path: Path, device: torch.device) -> Iterator[tuple[System, int | None]]:
    """The system of one generator from anywhere."""
    if given.data is None:
        raise UsageError(f"{path} does not say on which images: give --data FOLDER")
    labelled = bool(checkpoint.choices(path).labels.names)
    loaded = checkpoint.load_generator(path, given.direction, checkpoint.EACH if labelled else None)
    if labelled:
        yield _between_labels(given, loaded, device), None
        return
    if getattr(loaded.net, "scale", 1) > 1:
        raise UsageError(f"{path} enlarges images: give its run or checkpoint folder")
    about, name = loaded.about, loaded.about.get("network", "")
    direction = given.direction or about.get("settings", {}).get("direction", "AtoB")
    if not given.direction and name.startswith("G_B"):
        direction = "BtoA" if direction == "AtoB" else "AtoB"
    ends = (0, 1) if direction == "AtoB" else (1, 0)
    paired = True
    try:
        find_layout(given.data, paired=True)
    except DataError:
        paired = False
    ranges = loaded.ranges if about else (None, None)
    size = Config(load_size=256) if not about else from_json(Config, about.get("settings", {}))
    with tempfile.TemporaryDirectory() as cache:
        data = open_data(
            given.data, paired=paired, direction=direction, channels=loaded.channels[ends[0]],
            channels_b=loaded.channels[ends[1]], range_a=ranges[ends[0]], range_b=ranges[ends[1]],
            max_images=given.max_images, cache=cache, progress=sys.stderr.isatty(),
            **{key: getattr(size, key) for key in GEOMETRY},
        )  # fmt: skip
        ways = [Direction("G", "A", "B")]
        yield System({"G": loaded.net.to(device)}, ways, data, loaded.output, device, paired), None


def _between_labels(given: Arguments, loaded: checkpoint.Loaded, device: torch.device) -> System:
    """The system of one generator that takes labels, on class folders or its own attributes."""
    settings = loaded.about.get("settings", {})
    c = from_json(StarGANConfig, {key: settings[key] for key in ("attributes", *GEOMETRY) if key in settings})
    data = open_labelled(
        given.data, labelled=True, classes=True, attributes=c.attributes, channels=loaded.channels[0],
        geometry=Geometry(c.preprocess, c.load_size, c.crop_size), pages=c.pages,
        limits=loaded.ranges[0] if loaded.about else None, max_images=given.max_images,
        progress=sys.stderr.isatty(),
    )  # fmt: skip
    takes = loaded.labels.names
    if len(data.labels) != len(takes) or (loaded.labels.named and tuple(data.labels) != takes):
        of = f" {', '.join(takes)}" if loaded.labels.named else ""
        raise UsageError(
            f"{loaded.path} takes {len(takes)} labels{of}; {given.data} has {', '.join(data.labels[:40])}"
        )
    ways = [Direction("G", "A", "A")]
    return System({"G": loaded.net.to(device)}, ways, data, loaded.output, device, False)


class _Folder:
    """The images of a folder by name, in 0..1; those that cannot be read are listed in `bad`."""

    def __init__(self, folder: Path, given: Arguments) -> None:
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder")
        files = list_images(folder)[: given.max_images]
        if not files:
            raise DataError(f"{folder} holds no images")
        self.folder, self.range, self.bad = folder, given.range, list[str]()
        self.files: dict[str, Path] = {}
        for file in files:
            name = file.relative_to(folder).with_suffix("").as_posix()
            if name in self.files:
                twins = f"{self.files[name].name} and {file.name}"
                raise DataError(f"{folder}: {twins} have the same name: remove one")
            self.files[name] = file

    def read(self, name: str) -> Tensor | None:
        """(1, C, H, W), the first page of several."""
        try:
            image = read_images(self.files[name])[0]
        except DataError as error:
            self.bad.append(str(error))
            return None
        return torch.from_numpy(to_unit(image, self.range)).clamp(0, 1).permute(2, 0, 1)[None]


def measure_folders(real: _Folder, fake: _Folder, tools: Tools, device: torch.device) -> Found:
    """All chosen measures of generated against real images, read one by one.

    Raises:
        DataError: no image of a folder can be read. UsageError: images that a measure cannot take.
    """
    found = Found(notes=list(tools.notes))
    pairs = Pairs(tools, labelled=True)
    spools = {id(folder): metrics.Spool() for folder in (real, fake)}
    kept: dict[int, list[tuple[str, Tensor]]] = {id(real): [], id(fake): []}
    keep, counted = tools.wants("tstr", "trts"), {id(real): 0, id(fake): 0, "pairs": 0}

    def take(folder: _Folder, name: str) -> Tensor | None:
        image = folder.read(name)
        if image is not None:
            counted[id(folder)] += 1
            if tools.inception is not None:
                spools[id(folder)].append(image)
            if keep:
                kept[id(folder)].append((name, metrics.small(image)))
        return image

    names = list(dict.fromkeys([*fake.files, *real.files]))
    for name in tqdm(names, unit="img", disable=not sys.stderr.isatty()):
        x = take(fake, name) if name in fake.files else None
        y = take(real, name) if name in real.files else None
        if x is None or y is None or not pairs.needed:
            continue
        if x.shape[2:] != y.shape[2:]:
            sizes = [f"{image.shape[3]}x{image.shape[2]}" for image in (x, y)]
            fake.bad.append(f"{fake.files[name]}: {sizes[0]} pixels, its partner has {sizes[1]}")
            continue
        if x.shape[1] != y.shape[1]:
            x, y = metrics.as_rgb(x), metrics.as_rgb(y)
        pairs.add(x, y)
        counted["pairs"] += 1
    for folder in (real, fake):
        if not counted[id(folder)]:
            raise DataError(f"{folder.folder}: none of the images can be read; the first: {folder.bad[0]}")
    pairs.finish(found, "", tools)
    found.details["images"] = {
        "real": counted[id(real)], "fake": counted[id(fake)], "pairs": counted["pairs"],
        "skipped": fake.bad + real.bad,
    }  # fmt: skip
    if tools.inception is not None:
        inception(spools[id(fake)], spools[id(real)], tools, device, found)
    if keep:
        sets = [([name for name, _ in kept[id(f)]], [x for _, x in kept[id(f)]]) for f in (real, fake)]
        classes = metrics.class_folders(*(names for names, _ in sets))
        x, y = (metrics.one_batch(images) for _, images in sets)
        a, b = (metrics.class_numbers(names, classes) for names, _ in sets)
        if tools.wants("tstr"):
            reader = metrics.train_classifier(y, b, classes=len(classes))
            found.values["tstr"] = metrics.accuracy(reader, x, a)
        if tools.wants("trts"):
            reader = metrics.train_classifier(x, a, classes=len(classes))
            found.values["trts"] = metrics.accuracy(reader, y, b)
    for bad in (fake.bad + real.bad)[:1]:
        count = len(fake.bad) + len(real.bad)
        found.notes.append(f"skipped {count} bad file{'s' if count > 1 else ''}, the first: {bad}")
    return found


def evaluate(given: Arguments) -> tuple[Found, str, Path | None, dict[str, object]]:
    """What was found, a heading, the run's JSON file where there is a run, and what else belongs into it."""
    device = pick_device(given.device)
    wanted = {key: getattr(given, key) for key in ("measures", "weights", "palette", "samples")}
    if (given.run is None) == (given.real is None or given.fake is None):
        raise UsageError("give a run or checkpoint, or --real DIR and --fake DIR")
    if given.run is None:
        assert given.real is not None and given.fake is not None
        real, fake = _Folder(given.real, given), _Folder(given.fake, given)
        has = {"inception"} | ({"pairs"} if real.files.keys() & fake.files.keys() else set())
        has |= {"classes"} if metrics.class_folders(list(real.files), list(fake.files)) else set()
        tools = prepare(has, device, **wanted)
        if not tools.names:
            raise UsageError(
                "no equal names, so no pairs; for fid, kid, ... give --weights or --measures fid"
            )
        found = measure_folders(real, fake, tools, device)
        counted = found.details["images"]
        heading = f"{given.fake} against {given.real}: {counted['fake']} and {counted['real']} images"
        heading += f", {counted['pairs']} pairs"
        return found, heading, None, {}
    ours = (given.run / "state.safetensors").is_file() or (given.run / "config.json").is_file()
    if not given.run.exists() or (given.run.is_dir() and not ours and not given.data):
        load_run(given.run, device)  # says what is missing
    with (_of_run if ours else _of_file)(given, given.run, device) as (system, step):
        tools = prepare(system.has(), device, **wanted)
        if not tools.names and not system.ways:
            raise UsageError(
                f"{given.run}: nothing to measure without classes; for fid, kid, ... give --weights"
            )
        found = measure(system, tools)
    images = found.details["images"]
    counts = f"{images['A']}" if images["B"] in (images["A"], 0) else f"{images['A']} and {images['B']}"
    at = "" if step is None else f", step {step}"
    heading = f"{given.run}{at}, {counts} {images['split']} images"
    path = given.run / "evaluation.json" if ours else None
    return found, heading, path, {} if step is None else {"step": step}


def table(found: Found) -> str:
    """Names, values and an arrow in the direction that is better."""
    up, down = ("\u2191", "\u2193") if _prints("\u2191\u2193") else ("higher is better", "lower is better")
    wide = max([SHORTEST, *(len(name) for name in found.values)])
    lines = []
    order = [name for each in metrics.MEASURES for name in found.values if metrics.stem(name) == each]
    for name in order:
        value = found.values[name]
        higher = metrics.measure_of(name).higher
        arrow = "" if higher is None else up if higher else down
        lines.append(f"  {name:{wide}} {value:.4f} {arrow}".rstrip())
    for name, iou in found.details.get("class_iou", {}).items():
        lines.append(f"  {'iou of ' + name:{wide}} {'does not occur' if iou is None else f'{iou:.4f}'}")
    return "\n".join(lines)


def _prints(text: str) -> bool:
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def main(args: Sequence[str] | None = None) -> None:
    """Evaluate; exit code 0, or 2 with one line about what is wrong."""
    try:
        given = parse(Arguments, sys.argv[1:] if args is None else args, "python -m fastgan.evaluate")
        found, heading, path, about = evaluate(given)
        path = given.output or path
        if path:
            write_text(path, json.dumps({**about, **found.values, "details": found.details}, indent=1))
    except (UsageError, DataError, CheckpointError) as error:
        fail(error)
    except OSError as error:
        fail(f"{error.filename or 'a file'} cannot be written: {error.strerror}")
    print(heading)
    print(table(found))
    if path:
        print(f"{path} holds the same with how it was computed")
    for note in found.notes:
        print(f"note: {' '.join(note.split())}", file=sys.stderr)


if __name__ == "__main__":
    main()
