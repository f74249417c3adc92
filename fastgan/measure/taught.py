"""Measures by a classifier that is taught by real or by translated images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastgan import metrics
from fastgan.data.dataset import Split
from fastgan.data.digits import make_digits
from fastgan.measure.system import Found, System, class_names
from fastgan.measure.tools import Tools
from fastgan.recipes.base import Direction

TAUGHT = 2000  # images that a classifier is trained on at most


def measure_taught(
    system: System,
    tools: Tools,
    way: Direction,
    fakes: list[Tensor],
    found: Found,
    suffix: str,
    each: int = 1,
) -> None:
    """TSTR, TRTS (Esteban, Hyland, Raetsch 2017): a translation has the class of its source. A classifier
    taught by translations of training images reads real test images, and one taught by real training images
    reads translations of test images. For digits also how white their ground is.

    Args:
        fakes: translations of all test images, `each` of every image in a row.
    """
    data, digits = system.data, system.digits
    if digits and way.target != "B":
        return
    classes = [str(k) for k in range(10)] if digits else class_names(data)
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
    of = [k // each for k in range(len(fakes))]
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
        values["trts"] = metrics.accuracy(reader, fake, labels(shown, source, of))
        values["digit_accuracy_fake"] = values["trts"]
        about |= {"taught_by_real": len(taught), "train_real_test_real": values["digit_accuracy_real"]}
    if tools.wants("tstr"):
        taught = some(data.train, source, TAUGHT)
        made = [system.unit(system.translated(way, system.images(data.train, source, k))) for k in taught]
        reader = metrics.train_classifier(
            metrics.one_batch([metrics.small(image) for image in made]), labels(data.train, source, taught),
            classes=len(classes),
        )  # fmt: skip
        values["tstr"] = metrics.accuracy(reader, test_real, test_labels)
        about["taught_by_fake"] = len(taught)
    if tools.wants("background_distance"):
        ink = torch.from_numpy(sets["test"].ink_A)[of]
        values["background_distance"] = metrics.background_distance(fake, ink)
    if tools.wants("tstr", "trts"):
        found.details[f"classifier{suffix}"] = about
    # the names of the digits' measures are older than the rule of domains, and in published tables
    old = {"digit_accuracy_real": "digit_accuracy_real_B", "digit_accuracy_fake": "digit_accuracy_fake_B",
           "background_distance": "background_distance"}  # fmt: skip
    found.values |= {old.get(k, f"{k}{suffix}"): v for k, v in values.items() if k in tools.names}
