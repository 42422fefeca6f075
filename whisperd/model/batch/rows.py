"""The windows that are being decoded, all of them stepping together."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor
from whisper.decoding import DecodingTask

from whisperd.model.batch.choices import Choice, choose
from whisperd.model.batch.decoder import Decoder, Prompt, Routing
from whisperd.model.batch.kernels import Kernels
from whisperd.model.batch.pasts import Pasts
from whisperd.model.batch.pieces import Pieces, at_once
from whisperd.model.batch.replays import Replays
from whisperd.model.batch.rules import Rules, apply_rules, key_of, rules_of
from whisperd.model.batch.search import Outcome, Row, Search

_KNOWN_RULES = 16  # kinds of options whose rules are kept (0.4 MB each)

Owner = TypeVar("Owner")


@dataclass(slots=True, kw_only=True, eq=False)
class _Group(Generic[Owner]):
    """The rows of one window; its place in the list of groups is its slot in the windows' cache."""

    owner: Owner
    task: DecodingTask
    search: Search
    rules: Rules
    no_speech: Callable[[], float]
    rows: list[Row]
    speech_until: int  # where speech is known to end, as a timestamp's distance from the first; 0 where it is not
    # Tokens so far, the same for all rows that go on: chosen on the device, and of these known here.
    chosen: int = 0
    said: int = 0
    overflowed: bool = False  # there are NaN among its numbers, or may be

    @property
    def position(self) -> int:
        """Where the last token stands in the context."""
        return int(self.task.sample_begin) + self.chosen - 1

    @property
    def may_go_on(self) -> bool:
        """True when there is room for a token more, whatever the last one turns out to have been."""
        return self._has_room(self.chosen)

    @property
    def over(self) -> bool:
        """True when nothing more can be or need be said."""
        return not self._has_room(self.said) or self.search.complete(self.rows)

    def _has_room(self, tokens: int) -> bool:
        return bool(tokens < self.task.sample_len and self.task.sample_begin + tokens <= self.task.n_ctx)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Begun(Generic[Owner]):
    """A window whose prompt is being read; its place among those is that of its slot behind the live windows'."""

    owner: Owner


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unread(Generic[Owner]):
    """What was chosen and is not known here yet."""

    rows: list[tuple[Row, _Group[Owner]]]
    choice: Choice

    @property
    def groups(self) -> list[_Group[Owner]]:
        return [*dict.fromkeys(group for _, group in self.rows)]


Ended = list[tuple[Owner, Outcome]]


class LiveRows(Generic[Owner]):
    """Steps the rows of all live windows. Not for several threads; wants `torch.inference_mode`.

    The rows in use are always the first ones of the cache, likewise the windows: a slot that becomes free takes the
    last one. Windows that are being begun have the slots behind those.

    Where the device need not wait for the host (`Kernels.reads_late`), a step begins with tokens that only the device
    knows, and what the step before chose is read then. So a window's end is seen one step late; its rows have stepped
    once more by then, which nobody looks at. While beams are live, all is read at once. A window's first token is read
    by the next step in any case.
    """

    def __init__(self, decoder: Decoder, kernels: Kernels, *, windows: int, rows: int) -> None:
        self._decoder, self._kernels = decoder, kernels
        self._replays = Replays(decoder, kernels) if kernels.replays_steps else None
        self._row_cache = decoder.row_cache(rows)
        self._window_cache = decoder.window_cache(windows)
        self._pasts = Pasts(rows, kernels.device)
        self._groups: list[_Group[Owner]] = []
        self._begun: list[_Begun[Owner]] = []
        self._rows: list[tuple[Row, _Group[Owner]]] = []
        self._unread = deque[_Unread[Owner]]()
        self._routing: Routing | None = None
        self._routing_is_stale = False
        self._known_rules: dict[Hashable, Rules] = {}
        # So far: steps, in them windows, and tokens that rows have said.
        self.steps = self.window_steps = self.tokens = 0

    @property
    def owners(self) -> list[Owner]:
        """Whose windows are live, the longest first."""
        return [group.owner for group in self._groups]

    @property
    def beginning(self) -> list[Owner]:
        """Whose windows have a slot already, and no row yet."""
        return [begun.owner for begun in self._begun]

    @property
    def count(self) -> int:
        """How many rows step together."""
        return len(self._rows)

    @property
    def _need_not_know(self) -> bool:
        """True where a step may begin before it is known here what was chosen last."""
        late = self._kernels.reads_late and all(each.choice.tokens is not None for each in self._unread)
        return late and all(group.may_go_on for group in self._groups)

    def shrink(self, *, windows: int, rows: int) -> None:
        """Give back the memory of slots beyond these, and beyond those in use."""
        if self._replays is not None:
            self._replays.forget()
        self._resize_windows(min(self._window_cache.slots, max(windows, self._used_windows)))
        self._resize_rows(min(self._row_slots, max(rows, self.count)))

    def begin(
        self, owner: Owner, task: DecodingTask, search: Search, features: Tensor, *, speech_until: int = 0
    ) -> None:
        """As `begin_in_pieces`, in one piece."""
        at_once(self.begin_in_pieces(owner, task, search, features, speech_until=speech_until))

    def begin_in_pieces(
        self, owner: Owner, task: DecodingTask, search: Search, features: Tensor, *, speech_until: int = 0
    ) -> Pieces[None]:
        """Take in a window: its prompt, a layer at each `next`, then its first token, which the next step learns of.

        In between others may step, begin, end and be dropped; once its owner is dropped it may not go on.

        Where it is known that somebody speaks until `speech_until`, counted in timestamps (20 ms), the text ends there:
        not behind an earlier segment, and no segment begins behind a later one.
        """
        self._grow(self._used_windows + 1, 0)
        begun = _Begun(owner=owner)
        self._begun.append(begun)

        def offer(layer: int, keys: Tensor, values: Tensor) -> None:
            self._window_cache.put(layer, self._slot_of(begun), keys, values)

        tokens = task.initial_tokens
        try:
            prompt = yield from self._decoder.begin(tokens, (task.sot_index, len(tokens) - 1), features, offer)
            self._take_in(begun, task, search, prompt, speech_until)
        except Exception:
            self._forget(begun)
            raise

    def _take_in(
        self, begun: _Begun[Owner], task: DecodingTask, search: Search, prompt: Prompt, speech_until: int
    ) -> None:
        """Let a window whose prompt was read be live: give it rows, and have them choose their first token."""
        first, length, rules = self.count, len(task.initial_tokens), self._rules(task)
        slots = slice(first, first + search.size)
        self._grow(0, slots.stop)
        for layer, (keys, values) in enumerate(prompt.said):
            self._row_cache.put(layer, first, keys, values)
        self._row_cache.spread(first, slice(first + 1, slots.stop), length)
        self._pasts.begin(slots, rules.time_begin)
        rows = [Row(slot=first + n, number=n) for n in range(search.size)]
        group = _Group(
            owner=begun.owner,
            task=task,
            search=search,
            rules=rules,
            no_speech=self._no_speech(prompt.logits[0], task),
            rows=rows,
            speech_until=speech_until if rules.may_end else 0,
        )
        slot = self._slot_of(begun)
        if slot > len(self._groups):  # the one next to the live windows is where it will be
            self._window_cache.swap(len(self._groups), slot)
            self._begun[slot - len(self._groups)] = self._begun[0]
        self._begun.pop(0)
        self._groups.append(group)
        self._rows += [(row, group) for row in rows]
        self._routing_is_stale = True
        self._choose(prompt.logits[1:].repeat(search.size, 1), slots)

    def step(self) -> Ended[Owner]:
        """Let each row say one token more; return the windows that have ended, with what was found.

        Where windows had ended before, it returns them at once. An error concerns all windows that were live before.
        """
        if not self._need_not_know and (ended := self._read()):
            return ended
        self.steps += 1
        self.window_steps += len(self._groups)
        tokens = self._pasts.tokens(self.count)
        positions = [group.position for _, group in self._rows]
        if self._routing_is_stale:
            self._routing, self._routing_is_stale = self._route(), False
        step = self._decoder.step if self._replays is None else self._replays.step
        logits = step(tokens, positions, self._row_cache, self._window_cache, self._routing)
        self._choose(logits, slice(0, self.count))
        return self._read(but=1 if self._need_not_know else 0)

    def drop(self, owner: Owner) -> None:
        """Give up an owner's window, if it is live or being begun."""
        for group in [group for group in self._groups if group.owner is owner]:
            group.overflowed |= group.chosen != group.said  # nobody will read it
            self._remove(group)
        for begun in [begun for begun in self._begun if begun.owner is owner]:
            self._forget(begun)

    # -- on the device ---------------------------------------------------------------------------------------------

    def _no_speech(self, logits: Tensor, task: DecodingTask) -> Callable[[], float]:
        token = task.tokenizer.no_speech
        return (lambda: float("nan")) if token is None else self._kernels.receive(logits.softmax(-1)[token])

    def _choose(self, logits: Tensor, slots: slice) -> None:
        """Have rows choose their next token: all live ones, or those of the newest window its first."""
        rows = self._rows[slots]
        rules = [group.rules for _, group in rows]
        first, time_begin = not rows[0][1].chosen, rules[0].time_begin
        # Behind its first timestamp a window that holds no speech after all may still say nothing.
        until = [group.speech_until if group.chosen > 1 else 0 for _, group in rows]
        filtered = apply_rules(
            logits,
            rules,
            None if first else self._pasts.times(slots, time_begin),
            timed=None if all(each.timed for each in rules) else self._kernels.send([each.timed for each in rules]),
            speech_until=self._kernels.send(until) if any(until) else None,
        )
        choice = choose(filtered, [(row, group.search, group.chosen) for row, group in rows], self._kernels)
        if choice.tokens is not None:
            self._pasts.follow(slots, choice.tokens, time_begin)
        unread = _Unread(rows=rows, choice=choice)
        for group in unread.groups:
            group.chosen += 1
        self._unread.append(unread)

    # -- on the host -----------------------------------------------------------------------------------------------

    def _read(self, *, but: int = 0) -> Ended[Owner]:
        """Learn what was chosen, all but the newest so many choices."""
        ended: Ended[Owner] = []
        while len(self._unread) > but:
            ended += self._learn(self._unread.popleft())
        if not self._rows:
            self._unread.clear()
        return ended

    def _learn(self, unread: _Unread[Owner]) -> Ended[Owner]:
        """Let rows say what they have chosen, and close those that have ended."""
        offers = dict(zip((id(row) for row, _ in unread.rows), unread.choice.read(), strict=True))
        groups = [group for group in unread.groups if group in self._groups]
        copies, ended_slots, length = list[tuple[int, int]](), list[int](), 0
        for group in groups:
            was = group.rows
            self.tokens += len(was)
            offered = [offers[id(row)] for row in was]
            group.overflowed |= any(math.isnan(scores[0]) for _, scores in offered)
            group.rows, new_copies = group.search.advance(was, offered)
            if new_copies:
                copies += new_copies
                length = max(length, group.position)
            group.said += 1
            for row in group.rows:
                self._rows[row.slot] = (row, group)
            kept = {row.slot for row in group.rows}
            ended_slots += [row.slot for row in was if row.slot not in kept]
        if unread.choice.tokens is None:
            self._row_cache.copy(copies, length)
            self._tell(groups, copies)
        self._close(ended_slots)  # after the copies: it moves rows to other slots
        ended = [(group, self._outcome(group)) for group in groups if group.over]
        for group, _ in ended:
            self._remove(group)
        return [(group.owner, outcome) for group, outcome in ended]

    def _tell(self, groups: Sequence[_Group[Owner]], copies: Sequence[tuple[int, int]]) -> None:
        """Tell the device what was chosen here."""
        rows = [row for group in groups for row in group.rows]
        if not rows:
            return
        self._pasts.copy(copies)
        slots, tokens = self._kernels.send([[row.slot for row in rows], [row.tokens[-1] for row in rows]])
        self._pasts.follow(slots, tokens, groups[0].rules.time_begin)

    def _outcome(self, group: _Group[Owner]) -> Outcome:
        return Outcome(candidates=group.search.candidates(group.rows), no_speech=group.no_speech())

    def _remove(self, group: _Group[Owner]) -> None:
        # Not only the rows that go on: where learning was cut short, others stand there too.
        self._close([slot for slot, (_, owner) in enumerate(self._rows) if owner is group])
        slot, last = self._groups.index(group), len(self._groups) - 1
        if slot != last:
            self._window_cache.copy([(last, slot)])
            self._groups[slot] = self._groups[last]
        self._groups.pop()
        self._routing_is_stale = True
        if self._begun:  # theirs must go on from the last live one's
            self._window_cache.copy([(last + len(self._begun), last)])
            self._begun.insert(0, self._begun.pop())

    def _forget(self, begun: _Begun[Owner]) -> None:
        if begun not in self._begun:
            return
        slot, last = self._slot_of(begun), self._used_windows - 1
        if slot != last:
            self._window_cache.copy([(last, slot)])
            self._begun[slot - len(self._groups)] = self._begun[-1]
        self._begun.pop()

    def _slot_of(self, begun: _Begun[Owner]) -> int:
        return len(self._groups) + self._begun.index(begun)

    def _close(self, slots: list[int]) -> None:
        for slot in sorted(slots, reverse=True):
            if self._rows[slot][1].overflowed:
                self._clear(slot)
            row, group = self._rows.pop()
            if slot != len(self._rows):
                self._row_cache.copy([(row.slot, slot)], group.position)
                if group.overflowed:
                    self._clear(row.slot)
                self._pasts.copy([(row.slot, slot)])
                row.slot = slot
                self._rows[slot] = (row, group)
        self._routing_is_stale = True

    def _clear(self, slot: int) -> None:
        """Leave no NaN for the next row: what lies behind its own end counts nothing, and that times NaN is NaN."""
        self._row_cache.clear(slot)

    def _grow(self, windows: int, rows: int) -> None:
        if windows > self._window_cache.slots:
            self._resize_windows(max(windows, self._window_cache.slots * 3 // 2))
        if rows > self._row_slots:
            self._resize_rows(max(rows, self._row_slots * 3 // 2))

    @property
    def _row_slots(self) -> int:
        return min(self._row_cache.slots, self._pasts.slots)

    @property
    def _used_windows(self) -> int:
        return len(self._groups) + len(self._begun)

    def _resize_windows(self, slots: int) -> None:
        self._window_cache.resize(slots, used=self._used_windows)

    def _resize_rows(self, slots: int) -> None:
        self._row_cache.resize(slots, used=self.count)
        self._pasts.resize(slots, used=self.count)

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
        return Routing(rows=self._kernels.send(filled), places=self._kernels.send(places))

    def _rules(self, task: DecodingTask) -> Rules:
        key = key_of(task)
        rules = self._known_rules.pop(key, None)
        if rules is None:
            rules = rules_of(task, vocabulary=self._decoder.vocabulary, device=self._kernels.device)
        self._known_rules[key] = rules
        while len(self._known_rules) > _KNOWN_RULES:
            del self._known_rules[next(iter(self._known_rules))]
        return rules
