"""python -m fastgan.data COMMAND: get public data sets, join pairs, look at a folder, draw edge maps."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import tyro

from fastgan.config import UsageError, fail, parse, write_text
from fastgan.data import check as checking
from fastgan.data.download import Expected, download, file_sha256
from fastgan.data.edges import Canny, make_edges
from fastgan.data.folders import find_layout
from fastgan.data.images import DataError
from fastgan.data.pair import Format, Report, Shape, make_pairs
from fastgan.data.sets import PUBLIC_SETS, TERMS, find_set
from fastgan.data.sheet import write_sheet
from fastgan.data.unpack import unpack

USAGE = """usage: python -m fastgan.data {list,download,pair,check,edges} ...

  python -m fastgan.data list                       public data sets: what they show, kind, size
  python -m fastgan.data download horse2zebra       into datasets/horse2zebra; the same command goes on
  python -m fastgan.data check FOLDER               counts, sizes, types, duplicates, leaks, bad files
  python -m fastgan.data pair A B OUT               two folders of equal names into side-by-side images
  python -m fastgan.data edges FOLDER OUT           edge maps; --pairs: edges and photograph side by side
  python -m fastgan.data download --help            all flags of a command"""


@dataclass(frozen=True)
class DownloadArguments:
    """Download and unpack a public data set, or any other archive of images."""

    name: tyro.conf.Positional[str]  # one of `python -m fastgan.data list`; with --url any folder name
    out: Path = Path("datasets")  # folder in which the folder of the set appears
    url: str | None = None  # address of the archive; default: that of the set
    sha256: str | None = None  # what the archive must hash to; default: that of the set, where it is known
    keep_archive: bool = False  # keep the zip or tar file
    timeout: float = 30.0  # seconds without a byte after which a connection is given up
    retries: int = 6  # attempts in a row that bring nothing new


@dataclass(frozen=True)
class PairArguments:
    """Join images of A and B of the same names side by side, A on the left; folders inside are kept."""

    a: tyro.conf.Positional[Path]  # folder of the images of A
    b: tyro.conf.Positional[Path]  # folder of the images of B
    out: tyro.conf.Positional[Path]  # folder for the pairs
    end_a: str = ""  # what the names of A end in, e.g. _label; other files are left out
    end_b: str = ""  # the same for B
    resize: Literal["A", "B"] | None = None  # give both the size of A (or of B)
    size: tuple[int, int] | None = None  # give both this width and height
    nearest: bool = False  # resize without new colours, for label maps
    format: Format = "auto"  # auto: png, or tif where that cannot hold the values
    overwrite: bool = False  # replace files that exist


@dataclass(frozen=True)
class CheckArguments:
    """Look at a folder of images before training; exit code 1 if there are problems."""

    folder: tyro.conf.Positional[Path]  # training folder, or any folder of images
    sheet: Path | None = None  # draw a contact sheet into this .png or .jpg; without it nothing is written
    columns: int = 8  # images in a row of the contact sheet
    json: bool = False  # print JSON instead of the table


@dataclass(frozen=True)
class EdgesArguments:
    """Draw edge maps of photographs (Canny), black on white."""

    folder: tyro.conf.Positional[Path]  # folder of photographs
    out: tyro.conf.Positional[Path]  # folder for the edge maps
    pairs: bool = False  # write edges and photograph side by side, for pix2pix
    sigma: float = Canny.sigma  # blur in pixels: more leaves fewer details
    low: float | None = None  # lower threshold, 0 to 1 (a step from black to white); default: from the image
    high: float | None = None  # upper threshold, where an edge starts; default: from the image
    min_length: int = Canny.min_length  # drop connected edges of fewer pixels
    width: int = Canny.width  # of the lines in pixels
    format: Format = "auto"  # auto: png, or tif where that cannot hold the values
    overwrite: bool = False  # replace files that exist


def run_list(words: Sequence[str]) -> int:
    """Print the public sets."""
    if words:
        raise UsageError(f"list takes no arguments, got {words[0]}")
    width = max(map(len, PUBLIC_SETS))
    for name, entry in PUBLIC_SETS.items():
        size = "?" if entry.size is None else f"{entry.size / 1e6:,.0f} MB"
        print(f"{name:{width}}  {entry.kind:8}  {size:>8}  {entry.about} ({entry.origin})")
    print(f"{'cityscapes':{width}}  {'paired':8}  {'':>8}  by hand: `download cityscapes` says how")
    print(TERMS)
    return 0


def run_download(words: Sequence[str]) -> int:
    """Download, check, unpack, and say what to run next."""
    given = _parsed(DownloadArguments, words, "download")
    if Path(given.name).name != given.name or given.name.startswith(".") or "\\" in given.name:
        raise UsageError(f"NAME must be a plain folder name, got {given.name!r}")
    if given.timeout <= 0 or given.retries < 0:
        raise UsageError("--timeout must be above 0 and --retries at least 0")
    if given.sha256 is not None and not _is_sha256(given.sha256):
        raise UsageError(f"--sha256 takes 64 hexadecimal digits, got {given.sha256}")
    known = PUBLIC_SETS.get(given.name) if given.url else find_set(given.name)
    url = given.url or (known.url if known else "")
    expected = Expected(
        known.size if known and not given.sha256 else None, given.sha256 or (known.sha256 if known else None)
    )
    folder = given.out / given.name
    if folder.exists():
        print(f"{folder} is there already; remove it to download it again")
        return _next_steps(folder, known.kind if known else "")
    if known and not given.url:
        print(f"{given.name}: {known.about} ({known.origin}). {TERMS}")
    # the address decides what the archive is called, its first bytes what it is
    archive = given.out / (given.name + ("".join(Path(urlsplit(url).path).suffixes[-2:]) or ".archive"))
    record = given.out / f"{given.name}.json"
    wanted = expected.sha256 or _recorded(record).get("sha256")
    # one that was kept, or that arrived just before the power went
    if not (archive.is_file() and wanted and file_sha256(archive) == wanted.lower()):
        digest = download(url, archive, expected, timeout=given.timeout, retries=given.retries)
        _record(record, url, archive, digest, expected.sha256 is not None)
    count, links = unpack(archive, folder)
    print(f"{folder}: {count:,} files" + (f"; {links} links were left out" if links else ""))
    if not given.keep_archive:
        archive.unlink()
    return _next_steps(folder, known.kind if known else "")


def run_pair(words: Sequence[str]) -> int:
    """Join two folders."""
    given = _parsed(PairArguments, words, "pair")
    if given.size is not None and min(given.size) < 1:
        raise UsageError(f"--size must be two positive numbers, got {given.size[0]} {given.size[1]}")
    if given.size is not None and given.resize is not None:
        raise UsageError("--resize and --size exclude each other")
    report = make_pairs(
        given.a,
        given.b,
        given.out,
        ends=(given.end_a, given.end_b),
        shape=Shape(given.resize, given.size, given.nearest),
        kind=given.format,
        overwrite=given.overwrite,
        progress=sys.stderr.isatty(),
    )
    for names, own, other in ((report.only_a, given.a, given.b), (report.only_b, given.b, given.a)):
        if names:
            more = ", ..." if len(names) > 5 else ""
            print(f"{len(names):,} in {own} have no partner in {other}: {', '.join(names[:5])}{more}")
    return _finish(report, "pairs", given.out)


def run_check(words: Sequence[str]) -> int:
    """Look at a folder; 1 if there are problems."""
    given = _parsed(CheckArguments, words, "check")
    if not 1 <= given.columns <= 64:
        raise UsageError(f"--columns must be between 1 and 64, got {given.columns}")
    checked = checking.check(given.folder, progress=sys.stderr.isatty())
    if given.sheet is not None:
        write_sheet(given.sheet, checked, columns=given.columns)
    if given.json:
        print(json.dumps(checking.as_json(checked), indent=1))
    else:
        print(checking.table(checked))
        print(
            f"\ncontact sheet: {given.sheet}" if given.sheet else "\n--sheet FILE.png draws a contact sheet"
        )
    return int(any(finding.problem for finding in checked.findings))


def run_edges(words: Sequence[str]) -> int:
    """Draw edge maps."""
    given = _parsed(EdgesArguments, words, "edges")
    report = make_edges(
        given.folder,
        given.out,
        Canny(given.sigma, given.low, given.high, given.min_length, given.width),
        pairs=given.pairs,
        kind=given.format,
        overwrite=given.overwrite,
        progress=sys.stderr.isatty(),
    )
    code = _finish(report, "pairs" if given.pairs else "edge maps", given.out)
    if given.pairs:
        print(f"next: python -m fastgan.train pix2pix --data {given.out}")
    return code


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "list": run_list,
    "download": run_download,
    "pair": run_pair,
    "check": run_check,
    "edges": run_edges,
}


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; exit code 0, 1 (check found problems), 2 with one line about a mistake, 130 for
    Ctrl-C."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if args else 2)
    try:
        if args[0] not in COMMANDS:
            raise UsageError(f"unknown command {args[0]}: choose one of {', '.join(COMMANDS)}")
        raise SystemExit(COMMANDS[args[0]](args[1:]))
    except KeyboardInterrupt:
        fail("stopped; the same command goes on from here", 130)
    except (UsageError, DataError) as error:
        fail(error)
    except OSError as error:
        fail(f"{error.filename or 'a file'}: {error.strerror or error}")


def _parsed(cls: Any, words: Sequence[str], command: str) -> Any:
    return parse(cls, words, f"python -m fastgan.data {command}")


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and all(letter in "0123456789abcdef" for letter in text.lower())


def _record(path: Path, url: str, archive: Path, digest: str, checked: bool) -> None:
    """Keep what was downloaded, and say if it is not what was downloaded before."""
    size = archive.stat().st_size
    if not checked:
        print(
            f"{archive.name}: {size:,} bytes, SHA-256 {digest} (not published, so not checked; "
            f"kept in {path})"
        )
    before = _recorded(path)
    if before and before["sha256"] != digest:
        print(f"note: on {before['date']} it was another archive, {before['sha256']}", file=sys.stderr)
    about = {"url": url, "size": size, "sha256": digest, "date": time.strftime("%Y-%m-%d")}
    write_text(path, json.dumps(about, indent=1) + "\n")


def _recorded(path: Path) -> dict[str, str]:
    """What `_record` kept of an earlier download, or nothing."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        return {key: str(about[key]) for key in ("sha256", "date")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _next_steps(folder: Path, kind: str) -> int:
    try:
        layout = find_layout(folder, paired=False)
    except DataError as error:
        print(f"no layout that training reads: {error}")
        return 0
    counts = f"{len(layout.train.A):,} A and {len(layout.train.B):,} B"
    if layout.side_by_side:
        counts = f"{len(layout.train.A):,} pairs side by side"
    test = f", test {len(layout.test.A):,} and {len(layout.test.B):,}" if layout.test_name else ""
    print(f"layout {layout.kind}: train {counts}{test}")
    recipe = "pix2pix" if kind == "paired" or layout.side_by_side else "cyclegan"
    print(f"look:  python -m fastgan.data check {folder} --sheet sheet.png")
    print(f"train: python -m fastgan.train {recipe} --data {folder}")
    return 0


def _finish(report: Report, what: str, out: Path) -> int:
    print(f"{report.written:,} {what} written to {out}")
    if report.kept:
        print(f"{report.kept:,} were there already and were kept; --overwrite replaces them")
    for line in report.bad[:20]:
        print(f"skipped: {' '.join(line.split())}", file=sys.stderr)
    if report.bad:
        more = f" (the first 20 of {len(report.bad)} above)" if len(report.bad) > 20 else ""
        raise DataError(f"{len(report.bad):,} could not be made{more}")
    return 0


if __name__ == "__main__":
    main()
