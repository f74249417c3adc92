"""Small systems beside their twins of reference_systems.py: what the tests of the recipes share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from fastgan.recipes import RECIPES
from fastgan.recipes.base import Recipe
from fastgan.recipes.cyclegan import CycleGANConfig
from fastgan.recipes.discogan import DiscoGANConfig
from fastgan.recipes.pan import PANConfig
from fastgan.step import Step
from tests.reference_features import (
    ReferenceDiscoGAN,
    ReferenceDiscoGenerator,
    ReferencePAN,
    ReferencePANGenerator,
    disco_discriminator,
    pan_discriminator,
)
from tests.reference_systems import (
    Batch,
    Nets,
    ReferenceCycleGAN,
    ReferencePix2Pix,
    ReferenceResnet,
    ReferenceSystem,
    ReferenceUnet,
    reference_discriminator,
)

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
IDLE = {"rtol": 0.0, "atol": 1e-6}
FACTORS = [1.0, 1.0, 0.7, 0.4, 0.05]
MODES = ["lsgan", "vanilla", "hinge", "wgan", "wgan-gp"]
# what the twin's constructors take out of a config; the rest describes networks or the loop
LOSS_FIELDS = [
    *("gan_mode", "real_label", "d_real_weight", "d_fake_weight", "lambda_A", "lambda_B", "lambda_identity"),
    *("lambda_L1", "lambda_gp", "clip", "lr", "lr_d", "beta1", "beta2", "optimizer", "ema"),
    *("lambda_gan", "lambda_features", "rate", "start_rate", "curriculum", "weight_decay"),
    *("lambda_perceptual", "margin"),
]
TINY: dict[str, Any] = {"ngf": 4, "ndf": 4, "patch": 16, "init_gain": 0.2, "lr": 0.01, "pool_size": 0}
CYCLE: dict[str, Any] = {**TINY, "generator": "resnet", "blocks": 1, "norm": "instance", "dropout": False}
PIX: dict[str, Any] = {**TINY, "generator": "unet", "levels": 4, "norm": "batch", "dropout": False}

FEATURES: dict[str, Any] = {"ngf": 4, "init": "normal", "init_gain": 0.2, "lr": 0.01}
DISCO: dict[str, Any] = {**FEATURES, "ndf": 4, "levels": 2, "load_size": 16, "crop_size": 16}
PERCEPTUAL: dict[str, Any] = {**FEATURES, "ndf": 8, "levels": 4, "load_size": 64, "crop_size": 64}


def make_batches(
    steps: int, per_step: int = 1, *, size: int = 16, n: int = 2, a: int = 3, b: int = 3
) -> list[list[Batch]]:
    generator = torch.Generator().manual_seed(5)

    def image(channels: int) -> Tensor:
        return torch.rand(n, channels, size, size, generator=generator, dtype=torch.float64) * 2 - 1

    return [[{"A": image(a), "B": image(b)} for _ in range(per_step)] for _ in range(steps)]


def double(nets: Nets) -> Nets:
    for net in nets.values():
        net.double().train()
    return nets


def twin_generator(config: Any, into: int, out: int) -> nn.Module:
    if config.generator == "resnet":
        return ReferenceResnet(into, out, config.ngf, config.blocks, config.norm)
    return ReferenceUnet(into, out, config.levels, config.ngf, config.norm, skips=config.generator == "unet")


def twin_discriminator(config: Any, channels: int) -> nn.Module:
    return reference_discriminator(channels, config.ndf, config.patch, config.norm)


def make_twin(config: Any, nets: Nets, a: int, b: int) -> ReferenceSystem:
    settings = {name: getattr(config, name) for name in LOSS_FIELDS if hasattr(config, name)}
    twins: Nets
    system: Any
    if isinstance(config, DiscoGANConfig):
        c, settings["levels"], system = config, config.levels, ReferenceDiscoGAN
        form = c.levels, c.ngf, c.norm, c.bottleneck, c.output
        twins = {"G_A": ReferenceDiscoGenerator(a, b, *form), "G_B": ReferenceDiscoGenerator(b, a, *form)}
        twins["D_A"] = disco_discriminator(b, c.levels, c.ndf, c.norm)
        twins["D_B"] = disco_discriminator(a, c.levels, c.ndf, c.norm)
    elif isinstance(config, PANConfig):
        twins = {"G": ReferencePANGenerator(a, b, config.levels, config.ngf, config.norm)}
        twins["D"] = pan_discriminator(b, config.crop_size, config.ndf, config.norm)
        system = ReferencePAN
    elif isinstance(config, CycleGANConfig):
        twins = {"G_A": twin_generator(config, a, b), "G_B": twin_generator(config, b, a)}
        twins |= {"D_A": twin_discriminator(config, b), "D_B": twin_discriminator(config, a)}
        system = ReferenceCycleGAN
    else:
        twins = {"G": twin_generator(config, a, b), "D": twin_discriminator(config, a + b)}
        system = ReferencePix2Pix
    assert set(nets) == set(twins)
    for name, net in twins.items():
        net.double().load_state_dict(nets[name].state_dict(), strict=True)
    return system(twins, **settings)


def idle_biases(net: nn.Module) -> set[str]:
    """Names of the biases that an instance norm right after their convolution takes out again."""
    idle = set()
    for name, chain in net.named_modules():
        if isinstance(chain, nn.Sequential):
            for i, (layer, after) in enumerate(zip(chain, chain[1:])):
                if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and isinstance(after, nn.InstanceNorm2d):
                    idle.add(f"{name}.{i}.bias")
    return idle


def assert_same_parameters(net: nn.Module, twin: nn.Module, at: tuple[object, ...]) -> None:
    got, idle = dict(net.named_parameters()), idle_biases(twin)
    for key, p in twin.named_parameters():
        close = IDLE if key in idle else CLOSE
        assert_close(got[key], p, **close, msg=lambda m, key=key: f"{(*at, key)}: {m}")


def make_recipe(config: Any) -> Recipe:
    return next(cls for cls in RECIPES.values() if cls.config_class is type(config))(config)


def assert_five_steps(
    config: Any, *, size: int = 16, n: int = 2, a: int = 3, b: int = 3, buffers: tuple[str, ...] = ()
) -> None:
    recipe = make_recipe(config)
    torch.manual_seed(0)
    nets = double(recipe.networks(a, b))
    twin = make_twin(config, nets, a, b)
    start = copy.deepcopy({name: net.state_dict() for name, net in nets.items()})
    step = Step(recipe, nets, device=torch.device("cpu"))
    for index, batches in enumerate(make_batches(5, config.n_critic, size=size, n=n, a=a, b=b)):
        torch.manual_seed(100 + index)
        terms = step(batches, index, FACTORS[index])
        torch.manual_seed(100 + index)
        expected = twin.step(batches, FACTORS[index])
        for name, value in expected.items():
            # with several discriminator updates a step may report any of them
            if config.n_critic == 1 or name.startswith(("G", "cycle", "idt")):
                # mean verdicts are for the log alone and may be kept in float32
                close = {"rtol": 1e-6, "atol": 1e-7} if name.endswith(("_real", "_fake")) else CLOSE
                assert_close(float(terms[name]), value, **close, msg=lambda m, at=(index, name): f"{at}: {m}")
        for name, net in twin.nets.items():
            assert_same_parameters(nets[name], net, (index, name))
        if config.ema:
            assert set(step.ema) == set(twin.generators)
            for name in twin.generators:
                assert_same_parameters(step.ema[name], twin.ema[name], (index, "ema", name))
    for name in buffers:
        assert_close(dict(nets[name].named_buffers()), dict(twin.nets[name].named_buffers()), **CLOSE)
    for name, net in nets.items():
        moved = [(p - start[name][key]).abs().max() for key, p in net.named_parameters() if p.dim() == 4]
        assert min(moved) > 1e-3, f"{name} did not train"
