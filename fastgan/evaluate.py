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
from fastgan.data.dataset import Data
from fastgan.data.digits import make_digits
from fastgan.data.images import DataError
from fastgan.device import pick_device
from fastgan.models import translate_any_size
from fastgan.recipes import RECIPES
from fastgan.recipes.base import Direction, Nets, Recipe
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


def measure(recipe: Recipe, nets: Nets, data: Data, device: torch.device) -> dict[str, float]:
    """All measures that the images allow, in 0..1, each image translated alone."""
    config: Config = recipe.config
    out: dict[str, float] = {}
    for way in recipe.directions.values():
        sums: dict[str, float] = {}
        kept = []
        count = data.shown.len_A if way.source == "A" else data.shown.len_B
        for k in range(count):
            x = data.shown.images(way.source, k, k + 1, device=device, output_range=config.output)
            fake, again = _translated(nets, way, x)
            found: dict[str, float] = {}
            if again is not None:
                found[f"cycle_l1_{way.source}"] = metrics.l1(_unit(again, config), _unit(x, config))
            if recipe.paired:
                true = data.shown.images(way.target, k, k + 1, output_range=config.output)
                found["l1"] = metrics.l1(_unit(fake, config), _unit(true, config))
                found["psnr_db"] = metrics.psnr(_unit(fake, config), _unit(true, config))
            sums = {key: sums.get(key, 0.0) + value for key, value in found.items()}
            kept += [_unit(fake, config)] if config.data is None else []
        out |= {key: value / count for key, value in sums.items()}
        if kept and way.target == "B" and config.direction == "AtoB":
            out |= _digits(recipe, data, torch.cat(kept))
    return out


@torch.no_grad()
def _translated(nets: Nets, way: Direction, x: Tensor) -> tuple[Tensor, Tensor | None]:
    fake = translate_any_size(nets[way.net], x)
    return fake, translate_any_size(nets[way.back], fake) if way.back else None


def _unit(x: Tensor, config: Config) -> Tensor:
    return (x.float() / 2 + 0.5 if config.output == "tanh" else x.float()).cpu()


def _digits(recipe: Recipe, data: Data, fake_b: Tensor) -> dict[str, float]:
    """What a classifier trained on real B reads in the translations, and how white their ground is."""
    config: Config = recipe.config
    train, test = (make_digits(split, paired=recipe.paired) for split in ("train", "test"))
    real, held_out = (
        _unit(split.images("B", 0, split.len_B, output_range=config.output), config)
        for split in (data.train, data.test)
    )
    # --max-images takes the first ones
    reader = metrics.train_classifier(real, torch.from_numpy(train.labels_B)[: len(real)])
    labels_a, labels_b = torch.from_numpy(test.labels_A), torch.from_numpy(test.labels_B)
    return {
        "digit_accuracy_real_B": metrics.accuracy(reader, held_out, labels_b[: len(held_out)]),
        "digit_accuracy_fake_B": metrics.accuracy(reader, fake_b, labels_a[: len(fake_b)]),
        "background_distance": metrics.background_distance(
            fake_b, torch.from_numpy(test.ink_A)[: len(fake_b)]
        ),
    }


def main(args: Sequence[str] | None = None) -> None:
    """Evaluate; exit code 0, or 2 with one line about what is wrong."""
    try:
        given = parse(Arguments, sys.argv[1:] if args is None else args, "python -m fastgan.evaluate")
        device = pick_device(given.device)
        recipe, nets, step = load_run(given.run, device)
        data = open_images(recipe, given.run, progress=sys.stderr.isatty())
        found = measure(recipe, nets, data, device)
    except (UsageError, DataError, CheckpointError) as error:
        fail(error)
    write_text(given.run / "evaluation.json", json.dumps({"step": step, **found}, indent=1))
    print(f"{given.run}, step {step}, {'test' if data.shown is data.test else 'training'} images")
    for key, value in found.items():
        print(f"  {key:24} {value:.4f}")


if __name__ == "__main__":
    main()
