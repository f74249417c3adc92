"""The ladder at tiny sizes: what it writes, that its rungs are compared and a wrong one is found, and the
counts that its floors are made of."""

import json
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import _floors, _ladder, _measure, _profile, _upstream, ladder
from benchmarks._generators import Case
from benchmarks._ladder import EXACT, ROUNDED, Rung, System, differences, first_losses
from benchmarks._measure import Ceilings

CPU = torch.device("cpu")
# the smallest that a 70x70 PatchGAN takes in whole levels
SYSTEMS = [System("cyclegan", 32, 1, 4), System("pix2pix", 32, 5, 4)]
by_recipe = pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: s.recipe)


def breaks(system: System, device: torch.device) -> Callable:
    raise RuntimeError("no C++ compiler\nand more lines")


class OneUpdateLess(_upstream.CycleGANStep):
    """The generators stay what they are."""

    def _update(self, optimizer: torch.optim.Optimizer, *losses: torch.Tensor) -> None:
        if optimizer is self.optimizer_d:
            super()._update(optimizer, *losses)


def plan(rungs: list[Rung], systems: list[System], cases: list[Case]) -> ladder.Plan:
    """What a CPU measures, without compilation and in short."""
    made = ladder.make_plan(CPU)
    ways = [way for way in made.ways if not way.compile]
    return replace(
        made, systems=systems, cases=cases, rungs=rungs, ways=ways, rounds=2, profiled_steps=1, span=0.0,
        memory=False,
    )  # fmt: skip


def eager_rungs() -> list[Rung]:
    return [rung for rung in _ladder.rungs(CPU) if "compile" not in rung.name]


def test_the_command_writes_table_json_and_chart(tmp_path, monkeypatch):
    monkeypatch.setitem(_measure.SIDE, "cpu", 64)
    monkeypatch.setitem(_measure.COPIED, "cpu", 64)
    # the real plan would take minutes
    small = plan(eager_rungs(), SYSTEMS, [Case(16, 2, 4, 1)])
    monkeypatch.setattr(ladder, "make_plan", lambda device, only, quick: small)
    assert ladder.main(["--quick", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("ladder_*.json")
    run = json.loads(path.read_text(encoding="utf-8"))
    assert run["command"].startswith("python benchmarks/ladder.py --quick")
    assert run["before"]["torch"] == torch.__version__ and not run["failed"]
    for system in run["systems"]:
        assert [record["rung"] for record in system["records"]] == ["eager", "options", "fastgan"]
        for record in system["records"]:
            assert len(record["rounds_ms"]) == len(record["baseline_rounds_ms"]) == 2
            assert len(record["losses"]) == 2 and record["differs"] == []
            assert record["share_of_floor"] > 0
    assert [record["way"] for record in run["inference"]] == ["eager", "options", "fastgan"]
    assert [profile["rung"] for profile in run["profiles"]] == ["fastgan"] * 2
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    for begin in (
        "| upstream's step, eager fp32",
        "| + ",
        "| fastgan |",
        "| 16x16, batch 2 |",
        "| optimiser |",
    ):
        assert any(line.startswith(begin) for line in text.splitlines()), begin
    with Image.open(path.with_suffix(".png")) as image:
        # bars of three colours, words and white
        assert image.width > 800 and len(image.convert("RGB").getcolors(2**24)) > 50


def test_a_rung_that_fails_or_computes_something_else_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "measure_ceilings", lambda watch, device, dtype: Ceilings(1e9, 1e10))
    system = SYSTEMS[0]

    def wrong(system: System, device: torch.device) -> Callable:
        step = system.upstream(device)
        step.__class__ = OneUpdateLess
        return step

    rungs = [*eager_rungs(), Rung("compile", "compiled", False, breaks), Rung("odd", "odd one", True, wrong)]
    assert ladder.measure(plan(rungs, [system], []), tmp_path, "") == 1
    (path,) = tmp_path.glob("*.json")
    run = json.loads(path.read_text(encoding="utf-8"))
    found = {record["rung"]: record for record in run["systems"][0]["records"]}
    assert found["compile"]["error"] == "RuntimeError: no C++ compiler" and "ms" not in found["compile"]
    assert found["odd"]["differs"] and "ms" not in found["odd"]
    assert found["fastgan"]["ms"] > 0, "the others go on"
    assert len(run["failed"]) == 2
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "| compiled | failed: RuntimeError: no C++ compiler |" in text
    assert "| odd one | computes something else: " in text
    assert path.with_suffix(".png").exists()


@pytest.mark.parametrize("left_out", ["update of G", "update of D", "identity loss", "weights", "image"])
def test_what_is_left_out_shows_through_the_widest_limits(left_out, monkeypatch):
    system = SYSTEMS[0]
    expected = first_losses(system.upstream(CPU))
    if left_out == "identity loss":
        monkeypatch.setattr(_upstream, "IDENTITY", 0.0)
    if left_out == "weights":
        monkeypatch.setattr(_ladder.torch, "manual_seed", lambda seed: None)
    step = system.upstream(CPU)
    if left_out == "image":
        step.b = step.a
    for key in ("G", "D"):
        if left_out == f"update of {key}":
            optimizer = getattr(step, f"optimizer_{key.lower()}")
            monkeypatch.setattr(optimizer, "step", lambda: None)
    assert differences(first_losses(step), expected, ROUNDED)


@by_recipe
def test_what_warms_up_a_graph_leaves_no_trace(system, monkeypatch):
    def captured(body):
        for _ in range(3):
            body()
        return body

    monkeypatch.setattr(_upstream, "captured", captured)
    monkeypatch.setattr(_upstream, "DROPOUT", 0.0)
    expected = first_losses(system.upstream(CPU))
    assert differences(first_losses(system.upstream(CPU, fused=True, capture=True)), expected, EXACT) == []


def test_the_drawn_history_answers_like_upstreams(monkeypatch):
    monkeypatch.setattr(_upstream, "HISTORY", 4)
    images = [torch.full((1, 1, 1, 1), float(k)) for k in range(40)]
    answers = []
    for history in (_upstream.History(), _upstream.DrawnHistory(images[0])):
        random.seed(3)
        found = []
        for image in images:
            history.draw()
            found.append(float(history(image)))
        answers.append(found)
    assert answers[0] == answers[1] and answers[0] != [float(image) for image in images]


@by_recipe
def test_flop_are_those_that_torch_counts(system):
    step = system.upstream(CPU)
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() == system.work.flop


def test_floors_of_the_systems_at_full_size():
    # at 790 TFLOP/s and 4.3 TB/s, as measured on an H200
    cyclegan = _floors.cyclegan_step(256, 64, 64, 9)
    pix2pix = _floors.pix2pix_step(256, 64, 64, 8)
    assert round(cyclegan.flop / 1e12, 2) == 1.88 and round(pix2pix.flop / 1e12, 3) == 0.087
    assert round(1e3 * cyclegan.seconds(790e12, 4.3e12)["step"], 2) == 2.38
    floors = {part: 1e3 * s for part, s in pix2pix.seconds(790e12, 4.3e12).items()}
    assert round(floors["step"], 2) == 0.54 and round(floors["optimiser"], 2) == 0.40
    assert round((cyclegan.conv_bytes + cyclegan.pass_bytes) / 1e9, 2) == 5.73


def test_the_footprint_holds_weights_and_optimiser():
    system = SYSTEMS[1]
    step = system.upstream(CPU)
    parameters = sum(p.numel() for net in step.nets.values() for p in net.parameters())
    # four bytes each of weight, gradient and two moments
    assert _ladder.cpu_footprint(system, "eager") > 16 * parameters / 2**20


def test_cudnn_searches_while_rungs_are_timed():
    with _ladder.fair():
        assert torch.backends.cudnn.enabled and torch.backends.cudnn.benchmark
        assert torch._dynamo.config.fail_on_recompile_limit_hit


def test_a_gpu_climbs_over_a_graph_at_full_size():
    made = ladder.make_plan(torch.device("cuda"))
    assert [rung.name for rung in made.rungs] == [
        "eager", "options", "compile", "graph", "fastgan", "fastgan_compile",
    ]  # fmt: skip
    assert made.systems == [System("cyclegan", 256, 9), System("pix2pix", 256, 8)]
    assert {(case.size, case.batch) for case in made.cases} == {
        (s, b) for s in (256, 512, 1024) for b in (1, 16)
    }
    assert ladder.make_plan(CPU, ["inference"]).systems == []


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("_conv_forward_kernel", "convolutions"),
        ("_halo_write_kernel", "passes"),
        ("sm90_xmma_wgrad_implicit_gemm", "convolutions"),
        ("multi_tensor_apply FusedAdamMathFunctor", "optimiser"),
        ("vectorized_elementwise_kernel", "other"),
    ],
)
def test_kernels_belong_to_a_group(kernel, group):
    assert _profile.group(kernel) == group
