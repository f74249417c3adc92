"""Unpack a zip or tar archive that nobody has looked at: nothing is written outside the target folder.

Refused as a whole: absolute names, drive letters, "..", names that occur twice, links that lead outside,
devices, and archives that unpack to more than a given size or number of files (counted while writing, since
headers can lie). Links inside are left out. Everything goes into a hidden folder beside the target, which
is renamed at the end: a half-unpacked set is never seen.
"""

import lzma
import posixpath
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal, NamedTuple

from fastgan.data.images import DataError

MAX_FILES = 2_000_000
# images hardly shrink in an archive: what grows beyond this is a bomb
_GROWTH = 50
_SLACK = 1 << 30
_CHUNK = 1 << 20
# a lone folder of such a name is part of the layout, not a wrapping
_SPLIT = re.compile(r"(train|test|val)?[-_]?[ab]?", re.IGNORECASE)
_JUNK = ("__MACOSX", ".DS_Store", "Thumbs.db")


class _Member(NamedTuple):
    name: str
    kind: Literal["file", "folder", "link", "other"]
    link: str
    open: IO[bytes] | None


def unpack(
    archive: Path, target: Path, *, max_bytes: int | None = None, max_files: int = MAX_FILES
) -> tuple[int, int]:
    """Unpack archive (zip, tar, tar.gz, tar.bz2, tar.xz) as the folder target; returns the number of files
    and of links that were left out.

    A single folder at the top of the archive becomes the target itself. max_bytes: most bytes of all files;
    default 50 times the archive and 1 GB, and never more than the disk has free. Raises DataError if the
    archive is damaged, of another kind or hostile, or if target exists; then nothing is left behind.
    """
    if target.exists():
        raise DataError(f"{target}: exists already; remove it or choose another folder")
    free = shutil.disk_usage(archive.parent).free
    limit = _GROWTH * archive.stat().st_size + _SLACK if max_bytes is None else max_bytes
    hidden = target.with_name(f".{target.name}.unpacking")
    try:
        shutil.rmtree(hidden, ignore_errors=True)  # what a killed process left
        hidden.mkdir(parents=True)
        count, links = _write_all(archive, hidden, min(limit, free), limit > free, max_files)
        if not count:
            raise DataError(f"{archive}: holds no files")
        top = list(hidden.iterdir())
        wrapped = len(top) == 1 and top[0].is_dir() and not _SPLIT.fullmatch(top[0].name)
        (top[0] if wrapped else hidden).replace(target)
        return count, links
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError) as error:
        raise DataError(f"{archive}: damaged archive ({error or type(error).__name__}); remove it") from error
    except (NotImplementedError, RuntimeError) as error:  # zipfile: a password or an unknown method
        raise DataError(f"{archive}: cannot be unpacked ({error})") from error
    except OSError as error:
        raise DataError(f"{archive}: cannot be unpacked ({error.strerror or error})") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _write_all(archive: Path, folder: Path, limit: int, by_disk: bool, max_files: int) -> tuple[int, int]:
    count, links, left = 0, 0, limit
    for member in _members(archive):
        parts = _parts(archive, member.name)
        if not parts or any(part in _JUNK or part.startswith("._") for part in parts):
            continue
        goal = folder.joinpath(*parts)
        if member.kind == "other":
            raise DataError(f"{archive}: refused, {member.name!r} is a device or a pipe")
        if member.kind == "link":
            _check_link(archive, member)
            links += 1
            continue
        if member.kind == "folder":
            goal.mkdir(parents=True, exist_ok=True)
            continue
        count += 1
        if count > max_files:
            raise DataError(f"{archive}: refused, it holds more than {max_files:,} files")
        goal.parent.mkdir(parents=True, exist_ok=True)
        if goal.exists():
            raise DataError(f"{archive}: refused, {member.name!r} occurs twice")
        assert member.open is not None
        with goal.open("xb") as out, member.open as source:
            while chunk := source.read(_CHUNK):
                left -= len(chunk)
                if left < 0:
                    why = "the disk has free" if by_disk else "an archive of images of its size can hold"
                    raise DataError(
                        f"{archive}: refused, it unpacks to more than {limit:,} bytes, which {why}"
                    )
                out.write(chunk)
    return count, links


def _members(archive: Path) -> Iterator[_Member]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                mode = info.external_attr >> 16
                if stat.S_ISLNK(mode):
                    yield _Member(
                        info.filename, "link", zipped.read(info)[:4096].decode("utf-8", "replace"), None
                    )
                elif info.is_dir():
                    yield _Member(info.filename, "folder", "", None)
                elif stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                    yield _Member(info.filename, "other", "", None)
                else:
                    yield _Member(info.filename, "file", "", zipped.open(info))
        return
    try:
        tar = tarfile.open(archive, "r|*")  # noqa: SIM115, closed below
    except tarfile.ReadError as error:
        raise DataError(f"{archive}: is neither a zip nor a tar archive") from error
    with tar:
        for entry in tar:
            if entry.isfile():
                yield _Member(entry.name, "file", "", tar.extractfile(entry))
            elif entry.isdir():
                yield _Member(entry.name, "folder", "", None)
            elif entry.issym() or entry.islnk():
                # a symbolic link counts from its own folder, a hard link from the top
                yield _Member(entry.name if entry.issym() else "x", "link", entry.linkname, None)
            else:
                yield _Member(entry.name, "other", "", None)


def _parts(archive: Path, name: str) -> list[str]:
    """The folders and the file of a member's name; raises DataError if it could lead elsewhere."""
    plain = name.replace("\\", "/")
    parts = [part for part in plain.split("/") if part not in ("", ".")]
    if plain.startswith("/") or ".." in parts or ":" in plain or any(ord(letter) < 32 for letter in plain):
        raise DataError(f"{archive}: refused, its member {name!r} would lie outside the folder")
    return parts


def _check_link(archive: Path, member: _Member) -> None:
    link = member.link.replace("\\", "/")
    goal = posixpath.normpath(posixpath.join(posixpath.dirname(member.name), link))
    if link.startswith("/") or ":" in link or goal.split("/")[0] == "..":
        raise DataError(f"{archive}: refused, {member.name!r} is a link to {member.link!r}, which is outside")
