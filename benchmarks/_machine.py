"""What a measurement ran on: GPU, driver, clocks, power, other processes, CPU, versions, commit and date.

The state of the GPU is NVML's (package nvidia-ml-py). What cannot be read is None, with the reason under
"unavailable": a benchmark on a machine without NVML still runs.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
READINGS = (
    "driver", "sm_mhz", "memory_mhz", "max_sm_mhz", "max_memory_mhz", "power_w", "power_limit_w",
    "temperature_c", "other_processes", "other_processes_mib",
)  # fmt: skip


def describe() -> dict[str, Any]:
    """The machine now, as plain values for JSON. `gpu` is None where torch sees none."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        # of the last minute: what else ran
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gpu": gpu_state() if torch.cuda.is_available() else None,
    }


def free_name(out: Path, machine: dict[str, Any], begin: str = "") -> Path:
    """<begin><gpu or cpu>_<date> in a folder, with a number where a run of the day is there already."""
    name = machine["gpu"]["name"] if machine["gpu"] else "cpu"
    name = re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia")).strip("-")
    stem = f"{begin}{name}_{machine['date'][:10]}"
    number = 1
    while (out / f"{stem}{f'_{number}' * (number > 1)}.json").exists():
        number += 1
    return out / f"{stem}{f'_{number}' * (number > 1)}"


def gpu_state() -> dict[str, Any]:
    """The first GPU that torch sees: name, READINGS in MHz, W, degrees Celsius and MiB, "unavailable".

    other_processes counts those with another number than this one's; in a container, where NVML reports the
    numbers of the host, that includes this one.
    """
    missing: dict[str, str] = {}
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    state: dict[str, Any] = {"name": name, **dict.fromkeys(READINGS), "unavailable": missing}
    try:
        import pynvml as nvml

        nvml.nvmlInit()
    except Exception as error:
        missing["nvml"] = _reason(error)
        return state

    def read(name: str, call: Callable[[], Any]) -> None:
        try:
            state[name] = call()
        except Exception as error:
            missing[name] = _reason(error)

    try:
        gpu = _handle(nvml)
        read("driver", lambda: nvml.nvmlSystemGetDriverVersion())
        read("sm_mhz", lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM))
        read("memory_mhz", lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM))
        read("max_sm_mhz", lambda: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM))
        read("max_memory_mhz", lambda: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_MEM))
        read("power_w", lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000)
        read("power_limit_w", lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000)
        read("temperature_c", lambda: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU))
        read("other_processes", lambda: len(_others(nvml, gpu)))
        # NVML gives no memory for a process that it may not look into
        read("other_processes_mib", lambda: sum(p.usedGpuMemory or 0 for p in _others(nvml, gpu)) // 2**20)
    except Exception as error:
        missing["nvml"] = _reason(error)
    finally:
        with contextlib.suppress(Exception):
            nvml.nvmlShutdown()
    return state


def _handle(nvml: Any) -> Any:
    # NVML counts all GPUs, torch only those of CUDA_VISIBLE_DEVICES
    if torch.cuda.is_available():
        with contextlib.suppress(Exception):
            return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
    return nvml.nvmlDeviceGetHandleByIndex(0)


def _others(nvml: Any, gpu: Any) -> list[Any]:
    return [p for p in nvml.nvmlDeviceGetComputeRunningProcesses(gpu) if p.pid != os.getpid()]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Short hash, with -dirty where files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    return None
