"""Words and shapes for people: durations, sizes, columns, and nothing that a terminal would obey."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Marks that turn the direction of text; the other format characters are needed (Persian, emoji) and harmless.
_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_UNSAFE_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")  # controls, lone surrogates, line and paragraph separators
_COLOURS = {"red": "31", "green": "32", "yellow": "33", "cyan": "36", "dim": "2", "bold": "1"}


def safe(text: object) -> str:
    """Return `text` with everything a terminal would obey made visible: names and texts come from strangers."""
    words = str(text)
    return words if words.isprintable() else "".join(map(_visible, words))


def _visible(character: str) -> str:
    import unicodedata

    if character not in _TURNING and unicodedata.category(character) not in _UNSAFE_CATEGORIES:
        return character
    return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(character) or f"\\u{ord(character):04x}"


def paint(text: str, colour: str | None, *, colours: bool) -> str:
    """Return `text` in a colour, or as it is where colours are off."""
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if colours and colour else text


def duration(seconds: float) -> str:
    """Return seconds as people say them: `0.4 s`, `12 s`, `3 min 20 s`, `2 h 5 min`, `3 days 4 h`."""
    if seconds < 9.95:
        return f"{max(seconds, 0):.1f} s".replace(".0 ", " ")
    whole = round(seconds)
    for size, unit, part_size, part_unit in ((86400, "day", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            count, rest = divmod(whole, size)
            name = unit + "s" if unit == "day" and count > 1 else unit
            parts = rest // part_size
            return f"{count} {name} {parts} {part_unit}" if parts else f"{count} {name}"
    return f"{whole} s"


def clock(seconds: float) -> str:
    """Return a place in a recording: `0:07`, `12:34`, `1:02:03`."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def bar(part: float, width: int = 24) -> str:
    """Return how much of a whole is there as a bar of plain characters, for any terminal."""
    full = round(width * min(1.0, max(0.0, part)))
    return f"[{'#' * full}{'.' * (width - full)}]"


def size(count: float) -> str:
    """Return bytes as people say them: `900 B`, `12 kB`, `3.4 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.1f} {unit}" if unit in ("MB", "GB") and count < 99.95 else f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def number(value: Any) -> str:
    """Return a number with thousands marked, `-` for none."""
    if not isinstance(value, int | float):
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def plural(count: int, one: str, many: str = "") -> str:
    """Return `1 job`, `2 jobs`; `many` where an s is not enough."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def columns(rows: Sequence[Sequence[str]], *, right: Iterable[int] = ()) -> list[str]:
    """Return rows with their cells aligned; the cells of the columns in `right` stand at their right edge."""
    widths = [max(display_width(row[index]) for row in rows) for index in range(len(rows[0]))]
    rights = set(right)

    def cell(text: str, index: int) -> str:
        gap = " " * (widths[index] - display_width(text))
        return gap + text if index in rights else text + gap

    return ["  ".join(cell(text, index) for index, text in enumerate(row)).rstrip() for row in rows]


def display_width(text: str) -> int:
    """Return how many columns `text` takes: East Asian wide characters take two, combining marks none."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(
        0 if unicodedata.combining(each) else 2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text
    )


def shortened(text: str, width: int) -> str:
    """Return `text` in at most `width` columns, with `…` where it was cut."""
    if display_width(text) <= width:
        return text
    while text and display_width(text) > width - 1:
        text = text[:-1] if len(text) <= width else text[:width]
    return text + "…"


def to_json(value: Mapping[str, Any]) -> str:
    """Return JSON on one line: real letters, but nothing that a terminal would obey."""
    import json

    text = json.dumps(value, ensure_ascii=False)
    # json.dumps escapes C0 itself; DEL, C1 and the rest come from names and texts.
    return text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def map_in(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the map under a key; an empty one where a daemon of another version has none there."""
    value = values.get(key)
    return value if isinstance(value, Mapping) else {}


def model_words(model: Mapping[str, Any]) -> str:
    """Return `model small on cuda:0 (float16)`, or what keeps it from that."""
    name, state = safe(model.get("name", "?")), str(model.get("state", "?"))
    if state == "ready":
        dtype = f" ({safe(model['dtype'])})" if model.get("dtype") else ""
        return f"model {name} on {safe(model.get('device', '?'))}{dtype}"
    if state == "downloading" and model.get("progress") is not None:
        return f"model {name} is being downloaded ({model['progress']:.0%})"
    words = {"unloaded": "not loaded", "failed": "failed to load"}.get(state, safe(state))
    return f"model {name} {words}"
