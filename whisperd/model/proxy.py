"""The model as `whisper.transcribe` sees it in a job's thread: knows its dimensions, asks the engine for the rest."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from whisper.decoding import DecodingOptions, DecodingResult
from whisper.model import ModelDimensions
from whisper.timing import WordTiming

from whisperd.model.engine import Engine
from whisperd.model.worker import Turn


class Listener(Protocol):
    """What a run wants to hear from the transcribe loop that works for it."""

    def on_segments(self, segments: list[dict[str, Any]]) -> None:
        """A window added these segments; they do not change any more."""

    def on_frames(self, frames: int) -> None:
        """A window ended, `frames` mel frames after its beginning."""


class ProxyModel:
    """Stands in for `Whisper` in one run. Its device is always the CPU: job threads never touch the GPU."""

    device = torch.device("cpu")

    def __init__(self, engine: Engine, turn: Turn, listener: Listener) -> None:
        model = engine.model.whisper
        self.dims: ModelDimensions = model.dims
        self.is_multilingual: bool = model.is_multilingual
        self.num_languages: int = model.num_languages
        self.listener = listener
        self._engine = engine
        self._turn = turn
        self._mel: torch.Tensor | None = None  # the last window and its features
        self._features: torch.Tensor | None = None

    def decode(self, mel: torch.Tensor, options: DecodingOptions) -> DecodingResult:
        """Decode one window. At further temperatures the same window is not encoded again."""
        features = self._features if mel is self._mel else None
        self._mel = self._features = None
        result: DecodingResult = self._engine.decode(self._turn, mel, options, features)
        self._mel, self._features = mel, result.audio_features
        return result

    def detect_language(self, mel: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the language's token and the probability of each language's code."""
        return self._engine.detect_language(self._turn, mel)

    def align(
        self, tokenizer: Any, text_tokens: list[int], mel: torch.Tensor, num_frames: int, **options: Any
    ) -> list[WordTiming]:
        """Return the word timings of a window (what `whisper.timing.find_alignment` gives for the real model)."""
        return self._engine.align(self._turn, tokenizer, text_tokens, mel, num_frames, **options)
