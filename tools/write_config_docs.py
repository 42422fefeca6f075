"""Write the table of settings in docs/configuration.md from the settings themselves; `--check` only compares."""

from __future__ import annotations

import sys
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any

from whisperd.daemon.config import SETTINGS

DOCUMENT = Path(__file__).parents[1] / "docs" / "configuration.md"
BEGIN = "<!-- settings: written by tools/write_config_docs.py -->"
END = "<!-- end of settings -->"


def table() -> str:
    """Return the table, a row a setting."""
    rows = ["| key | type | default | flag | what it does |", "|---|---|---|---|---|"]
    rows += [_row(setting) for setting in SETTINGS.values()]
    return "\n".join(rows)


def _row(setting: Field[Any]) -> str:
    about = setting.metadata
    flag = f"`--{setting.name.replace('_', '-')}`" if about["flag"] else ""
    text = about["help"]
    if "choices" in about and not all(choice in text for choice in about["choices"]):
        text += f" One of {', '.join(f'`{choice}`' for choice in about['choices'])}."
    if "low" in about:
        text += f" At least {about['low']}" + (f", at most {about['high']}." if "high" in about else ".")
    kind = {"str": "text", "Path": "path", "int": "whole number", "float": "number", "bool": "true or false"}
    shown = kind.get(str(setting.type).removesuffix(" | None"), "list")
    return f"| `{setting.name}` | {shown} | {_default(setting)} | {flag} | {text} |".replace("|  |", "| |")


def _default(setting: Field[Any]) -> str:
    value = setting.default
    if value is MISSING:
        return "see above"
    if value is None:
        return str(setting.metadata["default"])
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return "`[" + ", ".join(f'"{item}"' for item in value) + "]`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value:.15g}`"


def renewed(text: str) -> str:
    """Return the document with a fresh table between its marks. Raises `ValueError` when a mark is missing."""
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"{DOCUMENT} must hold the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> int:
    """Write, or with `--check` compare; return the exit code."""
    old = DOCUMENT.read_text()
    new = renewed(old)
    if "--check" in sys.argv[1:]:
        if old != new:
            print(f"{DOCUMENT} is not up to date: run python tools/write_config_docs.py", file=sys.stderr)
        return int(old != new)
    DOCUMENT.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
