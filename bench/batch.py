"""Many recordings at once through the engine, every token compared with openai-whisper's own.

`python -m bench.batch [MODEL] [--minutes M] [--text FILE] [--option NAME=VALUE ...] [--gaps]` also serves as
`make fidelity`: with `--gaps` it tells what differs, how near upstream's own choices were, by how much ours moves them,
and whether that meets the criterion (`bench.fidelity`), which is about greedy windows in float32. With `--dtype
bfloat16` or `float16` it judges by the word error rate instead, on a processor without them by rounding.
"""

from __future__ import annotations

import argparse
import ast
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import torch
import whisper

from bench.fidelity import Answer, Comparison, compare, reduced_verdict, verdict
from bench.forced import Choices, answer_in, describe, replay
from bench.recordings import TEXT, Spoken, speak_sentences
from bench.reduced import is_reduced, load_as
from bench.runs import Heard, Runs, at_once
from bench.upstream import answer_of, arguments_of
from bench.words import word_error_rate, words
from whisperd.protocol.helper_messages import HelperMessage, JournalEntry

_LENGTHS_S = (51, 85, 64, 72, 58, 79, 68, 60)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What openai-whisper made of the recordings, in float32 on the CPU, and what it answered on the way."""

    options: dict[str, Any]
    heard: Heard
    results: list[dict[str, Any]]
    choices: Choices


class Engines:
    """Both engines on one set of weights, and a spool of recordings. `device` and `dtype` are ours."""

    def __init__(
        self, setting: str, folder: Path, recordings: Sequence[Spoken], *, device: str = "auto", dtype: str = "auto"
    ) -> None:
        self.upstream = load_as(setting, folder, device="cpu", dtype="float32")[0].whisper
        model, kernels = load_as(setting, folder, device=device, dtype=dtype)
        self._rounds = kernels is not None
        self.runs = Runs(model, folder, kernels=kernels)
        self._names = [str(number) for number in range(len(recordings))]
        self._text = " ".join(each.text for each in recordings)
        self.audio_s = sum(each.length_s for each in recordings)
        for name, each in zip(self._names, recordings, strict=True):
            self.runs.record(name, each.pcm)

    def compare(self, options: dict[str, Any], choices: Choices | None = None) -> bool:
        """Let upstream transcribe them one after the other, then ours all at once; print both.

        True when equal; or, given `choices`, where upstream's go, when the criterion is met; where ours computes in
        fewer bits, when that one's is.
        """
        return self.judge(self.reference(options, choices))[0]

    def reference(self, options: dict[str, Any], choices: Choices | None = None) -> Reference:
        """Let upstream transcribe them, and print how it did."""
        choices = choices or Choices(gaps=False)
        began = time.perf_counter()
        arguments = arguments_of(options)
        results = []
        for name in self._names:
            with choices.listening(name):
                results.append(whisper.transcribe(self.upstream, self.runs.samples(name), **arguments))
        heard = Heard(wall_s=time.perf_counter() - began, **answer_of(results))
        print(f"openai-whisper: {self._line(heard)}", flush=True)
        return Reference(options=options, heard=heard, results=results, choices=choices)

    def judge(self, reference: Reference) -> tuple[bool, str]:
        """Let ours transcribe them at once; print how it did. Return as `compare`, and the line that says why."""
        theirs, results = reference.heard, reference.results
        answers: dict[str, list[Answer]] = {name: [] for name in self._names}
        ours = at_once(
            self.runs,
            self._names,
            reference.options,
            send=lambda name, message: answers[name].extend(_said(message)),
        )
        times = f"{theirs.wall_s / ours.wall_s:.2f} times as fast"
        if self._rounds:
            times = f"in {self.runs.model.dtype_name} by rounding, so its time says nothing"
        print(f"whisperd:       {self._line(ours)}; {times}", flush=True)
        differ = [name for name, one, other in zip(self._names, ours.said, theirs.said, strict=True) if one != other]
        for name in differ:
            print(f"recording {name} differs: {_first_difference(results[int(name)], ours.said[int(name)])}")
        segments, equal = _equal_segments(ours, theirs)
        warm = sum(segment["temperature"] > 0 for result in results for segment in result["segments"])
        line = (
            f"{len(differ)} of {len(self._names)} recordings differ; {equal} of {segments} segments are equal; "
            f"{warm} segments were tried again above temperature 0 (drawn: they differ)"
        )
        print(line)
        choices = reference.choices
        changes = replay(choices, self.runs.engine) if choices.gaps else []
        if changes:
            print(describe(choices, changes))
        if is_reduced(self.runs.model):
            met, line = reduced_verdict(
                [choices.answers[name] for name in self._names],
                [answers[name] for name in self._names],
                errors=(self._error_percent(theirs), self._error_percent(ours)),
                words=len(words(self._text)),
            )
        elif choices.gaps:
            met, line = self._verdict(choices, answers, differ, arguments_of(reference.options), changes)
        else:
            return not differ, line
        print(line)
        return met, line

    def _verdict(
        self,
        choices: Choices,
        answers: dict[str, list[Answer]],
        differ: list[str],
        arguments: dict[str, Any],
        changes: Sequence[float],
    ) -> tuple[bool, str]:
        """Return whether float32's criterion is met; print where recordings part."""
        limits = (arguments["logprob_threshold"], arguments["no_speech_threshold"])
        logprob, no_speech = (math.inf if limit is None else float(limit) for limit in limits)
        comparisons: list[Comparison] = []
        for name in self._names:
            found = compare(choices.answers[name], answers[name], thresholds=(logprob, no_speech))
            if name in differ and not (found.drawn or found.difference):
                found.differ("other segments of equal windows")
            if found.difference:
                print(f"recording {name}, {'near-tie' if found.near else 'no near-tie'}: {found.difference}")
            comparisons.append(found)
        return verdict(comparisons, changes)

    def _error_percent(self, heard: Heard) -> float:
        return 100 * word_error_rate(self._text, " ".join(heard.texts))

    def _line(self, heard: Heard) -> str:
        return (
            f"{self.audio_s / heard.wall_s:.1f} s of audio a second, {heard.windows} windows, {heard.tokens} tokens, "
            f"WER {self._error_percent(heard):.2f} %"
        )


def _said(message: HelperMessage) -> Iterator[Answer]:
    """Yield what the engine answered about a window, if it is that which a run tells its journal."""
    if isinstance(message, JournalEntry):
        _, _, answer = msgpack.unpackb(message.entry)
        if isinstance(answer, dict):  # neither a language nor words
            yield answer_in(answer)


def _equal_segments(ours: Heard, theirs: Heard) -> tuple[int, int]:
    """Return how many segments upstream has, and how many of them are in ours of the same recording."""
    total = equal = 0
    for one, other in zip(ours.said, theirs.said, strict=True):
        total += len(other)
        equal += sum(tokens in one for tokens in other)
    return total, equal


def _first_difference(result: dict[str, Any], ours: list[list[int]]) -> str:
    for number, segment in enumerate(result["segments"]):
        if number >= len(ours) or ours[number] != segment["tokens"]:
            mine = ours[number] if number < len(ours) else []
            return f"at {segment['start']:.2f} s, temperature {segment['temperature']}: {segment['tokens']} and {mine}"
    return f"ours goes on: {ours[len(result['segments'])]}"


def main() -> int:
    """Compare as the command line says; return 1 when anything differs, or the criterion is not met."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.batch", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("model", nargs="?", default="demo", help="as in the setting `model`; demo")
    parser.add_argument("--count", type=int, default=8, help="how many recordings")
    parser.add_argument("--minutes", type=float, default=0.0, help="length of each; 0: 51 to 85 seconds")
    parser.add_argument("--text", type=Path, default=TEXT, help="an English text that is spoken; part of Alice")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="auto", help="the engine's: auto, float32, bfloat16 or float16")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of a transcription")
    parser.add_argument("--gaps", action="store_true", help="judge by how near upstream's choices were (slows it)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    options = {name: ast.literal_eval(value) for name, _, value in (one.partition("=") for one in arguments.option)}
    lengths_s = [arguments.minutes * 60 or _LENGTHS_S[n % len(_LENGTHS_S)] for n in range(arguments.count)]
    recordings = list(speak_sentences(arguments.text.read_text(), lengths_s))
    with tempfile.TemporaryDirectory(prefix="wb-") as folder:
        engines = Engines(arguments.model, Path(folder), recordings, dtype=arguments.dtype)
        well = engines.compare(options, Choices() if arguments.gaps else None)
        print(engines.runs.engine.gauges())
    return int(not well)


if __name__ == "__main__":
    sys.exit(main())
