"""openai-whisper and our engine in one process, on one device and the same weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import whisper

from bench.contest import ratios
from bench.gpu_place import Place
from bench.report import Row
from bench.runs import Heard, Runs, at_once
from bench.upstream import answer_of, arguments_of
from whisperd.model.batch.batcher import Request
from whisperd.model.batch.kernels import Kernels
from whisperd.model.batch.rows import LiveRows
from whisperd.model.loading import load
from whisperd.model.worker import Turn


class Recorded(Kernels):
    """Counts the steps that were recorded: none should be while somebody looks at the clock."""

    recordings = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recordings += 1
        return super().record(work)


class Timed(LiveRows[Request]):
    """Remembers when the first token of each interactive window was known, and how many windows stepped then."""

    first: ClassVar[dict[Turn, tuple[float, int]]] = {}

    def step(self) -> Any:
        ended = super().step()
        now = time.perf_counter()
        known = [group.owner for group in self._groups if group.said] + [owner for owner, _ in ended]
        for owner in known:
            if owner.turn.interactive:
                self.first.setdefault(owner.turn, (now, len(self._groups) + len(ended)))
        return ended


class Sides:
    """Both, loaded. `windows` is how many of background work ours decodes at once; 0: as the device has room for."""

    def __init__(self, place: Place, setting: str, *, windows: int = 0, upstream: bool = True) -> None:
        self._place, self._lengths_s = place, dict[str, float]()
        folder = place.new_folder("spool")

        def loaded(dtype: str) -> Any:
            device = str(place.device)
            return load(setting, cache_dir=folder, device=device, dtype=dtype, on_step=lambda: None, environ={})

        self._upstream: whisper.Whisper | None = loaded("float32").whisper if upstream else None
        model = loaded("auto")
        self._kernels = Recorded(model.device, model.dtype)
        self.runs = Runs(
            model,
            folder,
            release=True,
            kernels=self._kernels,
            windows=windows,
            live_rows=Timed,
        )

    @property
    def recordings(self) -> int:
        """How many steps were recorded so far."""
        return self._kernels.recordings

    def record(self, name: str, pcm: bytes) -> str:
        """Put 16 kHz s16le samples where both find them."""
        self.runs.record(name, pcm)
        self._lengths_s[name] = len(pcm) / 2 / 16_000
        return name

    def noises(self, name: str, count: int, length_s: float) -> list[str]:
        """Put so many recordings of noise there, each another; return their names."""
        return [self.record(f"{name}-{number}", noise(length_s, f"{name}-{number}")) for number in range(count)]

    def audio_s(self, names: Sequence[str]) -> float:
        return sum(self._lengths_s[name] for name in names)

    def ours(self, names: Sequence[str], options: Mapping[str, Any]) -> Heard:
        """Have our engine transcribe them beside each other."""
        self._place.finish()
        return at_once(self.runs, names, options)  # ends with texts on the host, so with the device's work

    def upstream(self, names: Sequence[str], options: Mapping[str, Any]) -> Heard:
        """Have openai-whisper transcribe them one after the other, as it comes: in float16 on a GPU."""
        assert self._upstream is not None
        recordings = [self.runs.samples(name) for name in names]
        arguments = arguments_of(dict(options)) | {"fp16": self._place.on_gpu}
        began = self._place.now()
        results = [whisper.transcribe(self._upstream, each, **arguments) for each in recordings]
        return Heard(wall_s=self._place.now() - began, **answer_of(results))

    def warm_up(self, names: Sequence[str], options: Mapping[str, Any], *, upstream: Sequence[str] = ()) -> None:
        """Let both do work like that which is timed: libraries choose their ways, and a step comes its second time."""
        for _ in range(self._place.pick(3, 1)):
            self.ours(names[: self._place.pick(len(names), 1)], options)
        if upstream and not self._place.quick:
            self.upstream(upstream, options)


def noise(length_s: float, name: str) -> bytes:
    """Return s16 samples at 16 kHz, others for each name."""
    generator = np.random.default_rng([*name.encode()])
    return (generator.standard_normal(int(length_s * 16_000)) * 1000).astype("<i2").tobytes()


def rate(what: str, heard: Sequence[Heard], audio_s: float, goal: float) -> Row:
    """Return how many seconds of audio were transcribed a second."""
    rates = sorted(audio_s / each.wall_s for each in heard)
    median = statistics.median(rates)
    return Row(
        what=f"{what}: seconds of audio a second",
        goal=f"≥ {goal:,.0f}",
        measured=f"{median:,.0f} ({rates[0]:,.0f} to {rates[-1]:,.0f}); {work_of(heard[-1])}",
        met=median >= goal,
        runs=str(len(heard)),
    )


def against(
    what: str,
    ours: Sequence[Heard],
    theirs: Sequence[Heard],
    goal: float,
    *,
    peer: str = "openai-whisper",
    audio_s: tuple[float, float] = (1.0, 1.0),
) -> Row:
    """Return how many times as fast ours was, round by round; by what each transcribed, where that is not the same."""
    each = [ratio * audio_s[0] / audio_s[1] for ratio in ratios(ours, theirs)]
    median = statistics.median(each)
    times = [statistics.median(heard.wall_s for heard in side) for side in (ours, theirs)]
    lengths = f" for {audio_s[0]:.0f} and {audio_s[1]:.0f} s of audio" if audio_s[0] != audio_s[1] else ""
    return Row(
        what=f"{what}: against {peer}",
        goal=f"≥ {goal:g} ×",
        measured=f"{median:.2f} × ({each[0]:.2f} to {each[-1]:.2f}): {times[0]:.3f} s ({work_of(ours[-1])}) against "
        f"{times[1]:.3f} s ({work_of(theirs[-1])}){lengths}",
        met=median >= goal,
        runs=f"{len(each)} of each, alternating",
    )


def work_of(heard: Heard) -> str:
    return f"{heard.windows} windows, {heard.tokens:,} tokens"
