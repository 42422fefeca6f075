"""How much of what was spoken a transcript holds, and what in it nobody seems to have said."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from whisperd.model.speech import Stretch

# Whisper's times are good to about half a second, and pauses are shorter than that inside a sentence.
MIN_PAUSE_S = 0.5
MIN_GAP_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Seconds in which speech was detected, seconds of them inside segments with text, and the spoken rest.

    `gaps` are stretches of speech of at least `MIN_GAP_S` that no segment covers.
    """

    speech_s: float
    transcribed_s: float
    gaps: list[Stretch]

    def to_wire(self) -> dict[str, Any]:
        """Return the map that a transcript carries; times in seconds, to the hundredth."""
        return {
            "speech_s": round(self.speech_s, 2),
            "transcribed_s": round(self.transcribed_s, 2),
            "gaps": [[round(gap.start_s, 2), round(gap.end_s, 2)] for gap in self.gaps],
        }


def joined(stretches: Iterable[Stretch], *, pause_s: float = 0.0) -> list[Stretch]:
    """Return the stretches in order, those that overlap or lie at most `pause_s` apart made one."""
    whole: list[Stretch] = []
    for stretch in sorted(stretches, key=lambda one: one.start_s):
        if whole and stretch.start_s - whole[-1].end_s <= pause_s:
            end_s = max(whole[-1].end_s, stretch.end_s)
            whole[-1] = Stretch(start_s=whole[-1].start_s, end_s=end_s)
        else:
            whole.append(stretch)
    return whole


def without(stretches: Sequence[Stretch], covered: Sequence[Stretch]) -> list[Stretch]:
    """Return what of `stretches` lies in none of `covered`; both in order and without overlaps."""
    left: list[Stretch] = []
    first = 0
    for stretch in stretches:
        start_s = stretch.start_s
        while first < len(covered) and covered[first].end_s <= start_s:
            first += 1
        for place in range(first, len(covered)):  # not a slice: of ten hours they are 10,000 times 10,000
            cover = covered[place]
            if cover.start_s >= stretch.end_s:
                break
            if cover.start_s > start_s:
                left.append(Stretch(start_s=start_s, end_s=cover.start_s))
            start_s = max(start_s, cover.end_s)
        if start_s < stretch.end_s:
            left.append(Stretch(start_s=start_s, end_s=stretch.end_s))
    return left


def length_s(stretches: Iterable[Stretch]) -> float:
    """Return how long the stretches are together."""
    return sum(stretch.end_s - stretch.start_s for stretch in stretches)


def coverage_of(speech: Sequence[Stretch], texts: Iterable[Stretch], *, asked_for: Sequence[Stretch]) -> Coverage:
    """Return how the segments with text, at `texts`, cover the `speech` inside what was `asked_for` (the clips)."""
    wanted = without(speech, without([Stretch(start_s=0.0, end_s=float("inf"))], asked_for))
    covered = joined(texts)
    left = without(wanted, covered)
    # A gap is looked for in sentences: shorter pauses belong to them.
    missing = without(joined(wanted, pause_s=MIN_PAUSE_S), covered)
    gaps = [gap for gap in missing if gap.end_s - gap.start_s >= MIN_GAP_S]
    return Coverage(speech_s=length_s(wanted), transcribed_s=length_s(wanted) - length_s(left), gaps=gaps)
