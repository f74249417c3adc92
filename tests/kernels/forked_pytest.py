"""Runs pytest again and again without importing torch again: python forked_pytest.py

Reads lines [arguments of pytest, file for its output] as JSON, answers each with the exit code. Every run is
a fork of this process, which holds nothing of the package under test.
"""

import json
import os
import sys
import traceback

import numpy  # noqa: F401
import pytest
import torch.library
import torch.testing._internal.optests
import triton
import triton.runtime.interpreter  # noqa: F401


def child(arguments: list[str], output: str) -> None:
    """The fork: its output goes to a file, and it never returns."""
    code = 70
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        code = int(pytest.main(arguments))
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    assert triton.__version__ and torch.get_num_threads() == 1, "a fork has no threads but its own"
    for line in sys.stdin:
        given = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(*given)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
