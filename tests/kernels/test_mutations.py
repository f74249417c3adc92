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
from queue import Queue
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


class Done(NamedTuple):
    returncode: int
    output: str


class Runner:
    """A process that runs pytest in forks of itself; see forked_pytest.py."""

    def __init__(self) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forked_pytest.py"))],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, folder: Path, tests: list[str]) -> Done:
        """pytest on the copy of the package in `folder`."""
        arguments = ["-q", "-x", "-p", "no:cacheprovider", "-o", f"pythonpath={folder} {ROOT}"]
        for test in tests:
            node, _, expression = test.partition(" -k ")
            arguments += [str(Path(__file__).parent / node)]
            arguments += ["-k", expression] if expression else []
        assert self.process.stdin is not None and self.process.stdout is not None
        output = folder / "output"
        self.process.stdin.write(json.dumps([arguments, str(output)]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the process that runs the tests has ended"
        return Done(int(answer), output.read_text())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def runners() -> Iterator[Queue[Runner]]:
    """As many as there are cores; take one, use it, put it back."""
    free: Queue[Runner] = Queue()
    every = [Runner() for _ in range(os.cpu_count() or 1)]
    for runner in every:
        free.put(runner)
    yield free
    for runner in every:
        runner.close()


def run(runners: Queue[Runner], folder: Path, tests: list[str]) -> Done:
    runner = runners.get()
    try:
        return runner.run(folder, tests)
    finally:
        runners.put(runner)


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, runners: Queue[Runner]
) -> Iterator[dict[Mutation, Future]]:
    """All mutations that the session asks for, as many at once as there are cores."""
    specs = [getattr(item, "callspec", None) for item in request.session.items]
    wanted = [s.params["mutation"] for s in specs if s is not None and "mutation" in s.params]

    tmp_path_factory.getbasetemp()  # made here: two threads would both make it

    def copied(mutation: Mutation) -> Done:
        return run(runners, mutated(mutation, tmp_path_factory.mktemp("copy")), [mutation.tests])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {mutation: pool.submit(copied, mutation) for mutation in wanted}
        pool.shutdown(cancel_futures=True)


def name(mutation: Mutation) -> str:
    return f"{mutation.kernel}: {mutation.what}"


@pytest.mark.parametrize("mutation", MUTATIONS, ids=name)
def test_is_caught(mutation, runs):
    done = runs[mutation].result()
    # 1: a test failed; anything else is a test that could not run
    assert done.returncode == 1, f"not caught\n{done.output[-5000:]}"
    assert " passed" in done.output or " failed" in done.output


def test_they_pass_where_nothing_is_broken(tmp_path, runners):
    """The copy is what the tests import, and it is the mutations that they fail for."""
    shutil.copytree(PACKAGE, tmp_path / "fastgan_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    # those of the largest shapes are in test_interpreter.py
    done = run(
        runners,
        tmp_path,
        sorted({m.tests for m in MUTATIONS if " -k " not in m.tests and "_33_" not in m.tests}),
    )
    assert done.returncode == 0, done.output[-3000:]
    (tmp_path / "fastgan_kernels/__init__.py").write_text("raise ImportError('the copy')")
    broken = run(runners, tmp_path, [MUTATIONS[0].tests])
    assert broken.returncode != 0 and "the copy" in broken.output


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
