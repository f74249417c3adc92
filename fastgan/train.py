"""python -m fastgan.train RECIPE [flags]: train a system; without --data on the embedded digits."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from fastgan.checkpoint import CheckpointError
from fastgan.config import Config, UsageError, fail, parse
from fastgan.data.images import DataError
from fastgan.recipes import RECIPES
from fastgan.recipes.base import Recipe
from fastgan.trainer import Diverged, Interrupted, Trainer

USAGE = f"""usage: python -m fastgan.train {{{",".join(RECIPES)}}} [flags]

  python -m fastgan.train cyclegan                  the embedded digits, in three minutes
  python -m fastgan.train cyclegan --data FOLDER    your images: trainA/ and trainB/
  python -m fastgan.train pix2pix --data FOLDER     your pairs: train/ with A and B side by side
  python -m fastgan.train cyclegan --help           all flags of a recipe

The same command again goes on where the last one stopped."""


def make_recipe(args: Sequence[str]) -> Recipe:
    """The recipe that command-line words describe.

    Raises:
        UsageError: unknown recipe, preset or flag.
    """
    if args[0] not in RECIPES:
        raise UsageError(f"unknown recipe {args[0]}: choose one of {', '.join(RECIPES)}")
    cls = RECIPES[args[0]]
    words = list(args[1:])
    has_data = any(w == "--data" or w.startswith("--data=") for w in words)
    preset = "default" if has_data else "digits"
    for i, word in enumerate(words):
        if word == "--preset" and i + 1 < len(words):
            preset = words[i + 1]
        elif word.startswith("--preset="):
            preset = word.partition("=")[2]
    if preset not in cls.presets:
        raise UsageError(
            f"--preset {preset} is not known to {args[0]}: choose one of {', '.join(cls.presets)}"
        )
    default: Config = dataclasses.replace(cls.config_class(), **cls.presets[preset], preset=preset)
    about = f"Train {cls.title}. Presets: {', '.join(cls.presets)}; here: {preset}."
    return cls(parse(cls.config_class, words, f"python -m fastgan.train {args[0]}", default, about))


def main(args: Sequence[str] | None = None) -> None:
    """Train; exit code 0 finished, 2 a mistake in the call or its files, 1 diverged, 130 or 143 a signal."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if args else 2)
    started = False
    try:
        trainer = Trainer(make_recipe(args))
        trainer.resume()
        if trainer.done >= trainer.total:
            print(f"{trainer.run} is finished: more --epochs or --steps go on, another --name starts anew")
            return
        started = True
        trainer.train()
    except Interrupted as stop:
        raise SystemExit(stop.code) from None
    except KeyboardInterrupt:
        fail("stopped at once: what the last checkpoint holds remains" if started else "stopped", 130)
    except Diverged as error:
        fail(error, 1)
    except (UsageError, DataError, CheckpointError) as error:
        fail(error)
    except OSError as error:
        # a full or unwritable disk under the log, a picture or the page
        fail(f"{error.filename or 'a file'} cannot be written: {error.strerror}; the last checkpoint remains")
    print(f"finished: {trainer.run}/index.html shows the pictures and the curves")


if __name__ == "__main__":
    main()
