"""python -m fastgan.evaluate RUN: measure a trained run on its held-out images, as a table and as
RUN/evaluation.json."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from fastgan import checkpoint, metrics
from fastgan.checkpoint import CheckpointError
from fastgan.config import Config, UsageError, fail, from_json, parse, read_json, write_text
from fastgan.data.digits import make_digits
from fastgan.data.images import DataError
from fastgan.device import pick_device
from fastgan.models import translate_any_size
from fastgan.recipes import RECIPES
from fastgan.recipes.base import Nets, Recipe
from fastgan.trainer import open_images


@dataclass(frozen=True)
class Arguments:
    """What `python -m fastgan.evaluate` takes."""

    run: tyro.conf.Positional[Path]  # run folder
    device: str = "auto"  # cuda, cuda:1, mps, cpu


def load_run(run: Path, device: torch.device) -> tuple[Recipe, Nets, int]:
    """Recipe, generators in evaluation mode (averaged ones where the run has them) and the step of the newest
    checkpoint.

    Raises:
        CheckpointError, UsageError: not a run, or nothing saved yet.
    """
    if not (run / "config.json").is_file():
        raise CheckpointError(f"{run} is not a run folder: config.json is missing")
    about = read_json(run / "config.json")
    found = checkpoint.checkpoints(run / "checkpoints")
    if not found:
        raise CheckpointError(f"{run} has no checkpoint yet")
    cls = RECIPES[about["recipe"]]
    recipe = cls(from_json(cls.config_class, about["settings"]))
    weights, _, header = checkpoint.load(found[-1])
    nets = recipe.networks(*about["channels"])
    for name in recipe.generators:
        kept = f"{name}_ema" if f"{name}_ema" in weights else name
        checkpoint.load_into(nets[name], weights[kept], str(found[-1] / f"{kept}.safetensors"))
    return recipe, {name: nets[name].to(device).eval() for name in recipe.generators}, header["step"]


@torch.inference_mode()
def measure(recipe: Recipe, nets: Nets, run: Path, device: torch.device) -> dict[str, float]:
    """All measures that the run's data allow; images in 0..1, one network evaluation per image."""
    config: Config = recipe.config
    test = open_images(recipe, run, progress=False).shown
    scale = (2.0, 1.0) if config.output == "tanh" else (1.0, 0.0)

    def unit(x: Tensor) -> Tensor:
        return ((x.float() + scale[1]) / scale[0]).cpu()

    out: dict[str, float] = {}
    fakes: dict[str, Tensor] = {}
    for way in recipe.directions.values():
        count = test.len_A if way.source == "A" else test.len_B
        sums: dict[str, float] = {}
        kept = []
        for k in range(count):
            x = test.images(way.source, k, k + 1, device=device, output_range=config.output)
            fake = translate_any_size(nets[way.net], x)
            found: dict[str, float] = {}
            if way.back:
                found[f"cycle_l1_{way.source}"] = metrics.l1(
                    unit(translate_any_size(nets[way.back], fake)), unit(x)
                )
            elif recipe.paired:
                true = unit(test.images(way.target, k, k + 1, device=device, output_range=config.output))
                found |= {"l1": metrics.l1(unit(fake), true), "psnr_db": metrics.psnr(unit(fake), true)}
            sums = {key: sums.get(key, 0.0) + value for key, value in found.items()}
            if config.data is None:
                kept.append(unit(fake))
        out |= {key: value / count for key, value in sums.items()}
        if kept:
            fakes[way.target] = torch.cat(kept)
    if config.data is None and config.direction == "AtoB":
        with torch.inference_mode(False):
            out |= _digits(recipe, fakes["B"])
    return out


def _digits(recipe: Recipe, fake_b: Tensor) -> dict[str, float]:
    train, test = (make_digits(split, paired=recipe.paired) for split in ("train", "test"))

    def tensor(x: object) -> Tensor:
        return torch.as_tensor(x).permute(0, 3, 1, 2).float() / 255

    reader = metrics.train_classifier(tensor(train.B), torch.as_tensor(train.labels_B))
    return {
        "digit_accuracy_real_B": metrics.accuracy(reader, tensor(test.B), torch.as_tensor(test.labels_B)),
        "digit_accuracy_fake_B": metrics.accuracy(reader, fake_b.clone(), torch.as_tensor(test.labels_A)),
        "background_distance": metrics.background_distance(fake_b, torch.as_tensor(test.ink_A)),
    }


def main(args: Sequence[str] | None = None) -> None:
    """Evaluate; exit code 0, or 2 with one line about what is wrong."""
    try:
        given = parse(Arguments, sys.argv[1:] if args is None else args, "python -m fastgan.evaluate")
        device = pick_device(given.device)
        recipe, nets, step = load_run(given.run, device)
        found = measure(recipe, nets, given.run, device)
    except (UsageError, DataError, CheckpointError) as error:
        fail(error)
    write_text(given.run / "evaluation.json", json.dumps({"step": step, **found}, indent=1))
    print(f"{given.run}, step {step}, held-out images")
    for key, value in found.items():
        print(f"  {key:24} {value:.4f}")


if __name__ == "__main__":
    main()
