"""What stands behind the proxy: the loaded model, taken apart for working on the windows of many runs at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from whisper.decoding import DecodingOptions, DecodingResult, DecodingTask
from whisper.model import Linear
from whisper.timing import WordTiming

from whisperd.model.batch.batcher import Batcher, Limits, Request
from whisperd.model.batch.decoder import Decoder
from whisperd.model.batch.encoder import Encoder
from whisperd.model.batch.kernels import Kernels
from whisperd.model.batch.pieces import Pieces
from whisperd.model.batch.rows import LiveRows
from whisperd.model.batch.search import result_of, search_of
from whisperd.model.batch.upstream import Aligner, Reading, language_of
from whisperd.model.batch.windows import KeptWindows, Window
from whisperd.model.loading import LoadedModel
from whisperd.model.memory import free_bytes, windows_that_fit
from whisperd.model.worker import INTERACTIVE_IN_A_ROW, Turn

_ROWS_A_WINDOW = 5  # so many beams of every window step beside each other


class Engine:
    """The loaded model and its threads. Methods are called from job threads and wait for their turn.

    `windows` is how many windows of background work may be decoded at once; 0: as many as the device is good for and
    `memory_limit_mb` (of a GPU, 0 for none) leaves room for. `on_step` is called between pieces of work. `release`
    takes the weights out of `model.whisper` once they are laid out anew. `leave` is as `Batcher` has it.

    `kernels` and `live_rows` stand in for what the device gets otherwise. `kernels`, `decoder` and `batcher` are to be
    read by who measures or tests them.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        on_step: Callable[[], None],
        windows: int = 0,
        memory_limit_mb: int = 0,
        release: bool = False,
        interactive_in_a_row: int = INTERACTIVE_IN_A_ROW,
        leave: Callable[[int], object] = os._exit,
        kernels: Kernels | None = None,
        live_rows: type[LiveRows[Request]] = LiveRows,
    ) -> None:
        self.model = model
        whisper, dims = model.whisper, model.whisper.dims
        self.kernels = kernels = kernels or Kernels(model.device, model.dtype)
        with torch.inference_mode():
            # Block by block: else the encoder would lie in memory twice for a moment.
            packed = release_weights if release else (lambda block: None)
            encoder = Encoder(whisper.encoder, kernels, heads=dims.n_audio_head, packed=packed)
            on_step()
            self.decoder = Decoder(whisper.decoder, kernels, heads=dims.n_text_head, audio_positions=dims.n_audio_ctx)
            on_step()
            if release:
                release_weights(whisper)
                kernels.give_back()  # else it would not count as free
            self.windows = windows or windows_that_fit(
                free_bytes(model.device, limit_mb=memory_limit_mb),
                window_bytes=self.decoder.window_bytes,
                row_bytes=self.decoder.row_bytes,
                most=kernels.most_windows,
            )
            # One more, for interactive work.
            live = live_rows(self.decoder, kernels, windows=self.windows + 1, rows=self.windows + 1)
        self._limits = Limits(windows=self.windows, rows=self.windows * _ROWS_A_WINDOW)
        self._aligner = Aligner(whisper, interactive_in_a_row=interactive_in_a_row)
        self.batcher = Batcher(
            encoder,
            live,
            kernels,
            self._limits,
            on_step=on_step,
            interactive_in_a_row=interactive_in_a_row,
            leave=leave,
        )
        self.counters = self.batcher.counters

    @torch.inference_mode()
    def settle(self) -> None:
        """Make steps as fast as they get. For a thread of its own: the engine works before, and meanwhile."""
        self.kernels.settle()

    def wake(self) -> None:
        """Make waiting runs look at their marks."""
        self._aligner.worker.wake()
        self._aligner.places.wake()

    def gauges(self) -> dict[str, float]:
        """Return the numbers that `stats` shows of the engine."""
        counters = self.counters
        filled = counters.window_steps / counters.place_steps if counters.place_steps else 0.0
        return {
            "windows": counters.windows,
            "windows_reused": counters.reused,
            "tokens": counters.tokens,
            "steps": counters.steps,
            "busy_s": counters.busy_s,
            "batch_windows": self._limits.windows,
            "batch_occupancy": min(1.0, filled),  # an interactive window may be one more
        }

    def decode(
        self,
        turn: Turn,
        kept: KeptWindows,
        window: Window,
        options: DecodingOptions,
        *,
        seed: int,
        speech_until: int = 0,
    ) -> DecodingResult:
        """Return the `DecodingResult` of one window; it carries no features, the window keeps them.

        Above temperature 0 `seed` decides what is drawn; `speech_until` is as `LiveRows.begin` has it. A window that
        `kept` has seen with the same prompt and options is not decoded again. Raises `WhisperdError`: `cancelled` at
        the next step once the run is cancelled.
        """
        # fp16 is about the mel, which the encoder casts to whatever type the model computes in.
        task = DecodingTask(self.model.whisper, replace(options, fp16=False))
        key = (window.digest, repr(task.options), seed if task.options.temperature else None, speech_until)

        def decode() -> DecodingResult:
            request = Request(turn, window, task=task, search=lambda: search_of(task, seed), speech_until=speech_until)
            found = result_of(task, self.batcher.call(request))
            turn.had_window(len(found.tokens))
            return found

        result, known = kept.decoded(key, decode)
        self.counters.reused += known
        return result

    def detect_language(self, turn: Turn, window: Window) -> tuple[torch.Tensor, dict[str, float]]:
        """Return upstream's answer: the language's token and the probability of each language's code."""

        def use(features: torch.Tensor) -> Pieces[tuple[torch.Tensor, dict[str, float]]]:
            return language_of(features, self.model.whisper, self.decoder)

        answer: tuple[torch.Tensor, dict[str, float]] = self.batcher.call(Request(turn, window, use=use))
        return answer

    def align(
        self, turn: Turn, window: Window, tokenizer: Any, text_tokens: list[int], num_frames: int, **options: Any
    ) -> list[WordTiming]:
        """Return upstream's word timings of a window."""
        if not text_tokens:
            return []

        def use(features: torch.Tensor) -> Pieces[Reading]:
            return self._aligner.read(tokenizer, text_tokens, features, self.decoder)

        with self._aligner.places.taken(turn):
            reading = self.batcher.call(Request(turn, window, use=use))
            return self._aligner.align(turn, reading, tokenizer, text_tokens, num_frames, **options)


def release_weights(whisper: torch.nn.Module) -> None:
    """Let go of the matrices of all layers: they have been laid out anew, and would lie in memory twice."""
    for module in whisper.modules():
        if isinstance(module, Linear):
            module.weight.data = torch.empty(0)
