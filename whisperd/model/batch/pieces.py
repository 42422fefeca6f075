"""Long work as a generator that computes a piece at each `next`: between two of them others have their turn."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeAlias, TypeVar

T = TypeVar("T")

Pieces: TypeAlias = Generator[None, None, T]  # returns what came of it


def at_once(pieces: Pieces[T]) -> T:
    """Compute all pieces that are left and return what came of them."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            result: T = end.value
            return result
