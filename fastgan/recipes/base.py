"""What the trainer needs from a recipe, and the pieces that recipes share.

A recipe is pure: `translate`, `generator_loss` and `discriminator_loss` depend on their arguments and on the
frozen settings alone, so they can be compiled, captured and compared with a plain-torch twin. Optimisers,
history pool and logging stay outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor, nn

from fastgan import losses
from fastgan.config import Config, UsageError, flag
from fastgan.models import PatchDiscriminator, ResnetGenerator, UnetGenerator, init_weights
from fastgan.models.patchgan import smallest_side
from fastgan.stack import run_together

Nets = dict[str, nn.Module]
Batch = dict[str, Tensor]
Terms = dict[str, Tensor]


class Direction(NamedTuple):
    """One way through a system: generator `net` turns images of domain `source` into `target`; `back`
    returns."""

    net: str
    source: Literal["A", "B"]
    target: Literal["A", "B"]
    back: str | None = None


class Recipe(Protocol):
    """One system, with or without discriminators. Batches hold images (N, C, H, W) under the names of its
    `domains`, where it is `labelled` the labels of A (N, labels) in 0..1 under "label", and standard normal
    numbers (N, n) under the names of its `noise`; fakes are named by the domain they imitate.

    A recipe whose losses need more than the batches, such as weights of others, has a method
    `prepare(images)`, called once before training with one training image (1, C, H, W) of each domain.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    config_class: ClassVar[type[Config]]
    presets: ClassVar[dict[str, dict[str, Any]]]
    paired: ClassVar[bool]
    domains: ClassVar[tuple[str, ...]]
    labelled: ClassVar[bool]
    order: ClassVar[Literal["g-first", "d-first"]]
    generators: ClassVar[tuple[str, ...]]
    directions: ClassVar[dict[str, Direction]]

    def __init__(self, config: Any) -> None: ...

    @property
    def config(self) -> Any:
        """The frozen settings, of `config_class`."""
        ...

    @property
    def discriminators(self) -> tuple[str, ...]:
        """Names of the networks that judge images; none where nothing is judged."""
        ...

    @property
    def noise(self) -> dict[str, int]:
        """Random numbers that a batch brings for each image, by name."""
        ...

    def networks(self, channels_a: int, channels_b: int) -> Nets:
        """Freshly initialised networks by upstream's names. channels_b: without a domain B the numbers in a
        label."""
        ...

    def unfit(self, height: int, width: int) -> str:
        """What the networks need where they do not take images of a size, "" where they do."""
        ...

    def numbers(self, step: int) -> dict[str, float]:
        """What changes from step to step, by name: the batches hold each as a tensor without dimensions."""
        ...

    def translate(self, nets: Nets, batch: Batch) -> Batch:
        """Generated images by the domain they imitate; where gradients are recorded, also what else
        `generator_loss` needs of the same passes, under other names."""
        ...

    def translator(self, nets: Nets, way: Direction) -> nn.Module:
        """What makes images of `way.target` from those of `way.source`, with the attributes of
        `fastgan.models.translate_any_size`."""
        ...

    def generator_loss(self, nets: Nets, batch: Batch, fakes: Batch) -> tuple[Tensor, Terms]:
        """What the generators minimise together and its detached terms, already weighted."""
        ...

    def discriminator_loss(self, nets: Nets, batch: Batch, fakes: Batch) -> tuple[Tensor, Terms]:
        """What the discriminators minimise together and its detached terms; fakes are detached inside."""
        ...


def unfit_translator(config: Config, height: int, width: int) -> str:
    """`Recipe.unfit` of `make_generator` and `make_discriminator`."""
    resnet = config.generator == "resnet"
    multiple, least = 4 if resnet else 2**config.levels, smallest_side(config.patch)
    if height % multiple or width % multiple:
        network = "a ResNet" if resnet else f"{config.generator} with --levels {config.levels}"
        return f"{network} needs multiples of {multiple}; change --crop-size, --preprocess or --levels"
    if min(height, width) < least:
        return f"--patch {config.patch} needs at least {least}; choose a smaller --patch"
    return ""


def refuse_idle(config: Config, *keys: str) -> None:
    """Refuse settings of other networks; UsageError names the flag."""
    for key in keys:
        if getattr(config, key) != getattr(Config, key):
            raise UsageError(f"{flag(key)} has no effect here: leave it out")


def make_generator(config: Config, cin: int, cout: int) -> nn.Module:
    """The generator that the settings name, initialised."""
    net: nn.Module
    if config.generator == "resnet":
        net = ResnetGenerator(
            cin, cout, ngf=config.ngf, blocks=config.blocks, norm=config.norm, padding=config.padding,
            dropout=config.dropout, output=config.output,
        )  # fmt: skip
    else:
        net = UnetGenerator(
            cin, cout, levels=config.levels, ngf=config.ngf, norm=config.norm, dropout=config.dropout,
            skips=config.generator == "unet", output=config.output,
        )  # fmt: skip
    init_weights(net, config.init, config.init_gain)
    return net


def make_discriminator(config: Config, cin: int) -> nn.Module:
    """The discriminator that the settings name, initialised."""
    net = PatchDiscriminator(cin, ndf=config.ndf, receptive_field=config.patch, norm=config.norm)
    init_weights(net, config.init, config.init_gain)
    return net


class Trial(NamedTuple):
    """What one discriminator is shown: real images and fakes (N, C, H, W), and its name in the log.

    critic: the network, or for `score` any function of images, such as one that was given their labels.
    """

    critic: Any
    real: Tensor
    fake: Tensor
    name: str


def judge(config: Config, trials: Sequence[Trial]) -> tuple[Tensor, Terms]:
    """The discriminators' losses added up: each on real images and on detached fakes, in as few passes as
    compute the same; batch norm never sees both in one."""
    trials = [trial._replace(fake=trial.fake.detach().to(trial.real.dtype)) for trial in trials]
    verdicts = run_together([(trial.critic, [trial.real, trial.fake]) for trial in trials])
    return score(config, trials, verdicts)


def score(
    config: Config, trials: Sequence[Trial], verdicts: Sequence[Sequence[Tensor]]
) -> tuple[Tensor, Terms]:
    """The losses of discriminators from their logits of real images and of fakes, one pair a trial."""
    found: list[Tensor] = []
    terms: Terms = {}
    for trial, (real, fake) in zip(trials, verdicts):
        loss = losses.discriminator_gan(
            real, fake, config.gan_mode, real_label=config.real_label,
            real_weight=config.d_real_weight, fake_weight=config.d_fake_weight,
        )  # fmt: skip
        if config.gan_mode == "wgan-gp":
            loss = loss + config.lambda_gp * losses.gradient_penalty(
                trial.critic, trial.real, trial.fake, config.gp_at
            )
        found.append(loss)
        terms |= {
            trial.name: loss.detach(),
            f"{trial.name}_real": losses.mean(real),
            f"{trial.name}_fake": losses.mean(fake),
        }
    return sum(found[1:], start=found[0]), terms
