"""`PYTHON bench/peer.py MODEL THREADS COMPUTE_TYPE [DEVICE]`: faster-whisper alone, for comparison.

Run by an interpreter that has faster-whisper; nothing of this project is imported. Reads a line of JSON a request
(`files`, `batched`, `options`) and answers with what `bench.runs.Heard` holds.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
from faster_whisper import BatchedInferencePipeline, WhisperModel

_BATCH = 8


def main() -> None:
    """Load the model, then transcribe each request's files one after the other."""
    device = sys.argv[4] if len(sys.argv) > 4 else "cpu"
    model = WhisperModel(sys.argv[1], device=device, cpu_threads=int(sys.argv[2]), compute_type=sys.argv[3])
    batched = BatchedInferencePipeline(model)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        recordings = [np.fromfile(path, "<i2").astype(np.float32) / 32768 for path in request["files"]]
        options = {"beam_size": 1} | request["options"]  # 5 otherwise, which whisper's own is not
        started = time.perf_counter()
        if request["batched"]:
            heard = [list(batched.transcribe(pcm, batch_size=_BATCH, **options)[0]) for pcm in recordings]
        else:
            heard = [list(model.transcribe(pcm, **options)[0]) for pcm in recordings]
        print(json.dumps(_answer(time.perf_counter() - started, heard)), flush=True)


def _answer(wall_s: float, heard: list[list[Any]]) -> dict[str, Any]:
    return {
        "wall_s": wall_s,
        "windows": sum(len({segment.seek for segment in segments}) for segments in heard),
        "texts": ["".join(segment.text for segment in segments) for segments in heard],
        "said": [[list(segment.tokens) for segment in segments] for segments in heard],
    }


if __name__ == "__main__":
    main()
