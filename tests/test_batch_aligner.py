"""The aligner: its compiler works beside the first jobs, outlives no process, and works once for all of them."""

from __future__ import annotations

import os
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

def slow():
    # Stands for the compiler: C++ that a process which ends aborts in. It goes on only once the process is ending.
    while not go.exists():
        time.sleep(0.01)
    done.touch()

upstream.compile_alignment = slow
upstream.Aligner(SimpleNamespace(alignment_heads=torch.ones(1, 1).to_sparse()))
assert not done.exists(), "making it waits for the compiler"
go.touch()
"""


def test_making_it_waits_for_no_compiler_and_the_end_of_the_process_does(tmp_path: Path) -> None:
    done = tmp_path / "done"
    command = [sys.executable, "-c", _ENDS_AT_ONCE, str(tmp_path / "go"), str(done)]
    subprocess.run(command, check=True, timeout=120)
    assert done.exists()


_COMPILES = """
import sys

import torch
from whisper.timing import dtw, dtw_cpu

from whisperd.model.batch.upstream import compile_alignment

compile_alignment()
assert dtw(torch.eye(3)).shape[0] == 2
print(sum(dtw_cpu.stats.cache_hits.values()))
"""


def test_what_one_process_compiled_the_next_one_reads(tmp_path: Path) -> None:
    def hits() -> int:
        environ = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "numba"), "NUMBA_DISABLE_JIT": "0"}
        command = [sys.executable, "-c", _COMPILES]
        return int(subprocess.run(command, check=True, env=environ, capture_output=True, timeout=120).stdout)

    assert [hits(), hits()] == [0, 1]
    kept = [path for path in (tmp_path / "numba").rglob("*") if path.is_file()]
    for path in kept:
        path.write_bytes(b"")  # what a power cut may leave
    assert kept
    assert hits() == 0
