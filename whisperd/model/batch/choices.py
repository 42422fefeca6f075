"""What rows say next: chosen on the device for all of them at once, and read by the host, which may be later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from whisperd.model.batch.kernels import Kernels
from whisperd.model.batch.rules import Filtered
from whisperd.model.batch.search import Beams, Offer, Pick, Row, Search

# Each row with its window's search, and how many tokens it has said.
Choosers = Sequence[tuple[Row, Search, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What rows may say next, on its way to the host.

    `tokens` `(rows,)` are on the device, so that the next step can begin before they are read. None where there are
    beams: what follows what is found out by the host.
    """

    tokens: Tensor | None
    read: Callable[[], list[Offer]]


def choose(filtered: Filtered, choosers: Choosers, kernels: Kernels) -> Choice:
    """Have each row choose as its search does. Waits for nothing."""
    beams = {n: search.size for n, (_, search, _) in enumerate(choosers) if isinstance(search, Beams)}
    picks = [n for n in range(len(choosers)) if n not in beams]
    tokens = read_picks = read_beams = None
    if picks:
        tokens, scores = _pick(filtered, choosers, kernels)
        read_picks = kernels.receive(torch.stack([tokens.double(), scores.double()]))
    if beams:
        read_beams = kernels.receive(_widen(filtered, choosers, beams, kernels))

    def read() -> list[Offer]:
        offers: dict[int, Offer] = {}
        if read_picks is not None:
            each_token, each_score = read_picks()
            offers |= {n: ([int(each_token[n])], [each_score[n]]) for n in picks}
        if read_beams is not None:
            for (n, size), some, sums in zip(beams.items(), *read_beams(), strict=True):
                offers[n] = ([int(token) for token in some[: size + 1]], sums[: size + 1])
        return [offers[n] for n in range(len(choosers))]

    return Choice(tokens=None if beams else tokens, read=read)


def _pick(filtered: Filtered, choosers: Choosers, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """Return a token for each row, drawn or the likeliest one, and its log probability; of beams any."""
    drawn: dict[int, tuple[float, float]] = {}
    for n, (row, search, said) in enumerate(choosers):
        if isinstance(search, Pick) and search.temperature:
            drawn[n] = (search.temperature, search.uniform(row, said))
    if not drawn:
        return filtered.best()
    at = kernels.send([*drawn])
    tokens, scores = _draw(filtered.log_probabilities(at), kernels.send([*drawn.values()], torch.float64))
    if len(drawn) == len(choosers):
        return tokens, scores
    likeliest, their_scores = filtered.best()
    return likeliest.index_copy(0, at, tokens), their_scores.index_copy(0, at, scores)


def _draw(log_probabilities: Tensor, wishes: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token for each row where the sum of probabilities passes its number; return its log probability too.

    `wishes` is `(rows, 2)`: temperature and number.
    """
    temperatures, uniforms = wishes.T[:, :, None]
    sums = (log_probabilities / temperatures.float()).softmax(-1).double().cumsum(-1)
    total = sums[:, -1:]
    # Never the total itself: behind it nothing is likely.
    wanted = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    # Where no number is one (all is forbidden, or the number format overflows) it finds a place behind the vocabulary.
    # That fails the row's own job, once it has ended: here it would fail all, and on a GPU end the process.
    tokens = torch.searchsorted(sums, wanted, right=True).clamp_(max=sums.shape[-1] - 1)
    return tokens[:, 0], log_probabilities.gather(1, tokens)[:, 0]


def _widen(filtered: Filtered, choosers: Choosers, beams: dict[int, int], kernels: Kernels) -> Tensor:
    """Return the likeliest tokens of each beam and the sums of log probabilities with them, `(2, beams, tokens)`."""
    likeliest: Any = filtered.log_probabilities(kernels.send([*beams])).topk(max(beams.values()) + 1)
    scores = kernels.send([choosers[n][0].score for n in beams], torch.float32)
    sums = scores[:, None] + likeliest.values
    return torch.stack([likeliest.indices.double(), sums.double()])
