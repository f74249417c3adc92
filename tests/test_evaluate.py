"""The evaluation of runs, checkpoints, files of weights and folders; and in training, which it must not
disturb."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fastgan
from fastgan import checkpoint, evaluate, measure, metrics, train, trainer
from fastgan.data import read_images, write_image
from fastgan.recipes import RECIPES
from fastgan.trained import load_run

CPU = torch.device("cpu")
TINY = ["--ngf", "4", "--ndf", "4", "--device", "cpu", "--threads", "1"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def draw(path: Path, seed: int, size: tuple[int, ...] = (32, 32, 3), dtype: type = np.uint8) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    top = 256 if dtype == np.uint8 else 65536
    image = np.random.default_rng(seed).integers(0, top, size).astype(dtype)
    write_image(path, image)
    return image


def said(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        evaluate.main(args)
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


def read(path: str) -> dict:
    return json.loads(Path(path).read_text())


def test_digits_in_a_table_and_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    train.main(["pix2pix", *TINY, "--levels", "3", "--steps", "2", "--name", "r", "--max-images", "90"])
    evaluate.main(["runs/r", "--device", "cpu", "--samples", "2"])
    found = read("runs/r/evaluation.json")
    assert found.pop("step") == 2
    details = found.pop("details")
    pairs = {"l1", "psnr_db", "ssim"}
    digits = {"digit_accuracy_real_B", "digit_accuracy_fake_B", "background_distance", "tstr", "trts"}
    assert set(found) == pairs | digits | {"diversity"}
    assert found["digit_accuracy_real_B"] > 0.5 > found["digit_accuracy_fake_B"] == found["trts"]
    assert details["images"] == {"A": 90, "B": 90, "split": "test"}
    assert details["classifier"]["taught_by_fake"] == 90
    printed = capsys.readouterr()
    assert all(f"{key:24} {value:.4f}" in printed.out for key, value in found.items())
    assert "\u2193" in printed.out.split("l1 ")[1].split("\n")[0]
    # this network has no dropout
    assert found["diversity"] == 0 and "nothing in it is random" in printed.err


def test_the_other_direction_of_grey_digits_has_no_reader(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--levels", "3", "--steps", "2", "--max-images", "40", "--channels", "1"]
    train.main(["pix2pix", *TINY, *few, "--direction", "BtoA", "--name", "back"])
    evaluate.main(["runs/back"])
    printed = capsys.readouterr().out
    assert "psnr_db" in printed and "digit" not in printed
    assert "needs the embedded digits" in said(["runs/back", "--measures", "digit_accuracy_fake"], capsys)


@pytest.fixture
def pairs_run(here: Path) -> dict[str, np.ndarray]:
    """Run r of pix2pix with dropout on pairs whose B is a label map."""
    colours = np.array([[255, 0, 0], [0, 0, 255]], np.uint8)
    maps = {}
    for k in range(3):
        for split in ("train", "test"):
            draw(here / f"data/{split}A/{k}.png", k)
            maps[f"{split}{k}"] = colours[np.random.default_rng(9 + k).integers(0, 2, (32, 32))]
            path = here / f"data/{split}B/{k}.png"
            path.parent.mkdir(exist_ok=True)
            write_image(path, maps[f"{split}{k}"])
    sizes = [
        "--load-size",
        "32",
        "--crop-size",
        "32",
        "--generator",
        "resnet",
        "--blocks",
        "1",
        "--patch",
        "16",
    ]
    train.main(
        ["pix2pix", *TINY, *sizes, "--data", "data", "--steps", "3", "--name", "r", "--norm", "instance"]
    )
    (here / "p.txt").write_text("red 255 0 0\nblue 0 0 255\n")
    return maps


def test_pairs_labels_and_diversity(
    pairs_run: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.main(["runs/r", "--palette", "p.txt", "--samples", "2"])
    found = read("runs/r/evaluation.json")
    recipe, nets, _ = load_run(Path("runs/r"), CPU)
    data = trainer.open_images(recipe, Path("runs/r"), progress=False)
    system, state = measure.System.of(recipe, nets, data, CPU), torch.get_rng_state()
    again = measure.measure(system, measure.prepare(system.has(), CPU, samples=2))
    assert again.values["diversity"] == found["diversity"] and torch.equal(state, torch.get_rng_state())
    assert found["diversity"] > 0 and found["details"]["diversity"] == {"samples": 2, "distance": "l1"}
    assert "tstr" not in found
    translate = fastgan.load("runs/r", device="cpu", precision="fp32")
    errors, hits = [], []
    for k in range(3):
        fake, true = translate(read_images(f"data/testA/{k}.png")[0]), pairs_run[f"test{k}"]
        errors.append(np.abs(fake.astype(float) - true).mean() / 255)
        red = (fake.astype(float)[..., 0] > fake[..., 2]) == (true[..., 0] == 255)
        hits.append(red.mean())
    assert found["l1"] == pytest.approx(np.mean(errors), abs=2e-3)
    assert found["pixel_accuracy"] == pytest.approx(np.mean(hits), abs=2e-3)
    assert "iou of blue" in capsys.readouterr().out and set(found["details"]["class_iou"]) == {"red", "blue"}
    # the same generator as a checkpoint folder, and as a file of weights that names no images
    folder = checkpoint.checkpoints(Path("runs/r/checkpoints"))[-1]
    evaluate.main([str(folder), "--measures", "l1", "--output", "c.json"])
    sizes = ["--data", "data", "--measures", "l1", "psnr_db", "--output", "f.json"]
    evaluate.main([str(folder / "G.safetensors"), *sizes])
    for name in ("c.json", "f.json"):
        assert read(name)["l1"] == pytest.approx(found["l1"], abs=1e-7)
    assert set(read("f.json")) == {"l1", "psnr_db", "details"}
    assert "give --data FOLDER" in said([str(folder / "G.safetensors")], capsys)
    assert "cycle_l1 needs a generator that leads back" in said(["runs/r", "--measures", "cycle_l1"], capsys)
    # other images for the same run
    evaluate.main(["runs/r", "--data", "data", "--max-images", "1", "--output", "d.json"])
    assert read("d.json")["details"]["images"]["A"] == 1


def test_the_way_that_leads_to_labels_is_found(here: Path) -> None:
    colours = np.array([[255, 0, 0], [0, 0, 255]], np.uint8)
    for split in ("train", "test"):
        for k in range(2):
            noise = np.random.default_rng(k).integers(60, 200, (32, 32, 3)).astype(np.uint8)
            labels = colours[np.random.default_rng(k).integers(0, 2, (32, 32))]
            (here / "data" / split).mkdir(parents=True, exist_ok=True)
            # labels left, as in upstream's facades after direction BtoA
            write_image(here / f"data/{split}/{k}.png", np.concatenate([labels, noise], 1))
    small = ["--blocks", "1", "--patch", "16", "--load-size", "32", "--crop-size", "32", "--steps", "1"]
    train.main(["cyclegan", *TINY, *small, "--data", "data", "--name", "c"])
    (here / "p.txt").write_text("red 255 0 0\nblue 0 0 255\n")
    evaluate.main(["runs/c", "--palette", "p.txt"])
    found = read("runs/c/evaluation.json")
    # side by side the halves are pairs, though no loss knows
    assert {"l1_A", "l1_B", "cycle_l1_A", "pixel_accuracy_A"} <= set(
        found
    ) and "pixel_accuracy_B" not in found


def test_folders_of_any_program(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = [draw(here / f"real/x/{k}.png", k, dtype=np.uint16) for k in range(3)]
    b = [draw(here / f"fake/x/{k}.png", 10 + k, dtype=np.uint16) for k in range(2)]
    draw(here / "fake/x/2.png", 5, (16, 20, 3))
    (here / "fake/x/bad.png").write_bytes(b"\x89PNG\r\n\x1a\nshort")
    before = set(here.rglob("*"))
    evaluate.main(["--real", "real", "--fake", "fake"])
    # folders of others are left as they are
    assert set(here.rglob("*")) == before
    evaluate.main(["--real", "real", "--fake", "fake", "--output", "p.json"])
    found = read("p.json")
    expected = np.mean([np.abs(x.astype(float) - y).mean() / 65535 for x, y in zip(a, b)])
    assert found["l1"] == pytest.approx(expected, abs=1e-6)
    images = found["details"]["images"]
    assert (images["real"], images["fake"], images["pairs"], len(images["skipped"])) == (3, 3, 2, 2)
    assert capsys.readouterr().err.count("skipped 2 bad files") == 2
    evaluate.main(["--real", "real", "--fake", "fake", "--range", "0", "32768", "--output", "o.json"])
    assert read("o.json")["l1"] != found["l1"]


def test_class_folders_teach_a_reader(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, seed in (("real", 0), ("fake", 100)):
        for name, low in (("dark", 0), ("light", 150)):
            for k in range(20):
                image = np.random.default_rng(seed + k).integers(low, low + 100, (16, 16, 3)).astype(np.uint8)
                (here / folder / name).mkdir(parents=True, exist_ok=True)
                write_image(here / folder / name / f"{seed + k}.png", image)
    evaluate.main(["--real", "real", "--fake", "fake", "--measures", "tstr", "trts", "--output", "o.json"])
    found = read("o.json")
    assert found["tstr"] > 0.9 and found["trts"] > 0.9
    assert "no equal names, so no pairs" in said(["--real", "real", "--fake", "fake"], capsys)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ([], "give a run or checkpoint, or --real DIR and --fake DIR"),
        (["--real", "."], "give a run or checkpoint, or --real DIR and --fake DIR"),
        (["absent"], "config.json is missing"),
        (["--real", "absent", "--fake", "."], "absent is not a folder"),
        (["--real", ".", "--fake", "."], "holds no images"),
        (["--weights", "x.pth", "--real", "real", "--fake", "real"], "x.pth does not exist"),
        (["--real", "real", "--fake", "real", "--measures", "nope"], "unknown measure nope"),
        (["--real", "real", "--fake", "real", "--measures", "diversity"], "diversity needs --samples"),
        (["--real", "real", "--fake", "real", "--output", "no/o.json"], "cannot be written"),
        (["--real", "twins", "--fake", "real"], "a.jpg and a.png have the same name"),
    ],
)
def test_mistakes_are_one_line(
    args: list[str], line: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "real" in args:
        draw(here / "real/a.png", 0)
        draw(here / "twins/a.png", 0)
        draw(here / "twins/a.jpg", 0)
    assert line in said(args, capsys)


def weights(run: str) -> dict[str, torch.Tensor]:
    nets, state, _ = checkpoint.load(checkpoint.checkpoints(Path("runs", run, "checkpoints"))[-1])
    return {f"{name}.{k}": v for name, net in nets.items() for k, v in net.items()} | state


CYCLE = [
    "cyclegan",
    *TINY,
    "--blocks",
    "1",
    "--max-images",
    "8",
    "--batch-size",
    "2",
    "--lr-policy",
    "constant",
    "--dropout",
]
EVERY = ["--evaluate-every", "1", "--keep-best", "cycle_l1", "--epochs", "4", "--epochs-decay", "0"]


def test_evaluation_changes_nothing_and_resumes(capsys: pytest.CaptureFixture[str]) -> None:
    train.main([*CYCLE, "--steps", "4", "--name", "plain"])
    train.main([*CYCLE, "--steps", "4", "--name", "watched", *EVERY])
    plain, watched = weights("plain"), weights("watched")
    assert plain.keys() == watched.keys()
    assert all(torch.equal(value, watched[key]) for key, value in plain.items())
    train.main([*CYCLE, "--steps", "2", "--name", "twice", *EVERY])
    train.main([*CYCLE, "--steps", "4", "--name", "twice", *EVERY])
    assert all(torch.equal(value, weights("twice")[key]) for key, value in plain.items())
    logs = [
        [json.loads(line) for line in Path("runs", name, "log.jsonl").read_text().splitlines()]
        for name in ("watched", "twice")
    ]
    curves = [[(row["step"], row["eval/cycle_l1_A"]) for row in log] for log in logs]
    assert curves[0] == curves[1] and [row[0] for row in curves[0]] == [1, 2, 3, 4]
    best = [checkpoint.best_of(Path("runs", name, "checkpoints")) for name in ("watched", "twice")]
    assert best[0] == best[1] and best[0]["measure"] == "cycle_l1"
    assert "checkpoints/best" in capsys.readouterr().err


def test_the_best_stays_and_can_be_used(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the second of four evaluations is made the best one
    found = iter([0.5, 0.1, 0.3, 0.2])
    monkeypatch.setattr(
        measure.evaluation, "measure", lambda *a: measure.Found(values={"cycle_l1_A": next(found)})
    )
    train.main([*CYCLE, "--steps", "4", "--name", "r", *EVERY, "--save-every", "1", "--keep", "1"])
    folder = here / "runs/r/checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["best", "step_00000003", "step_00000004"]
    assert checkpoint.best_of(folder) == {"measure": "cycle_l1", "value": 0.1, "step": 2}
    monkeypatch.undo()
    monkeypatch.chdir(here)
    evaluate.main(["runs/r/checkpoints/best", "--measures", "cycle_l1", "--output", "e.json"])
    assert read("e.json")["step"] == 2
    image = np.zeros((32, 32, 3), np.uint8)
    best, last = (fastgan.load(path, device="cpu")(image) for path in (folder / "best", here / "runs/r"))
    assert best.shape == (32, 32, 3) and not np.array_equal(best, last)
    # a crash between two renames
    (folder / "best").rename(folder / ".old_best")
    assert checkpoint.best_of(folder)["step"] == 2 and (folder / "best").is_dir()


def test_a_measure_that_fails_does_not_end_a_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*args: object) -> float:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(metrics, "l1", fails)
    train.main([*CYCLE, "--steps", "2", "--name", "r", *EVERY])
    printed = capsys.readouterr().err
    assert printed.count("the evaluation failed: RuntimeError: out of memory") == 1
    assert not Path("runs/r/checkpoints/best").exists() and weights("r")


@pytest.mark.parametrize(
    ("extra", "line"),
    [
        (["--keep-best", "l1"], "--keep-best needs --evaluate-every"),
        (["--evaluate-every", "1", "--keep-best", "psnr_db"], "psnr_db needs pairs"),
        (["--evaluate-every", "1", "--keep-best", "cycle"], "unknown measure cycle: did you mean cycle_l1"),
        (["--evaluate-every", "1", "--keep-best", "digit_accuracy_real"], "does not depend on the generator"),
        (["--evaluate-every", "1", "--palette", "p.txt"], "--palette needs pairs"),
        (["--evaluate-every", "-1"], "--evaluate-every must be at least 0"),
    ],
)
def test_training_refuses_what_it_could_not_measure(
    extra: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main([*CYCLE, "--steps", "2", "--name", "r", *extra])
    assert stop.value.code == 2 and line in capsys.readouterr().err
    assert not Path("runs/r/checkpoints").exists()


def test_a_mean_over_both_domains_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = train.make_recipe([*CYCLE, "--evaluate-every", "1", "--keep-best", "tstr"])
    assert type(recipe) is RECIPES["cyclegan"]
    monkeypatch.setattr(measure.evaluation, "prepare", lambda *a, **k: measure.Tools({"tstr"}))
    monkeypatch.setattr(measure.System, "of", lambda *a: type("S", (), {"has": lambda self: set()})())
    watch = measure.Evaluation(recipe, None, CPU, Path("none"))  # type: ignore[arg-type]
    assert watch.better({"tstr_A": 0.2, "tstr_B": 0.4, "trts_B": 0.9}, 1)["value"] == pytest.approx(0.3)
    assert not watch.better({"tstr_A": 0.1, "tstr_B": 0.5}, 2)
    assert not watch.better({"tstr_B": float("nan")}, 3) and not watch.better({"trts_B": 1.0}, 3)
    assert watch.better({"tstr_B": 0.31}, 4) == {"measure": "tstr", "value": 0.31, "step": 4}
