"""openai-whisper's logit filters for many rows at once.

What is the same for every window (suppressed tokens, the blank, the first timestamp) is read off upstream's own filter
objects, by running them once. What depends on the tokens so far is `ApplyTimestampRules`, done here for all rows in a
few operations: upstream's takes several trips to the device a row.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from whisper.decoding import ApplyTimestampRules, DecodingTask

from whisperd.model.batch.pasts import Times

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
    may_end: bool  # False where the end of the text itself is suppressed
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
        masks.append(torch.zeros(vocabulary).masked_fill_(logits[0].isneginf(), _NEVER))
    first, later = masks
    return Rules(
        first=first.to(device),
        later=later.to(device),
        timed=any(isinstance(each, ApplyTimestampRules) for each in task.logit_filters),
        may_end=not later[tokenizer.eot].isneginf(),
        time_begin=tokenizer.timestamp_begin,
        eot=tokenizer.eot,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Filtered:
    """Filtered logits `(rows, vocabulary)`, but for the text that the last rules forbid.

    Where `no_text`, nothing before the end of the text is allowed, and where `only_time` no text at all.
    """

    logits: Tensor
    rules: Rules  # of any row: where timestamps begin is the same for all
    no_text: Tensor | None  # None: nowhere
    only_time: Tensor
    best_text: Tensor
    best_text_at: Tensor
    best_time: Tensor
    best_time_at: Tensor
    time_total: Tensor  # logsumexp of the timestamps

    def best(self) -> tuple[Tensor, Tensor]:
        """Return the likeliest token of each row and its log probability."""
        time_begin, eot = self.rules.time_begin, self.rules.eot
        text = self.logits[:, :time_begin]
        text_total = (text - self.best_text[:, None]).exp_().sum(-1).log_() + self.best_text
        if self.no_text is not None:
            text_total = torch.where(self.no_text, self.logits[:, eot:time_begin].logsumexp(-1), text_total)
        total = torch.where(self.only_time, self.time_total, torch.logaddexp(text_total, self.time_total))
        # At a tie argmax takes the first: text.
        time_wins = self.only_time | (self.best_time > self.best_text)
        best = torch.where(time_wins, self.best_time, self.best_text)
        token = torch.where(time_wins, self.best_time_at + time_begin, self.best_text_at)
        return token, best - total

    def log_probabilities(self, rows: Tensor) -> Tensor:
        """Return the log probabilities `(len(rows), vocabulary)` of some rows under all rules."""
        time_begin, eot = self.rules.time_begin, self.rules.eot
        logits, only_time = self.logits[rows], self.only_time[rows][:, None]
        no_text = only_time if self.no_text is None else only_time | self.no_text[rows][:, None]
        logits[:, :eot].masked_fill_(no_text, _NEVER)
        logits[:, eot:time_begin].masked_fill_(only_time, _NEVER)
        return logits.log_softmax(-1)


def apply_rules(
    logits: Tensor,
    rules: Sequence[Rules],
    times: Times | None,
    *,
    timed: Tensor | None = None,
    speech_until: Tensor | None = None,
) -> Filtered:
    """Filter logits in place. `rules` has an entry for each row; `times` is None for the first tokens of windows.

    `timed` says which rows have timestamps where some have none. `speech_until` is where speech is known to end, as a
    distance from the first timestamp, 0 for rows of which it is not known. What follows from it is no rule of
    openai-whisper's: behind a segment that ends earlier the text goes on, behind one that ends later no other begins.
    It is for rows that may end (`Rules.may_end`): others would be left without any token.
    """
    time_begin, eot = rules[0].time_begin, rules[0].eot
    if all(each is rules[0] for each in rules):
        logits += rules[0].first if times is None else rules[0].later
    else:
        logits += torch.stack([each.first if times is None else each.later for each in rules])
    time = logits[:, time_begin:]
    no_text = None
    if times is not None:
        count = time.shape[1]
        no_time, no_text, lowest = times.no_time, times.no_text, times.lowest
        if timed is not None:
            no_time, no_text, lowest = no_time & timed, no_text & timed, lowest * timed
        lowest = lowest.masked_fill(no_time, count)
        if speech_until is not None:
            known = speech_until > 0
            logits[:, eot].masked_fill_(known & no_time & (times.latest < speech_until - _LAST_WORDS), _NEVER)
            lowest.masked_fill_(known & no_text & (times.latest >= speech_until), count)
        time.masked_fill_(torch.arange(count, device=logits.device) < lowest[:, None], _NEVER)
    best_text, best_text_at = logits[:, :time_begin].max(-1)
    if no_text is not None:
        # Not the end of the text: that may follow a single timestamp.
        best_end, best_end_at = logits[:, eot:time_begin].max(-1)
        best_text = torch.where(no_text, best_end, best_text)
        best_text_at = torch.where(no_text, best_end_at + eot, best_text_at)
    best_time, best_time_at = time.max(-1)
    time_total = time.logsumexp(-1)
    only_time = time_total > best_text
    if timed is not None:
        only_time &= timed
    return Filtered(
        logits=logits,
        rules=rules[0],
        no_text=no_text,
        only_time=only_time,
        best_text=best_text,
        best_text_at=best_text_at,
        best_time=best_time,
        best_time_at=best_time_at,
        time_total=time_total,
    )
