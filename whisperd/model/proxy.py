"""The model as `whisper.transcribe` sees it in a job's thread: knows its dimensions, asks the engine for the rest.

Every answer goes through the run's journal: what an earlier start of the run was told already is told again, without
the engine.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from whisper.audio import FRAMES_PER_SECOND, TOKENS_PER_SECOND
from whisper.decoding import DecodingOptions, DecodingResult
from whisper.model import ModelDimensions
from whisper.timing import WordTiming

from whisperd.model.batch.windows import KeptWindows, Window
from whisperd.model.engine import Engine
from whisperd.model.journal import Strand
from whisperd.model.mel import MelWindow
from whisperd.model.worker import Turn

_RECORDED = [field.name for field in fields(DecodingResult) if field.name != "audio_features"]
_NO_FEATURES = torch.empty(0)  # transcribe has no use for them


class Listener(Protocol):
    """What a run wants to hear from the transcribe loop that works for it."""

    def on_segments(self, segments: list[dict[str, Any]]) -> None:
        """A window added these segments; they do not change any more."""

    def on_frames(self, frames: int) -> None:
        """A window ended, `frames` mel frames after its beginning."""


class ProxyModel:
    """Stands in for `Whisper` in one run. Its device is always the CPU: job threads never touch the GPU.

    `kept` are the windows of the whole run, of which this one holds the one that it is at. `speech_until_s` is where in
    the recording somebody is known to speak still, if that shall keep a text from ending.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        engine: Engine,
        turn: Turn,
        listener: Listener,
        strand: Strand,
        kept: KeptWindows,
        *,
        speech_until_s: float = 0.0,
    ) -> None:
        model = engine.model.whisper
        self.dims: ModelDimensions = model.dims
        self.is_multilingual: bool = model.is_multilingual
        self.num_languages: int = model.num_languages
        self.listener = listener
        self._engine = engine
        self._turn = turn
        self._strand = strand
        self._speech_until_s = speech_until_s
        self._kept = kept
        self._window: Window | None = None

    def decode(self, mel: MelWindow, options: DecodingOptions) -> DecodingResult:
        """Decode one window. At further temperatures the same window is not encoded again."""
        options = self._with_what_is_read(options)
        question = f"window {mel.start} {mel.stop} {options}"

        def answer() -> dict[str, Any]:
            window, seed = self._window_of(mel), self._strand.seed(question)
            result = self._engine.decode(
                self._turn, self._kept, window, options, seed=seed, speech_until=self._speech_until(mel)
            )
            return {name: getattr(result, name) for name in _RECORDED}

        self._turn.check()
        return DecodingResult(audio_features=_NO_FEATURES, **self._strand.ask(question, answer))

    def _window_of(self, mel: MelWindow) -> Window:
        # Held until the next one: further temperatures and word times ask for it again, and it is encoded by then.
        self._window = self._kept.window(mel.tensor())
        return self._window

    def _with_what_is_read(self, options: DecodingOptions) -> DecodingOptions:
        """Return the options with no more of the prompt than `DecodingTask` reads: its last tokens.

        transcribe gives all that was said so far: after hours most of a megabyte to write down at each temperature.
        """
        if not isinstance(options.prompt, list):
            return options
        return replace(options, prompt=options.prompt[-(self.dims.n_text_ctx // 2 - 1) :])

    def _speech_until(self, mel: MelWindow) -> int:
        into_window_s = self._speech_until_s - mel.start / FRAMES_PER_SECOND
        return max(0, int(into_window_s * TOKENS_PER_SECOND))

    def detect_language(self, mel: MelWindow) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the language's token and the probability of each language's code."""

        def answer() -> tuple[int, dict[str, float]]:
            token, probabilities = self._engine.detect_language(self._turn, self._window_of(mel))
            return int(token), probabilities

        token, probabilities = self._strand.ask(f"language {mel.start} {mel.stop}", answer)
        return torch.tensor(token), probabilities

    def align(
        self, tokenizer: Any, text_tokens: list[int], mel: MelWindow, num_frames: int, **options: Any
    ) -> list[WordTiming]:
        """Return the word timings of a window (what `whisper.timing.find_alignment` gives for the real model)."""

        def answer() -> list[tuple[str, list[int], float, float, float]]:
            words = self._engine.align(self._turn, self._window_of(mel), tokenizer, text_tokens, num_frames, **options)
            return [
                (word.word, word.tokens, float(word.start), float(word.end), float(word.probability)) for word in words
            ]

        question = f"words {mel.start} {mel.stop} {num_frames} {text_tokens} {options}"
        # numpy's numbers, as upstream has them: they round otherwise than Python's.
        return [
            WordTiming(word, tokens, np.float64(start), np.float64(end), np.float64(probability))
            for word, tokens, start, end, probability in self._strand.ask(question, answer)
        ]
