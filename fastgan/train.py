"""python -m fastgan.train RECIPE [flags]: train a system; without --data on the embedded digits.

On several GPUs: torchrun --nproc-per-node N -m fastgan.train RECIPE [flags].
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import NoReturn

from fastgan.checkpoint import CheckpointError
from fastgan.config import Config, UsageError, parse
from fastgan.data.images import DataError
from fastgan.parallel import LostRank, Ranks, together
from fastgan.recipes import RECIPES
from fastgan.recipes.base import Recipe
from fastgan.trainer import Diverged, Interrupted, Trainer


def _each() -> str:
    """A line for each recipe: its name and how its file begins."""
    lines = []
    for name, cls in RECIPES.items():
        about = (inspect.getdoc(sys.modules[cls.__module__]) or cls.title).split("\n\n")[0]
        about = re.split(r"[.;]\s", re.sub(r" \([^)]*\d{4}[^)]*\)", "", about))[0].rstrip(".") + "."
        lines.append(f"  {name:<9} {textwrap.shorten(about, 88, placeholder=' ...')}")
    return "\n".join(lines)


USAGE = f"""usage: python -m fastgan.train {{{",".join(RECIPES)}}} [flags]

  python -m fastgan.train cyclegan                  the embedded digits, in some minutes
  python -m fastgan.train cyclegan --data FOLDER    your images: trainA/ and trainB/
  python -m fastgan.train pix2pix --data FOLDER     your pairs: train/ with A and B side by side
  python -m fastgan.train cgan --data FOLDER        images from noise: train/CLASS/*.png
  python -m fastgan.train cyclegan --help           all flags of a recipe
  torchrun --nproc-per-node 2 -m fastgan.train ...  the same on two GPUs

The same command again goes on where the last one stopped.

recipes:
{_each()}"""


def make_recipe(args: Sequence[str]) -> Recipe:
    """The recipe that command-line words describe.

    Raises:
        UsageError: unknown recipe, preset or flag.
    """
    if args[0] not in RECIPES:
        raise UsageError(f"unknown recipe {args[0]}: choose one of {', '.join(RECIPES)}")
    cls = RECIPES[args[0]]
    words = list(args[1:])
    has_data = any(w.partition("=")[0] in ("--data", "--content", "--style") for w in words)
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
    ranks, trainer, started = None, None, False
    # of several processes the first one alone answers
    first = os.environ.get("RANK", "0") == "0"
    with contextlib.nullcontext() if first else contextlib.redirect_stdout(io.StringIO()):
        if not args or args[0] in ("-h", "--help"):
            print(USAGE)
            raise SystemExit(0 if args else 2)
        try:
            ranks = Ranks.start()
            with together(ranks):
                recipe = make_recipe(args)
            trainer = Trainer(recipe, ranks)
            trainer.resume()
            if trainer.done >= trainer.total:
                print(
                    f"{trainer.run} is finished: more --epochs or --steps go on, another --name starts anew"
                )
            else:
                started = True
                trainer.train()
                print(f"finished: {trainer.run}/index.html shows the pictures and the curves")
            if ranks:
                ranks.close()
        except Interrupted as stop:
            _end(ranks, "", stop.code)
        except KeyboardInterrupt:
            said = "stopped at once: what the last checkpoint holds remains" if started else "stopped"
            _end(ranks, said if first else "", 130)
        except Diverged as error:
            _end(ranks, str(error), 1)
        except LostRank as error:
            _end(ranks, str(error) if first else "")
        except (UsageError, DataError, CheckpointError) as error:
            _end(ranks, str(error))
        except OSError as error:
            # a full or unwritable disk under the log, a picture or the page
            name = error.filename or "a file"
            _end(ranks, f"{name} cannot be written: {error.strerror}; the last checkpoint remains")


def _end(ranks: Ranks | None, error: str, code: int = 2) -> NoReturn:
    """End with one line: the first process's where all have the same error, else that of the one that has."""
    agreed = ranks if ranks and ranks.agreed else None
    if error and (agreed is None or agreed.first):
        print("error: " + " ".join(error.split()), file=sys.stderr, flush=True)
    if agreed is not None:
        # not before the first one has spoken: torchrun ends them all as soon as one has ended
        agreed.close()
    raise SystemExit(code)


if __name__ == "__main__":
    main()
