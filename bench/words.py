"""How much of what was said was heard."""

from __future__ import annotations

import re


def words(text: str) -> list[str]:
    """Return the words of a text as a comparison wants them: lower case, no punctuation."""
    return re.sub(r"[^\w\s']", " ", text.lower()).split()


def word_error_rate(wanted: str, heard: str) -> float:
    """Return the edit distance between the words of two texts, per word of `wanted`."""
    reference, hypothesis = words(wanted), words(heard)
    row = list(range(len(hypothesis) + 1))
    for i, word in enumerate(reference, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(hypothesis, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (word != other))
    return row[-1] / max(1, len(reference))
