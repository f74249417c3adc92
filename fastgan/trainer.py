"""The training loop: data, steps, schedule, log, samples, checkpoints, exact resume and signals.

A run is a folder `<runs>/<name>/`: config.json, log.jsonl, samples/, checkpoints/, cache/, index.html.
Starting the same command again goes on from the newest checkpoint; batch k and the draws of step k depend on
k and the seed alone, so 30 steps, a kill and 30 more are the same computation as 60.

With several processes (`fastgan.parallel`) all compute, each on its part of the global batch; the first one
alone writes, and an error or a signal of one ends all at the same step.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor

from fastgan import __version__, checkpoint
from fastgan.config import UsageError, changed, flag, read_json, to_json, write_text
from fastgan.data.augment import Geometry
from fastgan.data.dataset import Data, open_data
from fastgan.data.feed import Loader, open_feed, resident_bytes
from fastgan.data.labelled import open_labelled
from fastgan.data.resident import Resident, one_size
from fastgan.data.two import open_two
from fastgan.device import pick_device, pick_precision, seed_everything
from fastgan.gallery import save_grid, write_page
from fastgan.measure import Evaluation
from fastgan.memory import fit
from fastgan.monitor import Monitor, expected_balance, nonfinite
from fastgan.parallel import Ranks, together
from fastgan.recipes.base import Recipe
from fastgan.recipes.style import Style
from fastgan.samples import sample_columns, save_picture
from fastgan.schedule import lr_factor
from fastgan.stack import MEMORY
from fastgan.step import Source, Step

PAGE_SECONDS = 60  # the page follows the curves this often, and every new picture


class Diverged(RuntimeError):
    """A loss or a weight is no longer a finite number."""


class Interrupted(Exception):
    """A signal asked the loop to stop; `code` is the exit status."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def run_folder(recipe: Recipe) -> Path:
    """The folder of a run: `<runs>/<name>`, the name made of recipe and data where none is given."""
    c = recipe.config
    data = c.data.resolve().name if c.data else "digits"
    if isinstance(recipe, Style) and c.content:
        data = f"{c.content.stem}-{c.style.stem}"
    return c.runs / (c.name or f"{recipe.name}-{data}")


def open_images(recipe: Recipe, run: Path, *, progress: bool) -> Data:
    """The images of a run, decoded once into its cache folder.

    Raises:
        DataError: missing, unreadable or unfit images.
    """
    c = recipe.config
    if isinstance(recipe, Style):
        return open_two(
            c.content, c.style, channels=c.channels, load_size=c.load_size, limits=(c.range_a, c.range_b)
        )
    if recipe.domains == ("A",):
        return open_labelled(
            c.data, labelled=recipe.labelled, attributes=getattr(c, "attributes", ()), channels=c.channels,
            digits=getattr(recipe, "digits", "ink"), classes=getattr(recipe, "classes", False),
            geometry=Geometry(c.preprocess, c.load_size, c.crop_size), flip=c.flip, serial=c.serial,
            limits=c.range_a, pages=c.pages, max_images=c.max_images, skip_bad=c.skip_bad,
            cache=run / "cache" if c.data else None, progress=progress,
            whole_tests=getattr(c, "scale", 1) > 1,
        )  # fmt: skip
    return open_data(
        c.data, paired=recipe.paired, direction=c.direction, channels=c.channels, channels_b=c.channels_b,
        preprocess=c.preprocess, load_size=c.load_size, crop_size=c.crop_size, flip=c.flip, serial=c.serial,
        range_a=c.range_a, range_b=c.range_b, pages=c.pages, max_images=c.max_images, skip_bad=c.skip_bad,
        cache=run / "cache" if c.data else None, progress=progress,
    )  # fmt: skip


class Trainer:
    """One run, from its settings to its last checkpoint.

    Args:
        recipe: the system with its settings.
        ranks: the processes that train together; None: this one alone.

    Raises:
        UsageError, DataError, CheckpointError: what the person has to change, before anything is overwritten.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks | None = None) -> None:
        config = recipe.config
        self.recipe, self.config, self.ranks = recipe, config, ranks
        self.rank, self.size = (ranks.rank, ranks.size) if ranks else (0, 1)
        self.run = run_folder(recipe)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.data = self._open()
        self.notes = list(self.data.notes)
        with together(ranks):
            self._prepare()
        memory = self._memory()
        with together(ranks):
            self.step = self._step(memory)
        if ranks:
            # equal already, as the seeds are, unless the machines are of different kinds
            for net in (*self.step.nets.values(), *self.step.ema.values()):
                ranks.broadcast([*net.parameters(), *net.buffers()])
            self.step.refresh()
            torch.manual_seed(config.seed + self.rank)
        self.batches = config.batches
        self.images = config.batch_size * self.batches * self.size
        self.steps_per_epoch = self.data.train.steps_per_epoch(self.images)
        self.total = config.steps or (config.epochs + config.epochs_decay) * self.steps_per_epoch
        self.done = 0
        self.stopped_by = 0
        self.evaluation: Evaluation | None = None
        with together(ranks):
            if config.evaluate_every and self.rank == 0:
                self.evaluation = Evaluation(recipe, self.data, self.device, self.run / "checkpoints")

    def _open(self) -> Data:
        """Device and images; the first rank decodes them into the cache, where the others then read them."""
        config, ranks = self.config, self.ranks
        if ranks:
            settings = ranks.collect(to_json(config))
            for key, value in settings[0].items():
                if any(other.get(key) != value for other in settings):
                    ranks.agreed = True
                    raise UsageError(
                        f"the processes were given different {flag(key)}: start all of them alike"
                    )
        data: Data | None = None
        with together(ranks):
            self.device = (
                pick_device(config.device, ranks.local, ranks.local_size)
                if ranks
                else pick_device(config.device)
            )
            self._check_earlier_start()
            if self.rank == 0:
                data = open_images(self.recipe, self.run, progress=sys.stderr.isatty())
                self._check_sizes(data)
        with together(ranks):
            return data or open_images(self.recipe, self.run, progress=False)

    def _prepare(self) -> None:
        """Show a recipe that asks for it an image of each domain before the first step."""
        if hasattr(self.recipe, "prepare"):
            train, output = self.data.train, self.config.output
            names: list[Literal["A", "B"]] = ["A", "B"]
            shown = {d: train.images(d, 0, 1, output_range=output) for d in names if d in self.recipe.domains}
            self.recipe.prepare(shown)

    def _memory(self) -> str:
        """What the networks keep: the fastest that fits, and on every rank the same."""
        config = self.config
        sizes = self.data.train.sizes()
        largest = max(height for _, height, _ in sizes), max(width for _, _, width in sizes)
        with together(self.ranks):
            autocast = pick_precision(config.precision, self.device)
            memory, line = fit(
                self.recipe, self.data.channels, largest, self.device, autocast=autocast,
                memory=config.memory, images=resident_bytes(self.data, self.device, config.data_on),
            )  # fmt: skip
        if self.ranks:
            memory = max(self.ranks.collect(memory), key=MEMORY.index)
        if self.device.type != "cpu" or memory != "fast":
            self.notes.append(line)
        return memory

    def _step(self, memory: str) -> Step:
        config, ranks = self.config, self.ranks
        seed_everything(config.seed, deterministic=config.deterministic)
        nets = self.recipe.networks(*self.data.channels)
        start = getattr(config, "start", None)
        if start and not checkpoint.checkpoints(self.run / "checkpoints"):
            found = checkpoint.load_generator(start)
            checkpoint.load_into(nets["G"], found.weights, str(found.path))
        if ranks:
            from fastgan.sync_norm import sync_batch_norm  # brings torch's compiler

            for net in nets.values():
                sync_batch_norm(net, ranks)
        autocast = pick_precision(config.precision, self.device)
        return Step(
            self.recipe, nets, device=self.device, autocast=autocast, compile=config.compile,
            capture=config.capture, ranks=ranks, memory=memory,
            fixed_size=one_size(self.data.train) is not None,
        )  # fmt: skip

    def _check_earlier_start(self) -> None:
        path = self.run / "config.json"
        if not path.exists():
            return
        earlier = read_json(path)
        if earlier.get("recipe") != self.recipe.name:
            raise UsageError(f"{self.run} holds a run of {earlier.get('recipe')}: choose another --name")
        differ = changed(earlier["settings"], to_json(self.config))
        if differ:
            was = ", ".join(f"{flag(k)} {earlier['settings'].get(k)}" for k in differ[:4])
            raise UsageError(
                f"{self.run} was started with {was}: give the same again to go on, or another --name"
            )

    def _check_sizes(self, data: Data) -> None:
        c = self.config
        sizes = data.train.sizes()
        for name, height, width in sizes:
            if fault := self.recipe.unfit(height, width):
                raise UsageError(f"{'images' if data.size else name} of {width}x{height} pixels: {fault}")
        if c.batch_size * self.size > 1 and len({size[1:] for size in sizes}) > 1:
            alone = " and one process" if self.size > 1 else ""
            raise UsageError(
                f"--preprocess {c.preprocess} leaves images of unequal size: use --batch-size 1{alone}"
            )
        two = "B" in self.recipe.domains
        if two and getattr(c, "lambda_identity", 0) > 0 and data.channels[0] != data.channels[1]:
            a, b = data.channels
            raise UsageError(
                f"A has {a} channels and B {b}: the identity loss needs equal ones, add --lambda-identity 0"
            )

    def resume(self) -> None:
        """Load the newest checkpoint of the run, if there is one.

        Raises:
            CheckpointError: it cannot be read or does not fit.
            UsageError: the processes do not see the same checkpoint.
        """
        with together(self.ranks):
            self._load()
        if self.ranks and len(set(self.ranks.collect(self.done))) > 1:
            self.ranks.agreed = True
            raise UsageError(
                f"{self.run} is another folder for each process: --runs must be one that all see"
            )

    def _load(self) -> None:
        found = checkpoint.checkpoints(self.run / "checkpoints")
        if not found:
            return
        nets, state, header = checkpoint.load(found[-1])
        for name, net in self.step.nets.items():
            checkpoint.load_into(net, nets.get(name, {}), str(found[-1] / f"{name}.safetensors"))
        for name, net in self.step.ema.items():
            checkpoint.load_into(net, nets.get(f"{name}_ema", {}), str(found[-1] / f"{name}_ema.safetensors"))
        self.step.load_state({k: v for k, v in state.items() if not k.startswith("random.")})
        self.done = header["step"]
        earlier = header.get("processes", 1)
        if earlier == self.size:
            own = f".{self.rank}" if self.rank else ""
            torch.set_rng_state(state[f"random.cpu{own}"])
            if self.device.type == "cuda" and f"random.cuda{own}" in state:
                torch.cuda.set_rng_state(state[f"random.cuda{own}"], self.device)
        else:
            torch.manual_seed(self.config.seed + self.rank + self.size * self.done)
            self.notes.append(
                f"{earlier} processes came to step {self.done}, {self.size} go on: "
                "other images and draws than with the same number"
            )

    def _random(self) -> dict[str, Tensor]:
        """States of the random generators, those of rank r > 0 with an .r behind their names."""
        mine = {"random.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            mine["random.cuda"] = torch.cuda.get_rng_state(self.device)
        each = self.ranks.collect(mine) if self.ranks else [mine]
        return {f"{k}.{rank}" if rank else k: v for rank, state in enumerate(each) for k, v in state.items()}

    def save(self, random: dict[str, Tensor], best: dict[str, Any] | None = None) -> Path:
        """Write a checkpoint of the finished steps, with the states of the random generators; best: by what
        it is the best so far, then it is written as that one."""
        nets = {name: net.state_dict() for name, net in self.step.nets.items()}
        nets |= {f"{name}_ema": net.state_dict() for name, net in self.step.ema.items()}
        state = self.step.state() | random
        header = {"step": self.done, "processes": self.size, **self._about()}
        return checkpoint.save(
            self.run / "checkpoints", self.done, nets, state, header | ({"best": best} if best else {}),
            keep=self.config.keep, best=bool(best),
        )  # fmt: skip

    def _evaluates(self, done: int) -> bool:
        """Whether an evaluation comes after this many steps."""
        n = self.config.evaluate_every
        return n > 0 and (done == self.total or self._epoch(done) // n > self._epoch(done - 1) // n)

    def _evaluate(self, monitor: Monitor, random: dict[str, Tensor]) -> dict[str, float]:
        """Measure the generators and keep the best ones; values for the log."""
        assert self.evaluation is not None
        begin = time.perf_counter()
        nets = {name: {**self.step.nets, **self.step.ema}[name] for name in self.recipe.generators}
        for net in nets.values():
            net.eval()
        found = self.evaluation.run(nets)
        for name in self.recipe.generators:
            self.step.nets[name].train()
        for note in found.notes:
            monitor.note(note)
        best = self.evaluation.better(found.values, self.done)
        if best:
            self.save(random, best)
        if found.values:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in found.values.items())
            kept = f"; the best {best['measure']} so far, in checkpoints/best" if best else ""
            monitor.note(f"evaluation at step {self.done}: {shown}{kept}")
        monitor.pause(time.perf_counter() - begin)
        return {f"eval/{name}": value for name, value in found.values.items()}

    def _about(self) -> dict[str, Any]:
        return {
            "fastgan": __version__, "recipe": self.recipe.name, "data": self.data.name,
            "channels": list(self.data.channels), "ranges": [list(r) for r in self.data.ranges],
            "dtypes": [str(d) for d in self.data.dtypes], "settings": to_json(self.config),
            **({"labels": self.data.labels} if self.recipe.labelled else {}),
        }  # fmt: skip

    def _epoch(self, step: int) -> int:
        """Epoch of the schedule, 0-based; `--steps` spreads the epochs over that many steps."""
        epochs = self.config.epochs + self.config.epochs_decay
        return step * epochs // self.total if self.config.steps else step // self.steps_per_epoch

    def train(self) -> None:
        """Run to the last step.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the step was finished and saved.
            Diverged: a loss is no longer finite; names the last good checkpoint.
            CheckpointError: a checkpoint could not be written.
        """
        c = self.config
        monitor: Monitor | None = None
        with together(self.ranks):
            if self.rank == 0:
                monitor = self._monitor()
        with together(self.ranks):
            feed = open_feed(
                self.data, c.batch_size, seed=c.seed, device=self.device, output_range=c.output,
                start=self.done * self.batches, rank=self.rank, ranks=self.size, where=c.data_on,
            )  # fmt: skip
        if isinstance(feed, Resident):
            self.step.expand = feed.batch
        handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._loop(monitor, feed)
        finally:
            feed.close()
            if monitor:
                monitor.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _monitor(self) -> Monitor:
        c = self.config
        balance = expected_balance(c.gan_mode, c.real_label, c.d_real_weight, c.d_fake_weight)
        try:
            monitor = Monitor(
                self.run, total_steps=self.total, start_step=self.done, batch_size=self.images,
                every=c.log_every, tensorboard=c.tensorboard,
                balance={} if balance is None else dict.fromkeys(self.recipe.discriminators, balance),
            )  # fmt: skip
        except ValueError as error:
            raise UsageError(f"--tensorboard: {error}") from error
        write_text(self.run / "config.json", json.dumps(self._about(), indent=1))
        for text in self.notes:
            monitor.note(text)
        if c.gan_mode == "wgan-gp" and getattr(c, "norm_d", c.norm) == "batch":
            monitor.note(
                "the penalty of wgan-gp is per image, batch norm mixes images: --norm instance suits it"
            )
        if self.done:
            monitor.note(f"resuming {self.run} at step {self.done} of {self.total}")
        return monitor

    def _loop(self, monitor: Monitor | None, feed: Resident | Loader) -> None:
        c, told = self.config, ""
        take: Callable[[], Source] = feed.take if isinstance(feed, Resident) else feed.__next__
        shown = time.monotonic()
        with together(self.ranks):
            if monitor and self.done == 0:
                self.sample()
                self.page("running")
        while self.done < self.total:
            asked = time.perf_counter()
            several = [take() for _ in range(self.batches)]
            waited = time.perf_counter() - asked
            epoch, last = self._epoch(self.done), self.done + 1 == self.total
            judge = self._evaluates(self.done + 1)
            log = (self.done + 1) % c.log_every == 0 or last or judge
            factor = lr_factor(c, epoch)
            terms = self.step(several, self.done, factor, watch=log)
            self.done += 1
            if monitor:
                monitor.tick(self.done, wait=waited)
                if self.step.note != told:
                    told = self.step.note
                    monitor.note(told)
            # a signal may reach one process alone: all stop at the step at which the first one heard of it
            stop = self.ranks.highest(self.stopped_by) if self.ranks else self.stopped_by
            save = self.done % c.save_every == 0 or last or bool(stop)
            show = self.done % c.sample_every == 0 or last
            if not (log or save or show):
                continue
            values = self._read(terms) if log or save else {}
            random = self._random() if save or judge else {}
            with together(self.ranks):
                self._check_finite(values)
                measured = self._evaluate(monitor, random) if monitor and judge else {}
                if monitor and log:
                    values = {k: v for k, v in values.items() if k in terms}
                    rates = {f"lr_{k}": v * factor for k, v in self.step.base_lr.items()}
                    monitor.report(self.done, epoch, values | rates | measured)
                if monitor and show:
                    self.sample()
                if monitor and save:
                    self.save(random)
                old = log and time.monotonic() > shown + PAGE_SECONDS
                if monitor and (show or stop or old):
                    self.page("finished" if last else "stopped" if stop else "running")
                    shown = time.monotonic()
                if stop and not last:
                    if monitor:
                        monitor.note(
                            f"stopped at step {self.done} of {self.total} and saved; the same command goes on"
                        )
                    raise Interrupted(128 + stop)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stopped_by:
            raise KeyboardInterrupt  # the second one does not wait for the step
        self.stopped_by = number

    def _read(self, terms: dict[str, Tensor]) -> dict[str, float]:
        """Terms, their mean over the ranks, and the sizes of all networks' weights, in one transfer."""
        found = dict(terms)
        for name, net in self.step.nets.items():
            norms = torch._foreach_norm([p.detach() for p in net.parameters()])
            found[f"weights of {name}"] = torch.stack(norms).norm()
        row = torch.stack([value.to(self.device, torch.float32) for value in found.values()])
        if self.ranks:
            self.ranks.average([row])
        return dict(zip(found, row.tolist()))

    def _check_finite(self, values: dict[str, float]) -> None:
        bad = nonfinite(values)
        if bad:
            found = checkpoint.checkpoints(self.run / "checkpoints")
            good = f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
            raise Diverged(
                f"{', '.join(bad[:3])} is not finite at step {self.done}; {good}. "
                "Try a lower --lr, or --precision fp32"
            )

    @torch.no_grad()
    def sample(self) -> Path:
        """Write the sample picture of this step."""
        path = self.run / "samples" / f"step_{self.done:08d}.png"
        nets = {**self.step.nets, **self.step.ema}
        for name in self.recipe.generators:
            nets[name].eval()
        with torch.autocast(self.device.type, self.step.autocast, enabled=self.step.autocast is not None):
            columns = sample_columns(self.recipe, nets, self.data, device=self.device)
        for name in self.recipe.generators:
            self.step.nets[name].train()
        title = f"{self.run.name}, step {self.done}"
        save_grid(path, columns, title=title, output_range=self.config.output)
        save_picture(self.run, nets, self.data, self.config.output)
        return path

    def page(self, state: str) -> Path:
        """Write the run's index.html."""
        about = {k: v for k, v in self._about().items() if k != "settings"} | to_json(self.config)
        return write_page(
            self.run, title=f"{self.recipe.title}: {self.run.name}", settings=about,
            state=f"{state}, step {self.done} of {self.total}",
        )  # fmt: skip
