"""What stands behind the proxy's `.decode()`: the real model, one window at a time, on one thread.

Everything that touches the model goes through one worker: windows, language detection and word alignment. So
interactive runs come next at every window, and upstream's process-wide state (hooks for alignment on shared blocks,
the flag that switches fused attention off) is never used by two runs at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from whisper.decoding import DecodingOptions, DecodingResult, DecodingTask, LogitFilter, detect_language
from whisper.timing import WordTiming, dtw, find_alignment

from whisperd.model.loading import LoadedModel
from whisperd.model.worker import Turn, Worker


@dataclass(slots=True, kw_only=True)
class Counters:
    """Gauges of the engine since the process began; written by its thread alone."""

    windows: int = 0
    tokens: int = 0


class _EachToken(LogitFilter):  # type: ignore[misc]
    """Runs once a step, after all filters, and changes no logits: the place where a window can be given up.

    Upstream takes its hooks off in a `finally` around this very loop, so raising here leaves nothing behind.
    """

    def __init__(self, on_step: Callable[[], None]) -> None:
        self._on_step = on_step

    def apply(self, logits: torch.Tensor, tokens: torch.Tensor) -> None:
        self._on_step()


class _Task(DecodingTask):  # type: ignore[misc]
    """Upstream's decoding of one window, given encoded features instead of a mel."""

    def _get_audio_features(self, mel: torch.Tensor) -> torch.Tensor:
        # Upstream's checks the type of the features against the option fp16, which knows no bfloat16.
        return mel


class Engine:
    """The loaded model and its worker. Methods are called from job threads and wait for their turn.

    `on_step` is called at every decoder token and every encoder block.
    """

    def __init__(self, model: LoadedModel, *, on_step: Callable[[], None]) -> None:
        self.model = model
        self.worker = Worker("engine")
        self.counters = Counters()
        self._whisper = model.whisper
        self._on_step = on_step
        self._turn = Turn()  # whose work the worker does at the moment
        # A window of a large model takes seconds to encode on a CPU: it can be given up between blocks too.
        for block in self._whisper.encoder.blocks:
            block.register_forward_pre_hook(lambda module, args: self._check())
        # Upstream compiles its alignment on first use (1.7 s), and numba allows no second thread while it does.
        self.worker.call(self._turn, lambda: dtw(torch.rand(3, 4)))

    def decode(
        self, turn: Turn, mel: torch.Tensor, options: DecodingOptions, features: torch.Tensor | None, *, seed: int
    ) -> DecodingResult:
        """Return the `DecodingResult` of one window, `mel` being `(n_mels, 3000)`.

        `features` are the window's encoder output where an earlier temperature computed it already (the result's
        `audio_features`). Above temperature 0 `seed` decides what is drawn. Raises `WhisperdError` (`cancelled`) at the
        next token once the run is cancelled.
        """
        return self.worker.call(turn, lambda: self._decode(turn, mel, options, features, seed))

    def detect_language(self, turn: Turn, mel: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """Return upstream's answer: the language's token and the probability of each language's code."""

        def work() -> tuple[torch.Tensor, dict[str, float]]:
            with self._working_for(turn), torch.no_grad():
                token, probabilities = detect_language(self._whisper, self._to_device(mel))
                return token.cpu(), probabilities

        return self.worker.call(turn, work)

    def align(
        self, turn: Turn, tokenizer: Any, text_tokens: list[int], mel: torch.Tensor, num_frames: int, **options: Any
    ) -> list[WordTiming]:
        """Return upstream's word timings of a window."""

        def work() -> list[WordTiming]:
            with self._working_for(turn):
                try:
                    alignment: list[WordTiming] = find_alignment(
                        self._whisper, tokenizer, text_tokens, self._to_device(mel), num_frames, **options
                    )
                except BaseException:
                    # Upstream takes its hooks off only when nothing was raised.
                    for block in self._whisper.decoder.blocks:
                        block.cross_attn._forward_hooks.clear()
                    raise
                return alignment

        return self.worker.call(turn, work)

    def _decode(
        self, turn: Turn, mel: torch.Tensor, options: DecodingOptions, features: torch.Tensor | None, seed: int
    ) -> DecodingResult:
        if options.temperature > 0:
            torch.manual_seed(seed)  # the global generator, which nothing but this thread draws from
        with self._working_for(turn), torch.no_grad():
            if features is None:
                features = self._whisper.encoder(self._to_device(mel)[None])[0]
            # fp16 is about the mel, which has been cast already: to whatever type the model computes in.
            task = _Task(self._whisper, replace(options, fp16=False))
            task.logit_filters.append(_EachToken(self._on_token))
            result: DecodingResult = task.run(features[None])[0]
            self.counters.windows += 1
            return result

    @contextmanager
    def _working_for(self, turn: Turn) -> Iterator[None]:
        self._turn = turn
        try:
            yield
        finally:
            self._turn = Turn()

    def _on_token(self) -> None:
        self.counters.tokens += 1
        self._check()

    def _check(self) -> None:
        self._on_step()
        self._turn.check()

    def _to_device(self, mel: torch.Tensor) -> torch.Tensor:
        return mel.to(self.model.device, self.model.dtype)
