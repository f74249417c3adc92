"""Downloads over a server that breaks in every way, and archives that mean harm."""

import hashlib
import io
import json
import stat
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastgan.data import __main__ as tools
from fastgan.data import download as downloading
from fastgan.data.download import Expected, download
from fastgan.data.images import DataError
from fastgan.data.sets import PUBLIC_SETS
from fastgan.data.unpack import unpack

BODY = np.random.default_rng(0).bytes(300_000)
OTHER = np.random.default_rng(1).bytes(300_000)


class Server(ThreadingHTTPServer):
    """Serves one file; `plan` holds what goes wrong, one entry a request, and `asked` what was asked for."""

    daemon_threads = True
    body, etag, date = BODY, '"one"', ""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.asked, self.always = list[str](), list[str](), "ok"
        self.stop = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/set.zip"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:  # noqa: N802
        server = self.server
        server.asked.append(self.headers.get("Range", ""))
        kind, _, value = (server.plan.pop(0) if server.plan else server.always).partition(" ")
        if kind == "status":
            self.send_response(int(value))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if kind == "redirect":
            self.send_response(302)
            self.send_header("Location", value)
            self.end_headers()
            return
        if kind == "hang":
            self.send_response(200)
            self.send_header("Content-Length", str(len(server.body)))
            self.end_headers()
            server.stop.wait(3)
            return
        if kind == "change":
            server.body, server.etag = OTHER, '"two"'
        start = 0
        wanted = self.headers.get("Range", "")
        same = self.headers.get("If-Range") in (None, server.etag or server.date)
        if wanted and same and kind != "whole":
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(server.body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if kind == "html":
            self.send_header("Content-Type", "text/html; charset=utf-8")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.body) - 1}/{len(server.body)}")
        if server.etag:
            self.send_header("ETag", server.etag)
        if server.date:
            self.send_header("Last-Modified", server.date)
        rest = server.body[start:]
        if kind != "chunked":
            self.send_header("Content-Length", str(len(rest) + (int(value) if kind == "length" else 0)))
        self.end_headers()
        self.wfile.write(rest[: int(value)] if kind in ("cut", "whole") and value else rest)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.stop.set()
    server.shutdown()
    thread.join()
    server.server_close()


def get(server: Server, target: Path, expected: Expected = Expected(), retries: int = 2) -> str:  # noqa: B008
    return download(server.url, target, expected, timeout=0.3, retries=retries, wait=0.001)


PLANS = {
    "whole": ([], [""]),
    "cut": (["cut 100000"], ["", "bytes=100000-"]),
    # progress starts the count of attempts anew
    "cut often": (["cut 50000"] * 5, [""] + [f"bytes={n}0000-" for n in (5, 10, 15, 20, 25)]),
    "busy": (["status 500", "status 503"], [""] * 3),
    "hangs": (["hang"], ["", ""]),
    "too short": (["length 5"], ["", "bytes=300000-", ""]),
    "ignores ranges": (["cut 1000", "whole"], ["", "bytes=1000-"]),
    "no length": (["chunked"], [""]),
}


@pytest.mark.parametrize("case", PLANS)
def test_broken_transfers_go_on(tmp_path: Path, server: Server, case: str) -> None:
    plan, asked = PLANS[case]
    server.plan = [*plan, "ok", "ok"]
    assert get(server, tmp_path / "new" / "x.zip") == hashlib.sha256(BODY).hexdigest()
    assert (tmp_path / "new/x.zip").read_bytes() == BODY
    assert server.asked == asked
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.zip"]


@pytest.mark.parametrize("validator", ["etag", "date"])
def test_a_file_that_changes_in_between_is_not_mixed(tmp_path: Path, server: Server, validator: str) -> None:
    if validator == "date":
        server.etag, server.date = "", "Sat, 21 Nov 2026 10:00:00 GMT"
    server.plan = ["cut 100000", "change", "ok"]
    get(server, tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_bytes() == OTHER
    assert server.asked == ["", "bytes=100000-"]


def test_without_a_validator_only_a_hash_allows_to_go_on(tmp_path: Path, server: Server) -> None:
    server.etag = 'W/"weak"'
    server.plan = ["cut 100000", "ok"]
    get(server, tmp_path / "x.zip")
    assert server.asked == ["", ""]
    server.plan = ["cut 100000", "ok"]
    get(server, tmp_path / "y.zip", Expected(len(BODY), hashlib.sha256(BODY).hexdigest().upper()))
    assert server.asked[2:] == ["", "bytes=100000-"]


def test_the_same_command_goes_on_later(tmp_path: Path, server: Server) -> None:
    server.plan = ["cut 100000", "status 503"]
    with pytest.raises(
        DataError,
        match=r"gave up after 2 attempts; 100,000 bytes are in .*x.zip.part: the same",
    ):
        get(server, tmp_path / "x.zip", retries=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.zip.part", "x.zip.part.json"]
    server.plan = ["ok"]
    get(server, tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_bytes() == BODY and server.asked[-1] == "bytes=100000-"


REFUSED = {
    "404": ("status 404", "the server answers 404"),
    "circle": ("redirect /set.zip", "redirect that is not followed .*infinite loop"),
    "to a file": ("redirect file:///etc/hostname", "redirect that is not followed .*file:"),
    "500 for ever": ("status 500", "the server answers 500; gave up after 3 attempts"),
    "hangs for ever": ("hang", "timed out.*gave up after 3 attempts$"),
    "web page": ("html", "a web page instead of an archive"),
    "wrong size": ("ok", "the server has 300,000 bytes, expected 5"),
    "wrong hash": ("ok", "its SHA-256 is"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_had_is_one_line_and_no_file(tmp_path: Path, server: Server, case: str) -> None:
    server.always, text = REFUSED[case]
    known = {"wrong size": Expected(5), "wrong hash": Expected(None, "0" * 64)}.get(case, Expected())
    start = time.monotonic()
    with pytest.raises(DataError, match=text) as caught:
        get(server, tmp_path / "x.zip", known)
    assert "\n" not in str(caught.value) and time.monotonic() - start < 3
    assert not (tmp_path / "x.zip").exists() and not (tmp_path / "x.zip.part").exists()


def test_addresses_and_disk(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("file:///etc/hostname", "ftp://127.0.0.1/x", "horse2zebra", "http:///x"):
        with pytest.raises(DataError, match="must start with http"):
            download(url, tmp_path / "x")
    usage = downloading.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(downloading.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DataError, match="300,000 bytes to download, 1,000 free"):
        get(server, tmp_path / "x")
    with pytest.raises(DataError, match="cannot be written"):
        download(server.url, server_file(tmp_path) / "x")


def server_file(folder: Path) -> Path:
    (folder / "file").write_bytes(b"")
    return folder / "file"


def png(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def zipped(members: dict[str, bytes | str], **changes: object) -> bytes:
    """A zip file; a str is the target of a symbolic link."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (stat.S_IFLNK if isinstance(data, str) else stat.S_IFREG | 0o644) << 16
            archive.writestr(info, data)
    return buffer.getvalue()


def tarred(*members: tuple[str, bytes | str, bytes], mode: str = "w:gz") -> bytes:
    """A tar file of (name, contents or link, type)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data, kind in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if isinstance(data, str):
                info.linkname = data
            else:
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data) if isinstance(data, bytes) else None)
    return buffer.getvalue()


SET = {
    f"h2z/{split}{domain}/{n}.png": png(n) for split in ("train", "test") for domain in "AB" for n in (1, 2)
}
FILE, SYM, HARD = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE


def main(words: list[object], code: int, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    with pytest.raises(SystemExit) as stop:
        tools.main([str(word) for word in words])
    said = capsys.readouterr()
    assert stop.value.code == code, said
    return said.out, said.err


def test_download_command(tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.body, server.plan = zipped(SET), ["cut 3000", "ok"]
    words = ["download", "h2z", "--url", server.url, "--out", tmp_path, "--timeout", 1]
    out, _ = main(words, 0, capsys)
    assert "layout trainA: train 2 A and 2 B, test 2 and 2" in out
    assert f"train: python -m fastgan.train cyclegan --data {tmp_path / 'h2z'}" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["h2z", "h2z.json"]
    assert (tmp_path / "h2z/trainA/1.png").read_bytes() == png(1)
    about = json.loads((tmp_path / "h2z.json").read_text())
    assert about["sha256"] == hashlib.sha256(server.body).hexdigest() and about["size"] == len(server.body)

    out, _ = main(words, 0, capsys)
    assert "is there already" in out and len(server.asked) == 2
    # another archive under the same address later
    (tmp_path / "h2z").rename(tmp_path / "old")
    server.body, server.etag, server.plan = zipped({**SET, "h2z/trainA/3.png": png(3)}), '"new"', ["ok"]
    out, err = main([*words, "--keep-archive"], 0, capsys)
    assert "it was another archive" in err and "train 3 A and 2 B" in out
    # an archive that was kept is used again if it is still the same one
    for change, requests in ((b"", 3), (b"x", 4)):
        (tmp_path / "h2z").rename(tmp_path / f"old{requests}")
        with (tmp_path / "h2z.zip").open("ab") as file:
            file.write(change)
        main([*words, "--keep-archive"], 0, capsys)
        assert len(server.asked) == requests


def test_ctrl_c_leaves_what_goes_on(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(downloading.tqdm):  # type: ignore[misc, type-arg, unused-ignore]
        def update(self, n: float | None = 1) -> bool | None:
            raise KeyboardInterrupt

    server.body, server.plan = zipped(SET), ["ok", "ok"]
    words = ["download", "h2z", "--url", server.url, "--out", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(downloading, "tqdm", Interrupted)
        patch.setattr(downloading, "_CHUNK", 1000)
        _, err = main(words, 130, capsys)
    assert err == "error: stopped; the same command goes on from here\n"
    arrived = (tmp_path / "h2z.zip.part").stat().st_size
    assert 0 < arrived <= 1000
    main(words, 0, capsys)
    assert server.asked == ["", f"bytes={arrived}-"] and (tmp_path / "h2z/testB/2.png").exists()


@pytest.mark.parametrize(
    "words, text",
    [
        (["download", "cityscapes"], "leftImg8bit_trainvaltest.zip"),
        (["download", "facades"], "did you mean facades-unpaired or facades-pairs?"),
        (["download", "../x", "--url", "http://127.0.0.1/x"], "plain folder name"),
        (["download", "x", "--url", "file:///etc/hostname"], "must start with http"),
        (["download", "x", "--url", "http://127.0.0.1/x", "--sha256", "12"], "64 hexadecimal digits"),
        (["download", "horse2zebra", "--timeout", "0"], "--timeout must be above 0"),
        (["download"], "NAME"),
        (["dowload", "x"], "unknown command dowload"),
        (["list", "x"], "list takes no arguments"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str],
    text: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    _, err = main(words, 2, capsys)
    assert text.lower() in err.lower() and err.count("\n") == 1
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = main(["list"], 0, capsys)
    assert all(name in out for name in PUBLIC_SETS) and "cityscapes" in out and "117 MB" in out
    for entry in PUBLIC_SETS.values():
        assert entry.url.startswith("https://efrosgans.eecs.berkeley.edu/")
        assert entry.sha256 is None or (tools._is_sha256(entry.sha256) and entry.size)


GOOD = {
    "wrapped": (zipped({**SET, "__MACOSX/._x": b"", "h2z/.DS_Store": b"x"}), 8, 0, "trainA/1.png"),
    "bare": (zipped({f"trainA{n}/1.png": b"x" for n in "12"}), 2, 0, "trainA1/1.png"),
    "a lone split": (zipped({"train/1.png": b"x"}), 1, 0, "train/1.png"),
    "tar.gz": (tarred(("f/train/1.jpg", b"x", FILE), ("./f/val/2.jpg", b"y", FILE)), 2, 0, "val/2.jpg"),
    "tar.xz": (tarred(("f/1.jpg", b"x", FILE), mode="w:xz"), 1, 0, "1.jpg"),
    "links inside": (
        tarred(("f/a", b"x", FILE), ("f/b", "a", SYM), ("f/c", "f/a", HARD), ("f/d/e", "../a", SYM)),
        1,
        3,
        "a",
    ),
    "zip link inside": (zipped({"f/a": b"x", "f/b": "a"}), 1, 1, "a"),
}  # fmt: skip


@pytest.mark.parametrize("case", GOOD)
def test_archives_are_unpacked(tmp_path: Path, case: str) -> None:
    data, files, links, name = GOOD[case]
    (tmp_path / "x.zip").write_bytes(data)
    # what a killed process left behind
    (tmp_path / ".goal.unpacking").mkdir()
    (tmp_path / ".goal.unpacking/half").write_bytes(b"")
    assert unpack(tmp_path / "x.zip", tmp_path / "goal") == (files, links)
    assert (tmp_path / "goal" / name).is_file()
    found = [path for path in (tmp_path / "goal").rglob("*") if not path.is_dir()]
    assert len(found) == files and not any(path.is_symlink() for path in found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["goal", "x.zip"]
    with pytest.raises(DataError, match="exists already"):
        unpack(tmp_path / "x.zip", tmp_path / "goal")


BOMB = b"\0" * 20_000_000
LIAR = zipped({"a.png": BOMB}).replace((20_000_000).to_bytes(4, "little"), (100).to_bytes(4, "little"))
HOSTILE = {
    "zip slip": (zipped({"a.png": b"x", "../evil": b"x"}), "outside the folder"),
    "deep slip": (zipped({"a/../../evil": b"x"}), "outside the folder"),
    "absolute": (zipped({"/tmp/evil": b"x"}), "outside the folder"),
    "drive": (zipped({"C:\\evil": b"x"}), "outside the folder"),
    "backslashes": (zipped({"..\\evil": b"x"}), "outside the folder"),
    "tar slip": (tarred(("../evil", b"x", FILE)), "outside the folder"),
    "tar absolute": (tarred(("/tmp/evil", b"x", FILE)), "outside the folder"),
    "zip link": (zipped({"link": "..", "link/evil": b"x"}), "is a link to"),
    "link": (tarred(("a/link", "../..", SYM), ("a/link/evil", b"x", FILE)), "is a link to"),
    "absolute link": (tarred(("link", "/etc", SYM), ("link/evil", b"x", FILE)), "is a link to"),
    "hard link": (tarred(("link", "../x.zip", HARD)), "is a link to"),
    "device": (tarred(("null", b"", tarfile.CHRTYPE)), "is a device"),
    "pipe": (tarred(("pipe", b"", tarfile.FIFOTYPE)), "is a device or a pipe"),
    "zip bomb": (zipped({"a.png": BOMB}), "unpacks to more than 1,000,000 bytes"),
    "tar bomb": (tarred(("a.png", BOMB, FILE)), "unpacks to more than 1,000,000 bytes"),
    "lying header": (LIAR, "damaged archive|unpacks to more"),
    "many files": (zipped({f"{n}.png": b"" for n in range(60)}), "more than 50 files"),
    "cut zip": (zipped(SET)[:-30], "neither a zip nor a tar|damaged"),
    "cut tar": (tarred(("a.png", BODY, FILE))[:-5000], "damaged archive"),
    "rotten zip": (zipped({"a.png": BODY}).replace(BODY[5000:5100], b"\0" * 100), "damaged archive"),
    "no archive": (BODY, "neither a zip nor a tar"),
    "empty": (zipped({}), "holds no files"),
    "file as folder": (tarred(("a", b"x", FILE), ("a/b", b"x", FILE)), "cannot be unpacked"),
    "twice": (tarred(("a", b"x", FILE), ("a", b"y", FILE)), "occurs twice"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_and_damaged_archives_leave_nothing(tmp_path: Path, case: str) -> None:
    data, text = HOSTILE[case]
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "x.zip").write_bytes(data)
    with pytest.raises(DataError, match=text) as caught:
        unpack(folder / "x.zip", folder / "goal", max_bytes=1_000_000, max_files=50)
    assert "\n" not in str(caught.value)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["in", "in/x.zip"]
    assert not Path("/tmp/evil").exists()
