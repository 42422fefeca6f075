"""What the host does in a step of the decoder: operations that it dispatches, and numbers that it waits for."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from whisper.decoding import DecodingOptions, DecodingTask
from whisper.tokenizer import get_tokenizer

from bench.report import Bench, Row
from whisperd.model.batch.rows import LiveRows
from whisperd.model.batch.search import search_of
from whisperd.model.engine import Engine
from whisperd.model.loading import load

_ROWS = (4, 16)
# On a GPU a step is launched, then recorded; from the third on it is replayed.
_BEFORE = 4


def measure(bench: Bench) -> Iterator[Row]:
    """Yield how many operations a step of few windows has, one of many, and how many of them fetch a number."""
    model = load("demo", cache_dir=bench.folder, device="cpu", dtype="auto", on_step=lambda: None, environ=os.environ)
    engine = Engine(model, on_step=lambda: None)
    engine.settle()
    yield from count(engine, "tiny.en")


def count(engine: Engine, name: str) -> Iterator[Row]:
    """Yield these rows of an engine; `name` is its model's."""
    few, many = (_operations(engine, rows) for rows in _ROWS)
    waits = max(counted["_local_scalar_dense.default"] for counted in (few, many))
    yield Row(
        what=f"operations of a step with {_ROWS[0]} and with {_ROWS[1]} greedy windows, {name}",
        goal="as many",
        measured=f"{few.total()} and {many.total()}",
        met=few.total() == many.total(),
        runs="1",
    )
    yield Row(
        what=f"numbers that the host fetches in one, {name}", goal="0", measured=str(waits), met=waits == 0, runs="1"
    )


@torch.inference_mode()
def _operations(engine: Engine, windows: int) -> Counter[str]:
    live = begin_windows(engine, windows)
    for _ in range(_BEFORE):
        live.step()
    operations = Counter[str]()

    class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            operations[func.__name__] += 1
            return func(*args, **(kwargs or {}))

    with Counted():  # type: ignore[no-untyped-call]
        live.step()
    return operations


def begin_windows(engine: Engine, windows: int) -> LiveRows[int]:
    """Return live windows that have no end, all of the same features. Wants `torch.inference_mode`."""
    whisper, dims = engine.model.whisper, engine.model.whisper.dims
    end = get_tokenizer(whisper.is_multilingual).eot
    options = DecodingOptions(language="en", fp16=False, suppress_tokens=[end], sample_len=60)
    live: LiveRows[int] = LiveRows(engine.decoder, engine.kernels, windows=windows, rows=windows)
    features = torch.zeros(dims.n_audio_ctx, dims.n_audio_state, device=engine.model.device, dtype=engine.model.dtype)
    for owner in range(windows):
        task = DecodingTask(whisper, options)
        live.begin(owner, task, search_of(task, 0), features)
    return live
