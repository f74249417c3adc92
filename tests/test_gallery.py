"""Sample grids by their pixels, and the page by what can be read back from it."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import math
import random
import re
import time

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan.gallery import curves, grid, pictures, save_grid, write_page


def pixels(path):
    with Image.open(path) as picture:
        assert picture.mode == "RGB"
        return np.asarray(picture).astype(int)


def cells(image, columns, rows, size):
    """The grid's cells as [row][column] arrays, found from its lower right corner."""
    width, height = size
    right, bottom = image.shape[1] - grid.MARGIN, image.shape[0] - grid.MARGIN
    pitch = max(width, grid.PITCH_MIN)
    out = []
    for row in range(rows):
        y = bottom - (rows - row) * (height + grid.GUTTER) + grid.GUTTER
        line = []
        for column in range(columns):
            x = right - (columns - column) * (pitch + grid.GUTTER) + grid.GUTTER + (pitch - width) // 2
            line.append(image[y : y + height, x : x + width])
        out.append(line)
    return out


def test_small_images_are_crisp_and_exact(tmp_path):
    x = torch.rand(2, 1, 32, 32) * 2 - 1
    y = torch.rand(2, 3, 32, 32, dtype=torch.float64) * 2 - 1
    save_grid(tmp_path / "deep" / "step_00000001.png", {"A": x, "G(A)": y}, title="step 1")
    found = cells(pixels(tmp_path / "deep" / "step_00000001.png"), 2, 2, (96, 96))
    for row in range(2):
        for column, batch in enumerate((x, y)):
            want = ((batch[row].expand(3, -1, -1).double() + 1) * 127.5).round().permute(1, 2, 0).numpy()
            got = found[row][column]
            # every pixel is a 3 x 3 block of one colour, at most one off where float32 sits on a half
            assert (got == got[1::3, 1::3].repeat(3, 0).repeat(3, 1)).all()
            assert abs(got[1::3, 1::3] - want).max() <= 1
            assert (got[1::3, 1::3] == want).mean() > 0.999
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["step_00000001.png"]


@pytest.mark.parametrize("output_range, value, byte", [
    ("tanh", -1.0, 0), ("tanh", 0.0, 128), ("tanh", 1.0, 255), ("tanh", 7.0, 255), ("tanh", 0.998, 255),
    ("sigmoid", 0.0, 0), ("sigmoid", 0.5, 128), ("sigmoid", 254.6 / 255, 255), ("sigmoid", -3.0, 0),
])  # fmt: skip
def test_values_are_rounded_and_clipped(tmp_path, output_range, value, byte):
    save_grid(tmp_path / "x.png", {"A": torch.full((1, 1, 8, 8), value)}, output_range=output_range)
    assert (cells(pixels(tmp_path / "x.png"), 1, 1, (96, 96))[0][0] == byte).all()


@pytest.mark.parametrize("height, width, cell", [
    (1, 1, (96, 96)), (28, 28, (112, 112)), (95, 40, (80, 190)), (128, 128, (128, 128)),
    (256, 256, (256, 256)), (600, 300, (128, 256)), (200, 2000, (256, 26)), (20, 2, (10, 100)),
])  # fmt: skip
def test_cell_sizes(tmp_path, height, width, cell):
    # grey would be told from the white page
    save_grid(
        tmp_path / "x.png", {"A": torch.zeros(3, 3, height, width), "B": torch.zeros(3, 3, height, width)}
    )
    image = pixels(tmp_path / "x.png")
    grey = (image == 128).all(2)
    assert grey.sum() == 6 * cell[0] * cell[1]
    assert all((c == 128).all() for row in cells(image, 2, 3, cell) for c in row)


def test_large_images_are_filtered(tmp_path):
    # a checkerboard of single pixels becomes its mean, not one of its colours
    board = (torch.arange(512)[:, None] + torch.arange(512)) % 2 * 2.0 - 1
    save_grid(tmp_path / "x.png", {"A": board[None, None]})
    cell = cells(pixels(tmp_path / "x.png"), 1, 1, (256, 256))[0][0]
    assert abs(cell[8:-8, 8:-8] - 127.5).max() < 4


def test_columns_may_differ(tmp_path):
    columns = {
        "A": torch.zeros(3, 5, 64, 64, dtype=torch.bfloat16),
        "two": torch.stack([torch.ones(32, 32), -torch.ones(32, 32)])[None],
        "B": torch.ones(2, 1, 16, 16),
    }
    columns["A"][:, 3:] = 1
    save_grid(tmp_path / "x.png", columns)
    found = cells(pixels(tmp_path / "x.png"), 3, 3, (128, 128))
    assert (found[2][0] == 128).all() and (found[0][1] == 128).all()
    assert (found[1][2] == 255).all() and (found[2][2] == 255).all() and (found[1][1] == 255).all()


def test_a_grid_says_where_its_cells_are(tmp_path):
    columns = {
        "A": torch.rand(3, 3, 32, 32),
        "G(A)": torch.rand(2, 2, 48, 32),
        "none": torch.zeros(0, 3, 8, 8),
    }
    save_grid(tmp_path / "x.png", columns, title="a heading")
    image, about = pixels(tmp_path / "x.png"), json.loads(Image.open(tmp_path / "x.png").text["fastgan"])
    assert [c[0] for c in about["columns"]] == ["A", "G(A) (mean of 2 channels)"]
    for batch, (_, x, y, width, height, count) in zip(columns.values(), about["columns"]):
        assert count == len(batch)
        for row in range(count):
            cell = image[y + row * about["pitch"] :][:height, x : x + width]
            small = cell[:: height // batch.shape[2], :: width // batch.shape[3]]
            want = (batch[row].mean(0) if batch.shape[1] == 2 else batch[row]).expand(3, -1, -1)
            assert abs(small - (want + 1).mul(127.5).permute(1, 2, 0).numpy()).max() <= 0.51
            assert (
                cell == np.kron(small, np.ones((height // batch.shape[2], width // batch.shape[3], 1)))
            ).all()


def test_page_knows_the_cells(tmp_path):
    for step in (5, 20):
        save_grid(tmp_path / f"samples/step_{step:08d}.png", {"A": torch.zeros(1, 3, 96, 96)})
    sample(tmp_path, 10)
    page = Page(write_page(tmp_path, title="T", settings={}))
    assert [int(i["data-step"]) for i in page.images()] == [5, 10, 20]
    cells = {"columns": [["A", grid.MARGIN, 33, 96, 96, 1]], "pitch": 100}
    assert page.data["grids"] == [{"step": 5, **cells}, None, {"step": 20, **cells}]


def test_captions_are_honest():
    def caption(x):
        return grid._to_bytes("A", x, "tanh")[0]

    assert caption(torch.zeros(1, 1, 4, 4)) == caption(torch.zeros(1, 3, 4, 4)) == "A"
    assert caption(torch.zeros(1, 2, 4, 4)) == "A (mean of 2 channels)"
    assert caption(torch.zeros(1, 5, 4, 4)) == "A (channels 1-3 of 5)"
    assert caption(torch.full((1, 1, 4, 4), math.nan)) == "A (not finite)"


def test_captions_stay_over_their_column(tmp_path):
    white = torch.ones(1, 1, 32, 32)
    save_grid(tmp_path / "x.png", {"a_very_long_word_without_any_spaces": white, "B": white}, title="t" * 80)
    image = pixels(tmp_path / "x.png")
    ink = (image < 200).all(2)
    assert ink.sum() > 300
    assert not ink[:, : grid.MARGIN - 1].any() and not ink[:, -grid.MARGIN + 1 :].any()
    # the long caption has lines of its own and leaves the gutter free below the title
    below = grid.MARGIN + 22 * 6
    gutter = grid.MARGIN + 96
    assert not ink[below:, gutter + 1 : gutter + grid.GUTTER - 1].any()


def test_save_grid_refuses(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        save_grid(tmp_path / "x.png", {})
    with pytest.raises(ValueError, match=r"'A' must be \(N, C, H, W\), got \(3, 8, 8\)"):
        save_grid(tmp_path / "x.png", {"A": torch.zeros(3, 8, 8)})
    with pytest.raises(ValueError, match="output_range"):
        save_grid(tmp_path / "x.png", {"A": torch.zeros(1, 3, 8, 8)}, output_range="relu")
    assert not list(tmp_path.iterdir())


class Page(html.parser.HTMLParser):
    """What a browser would find: tags with attributes, text, and the curves' data."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.data, self._inside = [], "", None, None
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = dict(attrs) if tag == "script" else tag

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if isinstance(self._inside, dict):
            if self._inside.get("id") == "data":
                self.data = json.loads(data)
        elif self._inside != "style":
            self.text += data

    def images(self):
        return [attrs for tag, attrs in self.tags if tag == "img"]

    def line(self, name):
        return next(
            line["points"] for chart in self.data["charts"] for line in chart["lines"] if line["name"] == name
        )


def log(run, records):
    run.mkdir(parents=True, exist_ok=True)
    (run / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def sample(run, step, size=(40, 30), noise=False):
    (run / "samples").mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", size, (step % 256, 0, 0))
    if noise:
        picture = Image.frombytes("RGB", size, random.Random(step).randbytes(3 * size[0] * size[1]))
    picture.save(run / "samples" / f"step_{step:08d}.png")


def decode(attrs):
    head, data = attrs["src"].split(",", 1)
    picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    picture.load()
    assert head == f"data:image/{picture.format.lower()};base64"
    return picture


def test_page_of_an_empty_run(tmp_path):
    path = write_page(tmp_path / "run", title="T", settings={})
    assert path == tmp_path / "run" / "index.html"
    page = Page(path)
    assert page.data["charts"] == [] and page.images() == []
    assert "No report has been logged yet" in page.text
    assert "{{" not in page.source
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 1')
    assert Page(write_page(tmp_path / "run", title="T", settings={})).data["charts"] == []


def test_page_holds_the_logged_numbers(tmp_path):
    records = [
        {
            "step": 10 * i, "epoch": i, "time": 2.5 * i, "img_per_s": 123.4, "wait_share": 0.01,
            "G_A": round(0.5 + i / 100, 2),
            "D_A": 0.2, "D_A_real": 0.7, "cycle_A": None if i == 3 else 2.0, "grad_G_A": 10.0 ** (i % 3),
            "lr_G": 2e-4, "diversity_B": 0.6, "fid": 70.0, "odd": None,
        }
        for i in range(1, 31)
    ]  # fmt: skip
    records[0]["balance"] = {"D_A": 0.25, "D_B": 0.25}
    log(tmp_path, records)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('not json\n[1, 2]\n{"step": 310, "G_A": 0.')
    page = Page(write_page(tmp_path, title="T", settings={}, state="running, step 300 of 900"))
    assert [[line["name"] for line in chart["lines"]] for chart in page.data["charts"]] == [
        ["G_A"], ["D_A"], ["cycle_A"], ["D_A_real"], ["grad_G_A"], ["diversity_B"], ["lr_G"], ["fid"],
        ["img_per_s"],
    ]  # fmt: skip
    # 30 reports are smoothed over none of their neighbours
    assert page.line("G_A") == [[r["step"], r["G_A"], r["G_A"]] for r in records]
    assert page.line("cycle_A")[2] == [30, None, None]
    assert [chart["levels"] for chart in page.data["charts"]] == [[], [0.25], *[[]] * 7]
    assert [chart["log"] for chart in page.data["charts"]] == [False] * 4 + [True] + [False] * 4
    for text in ("running, step 300 of 900", "300", "30", "123", "0:01:15", "1.0 %"):
        assert text in page.text


def test_measures_of_every_n_epochs_are_drawn(tmp_path):
    records = [{"step": i, "G_A": 0.5} for i in range(1, 100)]
    for i in (24, 49, 74):
        records[i] |= {"eval/fid": 200 - i, "cycle_l1_A": 0.1, "cycle_l1_B": 0.2, "note": "x", "flag": True}
    records.insert(50, {"step": 50, "psnr_db": 12})
    log(tmp_path, records)
    page = Page(write_page(tmp_path, title="T", settings={}))
    assert [(chart["title"], [line["name"] for line in chart["lines"]]) for chart in page.data["charts"]] == [
        ("eval/fid", ["eval/fid"]), ("Generators, adversarial", ["G_A"]),
        ("cycle_l1", ["cycle_l1_A", "cycle_l1_B"]), ("psnr_db", ["psnr_db"]),
    ]  # fmt: skip
    assert page.line("eval/fid") == [[25, 176.0, 176.0], [50, 151.0, 151.0], [75, 126.0, 126.0]]
    assert page.line("psnr_db") == [[50, 12.0, 12.0]]


def test_long_curves_are_thinned_without_losing_spikes(tmp_path):
    records = [
        {"step": i, "G": 1.0 + i / 1e4 + 0.1 * (i % 2), "grad_G": 4.0 if i % 2 else 1.0} for i in range(5000)
    ]
    records[3333]["G"], records[777]["G"] = 99.0, None
    log(tmp_path, records)
    page = Page(write_page(tmp_path, title="T", settings={}))
    points = page.line("G")
    assert len(points) <= curves.POINTS
    assert [3333, 99.0] in [p[:2] for p in points]
    assert [p[0] for p in points] == sorted({p[0] for p in points})
    assert all(value == round(records[step]["G"], 4) for step, value, _ in points if step != 777)
    # the running mean sits between the two branches; on the log axis it is the geometric one
    assert points[500][2] == pytest.approx(1.05 + points[500][0] / 1e4, abs=2e-3)
    assert page.line("grad_G")[500][2] == pytest.approx(2.0, abs=0.02)


def test_page_escapes_everything(tmp_path):
    evil = "</script><script>alert('x')</script><img src=http://x/y.png>{{charts}}&"
    log(tmp_path, [{"step": 1, evil: 1.0, "warnings": [f"D wins ({evil}): {evil}; lower --lr-d"]}])
    page = Page(write_page(tmp_path, title=evil, settings={evil: evil, "pair": (1, 2)}, state=evil))
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert page.images() == []
    assert page.data["charts"][0]["lines"] == [{"name": evil, "points": [[1, 1.0, 1.0]]}]
    assert (
        page.text.count(evil) == 7
    )  # page title, heading, state, twice in the warning, setting and its value
    assert "1, 2" in page.text


def test_page_asks_nobody(tmp_path):
    sample(tmp_path, 1)
    page = Page(write_page(tmp_path, title="T", settings={}))
    links = [
        attrs[key] for _, attrs in page.tags for key in ("src", "href", "data", "action") if key in attrs
    ]
    assert links and all(link.startswith("data:") for link in links)
    assert set(re.findall(r"https?://[^\s\"'<]+", page.source)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in page.source


def test_warnings_are_listed_once_per_kind(tmp_path):
    texts = {50: "D wins (D_A): first", 60: "outputs collapse (B): b", 150: "D wins (D_A): second"}
    log(
        tmp_path,
        [{"step": s, **({"warnings": [texts[s]]} if s in texts else {})} for s in range(10, 2000, 10)],
    )
    page = Page(write_page(tmp_path, title="T", settings={}))
    assert [tag for tag, _ in page.tags].count("li") == 2
    assert "D wins (D_A): second step 150, 2 times" in page.text
    assert page.text.index("D wins") < page.text.index("outputs collapse")
    assert "first" not in page.text


@pytest.mark.parametrize(
    "count, shown", [(1, 1), (2, 2), (13, 13), (14, 8), (25, 13), (26, 8), (100, 14 - 1)]
)
def test_samples_are_chosen_evenly(tmp_path, count, shown):
    for i in range(count):
        sample(tmp_path, 100 * i)
    (tmp_path / "samples" / "step_final.png").write_bytes(b"not a sample")
    page = Page(write_page(tmp_path, title="T", settings={}))
    images = page.images()
    steps = [int(attrs["data-step"]) for attrs in images]
    earlier = steps[:-1]
    assert steps[-1] == 100 * (count - 1) and len(steps) <= pictures.EARLIER + 1
    assert len(steps) == shown if count < 100 else len(steps) >= pictures.EARLIER // 2
    assert len(set(np.diff(earlier))) <= 1
    for attrs, step in zip(images, steps):
        picture = decode(attrs)
        assert picture.format == "PNG" and picture.size == (40, 30) == (
            int(attrs["width"]),
            int(attrs["height"]),
        )
        assert picture.getpixel((3, 3)) == (step % 256, 0, 0)
    assert ["hidden" in attrs for attrs in images] == [True] * (len(images) - 1) + [False]
    assert ("all of them are in the folder" in page.text) == (shown < count)


def test_large_samples_are_reduced_and_the_page_stays_small(tmp_path, monkeypatch):
    # noise is the worst case: nothing compresses it
    monkeypatch.setattr(pictures, "NEWEST_BYTES", 600_000)
    for i in range(3):
        sample(tmp_path, i, (1000, 500), noise=True)
    page = Page(write_page(tmp_path, title="T", settings={}))
    copies = [decode(attrs) for attrs in page.images()]
    assert [p.format for p in copies] == ["JPEG"] * 3
    assert all(len(attrs["src"]) < pictures.EARLIER_BYTES * 4 / 3 + 100 for attrs in page.images()[:-1])
    assert len(page.images()[-1]["src"]) < 600_000 * 4 / 3 + 100
    # shown at the size of the original
    assert {(attrs["width"], attrs["height"]) for attrs in page.images()} == {("1000", "500")}
    assert "reduced" in page.text
    worst = pictures.NEWEST_BYTES + pictures.EARLIER * pictures.EARLIER_BYTES
    assert worst * 4 / 3 < 7.5e6


def test_broken_sample_is_left_out(tmp_path):
    sample(tmp_path, 1)
    (tmp_path / "samples" / "step_00000002.png").write_bytes(b"half a picture")
    page = Page(write_page(tmp_path, title="T", settings={}))
    assert [attrs["data-step"] for attrs in page.images()] == ["1"]


def test_page_is_written_fast(tmp_path):
    names = [
        "G_A",
        "G_B",
        "D_A",
        "D_B",
        "cycle_A",
        "cycle_B",
        "idt_A",
        "idt_B",
        "grad_G_A",
        "grad_G_B",
        "lr_G",
    ]
    rng = random.Random(0)
    log(tmp_path, [{"step": i, **{name: rng.random() for name in names}} for i in range(2000)])
    for i in range(12):
        sample(tmp_path, i, (620, 870))
    durations = []
    for _ in range(3):
        begin = time.process_time()
        write_page(tmp_path, title="T", settings={})
        durations.append(time.process_time() - begin)
    assert min(durations) < 0.3
    assert not list(tmp_path.glob("*.tmp"))
