"""The command line as a person meets it: a short run, exact resume after a kill, signals, and every kind of
bad input."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from fastgan import checkpoint, train
from fastgan.device import pick_precision
from fastgan.recipes import RECIPES
from fastgan.samples import _stack
from fastgan.trainer import Trainer
from tests.run_cases import CYCLE, PIX, assert_same_run, picture, start, tensors, wait_for


@pytest.fixture
def unpaired(tmp_path: Path) -> Path:
    for i in range(5):
        picture(tmp_path / f"data/trainA/{i}.png", seed=i)
    for i in range(3):
        picture(tmp_path / f"data/trainB/{i}.png", seed=10 + i)
    return tmp_path / "data"


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fails(args: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Run the command, expect its exit code and exactly one line on stderr; return that line."""
    with pytest.raises(SystemExit) as stop:
        train.main(args)
    assert stop.value.code == code
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    return error[0]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to send")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_finish_the_step_and_save(number: int, code: int, in_tmp: Path) -> None:
    process = start([*CYCLE, "--name", "r", "--steps", "100000", "--save-every", "5"], in_tmp)
    wait_for(in_tmp / "runs/r/checkpoints/step_00000005", process)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert "saved" in error and "Traceback" not in error
    assert list((in_tmp / "runs/r").glob("index.html"))
    newest = checkpoint.checkpoints(in_tmp / "runs/r/checkpoints")[-1]
    assert f"step {int(newest.name[5:])} of" in error


def test_a_run_leaves_its_folder_and_nothing_else(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main([*PIX, "--name", "r", "--steps", "3", "--sample-every", "2", "--save-every", "2"])
    assert "index.html" in capsys.readouterr().out
    assert [p.name for p in in_tmp.iterdir()] == ["runs"]
    names = {str(p.relative_to(in_tmp / "runs/r")) for p in (in_tmp / "runs/r").rglob("*") if p.is_file()}
    steps = {f"samples/step_0000000{k}.png" for k in (0, 2, 3)}
    files = {f"checkpoints/step_0000000{k}/{f}.safetensors" for k in (2, 3) for f in ("G", "D", "state")}
    assert {n.replace("\\", "/") for n in names} == {"config.json", "log.jsonl", "index.html", *steps, *files}
    about = json.loads((in_tmp / "runs/r/config.json").read_text())
    assert (
        about["recipe"] == "pix2pix"
        and about["settings"]["ngf"] == 4
        and about["ranges"] == [[0, 255], [0, 255]]
    )
    # finished: the same command says so and changes nothing
    train.main([*PIX, "--name", "r", "--steps", "3", "--sample-every", "2", "--save-every", "2"])
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize("has", [False, True])
def test_auto_is_bf16_only_where_the_cpu_has_it(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated it is slower than float32."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has, raising=False)
    assert pick_precision("auto", cpu) is (torch.bfloat16 if has else None)
    assert pick_precision("bf16", cpu) is torch.bfloat16 and pick_precision("fp32", cpu) is None


def test_the_schedule_is_spread_over_the_steps_and_ends_above_zero(in_tmp: Path) -> None:
    train.main(
        [*PIX, "--name", "r", "--steps", "8", "--epochs", "1", "--epochs-decay", "3", "--log-every", "1"]
    )
    lines = [json.loads(line) for line in (in_tmp / "runs/r/log.jsonl").read_text().splitlines()]
    assert [line["lr_G"] for line in lines] == pytest.approx(
        [2e-4 * f for f in (1, 1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25)]
    )
    assert [line["epoch"] for line in lines] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_settings_of_a_started_run_are_kept(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main([*PIX, "--name", "r", "--steps", "2"])
    before = tensors(in_tmp / "runs/r")
    assert "--lr 0.0002" in fails([*PIX, "--name", "r", "--steps", "4", "--lr", "1e-3"], capsys)
    assert "--accumulate 1" in fails([*PIX, "--name", "r", "--steps", "4", "--accumulate", "2"], capsys)
    assert "pix2pix" in fails([*CYCLE, "--name", "r"], capsys)
    assert all(torch.equal(v, before[k]) for k, v in tensors(in_tmp / "runs/r").items())
    # where and how it is computed may change
    train.main([*PIX, "--name", "r", "--steps", "3", "--memory", "low", "--data-on", "host", "--no-capture"])
    assert "random.cpu" in tensors(in_tmp / "runs/r")


BAD_FLAGS = {
    "unknown flag": (["--lrr", "1"], "--lr"),
    "wrong kind": (["--lr", "fast"], "--lr"),
    "wrong choice": (["--norm", "layer"], "--norm"),
    "too small": (["--batch-size", "0"], "--batch-size must be at least 1"),
    "too few": (["--accumulate", "0"], "--accumulate must be at least 1"),
    "beta": (["--beta1", "1"], "--beta1"),
    "crop over load": (["--load-size", "100", "--crop-size", "128"], "--crop-size 128"),
    "range": (["--range-a", "5", "1"], "--range-a"),
    "name": (["--name", "../x"], "--name"),
    "preset": (["--preset", "huge"], "--preset huge"),
    "device": (["--device", "abacus"], "--device abacus"),
    "nothing to train": (["--epochs", "0", "--epochs-decay", "0"], "--epochs"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flag(case: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, said = BAD_FLAGS[case]
    assert said in fails(["cyclegan", *words], capsys)
    assert not list(in_tmp.iterdir()), "nothing may be written"


def test_usage_is_a_list_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    commands, recipes = (
        [line for line in part.splitlines() if line.startswith("  ")]
        for part in capsys.readouterr().out.split("recipes:\n")
    )
    assert len(commands) == 6 and all("-m fastgan.train " in line for line in commands)
    assert all(line.count("  ") >= 2 and len(line) <= 100 for line in commands + recipes)
    assert [line.split()[0] for line in recipes] == list(RECIPES)


def test_unknown_recipe(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cyclegan, pix2pix" in fails(["stylegan"], capsys)


def test_missing_and_empty_folder(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere" in fails([*CYCLE, "--data", "nowhere"], capsys)
    (in_tmp / "empty").mkdir()
    assert "empty" in fails([*CYCLE, "--data", "empty"], capsys)
    assert not (in_tmp / "runs").exists()


def test_unpaired_counts_in_paired_mode(
    unpaired: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "(3, 4)" in fails([*PIX, "--data", "data", "--load-size", "24", "--crop-size", "16"], capsys)


def test_broken_file_is_named_or_skipped(
    unpaired: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*CYCLE, "--data", "data", "--load-size", "24", "--crop-size", "16", "--steps", "2", "--name", "r"]
    whole = (unpaired / "trainA/1.png").read_bytes()
    (unpaired / "trainA/1.png").write_bytes(whole[: len(whole) // 2])
    (unpaired / "trainB/note.jpg").write_text("not an image")
    error = fails(args, capsys)
    assert ("1.png" in error or "note.jpg" in error) and "--skip-bad" in error
    train.main([*args, "--skip-bad"])
    assert "2" in capsys.readouterr().err


def test_image_smaller_than_the_crop(
    unpaired: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*CYCLE, "--data", "data", "--preprocess", "crop", "--crop-size", "64"]
    error = fails(args, capsys)
    assert "0.png" in error and "64" in error


def test_size_that_the_network_does_not_divide(
    unpaired: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--data", "data", "--load-size", "24"]
    assert "multiples of 4" in fails([*CYCLE, *sizes, "--crop-size", "18"], capsys)
    assert "--patch 70" in fails([*CYCLE, *sizes, "--crop-size", "20", "--patch", "70"], capsys)
    for path in list(unpaired.rglob("[34].png")):
        path.unlink()
    assert "multiples of 8" in fails([*PIX, *sizes, "--crop-size", "20"], capsys)


def test_whole_images_of_unequal_size(
    unpaired: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(unpaired / "trainA/wide.png", (64, 40))
    args = [*CYCLE, "--data", "data", "--preprocess", "none", "--steps", "9", "--name", "r"]
    assert "--batch-size 1" in fails(args, capsys)
    train.main([*args, "--batch-size", "1"])
    assert (in_tmp / "runs/r/samples/step_00000009.png").is_file()


def test_sample_images_of_unequal_size_share_a_grid() -> None:
    small, wide = torch.zeros(1, 3, 4, 8), torch.full((1, 3, 6, 5), 0.5)
    stacked = _stack([small, wide])
    assert stacked.shape == (2, 3, 6, 8)
    assert torch.equal(stacked[:1, :, :4], small) and torch.equal(stacked[1:, :, :, :5], wide)
    assert (stacked[0, :, 4:] == 1).all() and (stacked[1, :, :, 5:] == 1).all()


def test_channels_that_the_identity_loss_cannot_use(
    unpaired: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [
        *CYCLE,
        "--data",
        "data",
        "--load-size",
        "24",
        "--crop-size",
        "16",
        "--channels",
        "3",
        "--channels-b",
        "1",
    ]
    assert "--lambda-identity 0" in fails(args, capsys)
    train.main([*args, "--lambda-identity", "0", "--steps", "2", "--name", "r"])
    assert json.loads((in_tmp / "runs/r/config.json").read_text())["channels"] == [3, 1]


def test_full_disk_keeps_the_previous_checkpoint(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*PIX, "--name", "r", "--save-every", "2", "--steps", "4"]
    real, calls = checkpoint.save_file, []

    def full_at_the_second(tensors: object, path: Path, **kwargs: object) -> None:
        calls.append(path)
        if len(calls) == 5:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full_at_the_second)
    error = fails(args, capsys)
    assert "disk full" in error and "step_00000002" in error
    left = sorted(p.name for p in (in_tmp / "runs/r/checkpoints").iterdir())
    assert left == ["step_00000002"]
    # with room again the same command goes on and ends where an undisturbed run ends
    train.main(args)
    train.main([*args[:-5], "s", *args[-4:]])
    assert_same_run(in_tmp / "runs/r", in_tmp / "runs/s")


def test_diverging_run_stops_and_names_the_last_good_checkpoint(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*PIX, "--name", "r", "--save-every", "3", "--log-every", "1", "--steps", "9"]
    real = Trainer.save

    def poison(self: Trainer, random: dict[str, torch.Tensor]) -> Path:
        path = real(self, random)
        next(self.step.nets["G"].parameters()).data.fill_(float("nan"))
        return path

    monkeypatch.setattr(Trainer, "save", poison)
    error = fails(args, capsys, code=1)
    assert "not finite at step 4" in error and "step_00000003" in error
    assert [p.name for p in (in_tmp / "runs/r/checkpoints").iterdir()] == ["step_00000003"]


def test_wrong_checkpoint_in_a_run_says_what_it_looks_like(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main([*PIX, "--name", "r", "--steps", "2"])
    folder = in_tmp / "runs/r/checkpoints/step_00000002"
    (folder / "G.safetensors").write_bytes((folder / "D.safetensors").read_bytes())
    error = fails([*PIX, "--name", "r", "--steps", "4"], capsys)
    assert "G.safetensors" in error and "patchgan" in error and "model.model.0.weight" in error
