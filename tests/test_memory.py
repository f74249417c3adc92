"""What the networks keep changes nothing but memory, and the estimate of it is what a run holds."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from fastgan import stack
from fastgan.models import PatchDiscriminator, ResnetGenerator, UnetGenerator
from fastgan.recipes.base import Recipe
from fastgan.recipes.cyclegan import CycleGAN, CycleGANConfig
from fastgan.recipes.pix2pix import Pix2Pix, Pix2PixConfig
from fastgan.stack import set_memory
from fastgan.step import Step

TINY = {"ngf": 4, "ndf": 4, "blocks": 4, "patch": 16, "levels": 4, "pool_size": 2}
CPU = torch.device("cpu")


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
    for memory in stack.MEMORY:
        step = Step(recipe, copy.deepcopy(nets), device=CPU)
        set_memory(step.nets.values(), memory)
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
    for memory in stack.MEMORY:
        own = copy.deepcopy(net)
        set_memory([own], memory)
        torch.manual_seed(1)
        recompute.clear()
        saved = SavedBytes()
        with saved:
            y = own(x)
        assert set(recompute) == ({memory == "low"} if fused else set())
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
