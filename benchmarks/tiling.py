"""Whole, tiled and naively blended translation of large images: python benchmarks/tiling.py

    --sizes 512 1024 2048 4096      sides of square images; the whole image only up to --whole-up-to (2048)
    --tile 512                      side of a tile
    --image FILE                    photograph, resized to each size; default: a generated picture
    --net FILE                      weights of a ResNet generator; default: random, ngf 64, 9 blocks
    --picture                       brightness steps only, of a briefly trained network
    --out DIR                       instead of benchmarks/results

Every translation runs in a process of its own, whose time and highest resident memory (VmHWM of Linux) are
taken; results are compared with the whole image's where there is one. Writes tiling_<machine>_<date>.json
and .md after every translation, and .png (memory and time against size) at the end; --picture writes
tiling_steps_<...>.json and .png.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
# run as a script, the folder of this file is on the path, not the root
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks._machine import describe, free_name  # noqa: E402
from fastgan import tiling  # noqa: E402
from fastgan.inference import load_generator  # noqa: E402
from fastgan.layers import place  # noqa: E402
from fastgan.models import ResnetGenerator, init_weights  # noqa: E402

OVERLAP = 64  # pixels by which naive tiles overlap their neighbours on each side
# "contiguous" is the whole image in torch's other layout: on a CPU its statistics of large planes are the
# more exact ones (channels_last sums them in float32), so it is what the others are compared with
WAYS = {
    "contiguous": "whole image, NCHW",
    "whole": "whole image, channels_last",
    "tiled": "exact tiles",
    "naive": "naive tiles, overlapped and blended",
}
COLOURS = {"contiguous": "#8a8a8a", "whole": "#4292c6", "tiled": "#f28e2b", "naive": "#084594"}
# of the picture of brightness steps: side of the image and of a tile
PICTURE = 1024, 256


def network(file: Path | None) -> nn.Module:
    """The generator of a file, or the paper's 9-block network with weights of seed 0."""
    if file is not None:
        return load_generator(file, device="cpu", precision="fp32").net
    torch.manual_seed(0)
    net = ResnetGenerator(3, 3)
    # with the 0.02 of the recipe an untrained output is nearly one grey: this spreads it over [-1, 1]
    init_weights(net, "kaiming")
    return place(net, torch.device("cpu")).eval()


def picture(file: Path | None, side: int) -> Tensor:
    """(1, 3, side, side) in [-1, 1], channels last."""
    if file is not None:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC))
        x = torch.from_numpy(pixels.copy())[None].permute(0, 3, 1, 2)
        return x.float().div_(127.5).sub_(1).contiguous(memory_format=torch.channels_last)
    # bright and dark regions of many sizes
    torch.manual_seed(1)
    x = torch.zeros(1, 3, side, side)
    for cells in (2, 8, 64):
        x += torch.nn.functional.interpolate(
            torch.rand(1, 3, cells, cells) - 0.5, (side, side), mode="bilinear"
        )
    return x.clamp_(-1, 1).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def translated(way: str, net: nn.Module, x: Tensor, tile: int) -> Tensor:
    """The translation of x, (1, 3, H, W), the `tiled` way with its files in the system's temporary folder."""
    if way == "contiguous":
        return copy.deepcopy(net).to(memory_format=torch.contiguous_format)(x.contiguous())
    if way == "whole":
        return net(x)
    if way == "naive":
        return naive(net, x, tile)
    y = torch.empty_like(x)

    def write(box: tiling.Box, part: Tensor) -> None:
        y[:, :, box.top : box.bottom, box.left : box.right] = part

    def read(box: tiling.Box) -> Tensor:
        return x[:, :, box.top : box.bottom, box.left : box.right]

    tiling.run_tiles(net, read, write, (x.shape[2], x.shape[3]), tile)
    return y


def naive(net: nn.Module, x: Tensor, tile: int) -> Tensor:
    """Tiles translated each as an image of its own, overlapping by 2 * OVERLAP, blended linearly there."""
    height, width = x.shape[2:]
    total, weights = torch.zeros_like(x), torch.zeros(1, 1, height, width)
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            inner = tiling.Box(top, min(top + tile, height), left, min(left + tile, width))
            box = inner.grown(OVERLAP, height, width)
            rows = _ramp(box.top, box.bottom, height)
            weight = rows[:, None] * _ramp(box.left, box.right, width)
            part = net(x[:, :, box.top : box.bottom, box.left : box.right])
            total[:, :, box.top : box.bottom, box.left : box.right] += part * weight
            weights[:, :, box.top : box.bottom, box.left : box.right] += weight
    return total / weights


def _ramp(begin: int, end: int, length: int) -> Tensor:
    at = torch.arange(begin, end) + 0.5
    up = (at - begin) / (2 * OVERLAP) if begin > 0 else torch.ones(end - begin)
    down = (end - at) / (2 * OVERLAP) if end < length else torch.ones(end - begin)
    return torch.minimum(up, down).clamp_(max=1)


def steps(y: Tensor, true: Tensor, tile: int) -> dict[str, float]:
    """Brightness steps between neighbouring tiles, in grey levels of 255.

    The error of brightness, y - true averaged over the channels, is averaged over each tile; a step is the
    difference of two neighbours: 0 where the tiling is exact, whatever the picture.
    """
    error = (y - true).mean(1, keepdim=True) * 127.5
    means = torch.nn.functional.avg_pool2d(error, tile)[0, 0]
    found = torch.cat([means.diff(dim=0).flatten(), means.diff(dim=1).flatten()]).abs()
    return {
        "largest_error": (y - true).abs().max().item(),
        "step_mean_levels": found.mean().item() if len(found) else 0.0,
        "step_max_levels": found.max().item() if len(found) else 0.0,
    }


def trained(x: Tensor, target: Tensor, count: int) -> nn.Module:
    """A generator (6 blocks, ngf 16) after `count` Adam steps of L1 on crops of 128 pixels, seed 0."""
    torch.manual_seed(0)
    net = ResnetGenerator(3, 3, ngf=16, blocks=6)
    init_weights(net)
    net = place(net, torch.device("cpu"))
    adam = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(count):
        top, left = (int(torch.randint(0, side - 127, ())) for side in x.shape[2:])
        at = (..., slice(top, top + 128), slice(left, left + 128))
        adam.zero_grad()
        torch.nn.functional.l1_loss(net(x[at]), target[at]).backward()
        adam.step()
    return net.eval()


def show_steps(given: argparse.Namespace, name: Path) -> None:
    """Brightness steps of a network that was trained to recolour the picture: numbers and a small PNG."""
    side, tile = PICTURE
    x = picture(given.image, side)
    # red and blue exchanged, less contrast: a change of colour that needs no memory of where one is
    target = x.flip(1) * 0.8
    net = trained(x, target, given.steps)
    ys = {way: translated(way, net, x, tile) for way in WAYS}
    found = {way: steps(ys[way], ys["contiguous"], tile) for way in WAYS}
    run = {
        "command": _command(given), "machine": describe(), "side": side, "tile": tile, "overlap": OVERLAP,
        "training_steps": given.steps, "l1_to_target": (ys["contiguous"] - target).abs().mean().item(),
        "steps": found,
    }  # fmt: skip
    name.with_suffix(".json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    show(ys, found, tile, name.with_suffix(".png"))
    print(json.dumps(run["steps"], indent=1))


def show(ys: dict[str, Tensor], found: dict[str, dict[str, float]], tile: int, file: Path) -> None:
    """The translations, and below them how much brighter than the whole image's each one is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(12, 8.2), layout="constrained")
    exact = ys["contiguous"]
    side = exact.shape[-1]
    errors = {way: (ys[way] - exact).mean(1)[0] * 127.5 for way in ("naive", "tiled")}
    # both tilings on one scale: that of the naive one, without its few largest values
    end = max(float(errors["naive"].abs().flatten()[:: side // 64].quantile(0.98)), 0.1)
    for axis, way in zip(axes[0], ("contiguous", "naive", "tiled")):
        pixels = ys[way].clamp(-1, 1)[0].permute(1, 2, 0).add(1).mul(127.5).round().to(torch.uint8)
        axis.imshow(pixels.numpy(), extent=(0, side, side, 0))
        axis.set_title(WAYS[way])
    for axis, (way, error) in zip(axes[1, 1:], errors.items()):
        shown = axis.imshow(error.numpy(), cmap="RdBu_r", vmin=-end, vmax=end, extent=(0, side, side, 0))
        mean, most = found[way]["step_mean_levels"], found[way]["step_max_levels"]
        axis.set_title(f"steps between tiles: {mean:.2g} levels\non average, {most:.2g} at most", fontsize=11)
        for at in range(tile, side, tile):
            axis.axhline(at, color="black", linewidth=0.4)
            axis.axvline(at, color="black", linewidth=0.4)
    axes[1, 0].axis("off")
    label = "brighter (red) or darker (blue) than the\nwhole image's, levels of 255; lines: borders of tiles"
    figure.colorbar(shown, ax=axes[1, 0], location="bottom", fraction=0.1, aspect=14, label=label)
    for axis in (*axes[0], *axes[1, 1:]):
        axis.set(xticks=[], yticks=[])
    figure.savefig(file, dpi=75)
    pyplot.close(figure)


def one(way: str, side: int, tile: int, given: argparse.Namespace, keep: Path) -> None:
    """What a child process does: one translation, measured, kept as .npy; its record goes to stdout."""
    net, x = network(given.net), picture(given.image, side)
    before = _highest()
    start, used = time.perf_counter(), time.process_time()
    y = translated(way, net, x, tile)
    record = {
        "way": way, "side": side, "tile": tile if way in ("tiled", "naive") else None,
        "seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - used,
        "peak_rss_bytes": _highest(), "rss_before_bytes": before,
        "disk_bytes": tiling.disk_bytes(net, (side, side)) if way == "tiled" else 0,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    np.save(keep, y.numpy())
    print(json.dumps(record))


def _highest() -> int:
    """The highest resident memory of this process so far, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def chart(records: Sequence[dict[str, Any]], file: Path) -> None:
    """Highest memory and time against the side of the image, one line per way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, (memory, time_) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    sides = sorted({r["side"] for r in records})
    for axis, key, unit in ((memory, "peak_rss_bytes", 1e9), (time_, "seconds", 1)):
        for way, label in WAYS.items():
            points = sorted((r["side"], r[key] / unit) for r in records if r["way"] == way)
            if points:
                axis.plot(*zip(*points), marker="o", markersize=4, color=COLOURS[way], label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sides, [str(side) for side in sides])
        axis.set(xlabel="side of the square image, pixels")
        axis.grid(alpha=0.3)
    # the image itself is part of it, so it grows
    before = [max(r["rss_before_bytes"] for r in records if r["side"] == side) / 1e9 for side in sides]
    label = "before: libraries, weights, image"
    memory.plot(sides, before, color="black", linewidth=0.8, linestyle=":", label=label)
    memory.set(title="highest resident memory, GB", ylim=(0, None))
    time_.set(title="seconds", yscale="log")
    # plain numbers, between the powers of ten too
    time_.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    time_.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    time_.yaxis.set_minor_formatter(ticker.NullFormatter())
    memory.legend(fontsize=8)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def markdown(run: dict[str, Any]) -> str:
    """The page of a run, also of one that is not done yet."""
    m, after, records = run["machine"], run["after"], run["records"]
    lines = [
        f"# Large images, whole and in tiles: {m['date'][:10]}",
        "",
        f"    {run['command']}",
        "",
        f"Commit {m['commit']}, torch {m['torch']}, {m['cpu']}, {m['cores']} cores, {records[0]['threads']} "
        f"threads, fp32. Load {m['load']:.1f} before and {after['load']:.1f} at the end: where "
        "CPU seconds are well below seconds times threads, others were running.",
        "",
        "Each translation in a process of its own: memory is the highest resident memory of that process, "
        "libraries included. Errors in [-1, 1] and steps of brightness between neighbouring tiles, in grey "
        "levels of 255, against the whole image in NCHW.",
        "",
        "| side | way | tile | GB | of them before | disk GB | seconds | CPU seconds | largest error "
        "| step, mean | step, largest |",
        "|---:|---|---:|" + "---:|" * 8,
    ]
    for r in records:
        errors = [
            f"{r[key]:.3g}" if key in r else "-"
            for key in ("largest_error", "step_mean_levels", "step_max_levels")
        ]
        cells = [
            str(r["side"]), WAYS[r["way"]], str(r["tile"] or "-"), f"{r['peak_rss_bytes'] / 1e9:.2f}",
            f"{r['rss_before_bytes'] / 1e9:.2f}", f"{r['disk_bytes'] / 1e9:.2f}", f"{r['seconds']:.1f}",
            f"{r['cpu_seconds']:.1f}", *errors,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _command(given: argparse.Namespace) -> str:
    """What was called, with the names of files alone."""
    words = ["python benchmarks/tiling.py"]
    if given.picture:
        words.append(f"--picture --steps {given.steps}")
    else:
        words += ["--sizes", *map(str, given.sizes), f"--tile {given.tile}"]
        words.append(f"--whole-up-to {given.whole_up_to} --naive-up-to {given.naive_up_to}")
    words += [f"--{key} {file.name}" for key in ("image", "net") if (file := getattr(given, key))]
    return " ".join(words)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tiling.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 1024, 2048, 4096])
    parser.add_argument("--whole-up-to", type=int, default=2048)
    parser.add_argument("--naive-up-to", type=int, default=2048)
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--image", type=Path)
    parser.add_argument("--net", type=Path)
    parser.add_argument("--picture", action="store_true")
    parser.add_argument("--steps", type=int, default=300, help="of training, with --picture")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--one", nargs=3, metavar=("WAY", "SIDE", "NPY"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        one(given.one[0], int(given.one[1]), given.tile, given, Path(given.one[2]))
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    machine = describe()
    if given.picture:
        show_steps(given, free_name(given.out, machine, "tiling_steps_"))
        return 0
    name = free_name(given.out, machine, "tiling_")
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for side in given.sizes:
            for way in WAYS:
                whole = given.whole_up_to
                limit = {"whole": whole, "contiguous": whole, "naive": given.naive_up_to}.get(way, side)
                if side > limit:
                    continue
                record = _child(way, side, Path(folder), sys.argv[1:] if arguments is None else arguments)
                exact = Path(folder) / f"contiguous{side}.npy"
                if exact.exists():
                    files = (Path(folder) / f"{way}{side}.npy", exact)
                    record |= steps(*(torch.from_numpy(np.load(file)) for file in files), given.tile)
                records.append(record)
                print(json.dumps(record), flush=True)
                run = {
                    "command": _command(given),
                    "machine": machine,
                    "after": describe(),
                    "records": records,
                }
                name.with_suffix(".json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
                name.with_suffix(".md").write_text(markdown(run), encoding="utf-8")
    chart(records, name.with_suffix(".png"))
    return 0


def _child(way: str, side: int, folder: Path, arguments: Sequence[str]) -> dict[str, Any]:
    command = [
        sys.executable,
        __file__,
        *arguments,
        "--one",
        way,
        str(side),
        str(folder / f"{way}{side}.npy"),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=os.environ, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
