"""Teacher forcing: our decoder is fed what openai-whisper said, and its logits are compared at every step.

Texts that are equal show that no choice fell the other way; this shows how far each was from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from whisper.decoding import ApplyTimestampRules, DecodingTask, PyTorchInference

from bench.fidelity import Answer
from whisperd.model.batch.batcher import Request
from whisperd.model.batch.caches import Cache
from whisperd.model.batch.pieces import Pieces, at_once
from whisperd.model.batch.windows import KeptWindows
from whisperd.model.engine import Engine
from whisperd.model.worker import Turn

_TOGETHER = 8  # windows of different length step beside each other, as they do at work
_FAR_BELOW = 1e4  # too unlikely for a rule to prefer it


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The likeliest token that the filters allow, and by how much that was decided; infinite without a rival.

    `gap` is to the second likeliest token. `lead` is that of all timestamps together over the likeliest text: where it
    is positive, a rule allows timestamps alone.
    """

    best: int
    second: int
    gap: float
    lead: float

    @property
    def margin(self) -> float:
        return min(self.gap, abs(self.lead))


def choice_of(filters: Sequence[Any], logits: Tensor, tokens: Tensor) -> Choice:
    """Return what openai-whisper's filters leave to be chosen: of `(1, vocabulary)` logits behind `(1, n)` tokens."""
    logits, lead = logits.clone(), math.inf
    for each in filters:
        if isinstance(each, ApplyTimestampRules):
            begin = each.tokenizer.timestamp_begin
            # The rule comes last in this filter. With timestamps out of the question the text shows as it was before.
            text = logits.clone()
            text[:, begin:] -= _FAR_BELOW
            each.apply(text, tokens)
            each.apply(logits, tokens)
            lead = float(logits[0, begin:].logsumexp(-1) - text[0, :begin].max())
        else:
            each.apply(logits, tokens)
    values, (best, second) = logits[0].topk(2)
    return Choice(best=int(best), second=int(second), gap=float(values[0] - values[1]), lead=lead)


@dataclass(slots=True, kw_only=True)
class _Window:
    mel: Tensor
    prompt: list[int]
    filters: Sequence[Any]
    choices: list[Choice] = field(default_factory=list)


class Choices:
    """All that openai-whisper answered and, with `gaps`, every token that it chose greedily, which slows it."""

    def __init__(self, *, gaps: bool = True) -> None:
        self.gaps = gaps
        self.answers: dict[str, list[Answer]] = {}  # by recording, try by try
        self.windows: list[_Window] = []  # greedy ones

    @contextmanager
    def listening(self, recording: str) -> Iterator[None]:
        """Hear of each window of a recording that is transcribed in this process."""
        run, logits = DecodingTask.run, PyTorchInference.logits
        answers = self.answers.setdefault(recording, [])
        window: _Window | None = None

        def listening_run(task: DecodingTask, mel: Tensor) -> Any:
            nonlocal window
            window = None
            if self.gaps and task.options.temperature == 0 and task.options.beam_size is None:
                window = _Window(mel=mel[0], prompt=list(task.initial_tokens), filters=task.logit_filters)
                self.windows.append(window)
            (result,) = run(task, mel)
            margins = [choice.margin for choice in window.choices] if window else []
            answers.append(answer_in(vars(result), margins=margins))
            return [result]

        def listening_logits(inference: PyTorchInference, tokens: Tensor, features: Tensor) -> Tensor:
            heard: Tensor = logits(inference, tokens, features)
            if window is not None:
                window.choices.append(choice_of(window.filters, heard[:, -1], tokens))
            return heard

        DecodingTask.run, PyTorchInference.logits = listening_run, listening_logits
        try:
            yield
        finally:
            DecodingTask.run, PyTorchInference.logits = run, logits


def answer_in(result: dict[str, Any], *, margins: Sequence[float] = ()) -> Answer:
    """Return what the fields of a `DecodingResult` say."""
    names = ("tokens", "temperature", "avg_logprob", "no_speech_prob")
    return Answer(margins=margins, **{name: result[name] for name in names})


def describe(choices: Choices, changes: Sequence[float]) -> str:
    """Return in a line how near openai-whisper's choices were, and by how much our decoder sees them otherwise."""
    margins = sorted(choice.margin for window in choices.windows for choice in window.choices)
    return (
        f"{len(margins)} greedy choices in {len(choices.windows)} windows, the nearest ones won by "
        f"{', '.join(f'{margin:.1e}' for margin in margins[:5])}; fed the same tokens our gaps differ by at most "
        f"{max(changes):.1e} (median {sorted(changes)[len(changes) // 2]:.1e}, above 1e-3: "
        f"{sum(change > 1e-3 for change in changes)})"
    )


def replay(choices: Choices, engine: Engine) -> list[float]:
    """Return by how much our decoder, fed the same tokens, sees each choice otherwise."""
    starts = range(0, len(choices.windows), _TOGETHER)
    return [change for n in starts for change in _changes(choices.windows[n : n + _TOGETHER], engine)]


@torch.inference_mode()
def _changes(windows: list[_Window], engine: Engine) -> Iterator[float]:
    """Feed some windows their tokens side by side; yield the change of each choice."""
    decoder = engine.decoder
    row_cache, window_cache = decoder.row_cache(len(windows)), decoder.window_cache(len(windows))
    for slot, window in enumerate(windows):
        features, read_at = _features(window.mel, engine), (len(window.prompt) - 1,)
        offer = partial(_offer, window_cache, slot)
        prompt = at_once(decoder.begin(window.prompt, read_at, features, offer))
        for layer, (keys, values) in enumerate(prompt.said):
            row_cache.put(layer, slot, keys, values)
        yield _change(window, 0, prompt.logits)
    # All that are left step; a window that is over repeats its last token, so that the others keep their slots.
    for step in range(1, max(len(window.choices) for window in windows)):
        at = [min(step, len(window.choices)) - 1 for window in windows]
        tokens = engine.kernels.send([window.choices[n].best for window, n in zip(windows, at, strict=True)])
        positions = [len(window.prompt) + n for window, n in zip(windows, at, strict=True)]
        logits = decoder.step(tokens, positions, row_cache, window_cache, None)
        for slot, window in enumerate(windows):
            if step < len(window.choices):
                yield _change(window, step, logits[slot : slot + 1])


def _offer(cache: Cache, slot: int, layer: int, keys: Tensor, values: Tensor) -> None:
    cache.put(layer, slot, keys, values)


def _features(mel: Tensor, engine: Engine) -> Tensor:
    def use(features: Tensor) -> Pieces[Tensor]:
        yield
        return features

    features: Tensor = engine.batcher.call(Request(Turn(), KeptWindows().window(mel.cpu()), use=use))
    return features


def _change(window: _Window, step: int, logits: Tensor) -> float:
    """Return by how much our logits `(1, vocabulary)` move a choice: its gap, and the lead of the timestamps."""
    theirs, said = window.choices[step], [choice.best for choice in window.choices[:step]]
    ours = choice_of(window.filters, logits.cpu(), torch.tensor([[*window.prompt, *said]]))
    gap = float(logits[0, theirs.best] - logits[0, theirs.second])
    pairs = ((gap, theirs.gap), (ours.lead, theirs.lead))
    return max((abs(mine - yours) for mine, yours in pairs if math.isfinite(yours)), default=0.0)
