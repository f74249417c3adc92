"""What a launch compiles to for a GPU that is not here: registers, spills, shared memory and its main loop.

Launches are recorded from the package's own functions, run on meta tensors, and specialised by Triton's own
code for that, so that nothing is described twice. Used by the compile-only tests and by compile_table.py.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from fastgan_kernels import _gemm
from fastgan_kernels._gemm import Tile
from fastgan_kernels._layout import Conv
from fastgan_kernels._pointwise import Pointwise, accumulator
from triton import compile as compile_source
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

# bytes of shared memory that a program can have
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# what multiplies matrices: mma.sync, Hopper's wgmma, Blackwell's tcgen05
PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA")

# the convolutions of CycleGAN's ResNet generator, of PatchGAN (3 or 6 channels) and of U-Net-256, at 256x256;
# a transposed convolution stands as the one from its output to its input
LAYERS = {
    "ResNet down 1": Conv(256, 256, 64, 128, 3, 2, 1, "zeros"),
    "ResNet down 2": Conv(128, 128, 128, 256, 3, 2, 1, "zeros"),
    "ResNet block": Conv(64, 64, 256, 256, 3, 1, 1, "reflect"),
    "ResNet first": Conv(256, 256, 3, 64, 7, 1, 3, "reflect"),
    "ResNet last": Conv(256, 256, 64, 3, 7, 1, 3, "reflect"),
    "PatchGAN 2": Conv(128, 128, 64, 128, 4, 2, 1, "zeros"),
    "PatchGAN 3": Conv(64, 64, 128, 256, 4, 2, 1, "zeros"),
    "PatchGAN 4": Conv(32, 32, 256, 512, 4, 1, 1, "zeros"),
    "PatchGAN 5": Conv(31, 31, 512, 1, 4, 1, 1, "zeros"),
    "PatchGAN 1": Conv(256, 256, 3, 64, 4, 2, 1, "zeros"),
    "PatchGAN 1 of pairs": Conv(256, 256, 6, 64, 4, 2, 1, "zeros"),
    "U-Net down 4": Conv(32, 32, 256, 512, 4, 2, 1, "zeros"),
    "U-Net down 5": Conv(16, 16, 512, 512, 4, 2, 1, "zeros"),
    "U-Net down 6": Conv(8, 8, 512, 512, 4, 2, 1, "zeros"),
    "U-Net down 7": Conv(4, 4, 512, 512, 4, 2, 1, "zeros"),
    "U-Net down 8": Conv(2, 2, 512, 512, 4, 2, 1, "zeros"),
    "U-Net up 2": Conv(4, 4, 512, 1024, 4, 2, 1, "zeros"),
    "U-Net up 3": Conv(8, 8, 512, 1024, 4, 2, 1, "zeros"),
    "U-Net up 4": Conv(16, 16, 512, 1024, 4, 2, 1, "zeros"),
    "U-Net up 5": Conv(32, 32, 256, 1024, 4, 2, 1, "zeros"),
    "U-Net up 6": Conv(64, 64, 128, 512, 4, 2, 1, "zeros"),
    "U-Net up 7": Conv(128, 128, 64, 256, 4, 2, 1, "zeros"),
    "U-Net up 8": Conv(256, 256, 3, 128, 4, 2, 1, "zeros"),
}


@dataclass
class Launch:
    """A kernel, with what it is launched with."""

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def compile(self, architecture: int) -> Compiled:
        """For compute capability architecture / 10, as Triton's launcher would."""
        target = GPUTarget("cuda", architecture, 32)
        backend = make_backend(target)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, options = bind(*self.args, **self.kwargs)
        parsed, signature, constants, attributes = self.kernel._pack_args(
            backend, options, bound, specialization, options
        )
        source = ASTSource(self.kernel, signature, constants, attributes)
        compiled = compile_source(source, target=target, options=parsed.__dict__)
        cubin = compiled.asm["cubin"]
        usage = _cuobjdump("-res-usage", cubin)
        number = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        spills = number["STACK"] + number["LOCAL"]
        return Compiled(number["REG"], spills, compiled.metadata.shared, cubin)


@dataclass
class Compiled:
    """registers: of a thread. spills: bytes that a thread keeps in memory. shared: bytes of a program."""

    registers: int
    spills: int
    shared: int
    cubin: bytes

    @functools.cached_property
    def _instructions(self) -> list[tuple[int, str, int | None]]:
        # disassembled where somebody asks: a hundred times slower than the rest
        return _instructions(_cuobjdump("-sass", self.cubin))

    @property
    def code(self) -> Counter[str]:
        """Instructions of the kernel."""
        return Counter(name for _, name, _ in self._instructions)

    @property
    def loop(self) -> Counter[str]:
        """Instructions of the first innermost loop that multiplies matrices, or else of the longest innermost
        loop; empty where all loops are unrolled."""
        return _main_loop(self._instructions)


def count(code: Counter[str], *names: str) -> int:
    """Instructions with one of these opcodes."""
    return sum(number for name, number in code.items() if name.split(".")[0] in names)


def _cuobjdump(flag: str, cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, flag, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _instructions(sass: str) -> list[tuple[int, str, int | None]]:
    """(address, name, address that it branches to)."""
    found = []
    for address, name, operands in re.findall(
        r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", sass
    ):
        target = re.search(r"0x([0-9a-f]+)\s*$", operands) if name.startswith("BRA") else None
        found.append((int(address, 16), name, int(target[1], 16) if target else None))
    return found


def _main_loop(code: list[tuple[int, str, int | None]]) -> Counter[str]:
    spans = [(target, address) for address, _, target in code if target is not None and target < address]
    loops = [
        Counter(name for address, name, _ in code if begin <= address <= end)
        for begin, end in spans
        if not any((begin, end) != (b, e) and begin <= b and e <= end for b, e in spans)
    ]
    products = [loop for loop in loops if count(loop, *PRODUCTS)]
    main = products[:1] or sorted(loops, key=lambda loop: -loop.total())[:1]
    return main[0] if main else Counter()


@contextlib.contextmanager
def record(*modules: ModuleType) -> Iterator[list[Launch]]:
    """The launches that functions of the modules would make, instead of making them."""
    launches: list[Launch] = []
    with contextlib.ExitStack() as stack:
        for module in modules:
            for name, value in list(vars(module).items()):
                if re.fullmatch(r"_.*_kernel", name):
                    stack.enter_context(mock.patch.object(module, name, _Recorder(value, launches)))
        yield launches


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.launches.append(Launch(self.kernel, args, kwargs))


def record_product(
    kind: str, conv: Conv, tile: Tile, tma: bool, *, dtype: torch.dtype = torch.bfloat16, end: str = "most"
) -> list[Launch]:
    """The launches of one product of two images that meet two weight sets.

    kind: as for `tiles`, or "transposed", the input gradient run forward. end: "none", "statistics" (of an
    output), "pending" (sums of an input gradient behind an instance norm and a relu), or "most": all the work
    that the kind can do at its end.
    """

    def meta(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    sums = accumulator(dtype)
    rows, dz = meta(2 * conv.input.rows, conv.input.columns), meta(2 * conv.output.rows, conv.output.columns)
    packed, plan = meta(2, *conv.weight_shape), {"tile": tile, "tma": tma}
    capability = mock.patch.object(_gemm, "_capability", lambda x: (9, 0))
    with record(_gemm) as launches, capability:
        if kind == "weight_gradient":
            _gemm.weight_gradient(rows, dz, conv, 2, **plan)
        elif kind == "input_gradient":
            z = (
                None
                if end == "none" or conv.kind == "unrolled"
                else meta(2, conv.height, conv.width, conv.inputs)
            )
            norm, affine = meta(2, conv.inputs, of=sums), None
            pending = Pointwise(norm, norm, act="relu")
            if end == "most":
                affine = meta(2, conv.inputs, of=sums)
                seed = meta(1, of=torch.int64)
                pending = Pointwise(norm, norm, affine, affine, "leaky_relu", dropout=0.5, seed=seed)
            _gemm.input_gradient(dz, packed, conv, pending=None if z is None else pending, z=z, **plan)
        else:
            transposed = kind == "transposed"
            work: dict[str, Any] = {"statistics": end != "none" and conv.kind != "narrow"}
            if end == "most" and conv.kind != "narrow":
                work |= {"bias": meta(2, conv.inputs if transposed else conv.outputs, of=sums), "act": "tanh"}
            if transposed:
                _gemm.input_gradient(dz, packed, conv, crop=True, **work, **plan)
            else:
                _gemm.forward(rows, packed, conv, **work, **plan)
    return launches
