"""`python -m bench.ours THREADS SPOOL MODEL DTYPE`: our engine alone in a process, as the model helper has it.

Reads a line of JSON a request (`files` of the spool, `options` as a client gives them) and answers with what
`bench.runs.Heard` holds. All recordings of a request are transcribed at once, a thread each.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from whisperd.model.main import SWITCH_INTERVAL_S, prepare_environment

if TYPE_CHECKING:
    from bench.runs import Runs


def load_as_helper(setting: str, spool: Path, *, threads: int, dtype: str = "auto") -> Runs:
    """Return our engine, in a process that is set up as the model helper is. Nothing may have imported torch before."""
    assert "torch" not in sys.modules, "its libraries read the environment when they are imported"
    prepare_environment(os.environ, cache_dir=spool, threads=threads)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    from bench.runs import load_runs

    return load_runs(setting, spool, threads=threads, dtype=dtype)


def main() -> None:
    """Load the model, then transcribe each request's files."""
    threads, spool, (setting, dtype) = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    runs = load_as_helper(setting, spool, threads=threads, dtype=dtype)
    from bench.runs import at_once

    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        names = [Path(file).parent.name for file in request["files"]]
        print(json.dumps(dataclasses.asdict(at_once(runs, names, request["options"]))), flush=True)


if __name__ == "__main__":
    main()
