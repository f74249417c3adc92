"""Whole, tiled and naively blended translation of large images: python benchmarks/tiling.py

    --sizes 512 1024 2048 4096      sides of square images; the whole image only up to --whole-up-to (2048)
    --tile 512                      side of a tile
    --image FILE                    photograph, resized to each size; default: a generated picture
    --net FILE                      weights of a ResNet generator; default: random, ngf 64, 9 blocks
    --picture                       brightness steps only, of a briefly trained network
    --out DIR                       instead of benchmarks/results

Every translation runs in a process of its own, whose time and highest resident memory (VmHWM of Linux) are
taken; results are compared with the whole image's where there is one. Writes tiling_<machine>_<date>.json
after every translation, and .png (memory and time against size) at the end; --picture writes steps_<...>.
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
WAYS = ("contiguous", "whole", "tiled", "naive")


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
    side, tile = 1024, 256
    x = picture(given.image, side)
    # red and blue exchanged, half as bright: a change of colour that needs no memory of where one is
    target = x.flip(1) * 0.5 - 0.5
    net = trained(x, target, given.steps)
    ys = {way: translated(way, net, x, tile) for way in WAYS}
    found = {way: steps(ys[way], ys["contiguous"], tile) for way in WAYS}
    run = {
        "command": "python benchmarks/tiling.py --picture", "machine": describe(), "side": side, "tile": tile,
        "overlap": OVERLAP, "training_steps": given.steps,
        "l1_to_target": (ys["contiguous"] - target).abs().mean().item(), "steps": found,
    }  # fmt: skip
    name.with_suffix(".json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    # half the size, and the error of brightness 8 times as strong around grey
    panels = [ys["contiguous"], ys["naive"], ys["tiled"]]
    panels += [
        ((ys[way] - ys["contiguous"]).mean(1, True) * 8).expand(-1, 3, -1, -1) for way in ("naive", "tiled")
    ]
    small = torch.cat([torch.nn.functional.avg_pool2d(p.clamp(-1, 1), 4) for p in panels], 3)
    pixels = small[0].permute(1, 2, 0).add(1).mul(127.5).round().to(torch.uint8).numpy()
    Image.fromarray(pixels).save(name.with_suffix(".png"), optimize=True)
    print(json.dumps(run["steps"], indent=1))


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
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    pairs = (("peak_rss_bytes", 1e9, "highest resident memory, GB"), ("seconds", 1, "seconds"))
    for axis, (key, unit, label) in zip(axes, pairs):
        for way in WAYS:
            points = sorted((r["side"], r[key] / unit) for r in records if r["way"] == way)
            if points:
                axis.plot(*zip(*points), marker="o", label=way)
        axis.set(xlabel="side of the image, pixels", ylabel=label, xscale="log", yscale="log")
        sides = sorted({r["side"] for r in records})
        axis.set_xticks(sides, [str(side) for side in sides], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


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
        show_steps(given, free_name(given.out, machine, "steps_"))
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
                run = {"command": "python benchmarks/tiling.py", "machine": machine, "records": records}
                name.with_suffix(".json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
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
