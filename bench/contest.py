"""Engines side by side: the same recordings and weights to each in turn, again and again, so that noise hits all."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.children import Child
from bench.daemon import THREADS
from bench.recordings import Spoken
from bench.runs import Heard
from bench.words import word_error_rate

OURS, UPSTREAM = "whisperd", "openai-whisper"


# Transcribes the recordings in these folders of the spool.
Contestant = Callable[[Sequence[str]], Heard]


class Contest:
    """One model, a spool of recordings, and the engines that were asked for so far. `close` ends their processes."""

    def __init__(self, setting: str, folder: Path, recordings: Sequence[Spoken], *, peer_python: str = "") -> None:
        self.setting = setting
        self.recordings = {str(number): each for number, each in enumerate(recordings)}
        self.peer_python = peer_python
        self._spool = folder
        self._children: dict[str, Child] = {}
        for name, each in self.recordings.items():
            (folder / name).mkdir()
            (folder / name / "audio.pcm").write_bytes(each.pcm)

    def close(self) -> None:
        for child in self._children.values():
            child.close()

    def ours(self, dtype: str = "auto", **options: Any) -> Contestant:
        """Return our engine: all recordings at once."""
        command = [sys.executable, "-m", "bench.ours", str(THREADS), str(self._spool), self.setting, dtype]
        return self._ask(command, options=options)

    def upstream(self, **options: Any) -> Contestant:
        """Return openai-whisper: one recording after the other."""
        command = [sys.executable, "-m", "bench.upstream", str(THREADS), "0", str(self._spool), self.setting]
        return self._ask(command, options=options)

    def peer(self, compute_type: str, *, batched: bool, **options: Any) -> Contestant:
        """Return faster-whisper: one recording after the other, the windows of each in a batch or not."""
        script = Path(__file__).with_name("peer.py")
        command = [self.peer_python, str(script), self.setting, str(THREADS), compute_type]
        return self._ask(command, batched=batched, options=options)

    def _ask(self, command: list[str], **request: Any) -> Contestant:
        child = self._children.get(str(command)) or Child(command)
        self._children[str(command)] = child

        def transcribe(names: Sequence[str]) -> Heard:
            return Heard(**child.ask(files=[str(self._spool / name / "audio.pcm") for name in names], **request))

        return transcribe

    def error_percent(self, heard: Heard, names: Sequence[str]) -> float:
        """Return the word error rate over all these recordings, in percent."""
        spoken = " ".join(self.recordings[name].text for name in names)
        return 100 * word_error_rate(spoken, " ".join(heard.texts))

    def audio_s(self, names: Sequence[str]) -> float:
        return sum(self.recordings[name].length_s for name in names)


def rounds(contestants: Mapping[str, Contestant], names: Sequence[str], times: int) -> dict[str, list[Heard]]:
    """Let each transcribe these recordings so many times, in turn; before that one of them, to warm up."""
    for contestant in contestants.values():
        contestant(names[:1])
    heard: dict[str, list[Heard]] = {name: [] for name in contestants}
    for number in range(times):
        for name in sorted(contestants, reverse=bool(number % 2)):
            heard[name].append(contestants[name](names))
    return heard


def ratios(ours: Sequence[Heard], theirs: Sequence[Heard]) -> list[float]:
    """Return, of each round, how many times as long they took; in ascending order."""
    return sorted(their.wall_s / our.wall_s for our, their in zip(ours, theirs, strict=True))


def median_s(heard: Sequence[Heard]) -> float:
    """Return the median time."""
    return statistics.median(each.wall_s for each in heard)
