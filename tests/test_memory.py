"""What the networks keep changes nothing but memory, and the estimate of it is what a run holds."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import memory as page
from benchmarks._measure import peak_memory
from fastgan import memory, stack, trainer
from fastgan.config import UsageError
from fastgan.memory import Estimate, choose, estimate, fit
from fastgan.models import PatchDiscriminator, ResnetGenerator, UnetGenerator
from fastgan.recipes.base import Recipe
from fastgan.recipes.cyclegan import CycleGAN, CycleGANConfig
from fastgan.recipes.pix2pix import Pix2Pix, Pix2PixConfig
from fastgan.stack import set_memory
from fastgan.step import Step
from fastgan.train import make_recipe

TINY = {"ngf": 4, "ndf": 4, "blocks": 4, "patch": 16, "levels": 4, "pool_size": 2}
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/memory_estimate.json"


def recipes() -> dict[str, Recipe]:
    return {
        "cyclegan": CycleGAN(CycleGANConfig(**TINY)),
        "cyclegan batch norm, dropout": CycleGAN(CycleGANConfig(**TINY, norm="batch", dropout=True)),
        # two updates of D per update of G: its graph lives through the first
        "cyclegan wgan-gp": CycleGAN(CycleGANConfig(**TINY, gan_mode="wgan-gp", n_critic=2)),
        # levels 4 to levels - 2 have dropout
        "pix2pix": Pix2Pix(Pix2PixConfig(**{**TINY, "levels": 6})),
    }


def batches(recipe: Recipe, size: int) -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    shape = (1, 3, size, size)
    return [{k: torch.rand(shape, dtype=torch.float64) for k in "AB"} for _ in range(recipe.config.n_critic)]


@pytest.mark.parametrize("name", recipes())
def test_modes_are_the_same_computation(name):
    """Losses, gradients, weights, statistics and the random stream after two steps, bit for bit."""
    recipe = recipes()[name]
    torch.manual_seed(0)
    nets = {k: net.double() for k, net in recipe.networks(3, 3).items()}
    found = []
    for mode in stack.MEMORY:
        step = Step(recipe, copy.deepcopy(nets), device=CPU)
        set_memory(step.nets.values(), mode)
        torch.manual_seed(2)
        terms = [step(batches(recipe, 64 if recipe.paired else 16), index) for index in range(2)]
        state = {f"{k}.{n}": v for k, net in step.nets.items() for n, v in net.state_dict().items()}
        grads = {f"grad {k}.{n}": p.grad for k, net in step.nets.items() for n, p in net.named_parameters()}
        losses = {f"{k} {i}": v for i, part in enumerate(terms) for k, v in part.items()}
        found.append({**losses, **grads, **state, "random": torch.get_rng_state()})
    for other in found[1:]:
        for key, value in found[0].items():
            assert value is other[key] or torch.equal(value, other[key]), key


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts what the backward pass keeps, each storage once."""

    def __init__(self) -> None:
        self.storages: dict[int, Tensor] = {}
        super().__init__(self._pack, lambda t: t)

    def _pack(self, t: Tensor) -> Tensor:
        self.storages[t.untyped_storage().data_ptr()] = t
        return t

    @property
    def total(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.storages.values())


# one architecture of each kind, with what has to be the same the second time
NETS = {
    "resnet": lambda: ResnetGenerator(3, 3, ngf=4, blocks=5, norm="batch", dropout=True),
    "unet": lambda: UnetGenerator(3, 3, ngf=4, levels=6, dropout=True),
    "encdec": lambda: UnetGenerator(3, 3, ngf=4, levels=6, norm="instance", dropout=True, skips=False),
    "patchgan": lambda: PatchDiscriminator(3, ndf=4, receptive_field=34),
    "pixelgan": lambda: PatchDiscriminator(3, ndf=4, receptive_field=1, norm="batch"),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_modes_of_one_network(name, fused, monkeypatch):
    """The ops take the path of a GPU here, by their references: seeds, statistics and pieces are its own."""
    monkeypatch.setattr(stack, "runs_fused", lambda x: fused)
    recompute = []
    for op in ("conv_norm_act", "conv_transpose_norm_act", "residual_block"):
        function = getattr(stack, op)

        def watched(*args, function=function, **kwargs):
            recompute.append(kwargs["recompute"])
            return function(*args, **kwargs)

        monkeypatch.setattr(stack, op, watched)
    torch.manual_seed(0)
    net = NETS[name]().double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    found, kept = [], []
    for mode in stack.MEMORY:
        own = copy.deepcopy(net)
        set_memory([own], mode)
        torch.manual_seed(1)
        recompute.clear()
        saved = SavedBytes()
        with saved:
            y = own(x)
        assert set(recompute) == ({mode == "low"} if fused else set())
        kept.append(saved.total)
        dy = torch.randn(y.shape, dtype=y.dtype)
        leaves = [x, *own.parameters()]
        grads = torch.autograd.grad(y, leaves, dy, allow_unused=True, materialize_grads=True)
        found.append([y, *grads, *own.buffers(), torch.get_rng_state()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    # without the kernels nothing is laid out, so "low" has nothing to leave away
    assert kept[0] == kept[1]
    assert kept[2] < 0.8 * kept[0]


def test_unknown_memory():
    with pytest.raises(ValueError, match="memory must be one of fast, low, least, got 'little'"):
        set_memory([], "little")


MEASURED = {
    "cyclegan": (CycleGAN(CycleGANConfig(ngf=8, ndf=8, blocks=3, patch=16, pool_size=0)), 64),
    "cyclegan 128, batch norm": (
        CycleGAN(CycleGANConfig(ngf=8, ndf=8, blocks=2, norm="batch", pool_size=0)),
        128,
    ),
    "pix2pix": (Pix2Pix(Pix2PixConfig(ngf=8, ndf=8, levels=6, patch=16, batch_size=2)), 64),
    "pix2pix 128": (Pix2Pix(Pix2PixConfig(ngf=8, ndf=16, levels=5, batch_size=4, ema=0.9)), 128),
}


@pytest.mark.parametrize("name, mode", list(zip(MEASURED, ["fast", "least", "fast", "least"])))
def test_estimate_is_what_a_run_allocates(name, mode):
    """Against torch's allocator from the first weight to the second step."""
    recipe, size = MEASURED[name]
    with peak_memory(CPU) as peak:
        step = Step(recipe, recipe.networks(3, 3), device=CPU)
        set_memory(step.nets.values(), mode)
        shape = (recipe.config.batch_size, 3, size, size)
        images = {k: torch.rand(shape) for k in "AB"}
        for index in range(2):
            step([images], index)
    found = estimate(recipe, (3, 3), (size, size), memory=mode, gpu=False)
    # what an operator of torch takes and gives back inside is not followed
    assert 0.97 < found.peak_bytes / 2**20 / peak.mib < 1.001


INSIDE = """
import torch
from torch._subclasses import FakeTensorMode
from benchmarks._measure import peak_memory
from fastgan.memory import _Live
from fastgan_kernels import residual_block
def run():
    x = torch.rand(1, 16, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    weights = [torch.rand(16, 16, 3, 3, requires_grad=True) for _ in range(2)]
    y = residual_block(x, weights, recompute=True)
    y.backward(torch.rand_like(y))
fake = FakeTensorMode()
fake.runs_kernels = True
with fake, _Live() as live:
    run()
with peak_memory(torch.device("cpu")) as peak:
    run()
print(live.peak / 2**20 / peak.mib)
"""


def test_inside_of_an_op():
    """The allowance for the passes of a fused op bounds what they allocate, and not by much."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", INSIDE], env=environment, capture_output=True, text=True)
    assert 1 <= float(run.stdout or 0) < 1.5, run.stdout + run.stderr[-3000:]


def test_parts_of_an_estimate():
    recipe = Pix2Pix(Pix2PixConfig(**{**TINY, "pool_size": 40, "batch_size": 2}))
    found = estimate(recipe, (1, 3), (32, 48), gpu=False)
    pixels, weights = (
        32 * 48,
        sum(p.numel() for net in recipe.networks(1, 3).values() for p in net.parameters()),
    )
    # float32: pairs of images in the pool; a batch of each domain; weights, gradients and two moments
    assert found.pool_bytes == 40 * 4 * pixels * 4
    assert found.data_bytes == 2 * 4 * pixels * 4
    # the rest is the pool's room for a batch, counters and statistics
    room = 2 * 4 * pixels * 4
    assert 0 <= found.fixed_bytes - 4 * 4 * weights - room < 0.02 * found.fixed_bytes
    parts = found.fixed_bytes + found.pool_bytes + found.data_bytes + 2 * found.activation_bytes_per_image
    assert found.peak_bytes == parts
    assert "MB of activations per image" in str(found)


def test_1024_pixels_fit_into_24_gb():
    """CycleGAN as published, with the identity loss, in bfloat16, as a GPU runs it."""
    recipe = CycleGAN(CycleGANConfig(crop_size=1024, load_size=1024))
    chosen = choose(recipe, (3, 3), (1024, 1024), free=24 * 10**9, autocast=torch.bfloat16)
    assert chosen.peak_bytes <= 24 * 10**9
    # a pool of bfloat16 images and the weights, gradients and moments of 28.3 million parameters in float32
    assert chosen.pool_bytes >= 50 * 2 * 3 * 1024**2 * 2
    assert chosen.fixed_bytes >= 4 * 4 * 28.2e6
    # what README quotes is what the step needs now
    records = json.loads(RESULT.read_text())["records"]
    (quoted,) = [r for r in records if (r["recipe"], r["memory"], r["size"]) == ("cyclegan", "fast", 1024)]
    assert chosen.memory == "fast" and abs(quoted["peak_bytes"] / chosen.peak_bytes - 1) < 0.01, (
        "python benchmarks/memory.py"
    )


def test_readme_quotes_the_estimates():
    run = json.loads(RESULT.read_text())
    assert RESULT.with_suffix(".md").read_text() == page.markdown(run)
    section = (ROOT / "README.md").read_text().partition("\n## Memory\n")[2].partition("\n## ")[0]
    head, _, *modes = page.table(run["records"], "cyclegan")
    for row in (head, *modes):
        assert f"\n{row}" in section


def test_modes_need_less_and_less():
    """On the path of a GPU."""
    recipe = CycleGAN(CycleGANConfig(ngf=16, ndf=4, blocks=3, patch=16))
    peaks = [
        estimate(recipe, (3, 3), (128, 128), memory=mode).activation_bytes_per_image for mode in stack.MEMORY
    ]
    assert peaks[0] > 1.2 * peaks[1] > 1.4 * peaks[2]


def counted(recipe, channels, size, *, memory, **options) -> Estimate:
    """Stands in for `estimate`: 3, 2 and 1 units."""
    weight = {"fast": 3, "low": 2, "least": 1}[memory]
    found = 1000 * weight * recipe.config.batch_size * size[0] * size[1] * recipe.config.ngf
    return Estimate(memory, found, 0, 0, 0, 0, found)


def test_what_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "estimate", counted)
    recipe = CycleGAN(CycleGANConfig(ngf=2, batch_size=2, load_size=100, crop_size=100))

    def chosen(free: float, **options) -> Estimate:
        return choose(recipe, (3, 3), (100, 100), free=int(free * 40e6), **options)

    assert [chosen(free).memory for free in (3, 2.9, 2, 1.9, 1)] == ["fast", "low", "low", "least", "least"]
    # without the kernels "low" is "fast"
    assert chosen(2.9, gpu=False).memory == "least"
    with pytest.raises(UsageError) as error:
        chosen(0.6)
    assert str(error.value) == (
        "--memory least needs about 0.04 GB, 0.02 GB are free: "
        "use --batch-size 1 --accumulate 2 (about 0.02 GB) "
        "or --crop-size 50 (about 0.01 GB) or --ngf 1 (about 0.02 GB)"
    )
    with pytest.raises(
        UsageError, match="^--memory fast needs .* free: use --memory least .about 0.04 GB. or"
    ):
        chosen(1, memory="fast")
    with pytest.raises(UsageError, match="use a smaller --crop-size, --ngf or --batch-size$"):
        chosen(1e-9)


def test_fit(monkeypatch):
    recipe = CycleGAN(CycleGANConfig(**{**TINY, "blocks": 1}))
    quick = memory._at_most(recipe, (3, 3), (64, 64))
    assert quick > estimate(recipe, (3, 3), (64, 64), gpu=False).peak_bytes
    monkeypatch.setattr(memory, "free_bytes", lambda device: quick)
    mode, line = fit(recipe, (3, 3), (64, 64), CPU)
    assert mode == "fast" and line.startswith("memory: --memory fast, about")
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    assert fit(recipe, (3, 3), (64, 64), CPU, memory="least")[0] == "least"
    monkeypatch.undo()
    assert memory.free_bytes(CPU) > 2**20
    # the digits start at once on any machine with a few GB
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3 * 10**9)
    monkeypatch.delattr(memory, "choose")
    for cls in (CycleGAN, Pix2Pix):
        digits = cls(dataclasses.replace(cls.config_class(), **cls.presets["digits"]))
        assert fit(digits, (1, 1), (32, 32), CPU)[0] == "fast"


def test_images_on_the_device_take_of_its_free_memory(monkeypatch):
    """Without a GPU: what one with room for "fast" would answer."""
    monkeypatch.setattr(memory, "estimate", counted)
    recipe = CycleGAN(CycleGANConfig(ngf=2, load_size=100, crop_size=100))
    unit = 1000 * 100 * 100 * 2
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * unit, 2**40))

    def found(images: int) -> tuple[str, str]:
        return fit(recipe, (3, 3), (100, 100), torch.device("cuda"), images=images)

    sizes = (0, 1, unit, unit + 1, 2 * unit)
    assert [found(images)[0] for images in sizes] == ["fast", "low", "low", "least", "least"]
    # what the line says is free is what the images leave
    assert found(unit)[1].endswith("; 0.04 GB are free")
    with pytest.raises(UsageError, match=r"^--memory least needs about 0.02 GB, 0.02 GB are free: use "):
        found(2 * unit + 1)


def test_a_run_counts_its_images(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(trainer, "resident_bytes", lambda data, device, where: (data.train.nbytes, where))
    monkeypatch.setattr(trainer, "fit", lambda *a, images, **o: seen.append(images) or ("fast", ""))
    words = ["cyclegan", "--max-images", "20", "--data-on", "host", "--runs", str(tmp_path)]
    trainer.Trainer(make_recipe([*words, "--device", "cpu"]))
    assert seen == [(2 * 20 * 32 * 32 * 3, "host")]
