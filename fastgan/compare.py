"""python -m fastgan.compare RUN RUN [...]: lay runs over each other in one page that opens from disk."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from fastgan.config import UsageError, fail, parse, read_json
from fastgan.gallery import Run, write_comparison


@dataclass(frozen=True)
class Arguments:
    """What `python -m fastgan.compare` takes."""

    runs: tyro.conf.Positional[tuple[Path, ...]]  # run folders, two or more, finished or not
    output: Path = Path("compare.html")  # page to write


def open_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs, each with the shortest end of its path that tells it from the others as its name.

    Raises:
        UsageError: fewer than two, one of them twice, or a folder that is not a run.
    """
    if len(folders) < 2:
        raise UsageError(f"two or more run folders are compared, got {len(folders)}")
    paths = [folder.resolve() for folder in folders]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise UsageError(f"{folders[i]} is given twice")
    runs = []
    for folder, path in zip(folders, paths):
        if not (folder / "config.json").is_file():
            raise UsageError(f"{folder} is not a run folder: config.json is missing")
        about = _mapping(folder / "config.json")
        settings = about.pop("settings", None)
        if not isinstance(settings, dict):
            raise UsageError(f"{folder / 'config.json'} is not that of a run: it holds no settings")
        depth = next(n for n in range(1, 999) if [p.parts[-n:] for p in paths].count(path.parts[-n:]) == 1)
        measured = folder / "evaluation.json"
        evaluation = _mapping(measured) if measured.exists() else {}
        runs.append(Run("/".join(path.parts[-depth:]), folder, about | settings, evaluation))
    return runs


def _mapping(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict):
        raise UsageError(f"{path} cannot be read: it is no JSON object")
    return found


def main(args: Sequence[str] | None = None) -> None:
    """Compare; exit code 0, or 2 with one line about what is wrong."""
    try:
        given = parse(Arguments, sys.argv[1:] if args is None else args, "python -m fastgan.compare")
        if given.output.suffix.lower() not in (".html", ".htm"):
            raise UsageError(f"--output is a page and ends in .html, got {given.output}")
        if given.output.is_dir():
            raise UsageError(f"--output {given.output} is a folder: name a file in it")
        page = write_comparison(given.output, open_runs(given.runs))
    except UsageError as error:
        fail(error)
    except RecursionError:
        fail("config.json or evaluation.json of a run is nested too deeply")
    except OSError as error:
        fail(f"{error.filename or given.output} cannot be read or written: {error.strerror or error}")
    print(f"{page} lays {len(given.runs)} runs over each other")


if __name__ == "__main__":
    main()
