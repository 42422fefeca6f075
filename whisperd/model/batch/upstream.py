"""openai-whisper's own functions for word times and language detection, run on our decoder.

Each is given a stand-in that knows what the function asks of a model. Their arithmetic stays upstream's; no hook is put
on the model, and the switch that word alignment flips for the process (`use_sdpa`) has nobody here who reads it.
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from whisper.decoding import detect_language
from whisper.model import Whisper
from whisper.timing import WordTiming, backtrace, dtw, dtw_cpu, find_alignment

from whisperd.model.batch.decoder import Decoder
from whisperd.model.worker import INTERACTIVE_IN_A_ROW, Turn, Worker

log = logging.getLogger("whisperd.model")


class _OfLanguages:
    """Asked by `detect_language` for the logits behind one token, of features `(1, n_audio_ctx, n_audio_state)`."""

    def __init__(self, whisper: Whisper, decoder: Decoder) -> None:
        self.dims = whisper.dims
        self.is_multilingual = whisper.is_multilingual
        self.num_languages = whisper.num_languages
        self._decoder = decoder

    def logits(self, tokens: Tensor, features: Tensor) -> Tensor:
        return self._decoder.read_through(tokens[0].tolist(), features[0])[None]


def language_of(features: Tensor, whisper: Whisper, decoder: Decoder) -> tuple[Tensor, dict[str, float]]:
    """Return the language's token and the probability of each language's code."""
    tokens, probabilities = detect_language(_OfLanguages(whisper, decoder), features[None])
    return tokens[0].cpu(), probabilities[0]


class Reading:
    """A text read against its audio, on the CPU: the logits, and what its tokens wanted of the audio, by layer."""

    def __init__(self, tokens: list[int], features: Tensor, decoder: Decoder, layers: set[int]) -> None:
        self.wanted: dict[int, Tensor] = {}

        def keep(layer: int, wanted: Tensor) -> None:
            if layer in layers:
                self.wanted[layer] = wanted.cpu()

        self.logits = decoder.read_through(tokens, features, keep).cpu()


class _CrossAttention:
    def __init__(self) -> None:
        self.hook: Callable[[None, None, tuple[Tensor]], None] | None = None

    def register_forward_hook(self, hook: Callable[[None, None, tuple[Tensor]], None]) -> Any:
        self.hook = hook
        return SimpleNamespace(remove=lambda: None)


class _OfTimes:
    """Asked by `find_alignment` to read the text; its blocks have the hooks told what was read already."""

    device = torch.device("cpu")

    def __init__(self, whisper: Whisper, heads: Tensor, reading: Reading) -> None:
        self.dims = whisper.dims
        self.alignment_heads = heads
        self.decoder = SimpleNamespace(
            blocks=[SimpleNamespace(cross_attn=_CrossAttention()) for _ in range(whisper.dims.n_text_layer)]
        )
        self._reading = reading

    def __call__(self, mel: Tensor, tokens: Tensor) -> Tensor:
        for layer, wanted in self._reading.wanted.items():
            hook = self.decoder.blocks[layer].cross_attn.hook
            assert hook is not None, "find_alignment hooks every layer"
            hook(None, None, (wanted[None],))
        return self._reading.logits[None]


def compile_alignment() -> None:
    """Have upstream's alignment compiled, once for all processes that share numba's folder of compiled functions.

    Upstream does not ask numba to keep it: every start of the process cost a core three seconds.
    """
    # Plain functions where NUMBA_DISABLE_JIT is set.
    compiled = [function for function in (backtrace, dtw_cpu) if hasattr(function, "enable_caching")]
    try:
        for function in compiled:
            function.enable_caching()
        dtw(torch.rand(3, 4))
    except Exception as error:  # what is kept is a pickle, and a disk can be full: anything may come of it
        log.warning(
            "model: what numba compiled before is of no use (%s); delete cache_dir/numba to have it made anew", error
        )
        for function in compiled:
            function._cache.disable()
        dtw(torch.rand(3, 4))


class Aligner:
    """Finds the times of words. Two threads in numba's code abort the process, so there is one."""

    def __init__(self, whisper: Whisper, *, interactive_in_a_row: int = INTERACTIVE_IN_A_ROW) -> None:
        self.worker = Worker("align", interactive_in_a_row=interactive_in_a_row)
        self._whisper = whisper
        self._heads = whisper.alignment_heads.cpu()
        self.layers = set(self._heads.indices()[0].tolist())
        # Upstream compiles its alignment on first use: for that no job without word times need wait.
        self.worker.begin(compile_alignment)
        # A process that ends under its compiler aborts: wait for it.
        atexit.register(self.worker.call, Turn(), lambda: None)

    @staticmethod
    def text_of(tokenizer: Any, text_tokens: list[int]) -> list[int]:
        """Return the text as `find_alignment` has it read."""
        return [*tokenizer.sot_sequence, tokenizer.no_timestamps, *text_tokens, tokenizer.eot]

    def align(
        self, turn: Turn, reading: Reading, tokenizer: Any, text_tokens: list[int], num_frames: int, **options: Any
    ) -> list[WordTiming]:
        """Return upstream's word timings from a text that has been read."""

        def work() -> list[WordTiming]:
            model = _OfTimes(self._whisper, self._heads, reading)
            timings: list[WordTiming] = find_alignment(
                model, tokenizer, text_tokens, torch.empty(0), num_frames, **options
            )
            return timings

        return self.worker.call(turn, work)
