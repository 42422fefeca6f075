"""The aligner: its compiler works beside the first jobs, and outlives no process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_ENDS_AT_ONCE = """
import sys, time
from pathlib import Path
from types import SimpleNamespace

import torch

from whisperd.model.batch import upstream

go, done = Path(sys.argv[1]), Path(sys.argv[2])

def slow(matrix):
    # Stands for the compiler: C++ that a process which ends aborts in. It goes on only once the process is ending.
    while not go.exists():
        time.sleep(0.01)
    done.touch()

upstream.dtw = slow
upstream.Aligner(SimpleNamespace(alignment_heads=torch.ones(1, 1).to_sparse()))
assert not done.exists(), "making it waits for the compiler"
go.touch()
"""


def test_making_it_waits_for_no_compiler_and_the_end_of_the_process_does(tmp_path: Path) -> None:
    done = tmp_path / "done"
    command = [sys.executable, "-c", _ENDS_AT_ONCE, str(tmp_path / "go"), str(done)]
    subprocess.run(command, check=True, timeout=120)
    assert done.exists()
