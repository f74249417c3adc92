"""One optimisation step: order of updates, mixed precision, frozen discriminators, history pool, averaged
generator.

Everything that changes from step to step lives here (networks, optimisers, pool, EMA) and can be saved and
restored exactly; the random draws of a step depend on its number and the seed alone, except dropout and the
gradient penalty, which use torch's generator.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from fastgan.config import Config
from fastgan.data.pool import ImagePool
from fastgan.layers import place
from fastgan.recipes.base import Batch, Nets, Recipe, Terms


def lr_factor(config: Config, epoch: int) -> float:
    """Factor of the learning rates in a 0-based epoch; above zero up to and including the last one.

    linear: 1, then falling evenly to 1 / (epochs_decay + 1); cosine: half a period, never rising again; step:
    0.1 every lr_decay_epochs; constant: 1.
    """
    total = config.epochs + config.epochs_decay
    if config.lr_policy == "linear":
        return max(
            1 - max(0, epoch + 1 - config.epochs) / (config.epochs_decay + 1), 1 / (config.epochs_decay + 1)
        )
    if config.lr_policy == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(epoch, total - 1) / total))
    if config.lr_policy == "step":
        return 0.1 ** (epoch // config.lr_decay_epochs)
    return 1.0


@contextmanager
def frozen(nets: Iterable[nn.Module]) -> Iterator[None]:
    """No gradients for the parameters of `nets`: backward then computes input gradients only."""
    params = [p for net in nets for p in net.parameters() if p.requires_grad]
    for p in params:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in params:
            p.requires_grad_(True)


def grad_norm(net: nn.Module) -> Tensor:
    """Euclidean norm of all gradients of a network, a scalar on its device."""
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    norms = torch._foreach_norm(grads) if grads else [torch.zeros(())]
    return torch.stack([n.float() for n in norms]).norm()


class Step:
    """Networks and their optimisers; calling it with the batches of one step updates all of them.

    Args:
        recipe: the system; its order, generators and discriminators are followed.
        nets: networks by name, as `recipe.networks` makes them; moved to `device` in place.
        device: where to compute.
        autocast: torch.bfloat16 for mixed precision, None for the dtype of the parameters.
        compile: torch.compile every network.
    """

    def __init__(
        self,
        recipe: Recipe,
        nets: Nets,
        *,
        device: torch.device,
        autocast: torch.dtype | None = None,
        compile: bool = False,
    ) -> None:
        self.recipe, self.config, self.device, self.autocast = recipe, recipe.config, device, autocast
        self.nets = {name: place(net, device).train() for name, net in nets.items()}
        self.ema: Nets = {}
        if self.config.ema > 0:
            self.ema = {
                k: copy.deepcopy(self.nets[k]).eval().requires_grad_(False) for k in recipe.generators
            }
        config = self.config
        lr_d = config.lr if config.lr_d is None else config.lr_d
        self.optimizers = {
            "G": self._optimizer(recipe.generators, config.lr),
            "D": self._optimizer(recipe.discriminators, lr_d),
        }
        self.base_lr = {"G": config.lr, "D": lr_d}
        # a pair is pooled as one image, so that a stored fake keeps the input it was made from
        keys = ("pair",) if recipe.paired else ("A", "B")
        self.pools = {key: ImagePool(config.pool_size) for key in keys}
        if compile:
            for net in self.nets.values():
                net.compile(dynamic=False)

    def _optimizer(self, names: Sequence[str], lr: float) -> torch.optim.Optimizer:
        params = [p for name in names for p in self.nets[name].parameters()]
        if self.config.optimizer == "rmsprop":
            return torch.optim.RMSprop(params, lr=lr)
        fused = self.device.type in ("cpu", "cuda")
        return torch.optim.Adam(params, lr=lr, betas=(self.config.beta1, self.config.beta2), fused=fused)

    def _cast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    def _members(self, names: Sequence[str]) -> list[nn.Module]:
        return [self.nets[name] for name in names]

    def __call__(
        self, batches: Sequence[Batch], index: int, lr_factor: float = 1.0, *, watch: bool = False
    ) -> Terms:
        """Update every network once (the discriminators once per batch).

        Args:
            batches: n_critic batches of images (N, C, H, W) on the device.
            index: number of this step; with the seed it decides the draws of the history pool.
            lr_factor: factor of both learning rates.
            watch: also measure gradient norms and the spread of the fakes.

        Returns:
            Detached scalars on the device by name; reading one waits for the device.

        Raises:
            ValueError: another number of batches than n_critic.
        """
        if len(batches) != self.config.n_critic:
            raise ValueError(f"Step: needs n_critic = {self.config.n_critic} batches, got {len(batches)}")
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.base_lr[name] * lr_factor
        rng = np.random.default_rng([self.config.seed, 1, index])
        terms: Terms = {}
        if self.recipe.order == "g-first":
            # one context for both: autocast keeps the cast weights until its outermost end
            with self._cast():
                fakes = self._translate(batches[0], grad=True)
                loss, terms = self._generator_loss(batches[0], fakes)
            terms |= self._update_generators(loss, watch)
            terms |= self._update_discriminators(batches[0], fakes, rng, watch)
            for batch in batches[1:]:
                terms |= self._update_discriminators(batch, self._translate(batch, grad=False), rng, watch)
        else:
            for batch in batches:
                fakes = self._translate(batch, grad=batch is batches[-1])
                terms |= self._update_discriminators(batch, fakes, rng, watch)
            loss, found = self._generator_loss(batches[-1], fakes)
            terms |= found | self._update_generators(loss, watch)
        if watch:
            terms |= self._spread(batches[0 if self.recipe.order == "g-first" else -1], fakes)
        return terms

    def _translate(self, batch: Batch, *, grad: bool) -> Batch:
        with self._cast(), torch.set_grad_enabled(grad):
            return self.recipe.translate(self.nets, batch)

    def _generator_loss(self, batch: Batch, fakes: Batch) -> tuple[Tensor, Terms]:
        with frozen(self._members(self.recipe.discriminators)), self._cast():
            return self.recipe.generator_loss(self.nets, batch, fakes)

    def _update_generators(self, loss: Tensor, watch: bool) -> Terms:
        optimizer = self.optimizers["G"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        self._average()
        if not watch:
            return {}
        return {f"grad_{name}": grad_norm(self.nets[name]) for name in self.recipe.generators}

    def _update_discriminators(
        self, batch: Batch, fakes: Batch, rng: np.random.Generator, watch: bool
    ) -> Terms:
        optimizer = self.optimizers["D"]
        shown = self._pooled(batch, {k: v.detach() for k, v in fakes.items()}, rng)
        with self._cast():
            loss, terms = self.recipe.discriminator_loss(self.nets, batch, shown)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if self.config.gan_mode == "wgan":
            with torch.no_grad():
                for group in optimizer.param_groups:
                    torch._foreach_clamp_min_(group["params"], -self.config.clip)
                    torch._foreach_clamp_max_(group["params"], self.config.clip)
        if watch:
            terms |= {f"grad_{name}": grad_norm(self.nets[name]) for name in self.recipe.discriminators}
        return terms

    def _pooled(self, batch: Batch, fakes: Batch, rng: np.random.Generator) -> Batch:
        if self.config.pool_size == 0:
            return fakes

        def query(key: str, images: Tensor) -> Tensor:
            # a restored pool may lie in another layout than a running one: the arithmetic must not notice
            return self.pools[key].query(images, rng).contiguous(memory_format=torch.channels_last)

        if not self.recipe.paired:
            return {key: query(key, fakes[key]) for key in sorted(fakes)}
        a, b = batch["A"], fakes["B"]
        pair = query("pair", torch.cat([a, b.to(a.dtype)], 1))
        return {"A": pair[:, : a.shape[1]], "B": pair[:, a.shape[1] :]}

    @torch.no_grad()
    def _average(self) -> None:
        for name, net in self.ema.items():
            live = self.nets[name]
            torch._foreach_lerp_(list(net.parameters()), list(live.parameters()), 1 - self.config.ema)
            for mine, theirs in zip(net.buffers(), live.buffers()):
                mine.copy_(theirs)

    @torch.no_grad()
    def _spread(self, batch: Batch, fakes: Batch) -> Terms:
        """Spread over a batch of fakes relative to that of real images: near 0 when the outputs collapse."""
        if len(batch["A"]) < 4:
            return {}
        spread = {k: batch[k].float().std(0).mean().clamp_min(1e-6) for k in fakes}
        return {f"diversity_{k}": v.detach().float().std(0).mean() / spread[k] for k, v in fakes.items()}

    def state(self) -> dict[str, Tensor]:
        """All tensors besides the networks that the next steps depend on, by name."""
        out = {}
        for name, optimizer in self.optimizers.items():
            for i, entry in optimizer.state_dict()["state"].items():
                for key, value in entry.items():
                    out[f"optimizer.{name}.{i}.{key}"] = torch.as_tensor(value)
        for name, pool in self.pools.items():
            out |= {f"pool.{name}.{key}": value for key, value in pool.state().items()}
        return out

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned; the networks are loaded by their owner."""
        for name, optimizer in self.optimizers.items():
            params = optimizer.param_groups[0]["params"]
            entries: dict[int, dict[str, Tensor]] = {}
            for full, value in state.items():
                if full.startswith(f"optimizer.{name}."):
                    _, _, i, key = full.split(".")
                    if value.shape == params[int(i)].shape:
                        # in the layout of the parameter: the fused update walks both in memory order
                        value = torch.empty_like(params[int(i)]).copy_(value)
                    entries.setdefault(int(i), {})[key] = value
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": entries, "param_groups": groups})
        for name, pool in self.pools.items():
            prefix = f"pool.{name}."
            mine = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            pool.load({k: v.to(self.device) for k, v in mine.items()})
