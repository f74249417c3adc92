"""The monitor: advice on synthetic histories, balance values against brute force, log on resume, console."""

from __future__ import annotations

import io
import itertools
import json
import math
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from fastgan import monitor
from fastgan.monitor import PATIENCE, PAUSE, WARM_UP, Monitor, expected_balance, nonfinite, warnings

LSGAN = {"D_A": 0.25, "D_B": 0.25}


class Terminal(io.StringIO):
    """A text stream that claims to be a terminal of 80 columns."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def healthy(count: int, seed: int = 0) -> list[dict[str, float]]:
    """Single-batch values of an ordinary LSGAN CycleGAN run: D falls from 0.3 to 0.1 with heavy scatter."""
    rng = np.random.default_rng(seed)
    records = []
    for i in range(count):
        level = 0.1 + 0.2 * math.exp(-i / 20)
        records.append(
            {
                "G_A": rng.lognormal(math.log(0.4), 0.4),
                "D_A": level * rng.lognormal(0, 0.7),
                "D_B": min(level * rng.lognormal(0, 0.7), 0.6),
                "grad_G_A": 8 * rng.lognormal(0, 0.6) + 60 * math.exp(-i),
                "grad_D_A": 0.8 * rng.lognormal(0, 0.8),
                "diversity_B": 0.7 * rng.lognormal(0, 0.3),
                "wait_share": 0.02,
            }
        )
    return records


def over_time(records: list[dict[str, float]], balance: dict[str, float]) -> list[str]:
    return [text for i in range(len(records)) for text in warnings(records[: i + 1], balance)]


@pytest.mark.parametrize("seed", range(5))
def test_healthy_runs_are_silent(seed):
    assert over_time(healthy(200, seed), LSGAN) == []


def test_late_and_balanced_states_are_silent():
    # D at 0.02 to 0.04 is the usual end of an LSGAN run; at balance it scatters with its batches
    late = [{"D_A": 0.02 + 0.02 * (i % 2)} for i in range(20)]
    balanced = [{"D_A": 0.25 + 0.01 * math.sin(i)} for i in range(20)]
    assert over_time(late, LSGAN) == over_time(balanced, LSGAN) == []


@pytest.mark.parametrize(
    "name, value, kind, advice",
    [
        ("D_A", 0.004, "D wins (D_A)", "--lr-d"),
        ("D_A", 0.5, "G wins (D_A)", "--lr-d"),
        ("D_A", 0.2501, "D has given up (D_A)", "--lr-d"),
        ("diversity_B", 0.03, "outputs collapse (B)", "checkpoint"),
        ("diversity", 0.03, "outputs collapse", "checkpoint"),
        ("grad_G_A", 1e-4, "gradients of G_A vanish", "--lr"),
        ("grad_G_A", 5e4, "gradients of G_A explode", "--lr"),
        ("wait_share", 0.4, "data is slow", "--load-size"),
    ],
)
def test_warning_fires_once_sustained(name, value, kind, advice):
    before = healthy(20)
    for record in before:
        record.setdefault(name, 0.7)
    bad = [dict(record, **{name: value}) for record in healthy(PATIENCE, 1)]
    assert warnings(before + bad[:-1], LSGAN) == []
    (text,) = warnings(before + bad, LSGAN)
    assert text.partition(":")[0] == kind
    assert advice in text
    assert "\n" not in text
    # one good report in between starts the count again
    assert warnings(before + bad[:2] + healthy(1, 2) + bad[:2], LSGAN) == []


def test_gaps_and_short_histories_are_silent():
    bad = [{"D_A": 0.001, "grad_G": 0.0}] * PATIENCE
    assert len(warnings(bad, LSGAN)) == 2  # a gradient of zero needs no history to be judged
    assert warnings(bad[1:], LSGAN) == warnings([], LSGAN) == []
    gap = [*bad[:-1], {"D_A": None, "grad_G": float("nan")}]
    assert warnings(gap, LSGAN) == []
    assert warnings(bad, {}) == warnings(bad, None) == [t for t in warnings(bad, LSGAN) if "grad" in t]
    # a critic's loss is a difference: no value of it says who wins
    assert warnings([{"D": -3.0}] * 9, {"D": 0.0}) == []


def test_nonfinite():
    assert nonfinite({"a": 1.0, "b": math.nan, "c": -math.inf, "d": 0.0}) == ["b", "c"]


@pytest.mark.parametrize(
    "mode, label, weights",
    list(itertools.product(["lsgan", "vanilla", "hinge"], [1.0, 0.9, 0.7], [(0.5, 0.5), (0.3, 0.7)])),
)
def test_balance_is_the_best_constant(mode, label, weights):
    wr, wf = weights
    c = np.linspace(-4, 4, 800_001)
    if mode == "lsgan":
        loss = wr * (c - label) ** 2 + wf * c**2
    elif mode == "hinge":
        loss = wr * np.maximum(0, 1 - c) + wf * np.maximum(0, 1 + c)
    else:
        loss = wr * (label * np.logaddexp(0, -c) + (1 - label) * np.logaddexp(0, c)) + wf * np.logaddexp(0, c)
    # a grid of 1e-5 misses the minimum of a smooth curve by its square, that of a kink by itself
    assert expected_balance(mode, label, wr, wf) == pytest.approx(loss.min(), abs=1e-5)


def test_balance_known_values():
    assert expected_balance("lsgan") == 0.25
    assert expected_balance("vanilla") == pytest.approx(math.log(2))
    assert expected_balance("hinge") == 1.0
    assert expected_balance("wgan") == expected_balance("wgan-gp") == 0.0
    assert expected_balance("other") is None


def read(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def drive(run, first, last, values=None, **options):
    """Train for nothing from step `first` to `last` with a report every 10 steps; the console's text."""
    options = {"total_steps": 100, "batch_size": 2, "every": 10, "console": io.StringIO()} | options
    m = Monitor(run, start_step=first - 1, **options)
    for step in range(first, last + 1):
        m.tick(step, wait=1e-5)
        if m.due(step):
            m.report(step, 1 + step // 40, values or {"G_A": 0.5, "D_A": 0.125, "lr": 2e-4})
    m.close()
    m.close()
    return options["console"].getvalue()


def test_log_and_plain_lines(tmp_path):
    text = drive(
        tmp_path, 1, 100, {"G_A": 0.31, "D_A": 0.0031, "cycle_A": 12.34, "grad_G_A": 3.0, "lr": 2e-4}
    )
    records = read(tmp_path)
    assert [r["step"] for r in records] == list(range(10, 101, 10))
    assert records[4]["epoch"] == 2
    assert records[3]["cycle_A"] == 12.34
    assert all(r["img_per_s"] > 0 and 0 <= r["wait_share"] <= 1 for r in records)
    assert [r["time"] for r in records] == sorted(r["time"] for r in records)
    lines = [line for line in text.splitlines() if line.startswith("step ")]
    assert len(lines) == 10
    assert lines[0].startswith("step 10/100 · epoch 1 · ")
    assert lines[-1].split(" · ")[4] == "eta 0:00"
    assert lines[0].endswith("G_A 0.31 D_A 0.003 cycle_A 12.3")
    assert "\r" not in text


def test_plain_lines_stay_narrow_and_ascii(tmp_path):
    many = {f"loss_number_{i}": 123456.789 for i in range(9)} | {"D_A": 0.2, "G_A": 1.0}
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, "ascii", newline="\n")
    m = Monitor(tmp_path, total_steps=1_000_000, batch_size=2, every=10, console=out)
    m.tick(1, wait=0.0)
    m.report(1, 1, many)
    m.close()
    (line,) = raw.getvalue().decode("ascii").splitlines()
    assert len(line) <= 100
    assert "G_A 1.00 D_A 0.20" in line


def test_resume_drops_later_and_broken_lines(tmp_path):
    drive(tmp_path, 1, 60)
    path = tmp_path / "log.jsonl"
    with path.open("ab") as file:
        file.write(b'{"step": 70, "epo')
    before = [json.loads(line) for line in path.read_text().splitlines()[:6]]
    drive(tmp_path, 41, 60)
    records = read(tmp_path)
    assert [r["step"] for r in records] == [10, 20, 30, 40, 50, 60]
    assert records[:4] == before[:4]
    assert records[4]["time"] >= before[3]["time"]
    assert not list(tmp_path.glob("*.tmp"))
    # an untouched log is continued as it is; a new run starts empty
    drive(tmp_path, 61, 70)
    assert [r["step"] for r in read(tmp_path)] == [10, 20, 30, 40, 50, 60, 70]
    drive(tmp_path, 1, 10)
    assert [r["step"] for r in read(tmp_path)] == [10]


def test_clock_goes_on(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 10, "epoch": 1, "time": 1000.5}\nnot json\n[1]\n')
    drive(tmp_path, 11, 20)
    assert [r["step"] for r in read(tmp_path)] == [10, 20]
    assert 1000.5 <= read(tmp_path)[1]["time"] < 1010


def test_nonfinite_is_null(tmp_path):
    drive(tmp_path, 1, 10, {"G_A": math.nan, "D_A": math.inf, "cycle_A": 1.0})
    (record,) = read(tmp_path)
    assert record["G_A"] is None and record["D_A"] is None and record["cycle_A"] == 1.0
    assert record["nonfinite"] == ["G_A", "D_A"]


def test_warnings_are_shown_logged_and_paused(tmp_path):
    text = drive(tmp_path, 1, 200, {"D_A": 0.001}, total_steps=200, balance=LSGAN)
    warned = [r["step"] for r in read(tmp_path) if "warnings" in r]
    assert warned == [10 * PATIENCE, 10 * (PATIENCE + PAUSE)]
    assert text.count("warning: D wins (D_A): ") == 2
    # the pause outlives a restart
    drive(tmp_path, 201, 210, {"D_A": 0.001}, total_steps=300, balance=LSGAN)
    assert "warnings" not in read(tmp_path)[-1]


def test_a_fresh_discriminator_may_guess_badly():
    # the first steps of ordinary runs: D's loss several times its balance value
    reports = [{"step": 10 * k, "D_A": 0.9} for k in range(1, 40)]
    first = next(k for k in range(len(reports)) if warnings(reports[:k], LSGAN))
    assert reports[first - PATIENCE]["step"] == WARM_UP + 10


def test_report_returns_what_it_showed(tmp_path):
    m = Monitor(tmp_path, total_steps=9, batch_size=1, every=1, balance=LSGAN, console=io.StringIO())
    found = []
    for step in range(1, PATIENCE + 2):
        m.tick(step, wait=0.0)
        found.append(len(m.report(step, 1, {"D_A": 0.001, "D_B": 0.001})))
    m.close()
    assert found == [0] * (PATIENCE - 1) + [2, 0]
    with pytest.raises(ValueError, match="after close"):
        m.report(9, 1, {})


def test_speed_and_wait_share(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(monitor, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    m = Monitor(tmp_path, total_steps=100, batch_size=4, every=5, console=(out := io.StringIO()))
    # the first step takes a minute of compilation, which must not count as speed
    for step, (duration, wait) in enumerate([(60.0, 50.0), *[(0.5, 0.1)] * 9], 1):
        now[0] += duration
        m.tick(step, wait=wait)
        if m.due(step):
            m.report(step, 1, {})
    m.close()
    first, second = read(tmp_path)
    assert (first["img_per_s"], first["wait_share"], first["time"]) == (8.0, 0.2, 62.0)
    assert (second["img_per_s"], second["wait_share"], second["time"]) == (8.0, 0.2, 64.5)
    # 90 steps of half a second
    assert out.getvalue().splitlines()[1] == "step 10/100 · epoch 1 · 8.0 img/s · wait 20.0 % · eta 0:45"


def test_report_after_a_single_step(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(monitor, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    m = Monitor(tmp_path, total_steps=1, batch_size=4, every=5, console=io.StringIO())
    now[0] += 2.0
    m.tick(1, wait=0.5)
    assert m.due(1)
    m.report(1, 1, {})
    m.close()
    assert read(tmp_path)[0]["img_per_s"] == 2.0


def test_terminal_bar(tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "_columns", lambda console: 80)
    out = Terminal()
    m = Monitor(tmp_path, total_steps=40, batch_size=2, every=10, console=out)
    assert m._bar is not None
    m._bar.dynamic_ncols, m._bar.ncols = False, 80
    m._bar.mininterval = 0.0
    for step in range(1, 21):
        m.tick(step, wait=0.0)
        if step % 10 == 0:
            m.report(step, 1, {"D_A": 0.2, "cycle_A": 1.5, "G_A": 0.31})
    m.note("a line for the person")
    m.close()
    frames = out.getvalue().replace("\n", "\r").split("\r")
    assert max(map(len, frames)) <= 80
    assert "a line for the person" in [f.strip() for f in frames]
    last = [f for f in frames if "%|" in f][-1]
    assert " 50%|" in last and "20/40" in last and "img/s · wait 0 % · G_A 0.31" in last


def test_tick_is_cheap(tmp_path):
    out = Terminal()
    m = Monitor(tmp_path, total_steps=50_000, batch_size=1, console=out)
    best = math.inf
    for block in range(5):
        begin = time.process_time()
        for i in range(2000):
            m.tick(2000 * block + i + 1, wait=1e-4)
        best = min(best, (time.process_time() - begin) / 2000)
    m.close()
    assert best < 20e-6


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    drive(tmp_path, 1, 20, {"G_A": 0.5, "D_A_real": 0.9, "grad_G_A": 2.0, "lr": 1e-4}, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags == {
        "loss/G_A",
        "verdict/D_A_real",
        "grad/G_A",
        "lr/lr",
        "speed/img_per_s",
        "speed/wait_share",
    }
    assert [(e.step, e.value) for e in events.Scalars("loss/G_A")] == [(10, 0.5), (20, 0.5)]


def test_tensorboard_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r'^.*pip install "fastgan\[tensorboard\]"$'):
        Monitor(tmp_path / "run", total_steps=1, batch_size=1, tensorboard=True)
    assert not (tmp_path / "run").exists()
