from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from fastgan_kernels._op import INTERPRET

# in the interpreter the kernels themselves run on the CPU: test_interpreter.py starts these tests there
DEVICES = ["cuda", "cpu"] if torch.cuda.is_available() and not INTERPRET else ["cpu"]

if INTERPRET:
    from triton.runtime.interpreter import interpreter_builder

    # two fifths of the interpreter's time: whether a sum or product of int32 overflows, which it then tells
    # nobody, as its option `debug` is off
    options = interpreter_builder.options
    if hasattr(options, "sanitize_overflow"):  # of Triton's own, so it may go
        interpreter_builder.options = replace(options, sanitize_overflow=False)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def seeded_and_poisoned() -> Iterator[None]:
    torch.manual_seed(0)
    # torch.empty is filled with NaN, so that an output nobody wrote shows
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
