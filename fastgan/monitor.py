"""Watching a training run: terminal, log file, TensorBoard, and advice when a GAN goes wrong.

`<run>/log.jsonl` holds one JSON object per report: step, epoch, time (seconds of training, continued over
resumes), img_per_s, wait_share (part of the time spent waiting for data, 0 to 1), every logged value (null
where it is not finite; the names are then listed under "nonfinite"), and the warnings shown, if any. The
first report after a start also holds the balance values, for the page.

The advice comes from `warnings`, a pure function of the last reports. Its thresholds are loose on purpose: a
report may be a single batch of one image, so a rule wants all of the last `PATIENCE` reports on its side.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

PATIENCE = 5  # reports in a row before a rule speaks
PAUSE = 10  # reports before the same warning is shown again
HISTORY = 60  # reports that are remembered
WARM_UP = 200  # first steps, in which a fresh D is often worse than a constant verdict

# 4 % of the balance value: an LSGAN discriminator whose verdicts are 0.1 (rms) from its targets, or a vanilla
# one that is 97 % sure on average; healthy CycleGAN runs stay between 20 and 100 % of it, with single batches
# of one image below 4 %, but hardly five of them in a row
D_WINS = 0.04
# above the balance value D is worse than a constant verdict; noise alone does not keep it that far above
G_WINS = 1.5
# a constant verdict gives the balance value itself; a D that looks at its input scatters more between batches
GIVEN_UP = 0.01
COLLAPSED = 0.1  # spread of a generated batch over that of a real one; 0.4 to 1.2 where inputs differ
VANISHED = 1e-3  # gradient norm over its own earlier median: networks and loss weights differ too much for
EXPLODED = 100.0  # one absolute bound
DEAD = 1e-6  # norm at which Adam's eps (1e-8 per weight) swallows the gradient even of a small network
WAITING = 0.25  # share of the time spent waiting for images


def expected_balance(
    gan_mode: str, real_label: float = 1.0, real_weight: float = 0.5, fake_weight: float = 0.5
) -> float | None:
    """The loss of a discriminator that cannot tell real from generated: the best that a constant can reach.

    With weights wr, wf of the halves and the target r for real images: lsgan r^2 wr wf / (wr + wf); vanilla
    the cross-entropy of the share wr r / (wr + wf), times wr + wf; hinge 2 min(wr, wf); wgan, wgan-gp 0, as
    the critic's loss is a difference.

    Returns:
        The value; None for a mode that has no such value.
    """
    total = real_weight + fake_weight
    if gan_mode in ("wgan", "wgan-gp"):
        return 0.0
    if gan_mode == "hinge":
        return 2.0 * min(real_weight, fake_weight)
    if gan_mode == "lsgan":
        return real_label**2 * real_weight * fake_weight / total if total else 0.0
    if gan_mode == "vanilla":
        yes, no = real_weight * real_label, real_weight * (1.0 - real_label) + fake_weight
        return -sum(part * math.log(part / total) for part in (yes, no) if part > 0)
    return None


def nonfinite(values: Mapping[str, float]) -> list[str]:
    """Names of the values that are infinite or not a number."""
    return [name for name, value in values.items() if not math.isfinite(value)]


def _last(history: Sequence[Mapping[str, Any]], name: str, count: int = PATIENCE) -> list[float]:
    """The last `count` values of a name; empty unless all of them are there and finite."""
    found = [record.get(name) for record in history[-count:]]
    values = [float(v) for v in found if isinstance(v, (int, float)) and math.isfinite(v)]
    return values if len(values) == count else []


def _watch_balance(history: Sequence[Mapping[str, Any]], name: str, balance: float) -> Iterator[str]:
    losses = _last(history, name)
    if not losses or balance <= 0:
        return
    seen = f"(mean {statistics.fmean(losses):.2g}, balance {balance:.3g}) for {PATIENCE} reports"
    if max(losses) < D_WINS * balance:
        yield (
            f"D wins ({name}): {name} has been below {D_WINS:.0%} of its balance value {seen}, so G learns "
            "little from it; lower --lr-d, or smooth D's target with --real-label 0.9"
        )
    if min(losses) > G_WINS * balance and history[-PATIENCE].get("step", math.inf) > WARM_UP:
        yield (
            f"G wins ({name}): {name} has been above {G_WINS:g} times its balance value {seen}, so D is "
            "worse than guessing; raise --lr-d, lower --lr, or try --n-critic 2"
        )
    if all(abs(loss - balance) < GIVEN_UP * balance for loss in losses):
        yield (
            f"D has given up ({name}): {name} has stood at its balance value {seen}, as if D gave every "
            "image the same verdict; if the pictures are still poor, raise --lr-d or --ndf"
        )


def _watch_gradient(history: Sequence[Mapping[str, Any]], name: str) -> Iterator[str]:
    norms, network = _last(history, name), name.removeprefix("grad_")
    if not norms:
        return
    older = [float(r[name]) for r in history[:-PATIENCE] if r.get(name) and math.isfinite(r[name])]
    usual = statistics.median(older) if len(older) >= PATIENCE else 0.0
    if max(norms) < max(VANISHED * usual, DEAD):
        than = f"{usual / max(max(norms), 1e-30):.0f} times below their median" if usual else "almost zero"
        yield (
            f"gradients of {network} vanish: their norm is {max(norms):.1e}, {than}, so {network} no "
            "longer learns; go back to an earlier checkpoint with a lower --lr, or try --gan-mode lsgan"
        )
    elif usual and min(norms) > EXPLODED * usual:
        yield (
            f"gradients of {network} explode: their norm is {min(norms):.1e}, {min(norms) / usual:.0f} times "
            "above their median; go back to an earlier checkpoint with a lower --lr, or try --precision fp32"
        )


def warnings(history: Sequence[Mapping[str, Any]], balance: Mapping[str, float] | None = None) -> list[str]:
    """Advice on the last reports, oldest first; needs at least `PATIENCE` of them.

    Names looked at: the discriminator losses named in `balance`, `grad_*` (gradient norms), `diversity*`
    (spread of a batch of generated images over that of the real batch) and `wait_share`. A missing or null
    value silences a rule.

    Returns:
        One line each, "kind (network): what was seen; what to do". The part before the colon is its name.
    """
    if len(history) < PATIENCE:
        return []
    found: list[str] = []
    for name, value in (balance or {}).items():
        found += _watch_balance(history, name, value)
    for name in history[-1]:
        if name.startswith("grad_"):
            found += _watch_gradient(history, name)
        elif name.startswith("diversity"):
            spread = _last(history, name)
            if spread and max(spread) < COLLAPSED:
                side = name.removeprefix("diversity").strip("_")
                found.append(
                    f"outputs collapse{f' ({side})' if side else ''}: for {PATIENCE} reports the generated "
                    f"images of a batch have differed by less than {COLLAPSED:.0%} of what real ones do; go "
                    "back to an earlier checkpoint with a lower --lr, or raise --pool-size or --batch-size"
                )
    waits = _last(history, "wait_share")
    if waits and min(waits) > WAITING:
        found.append(
            f"data is slow: {statistics.fmean(waits):.0%} of the time goes into waiting for images; "
            "shrink them on disk to about --load-size, or use faster storage"
        )
    return found


def _read_log(path: Path, last_step: int) -> tuple[list[dict[str, Any]], bool]:
    """The reports up to a step, and whether the file holds anything else (later ones, an incomplete line)."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], False
    kept = []
    for line in lines:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            step = record.get("step") if isinstance(record, dict) else None
            if isinstance(step, int) and step <= last_step:
                kept.append(record)
    return kept, len(kept) != len(lines) - 1 or lines[-1] != b""


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds + 0.5), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _rank(name: str) -> int | None:
    """Place of a value on the terminal: losses of G, of D, then the others; None keeps it to the log file."""
    if re.match(r"(grad|diversity|lr)(_|$)|eval/|.*_(real|fake)$", name):
        return None
    return 0 if re.fullmatch(r"G(_[A-Z]|_GAN)?", name) else 1 if re.fullmatch(r"D(_[A-Z])?", name) else 2


def _summary(values: Mapping[str, float], room: int) -> str:
    """As many whole `name value` pairs as fit into `room` characters, the most telling first."""
    out = ""
    ranked = [(rank, name) for name in values if (rank := _rank(name)) is not None]
    for _, name in sorted(ranked, key=lambda item: item[0]):
        value = values[name]
        digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
        # two digits would show a discriminator that wins as 0.00
        text = f"{value:.{digits}f}" if abs(value) >= 0.095 or value == 0 else f"{value:.1g}"
        pair = f"{' ' if out else ''}{name} {text}"
        if len(out) + len(pair) > room:
            break
        out += pair
    return out


def _tag(name: str) -> str:
    if re.match(r"(grad|diversity|lr)(_|$)", name):
        return name.replace("_", "/", 1) if "_" in name else f"{name}/{name}"
    return f"verdict/{name}" if name.endswith(("_real", "_fake")) else f"loss/{name}"


class Monitor:
    """Shows and records a run; made anew at every start of it.

    On a resume at `start_step` the log keeps the lines up to that step, and the clock goes on from the last.
    """

    def __init__(
        self,
        run: Path,
        *,
        total_steps: int,
        start_step: int = 0,
        batch_size: int,
        every: int = 50,
        balance: dict[str, float] | None = None,
        tensorboard: bool = False,
        console: TextIO | None = None,
    ) -> None:
        """Open the log of a run folder, which is made if need be.

        Args:
            run: the run's folder.
            total_steps: step at which training ends.
            start_step: last step already done; 0 is a new run, whose log starts empty.
            batch_size: images per step, for images per second.
            every: steps between two reports, for `due`.
            balance: discriminator loss -> its value when neither side dominates (`expected_balance`).
            tensorboard: also write scalars under `<run>/tensorboard`.
            console: where to write; default: stderr. A progress bar on a terminal, plain lines elsewhere.

        Raises:
            ValueError: tensorboard is wanted and not installed.
        """
        self.total_steps, self.batch_size, self.every = total_steps, batch_size, every
        self._balance, self._told = dict(balance or {}), False
        self._events = _event_writer(run, start_step) if tensorboard else None
        self._console: TextIO = console or sys.stderr
        run.mkdir(parents=True, exist_ok=True)
        path = run / "log.jsonl"
        kept, stale = _read_log(path, start_step)
        if stale:
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8", newline="\n")
            temporary.replace(path)
        self._log: TextIO | None = path.open("a", encoding="utf-8", newline="\n")
        self._history: list[dict[str, Any]] = kept[-HISTORY:]
        self._earlier = float(kept[-1].get("time") or 0.0) if kept else 0.0
        self._begin = self._since = time.perf_counter()
        self._step = start_step
        self._ticks = self._images = 0
        self._wait = 0.0
        self._speed = 0.0  # images per second, averaged over the last reports, for the time left
        self._dot = " · " if _can_write(self._console, "·") else " | "
        self._bar: tqdm[Any] | None = None
        if self._console.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                file=self._console,
                mininterval=0.5,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}",
            )

    def due(self, step: int) -> bool:
        """Whether a report belongs after this step."""
        return step % self.every == 0 or step == self.total_steps

    def tick(self, step: int, *, wait: float) -> None:
        """Count a finished step, of which `wait` seconds went into waiting for data. Call once per step."""
        if self._ticks == 0:
            # the first step holds compilation and tuning, which say nothing about the speed of the others
            self._since = time.perf_counter()
        else:
            self._images += self.batch_size
            self._wait += wait
        self._ticks += 1
        if self._bar is not None:
            self._bar.update(step - self._step)
        self._step = step

    def pause(self, seconds: float) -> None:
        """Leave time that was not spent on training out of the speed."""
        self._since += seconds

    def report(self, step: int, epoch: int, values: Mapping[str, float]) -> list[str]:
        """Log the values of a step and show them.

        Args:
            step: step just finished.
            epoch: epoch it belongs to.
            values: name -> number; names are those of the module's docstring and of `warnings`.

        Returns:
            Warnings that are new, or old enough to be repeated; they have been shown and logged.
        """
        if self._log is None:
            raise ValueError("Monitor: report() after close()")
        now = time.perf_counter()
        elapsed = max(now - self._since, 1e-9)
        numbers = {name: float(value) for name, value in values.items()}
        # one step since the start: its own duration is all there is
        images = self._images or self._ticks * self.batch_size
        speed = images / max(elapsed if self._images else now - self._begin, 1e-9)
        self._speed = speed if not self._speed else 0.7 * self._speed + 0.3 * speed
        share = min(self._wait / elapsed, 1.0)
        record: dict[str, Any] = {
            "step": step, "epoch": epoch, "time": round(self._earlier + now - self._begin, 2),
            "img_per_s": _short(speed), "wait_share": round(share, 4),
        }  # fmt: skip
        record |= {name: _short(value) for name, value in numbers.items()}
        bad = nonfinite(numbers)
        if bad:
            record["nonfinite"] = bad
        if self._balance and not self._told:
            record["balance"], self._told = self._balance, True
        self._history = [*self._history[1 - HISTORY :], record]
        found = self._news(warnings(self._history, self._balance))
        if found:
            record["warnings"] = found
        self._log.write(json.dumps(record, allow_nan=False) + "\n")
        self._log.flush()
        if self._events is not None:
            for name, value in {**numbers, "speed/img_per_s": speed, "speed/wait_share": share}.items():
                self._events.add_scalar(name if "/" in name else _tag(name), value, step)
        self._show(step, epoch, numbers, speed, share)
        for text in found:
            self.note(f"warning: {text}")
        self._since, self._images, self._wait = time.perf_counter(), 0, 0.0
        return found

    def _news(self, found: list[str]) -> list[str]:
        recent = [text for record in self._history[-PAUSE:] for text in record.get("warnings") or ()]
        shown = {text.partition(":")[0] for text in recent}
        return [text for text in found if text.partition(":")[0] not in shown]

    def _show(self, step: int, epoch: int, numbers: Mapping[str, float], speed: float, share: float) -> None:
        rate = f"{speed:.1f} img/s" if speed < 1000 else f"{speed:.0f} img/s"
        if self._bar is not None:
            wait = f"wait {100 * share:.0f} %"
            # 36: percentage, time left, separators, and six columns of bar
            room = _columns(self._console) - 2 * len(str(self.total_steps)) - len(rate) - len(wait) - 36
            parts = [rate, wait, _summary(numbers, room)]
            self._bar.set_postfix_str(self._dot.join(p for p in parts if p), refresh=False)
            return
        left = (self.total_steps - step) * self.batch_size / max(self._speed, 1e-9)
        parts = [f"step {step}/{self.total_steps}", f"epoch {epoch}", rate, f"wait {100 * share:.1f} %"]
        parts.append(f"eta {_clock(left)}")
        line = self._dot.join(parts)
        summary = _summary(numbers, 100 - len(line) - len(self._dot))
        print(line + (self._dot + summary if summary else ""), file=self._console, flush=True)

    def note(self, text: str) -> None:
        """Show a line without breaking the bar."""
        if self._bar is not None:
            tqdm.write(text, file=self._console)
        else:
            print(text, file=self._console, flush=True)

    def close(self) -> None:
        """Leave the bar in its final state and close the files; a second call does nothing."""
        if self._log is None:
            return
        self._log.close()
        self._log = None
        if self._events is not None:
            self._events.close()
        if self._bar is not None:
            self._bar.close()


def _event_writer(run: Path, start_step: int) -> Any:
    try:
        # imported here: an optional extra that takes a second to import
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            '--tensorboard needs the tensorboard package: pip install "fastgan[tensorboard]"'
        ) from error
    return SummaryWriter(str(run / "tensorboard"), purge_step=start_step + 1 if start_step else None)


def _short(value: float) -> float | None:
    """Six digits are more than a curve shows and keep the log small."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _can_write(console: TextIO, text: str) -> bool:
    try:
        text.encode(getattr(console, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _columns(console: TextIO) -> int:
    try:
        return os.get_terminal_size(console.fileno()).columns
    except (OSError, ValueError):
        return shutil.get_terminal_size((80, 24)).columns
