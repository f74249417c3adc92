"""Look at a training folder before training: counts, sizes, types, duplicates, leaks, bad files.

Nothing is written. Every file is decoded once, in threads, and forgotten; what stays is about 1 kB an image.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastgan.data.folders import Layout, find_layout
from fastgan.data.images import DataError, list_images
from fastgan.data.look import Place, Seen, Twins, find_twins, look
from fastgan.data.store import in_order

_CROP = 256  # the default --crop-size
_EXAMPLES = 3
_ALMOST = 0.99  # share of the pixels


@dataclass(frozen=True)
class Finding:
    """Something to know: problem (training fails, or its result cannot be trusted) or not, what it is, what
    to do, how many, some names, and the places of some of the images."""

    problem: bool
    what: str
    advice: str
    count: int
    examples: list[str]
    places: list[Place] = field(default_factory=list)

    @property
    def title(self) -> str:
        """What it is, with the number."""
        return f"{self.what}: {self.count:,}" if self.count else self.what


@dataclass(frozen=True)
class Checked:
    """All that `check` found; groups: images by group, such as "train A", in the order of the layout."""

    root: Path
    layout: str
    paired: bool
    groups: dict[str, list[Seen]]
    bad: list[str]
    findings: list[Finding]


def check(root: Path, *, progress: bool = False) -> Checked:
    """Read all images below a folder and judge them as training data; any folder will do, a layout or not.

    Raises DataError if the folder is missing or holds no images at all.
    """
    if not root.is_dir():
        raise DataError(f"{root}: {'is not a folder' if root.exists() else 'no such folder'}")
    files = list_images(root)
    if not files:
        raise DataError(f"{root}: holds no images")
    layout, why = _layout(root)
    jobs, paired = _places(root, files, layout)
    seen: list[Seen] = []
    bad: list[str] = []
    for result in in_order(
        lambda job: look(*job), jobs.items(), total=len(jobs), label="check", progress=progress
    ):
        if isinstance(result, DataError):
            bad.append(str(result))
        else:
            seen += result
    groups: dict[str, list[Seen]] = {}
    for places in jobs.values():
        for place in places:
            groups.setdefault(place.group, [])
    for image in seen:
        groups[image.place.group].append(image)
    order = {name: number for number, name in enumerate(("train A", "train B", "test A", "test B"))}
    groups = dict(sorted(groups.items(), key=lambda item: order.get(item[0], len(order))))
    name = lambda place: _name(root, place)  # noqa: E731
    findings = [
        *_bad_files(bad, root),
        *_layout_findings(root, layout, why, groups, jobs),
        *_twins(seen, paired, layout, name),
        *_pairs(root, layout, paired, seen),
        *_types(groups, layout is not None),
        *_contents(seen, groups, name),
        *_shapes(seen, name, layout is not None),
    ]
    findings.sort(key=lambda finding: not finding.problem)
    return Checked(root, layout.kind if layout else "", paired, groups, bad, findings)


def _layout(root: Path) -> tuple[Layout | None, str]:
    try:
        return find_layout(root, paired=False), ""
    except DataError as error:
        return None, str(error)


def _places(root: Path, files: list[Path], layout: Layout | None) -> tuple[dict[Path, list[Place]], bool]:
    """Which file holds which images, and whether A and B are pairs; files outside the layout form groups by
    folder."""
    jobs: dict[Path, list[Place]] = {}
    paired = False
    if layout is not None:
        for split, of in (("train", layout.train), (layout.test_name or "test", layout.test)):
            for domain, sources in (("A", of.A), ("B", of.B)):
                for source in sources:
                    jobs.setdefault(source.path, []).append(
                        Place(source.path, source.half, f"{split.lower()} {domain}")
                    )
        names = [{source.name for source in sources} for sources in (layout.train.A, layout.train.B)]
        paired = layout.side_by_side or names[0] == names[1]
    for path in files:
        parent = path.parent.relative_to(root)
        where = parent if layout is not None else Path(*parent.parts[:2])
        jobs.setdefault(path, [Place(path, "", where.as_posix() if where.parts else root.name)])
    return jobs, paired


def _name(root: Path, place: Place) -> str:
    name = place.path.relative_to(root).as_posix()
    return name + (f" ({place.half})" if place.half else "") + (f" page {place.page}" if place.page else "")


def _listed(
    what: str, advice: str, images: Iterable[Seen], name: Callable[[Place], str], shown: bool = False
) -> list[Finding]:
    """A finding about some images, or none; shown: they appear on the contact sheet."""
    places = [image.place for image in images]
    if not places:
        return []
    examples = [name(place) for place in places[:_EXAMPLES]]
    return [Finding(False, what, advice, len(places), examples, places[:16] if shown else [])]


def _bad_files(bad: list[str], root: Path) -> list[Finding]:
    if not bad:
        return []
    lines = [line.removeprefix(f"{root}/") for line in bad[:_EXAMPLES]]
    advice = "get them again or remove them; train --skip-bad leaves them out"
    return [Finding(True, "files that cannot be read", advice, len(bad), lines)]


def _layout_findings(
    root: Path,
    layout: Layout | None,
    why: str,
    groups: dict[str, list[Seen]],
    jobs: dict[Path, list[Place]],
) -> list[Finding]:
    if layout is None:
        advice = why.removeprefix(f"{root}: ").removeprefix("no training images found ")
        return [Finding(False, "not a training folder", advice, 0, [])]
    found = []
    used = {source.path for of in (layout.train, layout.test) for source in (*of.A, *of.B)}
    unused = [path for path in jobs if path not in used]
    if unused:
        folders = Counter(path.parent.relative_to(root).as_posix() + "/" for path in unused)
        examples = [f"{folder} ({count})" for folder, count in folders.most_common(_EXAMPLES)]
        advice = (
            "training reads train and test (without test: val) of A and B; move them if they belong there"
        )
        found.append(Finding(False, "images that training does not use", advice, len(unused), examples))
    a, b = len(layout.train.A), len(layout.train.B)
    if max(a, b) >= 10 * min(a, b) and min(a, b) > 0:
        advice = "unequal counts are fine, but the smaller domain is seen as often; add images to it"
        found.append(Finding(False, f"A has {a:,} training images, B {b:,}", advice, 0, []))
    if min(a, b) < 20:
        advice = "fine for a trial; a few hundred are the rule"
        found.append(Finding(False, f"few training images (A {a}, B {b})", advice, 0, []))
    if not layout.test.A and not layout.test.B:
        advice = "samples will show training images; keep a tenth of the images apart as test"
        found.append(Finding(False, "no test images", advice, 0, []))
    return found


def _twins(
    seen: list[Seen], paired: bool, layout: Layout | None, name: Callable[[Place], str]
) -> list[Finding]:
    kinds: dict[tuple[str, bool], list[tuple[Place, Place]]] = {}
    twins = find_twins(seen)
    # label maps often look alike: two pairs are nearly the same only if both their halves are
    halves = Counter(_pair_key(seen, twin) for twin in twins)
    for twin in twins:
        first, second, exact = twin
        if layout is not None and layout.side_by_side and not exact and halves[_pair_key(seen, twin)] < 2:
            continue
        a, b = seen[first].place, seen[second].place
        train = [place.group in ("train A", "train B") for place in (a, b)]
        domains = [_domain(place.group) for place in (a, b)]
        if paired and {*domains} == {"A", "B"}:
            continue  # A and B of a pair may look alike
        if layout is not None and train[0] != train[1]:
            kind = "leak"
        elif layout is not None and {*domains} == {"A", "B"}:
            kind = "domains"
        else:
            kind = "same"
        kinds.setdefault((kind, exact), []).append((a, b))
    texts = {
        "leak": (
            "images both in the training set and outside it",
            "take them out of one: results on them say nothing about new images",
        ),
        "domains": ("images both in A and in B", "take them out of one: the networks learn to tell A from B"),
        "same": ("images that occur twice", "remove the copies, or they count twice"),
    }
    found = []
    for (kind, exact), pairs in sorted(
        kinds.items(), key=lambda item: (item[0][0] != "leak", not item[0][1])
    ):
        what, advice = texts[kind]
        if not exact:
            what, advice = f"{what}, nearly the same", f"look at them (--sheet); {advice}"
        examples = [f"{name(a)} = {name(b)}" for a, b in pairs[:_EXAMPLES]]
        places = [place for pair in pairs[:8] for place in pair]
        found.append(Finding(exact and kind == "leak", what, advice, len(pairs), examples, places))
    return found


def _pair_key(seen: list[Seen], twin: Twins) -> frozenset[tuple[str, str]]:
    """What the twins in A and the twins in B of the same two pairs have in common."""
    places = (seen[twin.first].place, seen[twin.second].place)
    return frozenset((place.group.partition(" ")[0], place.path.stem) for place in places)


def _pairs(root: Path, layout: Layout | None, paired: bool, seen: list[Seen]) -> list[Finding]:
    if layout is None or layout.side_by_side:
        return []
    found = []
    if not paired:
        names = [{source.name for source in sources} for sources in (layout.train.A, layout.train.B)]
        both = names[0] & names[1]
        if 2 * len(both) > max(map(len, names)):
            lonely = sorted(names[0] ^ names[1])
            advice = (
                "pix2pix needs both of a pair; `python -m fastgan.data pair A B OUT` keeps those that match"
            )
            what = "names in A or in B alone, though most are in both"
            found.append(Finding(False, what, advice, len(lonely), lonely[:_EXAMPLES]))
        return found
    sizes = {(image.place.path, image.place.page): (image.width, image.height) for image in seen}
    unlike = []
    for of in (layout.train, layout.test):
        partners = {source.name: source.path for source in of.B}
        for source in of.A:
            two = [
                sizes.get((path, 0)) for path in (source.path, partners.get(source.name)) if path is not None
            ]
            if len(two) == 2 and None not in two and two[0] != two[1]:
                unlike.append(Place(source.path, "", "train A"))
    if unlike:
        advice = "pix2pix refuses them; `python -m fastgan.data pair ... --resize A` makes them equal"
        examples = [_name(root, place) for place in unlike[:_EXAMPLES]]
        found.append(Finding(False, "pairs of different size", advice, len(unlike), examples, unlike[:16]))
    return found


def _types(groups: dict[str, list[Seen]], has_layout: bool) -> list[Finding]:
    found: list[Finding] = []
    for domain in "AB" if has_layout else "":
        flag = "--channels" if domain == "A" else "--channels-b"
        images = [image for group, some in groups.items() if _domain(group) == domain for image in some]
        counts = Counter(image.channels for image in images)
        if len(counts) > 1:
            text = ", ".join(f"{count} with {channels}" for channels, count in counts.most_common())
            if set(counts) == {1, 3}:
                what, advice = (
                    f"{domain} mixes grey and RGB: {text}",
                    f"grey becomes RGB; {flag} 1 makes all grey",
                )
                found.append(Finding(False, what, advice, 0, []))
            else:
                what, advice = f"{domain} mixes numbers of channels: {text}", "save all with the same number"
                found.append(Finding(True, what, advice, 0, []))
        kinds = Counter(str(image.dtype) for image in images)
        if "float32" in kinds and len(kinds) > 1:
            what, advice = f"{domain} mixes {' and '.join(sorted(kinds))}", "save all in one type"
            found.append(Finding(True, what, advice, 0, []))
        wide = [image.high for image in images if image.dtype == np.uint16]
        if wide and int(max(wide)).bit_length() < 15:
            limit = 2 ** int(max(wide)).bit_length() - 1
            what = f"the 16-bit images of {domain} only reach {max(wide):.0f} of 65535: nearly black"
            found.append(Finding(False, what, f"train with --range-{domain.lower()} 0 {limit}", 0, []))
    return found


def _contents(seen: list[Seen], groups: dict[str, list[Seen]], name: Callable[[Place], str]) -> list[Finding]:
    plain = [image for image in seen if not image.flat]
    found = [
        *_listed("images of one colour", "nothing can be learned from them; remove them",
                 (image for image in seen if image.flat), name, shown=True),
        *_listed("images almost all black", "look at them (--sheet); remove them if they are empty",
                 (image for image in plain if image.dark >= _ALMOST), name, shown=True),
        *_listed("images almost all white", "look at them (--sheet); remove them if they are empty",
                 (image for image in plain if image.bright >= _ALMOST), name, shown=True),
        *_listed("images with transparency", "it is left out: the colours beneath it are used as they are",
                 (image for image in seen if "A" in image.mode or "alpha" in image.mode), name),
    ]  # fmt: skip
    by_domain: dict[str, list[Seen]] = {}
    for group, images in groups.items():
        by_domain.setdefault(_domain(group), []).extend(image for image in images if not image.flat)
    grey = {domain: [image for image in images if image.grey] for domain, images in by_domain.items()}
    every = {domain for domain in "AB" if domain in grey and len(grey[domain]) == len(by_domain[domain])}
    for domain, some in grey.items():
        advice = "fine; they are trained on as RGB"
        if domain in every:
            flags = "--channels 1" + ("" if every == {"A", "B"} else " --channels-b 3")
            advice = f"all of {domain}: {flags if domain == 'A' else '--channels-b 1'} saves time"
        found += _listed(f"grey images stored as RGB{domain and f' in {domain}'}", advice, some, name)
    return found


def _domain(group: str) -> str:
    """A or B for the groups of a layout, such as "train A"."""
    split, _, domain = group.partition(" ")
    return domain if split in ("train", "test", "val") and domain in ("A", "B") else ""


def _shapes(seen: list[Seen], name: Callable[[Place], str], has_layout: bool) -> list[Finding]:
    if not has_layout:
        return []
    small = [image for image in seen if min(image.height, image.width) < _CROP]
    found = []
    if small:
        side = min(min(image.height, image.width) for image in small)
        fitting = max(32, side // 4 * 4)
        advice = (
            f"they are enlarged to 286x286; --load-size {fitting * 286 // 256} --crop-size "
            f"{fitting} suits the "
            "smallest"
        )
        found = _listed(f"images smaller than {_CROP} pixels", advice, small, name)
    long = [image for image in seen if max(image.height, image.width) > 1.25 * min(image.height, image.width)]
    advice = "they are squeezed into squares; --preprocess scale_shortside_and_crop keeps their shape"
    return [*found, *_listed("images far from square", advice, long, name)]


def table(checked: Checked) -> str:
    """Return the groups and the findings as text."""
    kind = checked.layout or "no training layout"
    pairs = ", equal names in A and B" if checked.paired and checked.layout != "side by side" else ""
    lines = [f"{checked.root}: {kind}{pairs}", ""]
    rows = [("", "images", "width x height: smallest, median, largest", "types", "values")]
    for group, images in checked.groups.items():
        rows.append((group, f"{len(images):,}", _sizes(images), _modes(images), _values(images)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), row[1].rjust(widths[1])]
        cells += [cell.ljust(width) for cell, width in zip(row[2:], widths[2:])]
        lines.append("  ".join(cells).rstrip())
    lines.append("")
    for finding in checked.findings:
        lines.append(f"{'problem' if finding.problem else 'note':7}  {finding.title}")
        lines.append(f"{'':9}{finding.advice}")
        lines += [f"{'':11}{example}" for example in finding.examples]
        if finding.count > len(finding.examples) > 0:
            lines.append(f"{'':11}... and {finding.count - len(finding.examples):,} more")
    if not checked.findings:
        lines.append("nothing to remark")
    return "\n".join(lines)


def as_json(checked: Checked) -> dict[str, Any]:
    """Return the same as plain JSON values."""
    groups = {
        group: {
            "images": len(images),
            "width": _three([image.width for image in images]),
            "height": _three([image.height for image in images]),
            "aspect": _three([round(image.width / image.height, 4) for image in images]),
            "types": dict(Counter(image.mode for image in images)),
            "channels": sorted({image.channels for image in images}),
            "dtypes": sorted({str(image.dtype) for image in images}),
            "values": [min(i.low for i in images), max(i.high for i in images)] if images else [],
        }
        for group, images in checked.groups.items()
    }
    findings = [
        {"problem": f.problem, "what": f.what, "advice": f.advice, "count": f.count, "examples": f.examples}
        for f in checked.findings
    ]
    return {
        "folder": str(checked.root),
        "layout": checked.layout,
        "paired": checked.paired,
        "groups": groups,
        "findings": findings,
        "bad_files": checked.bad,
    }


def _three(values: list[Any]) -> list[Any]:
    return [min(values), float(np.median(values)), max(values)] if values else []


def _sizes(images: list[Seen]) -> str:
    ordered = sorted((image.width * image.height, image.width, image.height) for image in images)
    three = [f"{w}x{h}" for _, w, h in (ordered[:1] + ordered[len(ordered) // 2 :][:1] + ordered[-1:])]
    return three[0] if len(set(three)) == 1 else ", ".join(three)


def _modes(images: list[Seen]) -> str:
    counts = Counter(image.mode for image in images).most_common()
    return ", ".join(mode if len(counts) == 1 else f"{mode} {count}" for mode, count in counts)


def _values(images: list[Seen]) -> str:
    return f"{min(i.low for i in images):g} to {max(i.high for i in images):g}" if images else ""
