"""StarGAN as a person meets it: the picture of samples, translation by the names of labels, figures,
mistakes; and what a step of it computes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import fastgan
from fastgan import demo, evaluate, export, metrics, train, translate
from fastgan.checkpoint import Labels, choices, load_generator
from fastgan.config import UsageError
from fastgan.data.augment import Geometry
from fastgan.data.digits import COLOURS, make_colours
from fastgan.data.images import read_images
from fastgan.data.labelled import open_labelled, other_labels
from fastgan.gallery import pictures
from fastgan.measure import System, measure, prepare
from fastgan.memory import choose, estimate
from fastgan.recipes.stargan import StarGAN, StarGANConfig
from fastgan.samples import sample_columns
from fastgan.schedule import lr_factor
from fastgan.step import Step

CPU = torch.device("cpu")
TINY = ["--ngf", "2", "--ndf", "2", "--blocks", "1", "--device", "cpu", "--threads", "1"]
NOISE = np.random.default_rng(0).integers(0, 256, (32, 36, 3), np.uint8)


# a step


def make(**settings: Any) -> tuple[StarGAN, dict[str, nn.Module], list[dict[str, Tensor]]]:
    tiny = {"ngf": 2, "ndf": 2, "blocks": 1, "levels": 2, "load_size": 16, "crop_size": 16, "batch_size": 4}
    recipe = StarGAN(StarGANConfig(**{**tiny, **settings}))
    torch.manual_seed(0)
    label = torch.eye(5)[torch.tensor([0, 1, 2, 3])]
    batches = [{"A": torch.rand(4, 3, 16, 16), "label": label} for _ in range(recipe.config.batches)]
    return recipe, recipe.networks(3, 5), batches


def test_the_steps_of_d_record_nothing_of_g() -> None:
    """But for the last one, whose fakes G's own update takes over: it makes none again."""
    recipe, nets, batches = make(n_critic=3)
    passes: list[bool] = []
    nets["G"].register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    Step(recipe, nets, device=CPU)(batches, 0)
    assert passes == [False, False, True, True]  # the last one is the way back


def test_targets_are_the_labels_in_an_order_of_the_step() -> None:
    recipe, nets, batches = make(n_critic=2, n_gen=2, batch_size=64)
    batches = [{key: x.repeat(16, *[1] * (x.dim() - 1)) for key, x in batch.items()} for batch in batches]
    asked: list[Tensor] = []
    nets["G"].register_forward_pre_hook(lambda _, given: asked.append(given[1]))

    def targets(index: int) -> list[Tensor]:
        asked.clear()
        Step(recipe, nets, device=CPU)(batches, index)
        return list(asked)

    first, again, other = targets(7), targets(7), targets(8)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    # of D's batches, the way back of the second, and that of G's own batch
    found = [first[k] for k in (0, 1, 3)] + other[:1]
    for k, label in enumerate(found):
        assert torch.equal(label.sum(0), batches[0]["label"].sum(0))
        assert not any(torch.equal(label, earlier) for earlier in [*found[:k], batches[0]["label"]])


def test_the_schedule_is_the_papers() -> None:
    c = StarGANConfig()
    assert c.steps == 40_000 and c.steps * c.n_critic == 200_000
    factors = [lr_factor(c, step * (c.epochs + c.epochs_decay) // c.steps) for step in range(c.steps)]
    assert set(factors[:20_000]) == {1.0} and factors[20_000] < 1
    # evenly down to almost nothing, where the public code would still have 0.999 of it
    assert factors[-1] < 0.1 and np.mean(factors[20_000:]) == pytest.approx(0.5)
    assert (c.lr, c.beta1, c.beta2, c.batch_size, c.lambda_gp) == (1e-4, 0.5, 0.999, 16, 10.0)
    assert (c.lambda_class, c.lambda_cycle, c.lambda_identity) == (1.0, 10.0, 0.0)


def test_memory_is_estimated() -> None:
    recipe, _, _ = make(batch_size=2)
    assert estimate(recipe, (3, 5), (16, 16), gpu=False).activation_bytes_per_image > 4 * 16 * 16 * 4
    with pytest.raises(UsageError) as error:
        choose(recipe, (3, 5), (16, 16), free=150_000, gpu=False)
    # one image has no other label to be asked for
    assert "--ngf" in str(error.value) and "--batch-size 1" not in str(error.value)


def test_a_step_in_half_precision() -> None:
    recipe, nets, batches = make(n_critic=2, lambda_identity=1.0)
    terms = Step(recipe, nets, device=CPU, autocast=torch.bfloat16)(batches, 0, watch=True)
    assert all(value.isfinite() and value.dtype == torch.float32 for value in terms.values())
    assert {"D", "D_class", "G_GAN", "G_class", "cycle", "idt", "grad_D"} <= terms.keys()


# labels of a picture and of a measure


def test_labels_to_translate_to() -> None:
    own = np.array([1, 0, 0, 1, 0], np.float32)
    assert (other_labels(np.eye(5)[1], "abcde", classes=True) == np.eye(5)).all()
    names = ["Black_Hair", "Blond_Hair", "Brown_Hair", "Male", "Young"]
    rows = other_labels(own, names, classes=False)
    # create_labels of the official solver
    assert rows.astype(int).tolist() == [
        [1, 0, 0, 1, 0], [0, 1, 0, 1, 0], [0, 0, 1, 1, 0], [1, 0, 0, 0, 0], [1, 0, 0, 1, 1]
    ]  # fmt: skip


class Painter(nn.Module):
    """Recolours a digit on white: what a perfect generator does; `wrong` takes the colour before, and
    `upside_down` turns the digit."""

    multiple = 4

    def __init__(self, wrong: bool = False, upside_down: bool = False) -> None:
        super().__init__()
        self.wrong, self.upside_down = wrong, upside_down

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        palette = torch.tensor(list(COLOURS.values())) / 127.5 - 1
        colours = palette.roll(1, 0) if self.wrong else palette
        x = x.flip(2) if self.upside_down else x
        # x = m c + (1 - m) with one of the five: 1 - x and 1 - c have one direction
        lack, lacks = 1 - x, 1 - palette
        shares = torch.einsum("nchw,kc->nkhw", lack, lacks) / lacks.square().sum(1)[:, None, None]
        missed = (lack[:, None] - shares[:, :, None] * lacks[:, :, None, None]).square().sum((2, 3, 4))
        ink = shares[torch.arange(len(x)), missed.argmin(1)][:, None]
        return 1 - ink * (label @ (1 - colours))[:, :, None, None]


def figures(net: nn.Module) -> dict[str, float]:
    recipe, _, _ = make()
    whole = Geometry("none", 32, 32)
    data = open_labelled(None, labelled=True, digits="colours", geometry=whole, max_images=500)
    data.test.labels, data.test.stores[0].index = data.test.labels[:60], data.test.stores[0].index[:60]
    system = System.of(recipe, {"G": net}, data, CPU)
    return measure(system, prepare(system.has(), CPU)).values


def test_figures_of_a_perfect_painter_and_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "train_classifier", partial(metrics.train_classifier, epochs=10))
    good = figures(Painter())
    assert good["colour_accuracy"] == 1.0 and good["label_accuracy"] > 0.98
    assert good["digit_accuracy"] > 0.8 and good["label_accuracy_real"] > 0.98
    bad = figures(Painter(wrong=True, upside_down=True))
    assert bad["colour_accuracy"] == 0.0 and bad["label_accuracy"] < 0.02 and bad["digit_accuracy"] < 0.6


def test_a_grid_has_a_column_a_label() -> None:
    recipe, _, _ = make()
    data = open_labelled(None, labelled=True, digits="colours", geometry=Geometry("none", 32, 32))
    columns = sample_columns(recipe, {"G": Painter()}, data, device=CPU)
    assert list(columns) == ["A", *(f"G(A, {name})" for name in COLOURS)]
    truth = make_colours("test")
    assert torch.equal(columns["A"], data.test.images("A", 0, 6))
    for k, name in enumerate(COLOURS):
        same = torch.from_numpy(truth.colours[:6] == k)
        assert (columns[f"G(A, {name})"] - columns["A"])[same].abs().max() < 0.02 if same.any() else True


# a run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stargan")
    train.main(["stargan", *TINY, "--steps", "2", "--runs", str(folder), "--name", "r", "--ema", "0.5"])
    return folder / "r"


def test_a_run_has_names_a_picture_and_a_page(run: Path) -> None:
    assert json.loads((run / "config.json").read_text())["labels"] == list(COLOURS)
    (_, path), (_, last) = pictures.find(run)
    cells = pictures.read(2, last, 10**7).cells
    assert [column[0] for column in cells["columns"]] == ["A", *(f"G(A, {name})" for name in COLOURS)]
    assert (
        pictures.inputs(path) == pictures.inputs(last) != ""
    )  # a page of two runs lays them over each other
    assert "G(A, orange)" in (run / "index.html").read_text()


def test_translate_to_labels_by_name(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(NOISE).save(tmp_path / "x.png")
    given = [str(run), str(tmp_path / "x.png")]
    translate.main([*given, str(tmp_path / "y.png"), "--to", "blue"])
    by_name = read_images(tmp_path / "y.png")[0]
    translate.main([*given, str(tmp_path / "z.png"), "--label", "0", "0", "1", "0", "0"])
    assert np.array_equal(by_name, read_images(tmp_path / "z.png")[0])
    translate.main([*given, str(tmp_path / "all"), "--to", "all"])
    made = {path.name: read_images(path)[0] for path in (tmp_path / "all").iterdir()}
    assert sorted(made) == sorted(f"x_{name}.png" for name in COLOURS)
    assert np.array_equal(made["x_blue.png"], by_name)
    for name in ("red", "magenta"):
        assert np.array_equal(made[f"x_{name}.png"], fastgan.load(run, label=name, device="cpu")(NOISE))
    assert len({image.tobytes() for image in made.values()}) == 5
    # what is there stays; one that is missing is made again
    (tmp_path / "all/x_red.png").unlink()
    translate.main([*given, str(tmp_path / "all"), "--to", "all"])
    assert np.array_equal(read_images(tmp_path / "all/x_red.png")[0], made["x_red.png"])
    export.main([str(run), str(tmp_path / "g.ckpt"), "--format", "upstream", "--to", "green"])
    foreign = fastgan.load(tmp_path / "g.ckpt", label=[0, 1, 0, 0, 0], device="cpu")
    assert np.array_equal(foreign(NOISE), made["x_green.png"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--to purple", "purple is no label of"),
        ("--to purple", "it has red, green, blue, orange, magenta"),
        ("--to red blue", "takes one label"),
        ("--to red --label 1 0 0 0 0", "--to NAME or --label NUMBERS"),
        ("", "give --to with one of red, green, blue, orange, magenta, or --label"),
        ("--label 1 0", "give --to with one of red"),
    ],
)
def test_a_wrong_label_is_one_line(
    words: str, says: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(NOISE).save(tmp_path / "x.png")
    with pytest.raises(SystemExit) as stop:
        translate.main([str(run), str(tmp_path / "x.png"), str(tmp_path / "y.png"), *words.split()])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and says in error and error.count("\n") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_labels_of_attributes_and_of_files_that_do_not_name_them(tmp_path: Path) -> None:
    known = Labels(("Black_Hair", "Blond_Hair", "Young"), True, classes=False)
    assert known.numbers(["Young", "Blond_Hair"], tmp_path) == [0.0, 1.0, 1.0]
    assert known.numbers("Young", tmp_path) == [0.0, 0.0, 1.0]
    assert known.numbers("Young+Blond_Hair", tmp_path) == [0.0, 1.0, 1.0]
    assert Labels(("a+b", "a", "b"), True, True).numbers("a+b", tmp_path) == [1.0, 0.0, 0.0]
    with pytest.raises(UsageError, match="does not name its labels: give --label and 3 numbers"):
        Labels(("1", "2", "3")).numbers("Young", tmp_path)
    with pytest.raises(UsageError, match="takes no label: leave --to out"):
        Labels().numbers("Young", tmp_path)


def test_the_demo_offers_the_names(run: Path, tmp_path: Path) -> None:
    assert choices(run) == ((), Labels(tuple(COLOURS), True, True))
    Image.fromarray(NOISE).save(tmp_path / "x.png")
    desk = demo.Desk(demo.Arguments(run, device="cpu"), tmp_path)
    files = desk.translate(str(tmp_path / "x.png"), None, [3], 0)[1]
    assert np.array_equal(read_images(files[0])[0], fastgan.load(run, label="orange", device="cpu")(NOISE))


def test_evaluate_a_run_and_a_file(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics, "train_classifier", partial(metrics.train_classifier, epochs=1))
    out = tmp_path / "figures.json"
    evaluate.main([str(run), "--device", "cpu", "--max-images", "64", "--output", str(out)])
    found = json.loads(out.read_text())
    assert {"label_accuracy", "colour_accuracy", "digit_accuracy", "label_accuracy_real"} <= found.keys()
    assert found["details"]["translations"] == 4 * 64
    assert "colour_accuracy" in capsys.readouterr().out
    for k, name in enumerate(("a", "b", "c", "d", "e")):
        for split in ("train", "test"):
            path = tmp_path / f"data/{split}/{name}/{k}.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(np.roll(NOISE, k, 0)).save(path)
    generator = load_generator(run, label="red")
    torch.save(dict(generator.weights), tmp_path / "9-G.ckpt")
    evaluate.main([str(tmp_path / "9-G.ckpt"), "--data", str(tmp_path / "data"), "--device", "cpu"])
    assert "label_accuracy" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        file = str(next(run.glob("checkpoints/*/G_ema.safetensors")))
        evaluate.main([file, "--data", str(tmp_path / "data"), "--device", "cpu"])
    assert "takes 5 labels red, green, blue, orange, magenta; " in capsys.readouterr().err


def test_attributes_from_training_to_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """CelebA's layout, with portraits that are cut to squares."""
    names = ["Bald", "Black_Hair", "Blond_Hair", "Young"]
    lines = []
    for k in range(20):
        path = tmp_path / f"data/images/{k:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(NOISE, k, 0)[:, :20]).save(path)
        bits = [k % 2, k // 2 % 2, 1 - k // 2 % 2, k // 4 % 2]
        lines.append(f"{path.name} {' '.join('1' if bit else '-1' for bit in bits)}")
    text = f"20\n{' '.join(names)}\n" + "\n".join(lines) + "\n"
    (tmp_path / "data/list_attr_celeba.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metrics, "train_classifier", partial(metrics.train_classifier, epochs=1))
    words = ["stargan", *TINY, "--data", "data", "--load-size", "18", "--crop-size", "16", "--levels", "2"]
    words += ["--steps", "2", "--batch-size", "4"]
    with pytest.raises(SystemExit):
        train.main(words)
    assert "an attribute list: choose with --attributes NAME NAME ... of Bald" in capsys.readouterr().err
    words += ["--attributes", "Black_Hair", "Blond_Hair", "Young"]
    train.main([*words, "--evaluate-every", "20", "--keep-best", "label_accuracy"])
    run = tmp_path / "runs/stargan-data"
    cells = pictures.read(2, run / "samples/step_00000002.png", 10**7).cells
    assert [c[0] for c in cells["columns"]][1:] == [
        "G(A, Black_Hair changed)", "G(A, Blond_Hair changed)", "G(A, Young changed)"
    ]  # fmt: skip
    evaluate.main([str(run / "checkpoints/best"), "--device", "cpu"])
    evaluate.main([str(run), "--device", "cpu"])
    found = json.loads((run / "evaluation.json").read_text())
    assert 0 <= found["label_accuracy"] <= 1 and "colour_accuracy" not in found
    translate.main([str(run), "data/images", "out", "--to", "Blond_Hair", "Young"])
    assert len(list(Path("out").iterdir())) == 20
    with pytest.raises(SystemExit):
        translate.main([str(run), "data/images", "each", "--to", "all"])
    assert "--to all is for classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--generator unet", "--generator has no effect here"),
        ("--norm batch", "--norm has no effect here"),
        ("--preprocess none", "D needs images cropped to one size"),
        ("--batch-size 1", "--batch-size must be 2 or more"),
        ("--levels 6", "--levels 6 needs multiples of 64"),
        ("--crop-size 16 --load-size 16", "D is made for --crop-size 16"),
        ("--lambda-cycle -1", "--lambda-cycle must be at least 0"),
        ("--attributes Young", "the digits have none"),
    ],
)
def test_mistakes_are_one_line(
    words: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train.main(["stargan", *TINY, *words.split(), "--steps", "1"])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and says in error and error.count("\n") == 0
    assert not list(tmp_path.iterdir())
