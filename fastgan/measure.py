"""What a translator is measured by: `MEASURES`, the tools that they need (`prepare`), and `measure`.

Each image is translated alone, in float32, and compared in 0..1 of its value range. A measure that exists for
several directions has the domain it is about behind its name (`fid_B`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastgan import metrics
from fastgan.checkpoint import best_of, read_weights
from fastgan.config import Config, UsageError
from fastgan.data.dataset import Data, Split
from fastgan.data.digits import make_digits
from fastgan.data.folders import find_layout
from fastgan.generative import has_classes, measure_generated
from fastgan.metrics import MEASURES, NEEDS, measure_of
from fastgan.metrics.learned import FEATURES, INCEPTION, fetch, recognise
from fastgan.metrics.pixels import WINDOW
from fastgan.models import translate_any_size
from fastgan.recipes.base import Direction, Nets, Recipe

TAUGHT = 2000  # images that a classifier is trained on at most
HEAVY = ("digits", "classes", "drawn")  # needs of measures that train a classifier: in training only by name


@dataclass
class System:
    """Generators in evaluation mode by name, the ways they lead, and the images; pairs: image k of both
    domains shows the same thing; recipe: of a run, for one that has no ways."""

    nets: Nets
    ways: Sequence[Direction]
    data: Data
    output: Literal["tanh", "sigmoid"]
    device: torch.device
    pairs: bool
    digits: bool = False
    recipe: Recipe | None = None

    @classmethod
    def of(cls, recipe: Recipe, nets: Nets, data: Data, device: torch.device) -> System:
        """The system of a recipe's run."""
        c: Config = recipe.config
        pairs = recipe.paired
        if not pairs and c.data is not None and data.shown.names_A == data.shown.names_B:
            pairs = find_layout(c.data, paired=False).side_by_side
        digits = c.data is None and c.direction == "AtoB"
        return cls(nets, list(recipe.directions.values()), data, c.output, device, pairs, digits, recipe)

    def has(self) -> set[str]:
        """Which of `NEEDS` this system meets without further flags."""
        if not self.ways:
            return {"drawn"} if has_classes(self.data) else set()
        back = any(way.back for way in self.ways)
        classes = self.digits or bool(_classes(self.data))
        facts = {"pairs": self.pairs, "back": back, "digits": self.digits, "classes": classes}
        return {"inception", "samples", *(name for name, true in facts.items() if true)}

    def translated(self, net: str, x: Tensor) -> Tensor:
        """Images of any size through a generator."""
        return translate_any_size(self.nets[net], x)

    def unit(self, x: Tensor) -> Tensor:
        """Images of the network's range in 0..1, float32 on the host."""
        return (x.float() / 2 + 0.5 if self.output == "tanh" else x.float()).cpu()

    def images(self, split: Split, domain: Literal["A", "B"], k: int) -> Tensor:
        """Image k of a domain, (1, C, H, W) on the device."""
        return split.images(domain, k, k + 1, device=self.device, output_range=self.output)


@dataclass
class Tools:
    """What the chosen measures need; see `prepare`."""

    names: set[str]
    notes: list[str] = field(default_factory=list)
    inception: dict[str, Tensor] | None = None
    lpips: metrics.Lpips | None = None
    palette: metrics.Palette | None = None
    samples: int = 0
    files: dict[str, Any] = field(default_factory=dict)

    def wants(self, *names: str) -> bool:
        """Whether any of these measures was chosen."""
        return bool(self.names & set(names))

    def about_lpips(self) -> dict[str, str]:
        """Network and file behind LPIPS."""
        assert self.lpips is not None
        return {"network": self.lpips.network, **self.files[self.lpips.network]}


@dataclass
class Found:
    """Values by name, how they were computed, and remarks for the user."""

    values: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def prepare(
    has: set[str],
    device: torch.device,
    *,
    measures: Sequence[str] = (),
    besides: Sequence[str] = (),
    weights: Sequence[Path | str] = (),
    palette: str = "",
    samples: int = 0,
    light: bool = False,
) -> Tools:
    """Choose the measures and read the files that they need.

    Args:
        has: what the data offers, `System.has`.
        device: where networks run.
        measures: names of `MEASURES`; none: all that need no file but those given, with `light` without
            those that train a classifier. besides: names that come on top.
        weights: files of the Inception network, and of AlexNet or VGG16 for LPIPS; which is which is read off
            their keys. Those that `measures` name and that are not given are downloaded.
        palette: as `metrics.Palette.read` takes it.
        samples: translations of one image for `diversity`.

    Raises:
        UsageError: an unknown measure, one that is not possible here, or a file that cannot be had.
        CheckpointError: a file that is not plain weights.
    """
    for name in (*measures, *besides):
        measure_of(name)
    has = set(has) | ({"palette"} if palette and "pairs" in has else set())
    if samples < 2:
        has.discard("samples")
    has |= {"alexnet"} if {"pairs", "samples"} & has else set()
    if palette and "pairs" not in has:
        raise UsageError(f"--palette needs {NEEDS['pairs']}")
    tools = Tools(set(), samples=samples)
    states = _read(weights, tools.files)
    chosen, extra = ({metrics.stem(name) for name in names} for names in (measures, besides))
    for name in sorted(chosen | extra):
        if MEASURES[name].needs not in has:
            raise UsageError(f"{name} needs {NEEDS[MEASURES[name].needs]}")
    free = has - {"inception", "alexnet"} - (set(HEAVY) if light else set())
    # folders may be nested for other reasons than classes
    free -= set() if "digits" in has else {"classes"}
    possible = {name for name, m in MEASURES.items() if m.needs in (has & states.keys()) | free}
    tools.names = (chosen or possible) | extra
    if "ssim" in tools.names and importlib.util.find_spec("skimage") is None:
        missing = 'ssim needs scikit-image: pip install -e ".[metrics]"'
        if "ssim" in chosen | extra:
            raise UsageError(missing)
        tools.names.discard("ssim")
        tools.notes.append(missing)
    for kind, needed in (("inception", tools.wants(*INCEPTION)), ("alexnet", tools.wants("lpips"))):
        if needed and kind not in states:
            states |= _read([fetch(kind)], tools.files)
    tools.inception = states.get("inception") if tools.wants(*INCEPTION) else None
    if "alexnet" in states and tools.wants("lpips", "diversity"):
        tools.lpips = metrics.Lpips(states["alexnet"], device)
    if palette:
        tools.palette = metrics.Palette.read(palette)
    return tools


def _read(weights: Sequence[Path | str], files: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """State dicts by need; name and SHA-256 of each file go into `files`."""
    states = {}
    for path in map(Path, weights):
        state, _ = read_weights(path)
        network = recognise(state)
        if not network:
            raise UsageError(
                f"--weights {path}: neither torch-fidelity's Inception network nor torchvision's AlexNet or "
                f"VGG16; its keys are {', '.join(list(state)[:3])}, ..."
            )
        sha = hashlib.sha256(path.read_bytes()).hexdigest()
        states["inception" if network == "inception" else "alexnet"] = state
        files[network] = {"weights": path.name, "sha256": sha}
    return states


@torch.no_grad()
def measure(system: System, tools: Tools) -> Found:
    """All chosen measures on the held-out images (the training images where there are none).

    Leaves the random generators alone.

    Raises:
        UsageError: images that a chosen measure cannot take.
    """
    found = Found(notes=list(tools.notes))
    shown = system.data.shown
    found.details["images"] = {"A": shown.len_A, "B": shown.len_B, "split": _split_name(system.data)}
    device = system.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        target = _labelled(system, tools)
        for way in system.ways:
            _measure_way(system, tools, way, found, way.target == target)
        if tools.names and not system.ways and system.recipe is not None:
            found.values |= measure_generated(system.recipe, system.nets, system.data, device)
    return found


def _split_name(data: Data) -> str:
    return "test" if data.shown is data.test else "training"


def _labelled(system: System, tools: Tools) -> str | None:
    """The domain whose images are label maps: of those translated to, the nearest to the palette."""
    if tools.palette is None:
        return None
    palette, shown = tools.palette, system.data.shown
    targets = {way.target for way in system.ways}
    return min(targets, key=lambda d: palette.distance(system.unit(system.images(shown, d, 0))))


def _measure_way(system: System, tools: Tools, way: Direction, found: Found, labelled: bool) -> None:
    shown, several = system.data.shown, len(system.ways) > 1
    suffix = f"_{way.target}" if several else ""
    pairs = Pairs(tools, labelled)
    spools = (metrics.Spool(), metrics.Spool()) if tools.inception is not None else None
    kept: list[Tensor] = []
    spread: list[float] = []
    keep = tools.wants("tstr", "trts", "digit_accuracy_fake", "background_distance")
    count = shown.len_A if way.source == "A" else shown.len_B
    cycle = 0.0
    for k in range(count):
        x = system.images(shown, way.source, k)
        fake = system.translated(way.net, x)
        unit = system.unit(fake)
        if way.back and tools.wants("cycle_l1"):
            cycle += metrics.l1(system.unit(system.translated(way.back, fake)), system.unit(x))
        if system.pairs and pairs.needed:
            pairs.add(unit, system.unit(system.images(shown, way.target, k)))
        if spools:
            spools[0].append(unit)
        if keep:
            kept.append(metrics.small(unit))
        if tools.wants("diversity"):
            several_fakes = _samples(system, way.net, x, tools.samples)
            spread.append(metrics.mean_distance(several_fakes, tools.lpips or metrics.l1))
    if way.back and tools.wants("cycle_l1"):
        found.values[f"cycle_l1_{way.source}"] = cycle / count
    pairs.finish(found, suffix, tools)
    if spread:
        found.values[f"diversity{suffix}"] = sum(spread) / len(spread)
        found.details["diversity"] = {
            "samples": tools.samples, "distance": tools.about_lpips() if tools.lpips else "l1"
        }  # fmt: skip
        if not _dropouts(system.nets[way.net]):
            found.notes.append(
                f"diversity{suffix} is 0: {way.net} has no dropout, so nothing in it is random"
            )
    if spools:
        total = shown.len_B if way.target == "B" else shown.len_A
        for k in range(total):
            spools[1].append(system.unit(system.images(shown, way.target, k)))
        inception(spools[0], spools[1], tools, system.device, found, suffix)
    if keep:
        _taught(system, tools, way, kept, found, suffix)


class Pairs:
    """Sums of the measures of pairs."""

    def __init__(self, tools: Tools, labelled: bool) -> None:
        self._tools, self._sums, self._count = tools, dict[str, float](), 0
        self._palette = tools.palette if labelled else None
        self._confusion: Tensor | int = 0
        self._small = 0
        self.needed = self._palette is not None or tools.wants("l1", "psnr_db", "ssim", "lpips")

    def add(self, fake: Tensor, true: Tensor) -> None:
        """Compare images (N, C, H, W) in 0..1."""
        tools, values = self._tools, dict[str, float]()
        if tools.wants("l1"):
            values["l1"] = metrics.l1(fake, true)
        if tools.wants("psnr_db"):
            values["psnr_db"] = metrics.psnr(fake, true)
        if tools.wants("ssim"):
            if min(fake.shape[2:]) < WINDOW:
                self._small += 1
            else:
                values["ssim"] = metrics.ssim(fake, true)
        if tools.wants("lpips") and tools.lpips is not None:
            values["lpips"] = tools.lpips(fake, true)
        if self._palette is not None:
            self._confusion = self._confusion + self._palette.confusion(true, fake)
        self._sums = {key: self._sums.get(key, 0.0) + value for key, value in values.items()}
        self._count += 1

    def finish(self, found: Found, suffix: str, tools: Tools) -> None:
        """Add the means to what was found."""
        found.values |= {f"{key}{suffix}": value / self._count for key, value in self._sums.items()}
        if self._small:
            found.notes.append(f"ssim{suffix} is left out: {self._small} images are below {WINDOW} pixels")
        if "lpips" in self._sums:
            found.details["lpips"] = tools.about_lpips()
        if self._palette is not None and isinstance(self._confusion, Tensor):
            scores, each = metrics.label_scores(self._confusion)
            found.values |= {f"{key}{suffix}": value for key, value in scores.items() if key in tools.names}
            found.details["class_iou"] = dict(zip(self._palette.names, each))


def inception(
    fake: metrics.Spool,
    real: metrics.Spool,
    tools: Tools,
    device: torch.device,
    found: Found,
    suffix: str = "",
) -> None:
    """Add fid and its relatives to what was found, with a warning where there are few images."""
    assert tools.inception is not None
    values, about = metrics.inception_measures(fake, real, tools.inception, device)
    found.values |= {f"{key}{suffix}": value for key, value in values.items() if key in tools.names}
    found.details[f"inception{suffix}"] = tools.files["inception"] | about
    fewest = min(len(fake), len(real))
    if fewest < FEATURES and "fid" in tools.names:
        found.notes.append(
            f"fid{suffix} of {fewest} images: below {FEATURES:,} the covariance is rank-deficient, FID far "
            "too high; compare it at equal numbers only, or take kid"
        )


def _dropouts(net: nn.Module) -> list[nn.Module]:
    return [m for m in net.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0]


def _samples(system: System, net: str, x: Tensor, count: int) -> Tensor:
    """Translations (count, C, H, W) in 0..1 of one image, with dropout as in training and seeded draws."""
    dropouts = _dropouts(system.nets[net])
    for module in dropouts:
        module.train()
    try:
        fakes = []
        for k in range(count):
            torch.manual_seed(k)
            fakes.append(system.unit(system.translated(net, x)))
    finally:
        for module in dropouts:
            module.eval()
    return torch.cat(fakes)


def _classes(data: Data) -> list[str]:
    return metrics.class_folders(
        data.train.names_A, data.train.names_B, data.shown.names_A, data.shown.names_B
    )


def _taught(
    system: System, tools: Tools, way: Direction, fakes: list[Tensor], found: Found, suffix: str
) -> None:
    """TSTR, TRTS (Esteban, Hyland, Raetsch 2017): a translation has the class of its source. A classifier
    taught by translations of training images reads real test images, and one taught by real training images
    reads translations of test images. For digits also how white their ground is."""
    data, digits = system.data, system.digits
    if digits and way.target != "B":
        return
    classes = [str(k) for k in range(10)] if digits else _classes(data)
    sets = {split: make_digits(split, paired=data.paired) for split in ("train", "test")} if digits else {}

    def labels(split: Split, domain: Literal["A", "B"], chosen: Sequence[int]) -> Tensor:
        if digits:
            own = sets["train" if split is data.train else "test"]
            return torch.from_numpy(own.labels_A if domain == "A" else own.labels_B)[list(chosen)]
        names = split.names_A if domain == "A" else split.names_B
        return metrics.class_numbers([names[k] for k in chosen], classes)

    def some(split: Split, domain: Literal["A", "B"], most: int) -> list[int]:
        count = split.len_A if domain == "A" else split.len_B
        return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int)).tolist()

    def real(split: Split, chosen: Sequence[int]) -> Tensor:
        images = (system.unit(system.images(split, way.target, k)) for k in chosen)
        return metrics.one_batch([metrics.small(image) for image in images])

    shown, source, target = data.shown, way.source, way.target
    tested, taught = some(shown, target, 10**9), some(data.train, target, TAUGHT)
    test_real, fake = real(shown, tested), metrics.one_batch(fakes)
    test_labels = labels(shown, target, tested)
    values: dict[str, float] = {}
    about: dict[str, float] = {"classes": len(classes), "tested_on_real": len(tested)}
    if tools.wants("trts", "digit_accuracy_real", "digit_accuracy_fake"):
        reader = metrics.train_classifier(
            real(data.train, taught), labels(data.train, target, taught), classes=len(classes)
        )
        values["digit_accuracy_real"] = metrics.accuracy(reader, test_real, test_labels)
        values["trts"] = metrics.accuracy(reader, fake, labels(shown, source, range(len(fake))))
        values["digit_accuracy_fake"] = values["trts"]
        about |= {"taught_by_real": len(taught), "train_real_test_real": values["digit_accuracy_real"]}
    if tools.wants("tstr"):
        taught = some(data.train, source, TAUGHT)
        made = [system.unit(system.translated(way.net, system.images(data.train, source, k))) for k in taught]
        reader = metrics.train_classifier(
            metrics.one_batch([metrics.small(image) for image in made]), labels(data.train, source, taught),
            classes=len(classes),
        )  # fmt: skip
        values["tstr"] = metrics.accuracy(reader, test_real, test_labels)
        about["taught_by_fake"] = len(taught)
    if tools.wants("background_distance"):
        ink = torch.from_numpy(sets["test"].ink_A)[: len(fake)]
        values["background_distance"] = metrics.background_distance(fake, ink)
    if tools.wants("tstr", "trts"):
        found.details[f"classifier{suffix}"] = about
    # the names of the digits' measures are older than the rule of domains, and in published tables
    old = {"digit_accuracy_real": "digit_accuracy_real_B", "digit_accuracy_fake": "digit_accuracy_fake_B",
           "background_distance": "background_distance"}  # fmt: skip
    found.values |= {old.get(k, f"{k}{suffix}"): v for k, v in values.items() if k in tools.names}


class Evaluation:
    """What a run measures while it trains, and which of its checkpoints is the best.

    Args:
        recipe: with `measures`, `weights`, `palette` and `keep_best`.
        data, device: of the run.
        folder: its `checkpoints`.

    Raises:
        UsageError, CheckpointError: a measure that is not possible here, or a file that cannot be had.
    """

    def __init__(self, recipe: Recipe, data: Data, device: torch.device, folder: Path) -> None:
        c: Config = recipe.config
        self.system = System.of(recipe, {}, data, device)
        self.name = c.keep_best
        if self.name and measure_of(self.name).higher is None:
            raise UsageError(f"--keep-best {self.name}: it does not depend on the generator")
        self._tools = prepare(
            self.system.has(), device, measures=c.measures, besides=[self.name] if self.name else [],
            weights=c.weights, palette=c.palette, light=True,
        )  # fmt: skip
        if not self._tools.names:
            raise UsageError("--evaluate-every: nothing can be measured here without --measures or --weights")
        best = best_of(folder)
        self._best: float | None = best["value"] if best.get("measure") == self.name else None
        self._told: set[str] = set()

    def run(self, nets: Nets) -> Found:
        """Measure generators that are in evaluation mode; notes that were told before are left out.

        A measure that fails does not end the run: what went wrong is a note.
        """
        self.system.nets = nets
        try:
            found = measure(self.system, self._tools)
            if _split_name(self.system.data) == "training":
                found.notes.append("there are no test images: the evaluation is on training images")
        except Exception as error:
            found = Found(notes=[f"the evaluation failed: {type(error).__name__}: {error}"])
        found.notes = [note for note in dict.fromkeys(found.notes) if note not in self._told]
        self._told |= set(found.notes)
        return found

    def better(self, values: Mapping[str, float], step: int) -> dict[str, Any]:
        """What a checkpoint is the best by, where it is; of a measure in both domains the mean counts."""
        name = self.name
        found = [v for k, v in values.items() if name in (k, metrics.stem(k))]
        value = sum(found) / len(found) if found else math.nan
        if not name or not math.isfinite(value):
            return {}
        sign = 1 if measure_of(name).higher else -1
        if self._best is not None and sign * value <= sign * self._best:
            return {}
        self._best = value
        return {"measure": name, "value": value, "step": step}
