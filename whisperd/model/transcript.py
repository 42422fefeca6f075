"""What a run gives back, as typed values: openai-whisper's untyped dicts end here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from whisper.version import __version__ as WHISPER_VERSION

from whisperd import __version__
from whisperd.model.coverage import Coverage

# The protocol has finite numbers only. Where the model gave none (fp16 overflow, everything suppressed), the value
# says the worst: as unlikely as e^-100 a token. 0.0 would say "certain".
WORST_LOGPROB = -100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """One word; times in seconds from the start of the audio."""

    word: str
    start: float
    end: float
    probability: float

    def to_wire(self) -> dict[str, Any]:
        """Return the map that a segment carries."""
        return {"word": self.word, "start": self.start, "end": self.end, "probability": self.probability}


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One segment with openai-whisper's own names; `words` is None unless word times were asked for.

    `speech` is False where nobody was heard to speak between its ends.
    """

    id: int
    start: float
    end: float
    text: str
    tokens: list[int]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    words: list[Word] | None
    speech: bool = True

    def to_wire(self) -> dict[str, Any]:
        """Return the map that transcripts and events carry; `words` only where asked for, `speech` only if False."""
        wire = {name: getattr(self, name) for name in _ALWAYS}
        if self.words is not None:
            wire["words"] = [word.to_wire() for word in self.words]
        if not self.speech:
            wire["speech"] = False
        return wire


# `asdict` copies each number of a list by itself: two seconds for ten hours with word times.
_ALWAYS = [field.name for field in fields(Segment) if field.name not in ("words", "speech")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What the run's last start took: seconds from its order to its end, windows decoded in it, tokens in them."""

    model_s: float
    windows: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """A whole transcript; `truncated` says that the audio ended early or had a broken stretch."""

    text: str
    language: str
    duration_s: float
    segments: list[Segment]
    model: str
    truncated: bool
    mode: str
    coverage: Coverage
    timing: Timing

    def to_wire(self) -> dict[str, Any]:
        """Return the Transcript map of the protocol."""
        return {
            "text": self.text,
            "language": self.language,
            "duration_s": self.duration_s,
            "segments": [segment.to_wire() for segment in self.segments],
            "model": self.model,
            "versions": {"whisperd": __version__, "whisper": WHISPER_VERSION, "torch": str(torch.__version__)},
            "truncated": self.truncated,
            "mode": self.mode,
            "coverage": self.coverage.to_wire(),
            "timing": asdict(self.timing),
        }


def segment_of(values: Mapping[str, Any], *, words: bool) -> Segment:
    """Return the segment that one of transcribe's dicts holds.

    `words` says whether word times were asked for: upstream gives an empty list to a segment without text even
    where they were not.
    """
    return Segment(
        id=int(values["id"]),
        start=_finite(values["start"], 0.0),
        end=_finite(values["end"], 0.0),
        text=str(values["text"]),
        tokens=[int(token) for token in values["tokens"]],
        temperature=_finite(values["temperature"], 0.0),
        avg_logprob=_finite(values["avg_logprob"], WORST_LOGPROB),
        compression_ratio=_finite(values["compression_ratio"], 0.0),
        no_speech_prob=_finite(values["no_speech_prob"], 0.0),
        words=[_word_of(word) for word in values["words"]] if words else None,
    )


def _word_of(values: Mapping[str, Any]) -> Word:
    return Word(
        word=str(values["word"]),
        start=_finite(values["start"], 0.0),
        end=_finite(values["end"], 0.0),
        probability=_finite(values["probability"], 0.0),
    )


def _finite(value: Any, instead: float) -> float:
    number = float(value)
    return number if math.isfinite(number) else instead
