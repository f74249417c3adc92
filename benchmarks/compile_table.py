"""What every kernel compiles to, for GPUs that are not here.

    python benchmarks/compile_table.py            prints the table
    python benchmarks/compile_table.py --write    also into benchmarks/results/compile_<version of triton>.md

One row per kernel, tile, form and architecture at the layers of CycleGAN and pix2pix at 256x256, in bfloat16:
registers of a thread, bytes that it spills, shared memory of a program, instructions of the main loop.
The compile-only tests check all that can be chosen; the table shows the likely first choices.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import triton

sys.path.insert(0, str(Path(__file__).parents[1]))

from fastgan_kernels import _halo, _norm
from fastgan_kernels._gemm import tiles
from fastgan_kernels._layout import Conv, image_layout
from fastgan_kernels._pointwise import Pointwise

from benchmarks._compile import LAYERS, PRODUCTS, Compiled, Launch, count, record, record_product

ABOUT = """bfloat16. `end`: what is fused behind the product, nothing or all it can do (bias, activation and
statistics; of an input gradient the sums of the norm before it). `loop`: instructions of the main loop, and
of them the products of matrices, loads and arithmetic. Compiled, not run: nothing here was measured on a GPU.
Made by `python benchmarks/compile_table.py --write`.
"""
RESULTS = Path(__file__).with_name("results")
# architecture, through tensor descriptors
FORMS = [(80, False), (90, False), (90, True), (100, True)]
SHOWN = ("ResNet block", "ResNet down 2", "ResNet first", "ResNet last")
MIX = {
    "products": PRODUCTS,
    "UTMALDG": ("UTMALDG",),
    "LDGSTS": ("LDGSTS",),
    "LDS, LDSM": ("LDS", "LDSM"),
    "STS": ("STS", "STSM"),
    "LDG": ("LDG",),
    "float": (
        "FADD",
        "FMUL",
        "FFMA",
        "FSETP",
        "FSEL",
        "FMNMX",
        "MUFU",
        "HADD2",
        "HMUL2",
        "HFMA2",
        "F2FP",
        "F2F",
    ),
}
HEAD = [
    "kernel",
    "layer",
    "end",
    "tile",
    "warps, stages",
    "form",
    "sm",
    "registers",
    "spills",
    "shared KB",
    "loop",
]


def products(first: int) -> Iterator[tuple[str, str, str, str, str, int, Launch]]:
    """The matrix products at the shown layers with the first few of their tiles."""
    for name in SHOWN:
        conv = LAYERS[name]
        kinds = ["forward", "input_gradient", "weight_gradient"]
        kinds += ["transposed"] if conv.kind == "wide" and conv.stride == 2 else []
        for kind in kinds:
            ends = ["none"] if kind == "weight_gradient" or conv.kind == "unrolled" else ["none", "most"]
            for architecture, tma in FORMS:
                own = "input_gradient" if kind == "transposed" else kind
                for tile in tiles(own, conv, torch.bfloat16, (architecture // 10, 0), 4)[:first]:
                    for end in ends:
                        size = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
                        text = f"{tile.num_warps}, {tile.num_stages}"
                        for launch in record_product(kind, conv, tile, tma, end=end):
                            yield (
                                f"{name} {kind}",
                                end,
                                size,
                                text,
                                "TMA" if tma else "pointers",
                                architecture,
                                launch,
                            )


def passes() -> Iterator[tuple[str, str, str, str, str, int, Launch]]:
    """The bandwidth kernels at the size of a residual block, two networks with two images each; the update
    of an inner weight of unet_256, a batch of four images."""

    def meta(*shape: int, of: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    conv: Conv = LAYERS["ResNet block"]
    x = meta(4, 256, 64, 64).contiguous(memory_format=torch.channels_last)
    planes, affine = meta(4, 256, of=torch.float32), meta(2, 256, of=torch.float32)
    pending = Pointwise(planes, planes, affine, affine, "relu")
    image = image_layout(64, 64, 256)
    modules = [
        importlib.import_module(f"fastgan_kernels.{op}")
        for op in ("instance_norm_act", "reflect_pad2d", "channel_layer_norm_act")
    ]
    norm, pad, layer_norm = modules
    with record(_halo, _norm, *modules) as launches, mock.patch.object(norm, "runs_kernel", lambda x: True):
        with mock.patch.object(pad, "runs_kernel", lambda x: True):
            pad._backward._init_fn(pad._forward._init_fn(x, [1, 1, 1, 1]), [1, 1, 1, 1])
        y, mean, rstd = norm._forward._init_fn(x, None, None, None, 1e-5, "relu", 0.2)
        norm._backward._init_fn(y, x, mean, rstd, None, None, None, 1e-5, "relu", 0.2)
        rows = _halo.write(x, conv.input, pending, x)
        _halo.apply(x, x, pending, x)
        _halo.finish(_halo.statistics(x), 64 * 64, 1e-5)
        g = meta(4 * conv.gradient.rows, conv.gradient.columns)
        _halo.fold(g, conv.gradient, x)
        _halo.reduce(g, conv.gradient, pending, x, None, x, True)
        _halo.gradient(g, conv.gradient, pending, conv.output, x, means=meta(4, 2, 256, of=torch.float32))
        _halo.gradient(rows[: 4 * image.rows], image, pending, image, x)
    named = [("4x256x64x64", launch) for launch in launches]
    # behind the last upsampling of MUNIT's decoder at 256x256
    x, gamma = meta(4, 64, 256, 256).contiguous(memory_format=torch.channels_last), meta(64)
    runs = mock.patch.object(layer_norm, "runs_kernel", lambda x: True)
    with record(_halo, _norm, layer_norm) as launches, runs:
        y, mean, rstd = layer_norm._forward._init_fn(x, gamma, gamma, 1e-5, "relu", 0.2)
        layer_norm._backward._init_fn(y, x, mean, rstd, gamma, gamma, 1e-5, "relu", 0.2)
    named += [("4x64x256x256", launch) for launch in launches]
    adam, crop = (importlib.import_module(f"fastgan_kernels.{op}") for op in ("adam_step", "crop_images"))
    p, copy, step = meta(512, 512, 4, 4, of=torch.float32), meta(512, 512, 4, 4), meta(of=torch.float32)
    with record(adam) as launches, mock.patch.object(adam, "runs_kernel", lambda x: True):
        adam._forward._init_fn([p], [p], [p], [p], [step], [copy], step, 0.5, 0.999, 1e-8)
    named += [("512x512x4x4", launch) for launch in launches]
    with record(crop) as launches, mock.patch.object(crop, "runs_kernel", lambda x: True):
        store, records = meta(10**6, of=torch.uint8), meta(4, 6, of=torch.int64)
        crop._forward._init_fn(store, records, 3, 256, 256, 0.0, 255.0, True, True, 0, torch.bfloat16)
    named += [("4x3x256x256", launch) for launch in launches]
    for layer, launch in named:
        blocks = [str(v) for k, v in launch.kwargs.items() if k.startswith("BLOCK")]
        for architecture in (80, 90, 100):
            yield (
                layer,
                "",
                "x".join(blocks),
                str(launch.kwargs.get("num_warps", 4)),
                "",
                architecture,
                launch,
            )


def row(
    layer: str, end: str, tile: str, warps: str, form: str, architecture: int, launch: Launch
) -> list[str]:
    compiled: Compiled = launch.compile(architecture)
    loop: Counter[str] = compiled.loop or compiled.code
    mix = [str(count(loop, *names)) for names in MIX.values()]
    shared = f"{compiled.shared / 1024:.0f}"
    whole = "" if compiled.loop else " (unrolled)"
    return [
        f"`{launch.name}`", layer, end, tile, warps, form, str(architecture), str(compiled.registers),
        str(compiled.spills), shared, f"{loop.total()}{whole}", *mix,
    ]  # fmt: skip


def table(first: int) -> str:
    head = [*HEAD, *MIX]
    lines = [head, ["---"] * len(head)]
    seen = set()
    for entry in (*products(first), *passes()):
        found = row(*entry)
        if tuple(found) not in seen:
            seen.add(tuple(found))
            lines.append(found)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="also write the table under benchmarks/results/")
    parser.add_argument("--first", type=int, default=1, help="likely tiles of each product")
    arguments = parser.parse_args()
    text = table(arguments.first)
    print(text, end="")
    if arguments.write:
        path = RESULTS / f"compile_{triton.__version__}.md"
        path.write_text(f"# What the kernels compile to: Triton {triton.__version__}\n\n{ABOUT}\n{text}")


if __name__ == "__main__":
    main()
