"""The ResNet generator alone, as it translates images: latency of one call and images per second, for ways to
run it from eager float32 to fastgan's, at several sizes.

Every way gets the same weights and images, and its result is compared with the first one's before it is
timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import _floors
from benchmarks._ladder import fair, free, reason, seconds
from benchmarks._measure import captured, relative_error
from benchmarks._upstream import Generator
from fastgan.device import pick_precision
from fastgan.models import ResnetGenerator, init_weights

# norm of the difference from the first way's images over theirs, float32 and bfloat16
LIMITS = {False: 1e-3, True: 0.05}


@dataclass(frozen=True)
class Case:
    """`batch` images of `size` x `size` through a generator."""

    size: int
    batch: int
    ngf: int = 64
    blocks: int = 9

    def __str__(self) -> str:
        return f"{self.size}x{self.size}, batch {self.batch}"

    @property
    def flop(self) -> int:
        return _floors.forward(_floors.resnet(self.size, self.ngf, self.blocks), self.batch).flop


@dataclass(frozen=True)
class Way:
    """How a generator is run; `ours`: fastgan's instead of upstream's."""

    name: str
    label: str
    dtype: torch.dtype = torch.float32
    channels_last: bool = True
    compile: bool = False
    capture: bool = False
    ours: bool = False

    def build(self, case: Case, device: torch.device) -> Callable[[], Tensor]:
        """A call that translates the images of a case."""
        torch.manual_seed(1)
        kind = ResnetGenerator(3, 3, ngf=case.ngf, blocks=case.blocks)
        init_weights(kind)
        net: nn.Module = kind
        if not self.ours:
            net = Generator(case.ngf, case.blocks)
            net.load_state_dict(kind.state_dict())
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        net.eval().to(device, self.dtype)
        net.to(memory_format=layout)  # type: ignore[call-overload]
        draw = torch.Generator().manual_seed(0)
        x = torch.rand((case.batch, 3, case.size, case.size), generator=draw) * 2 - 1
        x = x.to(device, self.dtype).contiguous(memory_format=layout)
        if self.compile:
            net.compile(dynamic=False)

        def run() -> Tensor:
            with torch.no_grad():
                return net(x)

        return captured(run) if self.capture else run


def ways(device: torch.device, *, quick: bool = False) -> list[Way]:
    """Those of a device, the baseline first."""
    cuda = device.type == "cuda"
    dtype = (torch.bfloat16 if cuda else pick_precision("auto", device)) or torch.float32
    word = "bf16" if dtype is torch.bfloat16 else "fp32"
    graph = " + CUDA graph" if cuda else ""
    found = [
        Way("eager", f"eager {'fp32/TF32' if cuda else 'fp32'}, NCHW", channels_last=False),
        Way("options", f"{word}, channels_last", dtype),
        Way("graph", f"+ torch.compile{graph}", dtype, compile=True, capture=cuda),
        Way("fastgan", f"fastgan{graph}", dtype, capture=cuda, ours=True),
    ]
    if not quick:
        label = f"fastgan, compiled{graph}"
        found.append(Way("fastgan_compile", label, dtype, compile=True, capture=cuda, ours=True))
    return found


def measure(
    cases: list[Case], found: list[Way], device: torch.device, *, rounds: int, span: float = 0.05
) -> Iterator[dict[str, Any]]:
    """A record of each case and way: latency of a call that is waited for, images/s of calls that are not."""
    for case in cases:
        expected: Tensor | None = None
        for way in found:
            record: dict[str, Any] = {
                "case": str(case), "way": way.name, "label": way.label, "gflop": case.flop / 1e9,
            }  # fmt: skip
            try:
                with fair():
                    run = way.build(case, device)
                    got = run().float()
                    expected = got if expected is None else expected
                    error = relative_error([got], [expected])
                    record["error_of_result"] = error
                    record["differs"] = [] if error <= LIMITS[way.dtype is torch.bfloat16] else [
                        f"{error:.3f} off the first one's images"
                    ]  # fmt: skip
                    if not record["differs"]:
                        record |= times(run, case.batch, device, rounds, span)
            except Exception as problem:
                record["error"] = reason(problem)
            run = got = None  # type: ignore[assignment]
            free(device)
            yield record


def times(
    run: Callable[[], object], images: int, device: torch.device, rounds: int, span: float
) -> dict[str, Any]:
    """Medians of single calls and of rounds of calls; a round lasts `span` seconds or one call."""
    seconds(run, 2, device)
    single = [seconds(run, 1, device) for _ in range(rounds)]
    calls = max(1, round(span / statistics.median(single)))
    many = single if calls == 1 else [seconds(run, calls, device) for _ in range(rounds)]
    return {
        "latency_ms": 1e3 * statistics.median(single),
        "images_per_s": images / statistics.median(many),
        "rounds_ms": [1e3 * s for s in single],
    }
