"""The measures that are chosen and the files that they need (`prepare`)."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgan import metrics
from fastgan.checkpoint import read_weights
from fastgan.config import UsageError
from fastgan.metrics import MEASURES, NEEDS, measure_of
from fastgan.metrics.learned import INCEPTION, fetch, recognise

# needs of measures that train a classifier: in training only by name
HEAVY = ("digits", "classes", "drawn", "styles", "labels", "colours")


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
    if tools.wants("ssim", "ssim_bicubic") and importlib.util.find_spec("skimage") is None:
        missing = 'ssim needs scikit-image: pip install -e ".[metrics]"'
        if {"ssim", "ssim_bicubic"} & (chosen | extra):
            raise UsageError(missing)
        tools.names -= {"ssim", "ssim_bicubic"}
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
