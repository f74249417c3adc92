"""Adversarial and reconstruction losses as pure functions of tensors; half-precision inputs are reduced in
float32.

Sources: LSGAN 1611.04076 with a = 0, b = c = 1; vanilla, non-saturating: Goodfellow et al. 2014; hinge: Lim
and Ye 2017; WGAN 1701.07875; WGAN-GP 1704.00028, equation 3; feature matching: see there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

GAN_MODES = ("lsgan", "vanilla", "hinge", "wgan", "wgan-gp")


def _full(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def mean(x: Tensor) -> Tensor:
    """Mean of all values, detached."""
    return _full(x.detach()).mean()


def _check(mode: str) -> None:
    if mode not in GAN_MODES:
        raise ValueError(f"gan_mode must be one of {', '.join(GAN_MODES)}, got {mode}")


def generator_gan(fake: Tensor, mode: str) -> Tensor:
    """What G minimises: D's logits of generated images (any shape) to a scalar; the target is never
    smoothed."""
    _check(mode)
    fake = _full(fake)
    if mode == "lsgan":
        return (fake - 1).square().mean()
    if mode == "vanilla":
        return F.softplus(-fake).mean()  # -log sigmoid(D(fake)): the non-saturating form
    return -fake.mean()


def discriminator_gan(
    real: Tensor,
    fake: Tensor,
    mode: str,
    *,
    real_label: float = 1.0,
    real_weight: float = 0.5,
    fake_weight: float = 0.5,
) -> Tensor:
    """What D minimises, from its logits of real and of generated images; a scalar.

    Args:
        real, fake: logits of any shape.
        mode: one of GAN_MODES; "wgan-gp" is the critic loss without its penalty (`gradient_penalty`).
        real_label: target of real images for "lsgan" and "vanilla" (one-sided smoothing).
        real_weight, fake_weight: weights of the two halves; 0.5 each is the usual loss ("wgan": D(fake) -
            D(real)).
    """
    _check(mode)
    real, fake = _full(real), _full(fake)
    if mode == "lsgan":
        halves = (real - real_label).square().mean(), fake.square().mean()
    elif mode == "vanilla":
        target = torch.full_like(real, real_label)
        halves = F.binary_cross_entropy_with_logits(real, target), F.softplus(fake).mean()
    elif mode == "hinge":
        halves = F.relu(1 - real).mean(), F.relu(1 + fake).mean()
    else:
        # the critic has no 0.5: equal weights give exactly E f(fake) - E f(real)
        halves = -2 * real.mean(), 2 * fake.mean()
    return real_weight * halves[0] + fake_weight * halves[1]


def gradient_penalty(
    critic: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    at: Literal["mixed", "real", "fake"] = "mixed",
) -> Tensor:
    """mean (||grad_x D(x)||_2 - 1)^2; differentiable, and finite where the gradient is zero.

    Args:
        critic: D, second-order differentiable.
        real, fake: (N, C, H, W).
        at: where x lies: drawn evenly between real and fake, one draw per sample, or the one or the other.
    """
    if at == "mixed":
        mix = torch.rand(real.shape[0], 1, 1, 1, device=real.device, dtype=real.dtype)
        x = mix * real + (1 - mix) * fake.to(real.dtype)
    else:
        x = {"real": real, "fake": fake.to(real.dtype)}[at]
    x = x.detach().requires_grad_()
    out = critic(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    # the norm has no gradient at 0 (a constant critic): clamp under the root instead of shifting the gradient
    norm = _full(slope).flatten(1).square().sum(1).clamp_min(1e-24).sqrt()
    return (norm - 1).square().mean()


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference of two equal shapes."""
    return (_full(x) - _full(y)).abs().mean()


def mse(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference of two equal shapes."""
    return (_full(x) - _full(y)).square().mean()


def gram(x: Tensor) -> Tensor:
    """Gram matrices (N, C, C) of features (N, C, H, W): the mean over all places of the products of any two
    channels (Gatys et al. 2016, equation 3, over the number of places, so that sizes can be compared)."""
    rows = _full(x).flatten(2)
    return rows @ rows.transpose(1, 2) / rows.shape[2]


def roughness(x: Tensor) -> Tensor:
    """Mean squared difference of neighbours, beside and below, of images (N, C, H, W)."""
    x = _full(x)
    return mse(x[..., 1:], x[..., :-1]) + mse(x[..., 1:, :], x[..., :-1, :])


def label_loss(logits: Tensor, labels: Tensor, *, classes: bool) -> Tensor:
    """Cross entropy of labels and what a network says of them, per image; a scalar.

    Args:
        logits, labels: (N, labels), labels in 0..1.
        classes: every label has exactly one 1: softmax. Else the numbers are attributes, each with a sigmoid
            of its own, and their entropies are added up (StarGAN's code).
    """
    logits, labels = _full(logits), labels.to(_full(logits).dtype)
    if classes:
        return F.cross_entropy(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / len(logits)


def feature_matching(
    real: Sequence[Tensor],
    fake: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    between: Literal["images", "means"] = "images",
) -> Tensor:
    """Weighted sum over layers of the distance between a discriminator's features of real and of generated
    images; a scalar, differentiable in both.

    Args:
        real, fake: one tensor (N, ...) a layer, equal shapes in a layer.
        weights: one a layer; default 1 each.
        between: "images": mean absolute difference, image by image, so the k-th real one has to be what the
            k-th generated one should look like (PAN 1706.09138, equation 4; pix2pixHD 1711.11585, equation
            4). "means": mean squared difference of the means over the batch (Salimans et al. 1606.03498,
            section 3.1; DiscoGAN's code); the images need not belong together, and N may differ.

    Raises:
        ValueError: no layers, or not equally many.
    """
    weights = [1.0] * len(real) if weights is None else weights
    if not real or not len(real) == len(fake) == len(weights):
        counts = f"{len(real)} and {len(fake)} layers, {len(weights)} weights"
        raise ValueError(f"feature_matching: needs equally many layers, at least one, got {counts}")
    found = [
        l1(x, y) if between == "images" else mse(_full(x).mean(0), _full(y).mean(0))
        for x, y in zip(real, fake)
    ]
    return sum((w * d for w, d in zip(weights, found)), start=found[0].new_zeros(()))


def weight_decay(parameters: Iterable[Tensor], factor: float) -> Tensor:
    """Half the sum of squares times factor: its gradient, factor * w, is what Adam adds for weight decay."""
    return torch.stack([_full(p).square().sum() for p in parameters]).sum() * (factor / 2)
