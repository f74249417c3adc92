"""What the losses and a step may touch, by hand-worked numbers and by watching: freezing, batches, pool,
average, schedule."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from fastgan.recipes.cyclegan import CycleGAN, CycleGANConfig
from fastgan.recipes.pix2pix import Pix2Pix, Pix2PixConfig
from fastgan.schedule import lr_factor
from fastgan.step import Step
from tests.reference_systems import (
    Batch,
    Nets,
    reference_lr_factor,
)
from tests.system_cases import (
    CLOSE,
    CYCLE,
    MODES,
    PIX,
    double,
    make_batches,
)

# the losses alone, against numbers worked by hand


class _Verdict(nn.Module):
    """Judges an image by the mean of its last channel."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1:].mean((2, 3), keepdim=True)


class _Shift(nn.Module):
    """Adds a number to an image."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


def _flat(value: float) -> Tensor:
    return torch.full((1, 1, 8, 8), value, dtype=torch.float64)


LN = math.log
# D says 0.25 of the real and -0.5 of the fake image; weights 0.5, 0.5
HAND_D = {
    "lsgan": 0.5 * 0.75**2 + 0.5 * 0.5**2,
    "vanilla": 0.5 * LN(1 + math.exp(-0.25)) + 0.5 * LN(1 + math.exp(-0.5)),
    "hinge": 0.5 * 0.75 + 0.5 * 0.5,
    "wgan": -0.5 - 0.25,
}
HAND_G = {"lsgan": 1.5**2, "vanilla": LN(1 + math.exp(0.5)), "hinge": 0.5, "wgan": 0.5, "wgan-gp": 0.5}


@pytest.mark.parametrize("mode", ["lsgan", "vanilla", "hinge", "wgan"])
def test_cyclegan_losses_by_hand(mode):
    """G_A adds -1, G_B adds 2; A is 0.5 and B is 0.25 everywhere."""
    config = CycleGANConfig(
        **{**CYCLE, "lambda_A": 3.0, "lambda_B": 5.0, "lambda_identity": 0.5, "gan_mode": mode}
    )
    recipe = CycleGAN(config)
    nets = {"G_A": _Shift(-1.0), "G_B": _Shift(2.0), "D_A": _Verdict(), "D_B": _Verdict()}
    batch = {"A": _flat(0.5), "B": _flat(0.25)}
    fakes = recipe.translate(nets, batch)
    assert set(fakes) == {"A", "B", "idt_A", "idt_B"}
    assert_close(fakes["B"], _flat(-0.5))
    assert_close(fakes["A"], _flat(2.25))

    loss, terms = recipe.generator_loss(nets, batch, fakes)
    expected = {
        "G_A": HAND_G[mode],
        "cycle_A": 3.0 * 1.0,  # 0.5 - 1 + 2 against 0.5
        "cycle_B": 5.0 * 1.0,
        "idt_A": 0.5 * 5.0 * 1.0,  # G_A(B) against B, with the weight of B's cycle
        "idt_B": 0.5 * 3.0 * 2.0,
    }
    for name, value in expected.items():
        assert_close(float(terms[name]), value, msg=lambda m, name=name: f"{name}: {m}")
    names = [*expected, "G_B"]
    assert_close(loss.item(), sum(float(terms[name]) for name in names))
    assert not any(value.requires_grad for value in terms.values())

    d_loss, terms = recipe.discriminator_loss(nets, batch, fakes)
    assert_close(float(terms["D_A"]), HAND_D[mode])
    assert_close(float(terms["D_A_real"]), 0.25)
    assert_close(float(terms["D_A_fake"]), -0.5)
    assert_close(float(terms["D_B_real"]), 0.5)
    assert_close(float(terms["D_B_fake"]), 2.25)
    assert_close(d_loss.item(), float(terms["D_A"]) + float(terms["D_B"]))
    assert not any(value.requires_grad for value in terms.values())


@pytest.mark.parametrize("mode", ["lsgan", "vanilla", "hinge", "wgan"])
def test_pix2pix_losses_by_hand(mode):
    """G adds -1; the verdict looks at the last channel of (A, B), so B is judged."""
    recipe = Pix2Pix(Pix2PixConfig(**{**PIX, "gan_mode": mode, "lambda_L1": 100.0}))
    nets = {"G": _Shift(-1.0), "D": _Verdict()}
    batch = {"A": _flat(0.5), "B": _flat(0.25)}
    fakes = recipe.translate(nets, batch)
    assert set(fakes) == {"B"}
    loss, terms = recipe.generator_loss(nets, batch, fakes)
    assert_close(float(terms["G_GAN"]), HAND_G[mode])
    assert_close(float(terms["G_L1"]), 75.0)
    assert_close(loss.item(), HAND_G[mode] + 75.0)
    d_loss, terms = recipe.discriminator_loss(nets, batch, fakes)
    assert_close(float(terms["D"]), HAND_D[mode])
    assert_close(d_loss.item(), HAND_D[mode])
    assert_close(float(terms["D_real"]), 0.25)
    assert_close(float(terms["D_fake"]), -0.5)


@pytest.mark.parametrize(("mode", "verdict", "balance"), [("lsgan", 0.5, 0.25), ("vanilla", 0.0, LN(2))])
def test_balance(mode, verdict, balance):
    """Where D cannot tell, its loss is 1/4 (least squares) or ln 2 (cross-entropy)."""
    recipe = Pix2Pix(Pix2PixConfig(**{**PIX, "gan_mode": mode}))
    nets = {"G": _Shift(0.0), "D": _Verdict()}
    batch = {"A": _flat(verdict), "B": _flat(verdict)}
    loss, _ = recipe.discriminator_loss(nets, batch, recipe.translate(nets, batch))
    assert_close(loss.item(), balance)


@pytest.mark.parametrize("mode", ["vanilla", "lsgan", "hinge"])
def test_smoothing_and_weights_touch_the_discriminator_only(mode):
    config = Pix2PixConfig(**{**PIX, "gan_mode": mode})
    odd = dataclasses.replace(config, real_label=0.9, d_real_weight=0.2, d_fake_weight=0.6)
    nets = {"G": _Shift(-1.0), "D": _Verdict()}
    batch = {"A": _flat(0.5), "B": _flat(0.25)}
    fakes = Pix2Pix(config).translate(nets, batch)
    assert_close(
        Pix2Pix(config).generator_loss(nets, batch, fakes)[0],
        Pix2Pix(odd).generator_loss(nets, batch, fakes)[0],
    )
    on_real = {
        "vanilla": LN(1 + math.exp(0.25)) - 0.9 * 0.25,  # the target of the fake stays 0
        "lsgan": 0.65**2,
        "hinge": 0.75,  # a margin has no label
    }[mode]
    on_fake = {"vanilla": LN(1 + math.exp(-0.5)), "lsgan": 0.25, "hinge": 0.5}[mode]
    loss, _ = Pix2Pix(odd).discriminator_loss(nets, batch, fakes)
    assert_close(loss.item(), 0.2 * on_real + 0.6 * on_fake)


def test_extreme_verdicts_stay_finite():
    """Cross-entropy on logits of +-2000: no overflow, no log of zero."""
    recipe = Pix2Pix(Pix2PixConfig(**PIX))
    nets = {"G": _Shift(-4000.0), "D": _Verdict()}
    batch = {"A": _flat(2000.0), "B": _flat(2000.0)}
    fakes = recipe.translate(nets, batch)
    assert_close(recipe.discriminator_loss(nets, batch, fakes)[1]["D"].item(), 0.0)
    assert_close(recipe.generator_loss(nets, batch, fakes)[1]["G_GAN"].item(), 2000.0)


# what the losses may touch


def _cyclegan(n: int = 2, **changes: Any) -> tuple[CycleGAN, Nets, Batch]:
    recipe = CycleGAN(CycleGANConfig(**{**CYCLE, **changes}))
    torch.manual_seed(0)
    return recipe, double(recipe.networks(3, 3)), make_batches(1, n=n)[0][0]


def _pix2pix(n: int = 2, **changes: Any) -> tuple[Pix2Pix, Nets, Batch]:
    recipe = Pix2Pix(Pix2PixConfig(**{**PIX, **changes}))
    torch.manual_seed(0)
    return recipe, double(recipe.networks(3, 3)), make_batches(1, n=n)[0][0]


def test_translate_is_the_generators():
    recipe, nets, batch = _cyclegan()
    fakes = recipe.translate(nets, batch)
    assert_close(fakes["B"], nets["G_A"](batch["A"]), **CLOSE)
    assert_close(fakes["A"], nets["G_B"](batch["B"]), **CLOSE)


@pytest.mark.parametrize("make", [_cyclegan, _pix2pix])
@pytest.mark.parametrize("mode", MODES)
def test_discriminator_loss_leaves_the_generators_alone(make, mode):
    recipe, nets, batch = make(gan_mode=mode, norm="instance")
    fakes = recipe.translate(nets, batch)
    assert all(fake.requires_grad for fake in fakes.values())
    recipe.discriminator_loss(nets, batch, fakes)[0].backward()
    for name, net in nets.items():
        # a bias that the following norm removes may stay without a gradient
        grads = [p.grad for p in net.parameters() if p.dim() == 4]
        assert (
            all(g is None for g in grads) if name[0] == "G" else all(g is not None and g.any() for g in grads)
        )


@pytest.mark.parametrize("make", [_cyclegan, _pix2pix])
def test_losses_have_no_memory(make):
    recipe, nets, batch = make()
    fakes = recipe.translate(nets, batch)
    for loss in (recipe.generator_loss, recipe.discriminator_loss):
        assert torch.equal(loss(nets, batch, fakes)[0], loss(nets, batch, fakes)[0])


def _images_through(net: nn.Module) -> list[Tensor]:
    """Collects what goes through a network from now on."""
    seen: list[Tensor] = []
    net.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    return seen


@pytest.mark.parametrize(("weight", "passes"), [(0.0, 2), (0.5, 3)])
def test_identity_pass_is_skipped_at_weight_zero(weight, passes):
    """Each generator sees its input and the other's image, and the far domain only for the identity loss."""
    recipe, nets, batch = _cyclegan(n=2, lambda_identity=weight)
    seen = {name: _images_through(nets[name]) for name in ("G_A", "G_B")}
    Step(recipe, nets, device=torch.device("cpu"))([batch], 0)
    for name, domain in (("G_A", "B"), ("G_B", "A")):
        images = torch.cat(seen[name])
        assert len(images) == 2 * passes
        assert any(torch.equal(image, batch[domain][0]) for image in images) == (weight > 0)


@pytest.mark.parametrize("make", [_cyclegan, _pix2pix])
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_discriminators_are_frozen_while_the_generators_train(make, norm):
    recipe, nets, batch = make(norm=norm)
    judges = [name for name in nets if name[0] == "D"]
    frozen: list[tuple[bool, bool]] = []

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        frozen.append((args[0].requires_grad, any(p.requires_grad for p in module.parameters())))

    for name in judges:
        nets[name].register_forward_pre_hook(look)
    step = Step(recipe, nets, device=torch.device("cpu"))
    step([batch], 0)
    # an image with a graph behind it comes from the generators' loss
    for_generators = [flags for flags in frozen if flags[0]]
    assert len(for_generators) == len(judges)
    assert not any(trains for _, trains in for_generators)
    assert all(trains for _, trains in frozen if _ is False)
    assert len(frozen) > len(for_generators)
    assert all(p.requires_grad for net in nets.values() for p in net.parameters())
    # and a second step still trains them
    before = copy.deepcopy({name: list(nets[name].parameters()) for name in judges})
    step([batch], 1)
    for name in judges:
        assert not torch.equal(before[name][0], next(iter(nets[name].parameters())))


@pytest.mark.parametrize("make", [_cyclegan, _pix2pix])
def test_batch_norm_never_mixes(make):
    """Real and fake, and the three uses of a CycleGAN generator, go through batch norm separately."""
    recipe, nets, batch = make(n=3, norm="batch")
    seen = {name: _images_through(net) for name, net in nets.items()}
    Step(recipe, nets, device=torch.device("cpu"))([batch], 0)
    for images in seen.values():
        assert images
        assert {len(x) for x in images} == {3}


def test_the_judge_of_pix2pix_sees_pairs():
    recipe, nets, batch = _pix2pix()
    assert next(nets["D"].parameters()).shape[1] == 6
    fakes = recipe.translate(nets, batch)
    seen = _images_through(nets["D"])
    recipe.discriminator_loss(nets, batch, fakes)
    pairs = [torch.cat([batch["A"], batch["B"]], 1), torch.cat([batch["A"], fakes["B"]], 1)]
    assert len(seen) == 2
    assert all(any(torch.equal(pair, x) for x in seen) for pair in pairs)


def test_the_judge_a_of_cyclegan_sees_domain_b():
    recipe = CycleGAN(CycleGANConfig(**{**CYCLE, "lambda_identity": 0.0}))
    nets = recipe.networks(1, 4)
    channels = {name: next(net.parameters()).shape[1] for name, net in nets.items()}
    assert channels == {"G_A": 1, "G_B": 4, "D_A": 4, "D_B": 1}


# gradient penalty


@pytest.mark.parametrize("make", [_cyclegan, _pix2pix])
def test_penalty_of_a_constant_critic(make):
    """Zero weights: the slope is 0, the penalty lambda * 1 per critic, and every gradient is a number."""
    recipe, nets, batch = make(gan_mode="wgan-gp", norm="instance", lambda_gp=7.0)
    judges = [net for name, net in nets.items() if name[0] == "D"]
    for net in judges:
        for p in net.parameters():
            nn.init.zeros_(p)
    loss, _ = recipe.discriminator_loss(nets, batch, recipe.translate(nets, batch))
    # a safeguard of the root may shift the slope by its square root, 1e-6 at most
    assert_close(loss.item(), 7.0 * len(judges), rtol=1e-5, atol=0)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for net in judges for p in net.parameters() if p.grad is not None)


class _Slope(nn.Module):
    """A critic with the same known slope everywhere: its gradient norm is |k| sqrt(elements)."""

    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor(k, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.k * x.sum((1, 2, 3)).view(-1, 1, 1, 1)


def test_penalty_by_hand():
    """Slope 0.25 over 64 pixels: norm 2 per sample; pix2pix's critic has the pair's 128: norm 2 sqrt 2."""
    nets: Nets = {"G_A": _Shift(0.0), "G_B": _Shift(0.0), "D_A": _Slope(0.25), "D_B": _Slope(0.5)}
    batch = {"A": _flat(0.0).repeat(3, 1, 1, 1), "B": _flat(0.0).repeat(3, 1, 1, 1)}
    recipe = CycleGAN(CycleGANConfig(**{**CYCLE, "gan_mode": "wgan-gp", "lambda_gp": 10.0}))
    loss, terms = recipe.discriminator_loss(nets, batch, recipe.translate(nets, batch))
    assert_close(loss.item(), 10.0 * 1.0 + 10.0 * 9.0)
    assert_close(terms["D_A"].item(), 10.0)
    loss.backward()
    # d/dk of 10 (8 k - 1)^2
    assert_close(nets["D_A"].k.grad.item(), 10 * 2 * 1 * 8.0)

    nets = {"G": _Shift(0.0), "D": _Slope(0.25)}
    pix = Pix2Pix(Pix2PixConfig(**{**PIX, "gan_mode": "wgan-gp", "lambda_gp": 10.0}))
    loss, _ = pix.discriminator_loss(nets, batch, pix.translate(nets, batch))
    assert_close(loss.item(), 10.0 * (2 * math.sqrt(2) - 1) ** 2)


def test_penalty_points_lie_between_real_and_fake():
    """The third group of images a critic sees: one mixture per sample, the same for all its pixels."""
    recipe, nets, batch = _cyclegan(n=4, gan_mode="wgan-gp", norm="none")
    fakes = recipe.translate(nets, batch)
    seen = _images_through(nets["D_A"])
    recipe.discriminator_loss(nets, batch, fakes)
    mixed = [x for x in seen if x.requires_grad]
    assert len(mixed) == 1
    eps = (mixed[0] - fakes["B"]) / (batch["B"] - fakes["B"])
    assert_close(eps, eps[:, :1, :1, :1].expand_as(eps), rtol=1e-6, atol=1e-6)
    assert 0 <= eps.min() < eps.max() <= 1
    assert len(eps[:, 0, 0, 0].unique()) == 4


def test_clip_holds_after_every_step_and_only_for_wgan():
    batches = make_batches(3)
    for mode, limit in (("wgan", 0.05), ("lsgan", None), ("wgan-gp", None)):
        recipe, nets, _ = _cyclegan(gan_mode=mode, clip=0.05)
        step = Step(recipe, nets, device=torch.device("cpu"))
        for index, group in enumerate(batches):
            step(group, index)
        for name, net in nets.items():
            largest = max(p.abs().max().item() for p in net.parameters() if p.dim() == 4)
            assert (largest <= 0.05) == (limit is not None and name[0] == "D")


# the history of images


def test_pool_mixes_old_images_in():
    """Size 1: a judged fake is the new one, or the stored one, which the new one then replaces; half each."""
    recipe, nets, _ = _cyclegan(n=1, norm="batch", pool_size=1, lambda_identity=0.0)
    seen = {name: _images_through(nets[name]) for name in ("D_A", "D_B")}
    step = Step(recipe, nets, device=torch.device("cpu"))
    stored: dict[str, Tensor] = {}
    old = 0
    steps = 60
    for index, group in enumerate(make_batches(steps, size=8, n=1)):
        with torch.no_grad():
            new = {"D_A": nets["G_A"](group[0]["A"]), "D_B": nets["G_B"](group[0]["B"])}
        for images in seen.values():
            images.clear()
        # factor 0: the networks stand still, so an image can be recognised
        step(group, index, 0.0)
        for name, real in (("D_A", group[0]["B"]), ("D_B", group[0]["A"])):
            judged = [x for x in seen[name] if not x.requires_grad and not torch.equal(x, real)]
            assert len(judged) == 1
            if index == 0:
                stored[name] = new[name]
            if torch.allclose(judged[0], new[name], rtol=0, atol=1e-12):
                continue
            assert_close(judged[0], stored[name], **CLOSE)
            stored[name] = new[name]
            old += 1
    # 118 fair draws: 59 +- 5.4
    assert abs(old - (steps - 1)) < 5 * math.sqrt(2 * (steps - 1)) / 2


# running average of the generators


def test_average_starts_as_a_copy_and_can_be_off():
    recipe, nets, batch = _cyclegan(ema=0.99)
    step = Step(recipe, nets, device=torch.device("cpu"))
    for name in ("G_A", "G_B"):
        for mean, p in zip(step.ema[name].parameters(), nets[name].parameters()):
            assert torch.equal(mean, p)
            assert mean.data_ptr() != p.data_ptr()
    step([batch], 0)
    assert not any(p.requires_grad for net in step.ema.values() for p in net.parameters())
    recipe, nets, batch = _cyclegan()
    assert not Step(recipe, nets, device=torch.device("cpu")).ema


# schedules


@pytest.mark.parametrize("policy", ["linear", "cosine", "step", "constant"])
@pytest.mark.parametrize(("epochs", "decay"), [(100, 100), (3, 2), (5, 0), (0, 4)])
def test_schedule_is_the_reference(policy, epochs, decay):
    config = CycleGANConfig(epochs=epochs, epochs_decay=decay, lr_policy=policy)
    factors = [lr_factor(config, epoch) for epoch in range(epochs + decay)]
    expected = [reference_lr_factor(policy, epoch, epochs, decay) for epoch in range(epochs + decay)]
    assert_close(factors, expected, rtol=1e-12, atol=0)
    # never rises again, and no epoch is spent at zero
    assert all(a >= b for a, b in zip(factors, factors[1:]))
    assert factors[0] <= 1 and factors[-1] > 0


def test_schedule_landmarks():
    linear = CycleGANConfig(epochs=100, epochs_decay=100, lr_policy="linear")
    assert lr_factor(linear, 0) == lr_factor(linear, 99) == 1.0
    assert lr_factor(linear, 100) == pytest.approx(100 / 101)
    assert lr_factor(linear, 199) == pytest.approx(1 / 101)
    cosine = Pix2PixConfig(epochs=100, epochs_decay=100, lr_policy="cosine")
    assert lr_factor(cosine, 0) == 1.0
    assert lr_factor(cosine, 100) == pytest.approx(0.5)
    every = dataclasses.replace(linear, lr_policy="step", lr_decay_epochs=30)
    assert [lr_factor(every, e) for e in (0, 29, 30, 60)] == pytest.approx([1, 1, 0.1, 0.01])
    assert lr_factor(dataclasses.replace(linear, lr_policy="step"), 49) == 1.0
    assert lr_factor(dataclasses.replace(linear, lr_policy="step"), 50) == pytest.approx(0.1)


# settings


def test_defaults_are_the_published_ones():
    cycle, pix = CycleGANConfig(), Pix2PixConfig()
    for config in (cycle, pix):
        assert (config.ngf, config.ndf, config.patch, config.batch_size) == (64, 64, 70, 1)
        assert (config.lr, config.lr_d, config.beta1, config.beta2) == (2e-4, None, 0.5, 0.999)
        assert (config.epochs, config.epochs_decay, config.lr_policy, config.n_critic) == (
            100,
            100,
            "linear",
            1,
        )
        assert (config.real_label, config.d_real_weight, config.d_fake_weight) == (1.0, 0.5, 0.5)
        assert (config.init, config.init_gain, config.optimizer) == ("normal", 0.02, "adam")
        assert (config.lambda_gp, config.clip, config.ema) == (10.0, 0.01, 0)
    assert (cycle.lambda_A, cycle.lambda_B, cycle.lambda_identity) == (10.0, 10.0, 0.5)
    assert (cycle.generator, cycle.blocks, cycle.norm, cycle.dropout) == ("resnet", 9, "instance", False)
    assert (cycle.gan_mode, cycle.pool_size) == ("lsgan", 50)
    assert pix.lambda_L1 == 100.0
    assert (pix.generator, pix.levels, pix.norm, pix.dropout) == ("unet", 8, "batch", True)
    assert (pix.gan_mode, pix.pool_size) == ("vanilla", 0)


@pytest.mark.parametrize("config", [CycleGANConfig(), Pix2PixConfig()])
def test_settings_are_frozen(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0


def test_networks_follow_the_settings():
    config = CycleGANConfig(ngf=8, ndf=8, blocks=2)

    def draw(seed: int, **changes: Any) -> Nets:
        torch.manual_seed(seed)
        return CycleGAN(dataclasses.replace(config, **changes)).networks(3, 3)

    nets, again, other = draw(3), draw(3), draw(4)
    assert list(nets) == ["G_A", "G_B", "D_A", "D_B"]
    for name, net in nets.items():
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), again[name].parameters()))
        assert not torch.equal(next(net.parameters()), next(other[name].parameters()))
        weights = torch.cat([p.flatten() for p in net.parameters() if p.dim() == 4])
        assert weights.std().item() == pytest.approx(0.02, rel=0.05)
        assert not any(p.any() for key, p in net.named_parameters() if key.endswith("bias"))
    assert not torch.equal(next(nets["G_A"].parameters()), next(nets["G_B"].parameters()))
    assert not torch.equal(next(nets["D_A"].parameters()), next(nets["D_B"].parameters()))
    wide = torch.cat([p.flatten() for p in draw(3, init_gain=0.3)["D_A"].parameters() if p.dim() == 4])
    assert wide.std().item() == pytest.approx(0.3, rel=0.05)


def test_wrong_mode_is_refused():
    with pytest.raises(ValueError):
        recipe, nets, batch = _cyclegan(gan_mode="w-gan")
        recipe.generator_loss(nets, batch, recipe.translate(nets, batch))
