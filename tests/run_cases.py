"""Short runs of the command line: what the tests of training share."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastgan import checkpoint

TINY = [
    "--ngf",
    "4",
    "--ndf",
    "4",
    "--batch-size",
    "2",
    "--device",
    "cpu",
    "--threads",
    "1",
    "--log-every",
    "10",
]
CYCLE = ["cyclegan", *TINY, "--blocks", "1", "--patch", "16"]
PIX = ["pix2pix", *TINY, "--levels", "3", "--patch", "16"]


def picture(path: Path, size: tuple[int, int] = (40, 36), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (size[1] // 4, size[0] // 4, 3), np.uint8)
    Image.fromarray(noise).resize(size).save(path)
    return path


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint."""
    nets, state, _ = checkpoint.load(checkpoint.checkpoints(run / "checkpoints")[-1])
    return state | {f"{net}.{key}": value for net, weights in nets.items() for key, value in weights.items()}


def assert_same_run(one: Path, two: Path) -> None:
    first, second = tensors(one), tensors(two)
    assert first.keys() == second.keys()
    assert not [key for key in first if not torch.equal(first[key], second[key])]


def start(args: list[str], cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fastgan.train", *args],
        cwd=cwd,
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.002)
