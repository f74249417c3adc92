"""Every image format read back exactly, every kind of bad file refused in one line."""

import io
import re
import warnings
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from fastgan.data.images import (
    DataError,
    from_unit,
    list_images,
    natural_key,
    probe,
    read_images,
    to_unit,
    write_image,
)

DTYPES = {"uint8": np.uint8, "uint16": np.uint16, "float32": np.float32}


def _random(*shape: int, dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype == "float32":
        return rng.normal(size=shape).astype(np.float32)
    return rng.integers(0, np.iinfo(dtype).max, size=shape, endpoint=True).astype(dtype)


def _read_one(path: Path, **options: object) -> np.ndarray:
    """Read a file of one image and check that its header alone tells the same."""
    (image,) = read_images(path, **options)  # type: ignore[arg-type]
    if not options:
        assert probe(path) == (*image.shape, image.dtype, 1)
    assert image.flags.c_contiguous
    return image


LOSSLESS = [
    (suffix, channels, dtype)
    for suffix, dtypes, counts in [
        (".png", ("uint8", "uint16"), (1, 3)),
        (".webp", ("uint8",), (3,)),
        (".bmp", ("uint8",), (1, 3)),
        (".tif", ("uint8", "uint16", "float32"), (1, 2, 3, 4, 6)),
        (".npy", ("uint8", "uint16", "float32"), (1, 2, 3, 4, 6)),
    ]
    for dtype in dtypes
    for channels in counts
]


@pytest.mark.parametrize("suffix, channels, dtype", LOSSLESS)
def test_written_files_read_back_exactly(tmp_path: Path, suffix: str, channels: int, dtype: str) -> None:
    image = _random(17, 23, channels, dtype=dtype)
    path = tmp_path / f"x{suffix}"
    write_image(path, image)
    np.testing.assert_array_equal(_read_one(path), image, strict=True)
    write_image(path, image[..., 0])
    grey = _read_one(path)
    if suffix == ".webp":  # WebP has no grey
        grey = grey[..., :1]
    np.testing.assert_array_equal(grey, image[..., :1], strict=True)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_webp_grey_comes_back_as_rgb(tmp_path: Path) -> None:
    image = _random(8, 8, 1)
    write_image(tmp_path / "x.webp", image)
    np.testing.assert_array_equal(_read_one(tmp_path / "x.webp"), image.repeat(3, axis=2))


def test_jpeg(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 32).round().astype(np.uint8)
    colour = np.stack(
        [ramp[None].repeat(32, 0), ramp[:, None].repeat(32, 1), np.full((32, 32), 90, np.uint8)], -1
    )
    write_image(tmp_path / "c.jpg", colour)
    write_image(tmp_path / "g.jpeg", colour[..., :1])
    # quality 95 without chroma subsampling keeps a smooth picture within a few levels
    assert np.abs(_read_one(tmp_path / "c.jpg").astype(int) - colour).max() <= 6
    assert np.abs(_read_one(tmp_path / "g.jpeg").astype(int) - colour[..., :1]).max() <= 3


@pytest.mark.parametrize("ycck", [False, True])
def test_jpeg_cmyk_has_true_colours(tmp_path: Path, ycck: bool) -> None:
    """Photoshop stores CMYK inverted, plain or as YCCK; both must come out as the colours seen."""
    rgb = np.zeros((16, 48, 3), np.uint8)
    rgb[:, :16], rgb[:, 16:32], rgb[:, 32:] = (230, 40, 40), (255, 255, 255), (20, 60, 200)
    path = tmp_path / "x.jpg"
    if ycck:
        ink = 255 - np.asarray(Image.fromarray(rgb).convert("CMYK"))  # Adobe stores white as 255
        # imagecodecs converts to the wanted storage: 4 = CMYK, 5 = YCCK in libjpeg's J_COLOR_SPACE
        path.write_bytes(imagecodecs.jpeg8_encode(ink, level=98, colorspace="CMYK", outcolorspace="YCCK"))
    else:
        Image.fromarray(rgb).convert("CMYK").save(path, quality=98)
    assert b"Adobe" in path.read_bytes()[:400]
    assert Image.open(path).mode == "CMYK"
    assert np.abs(_read_one(path).astype(int) - rgb)[:, [8, 24, 40]].max() <= 8


def test_palette_and_one_bit(tmp_path: Path) -> None:
    rgb = (_random(9, 11, 3) // 128) * 200
    Image.fromarray(rgb).quantize(8).save(tmp_path / "p.png")
    np.testing.assert_array_equal(_read_one(tmp_path / "p.png"), rgb)
    Image.fromarray(rgb).quantize(8).save(tmp_path / "p.bmp")
    np.testing.assert_array_equal(_read_one(tmp_path / "p.bmp"), rgb)
    Image.fromarray(rgb).quantize(8).save(tmp_path / "p.tif")
    np.testing.assert_array_equal(_read_one(tmp_path / "p.tif"), rgb)
    bits = _random(9, 11) > 128
    for name in ("b.png", "b.bmp", "b.tif"):
        Image.fromarray(bits).save(tmp_path / name)
        np.testing.assert_array_equal(_read_one(tmp_path / name)[..., 0], bits * 255)
    four = np.asarray([[0, 5, 15]], np.uint8)
    (tmp_path / "four.png").write_bytes(_png_grey(four, bits=4))
    np.testing.assert_array_equal(_read_one(tmp_path / "four.png")[..., 0], four * 17)


def _png_grey(values: np.ndarray, bits: int) -> bytes:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(
        b"\0"
        + int("".join(f"{v:0{bits}b}" for v in row).ljust(-(-len(row) * bits // 8) * 8, "0"), 2).to_bytes(
            -(-len(row) * bits // 8), "big"
        )
        for row in values
    )
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    ends = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + ends


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_is_dropped_and_not_multiplied_in(tmp_path: Path, channels: int, dtype: str) -> None:
    image = _random(6, 7, channels, dtype=dtype)
    image[:3, :, -1] = 0
    (tmp_path / "x.png").write_bytes(imagecodecs.png_encode(image))
    tifffile.imwrite(
        tmp_path / "x.tif",
        image,
        photometric="rgb" if channels == 4 else "minisblack",
        extrasamples=["unassalpha"],
    )
    if dtype == "uint8" and channels == 4:
        Image.fromarray(image).save(tmp_path / "x.webp", lossless=True, exact=True)
    for path in list_images(tmp_path):
        np.testing.assert_array_equal(_read_one(path), image[..., :-1], strict=True)
        np.testing.assert_array_equal(_read_one(path, keep_alpha=True), image, strict=True)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_tag_is_applied(tmp_path: Path, orientation: int) -> None:
    image = _random(5, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = np.asarray(_transposed(Image.fromarray(image), orientation))
    Image.fromarray(image).save(tmp_path / "x.png", exif=exif)
    Image.fromarray(image).save(tmp_path / "x.webp", exif=exif, lossless=True)
    tifffile.imwrite(tmp_path / "x.tif", image, photometric="rgb", extratags=[(274, 3, 1, orientation, True)])
    for path in list_images(tmp_path):
        np.testing.assert_array_equal(_read_one(path), expected)
    smooth = np.asarray(Image.fromarray(image).resize((64, 40)))
    Image.fromarray(smooth).save(tmp_path / "x.jpg", exif=exif, quality=100, subsampling=0)
    jpeg = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "x.jpg")))
    np.testing.assert_array_equal(_read_one(tmp_path / "x.jpg"), jpeg)


def _transposed(image: Image.Image, orientation: int) -> Image.Image:
    method = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    return image if method is None else image.transpose(method)


def test_tiff_layouts(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    planar = _random(6, 20, 30, dtype="uint16")
    tifffile.imwrite(path, planar, photometric="minisblack", planarconfig="separate")
    np.testing.assert_array_equal(_read_one(path), planar.transpose(1, 2, 0), strict=True)
    tifffile.imwrite(path, planar, imagej=True, metadata={"axes": "CYX"})
    np.testing.assert_array_equal(_read_one(path), planar.transpose(1, 2, 0), strict=True)
    tifffile.imwrite(path, planar[:3], photometric="rgb", planarconfig="separate", tile=(16, 16))
    np.testing.assert_array_equal(_read_one(path), planar[:3].transpose(1, 2, 0), strict=True)
    naive = _random(40, 50, 6)
    tifffile.imwrite(path, naive)
    np.testing.assert_array_equal(_read_one(path), naive, strict=True)
    tifffile.imwrite(path, _random(8, 9), photometric="miniswhite")
    np.testing.assert_array_equal(_read_one(path)[..., 0], 255 - _random(8, 9))
    for options in ({"compression": "lzw"}, {"compression": "zlib", "predictor": True}, {"byteorder": ">"}):
        tifffile.imwrite(path, planar[0], **options)
        np.testing.assert_array_equal(_read_one(path)[..., 0], planar[0], strict=True)
    ink = _random(8, 9, 4)
    tifffile.imwrite(path, ink, photometric="separated")
    expected = np.asarray(Image.fromarray(ink, mode="CMYK").convert("RGB")).astype(int)
    assert np.abs(_read_one(path).astype(int) - expected).max() <= 1
    tifffile.imwrite(path, ink[..., :3], photometric="cielab")
    with pytest.raises(DataError, match="CIELAB"):
        read_images(path)


def test_tiff_jpeg_compressed_is_rgb(tmp_path: Path) -> None:
    rgb = np.zeros((32, 32, 3), np.uint8)
    rgb[:, :16], rgb[:, 16:] = (230, 40, 40), (20, 60, 200)
    tifffile.imwrite(
        tmp_path / "x.tif", rgb, photometric="rgb", compression="jpeg", compressionargs={"level": 98}
    )
    assert np.abs(_read_one(tmp_path / "x.tif").astype(int) - rgb)[:, [8, 24]].max() <= 8


def test_tiff_pages(tmp_path: Path) -> None:
    stack = _random(6, 40, 50, dtype="uint16")
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, stack, photometric="minisblack")
    images = read_images(path)
    assert probe(path) == (40, 50, 1, np.uint16, 6)
    np.testing.assert_array_equal(np.stack(images), stack[..., None], strict=True)
    joined = _read_one(path, pages="channels")
    np.testing.assert_array_equal(joined, stack.transpose(1, 2, 0), strict=True)
    assert probe(path, pages="channels") == (40, 50, 6, np.uint16, 1)
    with tifffile.TiffWriter(path) as writer:
        writer.write(stack[0], photometric="minisblack")
        writer.write(stack[0, :20], photometric="minisblack")
        writer.write(stack[0, ::4, ::4], photometric="minisblack", subfiletype=1)
    images = read_images(path)
    assert [image.shape for image in images] == [(40, 50, 1), (20, 50, 1)]  # the thumbnail is not an image
    with pytest.raises(DataError, match="pages differ in size"):
        read_images(path, pages="channels")


@pytest.mark.parametrize(
    "dtype, expected",
    [
        ("bool", "uint8"), ("int8", "float32"), ("int16", "float32"), ("int32", "float32"),
        ("uint32", "float32"), ("int64", "float32"), ("float16", "float32"), ("float64", "float32"),
        (">u2", "uint16"), (">f4", "float32"),
    ],
)  # fmt: skip
def test_other_types_are_converted(tmp_path: Path, dtype: str, expected: str) -> None:
    values = (_random(20, 24) % 100).astype(dtype)
    np.save(tmp_path / "x.npy", values)
    image = _read_one(tmp_path / "x.npy")
    assert image.dtype == np.dtype(expected)
    np.testing.assert_array_equal(image[..., 0], values * 255 if dtype == "bool" else values)
    if dtype[0] not in ">f":
        tifffile.imwrite(tmp_path / "x.tif", values, photometric="minisblack")
        np.testing.assert_array_equal(_read_one(tmp_path / "x.tif"), image, strict=True)


def test_npy_axes(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    for shape, expected in [
        ((20, 30), (20, 30, 1)), ((20, 30, 5), (20, 30, 5)), ((5, 20, 30), (20, 30, 5)),
        ((20, 30, 40), (20, 30, 40)), ((3, 4, 5), (3, 4, 5)),
    ]:  # fmt: skip
        np.save(path, _random(*shape))
        assert _read_one(path).shape == expected
    np.save(path, _random(2, 5, 20, 30))
    assert probe(path) == (20, 30, 5, np.uint8, 2)
    assert [image.shape for image in read_images(path)] == [(20, 30, 5)] * 2
    assert read_images(path, pages="channels")[0].shape == (20, 30, 10)


def test_pgm_and_ppm(tmp_path: Path) -> None:
    deep = _random(5, 6, dtype="uint16")
    (tmp_path / "x.pgm").write_bytes(b"P5 6 5 65535\n" + deep.astype(">u2").tobytes())
    np.testing.assert_array_equal(_read_one(tmp_path / "x.pgm")[..., 0], deep, strict=True)
    (tmp_path / "x.ppm").write_bytes(b"P6\n# made\n2 1\n255\n" + bytes(range(6)))
    np.testing.assert_array_equal(_read_one(tmp_path / "x.ppm").ravel(), np.arange(6))
    (tmp_path / "y.ppm").write_bytes(b"P6\n# made\n2 1\n65535\n" + bytes(range(12)))
    for read in (read_images, probe):
        with pytest.raises(DataError, match="more than 8 bits"):
            read(tmp_path / "y.ppm")


def test_content_counts_and_not_the_suffix(tmp_path: Path) -> None:
    image = _random(5, 6, 3, dtype="uint16")
    write_image(tmp_path / "x.tif", image)
    (tmp_path / "x.tif").rename(tmp_path / "x.png")
    np.testing.assert_array_equal(_read_one(tmp_path / "x.png"), image)


def _bad_files(folder: Path) -> dict[str, str]:
    """Write one file of every bad kind; returns what the message must contain."""
    image, deep = _random(64, 64, 3), _random(64, 64, 3, dtype="uint16")
    for name in ("cut.png", "cut.jpg", "cut.webp", "cut.bmp", "cut.tif", "cut.npy"):
        write_image(folder / name, image)
    write_image(folder / "cut16.png", deep)
    tifffile.imwrite(folder / "cut_plain.tif", deep, photometric="rgb")
    tifffile.imwrite(
        folder / "cut_pages.tif", _random(9, 64, 64), photometric="minisblack", compression="zlib"
    )
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    rules = {path.name: "cut short" for path in folder.iterdir()}
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image at all")
    (folder / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n")
    (folder / "folder.png").mkdir()
    damaged = bytearray(imagecodecs.png_encode(deep))
    damaged[len(damaged) // 2] ^= 255
    (folder / "damaged.png").write_bytes(damaged)
    np.save(folder / "one.npy", np.zeros(5))
    np.save(folder / "five.npy", np.zeros((1, 1, 4, 4, 3)))
    np.save(folder / "none.npy", np.zeros((0, 4, 3)))
    np.save(folder / "complex.npy", np.zeros((4, 4), np.complex64))
    np.save(folder / "pickle.npy", np.array([[{}]]), allow_pickle=True)
    np.save(folder / "nan.npy", np.full((4, 4), np.nan))
    np.save(folder / "huge.npy", np.full((4, 4), 1e300))
    return rules | {
        "missing.png": "no such file",
        "empty.png": "empty",
        "text.jpg": "not an image",
        "page.eps": "not an image",
        "folder.png": "is a folder",
        "damaged.png": "damaged",
        "one.npy": "shape (5,)",
        "five.npy": "shape (1, 1, 4, 4, 3)",
        "none.npy": "no pixels",
        "complex.npy": "complex64",
        "pickle.npy": "damaged",
        "nan.npy": "NaN",
        "huge.npy": "NaN or infinite",
    }


def test_bad_files_give_one_line_that_names_them(tmp_path: Path) -> None:
    for name, text in _bad_files(tmp_path).items():
        with pytest.raises(DataError, match=re.escape(text)) as caught:
            read_images(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name)), name
        assert "\n" not in str(caught.value)


def test_too_many_pixels_are_refused_before_decoding(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", _random(40, 50, 3))
    write_image(tmp_path / "b.png", _random(40, 50, 3, dtype="uint16"))
    write_image(tmp_path / "c.tif", _random(40, 50, 7))
    write_image(tmp_path / "d.npy", _random(40, 50, 7))
    tifffile.imwrite(tmp_path / "e.tif", _random(2, 20, 50), photometric="minisblack")
    with tifffile.TiffWriter(tmp_path / "f.tif") as tiff:  # pages of two sizes
        for height in (10, 30):
            tiff.write(_random(height, 50), photometric="minisblack")
    for path in list_images(tmp_path):
        for read in (read_images, probe):
            read(path, max_pixels=2000)
            with pytest.raises(DataError, match="2,000 pixels are more than the limit of 1,999"):
                read(path, max_pixels=1999)


def test_pillows_own_limit_neither_warns_nor_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "a.png", _random(40, 50, 3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _read_one(tmp_path / "a.png").shape == (40, 50, 3)
    assert Image.MAX_IMAGE_PIXELS == 500


def test_a_header_that_promises_too_much(tmp_path: Path) -> None:
    """A bomb: 60,000 x 60,000 pixels in 57 bytes."""
    data = bytearray(_png_grey(np.zeros((1, 8), np.uint8), bits=1))
    import zlib

    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(data)
    with pytest.raises(DataError, match="3,600,000,000 pixels"):
        read_images(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    "name, shape, dtype, text",
    [
        ("x.png", (4, 4, 2), "uint8", "2 channels; use .tif or .npy"),
        ("x.jpg", (4, 4, 5), "uint8", "5 channels; use .tif or .npy"),
        ("x.png", (4, 4, 3), "float32", "float32 values; use .tif or .npy"),
        ("x.jpg", (4, 4, 3), "uint16", "uint16 values; use .tif or .npy (.png for 16 bits)"),
        ("x.gif", (4, 4, 3), "uint8", "'.gif'; use one of .png"),
        ("x", (4, 4, 3), "uint8", "''; use one of .png"),
        ("x.tif", (4, 4, 4, 4), "uint8", "shape (4, 4, 4, 4)"),
        ("x.tif", (0, 4, 3), "uint8", "shape (0, 4, 3)"),
        ("no/such/x.png", (4, 4, 3), "uint8", "cannot be written"),
    ],
)
def test_what_cannot_be_written(
    tmp_path: Path, name: str, shape: tuple[int, ...], dtype: str, text: str
) -> None:
    with pytest.raises(DataError, match=re.escape(text)):
        write_image(tmp_path / name, np.zeros(shape, dtype))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    write_image(path, _random(4, 4, 3))
    before = path.read_bytes()

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match=r"x\.png: cannot be written \(No space left on device\)"):
        write_image(path, _random(4, 4, 3, seed=1))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_unit_round_trip_is_exact(dtype: str) -> None:
    top = np.iinfo(dtype).max
    values = np.arange(top + 1, dtype=dtype)
    unit = to_unit(values)
    assert unit.dtype == np.float32 and unit.min() == 0 and unit.max() == 1
    np.testing.assert_array_equal(from_unit(unit, dtype), values, strict=True)
    assert from_unit(np.float32([-0.1, 0.499 / top, 0.501 / top, 1.1]), dtype).tolist() == [0, 0, 1, top]


def test_unit_with_a_range() -> None:
    values = np.float32([-1000, 0, 3000])
    np.testing.assert_allclose(to_unit(values, (-1000, 3000)), [0, 0.25, 1], rtol=1e-6)
    np.testing.assert_allclose(
        from_unit(np.float32([0, 0.25, 1]), np.float32, (-1000, 3000)), values, atol=1e-3
    )
    np.testing.assert_array_equal(from_unit(np.float32([0, 0.5, 1]), np.uint16, (0, 4095)), [0, 2048, 4095])


def test_list_images_is_natural_and_skips_the_rest(tmp_path: Path) -> None:
    names = [
        "img10.png",
        "img2.PNG",
        "a/b/c.jpg",
        "Z.tif",
        ".hidden.png",
        ".git/x.png",
        "a/notes.txt",
        "b.npy",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert found == ["a/b/c.jpg", "b.npy", "img2.PNG", "img10.png", "Z.tif"]
    assert sorted(["x1", "X1", "x01"], key=natural_key) == ["X1", "x01", "x1"]


def test_probe_reads_no_pixels(tmp_path: Path) -> None:
    """A cut file has a good header: probe is happy where read_images is not."""
    buffer = io.BytesIO()
    Image.fromarray(_random(64, 64, 3)).save(buffer, "JPEG")
    (tmp_path / "x.jpg").write_bytes(buffer.getvalue()[:-200])
    assert probe(tmp_path / "x.jpg") == (64, 64, 3, np.uint8, 1)
    with pytest.raises(DataError, match="cut short"):
        read_images(tmp_path / "x.jpg")
