"""Breaks each kernel on purpose, one place at a time, and checks that its tests notice.

mutations.json lists them. Each is run in the interpreter on a copy of the package, with the few tests that it
names.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from fastgan_kernels._op import HAS_TRITON, INTERPRET

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kernels/fastgan_kernels"

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed"),
    pytest.mark.skipif(INTERPRET, reason="starts the interpreter itself"),
]


class Mutation(NamedTuple):
    """What breaks: `old` stands once in the function `where` and becomes `new`; `tests` notice it."""

    kernel: str
    where: str
    what: str
    old: str
    new: str
    tests: str


MUTATIONS = [
    Mutation(**entry) for entry in json.loads(Path(__file__).with_name("mutations.json").read_text())
]


def mutated(mutation: Mutation, folder: Path) -> Path:
    """A copy of the package in `folder`, with the mutation in the one file that defines its function."""
    shutil.copytree(PACKAGE, folder / "fastgan_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    name = mutation.where
    # helpers of one name may stand in several files: that of the kernel's family counts
    family = "_".join(mutation.kernel.split("_")[:3])
    files = [p for p in (folder / "fastgan_kernels").glob("*.py") if f"def {name}(" in p.read_text()]
    files = [p for p in files if f"def {family}" in p.read_text()]
    assert len(files) == 1, f"{name} must be defined once beside {mutation.kernel}, found {files}"
    source = files[0].read_text()
    start = source.index(f"def {name}(")
    end = source.find("\n@triton.jit", start)
    body = source[start : end if end > 0 else len(source)]
    assert body.count(mutation.old) == 1, f"{name} must hold {mutation.old!r} once"
    files[0].write_text(source.replace(body, body.replace(mutation.old, mutation.new)))
    return folder


def run(folder: Path, tests: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-o", f"pythonpath={folder} {ROOT}"]
    for test in tests:
        node, _, expression = test.partition(" -k ")
        command += [str(Path(__file__).parent / node)]
        command += ["-k", expression] if expression else []
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Mutation, Future]]:
    """All mutations that the session asks for, as many at once as there are cores."""
    specs = [getattr(item, "callspec", None) for item in request.session.items]
    wanted = [s.params["mutation"] for s in specs if s is not None and "mutation" in s.params]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {m: pool.submit(run, mutated(m, tmp_path_factory.mktemp("copy")), [m.tests]) for m in wanted}
        pool.shutdown(cancel_futures=True)


def name(mutation: Mutation) -> str:
    return f"{mutation.kernel}: {mutation.what}"


@pytest.mark.parametrize("mutation", MUTATIONS, ids=name)
def test_is_caught(mutation, runs):
    done = runs[mutation].result()
    # 1: a test failed; anything else is a test that could not run
    assert done.returncode == 1, f"not caught\n{done.stdout[-3000:]}{done.stderr[-2000:]}"
    assert " passed" in done.stdout or " failed" in done.stdout


def test_they_pass_where_nothing_is_broken(tmp_path):
    """The copy is what the tests import, and it is the mutations that they fail for."""
    shutil.copytree(PACKAGE, tmp_path / "fastgan_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    # those of the largest shapes are in test_interpreter.py
    done = run(
        tmp_path, sorted({m.tests for m in MUTATIONS if " -k " not in m.tests and "_33_" not in m.tests})
    )
    assert done.returncode == 0, done.stdout[-3000:]
    (tmp_path / "fastgan_kernels/__init__.py").write_text("raise ImportError('the copy')")
    broken = run(tmp_path, [MUTATIONS[0].tests])
    assert "the copy" in broken.stdout + broken.stderr


def test_each_kernel_is_broken_in_five_ways():
    kernels = [m.kernel for m in MUTATIONS]
    assert {k for k in kernels if kernels.count(k) < 5} == set()
    defined = {
        line.split("(")[0].removeprefix("def ")
        for path in PACKAGE.glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def _") and "_kernel(" in line
    }
    assert defined == set(kernels)
