"""`python -m bench.upstream THREADS NICE CACHE [MODEL]`: openai-whisper alone, for comparison.

Reads a line of JSON a request (`files`, `options` as a client gives them) and answers with what
`bench.runs.Heard` holds. Files named `.pcm` are 16 kHz s16le samples; others go through openai-whisper's own ffmpeg.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import whisper

from whisperd.model.loading import load
from whisperd.protocol.options import DEFAULTS, parse_options


def main() -> None:
    """Load the weights into openai-whisper's own model, then transcribe each request's files one after the other."""
    threads, nice, cache_dir = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    setting = sys.argv[4] if len(sys.argv) > 4 else "demo"
    os.nice(nice)
    torch.set_num_threads(threads)
    loaded = load(setting, cache_dir=cache_dir, device="cpu", dtype="float32", on_step=lambda: None, environ=os.environ)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        recordings = [_samples(path) if path.endswith(".pcm") else path for path in request["files"]]
        arguments = arguments_of(request["options"])
        started = time.perf_counter()
        results = [whisper.transcribe(loaded.whisper, each, **arguments) for each in recordings]
        wall_s = time.perf_counter() - started
        print(json.dumps({"wall_s": wall_s, **answer_of(results)}), flush=True)


def arguments_of(options: dict[str, Any]) -> dict[str, Any]:
    """Return openai-whisper's keyword arguments for options as a client gives them."""
    parsed = parse_options(options)
    chosen = {name: parsed[name] for name in DEFAULTS} | {"temperature": tuple(parsed["temperature"])}
    return chosen | {"fp16": False, "verbose": None}


def answer_of(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what an answer says of openai-whisper's results. Windows without text are not among them."""
    return {
        "windows": sum(len({segment["seek"] for segment in result["segments"]}) for result in results),
        "texts": [result["text"] for result in results],
        "said": [[list(map(int, segment["tokens"])) for segment in result["segments"]] for result in results],
    }


def _samples(path: str) -> np.ndarray:
    return np.fromfile(path, "<i2").astype(np.float32) / 32768


if __name__ == "__main__":
    main()
