"""openai-whisper's logit filters for many rows at once.

What is the same for every window (suppressed tokens, the blank, the first timestamp) is read off upstream's own filter
objects, by running them once. What depends on the tokens so far is `ApplyTimestampRules`, done here for all rows in a
few operations: upstream's takes several trips to the device a row.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor
from whisper.decoding import ApplyTimestampRules, DecodingTask

_FAR_BELOW = -1e4  # so unlikely that no rule prefers it, and not forbidden
_NEVER = -torch.inf
# Timestamps (a second) before the known end of speech from which a text may end: the times of tokens and of speech
# differ by less.
_LAST_WORDS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What one kind of options forbids: `(vocabulary,)`, -inf where forbidden, else 0. Compared by identity."""

    first: Tensor  # at the first token of a window
    later: Tensor  # at every other
    timed: bool  # False without timestamps
    time_begin: int
    eot: int


def key_of(task: DecodingTask) -> Hashable:
    """Return what the rules of a task depend on, within one model."""
    options = task.options
    suppressed = options.suppress_tokens
    return (
        suppressed if isinstance(suppressed, str | None) else tuple(suppressed),
        options.suppress_blank,
        options.without_timestamps,
        options.max_initial_timestamp,
    )


def rules_of(task: DecodingTask, *, vocabulary: int, device: torch.device) -> Rules:
    """Read the rules off the task's filters."""
    tokenizer = task.tokenizer
    prompt = list(task.initial_tokens)
    # Two words said: no rule about pairs or order applies.
    word = tokenizer.encode(" a")[0]
    masks = []
    for tokens in (prompt, [*prompt, word, word]):
        logits = torch.zeros(1, vocabulary)
        logits[:, tokenizer.timestamp_begin :] = _FAR_BELOW
        for logit_filter in task.logit_filters:
            logit_filter.apply(logits, torch.tensor([tokens]))
        masks.append(torch.zeros(vocabulary).masked_fill_(logits[0].isneginf(), _NEVER).to(device))
    return Rules(
        first=masks[0],
        later=masks[1],
        timed=any(isinstance(each, ApplyTimestampRules) for each in task.logit_filters),
        time_begin=tokenizer.timestamp_begin,
        eot=tokenizer.eot,
    )


@dataclass(frozen=True, slots=True)
class Times:
    """What the timestamps so far allow next: they come in pairs (except before the end) and never go back."""

    last_was_time: bool = False
    latest: int = -1  # the last timestamp, as its distance from the first one; -1: none yet
    no_time: bool = False
    no_text: bool = False

    @property
    def lowest(self) -> int:
        """The lowest timestamp allowed. The end of a segment may not be its beginning."""
        if self.latest < 0:
            return 0
        return self.latest if self.no_text else self.latest + 1

    def after(self, token: int, *, first: bool, time_begin: int) -> Times:
        """Return what is allowed after one more token."""
        if token < time_begin:
            return Times(False, self.latest)
        pair = first or self.last_was_time  # upstream counts what was before the first token as a timestamp
        return Times(True, token - time_begin, no_time=pair, no_text=not pair)


class Bound(Enum):
    """What is known of the end of a text behind the end of a segment, where it is known when speech ends.

    No rule of openai-whisper's, and in mode exact always `FREE`.
    """

    FREE = auto()
    GOES_ON = auto()  # somebody speaks on: the text may not end
    ENDS = auto()  # nobody speaks any more: no segment may begin


def bound_of(times: Times, speech_until: int) -> Bound:
    """Return what holds behind these times; `speech_until` as the distance from the first timestamp, 0 if unknown."""
    if not speech_until:
        return Bound.FREE
    if times.no_time and times.latest < speech_until - _LAST_WORDS:
        return Bound.GOES_ON
    return Bound.ENDS if times.no_text and times.latest >= speech_until else Bound.FREE


@dataclass(frozen=True, slots=True, kw_only=True)
class Filtered:
    """Filtered logits `(rows, vocabulary)`, but for the last rule: where `only_time`, text is forbidden too."""

    logits: Tensor
    only_time: Tensor
    best_text: Tensor
    best_text_at: Tensor
    best_time: Tensor
    best_time_at: Tensor
    time_total: Tensor  # logsumexp of the timestamps
    time_begin: int

    def best(self) -> tuple[Tensor, Tensor]:
        """Return the likeliest token of each row and its log probability."""
        text = self.logits[:, : self.time_begin]
        text_total = (text - self.best_text[:, None]).exp_().sum(-1).log_() + self.best_text
        total = torch.where(self.only_time, self.time_total, torch.logaddexp(text_total, self.time_total))
        # At a tie argmax takes the first: text.
        time_wins = self.only_time | (self.best_time > self.best_text)
        best = torch.where(time_wins, self.best_time, self.best_text)
        token = torch.where(time_wins, self.best_time_at + self.time_begin, self.best_text_at)
        return token, best - total

    def log_probabilities(self, rows: Sequence[int]) -> Tensor:
        """Return the log probabilities `(len(rows), vocabulary)` of some rows under all rules."""
        at = torch.tensor([*rows], device=self.logits.device)
        logits = self.logits[at]
        logits[:, : self.time_begin].masked_fill_(self.only_time[at][:, None], _NEVER)
        return logits.log_softmax(-1)


def apply_rules(
    logits: Tensor, rules: Sequence[Rules], times: Sequence[Times], *, first: bool, bounds: Sequence[Bound]
) -> Filtered:
    """Filter logits in place; the sequences have an entry for each row. `first`: of all rows or of none."""
    device, time_begin = logits.device, rules[0].time_begin
    if all(each is rules[0] for each in rules):
        logits += rules[0].first if first else rules[0].later
    else:
        logits += torch.stack([each.first if first else each.later for each in rules])
    text, time = logits[:, :time_begin], logits[:, time_begin:]
    going_on = [row for row, bound in enumerate(bounds) if bound is Bound.GOES_ON]
    if going_on:
        logits[:, rules[0].eot].index_fill_(0, torch.tensor(going_on, device=device), _NEVER)
    rows_without_text = [row for row, each in enumerate(times) if each.no_text and rules[row].timed]
    if rows_without_text:
        # Not the end of the text: that may follow a single timestamp.
        logits[:, : rules[0].eot].index_fill_(0, torch.tensor(rows_without_text, device=device), _NEVER)
    count = time.shape[1]
    lowest = [
        (count if each.no_time or bound is Bound.ENDS else each.lowest) if rule.timed else 0
        for rule, each, bound in zip(rules, times, bounds, strict=True)
    ]
    too_low = torch.arange(count, device=device) < torch.tensor(lowest, device=device)[:, None]
    time.masked_fill_(too_low, _NEVER)
    best_text, best_text_at = text.max(-1)
    best_time, best_time_at = time.max(-1)
    time_total = time.logsumexp(-1)
    only_time = time_total > best_text
    if not all(rule.timed for rule in rules):
        only_time &= torch.tensor([rule.timed for rule in rules], device=device)
    return Filtered(
        logits=logits,
        only_time=only_time,
        best_text=best_text,
        best_text_at=best_text_at,
        best_time=best_time,
        best_time_at=best_time_at,
        time_total=time_total,
        time_begin=time_begin,
    )
