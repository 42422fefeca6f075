"""How a window's rows choose their tokens: the likeliest, drawn, or beams. openai-whisper's decoders, a window each.

A search only looks at numbers: the batch computes the same few for all rows of all windows, in one go.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from whisper.decoding import DecodingResult, DecodingTask
from whisper.utils import compression_ratio

from whisperd.protocol.errors import ErrorCode, WhisperdError


@dataclass(slots=True, kw_only=True, eq=False)
class Row:
    """A text in the making, in one slot of the rows' cache."""

    slot: int
    number: int = 0  # among the candidates of its window
    tokens: tuple[int, ...] = ()
    score: float = 0.0  # sum of log probabilities

    def follow(self, token: int, score: float) -> None:
        """Say one token more."""
        self.tokens += (token,)
        self.score = score


# What a row is offered: tokens with their log probabilities (Pick) or with the sums so far (beams), likeliest first.
Offer = tuple[list[int], list[float]]
Copies = list[tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The candidates of a window: what was sampled, with its sum of log probabilities."""

    candidates: list[tuple[tuple[int, ...], float]]
    no_speech: float


class Pick:
    """One row, or several that draw independently: `GreedyDecoder`.

    `uniforms` is `(tokens, rows)`: the numbers in [0, 1) that draw; None when greedy.
    """

    def __init__(self, task: DecodingTask, uniforms: NDArray[np.float64] | None) -> None:
        self.size: int = task.n_group
        self.temperature = float(task.options.temperature)
        self._tokenizer = task.tokenizer
        self._uniforms = uniforms
        self._ended: list[Row] = []

    def uniform(self, row: Row, said: int) -> float:
        """Return the number that draws the row's token behind `said` others."""
        assert self._uniforms is not None, "greedy rows draw nothing"
        return float(self._uniforms[said, row.number])

    def complete(self, rows: list[Row]) -> bool:
        """True once all rows have ended, `rows` being those that go on."""
        return not rows

    def advance(self, rows: list[Row], offers: Sequence[Offer]) -> tuple[list[Row], Copies]:
        """Return the rows that go on, and (source, target) slots to be copied (none)."""
        going_on = list[Row]()
        for row, ((token,), (log_probability,)) in zip(rows, offers, strict=True):
            row.follow(token, row.score + log_probability)
            (self._ended if token == self._tokenizer.eot else going_on).append(row)
        return going_on, []

    def candidates(self, rows: list[Row]) -> list[tuple[tuple[int, ...], float]]:
        """Return all texts, `rows` being those that were cut off."""
        everyone = sorted([*self._ended, *rows], key=lambda row: row.number)
        return [(row.tokens, row.score) for row in everyone]


class Beams:
    """`BeamSearchDecoder`: the best sequences of all beams' continuations, step by step."""

    def __init__(self, task: DecodingTask) -> None:
        self.size: int = task.n_group
        self._tokenizer = task.tokenizer
        self._decoder = task.decoder
        self._most: int = task.decoder.max_candidates
        self._prompt = tuple(task.initial_tokens)
        self._finished: dict[tuple[int, ...], float] = {}

    def complete(self, rows: list[Row]) -> bool:
        """True once enough sequences have ended; the beams that would go on may still be the best ones."""
        return len(self._finished) >= self._most

    def advance(self, rows: list[Row], offers: Sequence[Offer]) -> tuple[list[Row], Copies]:
        """Return the beams that go on, and (source, target) slots to be copied."""
        eot, scores, parents = self._tokenizer.eot, dict[tuple[int, ...], float](), dict[tuple[int, ...], Row]()
        for row, (tokens, sums) in zip(rows, offers, strict=True):
            for token, score in zip(tokens, sums, strict=True):
                scores[*row.tokens, token] = score
                parents.setdefault((*row.tokens, token), row)
        survivors: list[tuple[int, ...]] = []
        for sequence in sorted(scores, key=scores.__getitem__, reverse=True):
            if sequence[-1] != eot:
                survivors.append(sequence)
                if len(survivors) == self.size:
                    break
            elif len(self._finished) < self._most:
                self._finished[sequence] = scores[sequence]
        return self._place(rows, [(parents[each], each[-1], scores[each]) for each in survivors])

    def _place(self, rows: list[Row], children: list[tuple[Row, int, float]]) -> tuple[list[Row], Copies]:
        """Give each child a slot: the parent's to its first child, those of rows without children to the others."""
        parents = {id(parent) for parent, _, _ in children}
        free = [row.slot for row in rows if id(row) not in parents]
        going_on, copies, taken = list[Row](), Copies(), set[int]()
        for number, (parent, token, score) in enumerate(children):
            slot = parent.slot
            if slot in taken:
                slot = free.pop()
                copies.append((parent.slot, slot))
            taken.add(slot)
            child = Row(slot=slot, number=number, tokens=parent.tokens)
            child.follow(token, score)
            going_on.append(child)
        return going_on, copies

    def candidates(self, rows: list[Row]) -> list[tuple[tuple[int, ...], float]]:
        """Return the finished sequences, filled up with those that were cut off, as upstream's decoder does."""
        self._decoder.finished_sequences = [{(*self._prompt, *each): score for each, score in self._finished.items()}]
        width = len(self._prompt) + (len(rows[0].tokens) if rows else 0)
        preceding = torch.tensor([[*self._prompt, *row.tokens] for row in rows]).reshape(1, len(rows), width)
        sequences, sums = self._decoder.finalize(preceding, torch.tensor([[row.score for row in rows]]))
        return [
            (tuple(sequence.tolist()[len(self._prompt) :]), score)
            for sequence, score in zip(sequences[0], sums[0], strict=True)
        ]


Search = Pick | Beams


def search_of(task: DecodingTask, seed: int) -> Search:
    """Return the search that the task's options ask for.

    What is drawn is a function of `seed` alone, never of the process's generator: the same window gives the same text,
    whatever else runs and however often it is begun anew.
    """
    if task.options.beam_size is not None:
        return Beams(task)
    if task.options.temperature == 0:
        return Pick(task, None)
    generator = np.random.Generator(np.random.PCG64(seed))
    return Pick(task, generator.random((task.sample_len, task.n_group)))


def result_of(task: DecodingTask, outcome: Outcome) -> DecodingResult:
    """Return the best candidate as upstream's `DecodingTask.run` does at its end.

    Raises `WhisperdError` where a token was to be drawn and none had a probability, as upstream's drawing raises
    ValueError: `bad_request` where the options may have forbidden them all, else `internal`.
    """
    tokenizer: Any = task.tokenizer
    texts = []
    for sequence, _ in outcome.candidates:
        end = sequence.index(tokenizer.eot) if tokenizer.eot in sequence else len(sequence)
        texts.append(list(sequence[:end]))
    sums = [score for _, score in outcome.candidates]
    if task.options.temperature and any(map(math.isnan, sums)):
        raise _nothing_to_draw(task)
    (chosen,) = task.sequence_ranker.rank([texts], [sums])
    tokens = texts[chosen]
    text = tokenizer.decode(tokens).strip()
    return DecodingResult(
        audio_features=None,
        language=task.options.language,
        tokens=tokens,
        text=text,
        avg_logprob=sums[chosen] / (len(tokens) + 1),
        no_speech_prob=outcome.no_speech,
        temperature=task.options.temperature,
        compression_ratio=compression_ratio(text),
    )


def _nothing_to_draw(task: DecodingTask) -> WhisperdError:
    if task.options.suppress_tokens not in ("-1", "", None):
        return WhisperdError(
            ErrorCode.BAD_REQUEST,
            "options: suppress_tokens leaves no token that the text could go on or end with: suppress fewer",
        )
    return WhisperdError(
        ErrorCode.INTERNAL,
        "the model's numbers are beyond its number format in this recording: have an administrator set "
        'dtype = "float32", then submit it again',
    )
