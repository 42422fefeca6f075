"""The windows that are being decoded, all of them stepping together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from whisper.decoding import DecodingTask

from whisperd.model.batch.decoder import Decoder, Routing
from whisperd.model.batch.kernels import Kernels
from whisperd.model.batch.replays import Replays
from whisperd.model.batch.rules import Bound, Filtered, Rules, apply_rules, bound_of, key_of, rules_of
from whisperd.model.batch.search import Beams, Offer, Outcome, Row, Search

Owner = TypeVar("Owner")


@dataclass(slots=True, kw_only=True, eq=False)
class _Group(Generic[Owner]):
    """The rows of one window; its place in the list of groups is its slot in the windows' cache."""

    owner: Owner
    task: DecodingTask
    search: Search
    rules: Rules
    no_speech: float
    rows: list[Row]
    speech_until: int  # where speech is known to end, as a timestamp's distance from the first; 0 where it is not
    said: int = 0  # tokens so far, the same for all rows that go on

    @property
    def position(self) -> int:
        """Where the last token stands in the context."""
        return int(self.task.sample_begin) + self.said - 1

    @property
    def over(self) -> bool:
        """True when nothing more can be or need be said."""
        room = self.said < self.task.sample_len and self.task.sample_begin + self.said <= self.task.n_ctx
        return not room or self.search.complete(self.rows)

    def bound(self, row: Row) -> Bound:
        """Return what is known of the end of a row's text."""
        # Behind its first timestamp a window that holds no speech after all may still say nothing.
        return bound_of(row.times, self.speech_until) if len(row.tokens) > 1 else Bound.FREE


class LiveRows(Generic[Owner]):
    """Steps the rows of all live windows. Not for several threads; wants `torch.inference_mode`.

    The rows in use are always the first ones of the cache, likewise the windows: a slot that becomes free takes the
    last one.
    """

    def __init__(self, decoder: Decoder, kernels: Kernels, *, windows: int, rows: int) -> None:
        self._decoder = decoder
        self._replays = Replays(decoder, kernels) if kernels.replays_steps else None
        self._device = kernels.device
        self._row_cache = decoder.row_cache(rows)
        self._window_cache = decoder.window_cache(windows)
        self._groups: list[_Group[Owner]] = []
        self._rows: list[tuple[Row, _Group[Owner]]] = []
        self._routing: Routing | None = None
        self._routing_is_stale = False
        self._known_rules: dict[Hashable, Rules] = {}

    @property
    def owners(self) -> list[Owner]:
        """Whose windows are live, the longest first."""
        return [group.owner for group in self._groups]

    @property
    def count(self) -> int:
        """How many rows step together."""
        return len(self._rows)

    def shrink(self, *, windows: int, rows: int) -> None:
        """Give back the memory of slots beyond these, and beyond those in use."""
        if self._replays is not None:
            self._replays.forget()
        self._window_cache.resize(max(windows, len(self._groups)), used=len(self._groups))
        self._row_cache.resize(max(rows, self.count), used=self.count)

    def begin(
        self, owner: Owner, task: DecodingTask, search: Search, features: Tensor, *, speech_until: int = 0
    ) -> Outcome | None:
        """Take in a window: its prompt, then its first token. Returns what is found if that is all, else None.

        Where it is known that somebody speaks until `speech_until`, counted in timestamps (20 ms), the text ends there:
        not behind an earlier segment, and no segment begins behind a later one.
        """
        window, first = len(self._groups), self.count
        self._grow(window + 1, first + search.size)
        rules = self._rules(task)
        prompt = task.initial_tokens
        read_at = (task.sot_index, len(prompt) - 1)
        logits = self._decoder.begin(prompt, read_at, features, self._row_cache, first, self._window_cache, window)
        no_speech_token = task.tokenizer.no_speech
        no_speech = float("nan")
        if no_speech_token is not None:
            no_speech = float(logits[0].softmax(-1)[no_speech_token])
        self._row_cache.copy([(first, first + n) for n in range(1, search.size)], len(prompt))
        rows = [Row(slot=first + n, number=n) for n in range(search.size)]
        group = _Group(
            owner=owner,
            task=task,
            search=search,
            rules=rules,
            no_speech=no_speech,
            rows=rows,
            speech_until=speech_until,
        )
        self._groups.append(group)
        self._rows += [(row, group) for row in rows]
        self._routing_is_stale = True
        ended = self._choose(logits[1:].repeat(search.size, 1), [group], first=True)
        return ended[0][1] if ended else None

    def step(self) -> list[tuple[Owner, Outcome]]:
        """Let each row say one token more; return the windows that have ended."""
        tokens = [row.tokens[-1] for row, _ in self._rows]
        positions = [group.position for _, group in self._rows]
        if self._routing_is_stale:
            self._routing, self._routing_is_stale = self._route(), False
        step = self._decoder.step if self._replays is None else self._replays.step
        logits = step(tokens, positions, self._row_cache, self._window_cache, self._routing)
        return self._choose(logits, list(self._groups), first=False)

    def drop(self, owner: Owner) -> None:
        """Give up an owner's window, if it is live."""
        for group in [group for group in self._groups if group.owner is owner]:
            self._remove(group)

    def _choose(self, logits: Tensor, groups: list[_Group[Owner]], *, first: bool) -> list[tuple[Owner, Outcome]]:
        """Choose the next token of the rows of `groups` (all live ones, or the newest with its first token)."""
        rows = self._rows[-len(logits) :]
        filtered = apply_rules(
            logits,
            [group.rules for _, group in rows],
            [row.times for row, _ in rows],
            first=first,
            bounds=[group.bound(row) for row, group in rows],
        )
        offers = dict(zip((id(row) for row, _ in rows), _offers(filtered, rows), strict=True))
        copies, ended_slots, length = list[tuple[int, int]](), list[int](), 0
        for group in groups:
            was = group.rows
            group.rows, new_copies = group.search.advance(was, [offers[id(row)] for row in was])
            if new_copies:
                copies += new_copies
                length = max(length, group.position + 1)
            group.said += 1
            for row in group.rows:
                self._rows[row.slot] = (row, group)
            kept = {row.slot for row in group.rows}
            ended_slots += [row.slot for row in was if row.slot not in kept]
        self._row_cache.copy(copies, length)
        self._close(ended_slots)  # after the copies: it moves rows to other slots
        ended = [(group, self._outcome(group)) for group in groups if group.over]
        for group, _ in ended:
            self._remove(group)
        return [(group.owner, outcome) for group, outcome in ended]

    def _outcome(self, group: _Group[Owner]) -> Outcome:
        return Outcome(candidates=group.search.candidates(group.rows), no_speech=group.no_speech)

    def _remove(self, group: _Group[Owner]) -> None:
        self._close([row.slot for row in group.rows])
        slot, last = self._groups.index(group), len(self._groups) - 1
        if slot != last:
            self._window_cache.copy([(last, slot)])
            self._groups[slot] = self._groups[last]
        self._groups.pop()
        self._routing_is_stale = True

    def _close(self, slots: list[int]) -> None:
        for slot in sorted(slots, reverse=True):
            row, group = self._rows.pop()
            if slot != len(self._rows):
                self._row_cache.copy([(row.slot, slot)], group.position + 1)
                row.slot = slot
                self._rows[slot] = (row, group)
        self._routing_is_stale = True

    def _grow(self, windows: int, rows: int) -> None:
        for cache, wanted, used in (
            (self._window_cache, windows, len(self._groups)),
            (self._row_cache, rows, self.count),
        ):
            if cache.slots < wanted:
                cache.resize(max(wanted, cache.slots * 3 // 2), used=used)

    def _route(self) -> Routing | None:
        if all(group.rows[0].slot == slot and len(group.rows) == 1 for slot, group in enumerate(self._groups)):
            return None
        widest = max(len(group.rows) for group in self._groups)
        rows = [[row.slot for row in group.rows] for group in self._groups]
        filled = [each + [each[0]] * (widest - len(each)) for each in rows]
        places = [0] * self.count
        for window, each in enumerate(rows):
            for place, slot in enumerate(each):
                places[slot] = window * widest + place
        return Routing(rows=torch.tensor(filled, device=self._device), places=torch.tensor(places, device=self._device))

    def _rules(self, task: DecodingTask) -> Rules:
        key = key_of(task)
        rules = self._known_rules.pop(key, None)
        if rules is None:
            rules = rules_of(task, vocabulary=self._decoder.vocabulary, device=self._device)
        self._known_rules[key] = rules
        while len(self._known_rules) > _KNOWN_RULES:
            del self._known_rules[next(iter(self._known_rules))]
        return rules


_KNOWN_RULES = 16  # kinds of options whose rules are kept (0.4 MB each)


def _offers(filtered: Filtered, rows: Sequence[tuple[Row, _Group[Owner]]]) -> list[Offer]:
    """Return what each row may say next, as its window's search wants it."""
    offers: dict[int, Offer] = {}
    greedy, drawn, beams = list[int](), dict[int, tuple[float, float]](), dict[int, int]()
    for n, (row, group) in enumerate(rows):
        search = group.search
        if isinstance(search, Beams):
            beams[n] = search.size
        elif search.temperature:
            drawn[n] = (search.temperature, search.uniform(row))
        else:
            greedy.append(n)
    if greedy:
        # In one tensor: each `tolist` waits for the device.
        tokens, log_probabilities = torch.stack([part.double() for part in filtered.best()]).tolist()
        offers |= {n: ([int(tokens[n])], [log_probabilities[n]]) for n in greedy}
    if drawn:
        offers |= zip(drawn, _draw(filtered.log_probabilities([*drawn]), [*drawn.values()]), strict=True)
    if beams:
        likeliest = filtered.log_probabilities([*beams]).topk(max(beams.values()) + 1)
        scores = torch.tensor([rows[n][0].score for n in beams], device=filtered.logits.device)
        sums = (scores[:, None] + likeliest.values).tolist()
        for n, tokens, each in zip(beams, likeliest.indices.tolist(), sums, strict=True):
            offers[n] = (tokens[: beams[n] + 1], each[: beams[n] + 1])
    return [offers[n] for n in range(len(rows))]


def _draw(log_probabilities: Tensor, wishes: Sequence[tuple[float, float]]) -> list[Offer]:
    """Draw a token for each row, by its temperature and number: where the sum of probabilities passes the number."""
    device = log_probabilities.device
    temperatures, uniforms = torch.tensor(wishes, dtype=torch.float64, device=device).T[:, :, None]
    sums = (log_probabilities / temperatures.float()).softmax(-1).double().cumsum(-1)
    total = sums[:, -1:]
    # Never the total itself: behind it nothing is likely.
    wanted = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(sums, wanted, right=True)
    chosen = log_probabilities.gather(1, tokens)
    return [([token], [each]) for token, each in zip(tokens[:, 0].tolist(), chosen[:, 0].tolist(), strict=True)]
