"""When a transcript counts as openai-whisper's: the criterion, on numbers alone.

At temperature 0 in float32 all that is said is equal. Where a recording first differs, openai-whisper's own choice must
have been a near-tie, which other roundings may turn; that may happen once in a run, and in a longer one in one window
of a thousand. The comparison of a recording ends there, since prompts and seeks are others from then on, and where both
try again above temperature 0.

In fewer bits (`reduced_verdict`) each window may say something else; what counts is how many words are wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import zip_longest

# How much a choice may be won by, in logits, to be a near-tie; and by how much ours may move that.
NEAR_TIE = 1e-3
CLOSE = 1e-4  # scores, and what decides at a threshold
_ONE_WINDOW_OF = 1000
# How much fewer bits may change the word error rate, in points.
REDUCED_POINTS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What was said of a window. `margins`: by how much each of openai-whisper's greedy choices was won, the end's too.

    Ours has none; nor has what beams found.
    """

    tokens: Sequence[int]
    temperature: float
    avg_logprob: float
    no_speech_prob: float
    margins: Sequence[float] = ()


@dataclass(slots=True, kw_only=True)
class Comparison:
    """One recording, as far as it can be compared."""

    windows: int = 0
    score_changes: list[float] = field(default_factory=list)
    drawn: bool = False  # tried again above temperature 0, where it ends
    difference: str = ""  # where it ends with one
    near: bool = False  # openai-whisper's own choice was a near-tie there

    def differ(self, what: str, *, near: bool = False) -> None:
        self.difference, self.near = what, near


def compare(theirs: Sequence[Answer], ours: Sequence[Answer], *, thresholds: tuple[float, float]) -> Comparison:
    """Compare the answers about a recording, window by window and try by try.

    `thresholds`, for the mean log probability and for silence, decide what is asked next; infinite where there is none.
    """
    found, decided_by = Comparison(), math.inf
    for one, other in zip_longest(theirs, ours):
        if one is None or other is None or one.temperature != other.temperature:
            what = f"other tries behind window {found.windows} (a threshold was {decided_by:.1e} away)"
            found.differ(what, near=decided_by < CLOSE)
            return found
        if one.temperature:
            found.drawn = True
            return found
        found.windows += 1
        if (at := _first_difference(one.tokens, other.tokens)) is not None:
            margin = one.margins[at] if at < len(one.margins) else math.inf
            what = (
                f"window {found.windows}, token {at}: {list(one.tokens[at : at + 5])}, won by {margin:.1e}, and "
                f"{list(other.tokens[at : at + 5])}"
            )
            found.differ(what, near=margin < NEAR_TIE or decided_by < CLOSE)
            return found
        pairs = ((one.avg_logprob, other.avg_logprob), (one.no_speech_prob, other.no_speech_prob))
        found.score_changes += [abs(mine - yours) for mine, yours in pairs]
        decided_by = min(abs(mine - limit) for (mine, _), limit in zip(pairs, thresholds, strict=True))
    return found


def verdict(comparisons: Sequence[Comparison], gap_changes: Sequence[float]) -> tuple[bool, str]:
    """Return whether the criterion is met, and a line that says by what.

    `gap_changes`: by how much our decoder, fed what openai-whisper said, sees each of its choices otherwise.
    """
    windows = sum(each.windows for each in comparisons)
    allowed = max(1, windows // _ONE_WINDOW_OF)  # one alone is no rate
    near = sum(each.near for each in comparisons)
    wrong = sum(bool(each.difference) and not each.near for each in comparisons)
    score_changes = [change for each in comparisons for change in each.score_changes]
    met = (
        windows > 0
        and not wrong
        and near <= allowed
        # One by one: what is no number is not within anything.
        and all(change <= CLOSE for change in score_changes)
        and all(change <= NEAR_TIE for change in gap_changes)
    )
    return met, (
        f"fidelity {'met' if met else 'MISSED'}: {windows} windows compared; {near} recordings part at a near-tie of "
        f"openai-whisper's own (allowed: {allowed}), {wrong} elsewhere, {sum(each.drawn for each in comparisons)} end "
        f"with what is drawn; scores differ by at most {max(score_changes, default=0.0):.1e}, gaps by "
        f"{max(gap_changes, default=0.0):.1e}"
    )


def reduced_verdict(
    theirs: Sequence[Sequence[Answer]], ours: Sequence[Sequence[Answer]], *, errors: tuple[float, float], words: int
) -> tuple[bool, str]:
    """Return whether fewer bits change the word error rate by little enough, and a line that says by how much.

    `theirs`, in float32, and `ours` have the answers about each recording, `errors` both error rates in percent of so
    many words.
    """
    windows, equal = 0, 0
    for one, other in zip(theirs, ours, strict=True):
        tokens, same = _last_tries(one), _last_tries(other)
        windows += len(tokens)
        equal += sum(block.size for block in SequenceMatcher(None, tokens, same, autojunk=False).get_matching_blocks())
    wanted, heard = errors
    met = windows > 0 and abs(heard - wanted) <= REDUCED_POINTS
    return met, (
        f"reduced precision {'met' if met else 'MISSED'}: {heard:.2f} % of {words} words are wrong, "
        f"{heard - wanted:+.2f} points against float32 (allowed: {REDUCED_POINTS}); "
        f"{equal} of {windows} windows ({equal / max(1, windows):.0%}) have the same tokens"
    )


def _last_tries(answers: Sequence[Answer]) -> list[tuple[int, ...]]:
    """Return the tokens that each window was left with: a window is tried again warmer, the next one begins cold."""
    followed = zip_longest(answers, answers[1:])
    return [tuple(one.tokens) for one, after in followed if after is None or after.temperature <= one.temperature]


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Return where they part, the end of the shorter one included."""
    pairs = zip_longest(one, other)
    return next((at for at, (mine, yours) in enumerate(pairs) if mine != yours), None)
