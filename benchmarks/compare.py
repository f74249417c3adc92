"""Whether the fast step trains as eager float32 does: python benchmarks/compare.py DIR

    DIR             folder with trainA/ and trainB/, images of at least --size pixels
    --steps 500     of CycleGAN with identity loss, batch 1
    --size, --ngf, --blocks       256, 64, 9 on a GPU; 64, 16, 3 on a CPU
    --out DIR       instead of benchmarks/results
    --resume FILE   the .json of a run that was cut off: what it has is not trained again

Four runs see the same random crops: eager float32; the fast step (bfloat16 autocast, on a GPU in a CUDA
graph) from the same initial weights; eager float32 from other initial weights; and, to tell what rounding
alone does, eager float32 from the first weights in NCHW, where sums are taken in another order. The band,
fixed before anything is measured: of every loss, the mean over 50 steps in the fast run stays as near to that
of the first run as the third run's does where it is farthest away. Adversarial training amplifies every
rounding, so no two runs that round differently stay together step by step; another draw of the weights is the
least change that a user would call the same training.

Writes compare_<machine>_<date>.json (all losses of all steps), .md, .png (curves and bands) and _samples.png.
Exits with 1 if a loss leaves its band.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
# run as a script, the folder of this file is on the path, not the root
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks._ladder import common, free  # noqa: E402
from benchmarks._ladder_report import machine_name  # noqa: E402
from benchmarks._machine import describe, free_name  # noqa: E402
from fastgan.config import UsageError, fail  # noqa: E402
from fastgan.data import DataError, list_images, read_images  # noqa: E402
from fastgan.data.augment import match_channels, resize  # noqa: E402
from fastgan.device import pick_precision  # noqa: E402
from fastgan.gallery import save_grid  # noqa: E402
from fastgan.recipes.cyclegan import CycleGAN, CycleGANConfig  # noqa: E402
from fastgan.step import Step  # noqa: E402

WINDOW = 50
LOSSES = ("G_A", "G_B", "D_A", "D_B", "cycle", "idt")
NHWC, NCHW = torch.channels_last, torch.contiguous_format
# name of a run: its initial weights, whether it is the fast step, and the layout
RUNS = {
    "eager fp32": (0, False, NHWC),
    "fast bf16": (0, True, NHWC),
    "eager fp32, other weights": (1, False, NHWC),
    "eager fp32, other order": (0, False, NCHW),
}
COLOURS = dict(zip(RUNS, ("#1f4e79", "#f28e2b", "#b0b0b0", "#59a14f")))
Curves = dict[str, list[float]]


def main(arguments: Sequence[str] | None = None) -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="compare.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, metavar="DIR")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--size", type=int, default=256 if cuda else 64)
    parser.add_argument("--ngf", type=int, default=64 if cuda else 16)
    parser.add_argument("--blocks", type=int, default=9 if cuda else 3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--resume", type=Path)
    given = parser.parse_args(arguments)
    if find_spec("matplotlib") is None:
        parser.error("the chart needs matplotlib: pip install -e '.[bench]'")
    try:
        if given.steps < 2 * WINDOW:
            raise UsageError(f"--steps must be at least {2 * WINDOW}, got {given.steps}")
        if given.size < 24 or given.size % 4:
            raise UsageError(f"--size must be a multiple of 4 from 24 on, got {given.size}")
        images = [read(given.data / name, given.size) for name in ("trainA", "trainB")]
    except (UsageError, DataError) as error:
        fail(error)
    options = [f"--{key} {getattr(given, key)}" for key in ("steps", "size", "ngf", "blocks")]
    command = " ".join(["python benchmarks/compare.py", shlex.quote(given.data.resolve().name), *options])
    config = CycleGANConfig(ngf=given.ngf, ndf=given.ngf, blocks=given.blocks, crop_size=given.size)
    device = torch.device("cuda" if cuda else "cpu")
    return compare(config, images, device, given.steps, given.out, command, given.resume)


def read(folder: Path, size: int) -> list[np.ndarray]:
    """RGB images (H, W, 3) of uint8, the shorter side reduced to three crops.

    Raises:
        DataError: no images, unreadable ones, others than grey or RGB of 8 bits, or smaller than a crop.
    """
    found = []
    for path in list_images(folder):
        for image in read_images(path):
            rgb = match_channels(image, 3)
            if rgb is None or rgb.dtype != np.uint8:
                raise DataError(f"{path}: is not an 8-bit grey or RGB image, convert or remove it")
            shorter = min(rgb.shape[:2])
            if shorter < size:
                raise DataError(f"{path}: is smaller than --size {size}, remove it or choose less")
            scale = min(1.0, 3 * size / shorter)
            found.append(resize(rgb, (round(rgb.shape[0] * scale), round(rgb.shape[1] * scale))))
    if not found:
        raise DataError(f"{folder}: holds no images, give a folder with trainA/ and trainB/")
    return found


def crops(images: Sequence[list[np.ndarray]], size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches of one random crop of each domain in [-1, 1], mirrored half of the time, NHWC."""
    rng = np.random.default_rng(seed)
    while True:
        batch = {}
        for name, domain in zip("AB", images):
            image = domain[rng.integers(len(domain))]
            top, left = (int(rng.integers(side - size + 1)) for side in image.shape[:2])
            crop = image[top : top + size, left : left + size]
            crop = crop[:, ::-1] if rng.random() < 0.5 else crop
            x = torch.from_numpy(crop.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
            batch[name] = x.contiguous(memory_format=torch.channels_last)
        yield batch


def train(
    config: CycleGANConfig, images: Sequence[list[np.ndarray]], device: torch.device, steps: int, name: str
) -> tuple[Curves, dict[str, Any], dict[str, Tensor]]:
    """One run of RUNS: its losses by step, how it went, and its translations of four fixed crops."""
    seed, fast, layout = RUNS[name]
    autocast = pick_precision("bf16" if fast else "fp32", device)
    recipe = CycleGAN(config)
    torch.manual_seed(seed)
    step = Step(recipe, recipe.networks(3, 3), device=device, autocast=autocast, capture=fast)
    for net in step.nets.values():
        net.to(memory_format=layout)  # type: ignore[call-overload]
    source, found = crops(images, config.crop_size, seed=0), []
    begin = time.monotonic()
    for index in range(steps):
        batch = {key: x.to(device).contiguous(memory_format=layout) for key, x in next(source).items()}
        terms = common(step([batch], index))
        found.append(torch.stack([terms[key].float() for key in LOSSES]))
    values = torch.stack(found).cpu()
    seconds = time.monotonic() - begin
    curves = {key: [round(v, 6) for v in values[:, column].tolist()] for column, key in enumerate(LOSSES)}
    fixed = crops(images, config.crop_size, seed=1)
    shown = [next(fixed) for _ in range(4)]
    a, b = (torch.cat([batch[key] for batch in shown]).to(device) for key in "AB")
    with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
        fakes = step.nets["G_A"](a), step.nets["G_B"](b)
    # not the images that were given: they may not be ours to publish
    pictures = {"A to B": fakes[0], "B to A": fakes[1]}
    about = {"seconds": round(seconds, 1), "note": step.note}
    return curves, about, {key: x.float().cpu() for key, x in pictures.items()}


def smooth(values: Sequence[float]) -> np.ndarray:
    """Means over WINDOW steps, one for each step from the WINDOW-th on."""
    return np.convolve(np.asarray(values, np.float64), np.full(WINDOW, 1 / WINDOW), mode="valid")


def judge(curves: dict[str, Curves]) -> dict[str, dict[str, Any]]:
    """Of every loss the half width of its band, how far the fast run is from the first one and where, the
    mean of that over the mean for other weights, and whether it stays inside."""
    first, fast, other, order = (curves[name] for name in RUNS)
    found = {}
    for key in LOSSES:
        apart = np.abs(smooth(other[key]) - smooth(first[key]))
        off = np.abs(smooth(fast[key]) - smooth(first[key]))
        found[key] = {
            "band": float(apart.max()),
            "farthest": float(off.max()),
            "at_step": int(off.argmax()) + WINDOW,
            "farthest_of_other_order": float(np.abs(smooth(order[key]) - smooth(first[key])).max()),
            "mean_ratio": float(off.mean() / apart.mean()),
            # a loss that is no number is in no band
            "inside": bool(off.max() <= apart.max()),
        }
    return found


def compare(
    config: CycleGANConfig,
    images: Sequence[list[np.ndarray]],
    device: torch.device,
    steps: int,
    out: Path,
    command: str,
    resume: Path | None = None,
) -> int:
    """Trains the four runs and writes what they did; returns the exit code."""
    out.mkdir(parents=True, exist_ok=True)
    machine = describe() | {"threads": torch.get_num_threads()}
    path = free_name(out, machine, "compare_") if resume is None else resume.with_suffix("")
    settings = {"size": config.crop_size, "ngf": config.ngf, "blocks": config.blocks, "steps": steps}
    run: dict[str, Any] = {"command": command, "machine": machine, "settings": settings, "runs": {}}
    columns: dict[str, Tensor] = {}
    if resume is not None:
        run = json.loads(resume.read_text(encoding="utf-8"))
        if run["command"] != command:
            fail(f"--resume {resume}: was made by {run['command']}, give the same")
    curves: dict[str, Curves] = {name: found["losses"] for name, found in run["runs"].items()}
    for name in RUNS:
        if name in curves:
            continue
        curves[name], about, pictures = train(config, images, device, steps, name)
        free(device)
        print(f"{name}: {steps} steps in {about['seconds']} s", flush=True)
        about["commit"] = machine["commit"]
        run["runs"][name] = about | {"losses": curves[name]}
        if RUNS[name][0] == 0 and RUNS[name][2] == NHWC:
            kind = name.partition(" ")[2]
            columns |= {f"{key} {kind}": x for key, x in pictures.items()}
        path.with_suffix(".json").write_text(json.dumps(run) + "\n", encoding="utf-8")
    run["verdict"] = judge(curves)
    path.with_suffix(".json").write_text(json.dumps(run) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(page(run), encoding="utf-8")
    chart(run, curves, path.with_suffix(".png"))
    if columns:
        save_grid(Path(f"{path}_samples.png"), {caption: columns[caption] for caption in sorted(columns)})
    print(page(run))
    print(f"{path}.json, .md, .png and _samples.png")
    return 0 if all(found["inside"] for found in run["verdict"].values()) else 1


def page(run: dict[str, Any]) -> str:
    """The verdict as markdown."""
    m, s = run["machine"], run["settings"]
    lines = [
        f"# Fast step beside eager fp32 on {machine_name(m)}, {m['date'][:10]}",
        "",
        f"    {run['command']}",
        "",
        f"Commit {m['commit']}, torch {m['torch']}. CycleGAN {s['size']}x{s['size']}, ngf {s['ngf']}, "
        f"{s['blocks']} blocks, batch 1, identity loss, {s['steps']} steps on the same random crops: "
        + "; ".join(f"{k} {v['seconds']} s{_note(v)}" for k, v in run["runs"].items())
        + ".",
        "",
        f"Band: the mean of a loss over {WINDOW} steps in the fast run is compared with that of eager fp32 "
        "from the same weights; half its width is the farthest that eager fp32 from other weights comes away "
        "from that. Other order: the farthest of eager fp32 from the same weights in NCHW. Last column: mean "
        "distance of the fast run over that of other weights.",
        "",
        "| loss | half width of the band | farthest of the fast run | at step | inside | other order "
        "| distances |",
        "|---|---:|---:|---:|---|---:|---:|",
    ]
    for key, found in run["verdict"].items():
        lines.append(
            f"| {key} | {found['band']:.4f} | {found['farthest']:.4f} | {found['at_step']} | "
            f"{'yes' if found['inside'] else 'NO'} | {found['farthest_of_other_order']:.4f} | "
            f"{found['mean_ratio']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _note(about: dict[str, Any]) -> str:
    return f" ({about['note']})" if about["note"] else ""


def chart(run: dict[str, Any], curves: dict[str, Curves], path: Path) -> None:
    """Curves of every loss with its band, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    machine, s = run["machine"], run["settings"]
    figure.suptitle(
        f"CycleGAN {s['size']}x{s['size']}, ngf {s['ngf']}, {s['blocks']} blocks, {s['steps']} steps: "
        f"means over {WINDOW} steps\n"
        f"{machine_name(machine)}, {machine['date'][:10]}, torch {machine['torch']}"
    )
    for key, axis in zip(LOSSES, axes.flat):
        found = run["verdict"][key]
        for name, curve in curves.items():
            means = smooth(curve[key])
            x = np.arange(WINDOW, WINDOW + len(means))
            front = 2 if name in list(RUNS)[:2] else 1
            axis.plot(x, means, color=COLOURS[name], label=name, lw=1 + front / 4, zorder=front)
            if name == next(iter(RUNS)):
                low, high = means - found["band"], means + found["band"]
                axis.fill_between(x, low, high, color=COLOURS[name], alpha=0.13, lw=0, label="band")
        axis.set_title(f"{key}: {'inside' if found['inside'] else 'OUTSIDE'}", fontsize=11, loc="left")
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
