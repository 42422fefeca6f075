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

from whisperd.model.main import SWITCH_INTERVAL_S, prepare_environment


def main() -> None:
    """Load the model, then transcribe each request's files."""
    threads, spool, (setting, dtype) = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    prepare_environment(os.environ, cache_dir=spool, threads=threads)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    from bench.runs import at_once, load_runs

    runs = load_runs(setting, spool, threads=threads, dtype=dtype)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        names = [Path(file).parent.name for file in request["files"]]
        print(json.dumps(dataclasses.asdict(at_once(runs, names, request["options"]))), flush=True)


if __name__ == "__main__":
    main()
