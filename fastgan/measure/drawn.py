"""Measures of images that are made from noise, by a classifier taught by real ones.

The class score is the inception score with that classifier in the place of the network trained on ImageNet
(Salimans et al. 2016, section 4). TSTR: train on synthetic images, test on real ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgan import metrics
from fastgan.data.dataset import Data, Split
from fastgan.generative import draw
from fastgan.measure.pairs import inception
from fastgan.measure.system import Found, System
from fastgan.measure.tools import Tools
from fastgan.metrics import MEASURES
from fastgan.recipes.base import Nets, Recipe

IMAGES = 2000  # that are measured
MOST = 10_000  # real images that the classifiers see
FEWEST, AT_ONCE = 2048, 100  # drawn for Inception features; in memory
KEY = 4  # keeps these draws apart from others


def measure_drawn(system: System, tools: Tools, found: Found) -> None:
    """Add the measures of images from noise to what was found: by a classifier (`measure_generated`), and by
    Inception features as many images as there are in training, at least 2,048 and at most 50,000, against
    those."""
    assert system.recipe is not None
    recipe, train = system.recipe, system.data.train
    if any(MEASURES[name].needs in ("drawn", "labels") for name in tools.names):
        found.values |= measure_generated(recipe, system.nets, system.data, system.device)
    if tools.inception is None:
        return
    spools = metrics.Spool(), metrics.Spool()
    count = min(max(FEWEST, train.len_A), 50_000)
    for start in range(0, count, AT_ONCE):
        numbers = range(start, min(start + AT_ONCE, count))
        given = None
        if recipe.labelled and train.labels is not None:
            given = torch.from_numpy(train.labels[[k % train.len_A for k in numbers]])
        made = draw(
            recipe, system.nets, len(numbers), key=KEY, device=system.device, labels=given, skip=start
        )
        spools[0].append(system.unit(made))
    for k in range(min(train.len_A, 50_000)):
        spools[1].append(system.unit(system.images(train, "A", k)))
    inception(*spools, tools, system.device, found)


def measure_generated(recipe: Recipe, nets: Nets, data: Data, device: torch.device) -> dict[str, float]:
    """What a classifier of the real images says of 2,000 generated ones; of data whose labels are classes.

    Returns:
        class_accuracy_real: how it reads held-out real images. class_score: see `class_score`, and
        class_score_real of those.
        class_share_min, class_share_max: of the generated images, of the rarest and most frequent class.
        Where the recipe is labelled also label_accuracy: generated images that are read as their label, and
        tstr: held-out real images that a classifier trained on the generated ones reads correctly.
    """
    classes = len(data.labels)
    labels = torch.arange(IMAGES) % classes
    given = F.one_hot(labels, classes).float() if recipe.labelled else None
    fake = _unit(recipe, draw(recipe, nets, IMAGES, key=KEY, device=device, labels=given))
    (real, real_labels), (held_out, held_labels) = (
        _real(recipe, split) for split in (data.train, data.shown)
    )
    # the score asks how sure it is: no smoothing
    reader = metrics.train_classifier(real, real_labels, classes=classes, smoothing=0.0)
    shares = probabilities(reader, fake)
    counts = torch.bincount(shares.argmax(1), minlength=classes) / IMAGES
    out = {
        "class_accuracy_real": metrics.accuracy(reader, held_out, held_labels),
        "class_score": class_score(shares),
        "class_score_real": class_score(probabilities(reader, held_out)),
        "class_share_min": counts.min().item(),
        "class_share_max": counts.max().item(),
    }
    if recipe.labelled:
        learner = metrics.train_classifier(fake, labels, classes=classes)
        out["label_accuracy"] = metrics.accuracy(reader, fake, labels)
        out["tstr"] = metrics.accuracy(learner, held_out, held_labels)
    return out


@torch.no_grad()
def probabilities(classifier: nn.Module, x: Tensor) -> Tensor:
    """p(class | image), (N, classes) float64, of images in 0..1."""
    return torch.cat([classifier(part).double().softmax(1) for part in x.split(500)])


def class_score(shares: Tensor, parts: int = 10) -> float:
    """exp(E KL(p(class | x) || p(class))), the mean over equal parts of the images: 1 to the number of
    classes.

    Args:
        shares: p(class | x), (N, classes).
    """
    found = []
    for p in shares.chunk(parts):
        divergence = (torch.special.xlogy(p, p) - torch.special.xlogy(p, p.mean(0))).sum(1)
        found.append(divergence.mean().exp())
    return torch.stack(found).mean().item()


def _real(recipe: Recipe, split: Split) -> tuple[Tensor, Tensor]:
    assert split.labels is not None
    images = split.images("A", 0, MOST, output_range=recipe.config.output)
    return _unit(recipe, images), torch.from_numpy(split.labels[:MOST].argmax(1))


def _unit(recipe: Recipe, x: Tensor) -> Tensor:
    return (x / 2 + 0.5 if recipe.config.output == "tanh" else x).contiguous()
