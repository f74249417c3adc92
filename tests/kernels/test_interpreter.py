"""Runs the tests of the ops once more in Triton's interpreter, where the kernels work on CPU tensors.

In a process of its own, since the interpreter must be chosen before Triton is imported.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from fastgan_kernels._op import HAS_TRITON, INTERPRET

TESTS = Path(__file__).parent
OPS = sorted(path.stem for path in (TESTS / "../../kernels/fastgan_kernels").glob("[!_]*.py"))
# tests of what the ops are made of: nothing of it runs on a CPU outside the interpreter
PARTS = ["gemm", "halo"]

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed"),
    pytest.mark.skipif(INTERPRET, reason="already in the interpreter"),
]


# the longest first
LONG = ["instance_norm_act", "conv_norm_act", "batch_norm_act", "gemm", "residual_block"]
NAMES = [*LONG, *sorted({*OPS, *PARTS} - {*LONG})]


def run(name: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / f"test_{name}.py")]
    return subprocess.run(
        command,
        cwd=TESTS.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, Future]]:
    """All that the session asks for, as many at once as there are cores."""
    specs = [getattr(item, "callspec", None) for item in request.session.items]
    wanted = [spec.params.get("name") for spec in specs if spec is not None]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {name: pool.submit(run, name) for name in NAMES if name in wanted}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", NAMES)
def test_kernels_in_the_interpreter(name, runs):
    done = runs[name].result()
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    # a skipped test is a kernel that did not run
    assert re.search(r"^\d+ passed in", done.stdout, re.MULTILINE), done.stdout[-2000:]
