"""python -m fastgan.translate RUN_OR_CHECKPOINT INPUT OUTPUT: apply a trained generator to an image or a
folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from fastgan import files
from fastgan.checkpoint import EACH, CheckpointError, Label
from fastgan.config import UsageError, fail, parse
from fastgan.data.images import DataError, read_images
from fastgan.files import Output, Report
from fastgan.inference import Generator, load_generator
from fastgan.parallel import LostRank, Ranks


@dataclass(frozen=True, kw_only=True)
class Arguments(Output):
    """What `python -m fastgan.translate` takes."""

    run: tyro.conf.Positional[Path]  # run folder, checkpoint folder, .safetensors, .pth or .ckpt
    input: tyro.conf.Positional[Path]  # image or folder of images
    output: tyro.conf.Positional[Path]  # image or folder
    direction: Literal["AtoB", "BtoA"] | None = None  # in terms of the data folder; default: as trained
    to: tuple[str, ...] | None = None  # names of the labels that are 1; all: one result of each, NAME_<label>
    label: tuple[float, ...] | None = None  # one number per label, for StarGAN
    style: int | None = None  # results of each image in random styles, for MUNIT: NAME_000 and so on
    reference: Path | None = None  # image of the target domain whose style all results get, for MUNIT
    dropout_at_test: bool = False  # dropout stays on: another result from every --seed
    bn_stats: Literal["running", "batch"] | None = None  # batch norm: statistics of training, or of the image
    device: str = "auto"  # cuda, cuda:1, mps, cpu
    precision: Literal["auto", "bf16", "fp32", "tf32"] = "auto"  # auto: bf16 where the hardware has it


def translate(
    generator: Generator,
    source: Path,
    target: Path,
    how: Output | None = None,
    ranks: Ranks | None = None,
    *,
    each: bool = False,
) -> Report:
    """Translate a file or every image below a folder, keeping names; of several ranks each does its share.

    each: to every label that the generator knows.

    Raises:
        DataError: nothing to translate, or the target would overwrite the source.
        UsageError: settings that cannot be had from this generator.
    """
    how = how or Output()
    # before anything is read or made
    files.check(generator, how)
    jobs = files.plan(source, target, how, generator.labels.names if each else ())
    mine = jobs[ranks.rank :: ranks.size] if ranks else jobs
    show = len(jobs) > 1 and sys.stderr.isatty() and (ranks is None or ranks.first)
    return files.translate_files(generator, mine, how, progress=show)


def _in_styles(given: Arguments, generator: Generator, count: int) -> Arguments:
    """`--style K` as K samples; UsageError where the network has no styles, or one is given."""
    if given.reference is not None:
        raise UsageError("--style draws styles, --reference gives one: leave one of them out")
    if not hasattr(generator.net, "style_size"):
        raise UsageError(f"--style: the network of {generator.name} has no styles")
    if given.samples != 1:
        raise UsageError("--style is the number of results: leave --samples out")
    return replace(given, samples=count)


def _label(given: Arguments) -> Label | None:
    if given.to and given.label:
        raise UsageError("give --to NAME or --label NUMBERS, not both")
    return given.to or given.label


def _together(report: Report, ranks: Ranks) -> Report:
    """The report of all ranks: each ends with the same, since torchrun ends all when one fails."""
    reports: list[Report] = ranks.collect(report)
    return Report(
        sum(each.done for each in reports),
        sum(each.kept for each in reports),
        [line for each in reports for line in each.bad],
        set().union(*(each.notes for each in reports)),
        max(each.seconds for each in reports),
    )


def main(args: Sequence[str] | None = None) -> None:
    """Translate; exit code 0, 2 with one line about what could not be done, or 130 after Ctrl-C."""
    ranks = None
    try:
        given = parse(Arguments, sys.argv[1:] if args is None else args, "python -m fastgan.translate")
        ranks = Ranks.start()
        if ranks:
            # processes share the cores; each computes its own images
            torch.set_num_threads(max(1, torch.get_num_threads() // ranks.local_size))
        reference = None if given.reference is None else read_images(given.reference)[0]
        generator = load_generator(
            given.run, given.direction, label=_label(given), style=reference, device=given.device,
            precision=given.precision, dropout_at_test=given.dropout_at_test,
            bn_stats=given.bn_stats or "running", ranks=ranks,
        )  # fmt: skip
        if given.style is not None:
            given = _in_styles(given, generator, given.style)
        speaks = ranks is None or ranks.first
        each = given.to == (EACH,) and EACH not in generator.labels.names
        if each and not generator.labels.classes:
            raise UsageError(f"--to all is for classes: say which labels of {generator.name} are 1")
        report = translate(generator, given.input, given.output, given, ranks, each=each)
        report = _together(report, ranks) if ranks else report
    except (UsageError, DataError, CheckpointError, LostRank) as error:
        fail(error)
    except KeyboardInterrupt:
        fail("stopped; the same command goes on with what is missing", 130)
    count = report.done + report.kept + len(report.bad)
    if speaks:
        if generator.batch_norm_of_others and given.bn_stats is None and not given.dropout_at_test:
            report.notes.add(
                "batch norm used the statistics of training, and no dropout; upstream's test.py without "
                "--eval is --bn-stats batch --dropout-at-test"
            )
        for note in sorted(report.notes):
            print(f"note: {note}", file=sys.stderr)
        there = f"{report.kept} already there (--overwrite makes again)"
        if count > 1:
            speed = f"{report.seconds:.1f} s, {report.done / max(report.seconds, 1e-9):.2f} images/s"
            done = f"{report.done} images to {given.output}" + (f" ({speed})" if report.done else "")
            print("; ".join([done] + [there] * bool(report.kept)))
        elif report.kept:
            print(there)
    if report.bad:
        many = f"{len(report.bad)} of {count} files could not be translated, see above"
        if ranks and not ranks.first:
            raise SystemExit(2)
        fail(report.bad[0] if count == 1 else many)


if __name__ == "__main__":
    main()
