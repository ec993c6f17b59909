"""A program with data workers ends when it ends, though they ignore what would end them."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys, torch
from lilt.data.workers import make_loader
loader = make_loader(torch.utils.data.TensorDataset(torch.arange(8.0)), 2, batch_size=2)
steps = iter(loader)  # held until the interpreter goes
assert next(steps)[0].tolist() == [0.0, 1.0]
print("read", flush=True)
if sys.argv[1] == "raise":
    raise ValueError("in the middle")
"""


@pytest.mark.parametrize("end", ["return", "raise"])
def test_workers_that_are_still_needed_do_not_hold_a_program_that_ends(end: str) -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM, end], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "read\n"
        try:
            status = program.wait(timeout=60)
        finally:
            program.kill()
    assert status == (0 if end == "return" else 1)
