"""A small plot out of block characters."""

from __future__ import annotations

from collections.abc import Sequence

_BLOCKS = " ▁▂▃▄▅▆▇█"


def plot(values: Sequence[float | None], *, height: int, most: float = 0.0) -> list[str]:
    """Return `height` lines, the topmost first, with a column a value; the top of the plot is the greatest of all.

    `most` is the least that the top may stand for. None leaves a column empty; 0 draws its lowest mark, so that
    nothing measured and nothing there can be told apart.
    """
    top = max([most, *(value for value in values if value is not None)])
    eighths = [0 if value is None else max(1, round(value / top * height * 8)) if top > 0 else 1 for value in values]
    return ["".join(_BLOCKS[min(8, max(0, each - 8 * row))] for each in eighths) for row in reversed(range(height))]
