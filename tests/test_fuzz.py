"""Damaged, hostile and absurd image files through the command: no traceback, no hang, nothing half-written,
and less than 2 GB. FASTGAN_FUZZ=2000 in the environment makes more files, FASTGAN_SEED others."""

import io
import os
import re
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
import torch
from PIL import Image

from fastgan.data.images import read_images
from fastgan.models import ResnetGenerator

COUNT, SEED = int(os.environ.get("FASTGAN_FUZZ", "150")), int(os.environ.get("FASTGAN_SEED", "0"))
LIMIT = 2 * 2**30
Bytes = Callable[[bytes, np.random.Generator], bytes]


def originals(rng: np.random.Generator) -> dict[str, list[bytes]]:
    """Sound files of every format and of the variants that take other ways through the decoders."""
    colour = rng.integers(0, 256, (24, 20, 3), np.uint8)
    image = Image.fromarray(colour)
    found: dict[str, list[bytes]] = {}

    def pillow(suffix: str, picture: Image.Image = image, **options: object) -> None:
        buffer = io.BytesIO()
        kind = {"jpg": "JPEG", "tif": "TIFF", "pgm": "PPM"}.get(suffix, suffix.upper())
        picture.save(buffer, kind, **options)  # type: ignore[arg-type]
        found.setdefault(suffix, []).append(buffer.getvalue())

    def tiff(array: np.ndarray, **options: object) -> None:
        buffer = io.BytesIO()
        big = bool(options.pop("bigtiff", False))
        with tifffile.TiffWriter(buffer, bigtiff=big) as file:
            file.write(array, **options)
        found.setdefault("tif", []).append(buffer.getvalue())

    exif = Image.Exif()
    exif[0x0112] = 6
    profile = bytes(imagecodecs.cms_profile("adobergb"))
    pillow("png")
    pillow("png", image.convert("P"))
    pillow("png", image.convert("RGBA"), icc_profile=profile)
    found["png"].append(bytes(imagecodecs.png_encode(colour.astype(np.uint16) * 257)))
    pillow("jpg", exif=exif, icc_profile=profile)
    pillow("jpg", progressive=True)
    pillow("jpg", image.convert("CMYK"))
    pillow("webp", lossless=True)
    pillow("webp", image.convert("RGBA"), quality=80)
    pillow("bmp")
    pillow("bmp", image.convert("1"))
    pillow("ppm")
    pillow("pgm", image.convert("L"))
    for compression in ("zlib", "lzw", "jpeg", "packbits", None):
        tiff(colour, photometric="rgb", compression=compression, iccprofile=profile)
    tiff(np.stack([colour] * 3), photometric="rgb", metadata=None, bigtiff=True)
    tiff(rng.random((32, 48), np.float32), tile=(16, 16))
    tiff(
        rng.integers(0, 65536, (5, 24, 20)).astype(np.uint16),
        planarconfig="separate",
        photometric="minisblack",
    )
    for array in (colour, rng.random((3, 24, 20), np.float32), colour[..., 0].astype(np.int64)):
        buffer = io.BytesIO()
        np.save(buffer, array)
        found.setdefault("npy", []).append(buffer.getvalue())
    return found


def cut(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: rng.integers(0, len(data))]


def flip(data: bytes, rng: np.random.Generator) -> bytes:
    out = bytearray(data)
    for place in rng.integers(0, len(data), rng.integers(1, 9)):
        out[place] ^= 1 << rng.integers(8)
    return bytes(out)


def scramble(data: bytes, rng: np.random.Generator) -> bytes:
    start = int(rng.integers(0, len(data)))
    noise = rng.bytes(int(rng.integers(1, 40)))
    return data[:start] + noise + data[start + len(noise) :]


def head(data: bytes, rng: np.random.Generator) -> bytes:
    """A header with some bytes of it replaced: types, sizes, places."""
    out = bytearray(data)
    for place in rng.integers(0, min(len(data), 128), rng.integers(1, 6)):
        out[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))])
    return bytes(out)


def swap(data: bytes, rng: np.random.Generator) -> bytes:
    """The first bytes of another format."""
    magic = [
        b"\x89PNG\r\n\x1a\n",
        b"II*\0",
        b"MM\0*",
        b"II+\0",
        b"\xff\xd8\xff\xe0",
        b"BM",
        b"P6\n",
        b"RIFF",
        b"\x93NUMPY",
    ]
    new = magic[rng.integers(len(magic))]
    return new + data[len(new) :]


def insert(data: bytes, rng: np.random.Generator) -> bytes:
    place = int(rng.integers(0, len(data)))
    return data[:place] + rng.bytes(int(rng.integers(1, 200))) + data[place:]


def huge(data: bytes, rng: np.random.Generator) -> bytes:
    """A header that promises 100 to 65,535 pixels or more a side, with check sums that agree."""
    w, h = (int(2 ** rng.uniform(6.7, 16)) for _ in range(2))
    if data[:4] == b"\x89PNG":
        header = b"IHDR" + w.to_bytes(4, "big") + h.to_bytes(4, "big") + data[24:29]
        return data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]
    if data[:2] == b"\xff\xd8":
        frame = re.search(rb"\xff[\xc0\xc2]..\x08", data, re.DOTALL)
        at = frame.end() if frame else 0
        sides = min(h, 65535).to_bytes(2, "big") + min(w, 65535).to_bytes(2, "big")
        return data[:at] + sides + data[at + 4 :]
    if data[:2] == b"BM":
        return data[:18] + w.to_bytes(4, "little") + h.to_bytes(4, "little") + data[26:]
    if data[:1] == b"P":
        return data[:3] + f"{w} {h}\n255\n".encode() + data[12:]
    if data[:6] == b"\x93NUMPY":
        shape = re.sub(rb"\(.*\)", f"({w}, {h}, 3)".encode(), data[10:128])
        return data[:10] + shape[:117].ljust(117) + b"\n" + data[128:]
    if data[:2] == b"II":
        out = bytearray(data)
        # ImageWidth 256, ImageLength 257, and SamplesPerPixel 277
        for tag, value in ((256, w), (257, h), (277, int(rng.integers(1, 40)))):
            for kind in (3, 4):
                at = out.find(tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + b"\1\0\0\0")
                if at >= 0 and (tag != 277 or rng.random() < 0.3):
                    out[at + 8 : at + 10] = (value & 0xFFFF).to_bytes(2, "little")
        return bytes(out)
    return head(data, rng)


MUTATIONS: list[Bytes] = [cut, flip, scramble, head, swap, insert, huge, huge]


def mutants(count: int, rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    found = [(suffix, data) for suffix, files in originals(rng).items() for data in files]
    suffixes = sorted({suffix for suffix, _ in found})
    for k in range(count):
        suffix, data = found[k % len(found)]
        for _ in range(1 + int(rng.integers(2))):
            data = MUTATIONS[rng.integers(len(MUTATIONS))](data, rng) if data else data
        if rng.random() < 0.1:
            suffix = suffixes[rng.integers(len(suffixes))]
        yield f"{k:05d}.{suffix}", data


def test_nothing_that_a_file_holds_breaks_translate(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    torch.manual_seed(0)
    torch.save(ResnetGenerator(3, 3, ngf=2, blocks=1).state_dict(), tmp_path / "latest_net_G_A.pth")
    made = dict(mutants(COUNT, np.random.default_rng(SEED)))
    for name, data in made.items():
        (source / name).write_bytes(data)
    sound = originals(np.random.default_rng(1))["png"][0]
    (source / "sound.png").write_bytes(sound)
    (source / "empty.png").touch()
    (source / "folder.png").mkdir()
    odd = ["empty.png"]
    if hasattr(os, "mkfifo"):
        (source / "loop.png").symlink_to(source / "loop.png")
        (source / "dangling.png").symlink_to(source / "gone.png")
        (source / "around").symlink_to(source)
        os.mkfifo(source / "pipe.png")
        odd += ["loop.png", "dangling.png", "pipe.png"]
    command = [
        sys.executable,
        "-m",
        "fastgan.translate",
        str(tmp_path / "latest_net_G_A.pth"),
        str(source),
        str(out),
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen([*command, "--device", "cpu"], stdout=said, stderr=said, env=env)
        # a file takes 0.1 s at most; a minute to start on a busy machine
        alarm = threading.Timer(120 + COUNT, process.kill)
        alarm.start()
        _, status, usage = os.wait4(process.pid, 0)
        alarm.cancel()
    lines = (tmp_path / "said").read_text().splitlines()
    tail = "\n".join(lines[-20:])
    assert os.waitstatus_to_exitcode(status) == 2, tail
    assert not [line for line in lines if "Traceback" in line or "Warning" in line], tail
    skipped = [
        re.sub(r"^skipped: (.*?\.\w+)\b.*", r"\1", line) for line in lines if line.startswith("skipped: ")
    ]
    written = [p for p in out.rglob("*") if p.is_file()]
    # every file is either reported in one line or translated whole
    stems = {re.sub(r"_page\d+$", "", p.stem) for p in written}
    named = {Path(line).stem for line in skipped}
    assert stems | named == {Path(name).stem for name in [*made, *odd, "sound.png"]}
    assert not stems & named and {Path(name).stem for name in odd} <= named and "sound" in stems
    assert len(lines) == len(skipped) + 2 + sum(line.startswith("note: ") for line in lines), tail
    assert not [p for p in written if p.name.startswith(".")]
    for path in written:
        read_images(path)
    # kilobytes on Linux, bytes on macOS
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{len(made)} mutants: {len(skipped)} refused, {len(written)} written, peak {peak / 1e9:.2f} GB")
    assert peak < LIMIT
