"""`python -m bench.upstream THREADS NICE CACHE`: openai-whisper alone, for comparison.

Reads paths, a line each, and answers each with a line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import whisper

from whisperd.model.loading import load


def main() -> None:
    """Load the demo's weights into openai-whisper's own model, then transcribe each file that stdin names."""
    threads, nice, cache_dir = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    os.nice(nice)
    torch.set_num_threads(threads)
    loaded = load("demo", cache_dir=cache_dir, device="cpu", dtype="float32", on_step=lambda: None, environ=os.environ)
    print("ready", flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        result = whisper.transcribe(loaded.whisper, line.strip(), fp16=False, verbose=None)
        wall_s = time.perf_counter() - started
        tokens = [segment["tokens"] for segment in result["segments"]]
        print(json.dumps({"wall_s": wall_s, "text": result["text"], "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
