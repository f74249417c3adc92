"""python -m fastgan.compare: what the page holds, and what the command refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin

from fastgan.compare import main
from fastgan.gallery import Run, comparison, save_grid, write_comparison, write_page
from tests.test_gallery import Page, decode

EVIL = "</script><script>alert('x')</script><img src=http://x/y.png>{{data}}&"
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)


def make_run(
    folder: Path, *, images: torch.Tensor = IMAGES, steps=(10, 20), log=40, rate=2e-4, **settings
) -> Path:
    folder.mkdir(parents=True)
    about = {"recipe": "cyclegan", "settings": {"name": folder.name, "lr": rate, "seed": 0, **settings}}
    (folder / "config.json").write_text(json.dumps(about))
    for step in steps:
        made = {"A": images, "G_A(A)": -images, "B": images[:1]}
        save_grid(folder / f"samples/step_{step:08d}.png", made, title=folder.name)
    records = [
        {"step": s, "epoch": 0, "time": 2.0 * s, "G_A": s / 7, "img_per_s": 5.0} for s in range(1, log)
    ]
    for record in records[9::10]:
        record |= {"fid": 300.0 / record["step"]}
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 99, "G_A"')
    return folder


def compare(tmp_path: Path, *runs: Path) -> Page:
    main([*map(str, runs), "--output", str(tmp_path / "c.html")])
    return Page(tmp_path / "c.html")


def test_page_lays_runs_over_each_other(tmp_path, capsys):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", steps=(10, 20, 30), log=1500, rate=1e-3)
    (a / "evaluation.json").write_text(
        json.dumps({"step": 20, "l1": 0.123456, "per": {"road": 0.5, "sky": 0.7}})
    )
    (b / "evaluation.json").write_text(
        json.dumps({"step": 30, "fid": 71.25, "note": None, "per": {"road": 0.6, "sky": 0.7}})
    )
    page = compare(tmp_path, a, b)
    assert capsys.readouterr().out == f"{tmp_path / 'c.html'} lays 2 runs over each other\n"
    charts = {chart["title"]: chart for chart in page.data["charts"]}
    assert list(charts) == ["G_A", "fid", "img_per_s"]
    assert [(line["name"], line["run"]) for line in charts["G_A"]["lines"]] == [("a", 0), ("b", 1)]
    # every number of the short log, also that of every tenth report; the long one is thinned
    assert charts["fid"]["lines"][0]["points"] == [[10, 30.0, 30.0], [20, 15.0, 15.0], [30, 10.0, 10.0]]
    assert [p[0] for p in charts["G_A"]["lines"][0]["points"]] == list(range(1, 40))
    assert 300 < len(charts["G_A"]["lines"][1]["points"]) <= comparison.POINTS
    assert page.data["runs"][0]["times"][:2] == [[0, 0.0], [1, 2.0]]
    assert page.data["runs"][1]["times"][-1] == [1499, 2998.0]
    # the newest of each, and of b the newest that a has too
    assert [(g["run"], g["step"]) for g in page.data["grids"]] == [(0, 20), (1, 30), (1, 20)]
    assert [(i["data-step"], "hidden" in i) for i in page.images()] == [
        ("20", False),
        ("30", False),
        ("20", True),
    ]
    assert "Settings that differablr0.00020.0012 others are equal." in page.text
    # of how it was measured only what differs
    table = "Evaluationabstep2030l10.1235\u2013per road0.50.6fid\u201371.25note\u2013None Before"
    assert table in " ".join(page.text.split())
    links = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href", "action", "data")]
    assert links and all(link.startswith("data:") for link in links)


@pytest.mark.parametrize("other, remark", [
    ({"images": IMAGES.flip(0)}, "They show different test images"),
    ({"images": IMAGES[:, :, :16]}, "They show different test images"),
    ({"steps": ()}, ""),
])  # fmt: skip
def test_other_test_images_are_not_laid_over(tmp_path, other, remark):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", **other)
    page = compare(tmp_path, a, b)
    assert page.data["grids"] == [None] * len(page.images())
    assert remark in page.text and ("different test images" in page.text) == bool(remark)
    third = compare(tmp_path, a, b, make_run(tmp_path / "c", steps=(5, 10)))
    assert [g and (g["run"], g["step"]) for g in third.data["grids"] if g] == [(0, 20), (0, 10), (2, 10)]
    assert ("not laid over the others: b." in third.text) == bool(remark)


def test_names_are_told_apart_and_escaped(tmp_path):
    page = compare(
        tmp_path, make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run", **{EVIL: EVIL})
    )
    assert [run["name"] for run in page.data["runs"]] == ["x/run", "y/run"]
    hostile = Run(EVIL, make_run(tmp_path / "z"), {EVIL: 1}, {EVIL: EVIL})
    write_comparison(tmp_path / "d.html", [hostile, Run("b", tmp_path / "y" / "run", {})])
    renamed = Page(tmp_path / "d.html")
    for each in (page, renamed):
        assert [tag for tag, _ in each.tags].count("script") == 2
        assert all(i["src"].startswith("data:") for i in each.images())
        assert EVIL in each.text
    assert renamed.data["charts"][0]["lines"][0]["name"] == EVIL


@pytest.mark.parametrize("line", [
    "[" * 50_000, '{"step": 1e400}', '{"step": true, "G": 1}', '{"step": 5, "G": 1' + "0" * 400 + "}", "\0",
    '{"step": 5, "time": "x", "img_per_s": [], "wait_share": {}, "epoch": {"a": []}, "balance": {"G": "x"}}',
    '{"step": 5, "G": NaN, "time": Infinity, "\\ud800": 1}', '{"step": -5, "G": 1}',
])  # fmt: skip
def test_foreign_logs_do_no_harm(tmp_path, line):
    a, b = make_run(tmp_path / "a", steps=()), make_run(tmp_path / "b", steps=())
    (a / "log.jsonl").write_text(line + "\n")
    page = compare(tmp_path, a, b)
    assert [chart["title"] for chart in page.data["charts"]][:1] == ["G_A"]


@pytest.mark.parametrize("about", [
    "x", "[]", '{"columns": [], "pitch": 4}', '{"columns": [["A", 0, 0, 9, 9, 99]], "pitch": 9}',
    '{"columns": [["A", -1, 0, 9, 9, 1]], "pitch": 9}', '{"columns": [["A", 0, 0, 9, 9, 1e9]], "pitch": 9}',
    '{"columns": [[5, 0, 0, 9, 9, 1]], "pitch": 9}', '{"columns": [["A", 0, 0, 0, 9, 1]], "pitch": 9}',
])  # fmt: skip
def test_foreign_pictures_do_no_harm(tmp_path, about):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", steps=())
    text = PngImagePlugin.PngInfo()
    text.add_text("fastgan", about)
    (b / "samples").mkdir()
    Image.new("RGB", (64, 64)).save(b / "samples/step_00000020.png", pnginfo=text)
    assert Page(write_page(b, title="b", settings={})).data["grids"] == [None]
    page = compare(tmp_path, a, b)
    assert page.data["grids"] == [None] * 2
    assert decode(page.images()[-1]).size == (64, 64)


def test_pictures_have_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "PICTURE_BYTES", 120_000)
    noise = torch.rand(4, 3, 200, 200) * 2 - 1
    runs = [make_run(tmp_path / name, images=noise, steps=(1,)) for name in "abc"]
    page = compare(tmp_path, *runs)
    assert sum(len(i["src"]) for i in page.images()) < 120_000 * 4 / 3 + 500
    assert "Large grids are reduced here." in page.text and math.isfinite(
        len(page.data["grids"][0]["columns"])
    )


def test_refuses(tmp_path, capsys):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    (tmp_path / "empty").mkdir()
    for name, config in (
        ("half", '{"recipe": "cyc'),
        ("list", "[1]"),
        ("other", '{"a": 1}'),
        ("deep", "[" * 50_000),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    measured = make_run(tmp_path / "measured", steps=())
    (measured / "evaluation.json").write_text('{"l1": ')
    folder = make_run(tmp_path / "folder", steps=())
    (folder / "log.jsonl").unlink()
    (folder / "log.jsonl").mkdir()
    page = ["--output", str(tmp_path / "c.html")]
    for words, said in (
        ([a], "two or more run folders are compared, got 1"),
        ([a, a.parent / "b" / ".." / "a"], "is given twice"),
        ([a, tmp_path / "none"], f"{tmp_path / 'none'} is not a run folder: config.json is missing"),
        ([a, tmp_path / "empty"], "is not a run folder"),
        ([a, tmp_path / "half"], "config.json cannot be read"),
        ([a, tmp_path / "list"], "config.json cannot be read"),
        ([a, tmp_path / "other"], "holds no settings"),
        ([a, tmp_path / "deep"], "nested too deeply"),
        ([a, measured], "evaluation.json cannot be read"),
        ([a, folder], "folder/log.jsonl cannot be read or written"),
        ([a, b, "--output", b / "log.jsonl"], "ends in .html"),
        ([a, b, "--output", a / "log.jsonl" / "c.html"], "a/log.jsonl cannot be read or written"),
        ([a, b, "--out", "x"], "--output"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*map(str, words), *([] if "--output" in words else page)])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        assert said in error, error
    assert not list(tmp_path.glob("*.html*")) and (b / "log.jsonl").stat().st_size > 100
