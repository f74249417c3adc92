"""One optimisation step: order of updates, mixed precision, frozen discriminators, history pool, averaged
generator.

Everything that changes from step to step lives here (networks, optimisers, pool, EMA) and can be saved and
restored exactly; the random draws of a step (noise, history pool) depend on its number and the seed alone,
except dropout and the gradient penalty, which use torch's generator.

`Step._body` is the whole of it as work on tensors: whatever a step decides by numbers (learning rates, the
draws, the images) lies in tensors that are filled before. So on a GPU it is recorded as a CUDA graph
and replayed. The body yields where ranks have to talk to each other; each piece between is a graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fastgan.data.pool import ImagePool
from fastgan.graph import Between, Recorder, Recording, Report, record, run
from fastgan.layers import frozen, place
from fastgan.optim import LBFGS, Adam
from fastgan.recipes.base import Batch, Nets, Recipe, Terms
from fastgan.stack import KeptStatistics, set_memory

WARM_UP = 3  # steps before the recording: they train, choose kernels and fill the allocator
Source = Batch | Tensor  # images, or the records that `Step.expand` makes them of
Loss = Callable[[Nets, Batch, Batch], tuple[Tensor, Terms]]


class Ranks(Protocol):
    """The processes that train together; see `fastgan.parallel`."""

    rank: int
    size: int

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Mean over the ranks, in place."""

    def gather(self, x: Tensor) -> Tensor:
        """(N, ...) of every rank as (size * N, ...)."""
        ...


class Step:
    """Networks and their optimisers; calling it with the batches of one step updates all of them.

    Args:
        recipe: the system; its order, generators and discriminators are followed.
        nets: networks by name, as `recipe.networks` makes them; moved to `device` in place.
        device: where to compute.
        autocast: torch.bfloat16 for mixed precision, None for the dtype of the parameters.
        compile: torch.compile the recipe's functions (on a GPU) or the networks.
        capture: record the step as CUDA graphs where that is possible; `note` says why it is not.
        ranks: the processes that share every update, None for one.
        fixed_size: all images have one size.
        memory: what is kept for the backward pass, see `fastgan.stack.set_memory`.

    Attributes:
        note: one line that says why the step is not recorded although it was asked for; empty otherwise.
        expand: makes a batch of records on the device (`fastgan.data.Resident.batch`).
    """

    def __init__(
        self,
        recipe: Recipe,
        nets: Nets,
        *,
        device: torch.device,
        autocast: torch.dtype | None = None,
        compile: bool = False,
        capture: bool = False,
        ranks: Ranks | None = None,
        fixed_size: bool = True,
        memory: str = "fast",
    ) -> None:
        self.recipe, self.config, self.device, self.autocast = recipe, recipe.config, device, autocast
        self.ranks = ranks
        self.nets = {name: place(net, device).train() for name, net in nets.items()}
        set_memory(self.nets.values(), memory)
        self.ema: Nets = {}
        if self.config.ema > 0:
            self.ema = {
                k: copy.deepcopy(self.nets[k]).eval().requires_grad_(False) for k in recipe.generators
            }
        self.note = ""
        self.expand: Callable[[Tensor], Batch] | None = None
        self._recorder = self._make_recorder(fixed_size) if capture else None
        self._recordings: dict[bool, Recording] = {}
        self._inputs: list[Source] = []
        self._drawn: dict[str, Tensor] = {}
        # a number would be part of the recording
        self._numbers = {k: torch.tensor(v, device=device) for k, v in recipe.numbers(0).items()}
        self._warm = 0
        config = self.config
        members = {"G": recipe.generators, "D": recipe.discriminators}
        self.members = {group: names for group, names in members.items() if names}
        rates = {"G": config.lr, "D": config.lr if config.lr_d is None else config.lr_d}
        self.base_lr = {group: rates[group] for group in self.members}
        self.optimizers = {name: self._optimizer(name) for name in self.members}
        # a pair is pooled as one image, so that a stored fake keeps the input it was made from
        keys = ("pair",) if recipe.paired else recipe.domains
        self.pools = {key: ImagePool(config.pool_size, fixed_size=fixed_size) for key in keys}
        self._translation: Callable[[Nets, Batch], Batch] = recipe.translate
        self._generator_loss: Loss = recipe.generator_loss
        self._discriminator_loss: Loss = recipe.discriminator_loss
        if compile and device.type == "cuda":
            # around our kernels, so that what lies between them is fused too
            self._translation = torch.compile(recipe.translate, dynamic=False)
            self._generator_loss = torch.compile(recipe.generator_loss, dynamic=False)
            self._discriminator_loss = torch.compile(recipe.discriminator_loss, dynamic=False)
        elif compile:
            for net in self.nets.values():
                net.compile(dynamic=False)

    def _make_recorder(self, fixed_size: bool) -> Recorder | None:
        if self.device.type != "cuda":
            return None
        if not fixed_size:
            self.note = (
                "no CUDA graph: the images have unequal sizes; --preprocess with a crop makes them equal"
            )
        elif self.config.optimizer == "lbfgs":
            self.note = "no CUDA graph: L-BFGS decides by numbers"
        elif self.ranks is not None and self.config.norm == "batch":
            self.note = "no CUDA graph: batch norm over several GPUs waits for the others within a network"
        else:
            return Recorder(self.device)
        return None

    def _parameters(self, group: str) -> dict[str, nn.Parameter]:
        """Parameters of the generators (G) or discriminators (D) by network and name."""
        nets = {name: self.nets[name] for name in self.members[group]}
        return {f"{name}.{key}": p for name, net in nets.items() for key, p in net.named_parameters()}

    def _optimizer(self, group: str) -> torch.optim.Optimizer:
        params = list(self._parameters(group).values())
        recorded = self._recorder is not None
        # a number would be part of the recording
        lr = torch.tensor(self.base_lr[group], device=self.device) if recorded else self.base_lr[group]
        if self.config.optimizer == "lbfgs":
            return LBFGS(params, lr=self.base_lr[group], history_size=self.config.history)
        if self.config.optimizer == "rmsprop":
            return torch.optim.RMSprop(params, lr=lr, capturable=recorded)
        # gradients that are added up over batches stay float32
        rounded = self.device.type == "cuda" and self.config.accumulate == 1
        copies = self.autocast if rounded else None
        return Adam(params, lr=lr, betas=(self.config.beta1, self.config.beta2), copies=copies)

    def __call__(
        self, batches: Sequence[Source], index: int, lr_factor: float = 1.0, *, watch: bool = False
    ) -> Terms:
        """Update the discriminators n_critic times and the generators n_gen times.

        Args:
            batches: (n_critic + n_gen - 1) * accumulate batches of images (N, C, H, W) on the device, or of
                records for `expand`; the gradients of each `accumulate` of them are added up for one update.
                The update that comes second takes the last batches of the one that comes first.
            index: number of this step; with the seed it decides the noise and the draws of the history pool;
                also the recipe's `numbers`.
            lr_factor: factor of both learning rates.
            watch: also measure gradient norms and the spread of the fakes.

        Returns:
            Detached scalars on the device by name; reading one waits for the device.

        Raises:
            ValueError: another number of batches.
        """
        c = self.config
        if len(batches) != c.batches:
            rule = f"(n_critic + n_gen - 1) * accumulate = {c.batches} batches"
            raise ValueError(f"Step: needs {rule}, got {len(batches)}")
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(self.base_lr[name] * lr_factor)
                else:
                    group["lr"] = self.base_lr[name] * lr_factor
        for key, value in self.recipe.numbers(index).items():
            self._numbers[key].fill_(value)
        first = batches[0]
        drawn = self._draw(
            len(batches), first.shape[1] if isinstance(first, Tensor) else len(first["A"]), index
        )
        if self._recorder is None:
            return run(self._body(batches, drawn, watch)).terms()
        return self._replay(self._recorder, batches, drawn, watch)

    def _draw(self, batches: int, images: int, index: int) -> dict[str, Tensor]:
        """The pools' plans for D's batches of a step, int64 (batches, pools, 2, images of all ranks), and the
        noise of this rank's images by name, float32 (batches, images, numbers)."""
        rng = np.random.default_rng([self.config.seed, 1, index])
        rank, size = (0, 1) if self.ranks is None else (self.ranks.rank, self.ranks.size)
        mine = slice(rank * images, (rank + 1) * images)
        images *= size
        m = self.config.accumulate
        plans: list[list[np.ndarray]] = []
        for _ in range(self.config.n_critic):
            # pool by pool, so that m batches are drawn for like one large one
            each = [[pool.plan(images, rng) for _ in range(m)] for pool in self.pools.values()]
            plans += [list(of_batch) for of_batch in zip(*each)]
        drawn = {"plan": torch.from_numpy(np.array(plans))}
        noise = np.random.default_rng([self.config.seed, 2, index])
        for name, numbers in self.recipe.noise.items():
            values = noise.standard_normal((batches, images, numbers), np.float32)[:, mine]
            drawn[name] = torch.from_numpy(values).contiguous()
        return {k: x.pin_memory() for k, x in drawn.items()} if self.device.type == "cuda" else drawn

    def _replay(
        self, recorder: Recorder, batches: Sequence[Source], drawn: dict[str, Tensor], watch: bool
    ) -> Terms:
        if self._warm < WARM_UP:
            self._warm += 1
            found: list[Report] = []
            # watching, so that nothing is done for the first time in the recording
            recorder.warm_up(lambda: found.append(run(self._body(batches, drawn, True))))
            return found[0].terms()
        if not self._drawn:
            self._inputs = [_like(batch, self.device) for batch in batches]
            self._drawn = {key: torch.empty_like(x, device=self.device) for key, x in drawn.items()}
        for mine, given in zip(self._inputs, batches):
            if isinstance(mine, Tensor) and isinstance(given, Tensor):
                mine.copy_(given, non_blocking=True)
            elif isinstance(mine, dict) and isinstance(given, dict):
                for key, image in given.items():
                    mine[key].copy_(image)
        for key, x in drawn.items():
            self._drawn[key].copy_(x, non_blocking=True)
        if watch not in self._recordings:
            try:
                body = self._body(self._inputs, self._drawn, watch)
                self._recordings[watch] = record(recorder, body)
            except RuntimeError as error:
                self._recorder, self._recordings = None, {}
                self.note = f"no CUDA graph: {str(error).splitlines()[0]}"
                return run(self._body(batches, drawn, watch)).terms()
        return self._recordings[watch].replay().terms()

    def _body(
        self, sources: Sequence[Source], drawn: dict[str, Tensor], watch: bool
    ) -> Generator[Between, None, Report]:
        """The step as work on tensors; yields what ranks do before it may go on."""
        batches = [self._batch(source, drawn, k) for k, source in enumerate(sources)]
        m, critics, gens = self.config.accumulate, self.config.n_critic, self.config.n_gen
        plan = drawn["plan"]
        plan = plan.to(self.device, non_blocking=True) if self.pools_are_fixed else plan
        groups = [batches[i : i + m] for i in range(0, len(batches), m)]
        terms: Terms = {}
        if self.recipe.order == "g-first" or not self.recipe.discriminators:
            for first in groups[:gens]:
                fakes, found = yield from self._update_generators(first, None, watch)
                terms |= found
            judged = groups[gens - 1 :] if self.recipe.discriminators else []
            for group, plans in zip(judged, plan.split(m)):
                made = fakes if group is first else [self._translate(b, grad=False) for b in group]
                terms |= yield from self._update_discriminators(group, made, plans, watch)
        else:
            for group, plans in zip(groups, plan.split(m)):
                # of several batches the graphs would not fit: the generators' update makes these fakes again
                last, again = group is groups[critics - 1], m > 1
                with KeptStatistics(self.nets.values() if last and again else ()):
                    made = [self._translate(batch, grad=last and not again) for batch in group]
                terms |= yield from self._update_discriminators(group, made, plans, watch)
            for k, first in enumerate(groups[critics - 1 :]):
                ready = None if m > 1 or k > 0 else made
                fakes, found = yield from self._update_generators(first, ready, watch)
                terms |= found
        if watch:
            terms |= self._spread(first[0], fakes[0])
        return Report(tuple(terms), torch.stack(list(terms.values())))

    def _batch(self, source: Source, drawn: dict[str, Tensor], k: int) -> Batch:
        """Images, noise and numbers of batch k."""
        if isinstance(source, Tensor):
            assert self.expand is not None
            source = self.expand(source.to(self.device, non_blocking=True))
        noise = {key: drawn[key][k].to(source["A"], non_blocking=True) for key in self.recipe.noise}
        return {**source, **noise, **self._numbers}

    @property
    def pools_are_fixed(self) -> bool:
        """Whether the pools carry out their plans on the device."""
        return all(pool.fixed_size for pool in self.pools.values())

    def _averaging(self, tensors: list[Tensor]) -> Between:
        ranks = self.ranks
        assert ranks is not None
        return lambda: ranks.average(tensors)

    @contextmanager
    def _cast(self) -> Iterator[None]:
        """Mixed precision: autocast, and the optimisers' copies of the weights in place of them."""
        with ExitStack() as stack:
            stack.enter_context(
                torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)
            )
            for group, optimizer in self.optimizers.items():
                if isinstance(optimizer, Adam) and optimizer.has_copies:
                    nets = [self.nets[name] for name in self.members[group]]
                    stack.enter_context(optimizer.copies_in(*nets))
            yield

    def _translate(self, batch: Batch, *, grad: bool) -> Batch:
        with self._cast(), torch.set_grad_enabled(grad):
            return self._translation(self.nets, batch)

    def _update_generators(
        self, group: Sequence[Batch], made: Sequence[Batch] | None, watch: bool
    ) -> Generator[Between, None, tuple[list[Batch], Terms]]:
        """One update from a group of batches; returns their fakes, detached."""
        optimizer, shown, found = self.optimizers["G"], [], []
        optimizer.zero_grad(set_to_none=True)
        judges = [self.nets[name] for name in self.recipe.discriminators]
        for i, batch in enumerate(group):
            # one context for both: autocast keeps the cast weights until its outermost end
            with self._cast():
                fakes = self._translate(batch, grad=True) if made is None else made[i]
                with frozen(judges):
                    loss, terms = self._generator_loss(self.nets, batch, fakes)
                # inside: activations may be computed again, with the weights of the forward pass
                (loss / len(group) if len(group) > 1 else loss).backward()
            shown.append({k: v.detach() for k, v in fakes.items() if k in batch})
            found.append(terms)
        yield from self._apply("G")
        self._average()
        terms = _mean(found)
        if watch:
            terms |= self._norms("G")
        return shown, terms

    def _update_discriminators(
        self, group: Sequence[Batch], fakes: Sequence[Batch], plans: Tensor, watch: bool
    ) -> Generator[Between, None, Terms]:
        optimizer, found = self.optimizers["D"], []
        shown = []
        for batch, made, plan in zip(group, fakes, plans):
            shown.append((yield from self._pooled(batch, made, plan)))
        optimizer.zero_grad(set_to_none=True)
        for batch, made in zip(group, shown):
            with self._cast():
                loss, terms = self._discriminator_loss(self.nets, batch, made)
                (loss / len(group) if len(group) > 1 else loss).backward()
            found.append(terms)
        yield from self._apply("D")
        if self.config.gan_mode == "wgan":
            with torch.no_grad():
                for params in optimizer.param_groups:
                    torch._foreach_clamp_min_(params["params"], -self.config.clip)
                    torch._foreach_clamp_max_(params["params"], self.config.clip)
            self.refresh("D")
        terms = _mean(found)
        if watch:
            terms |= self._norms("D")
        return terms

    def _apply(self, group: str) -> Generator[Between, None, None]:
        if self.ranks is not None:
            yield self._averaging(self._gradients(group))
        self.optimizers[group].step()

    def _norms(self, group: str) -> Terms:
        """Euclidean norm of all gradients of each network."""
        found: Terms = {}
        for name in self.members[group]:
            norms = torch._foreach_norm(self._gradients(group, f"{name}."))
            found[f"grad_{name}"] = torch.stack([norm.float() for norm in norms]).norm()
        return found

    def _gradients(self, group: str, name: str = "") -> list[Tensor]:
        """Gradients of the generators (G) or discriminators (D), or of one network among them."""
        optimizer = self.optimizers[group]
        params = [p for key, p in self._parameters(group).items() if key.startswith(name)]
        grads = [optimizer.grad_of(p) if isinstance(optimizer, Adam) else p.grad for p in params]
        return [grad for grad in grads if grad is not None]

    def _pooled(self, batch: Batch, fakes: Batch, plan: Tensor) -> Generator[Between, None, Batch]:
        """What the discriminators are shown: fakes of now and before; a pair brings the input it was made
        from."""
        fakes = {key: fakes[key].detach() for key in sorted(fakes) if key in batch}
        if self.config.pool_size == 0:
            return fakes
        if not self.recipe.paired:
            out = {}
            for key, mine in zip(self.pools, plan):
                out[key] = yield from self._query(key, fakes[key], mine)
            return out
        a, b = batch["A"], fakes["B"]
        pair = yield from self._query("pair", torch.cat([a, b.to(a.dtype)], 1), plan[0])
        return {"A": pair[:, : a.shape[1]], "B": pair[:, a.shape[1] :]}

    def _query(self, key: str, images: Tensor, plan: Tensor) -> Generator[Between, None, Tensor]:
        ranks, count = self.ranks, len(images)
        if ranks is None:
            return self.pools[key].exchange(images, plan)
        # every rank keeps the whole pool, as one process with all the images would
        everyone = images.new_empty((ranks.size * count, *images.shape[1:]))
        yield lambda: everyone.copy_(ranks.gather(images))
        chosen = self.pools[key].exchange(everyone, plan)
        return chosen[ranks.rank * count : (ranks.rank + 1) * count]

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

    def refresh(self, *groups: str) -> None:
        """To be called after something else than an update has changed parameters: of the generators (G), of
        the discriminators (D); of all of them where none are named."""
        for optimizer in (self.optimizers[group] for group in groups or self.members):
            if isinstance(optimizer, Adam):
                optimizer.refresh()

    def state(self) -> dict[str, Tensor]:
        """All tensors besides the networks that the next steps depend on, by name: those of the optimisers as
        `optimizer.NETWORK.PARAMETER.KEY`, so that a network can be taken out with what belongs to it."""
        out = {}
        for group, optimizer in self.optimizers.items():
            names = list(self._parameters(group))
            for i, entry in optimizer.state_dict()["state"].items():
                for key, value in entry.items():
                    out[f"optimizer.{names[i]}.{key}"] = torch.as_tensor(value)
        for name, pool in self.pools.items():
            out |= {f"pool.{name}.{key}": value for key, value in pool.state().items()}
        return out

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned; the networks are loaded by their owner.

        A network without a state in it starts with a fresh one.
        """
        for group, optimizer in self.optimizers.items():
            entries: dict[int, dict[str, Tensor]] = {}
            for i, (name, p) in enumerate(self._parameters(group).items()):
                # runs of the first version numbered the parameters
                prefixes = f"optimizer.{name}.", f"optimizer.{group}.{i}."
                mine = {
                    k.removeprefix(prefix): v
                    for prefix in prefixes
                    for k, v in state.items()
                    if k.startswith(prefix)
                }
                # in the layout of the parameter: the fused update walks both in memory order
                mine = {
                    k: torch.empty_like(p).copy_(v) if v.shape == p.shape else v.clone()
                    for k, v in mine.items()
                }
                if mine:
                    entries[i] = mine
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": entries, "param_groups": groups})
        for name, pool in self.pools.items():
            prefix = f"pool.{name}."
            found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            pool.load({k: v.to(self.device) for k, v in found.items()})
        # a recording holds on to the memory of the tensors that were replaced
        self._recordings, self._warm = {}, 0


def _like(source: Source, device: torch.device) -> Source:
    if isinstance(source, Tensor):
        return torch.empty_like(source, device=device)
    return {key: torch.empty_like(image) for key, image in source.items()}


def _mean(terms: Sequence[Terms]) -> Terms:
    """The mean of the terms of several batches."""
    if len(terms) == 1:
        return dict(terms[0])
    return {key: torch.stack([found[key] for found in terms]).mean(0) for key in terms[0]}
