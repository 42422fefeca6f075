"""openai-whisper's own functions for word times and language detection, run on our decoder.

Each is given a stand-in that knows what the function asks of a model. Their arithmetic stays upstream's; no hook is put
on the model, and the switch that word alignment flips for the process (`use_sdpa`) has nobody here who reads it.
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from whisper.decoding import detect_language
from whisper.model import Whisper
from whisper.timing import WordTiming, backtrace, dtw, dtw_cpu, find_alignment
from whisper.tokenizer import get_tokenizer

from whisperd.model.batch.decoder import Decoder
from whisperd.model.batch.pieces import Pieces
from whisperd.model.worker import INTERACTIVE_IN_A_ROW, Places, Turn, Worker

log = logging.getLogger("whisperd.model")

# In the background: one is aligned, others are ready or under way. Where the model's file names no alignment heads,
# half of all are: 450 MB a window of large-v3.
_MOST_READINGS = 4


class _OfLanguages:
    """Asked by `detect_language` for the logits behind its one token, which were computed before."""

    def __init__(self, whisper: Whisper, logits: Tensor) -> None:
        self.dims = whisper.dims
        self.is_multilingual = whisper.is_multilingual
        self.num_languages = whisper.num_languages
        self._logits = logits

    def logits(self, tokens: Tensor, features: Tensor) -> Tensor:
        return self._logits[None]


def language_of(features: Tensor, whisper: Whisper, decoder: Decoder) -> Pieces[tuple[Tensor, dict[str, float]]]:
    """Return the language's token and the probability of each language's code, for `(n_audio_ctx, n_audio_state)`."""
    tokenizer = get_tokenizer(whisper.is_multilingual, num_languages=whisper.num_languages)
    logits = yield from decoder.read_through([tokenizer.sot], features)
    tokens, probabilities = detect_language(_OfLanguages(whisper, logits), features[None], tokenizer)
    return tokens[0].cpu(), probabilities[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What `find_alignment` wants of a text that was read against its audio, on the CPU and nothing more: many wait.

    `wanted` is how much each token wants each moment of the audio, of the alignment heads alone: `(heads, tokens, audio
    positions)`, before the softmax. `probabilities` are those of the text's own tokens.
    """

    wanted: Tensor
    probabilities: Tensor


class _Logits:
    """Stands for the logits of a text: `find_alignment` reads its tokens' probabilities off them, in these three steps.

    It asks for the rows from `first` on and the vocabulary before `end`, for their softmax, and there for each token.
    """

    def __init__(self, reading: Reading, text_tokens: Sequence[int], *, first: int, end: int) -> None:
        self._reading, self._text_tokens = reading, text_tokens
        self._part = slice(first, None), slice(None, end)

    def __getitem__(self, part: tuple[slice, slice]) -> _Logits:
        assert part == self._part, "find_alignment asks for what was read"
        return self

    def softmax(self, dim: int) -> _Probabilities:
        assert dim == -1, "over the vocabulary"
        return _Probabilities(self._reading, self._text_tokens)


class _Probabilities:
    def __init__(self, reading: Reading, text_tokens: Sequence[int]) -> None:
        self._reading, self._text_tokens = reading, text_tokens

    def __getitem__(self, each: tuple[Any, Sequence[int]]) -> Tensor:
        places, tokens = each
        assert [*places] == [*range(len(self._text_tokens))], "each token behind the ones before it"
        assert [*tokens] == [*self._text_tokens], "and of this text"
        return self._reading.probabilities


class _CrossAttention:
    def __init__(self) -> None:
        self.hook: Callable[[None, None, tuple[Tensor]], None] | None = None

    def register_forward_hook(self, hook: Callable[[None, None, tuple[Tensor]], None]) -> Any:
        self.hook = hook
        return SimpleNamespace(remove=lambda: None)


class _OfTimes:
    """Asked by `find_alignment` to read the text; has its hook told what was read already.

    It has one layer, with the alignment heads of all of the model's.
    """

    device = torch.device("cpu")
    dims = SimpleNamespace(n_text_layer=1)

    def __init__(self, reading: Reading, logits: _Logits) -> None:
        self.alignment_heads = torch.ones(1, len(reading.wanted)).to_sparse()
        self._cross_attention = _CrossAttention()
        self.decoder = SimpleNamespace(blocks=[SimpleNamespace(cross_attn=self._cross_attention)])
        self._reading, self._logits = reading, logits

    def __call__(self, mel: Tensor, tokens: Tensor) -> list[_Logits]:
        hook = self._cross_attention.hook
        assert hook is not None, "find_alignment hooks every layer"
        hook(None, None, (self._reading.wanted[None],))
        return [self._logits]


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
        self.places = Places(_MOST_READINGS)  # taken for as long as there is a reading
        self._heads = [(layer, head) for layer, head in whisper.alignment_heads.indices().T.tolist()]
        # Upstream compiles its alignment on first use: for that no job without word times need wait.
        self.worker.begin(compile_alignment)
        # A process that ends under its compiler aborts: wait for it.
        atexit.register(self.worker.call, Turn(), lambda: None)

    def read(self, tokenizer: Any, text_tokens: list[int], features: Tensor, decoder: Decoder) -> Pieces[Reading]:
        """Read a text as `find_alignment` has it read, against features `(n_audio_ctx, n_audio_state)`."""
        tokens = [*tokenizer.sot_sequence, tokenizer.no_timestamps, *text_tokens, tokenizer.eot]
        wanted = torch.empty(len(self._heads), len(tokens), len(features))

        def keep(layer: int, of_layer: Tensor) -> None:
            places = [place for place, (number, _) in enumerate(self._heads) if number == layer]
            if places:
                wanted[places] = of_layer[[self._heads[place][1] for place in places]].cpu()

        logits = yield from decoder.read_through(tokens, features, keep)
        # As it does: behind what comes before the text, of all that is text.
        probabilities = logits[len(tokenizer.sot_sequence) :, : tokenizer.eot].softmax(dim=-1)
        return Reading(wanted=wanted, probabilities=probabilities[[*range(len(text_tokens))], text_tokens].cpu())

    def align(
        self, turn: Turn, reading: Reading, tokenizer: Any, text_tokens: list[int], num_frames: int, **options: Any
    ) -> list[WordTiming]:
        """Return upstream's word timings from a text that has been read."""

        def work() -> list[WordTiming]:
            logits = _Logits(reading, text_tokens, first=len(tokenizer.sot_sequence), end=tokenizer.eot)
            model = _OfTimes(reading, logits)
            timings: list[WordTiming] = find_alignment(
                model, tokenizer, text_tokens, torch.empty(0), num_frames, **options
            )
            return timings

        return self.worker.call(turn, work)
