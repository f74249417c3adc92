"""A small classifier, trained on the spot: how well translated images are read, and how well they teach."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMALL = 64  # largest side of an image that a classifier is shown


def train_classifier(
    x: Tensor, labels: Tensor, *, classes: int = 10, epochs: int = 30, seed: int = 0, smoothing: float = 0.05
) -> nn.Module:
    """A small convolutional classifier for images of at least 16x16, trained on the spot; leaves torch's
    generator alone.

    Args:
        x: training images.
        labels: (N,) integers below `classes`, or (N, classes) in 0..1 of attributes, each read on its own.
        classes: number of classes or attributes.
        epochs: passes over the images, each shifted by up to 2 pixels at random.
        seed: of weights, order and shifts.
        smoothing: share of the target that goes to all classes evenly; not of attributes.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(x.shape[1], 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 48, 3, 2, 1), nn.BatchNorm2d(48), nn.ReLU(),
            nn.Conv2d(48, 96, 3, 2, 1), nn.BatchNorm2d(96), nn.ReLU(),
            nn.Flatten(), nn.Dropout(0.3), nn.LazyLinear(classes),
        )  # fmt: skip
        net(x[:2].float())
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
        steps = epochs * max(1, len(x) // 64)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in range(epochs):
            for index in torch.randperm(len(x))[: len(x) // 64 * 64 or len(x)].split(64):
                dy, dx = torch.randint(-2, 3, (2,)).tolist()
                image = torch.roll(x[index].float(), (dy, dx), (2, 3))
                if labels.ndim == 2:
                    loss = F.binary_cross_entropy_with_logits(net(image), labels[index].float())
                else:
                    loss = F.cross_entropy(net(image), labels[index].long(), label_smoothing=smoothing)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if schedule.last_epoch < steps - 1:
                    schedule.step()
    return net.eval()


@torch.no_grad()
def accuracy(classifier: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Share of images that a classifier reads as their label."""
    return (classifier(x.float()).argmax(1) == labels.long()).float().mean().item()


def small(x: Tensor) -> Tensor:
    """An image (1, C, H, W) of at most 64x64 pixels for a classifier; a smaller one as it is."""
    return F.interpolate(x, (SMALL, SMALL), mode="area") if max(x.shape[2:]) > SMALL else x


def one_batch(images: Sequence[Tensor]) -> Tensor:
    """Images of `small` as one batch, those of unequal size resized to 64x64."""
    if len({image.shape for image in images}) > 1:
        images = [F.interpolate(image, (SMALL, SMALL), mode="area") for image in images]
    return torch.cat(list(images))


def class_numbers(names: Sequence[str], classes: Sequence[str]) -> Tensor:
    """The class (N,) of images by the first folder of their names."""
    number = {name: k for k, name in enumerate(classes)}
    return torch.tensor([number[name.partition("/")[0]] for name in names])


def class_folders(*groups: Sequence[str]) -> list[str]:
    """The classes, where all images of all groups lie in folders and each group has the same ones, at least
    two; else none."""
    found = [{name.partition("/")[0] if "/" in name else "" for name in names} for names in groups]
    alike = all(each == found[0] for each in found) and len(found[0]) > 1 and "" not in found[0]
    return sorted(found[0]) if alike else []
