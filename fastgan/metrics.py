"""Measures of translated images; every function takes images in 0..1 as (N, C, H, W) and returns a float."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def l1(x: Tensor, y: Tensor) -> float:
    """Mean absolute difference."""
    return (x.float() - y.float()).abs().mean().item()


def psnr(x: Tensor, y: Tensor) -> float:
    """Peak signal-to-noise ratio in dB at a peak of 1, averaged over the images; equal images count 100
    dB."""
    error = (x.float() - y.float()).square().flatten(1).mean(1).clamp_min(1e-10)
    return (-10 * error.log10()).mean().item()


def background_distance(x: Tensor, ink: Tensor) -> float:
    """Mean distance from white where there is no ink.

    Args:
        x: images.
        ink: (N, H, W) in 0..1, the share of digit in each pixel.
    """
    empty = (ink < 0.05).unsqueeze(1).expand_as(x)
    return (1 - x.float())[empty].abs().mean().item()


def train_classifier(
    x: Tensor, labels: Tensor, *, classes: int = 10, epochs: int = 30, seed: int = 0
) -> nn.Module:
    """A small convolutional classifier for images of at least 16x16, trained on the spot; leaves torch's
    generator alone.

    Args:
        x: training images.
        labels: (N,) integers below `classes`.
        classes: number of classes.
        epochs: passes over the images, each shifted by up to 2 pixels at random.
        seed: of weights, order and shifts.
    """
    with torch.random.fork_rng(devices=[]):
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
                loss = F.cross_entropy(net(image), labels[index].long(), label_smoothing=0.05)
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
