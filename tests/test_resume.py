"""Stopping and going on is the undisturbed run, bit for bit, for every recipe; and after a kill at a moment
nobody chose."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fastgan import checkpoint, train
from fastgan.recipes import RECIPES
from tests.run_cases import CYCLE, PIX, assert_same_run, picture, start, wait_for

# what draws at random (dropout, pools, the penalty), averages, or changes from step to step
SMALL = {
    "cyclegan": "--blocks 1 --patch 16 --dropout --pool-size 3 --ema 0.9 --epochs 1 --epochs-decay 1",
    "pix2pix": "--levels 3 --patch 16 --pool-size 3 --lr-policy cosine --memory low",
    "dcgan": "--ema 0.9 --minibatch-std --n-gen 2",
    "cgan": "--spectral-norm",
    "wgan": "--n-critic 2",
    "wgan-gp": "--n-critic 2",
    "discogan": "--lambda-features 1 --curriculum 4 --ema 0.9 --accumulate 2",
    "pan": "--batch-size 3",
    "stargan": "--blocks 1 --ema 0.9 --n-critic 2 --n-gen 2",
    "munit": "--blocks 1 --mlp-size 8 --ema 0.9 --pool-size 3 --lambda-cycle 1",
    "srgan": "--blocks 1 --ema 0.9 --lr-policy step",
    # more steps than it remembers
    "style": "--batch-size 1 --ndf 64 --history 2",
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_that_goes_on_is_the_undisturbed_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    common = "--ngf 2 --ndf 2 --batch-size 2 --device cpu --threads 1 --sample-every 100"
    words = [name, *common.split(), *SMALL[name].split(), "--steps", "6", "--save-every", "2", "--keep", "9"]
    train.main([*words, "--name", "whole"])
    shutil.copytree("runs/whole", "runs/parts")
    for folder in checkpoint.checkpoints(Path("runs/parts/checkpoints"))[1:]:
        shutil.rmtree(folder)
    train.main([*words, "--name", "parts"])
    assert_same_run(Path("runs/whole"), Path("runs/parts"))


KILLED = {
    "cyclegan": [*CYCLE, "--dropout", "--pool-size", "3", "--ema", "0.9", "--precision", "fp32"],
    "pix2pix wgan-gp": [
        *PIX, "--gan-mode", "wgan-gp", "--norm", "instance", "--pool-size", "2", "--n-critic", "2",
        "--lr-policy", "cosine",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", KILLED)
def test_kill_and_same_command_again_is_the_same_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        picture(tmp_path / f"data/trainA/{i}.png", seed=i)
        picture(tmp_path / f"data/trainB/{i}.png", seed=10 + i)
    # crops and mirrors are random
    args = [*KILLED[name], "--data", "data", "--load-size", "24", "--crop-size", "16"]
    args += ["--steps", "60", "--save-every", "10", "--keep", "9"]
    train.main([*args, "--name", "whole"])
    killed = start([*args, "--name", "killed"], tmp_path)
    wait_for(tmp_path / "runs/killed/checkpoints/step_00000030", killed)
    killed.kill()
    assert killed.wait() != 0, "finished before it was killed"
    done = int(checkpoint.checkpoints(tmp_path / "runs/killed/checkpoints")[-1].name[5:])
    assert 30 <= done < 60
    again = start([*args, "--name", "killed"], tmp_path)
    assert again.wait(300) == 0, again.communicate()[1]
    assert_same_run(tmp_path / "runs/whole", tmp_path / "runs/killed")
    logs = [
        [json.loads(line) for line in (tmp_path / f"runs/{run}/log.jsonl").read_text().splitlines()]
        for run in ("whole", "killed")
    ]
    for one, two in zip(*logs, strict=True):
        timing = {"time", "img_per_s", "wait_share", "balance", "warnings"}
        assert {k: v for k, v in one.items() if k not in timing} == {
            k: v for k, v in two.items() if k not in timing
        }
