"""Download one file over HTTP(S): it appears whole and checked or not at all, and goes on where it was cut
off.

What has arrived lies in TARGET.part, and in TARGET.part.json what the server called it (ETag or date,
size). A later request asks for the rest with Range and If-Range (RFC 9110, sections 13.1.5 and 14): a
server that holds another file by now, or does not know ranges, sends the whole file, which starts anew.
Without an ETag or a date the rest could be that of another file; then it is only asked for if the SHA-256
of the whole is known.
"""

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from fastgan.data.images import DataError

_CHUNK = 1 << 18
_PASSING = {408, 425, 429, 500, 502, 503, 504}
_LONGEST_WAIT = 60.0


@dataclass(frozen=True)
class Expected:
    """What is known of a file before it is downloaded."""

    size: int | None = None
    sha256: str | None = None


class _Broken(Exception):
    """A fault that may pass: the connection was cut, or the server is busy."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        super().__init__(why)
        self.wait = wait


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        # never from https to http, to ftp or to a file of this machine
        old, new = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if new not in ("http", "https") or (old == "https" and new == "http"):
            raise DataError(f"{req.full_url}: redirects to {newurl}, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(
    url: str,
    target: Path,
    expected: Expected = Expected(),  # noqa: B008, it is frozen
    *,
    timeout: float = 30.0,
    retries: int = 6,
    wait: float = 1.0,
) -> str:
    """Download url into target and return the SHA-256 in hex; `TARGET.part` stays behind if it is cut off.

    timeout: seconds without a byte after which a connection counts as broken. retries: attempts in a row
    that bring nothing new. wait: seconds before the second attempt, doubled each time up to a minute.
    Raises DataError if the address is no http(s), the server refuses, size or SHA-256 differ, the disk is
    full, or the attempts are used up.
    """
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise DataError(f"{url}: the address must start with http:// or https://")
    part, about = target.with_name(target.name + ".part"), target.with_name(target.name + ".part.json")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        failed = 0
        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                _attempt(url, part, about, expected, timeout)
                break
            except _Broken as error:
                after = part.stat().st_size if part.exists() else 0
                failed = 1 if after > before else failed + 1
                if failed > retries:
                    here = f"; {after:,} bytes are in {part}: the same command goes on from there"
                    if not after:
                        _forget(part, about)
                        here = ""
                    raise DataError(f"{url}: {error}; gave up after {failed} attempts{here}") from error
                pause = min(_LONGEST_WAIT, max(wait * 2 ** (failed - 1), error.wait))
                print(f"{target.name}: {error}; again in {pause:.3g} s", file=sys.stderr)
                time.sleep(pause)
        digest = file_sha256(part)
        if expected.sha256 is not None and digest != expected.sha256.lower():
            _forget(part, about)
            raise DataError(
                f"{url}: its SHA-256 is {digest}, expected {expected.sha256}; the download was "
                "removed: it is "
                "damaged or another file"
            )
        part.replace(target)
        about.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({error.strerror or error})") from error
    return digest


def _attempt(url: str, part: Path, about: Path, expected: Expected, timeout: float) -> None:
    """Bring the rest of the file, or all of it; returns when part is complete."""
    known = _load(about) if part.exists() else {}
    validator = known.get("validator")
    same = known.get("url") == url and (validator is not None or expected.sha256 is not None)
    start = part.stat().st_size if part.exists() and same else 0
    if start and start == known.get("total"):
        return
    headers = {"User-Agent": "fastgan", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if validator is not None:
            headers["If-Range"] = validator
    try:
        opener = urllib.request.build_opener(_Redirects)
        with opener.open(urllib.request.Request(url, headers=headers), timeout=timeout) as answer:
            start, total = _place(url, answer, start, known.get("total"), expected)
            _check_disk(part, (total or 0) - start)
            found = {"url": url, "validator": _validator(answer.headers), "total": total}
            about.write_text(json.dumps(found), encoding="utf-8")
            _receive(answer, part, start, total)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            # what is here is longer than what the server has: another file
            _forget(part, about)
            raise _Broken("the file on the server has changed, starting anew") from error
        if error.code in _PASSING:
            raise _Broken(f"the server answers {error.code}", _retry_after(error)) from error
        moved = 300 <= error.code < 400
        reason = "a redirect that is not followed" if moved else f"the server answers {error.code}"
        raise DataError(f"{url}: {reason} ({' '.join(str(error.reason).split())[:90]})") from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise DataError(f"{url}: the server's certificate is not valid ({error.reason})") from error
        raise _Broken(f"no connection ({error.reason})") from error
    except (TimeoutError, ConnectionError, ssl.SSLError, http.client.HTTPException) as error:
        raise _Broken(f"the connection broke ({error or type(error).__name__})") from error


def _place(
    url: str, answer: Any, start: int, total_before: int | None, expected: Expected
) -> tuple[int, int | None]:
    """Return where the body starts in the file and how long the file is, if that is said."""
    if "text/html" in answer.headers.get("Content-Type", ""):
        raise DataError(f"{url}: the server sends a web page instead of an archive; open it in a browser")
    length = _number(answer.headers.get("Content-Length"))
    if answer.status == 206:
        unit, _, rest = answer.headers.get("Content-Range", "").partition(" ")
        span, _, whole = rest.partition("/")
        first, total = _number(span.partition("-")[0]), _number(whole)
        if unit != "bytes" or first != start or (total_before and total != total_before):
            raise _Broken("the server sends another range than asked for")
    else:
        start, total = 0, length
    if total is not None and expected.size is not None and total != expected.size:
        raise DataError(
            f"{url}: the server has {total:,} bytes, expected {expected.size:,}: another file; "
            "if it is right, "
            "give it another name and --url"
        )
    return start, total if total is not None else expected.size


def _receive(answer: Any, part: Path, start: int, total: int | None) -> None:
    with part.open("r+b" if start else "wb") as file:
        file.truncate(start)
        file.seek(start)
        with tqdm(
            total=total,
            initial=start,
            desc=part.name.removesuffix(".part"),
            unit="B",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
        ) as bar:
            done = start
            # read1 gives what has come: a cut connection costs nothing that arrived
            while chunk := answer.read1(_CHUNK):
                done += len(chunk)
                if total is not None and done > total:
                    break
                file.write(chunk)
                bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    if total is not None and done < total:
        raise _Broken(f"the connection ended {total - done:,} bytes early")
    if total is not None and done > total:
        part.unlink()
        raise _Broken(f"the server sent more than the {total:,} bytes it had announced")


def _check_disk(part: Path, missing: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if missing > free:
        raise DataError(f"{part}: {missing:,} bytes to download, {free:,} free on this disk; free some space")


def _validator(headers: Any) -> str | None:
    # If-Range takes no weak ETag
    etag = headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")


def _retry_after(error: urllib.error.HTTPError) -> float:
    return float(_number(error.headers.get("Retry-After")) or 0)


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.strip().isdecimal() else None


def _load(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def _forget(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
