"""Runs the tests of the ops once more in Triton's interpreter, where the kernels work on CPU tensors.

In a process of its own, since the interpreter must be chosen before Triton is imported.
"""

import os
import re
import subprocess
import sys
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


@pytest.mark.parametrize("name", [*OPS, *PARTS])
def test_kernels_in_the_interpreter(name):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / f"test_{name}.py")]
    run = subprocess.run(
        command,
        cwd=TESTS.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    # a skipped test is a kernel that did not run
    assert re.search(r"^\d+ passed in", run.stdout, re.MULTILINE), run.stdout[-2000:]
