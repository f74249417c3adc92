"""Estimated training memory of CycleGAN and pix2pix on a GPU: python benchmarks/memory.py

Nothing is run: the step goes over tensors without data (see fastgan.memory), on any machine, for three sizes
and every --memory, in about a minute. Writes memory_estimate.json and .md, the same for the same versions,
under benchmarks/results (--out).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
# run as a script, the folder of this file is on the path, not the root
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from fastgan.memory import GB, RESERVE, estimate  # noqa: E402
from fastgan.recipes.cyclegan import CycleGAN, CycleGANConfig  # noqa: E402
from fastgan.recipes.pix2pix import Pix2Pix, Pix2PixConfig  # noqa: E402
from fastgan.stack import MEMORY  # noqa: E402

SIZES = (256, 512, 1024)
# as published: ngf 64, 9 blocks (CycleGAN), 8 halvings (pix2pix)
RECIPES = {
    "cyclegan": lambda size: CycleGAN(CycleGANConfig(load_size=size, crop_size=size)),
    "pix2pix": lambda size: Pix2Pix(Pix2PixConfig(load_size=size, crop_size=size)),
}


def measure() -> list[dict[str, Any]]:
    """One record per recipe, mode and size: the fields of `fastgan.memory.Estimate`."""
    records = []
    for name, make in RECIPES.items():
        for mode in MEMORY:
            for size in SIZES:
                found = estimate(make(size), (3, 3), (size, size), memory=mode, autocast=torch.bfloat16)
                records.append({"recipe": name, "size": size, **dataclasses.asdict(found)})
    return records


def table(records: Sequence[dict[str, Any]], recipe: str) -> list[str]:
    """Markdown: gigabytes at the highest moment by mode (rows) and size (columns)."""
    head = ["`--memory`", *(f"{size}x{size}" for size in SIZES)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for mode in MEMORY:
        peaks = {r["size"]: r["peak_bytes"] for r in records if (r["recipe"], r["memory"]) == (recipe, mode)}
        cells = [f"`{mode}`", *(f"{peaks[size] / GB:.1f} GB" for size in SIZES)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def markdown(run: dict[str, Any]) -> str:
    lines = [
        "# Memory of a training step, estimated",
        "",
        "    python benchmarks/memory.py",
        "",
        f"Default settings, batch 1, 3 channels, bf16, torch {run['torch']}. Not measured on a GPU: the step "
        f"on tensors without data, along a GPU's path, and {RESERVE / GB:.0f} GB for libraries, which is an "
        "assumption. Images kept on the device and what `torch.compile` takes come on top.",
    ]
    for recipe in RECIPES:
        lines += ["", f"## {recipe}", "", *table(run["records"], recipe)]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="memory.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    given = parser.parse_args(arguments)
    run = {"command": "python benchmarks/memory.py", "torch": torch.__version__, "records": measure()}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "memory_estimate.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    text = markdown(run)
    (given.out / "memory_estimate.md").write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
