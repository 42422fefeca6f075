"""Runs of the engine in this process, without a daemon: a loaded model, its workers, and a spool of recordings."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from whisperd.model import substitutes
from whisperd.model.engine import Engine
from whisperd.model.helper import speech_threads
from whisperd.model.loading import LoadedModel, load
from whisperd.model.memory import keep_freed_memory
from whisperd.model.run import Run
from whisperd.model.speech import SpeechDetector
from whisperd.model.threads import start_thread
from whisperd.model.worker import Worker
from whisperd.protocol.helper_messages import HelperMessage, Transcribe
from whisperd.protocol.options import parse_options


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What an engine made of some recordings: `said` has, of each, the tokens of its segments."""

    wall_s: float
    windows: int
    texts: list[str]
    said: list[list[list[int]]]

    @property
    def tokens(self) -> int:
        return sum(len(tokens) for segments in self.said for tokens in segments)


class Runs:
    """Makes runs of the recordings in one spool folder, all on one engine, which is made with `engine` besides."""

    def __init__(
        self,
        model: LoadedModel,
        spool: Path,
        *,
        on_step: Callable[[], None] = lambda: None,
        release: bool = False,
        fast_windows: int = 8,
        **engine: Any,
    ) -> None:
        keep_freed_memory()
        substitutes.install()  # else `transcribe` reads the whole file
        self.model = model
        self.spool = spool
        self.engine = Engine(model, on_step=on_step, release=release, **engine)
        self.engine.settle()
        self._fast_windows = fast_windows
        self._mel_worker, self._speech_worker = Worker("mel"), Worker("speech", threads=speech_threads())
        self._speech = SpeechDetector()

    def record(self, folder: str, pcm: np.ndarray | bytes) -> None:
        """Put 16 kHz s16le samples where a run of that folder finds them."""
        place = self.spool / folder
        place.mkdir(exist_ok=True)
        (place / "audio.pcm").write_bytes(pcm if isinstance(pcm, bytes) else pcm.astype("<i2").tobytes())

    def samples(self, folder: str) -> np.ndarray:
        """Return a recording as `whisper.load_audio` would: float32, -1 to 1."""
        return np.fromfile(self.spool / folder / "audio.pcm", "<i2").astype(np.float32) / 32768

    def run(
        self,
        folder: str,
        options: Mapping[str, Any],
        *,
        interactive: bool = False,
        journal: int = 0,
        told: int = 0,
        send: Callable[[HelperMessage], None] = lambda message: None,
    ) -> Run:
        """Return a run that has not begun; `options` as a client gives them."""
        order = Transcribe(
            run=1,
            generation=1,
            folder=folder,
            options=parse_options(dict(options)),
            interactive=interactive,
            truncated=False,
            journal=journal,
            told=told,
        )
        return Run(
            order,
            spool=self.spool,
            engine=self.engine,
            speech=self._speech,
            fast_windows=self._fast_windows,
            mel_worker=self._mel_worker,
            speech_worker=self._speech_worker,
            send=send,
            on_step=lambda: None,
        )


def load_runs(setting: str, spool: Path, *, threads: int, dtype: str = "auto") -> Runs:
    """Return an engine on the CPU, loaded as the model helper does: in a thread that ends, and its team with it."""
    made: list[Runs] = []

    def work() -> None:
        model = load(setting, cache_dir=spool, device="cpu", dtype=dtype, on_step=lambda: None, environ=os.environ)
        made.append(Runs(model, spool, release=True))

    start_thread(work, name="loader", cores=threads).join()
    return made[0]


def at_once(
    runs: Runs,
    names: Sequence[str],
    options: Mapping[str, Any],
    *,
    send: Callable[[str, HelperMessage], None] = lambda name, message: None,
) -> Heard:
    """Transcribe recordings beside each other, a thread each; `send` takes what they have to say on the way."""
    found: dict[str, dict[str, Any]] = {}

    def transcribe(name: str) -> None:
        found[name] = runs.run(name, options, send=partial(send, name)).transcribe().to_wire()

    windows, began = runs.engine.counters.windows, time.perf_counter()
    for thread in [start_thread(partial(transcribe, name), name=name) for name in names]:
        thread.join()
    return Heard(
        wall_s=time.perf_counter() - began,
        windows=runs.engine.counters.windows - windows,
        texts=[found[name]["text"] for name in names],
        said=[[segment["tokens"] for segment in found[name]["segments"]] for name in names],
    )
