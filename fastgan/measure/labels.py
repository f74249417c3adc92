"""Measures of translation between labels: StarGAN's own, and what the digits in colours allow.

A classifier taught by real training images reads what each held-out image becomes under every other label, as
in section 5.4 of StarGAN (Choi et al. 2018); there it reads facial expressions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastgan import metrics
from fastgan.data.dataset import Split
from fastgan.data.digits import COLOURS, ColouredDigits, make_colours
from fastgan.data.labelled import has_classes, other_labels
from fastgan.measure.system import Found, System
from fastgan.measure.taught import TAUGHT
from fastgan.measure.tools import Tools
from fastgan.recipes.base import Direction


def measure_labels(system: System, tools: Tools, way: Direction, found: Found) -> None:
    """Add to what was found, each a share of the translations:

    label_accuracy: those that the classifier reads as their target; of attributes, the changed ones that it
    reads as changed. label_accuracy_real: how it reads held-out real images.
    colour_accuracy: of the digits, those whose colour is nearest to the target among the five;
    digit_accuracy: those that a classifier of real digits reads as what they were.
    """
    data, classes = system.data, has_classes(system.data)
    shown = data.shown
    assert data.train.labels is not None and shown.labels is not None
    test = make_colours("test" if shown is data.test else "train") if "colours" in system.has() else None
    reader = digit_reader = None
    if tools.wants("label_accuracy", "label_accuracy_real"):
        taught = np.unique(np.linspace(0, data.train.len_A - 1, TAUGHT).round().astype(int))
        target = torch.from_numpy(data.train.labels[taught])
        images = _real(system, data.train, taught.tolist())
        reader = metrics.train_classifier(
            images, target.argmax(1) if classes else target, classes=len(data.labels)
        )
        found.details["classifier"] = {"labels": data.labels, "taught_by_real": len(taught)}
    if tools.wants("digit_accuracy") and test is not None:
        known = make_colours("train")
        images = _real(system, data.train, range(data.train.len_A))
        digit_reader = metrics.train_classifier(images, torch.from_numpy(known.digits[: len(images)]))
    hits: dict[str, list[Tensor]] = {}
    for k in range(shown.len_A):
        own = shown.labels[k]
        rows = other_labels(own, data.labels, classes=classes)
        target = torch.from_numpy(rows[(rows != own).any(1)])
        x = system.images(shown, "A", k)
        fakes = system.translated(way, x.expand(len(target), -1, -1, -1), target.to(system.device))
        unit = metrics.small(system.unit(fakes))
        now: dict[str, Tensor] = {}
        if reader is not None:
            real = metrics.small(system.unit(x))
            changed = target != torch.from_numpy(own)
            right = _right(reader(unit), target, classes)
            now["label_accuracy"] = right if classes else right[changed]
            now["label_accuracy_real"] = _right(reader(real), torch.from_numpy(own)[None], classes)
        if test is not None and tools.wants("colour_accuracy"):
            now["colour_accuracy"] = nearest_colour(unit, test, k) == target.argmax(1)
        if test is not None and digit_reader is not None:
            now["digit_accuracy"] = digit_reader(unit).argmax(1) == int(test.digits[k])
        for name, values in now.items():
            hits.setdefault(name, []).append(values.flatten().float())
    found.values |= {name: torch.cat(v).mean().item() for name, v in hits.items() if name in tools.names}
    if hits:
        found.details["translations"] = sum(map(len, next(iter(hits.values()))))


def _real(system: System, split: Split, chosen: object) -> Tensor:
    images = (system.unit(system.images(split, "A", k)) for k in chosen)  # type: ignore[attr-defined]
    return metrics.one_batch([metrics.small(image) for image in images])


def _right(logits: Tensor, target: Tensor, classes: bool) -> Tensor:
    """Which labels (N,), or attributes (N, labels), are read as they should be."""
    return logits.argmax(1) == target.argmax(1) if classes else (logits > 0) == (target > 0.5)


def nearest_colour(images: Tensor, digits: ColouredDigits, k: int) -> Tensor:
    """Numbers (N,) of COLOURS that are nearest (Euclidean in RGB) to the colours of images (N, 3, H, W) in
    0..1 of digit k: the c that comes closest, by least squares, to x = m c + (1 - m) with its ink m."""
    ink = torch.from_numpy(digits.ink[k])
    colour = ((images - (1 - ink)) * ink).sum((2, 3)) / ink.square().sum()
    palette = torch.tensor(list(COLOURS.values()), dtype=images.dtype) / 255
    return torch.cdist(colour, palette).argmin(1)
