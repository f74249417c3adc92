"""MUNIT is what its definition says: networks with the official keys, losses and five updates beside
reference_munit.py in float64, files of others. See test_recipes.py for the method, test_styles.py for what a
person does with it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import fastgan
from fastgan import export, stack
from fastgan.checkpoint import CheckpointError, load_generator
from fastgan.config import UsageError
from fastgan.data.errors import DataError
from fastgan.memory import estimate
from fastgan.models import MUNITGenerator
from fastgan.models.munit import MUNITDiscriminator
from fastgan.recipes.munit import MUNIT, MUNITConfig
from fastgan.schedule import lr_factor
from fastgan.step import Step
from tests.reference_munit import ReferenceMUNIT, reference_styles
from tests.system_cases import CLOSE, FACTORS, IDLE, make_batches

# networks


def official_keys() -> tuple[list[str], list[str]]:
    """Those of one domain in the files of the public code, in their order: gen_*.pt and dis_*.pt."""

    def conv(name: str, *before: str) -> list[str]:
        return [f"{name}.{key}" for key in (*before, "conv.weight", "conv.bias")]

    blocks = [f"{k}.model.{half}" for k in range(4) for half in range(2)]
    adain = "norm.running_mean", "norm.running_var"
    gen = sum((conv(f"enc_style.model.{k}") for k in range(5)), [])
    gen += ["enc_style.model.6.weight", "enc_style.model.6.bias"]
    gen += sum((conv(f"enc_content.model.{k}") for k in range(3)), [])
    gen += sum((conv(f"enc_content.model.3.model.{block}") for block in blocks), [])
    gen += sum((conv(f"dec.model.0.model.{block}", *adain) for block in blocks), [])
    gen += sum((conv(f"dec.model.{k}", "norm.gamma", "norm.beta") for k in (2, 4)), [])
    gen += conv("dec.model.5")
    gen += [f"mlp.model.{k}.fc.{key}" for k in range(3) for key in ("weight", "bias")]
    dis = []
    for scale in range(3):
        dis += sum((conv(f"cnns.{scale}.{k}") for k in range(4)), [])
        dis += [f"cnns.{scale}.4.weight", f"cnns.{scale}.4.bias"]
    return gen, dis


def test_keys_and_parameters_are_the_official_ones() -> None:
    g, d = MUNITGenerator(), MUNITDiscriminator()
    counts = [sum(p.numel() for p in net.parameters()) for net in (g.a, g.b, d.a, d.b)]
    assert counts == [15_026_187, 15_026_187, 8_271_171, 8_271_171]
    assert g.a.dec.numbers == 4096
    for net, keys in zip((g, d), official_keys()):
        assert list(net.state_dict()) == [f"{domain}.{key}" for domain in "ab" for key in keys]
    assert [y.shape[2:] for y in d.a(torch.zeros(1, 3, 256, 256))] == [(16, 16), (8, 8), (4, 4)]


def test_initial_weights() -> None:
    torch.manual_seed(0)
    nets = MUNIT(MUNITConfig(ngf=16, ndf=16)).networks(3, 3)
    for name, p in nets["G"].named_parameters():
        if name.endswith("gamma"):
            assert 0 <= p.min() < 0.2 and 0.8 < p.max() <= 1
        elif p.dim() == 1:
            assert not p.any()
        elif p.numel() > 10_000:
            assert p.std().item() == pytest.approx((2 / p[0].numel()) ** 0.5, rel=0.05)
    wide = torch.cat([p.flatten() for p in nets["D"].parameters() if p.dim() == 4])
    assert wide.std().item() == pytest.approx(0.02, rel=0.02)


# the system


def test_settings_are_those_of_the_public_code() -> None:
    c = MUNITConfig()
    assert (c.lambda_gan, c.lambda_recon, c.lambda_style, c.lambda_content, c.lambda_cycle) == (
        1,
        10,
        1,
        1,
        0,
    )
    assert (c.lr, c.beta1, c.beta2, c.weight_decay, c.batch_size) == (1e-4, 0.5, 0.999, 1e-4, 1)
    assert (c.gan_mode, c.d_real_weight, c.d_fake_weight, c.n_critic) == ("lsgan", 1, 1, 1)
    assert (c.preprocess, c.load_size, c.crop_size, c.flip) == ("scale_shortside_and_crop", 256, 256, True)
    assert (c.style_size, c.ngf, c.ndf, c.blocks, c.levels, c.scales, c.levels_d) == (8, 64, 64, 4, 2, 3, 4)


SMALL: dict[str, Any] = {
    "ngf": 2, "ndf": 2, "blocks": 1, "scales": 2, "levels_d": 3, "style_size": 3, "mlp_size": 5,
    "load_size": 32, "crop_size": 32, "batch_size": 2, "init_gain": 0.3, "lr": 0.003,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "summer2winter": {**MUNIT.presets["summer2winter"], "ema": 0.8},
    "weights": {
        "lambda_gan": 0.5, "lambda_recon": 3.0, "lambda_style": 2.0, "lambda_content": 4.0,
        "lambda_cycle": 5.0, "weight_decay": 0.03, "lr_d": 0.002, "d_real_weight": 0.25, "real_label": 0.9,
    },
    "vanilla, no decay": {"gan_mode": "vanilla", "weight_decay": 0.0, "output": "sigmoid"},
    "several updates": {"n_critic": 2, "n_gen": 2},
    "deeper": {"levels": 3, "blocks": 2, "scales": 3, "levels_d": 2},
}  # fmt: skip


def assert_five_steps(steps: int = 5, **changes: Any) -> None:
    c = MUNITConfig(**{**SMALL, **changes})
    recipe = MUNIT(c)
    torch.manual_seed(0)
    nets = {name: net.double() for name, net in recipe.networks(3, 1).items()}
    twin = ReferenceMUNIT(c, 3, 1)
    for name, net in nets.items():
        twin.nets[name].load_state_dict(net.state_dict(), strict=True)
    twin.ema.load_state_dict(nets["G"].state_dict())
    start = copy.deepcopy({name: net.state_dict() for name, net in nets.items()})
    step = Step(recipe, nets, device=torch.device("cpu"))
    for index, batches in enumerate(make_batches(steps, c.batches, size=32, n=2, a=3, b=1)):
        terms = step(batches, index, FACTORS[index])
        drawn = reference_styles(c.seed, index, len(batches), 2, c.style_size)
        expected = twin.step([batch | style for batch, style in zip(batches, drawn)], FACTORS[index])
        assert terms.keys() >= expected.keys()
        for name, value in expected.items():
            # mean verdicts are for the log alone and may be kept in float32
            close = {"rtol": 1e-6, "atol": 1e-7} if name.endswith(("_real", "_fake")) else CLOSE
            assert_close(float(terms[name]), value, **close, msg=lambda m, at=(index, name): f"{at}: {m}")
        pairs = [(nets[name], net) for name, net in twin.nets.items()]
        for net, reference in [*pairs, *([(step.ema["G"], twin.ema)] if c.ema else [])]:
            mine = dict(net.named_parameters())
            for key, p in reference.named_parameters():
                # a shift of a channel that no ReLU cuts is taken out again: its gradient is rounding
                close = IDLE if ".mlp.model.2.fc." in key else CLOSE
                assert_close(mine[key], p, **close, msg=lambda m, at=(index, key): f"{at}: {m}")
    for name, net in nets.items():
        moved = [(p - start[name][key]).abs().max() for key, p in net.named_parameters() if p.dim() == 4]
        assert min(moved) > 1e-3, f"{name} did not train"


@pytest.mark.parametrize("case", CASES)
def test_munit_is_the_reference(case: str) -> None:
    assert_five_steps(**CASES[case])


def test_fused_passes_are_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a GPU, both domains in one pass, by the references of the ops."""
    monkeypatch.setattr(stack, "runs_fused", lambda x: True)
    # one number of channels, so that the networks can be stacked
    assert_five_steps(3, **CASES["summer2winter"])


def test_no_pass_is_made_twice_and_none_in_vain() -> None:
    """An update of D makes no graph of G, except that of the images which G then answers for."""
    recipe = MUNIT(MUNITConfig(**SMALL, n_critic=2))
    nets = recipe.networks(3, 3)
    seen: dict[str, list[tuple[int, bool]]] = {}
    for part in ("a.enc_content", "a.enc_style", "b.dec", "b.mlp"):

        def look(module: Any, args: tuple[Tensor, ...], out: Tensor, part: str = part) -> None:
            seen.setdefault(part, []).append((len(out), out.requires_grad))

        nets["G"].get_submodule(part).register_forward_hook(look)
    batches = [{k: x.float() for k, x in batch.items()} for batch in make_batches(1, 2, size=32)[0]]
    Step(recipe, nets, device=torch.device("cpu"))(batches, 0)
    one, graph = (2, False), (2, True)
    # the second batch of D is that of G: its own content and style, then those of what was made of it
    assert seen == {
        "a.enc_content": [one, graph, graph], "a.enc_style": [graph, graph],
        "b.dec": [one, (4, True)], "b.mlp": [one, (4, True)],
    }  # fmt: skip


def test_sizes_of_the_domains_may_differ() -> None:
    recipe = MUNIT(MUNITConfig(**{**SMALL, "batch_size": 1, "preprocess": "none"}))
    batch = {"A": torch.rand(1, 3, 32, 40), "B": torch.rand(1, 3, 48, 32)}
    terms = Step(recipe, recipe.networks(3, 3), device=torch.device("cpu"))([batch], 0)
    assert all(value.isfinite() for value in terms.values())


def test_the_learning_rate_is_halved_every_hundred_thousand_steps() -> None:
    c = MUNITConfig()
    factors = [lr_factor(c, step * c.epochs // 1_000_000) for step in (0, 99_999, 100_000, 999_999)]
    assert c.steps == 1_000_000 and factors == [1, 1, 0.5, 0.5**9]


def test_unfit_sizes_are_named() -> None:
    def says(side: int, **changes: Any) -> str:
        return MUNIT(MUNITConfig(**{**SMALL, **changes})).unfit(side, side)

    assert not says(32) and not MUNIT(MUNITConfig()).unfit(256, 256)
    assert "multiples of 4" in says(30) and "multiples of 8" in says(20, levels=3)
    assert "at least 16" in says(12, levels_d=1)
    for side, scales, levels in ((60, 3, 4), (64, 3, 4), (28, 2, 4), (32, 2, 4), (16, 2, 3), (16, 2, 4)):
        fits = not says(side, scales=scales, levels_d=levels)
        try:
            MUNITDiscriminator(ndf=1, scales=scales, levels=levels).a(torch.rand(1, 3, side, side))
        except (RuntimeError, ValueError):
            assert not fits
        else:
            assert fits, (side, scales, levels)


def test_memory_is_estimated() -> None:
    recipe = MUNIT(MUNITConfig(**{**SMALL, "ngf": 4}))
    assert estimate(recipe, (3, 3), (32, 32)).activation_bytes_per_image > 4 * 32 * 32 * 4


# files of others


@pytest.fixture
def twin() -> ReferenceMUNIT:
    torch.manual_seed(3)
    return ReferenceMUNIT(MUNITConfig(**{**SMALL, "blocks": 2}), 3, 1)


def write(path: Path, net: Any, **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({domain: {**getattr(net, domain).state_dict(), **more} for domain in "ab"}, path)
    return path


def test_official_files_compute_what_their_own_network_does(twin: ReferenceMUNIT, tmp_path: Path) -> None:
    g = twin.nets["G"].float()
    # old files have statistics of the instance norms, which nothing uses
    old = {
        f"enc_content.model.{k}.norm.running_{what}": torch.rand(2)
        for k in (0, 1)
        for what in ("mean", "var")
    }
    write(tmp_path / "gen_00000009.pt", MUNITGenerator(ngf=2))
    file = write(tmp_path / "gen_00100000.pt", g, **old)
    write(tmp_path / "dis_00100000.pt", twin.nets["D"])
    x, y, style = torch.rand(1, 3, 32, 32) * 2 - 1, torch.rand(1, 1, 32, 32) * 2 - 1, torch.randn(1, 3)
    for path in (tmp_path, file):
        there, back = load_generator(path, "AtoB"), load_generator(path, "BtoA")
        assert there.path == back.path == file and load_generator(path).channels == there.channels == (3, 1)
        assert back.channels == (1, 3) and there.weights.keys() == g.state_dict().keys()
        with torch.no_grad():
            assert_close(there.net(x, style), g.b.decode(g.a.content(x), style), rtol=0, atol=2e-5)
            assert_close(back.net(y, style[0]), g.a.decode(g.b.content(y), style), rtol=0, atol=2e-5)
            assert_close(there.net.style_of(y), g.b.style(y), rtol=0, atol=2e-5)


def test_written_files_are_the_official_ones_again(twin: ReferenceMUNIT, tmp_path: Path) -> None:
    source = write(tmp_path / "gen_00000009.pt", twin.nets["G"].float())
    for middle in ("g.safetensors", "g.pt"):
        form = "safetensors" if middle.endswith("s") else "upstream"
        export.main([str(source), str(tmp_path / middle), "--format", form])
        source = tmp_path / middle
    first, last = (torch.load(tmp_path / name, weights_only=True) for name in ("gen_00000009.pt", "g.pt"))
    for domain in "ab":
        assert list(first[domain]) == list(last[domain])
        assert all(torch.equal(value, last[domain][key]) for key, value in first[domain].items())


def test_what_is_no_generator_is_one_line(twin: ReferenceMUNIT, tmp_path: Path) -> None:
    good = {domain: dict(getattr(twin.nets["G"], domain).state_dict()) for domain in "ab"}
    bad: dict[str, tuple[Any, str]] = {
        "optimizer.pt": ({"gen": {"state": {}}, "dis": {"state": {}}}, "its entries are gen, dis"),
        "half.pt": ({"a": good["a"], "b": 5}, "its entries are a, b"),
        "mixed.pt": ({"a": good["a"], "b": {"x": "y"}}, "is not the state dict of one network"),
        "deep.pt": ({"a": good["a"], "b": {"x": good["b"]}}, "is not the state dict of one network"),
        "pickled.pt": ({"a": good["a"], "b": torch.nn.Linear(1, 1)}, "it holds a pickled"),
        "keys.pt": ({"a": good["a"], "b": {**good["b"], 7: torch.zeros(1)}}, "1 keys not expected (b.7)"),
        "empty.pt": ({"a": {}, "b": {}}, "is not a generator"),
        "short.pt": ({"a": good["a"], "b": dict(list(good["b"].items())[:-3])}, "3 keys missing (b."),
        "bare.pt": ({"a": torch.zeros(1), "b": torch.zeros(1)}, "is not a generator"),
        "other.pt": ({"a": good["b"], "b": {k: v[:1] for k, v in good["b"].items()}}, "of another shape"),
    }
    write(tmp_path / "dis_1.pt", twin.nets["D"])
    for name, (content, said) in [*bad.items(), ("dis_1.pt", (None, "discriminators of munit"))]:
        if content is not None:
            torch.save(content, tmp_path / name)
        with pytest.raises(CheckpointError) as error:
            load_generator(tmp_path / name)
        assert said in str(error.value) and "\n" not in str(error.value), name


def test_styles_by_hand(twin: ReferenceMUNIT, tmp_path: Path) -> None:
    g = twin.nets["G"].float()
    path = write(tmp_path / "gen_1.pt", g)
    x = np.random.default_rng(0).integers(0, 256, (32, 36, 3), np.uint8)
    numbers = [1.0, -2.0, 0.5]
    fixed = fastgan.load(path, style=numbers, device="cpu", precision="fp32")
    image = torch.from_numpy(x / 127.5 - 1).float().permute(2, 0, 1)[None]
    with torch.no_grad():
        y = g.b.decode(g.a.content(image), torch.tensor([numbers]))
    expected = ((y[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255)
    assert np.abs(fixed(x).astype(float) - expected.numpy()).max() <= 1
    assert np.array_equal(fixed(x), fixed(x))
    free = fastgan.load(path, device="cpu", precision="fp32")
    assert not np.array_equal(free(x), free(x))
    # an image of B gives its style, and grey becomes the one channel of B
    grey = np.random.default_rng(1).integers(0, 256, (40, 33, 1), np.uint8)
    found = fastgan.load(path, style=grey, device="cpu", precision="fp32").generator.net.style
    seen = torch.from_numpy(grey / 127.5 - 1).float().permute(2, 0, 1)[None]
    assert_close(found, g.b.style(seen)[0].detach(), rtol=0, atol=2e-5)
    with pytest.raises(UsageError, match="a style of 3 numbers, got 2"):
        fastgan.load(path, style=[1.0, 2.0], device="cpu")
    with pytest.raises(DataError, match="16 pixels or more"):
        fastgan.load(path, style=grey[:15], device="cpu")
    with pytest.raises(ValueError, match="multiples of 4"):
        free.generator.net(torch.zeros(1, 3, 30, 32))
