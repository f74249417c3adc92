"""What every rank does in tests/test_parallel.py, which starts this file with torchrun and reads the results.

torchrun --nproc-per-node 2 tests/parallel_cases.py FOLDER PORT
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastgan import checkpoint, train
from fastgan.config import UsageError
from fastgan.data.images import DataError
from fastgan.parallel import Ranks, together
from fastgan.sync_norm import sync_batch_norm
from fastgan.train import make_recipe
from fastgan.trainer import Interrupted, Trainer

TINY = [
    *(
        "--ngf",
        "4",
        "--ndf",
        "4",
        "--patch",
        "16",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--threads",
        "1",
    ),
    *("--log-every", "2", "--sample-every", "1000", "--lr-policy", "constant"),
    *("--load-size", "24", "--crop-size", "16"),
]
CYCLE = ["cyclegan", *TINY, "--blocks", "1", "--pool-size", "3"]
# the pool overflows within the first step, its draws must be those of one process
EACH = ["--n-critic", "2", "--accumulate", "2"]
SYSTEMS = {
    "cyclegan instance": [*CYCLE, "--norm", "instance", "--ema", "0.9", "--accumulate", "2"],
    "cyclegan batch": [*CYCLE, "--norm", "batch"],
    "pix2pix": ["pix2pix", *TINY, "--levels", "3", "--pool-size", "3", *EACH],
}
# without --patch, which has no effect there; the folders of the domains are two classes
SYSTEMS["cgan"] = ["cgan", *TINY[:4], *TINY[6:], "--architecture", "dcgan", "--noise-size", "5", *EACH]
# dropout draws differently on each rank: its states must come back as well
RESUMED = ["pix2pix", *TINY, "--levels", "4", "--dropout", "--batch-size", "2", "--save-every", "2"]


def pictures(folder: Path) -> None:
    """Images of noise, pairs and domains: in flat areas rounding would flip the sign of an L1 gradient."""
    noise = np.random.default_rng(0)
    for kind, width in (("pairs/train", 48), ("domains/trainA", 24), ("domains/trainB", 24)):
        (folder / kind).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(noise.integers(0, 255, (24, width, 3), np.uint8)).save(folder / kind / f"{i}.png")


def norms() -> nn.Sequential:
    """Batch norms of both kinds of momentum, with weights that are not their initial ones."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=None), nn.Tanh(), nn.BatchNorm2d(4))
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net.double()


def images() -> Tensor:
    """(4, 3, 5, 6) float64, far from zero: a naive variance would cancel."""
    x = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return x * torch.tensor([1e-3, 1, 30]).view(3, 1, 1) + torch.tensor([100.0, -5, 0]).view(3, 1, 1)


def through_norms(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, then gradients of a loss that holds a gradient penalty, by name; the images' as "x"."""
    x = x.clone().requires_grad_()
    y = net(x)
    (slope,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (y.sin().mean() + slope.square().mean()).backward()
    found = {name: p.grad for name, p in net.named_parameters()} | {"x": x.grad}
    return {"y": y.detach()} | {k: v for k, v in found.items() if v is not None}


def command(words: list[str], folder: Path, name: str, *more: str) -> list[str]:
    """The words of a run on the pictures of the folder."""
    data = folder / ("pairs" if words[0] == "pix2pix" else "domains")
    return [*words, "--data", str(data), "--runs", str(folder), "--name", name, *more]


def run(words: list[str], folder: Path, name: str, ranks: Ranks | None, *more: str) -> None:
    """Train to the last step."""
    trainer = Trainer(make_recipe(command(words, folder, name, *more)), ranks)
    trainer.resume()
    trainer.train()


def exact_steps(words: list[str], folder: Path, name: str, ranks: Ranks | None) -> dict[str, Tensor]:
    """All tensors after three steps in float64 on four images, of which every rank has its part."""
    r, size = (ranks.rank, ranks.size) if ranks else (0, 1)
    trainer = Trainer(make_recipe(command(words, folder, name, "--batch-size", str(4 // size))), ranks)
    step = trainer.step
    for net in (*step.nets.values(), *step.ema.values()):
        net.double()
    for k in range(3):
        several = range(k * trainer.batches, (k + 1) * trainer.batches)
        parts = [trainer.data.train.batch(i, 4 // size, seed=0, rank=r, ranks=size) for i in several]
        step([{key: x.double() for key, x in part.items()} for part in parts], k)
    nets = {**step.nets, **{f"{k}_ema": v for k, v in step.ema.items()}}
    found = {f"{n}.{key}": value for n, net in nets.items() for key, value in net.state_dict().items()}
    return found | step.state()


def _failing(ranks: Ranks, folder: Path) -> dict[str, str]:
    """What each rank raises where something is wrong with one of them."""
    said = {}

    def note(case: str, error: Exception) -> None:
        said[case] = f"{type(error).__name__}: {error}"
        assert ranks.agreed
        ranks.agreed = False

    try:
        with together(ranks):
            if ranks.rank == 1:
                raise UsageError("only the second one")
    except UsageError as error:
        note("block", error)
    try:
        Trainer(make_recipe(command(RESUMED, folder, "wrong", "--lr", f"{1 + ranks.rank}e-4")), ranks)
    except UsageError as error:
        note("arguments", error)
    try:
        # only the first one decodes the images
        Trainer(make_recipe(command(RESUMED, folder / "nowhere", "wrong")), ranks)
    except DataError as error:
        note("data", error)
    real, checkpoint.save_file = checkpoint.save_file, _full_disk
    try:
        # only the first one writes
        run(RESUMED, folder, "wrong", ranks, "--steps", "5")
    except checkpoint.CheckpointError as error:
        note("disk", error)
    checkpoint.save_file = real
    return said


def _full_disk(*args: object, **kwargs: object) -> None:
    raise OSError(28, "No space left on device")


def main(folder: Path, port: str) -> None:
    """Everything of one rank."""
    ranks = Ranks.start()
    assert ranks is not None
    r, found = ranks.rank, dict[str, Any]()

    # layouts differ from rank to rank, dtypes mix
    x = torch.arange(24.0).view(1, 2, 3, 4) * (r + 1)
    x = x.contiguous(memory_format=torch.channels_last) if r else x
    several = [x, torch.full((3,), r, dtype=torch.float64), torch.tensor(float(r)), -x.clone()]
    found["gather"] = ranks.gather(x)
    ranks.average(several)
    found["average"] = several
    several = [torch.full((2,), float(r)), torch.tensor(5 + r)]
    ranks.broadcast(several)
    found["broadcast"] = several
    found["any"] = [ranks.any(r == 1), ranks.any(False), ranks.highest(7 * r)]

    net = norms()
    sync_batch_norm(net, ranks)
    found["keys"] = list(net.state_dict())
    values = through_norms(net, images()[2 * r : 2 * r + 2])
    ranks.average([v for k, v in values.items() if k not in ("x", "y")])
    found["norms"], found["buffers"] = values, {k: v.clone() for k, v in net.named_buffers()}
    found["uneven"] = net(images()[3 * r : 3 + r]).detach()
    found["eval"] = net.eval()(images()).detach()
    found["weights"] = net.state_dict()

    for name, words in SYSTEMS.items():
        found[name] = exact_steps(words, folder, f"{name} exact", ranks)
        run(words, folder, name, ranks, "--batch-size", "2", "--steps", "3", "--save-every", "3")

    # a signal that reaches one process alone stops both at the same step
    trainer = Trainer(make_recipe(command(RESUMED, folder, "one", "--steps", "9")), ranks)
    trainer.stopped_by = signal.SIGTERM if r else 0
    try:
        trainer.train()
    except Interrupted as stop:
        found["stopped"] = stop.code, trainer.done
    ranks.agreed = False
    steps = str(checkpoint.header(_newest(folder / "killed") / "state.safetensors")["step"] + 3)
    for name in ("killed", "one", "whole"):
        # an evaluation by the first one alone must leave no trace
        watched = [] if name == "whole" else ["--evaluate-every", "1", "--keep-best", "l1"]
        run(RESUMED, folder, name, ranks, "--steps", steps, *watched)
    found["failing"] = _failing(ranks, folder)
    torch.save(found, folder / f"rank_{r}.pt")
    ranks.close()
    # anew, on a port of its own: the command with a mistake that only the first process can see
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": port}
    train.main(command(RESUMED, folder / "nowhere", "wrong"))


def _newest(run: Path) -> Path:
    return checkpoint.checkpoints(run / "checkpoints")[-1]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
