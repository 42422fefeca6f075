"""The model helper's life: load, report, start a thread for each run, answer each run once."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import whisperd
from whisperd.model import substitutes
from whisperd.model.batch.batcher import EXIT_BROKEN
from whisperd.model.engine import Engine
from whisperd.model.journal import VoidJournal, fingerprint
from whisperd.model.loading import LoadedModel, choose_device, load
from whisperd.model.memory import is_out_of_memory, keep_freed_memory, limit_cuda
from whisperd.model.run import Run
from whisperd.model.software import describe
from whisperd.model.speech import SpeechDetector
from whisperd.model.threads import start_thread
from whisperd.model.worker import Worker
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.frames import MAX_REPLY_BYTES, encode_body
from whisperd.protocol.helper_messages import (
    Cancel,
    Failed,
    Finished,
    HelperMessage,
    JournalVoid,
    ModelStatus,
    Prioritise,
    SampleTried,
    Transcribe,
    TrySample,
)
from whisperd.protocol.helpers import HelperLink
from whisperd.protocol.options import parse_options

log = logging.getLogger("whisperd.model")

_ASSETS = Path(whisperd.__file__).parent / "assets"
_CORES_A_SPEECH_THREAD = 4  # one core listens to less than a GPU transcribes
_MAX_TRANSCRIPT_BYTES = MAX_REPLY_BYTES - 64 * 1024  # the reply around it needs a little room


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The model role's settings, as `Configure` carries them."""

    spool: Path
    cache_dir: Path
    model: str
    device: str
    threads: int
    dtype: str
    open_runs: int
    fast_windows: int
    batch_windows: int
    device_memory_mb: int
    interactive_windows_in_a_row: int

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """Return the settings of a `Configure` message."""
        return cls(
            spool=Path(values["spool"]),
            cache_dir=Path(values["cache_dir"]),
            model=values["model"],
            device=values["device"],
            threads=values["threads"],
            dtype=values["dtype"],
            open_runs=values["open_runs"],
            fast_windows=values["fast_windows"],
            batch_windows=values["batch_windows"],
            device_memory_mb=values["device_memory_mb"],
            interactive_windows_in_a_row=values["interactive_windows_in_a_row"],
        )


class ModelHelper:
    """Loads the model and works for the daemon on `link` until it goes away. `serve` does not return."""

    def __init__(self, link: HelperLink, settings: Settings) -> None:
        self._link = link
        self._settings = settings
        self._engine: Engine | None = None
        self._speech: SpeechDetector | None = None
        self._error = ""
        self._software: dict[str, Any] = {}
        self._device = torch.device("cpu")  # until it is known which one
        in_a_row = settings.interactive_windows_in_a_row
        self._mel_worker = Worker("mel", interactive_in_a_row=in_a_row)
        self._speech_worker = Worker("speech", interactive_in_a_row=in_a_row, threads=speech_threads())
        self._lock = threading.Lock()
        self._runs: dict[tuple[int, int], Run] = {}
        self._done_s = 0.0  # audio of runs that have ended

    def serve(self) -> None:
        """Load, then take messages."""
        keep_freed_memory()
        substitutes.install()
        self._software = describe()
        self._link.gauges = self._gauges
        # In a thread that ends, and its team with it. 0: torch's own choice, all cores.
        start_thread(self._load, name="loader", cores=self._settings.threads or torch.get_num_threads()).join()
        while True:
            message, descriptors = self._link.next()
            for fd in descriptors:
                os.close(fd)
            match message:
                case Transcribe():
                    self._begin(message)
                case Cancel():
                    self._mark(message.run, message.generation, cancelled=True)
                case TrySample():
                    start_thread(self._try_sample, name="sample")
                case Prioritise():
                    self._mark(message.run, message.generation, interactive=message.interactive)
                case _:
                    log.warning("model: unexpected message=%s", type(message).__name__)

    def _load(self) -> None:
        settings = self._settings
        try:
            self._device = choose_device(settings.device)
            limit_cuda(self._device, settings.device_memory_mb)
            model = load(
                settings.model,
                cache_dir=settings.cache_dir,
                device=settings.device,
                dtype=settings.dtype,
                on_step=self._link.step,
                environ=os.environ,
            )
            identity = fingerprint(model)  # before the engine takes the weights apart
            self._engine = Engine(
                model,
                on_step=self._link.step,
                windows=settings.batch_windows,
                memory_limit_mb=settings.device_memory_mb,
                release=True,
                interactive_in_a_row=settings.interactive_windows_in_a_row,
            )
            self._speech = SpeechDetector()
        except Exception as error:
            self._error = self._loading_error(error)
            log.error("model: failed model=%s error=%s", settings.model, self._error)
            self._link.send(ModelStatus(state="failed", name=settings.model, error=self._error))
            return
        log.info("model: ready model=%s device=%s dtype=%s", model.name, model.device, model.dtype_name)
        self._link.send(ready(model, identity, capacity=settings.open_runs or self._engine.windows + 1))
        start_thread(self._engine.settle, name="settle")

    def _loading_error(self, error: Exception) -> str:
        if isinstance(error, WhisperdError):
            return error.message
        if is_out_of_memory(error):
            return (
                f"model {self._settings.model!r} does not fit into the memory of device {self._settings.device!r}; "
                "choose a smaller model or free some, then run `whisperctl model load`"
            )
        log.exception("model: loading failed")
        if is_device_failure(error, self._device):
            os._exit(EXIT_BROKEN)
        return f"model {self._settings.model!r} cannot be loaded: {type(error).__name__}: {error}"

    def _try_sample(self) -> None:
        order = Transcribe(
            run=0,
            generation=0,
            folder="sample",
            options=parse_options({"language": "en", "temperature": 0}),
            interactive=True,
            truncated=False,
            journal=0,
            told=0,
        )
        error = ""
        try:
            self._run(order, spool=_ASSETS, send=lambda message: None).transcribe()
        except Exception as reason:
            _, error = self._failure(order, reason)
        self._link.send(SampleTried(error=error))

    def _begin(self, order: Transcribe) -> None:
        if self._engine is None or self._speech is None:
            self._link.send(
                Failed(
                    run=order.run, generation=order.generation, code=ErrorCode.MODEL_UNAVAILABLE, message=self._error
                )
            )
            return
        run = self._run(order, spool=self._settings.spool, send=self._link.send)
        with self._lock:
            self._runs[order.run, order.generation] = run
        start_thread(lambda: self._work(run), name=f"run-{order.run}")

    def _run(self, order: Transcribe, *, spool: Path, send: Callable[[HelperMessage], None]) -> Run:
        assert self._engine is not None, "a model is loaded"
        assert self._speech is not None, "with it comes what listens"
        return Run(
            order,
            spool=spool,
            engine=self._engine,
            speech=self._speech,
            fast_windows=self._settings.fast_windows,
            mel_worker=self._mel_worker,
            speech_worker=self._speech_worker,
            send=send,
            on_step=self._link.step,
        )

    def _mark(
        self, number: int, generation: int, *, cancelled: bool | None = None, interactive: bool | None = None
    ) -> None:
        with self._lock:
            run = self._runs.get((number, generation))
        if run is None:  # it ended a moment ago
            return
        if interactive is not None:
            run.turn.interactive = interactive
        if cancelled:
            run.turn.cancelled = True
        if self._engine is not None:
            self._engine.wake()
            self._mel_worker.wake()
            self._speech_worker.wake()

    def _work(self, run: Run) -> None:
        order = run.order
        answer: Finished | Failed | JournalVoid
        try:
            transcript = encode_body(run.transcribe().to_wire())
            if len(transcript) > _MAX_TRANSCRIPT_BYTES:
                raise WhisperdError(
                    ErrorCode.TOO_LARGE,
                    f"the transcript is {len(transcript)} bytes, more than a reply can carry; "
                    "transcribe the recording in parts (clip_timestamps) or without word_timestamps",
                )
            answer = Finished(run=order.run, generation=order.generation, transcript=transcript)
        except VoidJournal as error:
            log.warning("model: the journal is void run=%d reason=%s", order.run, error)
            answer = JournalVoid(run=order.run, generation=order.generation)
        except Exception as error:
            code, message = self._failure(order, error)
            answer = Failed(run=order.run, generation=order.generation, code=code, message=message)
        with self._lock:
            del self._runs[order.run, order.generation]
            self._done_s += run.audio_s
        self._link.send(answer)

    def _failure(self, order: Transcribe, error: Exception) -> tuple[str, str]:
        if isinstance(error, WhisperdError):
            return error.code, error.message
        if is_out_of_memory(error):
            log.warning("model: out of memory run=%d error=%s", order.run, error)
            return (
                ErrorCode.OUT_OF_MEMORY,
                "the model ran out of memory; try again with a smaller beam_size or best_of, "
                "or when other programs have freed some",
            )
        log.error("model: run failed run=%d", order.run, exc_info=error)
        if is_device_failure(error, self._device):
            log.critical("model: the device failed, leaving run=%d", order.run)
            os._exit(EXIT_BROKEN)
        if isinstance(error, OSError):
            return ErrorCode.INTERNAL, f"the decoded audio cannot be read ({error.strerror or error}); submit it again"
        return ErrorCode.INTERNAL, f"transcribing failed: {type(error).__name__}: {error}"

    def _gauges(self) -> dict[str, Any]:
        if self._engine is None:
            return dict(self._software)
        with self._lock:
            audio_s = self._done_s + sum(run.audio_s for run in self._runs.values())
        gauges: dict[str, Any] = self._software | {
            "audio_s": audio_s,
            **self._engine.gauges(),
        }
        device = self._engine.model.device
        if device.type == "cuda":
            # That it failed, who works with it tells; without heartbeats it would look like a process standing still.
            with suppress(RuntimeError):
                free_bytes, total_bytes = torch.cuda.mem_get_info(device)
                gauges |= {"device_used_bytes": total_bytes - free_bytes, "device_total_bytes": total_bytes}
        return gauges


def ready(model: LoadedModel, identity: str, *, capacity: int) -> ModelStatus:
    """Return the status of a model that works."""
    return ModelStatus(
        state="ready",
        name=model.name,
        device=str(model.device),
        dtype=model.dtype_name,
        capacity=capacity,
        traits=model.traits(),
        fingerprint=identity,
    )


def is_device_failure(
    error: BaseException, device: torch.device, *, ask: Callable[[torch.device], object] = torch.cuda.mem_get_info
) -> bool:
    """True when the GPU failed: its context is lost for this process, whatever is tried next.

    `ask` is what a GPU answers unless it has failed, and waits for nothing: the batcher may be recording.
    """
    if isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error):
        return True
    if device.type != "cuda" or not isinstance(error, RuntimeError):
        return False
    try:
        ask(device)  # libraries above CUDA report in their own words; a lost context shows at the next call
    except RuntimeError:
        return True
    return False


def speech_threads() -> int:
    """Return how many recordings are listened to at the same time, each on a core."""
    return max(1, len(os.sched_getaffinity(0)) // _CORES_A_SPEECH_THREAD)
