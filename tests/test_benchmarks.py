"""The benchmarks without a GPU: the page they write, the machine they describe, and that the implementations
they compare compute the same and count their work right."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastgan_kernels import _tune
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    _machine,
    _peers,
    _report,
    bench_conv_norm_act,
    bench_conv_transpose_norm_act,
    bench_residual_block,
    run,
    tiling,
)

ROOT = Path(__file__).parents[1]
OPS = sorted(path.stem for path in (ROOT / "kernels/fastgan_kernels").glob("[!_]*.py"))
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")


def record(implementation: str, us: float, **more: object) -> dict:
    info = {
        "case": "64^2 1x1", "direction": "fwd", "implementation": implementation, "us": us, "timed": "graph",
        "eager_us": 5 * us, "tflop_per_s": 483.2, "gb_per_s": 1200.5, "ceiling": "flop",
        "percent_of_ceiling": 60.4, "times_floor": 1.66, "peak_mib": 4.5, "right": True,
        "ceiling_tflop_per_s": 790.1, "ceiling_gb_per_s": 4300.2,
    }  # fmt: skip
    return {"name": f"bench[{implementation}]", "extra_info": info | more}


def machine(**gpu: object) -> dict:
    state = {"name": "NVIDIA H200", "driver": "580.1", "sm_mhz": 345, "unavailable": {}, **gpu}
    return {
        "date": "2026-11-21T10:00:00+00:00", "commit": "abc1234", "cpu": "a CPU", "torch": "2.13.0",
        "triton": "3.6.0", "cuda": "13.0", "cudnn": 91000, "gpu": state,
    }  # fmt: skip


def page(records: list[dict], not_measured: tuple | list = ()) -> str:
    return _report.markdown(
        {
            "command": "python benchmarks/run.py --quick",
            "before": machine(unavailable={"power_w": "NotSupported"}),
            "after": machine(sm_mhz=1980),
            "under_load": {"sm_mhz": 1755, "power_w": 640.5},
            "ops": {"conv_norm_act": records},
            "not_measured": list(not_measured),
        }
    )


def row(text: str, begin: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(begin)]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_of_the_table():
    text = page([record("triton", 10.04), record("cudnn", 20.0, peak_mib=9.0), record("compile", 15.06)])
    head, cells = row(text, "| case"), row(text, "| 64^2")
    assert dict(zip(head, cells)) == {
        "case": "64^2 1x1", "": "fwd", "triton µs": "10.0", "cudnn µs": "20.0", "compile µs": "15.1",
        "speed-up": "1.50", "rate": "483.2 TFLOP/s", "% of ceiling": "60.4", "× floor": "1.66",
        "MiB": "4.5 / 4.5", "launched µs": "50.2",
    }  # fmt: skip
    assert "Ceilings: 790.1 TFLOP/s (bf16 product of 8192^3), 4300.2 GB/s (copy)." in text


def test_work_bound_by_bytes_shows_its_bandwidth():
    assert "1200.5 GB/s" in row(page([record("triton", 1.0, ceiling="bytes")]), "| 64^2")


def test_cases_and_directions_have_lines_of_their_own():
    records = [
        record("triton", 1.0),
        record("triton", 2.0, direction="bwd"),
        record("cudnn", 3.0, case="8^2"),
    ]
    text = page(records)
    assert row(text, "| 64^2 1x1 | fwd")[2:5] == ["1.0", "-", "-"]
    assert row(text, "| 64^2 1x1 | bwd")[2:5] == ["2.0", "-", "-"]
    # what was not measured is no number
    assert row(text, "| 8^2") == ["8^2", "fwd", "-", "3.0"] + ["-"] * 6


def test_a_time_that_means_something_else_says_so():
    text = page([record("triton", 10.0, timed="eager"), record("cudnn", 20.0, right=False)])
    assert row(text, "| 64^2")[2:4] == ["10.0 eager", "20.0 wrong"]


def test_the_page_says_where_it_comes_from():
    text = page([record("triton", 1.0)])
    assert text.startswith("# Ops on NVIDIA H200, 2026-11-21\n\n    python benchmarks/run.py --quick\n")
    assert "Commit abc1234, driver 580.1, CUDA 13.0, cuDNN 91000, torch 2.13.0, triton 3.6.0, a CPU." in text
    assert row(text, "| before")[1:4] == ["345", "-", "-"]
    assert row(text, "| under load")[1:4] == ["1755", "-", "640.5"]
    assert row(text, "| after")[1:4] == ["1980", "-", "-"]
    assert "Not readable: power_w (NotSupported)." in text and "Not measured" not in text


def test_what_was_not_measured_is_listed_by_reason():
    missing = [(f"bench[{k}]", "out of time") for k in range(3)] + [("bench[x]", "CUDA error: launch failed")]
    lines = page([record("triton", 1.0)], missing).partition("## Not measured\n\n")[2].splitlines()
    assert lines == ["- out of time: bench[0] and 2 more", "- CUDA error: launch failed: bench[x]"]


def test_a_run_without_any_result_still_has_a_page():
    text = _report.markdown(
        {
            "command": "", "before": machine() | {"gpu": None}, "after": machine(), "under_load": None,
            "ops": {}, "not_measured": [("conv_norm_act", "no case was measured")],
        }
    )  # fmt: skip
    assert "- no case was measured: conv_norm_act" in text


def test_a_second_run_of_the_day_has_a_name_of_its_own(tmp_path):
    for name in ("h200_2026-11-21", "h200_2026-11-21_2", "h200_2026-11-21_3"):
        path = _machine.free_name(tmp_path, machine())
        assert path == tmp_path / name
        path.with_suffix(".json").touch()
    assert _machine.free_name(tmp_path, machine() | {"gpu": None}, "ladder_").name == "ladder_cpu_2026-11-21"


def test_the_shipped_table_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(_tune, "SHIPPED", tmp_path / "tuned.json")
    monkeypatch.setattr(_tune, "_gpu", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    monkeypatch.setattr(_tune, "_tables", {"NVIDIA H200": {"conv(1,)": {"cudnn": 2.5, "triton": None}}})
    other = {"NVIDIA A100": {"conv(1,)": {"cudnn": 9.0}}}
    _tune.SHIPPED.write_text(json.dumps(other))
    run.write_table(tmp_path / "out")
    assert json.loads(_tune.SHIPPED.read_text()) == other
    run.write_table(None)
    expected = other | {"NVIDIA H200": {"conv(1,)": {"cudnn": 2.5, "triton": None}}}
    assert json.loads(_tune.SHIPPED.read_text()) == expected
    assert json.loads((tmp_path / "out/tuned.json").read_text()) == expected
    assert _tune._load(_tune.SHIPPED, "NVIDIA H200") == expected["NVIDIA H200"]


def test_the_machine_without_nvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    state = _machine.gpu_state()
    assert set(state) == {"name", "unavailable", *_machine.READINGS}
    assert all(state[reading] is None for reading in _machine.READINGS)
    assert "pynvml" in state["unavailable"]["nvml"]
    described = _machine.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["torch"] == torch.__version__ and described["cpu"]


class NVML(SimpleNamespace):
    """Stands in for pynvml, on a card that does not tell its power."""

    def __getattr__(self, name: str):
        if name.startswith("NVML_"):
            return name
        answers = {
            "nvmlInit": None, "nvmlShutdown": None, "nvmlDeviceGetHandleByIndex": "card 0",
            "nvmlSystemGetDriverVersion": "580.1", "nvmlDeviceGetEnforcedPowerLimit": 700000,
            "nvmlDeviceGetTemperature": 41,
            "nvmlDeviceGetComputeRunningProcesses": [
                SimpleNamespace(pid=os.getpid(), usedGpuMemory=2**30),
                SimpleNamespace(pid=-5, usedGpuMemory=3 * 2**20),
                SimpleNamespace(pid=-6, usedGpuMemory=None),
            ],
        }  # fmt: skip
        clocks = {"NVML_CLOCK_SM": 1980, "NVML_CLOCK_MEM": 3201}

        def call(*arguments: object) -> object:
            if name.endswith("ClockInfo"):
                return clocks[str(arguments[1])] + ("Max" in name)
            return answers[name]

        return call


def test_the_machine_with_nvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", NVML())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _machine.gpu_state() == {
        "name": None, "driver": "580.1", "sm_mhz": 1980, "memory_mhz": 3201, "max_sm_mhz": 1981,
        "max_memory_mhz": 3202, "power_w": None, "power_limit_w": 700.0, "temperature_c": 41,
        "other_processes": 2, "other_processes_mib": 3,
        "unavailable": {"power_w": "KeyError: 'nvmlDeviceGetPowerUsage'"},
    }  # fmt: skip


def small(layer: _peers.Layer) -> _peers.Layer:
    return replace(
        layer, inputs=min(layer.inputs, 12), outputs=min(layer.outputs, 10), size=min(layer.size, 10)
    )


WORKS = [
    *(bench_conv_norm_act.work(small(a), 2, 2) for a in _peers.RESNET + _peers.PATCHGAN + _peers.PIX2PIX),
    *(bench_conv_transpose_norm_act.work(small(a), 2, 2) for a in _peers.RESNET_UP + _peers.UNET_UP),
    bench_conv_norm_act.work(small(_peers.RESNET[3]), 1, 2),
    bench_residual_block.work(1, 1, 1),
    bench_residual_block.work(2, 2, 1),
]


@pytest.mark.parametrize("work", WORKS, ids=lambda w: f"{w.op} {w.case} {w.sets}x{w.images}")
def test_implementations_compute_the_same(work):
    if work.op == "residual_block":
        # its layers are fixed: channels and pixels do not matter here
        work = replace(work, shape=(6, 8, 8), parameters=[(6, 6, 3, 3)] * len(work.parameters))
    for implementation in ("triton", "cudnn"):
        _, _, _, errors = _peers.checked(work, implementation, torch.device("cpu"), torch.float32)
        # float32 sums of at most a few hundred products, in another order
        assert errors["fwd"] < 1e-5 and errors["bwd"] < 1e-4, implementation


def test_a_wrong_result_shows():
    work = bench_conv_norm_act.work(small(_peers.RESNET[3]), 2, 1)
    right = work.ours
    forward = replace(work, ours=lambda x, parameters: 2 * right(x, parameters))
    # the two networks swapped
    swapped = replace(work, ours=lambda x, parameters: right(x, [p.flip(0) for p in parameters]))
    for wrong in (forward, swapped):
        _, _, _, errors = _peers.checked(wrong, "triton", torch.device("cpu"), torch.float32)
        assert errors["fwd"] > _peers.LIMITS["fwd"] and errors["bwd"] > _peers.LIMITS["bwd"]


@pytest.mark.parametrize("work", WORKS, ids=lambda w: f"{w.op} {w.case} {w.sets}x{w.images}")
def test_flop_are_those_that_torch_counts(work):
    x = torch.empty((1, *work.shape), device="meta")
    with FlopCounterMode(display=False) as counter:
        work.peer(x, [torch.empty(shape, device="meta") for shape in work.parameters])
    assert counter.get_total_flops() == work.flop


def pytest_in(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    # a worker of pytest-xdist would hand down that it is one, where nothing may be timed
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@without_gpu
def test_without_a_gpu_the_op_benchmarks_are_skipped():
    done = pytest_in("-q", "--benchmark-only", *(f"benchmarks/bench_{op}.py" for op in OPS))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(OPS)} skipped" in done.stdout
    assert done.stdout.count("op benchmarks: skipped, torch sees no GPU") == 1


@without_gpu
def test_without_a_gpu_nothing_is_written(tmp_path, capsys):
    run.main(["--out", str(tmp_path / "out")])
    assert capsys.readouterr().out == "No GPU that torch can use: nothing is measured, nothing is written.\n"
    assert not (tmp_path / "out").exists()


def test_every_case_has_a_name_of_its_own():
    for module in (bench_conv_norm_act, bench_conv_transpose_norm_act, bench_residual_block):
        names = [case.id for case in module.CASES]
        assert len(set(names)) == len(names)
        assert any(case.marks for case in module.CASES), "a quick run measures every op"


def test_the_page_of_large_images(tmp_path):
    """Ways that stop at a size have no line and no error beyond it."""
    common = {"rss_before_bytes": 4e8, "disk_bytes": 0, "seconds": 2.04, "cpu_seconds": 3.9, "threads": 2}
    records = [
        {"way": way, "side": side, "tile": None, "peak_rss_bytes": side * 1e6} | common
        for way, side in [("whole", 512), ("tiled", 512), ("tiled", 4096)]
    ]
    records[1] |= {"largest_error": 3.51e-5, "step_mean_levels": 0.25, "step_max_levels": 0.5, "tile": 512}
    state = _machine.describe()
    text = tiling.markdown({"command": "", "machine": state, "after": state, "records": records})
    assert row(text, "| 512 | exact")[3:] == [
        "0.51", "0.40", "0.00", "2.0", "3.9", "3.51e-05", "0.25", "0.5",
    ]  # fmt: skip
    assert row(text, "| 4096")[1:4] == ["exact tiles", "-", "4.10"] and row(text, "| 4096")[-1] == "-"
    tiling.chart(records, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000


def test_the_picture_of_brightness_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tiling, "PICTURE", (256, 128))
    assert tiling.main(["--picture", "--steps", "0", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("tiling_steps_*.json")
    found = json.loads(file.read_text())["steps"]
    assert found["naive"]["step_mean_levels"] > 1000 * found["tiled"]["step_mean_levels"] > 0
    assert file.with_suffix(".png").exists()
