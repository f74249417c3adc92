"""Where the time of fastgan's step goes: every kernel (on a CPU: every operation) by torch.profiler, in
groups beside their floors."""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity

from benchmarks._ladder import Rung, System, fair, free
from benchmarks._measure import Ceilings, synchronize

# words in the name of a kernel or operation, first match; everything else is "other"
GROUPS = {
    "optimiser": ("adam", "optimizer"),
    "passes": ("norm", "bn_", "pad", "halo", "relu", "tanh", "dropout"),
    "convolutions": ("gemm", "wgrad", "dgrad", "fprop", "cudnn", "cutlass", "xmma", "nvjet", "aten::mm"),
}  # fmt: skip


def group(name: str) -> str:
    """The group that a kernel's name belongs to."""
    lower = name.lower()
    if "conv" in lower:
        return "convolutions"
    return next((key for key, words in GROUPS.items() if any(word in lower for word in words)), "other")


def profile(
    system: System, rung: Rung, device: torch.device, ceilings: Ceilings, *, steps: int
) -> dict[str, Any]:
    """Milliseconds per step of every kernel of a rung and of every group, with the group's floor."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with fair():
        run = rung.build(system, device)
        for _ in range(4):
            run()
        synchronize(device)
        with torch.profiler.profile(activities=activities) as found:
            for _ in range(steps):
                run()
            synchronize(device)
    del run
    free(device)
    kernels = []
    for event in found.key_averages():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        # spans that a profiler draws over kernels are no kernels
        if on_device != cuda or (cuda and event.is_user_annotation):
            continue
        micro = event.self_device_time_total if cuda else event.self_cpu_time_total
        if micro:
            kernels.append({"name": event.key, "calls": event.count / steps, "ms": micro / 1e3 / steps})
    kernels.sort(key=lambda k: -k["ms"])
    floors = system.work.seconds(ceilings.flop_per_second, ceilings.bytes_per_second)
    sums: dict[str, float] = dict.fromkeys((*GROUPS, "other", "step"), 0.0)
    for kernel in kernels:
        kernel["group"] = group(kernel["name"])
        sums[kernel["group"]] += kernel["ms"]
    sums["step"] = sum(kernel["ms"] for kernel in kernels)
    groups = {
        name: {"ms": ms, "floor_ms": 1e3 * floors[name] if name in floors else None}
        for name, ms in sums.items()
    }
    return {"system": str(system), "rung": rung.name, "steps": steps, "groups": groups, "kernels": kernels}
