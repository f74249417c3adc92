"""A step as something that is recorded once and replayed, without a GPU.

`Tape` records what a CUDA graph would: operations on tensors at fixed addresses, and nothing that Python
decides. A replayed step must therefore find everything that changes in tensors. Another test runs the step of
a GPU on tensors without memory, under a watch that refuses what a capture refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fastgan_kernels._op
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastgan.step
from fastgan.graph import run
from fastgan.recipes import RECIPES
from fastgan.recipes.base import Batch
from fastgan.step import WARM_UP, Step

TINY: dict[str, Any] = {"ngf": 4, "ndf": 4, "patch": 16, "lr": 2**-7, "init_gain": 0.2}
NOISE: dict[str, Any] = {"patch": 70, "load_size": 16, "crop_size": 16, "noise_size": 5}
FEATURES: dict[str, Any] = {"patch": 70, "levels": 2, "load_size": 32, "crop_size": 32}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "cyclegan": ("cyclegan", {"blocks": 1, "pool_size": 3, "ema": 0.9}),
    "cyclegan batch norm": ("cyclegan", {"blocks": 1, "pool_size": 5, "norm": "batch"}),
    "cyclegan two updates of D": ("cyclegan", {"blocks": 1, "pool_size": 3, "n_critic": 2, "accumulate": 2}),
    "pix2pix": ("pix2pix", {"levels": 4, "dropout": False}),
    "pix2pix pool": ("pix2pix", {"levels": 4, "dropout": False, "pool_size": 4, "gan_mode": "wgan"}),
    "dcgan": ("dcgan", {**NOISE, "ema": 0.9, "n_gen": 2, "minibatch_std": True}),
    "cgan spectral norm": ("cgan", {**NOISE, "architecture": "dcgan", "spectral_norm": True}),
    "wgan": ("wgan", {**NOISE, "n_critic": 2, "optimizer": "adam"}),
    # the rate changes within the recording
    "discogan": ("discogan", {**FEATURES, "lambda_features": 1.0, "curriculum": WARM_UP + 2}),
    "pan": ("pan", {**FEATURES, "lambda_L1": 1.0}),
}


class Tape(TorchDispatchMode):
    """Records operations; a replay runs them again on the same tensors, knowing nothing else.

    What the recording itself changed in place is put back, as a CUDA graph computes nothing when captured.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.made: set[int] = set()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        writes = [
            argument.name
            for argument in func._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if func is torch.ops.aten.native_batch_norm.default:
            writes = ["running_mean", "running_var"]  # its schema does not say so
        if writes:
            named = dict(zip([argument.name for argument in func._schema.arguments], args)) | kwargs
            for name in writes:
                for x in named[name] if isinstance(named[name], list | tuple) else [named[name]]:
                    if isinstance(x, Tensor) and id(x) not in self.made:
                        self.before.setdefault(id(x), (x, x.clone()))
        out = func(*args, **kwargs)
        # the tensors are kept, so that no two have one id
        self.calls.append((func, args, kwargs, out))
        self.made |= {id(x) for x in tree_leaves(out) if isinstance(x, Tensor)}
        return out

    def put_back(self) -> None:
        for x, old in self.before.values():
            x.copy_(old)

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            fresh = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(fresh), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapeRecorder:
    """`fastgan.graph.Recorder` on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.tapes: list[Tape] = []

    def warm_up(self, work: Callable[[], None]) -> None:
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        tape = Tape()
        with tape:
            work()
        self.tapes.append(tape)
        with torch.no_grad():
            tape.put_back()
        return torch.no_grad()(tape.replay)


def make(case: str, monkeypatch: pytest.MonkeyPatch, recorder: type | None = None) -> Step:
    """A small step; with a recorder it is recorded after the warm-up, as on a GPU."""
    name, settings = CASES[case]
    recipe = RECIPES[name](RECIPES[name].config_class(**{**TINY, **settings}))
    torch.manual_seed(0)
    step = Step(recipe, recipe.networks(3, 3), device=torch.device("cpu"))
    if recorder is not None:
        step._recorder = recorder(step.device)
        step.optimizers = {group: step._optimizer(group) for group in step.members}
    return step


def batches(step: Step, index: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(index)
    found: list[Batch] = []
    side = min(32, step.config.crop_size)
    for _ in range(step.config.batches):
        images = {
            key: torch.rand(2, 3, side, side, generator=generator) * 2 - 1 for key in step.recipe.domains
        }
        found.append(images | ({"label": torch.eye(3)[:2]} if step.recipe.labelled else {}))
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_recorded_step_is_an_eager_step(case, monkeypatch):
    """Learning rate, pool draws, images and Adam's step count change from step to step; parameters, averages,
    buffers, pool and losses stay equal, bit for bit."""
    eager, recorded = make(case, monkeypatch), make(case, monkeypatch, TapeRecorder)
    for index in range(WARM_UP + 5):
        watch = index % 2 == 0
        # powers of two: a rate in a tensor is a float32, another one a Python float
        factor = 2.0 ** -(index % 4)
        expected = eager(batches(eager, index), index, factor, watch=watch or index < WARM_UP)
        found = recorded(batches(recorded, index), index, factor, watch=watch)
        assert recorded.note == ""
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert torch.equal(found[name], value), (index, name)
        for nets, twins in ((eager.nets, recorded.nets), (eager.ema, recorded.ema)):
            for name, net in nets.items():
                twin = twins[name].state_dict()
                for key, value in net.state_dict().items():
                    assert torch.equal(value, twin[key]), (index, name, key)
        state, twin = eager.state(), recorded.state()
        assert list(state) == list(twin)
        for key, value in state.items():
            assert torch.equal(value, twin[key]), (index, key)
    assert set(recorded._recordings) == {True, False}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_a_captured_step_is_an_eager_step_on_a_gpu(case):
    """Parameter by parameter, after the rate, the pool's draws and Adam's step number have changed."""
    name, settings = CASES[case]
    steps = []
    for capture in (False, True):
        recipe = RECIPES[name](RECIPES[name].config_class(**{**TINY, **settings}))
        torch.manual_seed(0)
        device = torch.device("cuda", 0)
        nets = recipe.networks(3, 3)
        steps.append(Step(recipe, nets, device=device, autocast=torch.bfloat16, capture=capture))
    for index in range(WARM_UP + 4):
        for step in steps:
            torch.manual_seed(index)
            given = [{k: v.cuda() for k, v in batch.items()} for batch in batches(step, index)]
            step(given, index, 2.0 ** -(index % 3), watch=index % 2 == 0)
    eager, captured = steps
    assert captured.note == "" and set(captured._recordings) == {True, False}
    for key, net in eager.nets.items():
        for (name, p), q in zip(net.named_parameters(), captured.nets[key].parameters()):
            # cuDNN may choose another algorithm for the eager step: a tenth of one update
            assert_close(q, p, rtol=0, atol=TINY["lr"] / 10, msg=lambda m, at=(key, name): f"{at}: {m}")


class Unrecordable(TorchDispatchMode):
    """Refuses what a capture refuses: reading a value, sizes that depend on values, numbers from the host."""

    REFUSED = (
        "_local_scalar_dense",
        "lift_fresh",
        "nonzero",
        "masked_select",
        "unique",
        "equal",
        "pin_memory",
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in self.REFUSED:
            raise AssertionError(f"{name} inside of a step: a CUDA graph cannot hold it")
        return func(*args, **(kwargs or {}))


def hollow(nets: dict[str, nn.Module]) -> None:
    """Parameters and buffers without memory, in the layout of a placed network."""
    for module in (m for net in nets.values() for m in net.modules()):
        for group in (module._parameters, module._buffers):
            for key, p in group.items():
                if p is not None:
                    layout = torch.channels_last if p.dim() == 4 else torch.contiguous_format
                    q = torch.empty(p.shape, dtype=p.dtype, memory_format=layout)
                    group[key] = nn.Parameter(q, p.requires_grad) if isinstance(p, nn.Parameter) else q


def run_hollow(step_class: type[Step], name: str, settings: dict[str, Any], monkeypatch: Any) -> list[str]:
    """The body of a step as a GPU runs it, on tensors without memory; the ops it calls."""
    monkeypatch.setattr(fastgan_kernels._op, "INTERPRET", True)  # the ops themselves, not their CPU rule
    monkeypatch.setattr(fastgan.step, "place", lambda net, device: net)
    recipe = RECIPES[name](RECIPES[name].config_class(**settings))
    nets = recipe.networks(3, 3)
    ops: list[str] = []

    class Watch(Unrecordable):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ops.append(func._schema.name)
            return super().__torch_dispatch__(func, types, args, kwargs)

    with FakeTensorMode():
        hollow(nets)
        step = step_class(recipe, nets, device=torch.device("cpu"), autocast=torch.bfloat16)
        hollow(step.ema)
        step._recorder = TapeRecorder(step.device)
        step.optimizers = {group: step._optimizer(group) for group in step.members}
        shape = (step.config.batch_size, 3, 64, 64)
        given = [
            {key: torch.empty(shape, memory_format=torch.channels_last) for key in "AB"}
            for _ in range(step.config.batches)
        ]
        plan = torch.empty(step.config.n_critic, len(step.pools), 2, len(given[0]["A"]), dtype=torch.int64)
        drawn = {"plan": plan}
        for key, numbers in recipe.noise.items():
            drawn[key] = torch.empty(len(given), len(given[0]["A"]), numbers)
        # the first step makes the optimisers' and the pools' memory
        run(step._body(given, drawn, True))
        with Watch():
            report = run(step._body(given, drawn, True))
    assert report.values.shape == (len(report.names),)
    return ops


FAST: dict[str, tuple[str, dict[str, Any]]] = {
    "cyclegan": ("cyclegan", {"blocks": 2, "ema": 0.9}),
    "cyclegan batch norm": ("cyclegan", {"blocks": 1, "norm": "batch", "pool_size": 0, "dropout": True}),
    "pix2pix": ("pix2pix", {"levels": 6}),
    "pix2pix pool": ("pix2pix", {"levels": 6, "norm": "instance", "pool_size": 7, "batch_size": 2}),
    "wgan": ("cyclegan", {"blocks": 1, "gan_mode": "wgan", "n_critic": 2, "optimizer": "adam"}),
    "dcgan": ("dcgan", {"ngf": 4, "batch_size": 2, "n_gen": 2, "ema": 0.9}),
    "penalty of noise": ("wgan-gp", {"ngf": 4, "batch_size": 2, "n_critic": 2}),
    "discogan": ("discogan", {"ngf": 4, "batch_size": 2, "bottleneck": 8, "lambda_features": 1.0}),
    "pan": ("pan", {"ngf": 4, "ndf": 8, "levels": 4, "crop_size": 64, "batch_size": 2}),
    "penalty": ("pix2pix", {"levels": 6, "gan_mode": "wgan-gp", "norm": "instance"}),
}


@pytest.mark.parametrize("case", FAST)
def test_nothing_in_a_step_waits_for_the_device(case, monkeypatch):
    ops = run_hollow(Step, *FAST[case], monkeypatch)
    assert any(name.startswith("fastgan::") for name in ops), "the fused ops run"


def _reads(loss: Tensor) -> Tensor:
    return loss if loss.item() > 0 else -loss


def _copies(loss: Tensor) -> Tensor:
    return loss * torch.tensor(2.0)


def _selects(loss: Tensor) -> Tensor:
    return loss.view(1)[loss.view(1) > 0].sum()


@pytest.mark.parametrize("fault", [_reads, _copies, _selects])
def test_the_watch_finds_what_a_capture_would_refuse(fault, monkeypatch):
    class Faulty(Step):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            loss = self._generator_loss
            calls = iter(range(10))

            def wrong(*given: Any) -> Any:
                value, terms = loss(*given)
                return (value if next(calls) == 0 else fault(value)), terms

            self._generator_loss = wrong

    refused = (AssertionError, DataDependentOutputException, DynamicOutputShapeException)
    with pytest.raises(refused):
        run_hollow(Faulty, "pix2pix", {"levels": 6}, monkeypatch)


def test_a_rate_that_python_holds_would_be_found(monkeypatch):
    """The guard of the first test: an optimiser with its rate as a number does not follow the schedule."""
    eager, recorded = make("pix2pix", monkeypatch), make("pix2pix", monkeypatch, TapeRecorder)
    for optimizer in recorded.optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = float(group["lr"])
    for index in range(WARM_UP + 2):
        for step in (eager, recorded):
            step(batches(step, index), index, 2.0**-index)
    pairs = zip(eager.nets["G"].parameters(), recorded.nets["G"].parameters())
    assert not all(torch.equal(p, q) for p, q in pairs)


def test_a_step_that_cannot_be_recorded_goes_on_eagerly(monkeypatch):
    class Refusing(TapeRecorder):
        def record(self, work: Callable[[], None]) -> Callable[[], None]:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    eager, step = make("cyclegan", monkeypatch), make("cyclegan", monkeypatch, Refusing)
    for index in range(WARM_UP + 2):
        for each in (eager, step):
            each(batches(each, index), index)
    assert step.note == "no CUDA graph: operation not permitted when stream is capturing"
    for name, net in eager.nets.items():
        for p, q in zip(net.parameters(), step.nets[name].parameters()):
            assert torch.equal(p, q)
