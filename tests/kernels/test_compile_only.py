"""Compiles what the ops would launch for GPUs that are not here, and fails where ptxas spills registers.

The launches are recorded from the ops themselves, run on meta tensors, so that nothing is described twice. For each
kernel the set has the tile with the most registers (the largest plane that fits in one program), the chunked form,
both layouts, float32 and bfloat16, with every optional input; without them on one GPU. float64 is not in the set: it
is for tests, and allowed to be slow.
"""

import importlib
import re
import subprocess
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from fastgan_kernels._op import HAS_TRITON, INTERPRET

pytestmark = pytest.mark.skipif(not HAS_TRITON or INTERPRET, reason="needs Triton's compiler")

ARCHITECTURES = (80, 90, 100)
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
LAYOUTS = (torch.contiguous_format, torch.channels_last)


class Recorder:
    """Stands in for a kernel: keeps what it is launched with."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Any:
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def prepare(op: str) -> tuple[ModuleType, list[Any]]:
        module = importlib.import_module(f"fastgan_kernels.{op}")
        monkeypatch.setattr(module, "runs_kernel", lambda x: True)
        for name in [name for name in vars(module) if name.endswith("_kernel") and name.startswith("_")]:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), launches))
        return module, launches

    return prepare


def compile_launch(launch: tuple[Any, tuple[Any, ...], dict[str, Any]], architecture: int) -> str:
    """The machine code of a launch, specialised as Triton would (1 is a constant, 16 divides, None is no pointer)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, args, kwargs = launch
    options = {"num_warps": kwargs.get("num_warps", 4)}
    values = dict(zip(kernel.arg_names, args)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            kind = {**DTYPES, torch.float64: "fp64"}[value.dtype]
            signature[name] = f"*{kind}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int) and value != 1 and name not in kwargs:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[(index,)] = value
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return compiled.asm["cubin"]
