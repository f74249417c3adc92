"""Two gloo ranks on the CPU against one process: exchanges, synchronised batch norm, whole training runs,
signals, resume, and errors of one rank. All ranks' work is one start of tests/parallel_cases.py."""

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgan import checkpoint
from fastgan.config import UsageError
from fastgan.device import pick_device
from fastgan.layers import Conv2d
from fastgan.models import PatchDiscriminator, ResnetGenerator, UnetGenerator
from fastgan.parallel import Ranks
from fastgan.stack import run_layers, set_memory
from fastgan.sync_norm import SyncBatchNorm2d, sync_batch_norm
from fastgan.train import make_recipe
from fastgan.trainer import Trainer
from tests import parallel_cases as cases

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torchrun with gloo")
Two = tuple[dict[str, Any], dict[str, Any], Path, str, str]
ROOT = Path(__file__).parents[1]


def launch(*words: str) -> "subprocess.Popen[str]":
    """Two processes on a port that is free."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(process: "subprocess.Popen[str]") -> tuple[str, str]:
    """What a launch wrote on stdout and stderr; ends it where its processes wait for each other for ever."""
    try:
        return process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    """What rank 0 and rank 1 found, the folder with their runs, what the stopped command and the wrong one
    said."""
    folder = tmp_path_factory.mktemp("ranks")
    cases.pictures(folder)
    words = cases.command(cases.RESUMED, folder, "killed", "--steps", "100000")
    killed = launch("-m", "fastgan.train", *words)
    limit = time.monotonic() + 120
    while not (folder / "killed/checkpoints/step_00000002").exists():
        assert killed.poll() is None, killed.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.01)
    killed.send_signal(signal.SIGINT)
    said, error = finish(killed)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    work = launch(str(ROOT / "tests/parallel_cases.py"), str(folder), str(port))
    _, problem = finish(work)
    assert (folder / "rank_0.pt").exists() and (folder / "rank_1.pt").exists(), problem
    first, second = (torch.load(folder / f"rank_{r}.pt", weights_only=False) for r in (0, 1))
    return first, second, folder, said + error, problem


def tensors(run: Path) -> dict[str, Tensor]:
    nets, state, _ = checkpoint.load(checkpoint.checkpoints(run / "checkpoints")[-1])
    return state | {f"{net}.{key}": value for net, weights in nets.items() for key, value in weights.items()}


def test_exchanges(two: Two) -> None:
    x = torch.arange(24.0).view(1, 2, 3, 4)
    for found in two[:2]:
        assert torch.equal(found["gather"], torch.cat([x, 2 * x]))
        mean, halves, half, negative = found["average"]
        assert torch.equal(mean, 1.5 * x) and torch.equal(negative, -1.5 * x)
        assert halves.tolist() == [0.5] * 3 and halves.dtype == torch.float64 and half == 0.5
        assert [t.tolist() for t in found["broadcast"]] == [[0.0, 0.0], 5]
        assert found["any"] == [True, False, 7]


def test_synchronised_batch_norm_is_that_of_the_whole_batch(two: Two) -> None:
    net, x = cases.norms(), cases.images()
    expected = cases.through_norms(net, x)
    for rank, found in enumerate(two[:2]):
        mine, part = found["norms"], slice(2 * rank, 2 * rank + 2)
        assert found["keys"] == list(net.state_dict())
        # the mean of the ranks' losses is the loss of the whole batch, so the sum is twice that
        assert_near({k: v for k, v in mine.items()}, {
            **expected, "y": expected["y"][part], "x": 2 * expected["x"][part],
        })  # fmt: skip
        assert_near(found["buffers"], dict(net.named_buffers()))
    with torch.no_grad():
        y = net(x)
        assert_near({"y": torch.cat([two[0]["uneven"], two[1]["uneven"]])}, {"y": y})
        net.load_state_dict(two[0]["weights"])
        assert torch.equal(two[0]["eval"], net.eval()(x)) and torch.equal(two[1]["eval"], net(x))


def assert_near(mine: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """float64 up to the order of sums; the images' offset of 100 costs the variance of 1e-6 ten digits."""
    assert mine.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-6, atol=1e-8, msg=lambda m, k=key: f"{k}: {m}")


class Alone(Ranks):
    """One process that is all there is."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1

    def sum(self, x: Tensor) -> Tensor:
        return x.clone()


NETWORKS: dict[str, Callable[[], Any]] = {
    "resnet": lambda: ResnetGenerator(3, 3, ngf=2, blocks=2, norm="batch"),
    "unet": lambda: UnetGenerator(3, 3, levels=3, ngf=2, norm="batch"),
    "patchgan": lambda: PatchDiscriminator(3, ndf=2, receptive_field=16, norm="batch"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_synchronised_norm_runs_beside_fused_layers(name: str) -> None:
    plain = NETWORKS[name]().double()
    synchronised = copy.deepcopy(plain)
    sync_batch_norm(synchronised, Alone())
    # as the averaged generator is made
    copied = copy.deepcopy(synchronised)
    assert {type(m) for m in copied.modules()} & {SyncBatchNorm2d, nn.BatchNorm2d} == {SyncBatchNorm2d}
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = plain(x)
    # the second is how a network runs on a GPU
    torch.testing.assert_close(synchronised(x), expected)
    torch.testing.assert_close(run_layers([copied.line], x), expected)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(copied.state_dict()[key], value)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_synchronised_norm_may_compute_twice(name: str) -> None:
    once = NETWORKS[name]().double()
    sync_batch_norm(once, Alone())
    twice = copy.deepcopy(once)
    set_memory([twice], "least")
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    for net in (once, twice):
        net(x).square().mean().backward()
    torch.testing.assert_close(dict(twice.named_buffers()), dict(once.named_buffers()))
    mine = {key: p.grad for key, p in twice.named_parameters()}
    torch.testing.assert_close(mine, {key: p.grad for key, p in once.named_parameters()})


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_synchronised_norm_computes_in_float32_or_more(dtype: torch.dtype, affine: bool) -> None:
    plain, synchronised = (nn.BatchNorm2d(3, affine=affine) for _ in range(2))
    if dtype == torch.float64:
        plain, synchronised = plain.double(), synchronised.double()
    sync_batch_norm(synchronised, Alone())
    x = (5 + torch.randn(2, 3, 6, 5, dtype=torch.float64)).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    dy = torch.randn_like(x)
    found = []
    for net in (synchronised, plain):
        given = x.clone().requires_grad_()
        y = net(given)
        y.backward(dy)
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        found.append({"y": y, "x": given.grad} | {k: p.grad for k, p in net.named_parameters()})
    torch.testing.assert_close(*found)


def test_a_norm_inside_a_fused_convolution_cannot_be_synchronised() -> None:
    fused = Conv2d(3, 4, 3, norm=nn.BatchNorm2d(4))
    sync_batch_norm(fused, Alone())
    with pytest.raises(ValueError, match="norm must be a BatchNorm2d"):
        fused(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("name", cases.SYSTEMS)
def test_two_ranks_step_as_one_process_with_the_whole_batch(name: str, two: Two) -> None:
    words, folder = cases.SYSTEMS[name], two[2]
    one, both = cases.exact_steps(words, folder, "alone", None), two[0][name]
    assert one.keys() == both.keys()
    for key, value in one.items():
        # float64: the order of sums, 1e-14, may grow where Adam divides by gradients of nearly zero
        torch.testing.assert_close(both[key], value, rtol=1e-8, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")
    assert all(torch.equal(value, two[1][name][key]) for key, value in both.items())


@pytest.mark.parametrize("name", cases.SYSTEMS)
def test_two_ranks_train_as_one_process_with_the_whole_batch(name: str, two: Two) -> None:
    words, folder = cases.SYSTEMS[name], two[2]
    cases.run(words, folder, f"{name} alone", None, "--batch-size", "4", "--steps", "3", "--save-every", "3")
    one, both = tensors(folder / f"{name} alone"), tensors(folder / name)
    for key in one.keys() - {"random.cpu"}:
        # float32 where a gradient is a small difference of large ones: of the moments, 1e-4 of the largest;
        # of the weights, a tenth of an update, which Adam makes as large where the gradient is nearly zero
        atol = 1e-4 * float(one[key].abs().max()) if key.startswith("optimizer.") else 2e-5
        torch.testing.assert_close(both[key], one[key], rtol=0, atol=atol, msg=lambda m, k=key: f"{k}: {m}")
    logs = [
        json.loads((folder / run / "log.jsonl").read_text().splitlines()[0])
        for run in (f"{name} alone", name)
    ]
    shared = {key for key in logs[0] if key[0] in "GDci" and key != "img_per_s"}
    assert len(shared) >= 4
    assert {k: logs[1][k] for k in shared} == pytest.approx(
        {k: logs[0][k] for k in shared}, rel=1e-4, abs=1e-6
    )


def test_signals_and_resume(two: Two) -> None:
    folder, said = two[2], two[3]
    # torchrun itself ends with a traceback of the signal; ours is one line
    assert said.count("saved; the same command goes on") == 1 and "fastgan/" not in said
    assert [found["stopped"] for found in two[:2]] == [(143, 1)] * 2
    whole = tensors(folder / "whole")
    for name in ("killed", "one"):
        again = tensors(folder / name)
        assert again.keys() == whole.keys()
        assert not [key for key, value in again.items() if not torch.equal(value, whole[key])]
        assert checkpoint.best_of(folder / name / "checkpoints")["measure"] == "l1"
    assert not torch.equal(whole["random.cpu"], whole["random.cpu.1"])


def test_an_error_of_one_rank_is_that_of_all(two: Two) -> None:
    first, second = two[0]["failing"], two[1]["failing"]
    assert first == second
    assert first["block"] == "UsageError: only the second one"
    assert "different --lr" in first["arguments"]
    assert first["data"].startswith("DataError: ") and "no such folder" in first["data"]
    assert first["disk"].startswith("CheckpointError: ") and "disk full" in first["disk"]


def test_other_numbers_of_ranks_go_on_with_a_note(two: Two, capsys: pytest.CaptureFixture[str]) -> None:
    newest = checkpoint.checkpoints(two[2] / "whole/checkpoints")[-1]
    cases.run(cases.RESUMED, two[2], "whole", None, "--steps", str(int(newest.name[5:]) + 1))
    assert "2 processes came to step" in capsys.readouterr().err


def test_a_wrong_call_is_one_line(two: Two) -> None:
    lines = [line for line in two[4].splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "no such folder" in lines[0]
    assert "exitcode  : 2" in two[4]


def test_wrong_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Ranks.start() is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match="RANK: start several processes with torchrun"):
        Ranks.start()
    with pytest.raises(UsageError, match="--device cuda:1 is for one process"):
        pick_device("cuda:1", 0, 2)
    assert pick_device("auto", 0, 2).type in ("cpu", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="2 processes for 1 GPUs: give torchrun --nproc-per-node 1"):
        pick_device("auto", 0, 2)


def test_a_step_of_several_batches_and_ranks_counts_for_the_epochs(tmp_path: Path) -> None:
    cases.pictures(tmp_path)
    words = cases.command(cases.RESUMED, tmp_path, "r", "--batch-size", "1")
    plain = Trainer(make_recipe([*words, "--n-critic", "2"]))
    added = Trainer(make_recipe([*words, "--n-critic", "2", "--accumulate", "2"]))
    assert (plain.steps_per_epoch, added.steps_per_epoch) == (3, 2)
    assert (plain.images, added.images) == (2, 4)
