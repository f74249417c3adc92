"""Compiles what the ops would launch for GPUs that are not here, and fails where ptxas spills registers.

The launches are recorded from the ops themselves, run on meta tensors, so that nothing is described twice.
The set: every kernel, whole planes (the largest that fit: most registers) and chunks, both layouts,
float32 and bfloat16, with every optional input for three generations of GPU; without the optional inputs, and
the tile of small planes, for one. float64 is not in the set: it serves the tests and may be slow.
"""

import importlib
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from fastgan_kernels._op import HAS_TRITON, INTERPRET, triton

if not HAS_TRITON or INTERPRET:
    pytest.skip("needs Triton's compiler", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
DTYPES = list(POINTERS)
LAYOUTS = [torch.contiguous_format, torch.channels_last]
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def record(op: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, list[Launch]]:
    """The bodies of the forward and the backward op, and the launches that they will make."""
    module = importlib.import_module(f"fastgan_kernels.{op}")
    launches: list[Launch] = []
    monkeypatch.setattr(module, "runs_kernel", lambda x: True)
    for name, value in list(vars(module).items()):
        if re.fullmatch(r"_.*_kernel", name):
            monkeypatch.setattr(module, name, Recorder(value, launches))
    return module._forward._init_fn, module._backward._init_fn, launches


def stack_bytes(launch: Launch, architecture: int, folder: Path) -> int:
    """Compiles a launch, specialised as Triton would; returns the memory a thread spills registers to."""
    kernel, args, kwargs = launch
    values = dict(zip(kernel.arg_names, args)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name not in kwargs and value is not None and value != 1:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[(index,)] = value
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": kwargs.get("num_warps", 4)}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    # a hundred times faster than looking for STL and LDL in a disassembly, and it finds the same kernels
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (stack,), (local,) = re.findall(r"STACK:(\d+)", usage), re.findall(r"LOCAL:(\d+)", usage)
    return int(stack) + int(local)


def check(launches: list[Launch], architecture: int, folder: Path, kernels: set[str]) -> None:
    assert {kernel.__name__ for kernel, _, _ in launches} == kernels
    for launch in launches:
        assert stack_bytes(launch, architecture, folder) == 0, (launch[0].__name__, launch[2])


def empty(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("shape, pad", [((1, 256, 64, 64), (1,) * 4), ((1, 3, 4, 4), (3,) * 4)])
def test_reflect_pad2d(shape, pad, architecture, dtype, layout, monkeypatch, tmp_path):
    forward, backward, launches = record("reflect_pad2d", monkeypatch)
    backward(forward(empty(shape, dtype, layout), pad), pad)
    check(launches, architecture, tmp_path, {"_reflect_pad2d_fwd_kernel", "_reflect_pad2d_bwd_kernel"})


WHOLE = {"_instance_norm_act_fwd_kernel", "_instance_norm_act_bwd_kernel"}
CHUNKED = WHOLE | {
    "_instance_norm_act_fwd_partial_kernel",
    "_instance_norm_act_fwd_combine_kernel",
    "_instance_norm_act_bwd_partial_kernel",
}
NORM_TILES = [
    (torch.contiguous_format, (1, 64, 128, 128), WHOLE),
    (torch.contiguous_format, (2, 64, 256, 256), CHUNKED),
    (torch.channels_last, (1, 256, 32, 32), WHOLE),
    (torch.channels_last, (4, 256, 64, 64), CHUNKED),
]
NORM_CASES = [(*tile, a, True) for tile in NORM_TILES for a in (80, 90, 100)]
NORM_CASES += [(*tile, 90, False) for tile in NORM_TILES]
NORM_CASES += [(layout, (1, 512, 4, 4), WHOLE, 90, True) for layout in LAYOUTS]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout, shape, kernels, architecture, everything", NORM_CASES)
def test_instance_norm_act(layout, shape, kernels, architecture, everything, dtype, monkeypatch, tmp_path):
    forward, backward, launches = record("instance_norm_act", monkeypatch)
    x = empty(shape, dtype, layout)
    parameter = empty(shape[1:2], dtype, torch.contiguous_format) if everything else None
    options = (1e-5, "leaky_relu" if everything else "relu", 0.2)
    y, mean, rstd = forward(x, parameter, parameter, x if everything else None, *options)
    backward(y, x, mean, rstd, parameter, parameter, y if everything else None, *options)
    check(launches, architecture, tmp_path, kernels)
