"""Writes each command's help into docs/cli.md, between its markers; `--check` only tells whether it stands there.

python tools/write_cli_docs.py [--check]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click

from whisperctl.cli import cli

PAGE = Path(__file__).parents[1] / "docs/cli.md"
WIDTH = 100
_BLOCK = re.compile(r"(<!-- help: (?P<name>[a-z ]+) -->\n)(.*?)(<!-- end of help -->\n)", re.DOTALL)


def help_text(name: str) -> str:
    """Return the help of `whisperctl` itself or of one of its commands, as `-h` prints it 100 columns wide."""
    settings = {**cli.context_settings, "terminal_width": WIDTH, "max_content_width": WIDTH}
    root = click.Context(cli, info_name="whisperctl", **settings)
    if name == "whisperctl":
        return cli.get_help(root)
    command = cli.get_command(root, name)
    if command is None:
        raise SystemExit(f"{PAGE.name} has a place for {name!r}, which is no command")
    return command.get_help(click.Context(command, parent=root, info_name=name))


def filled(page: str) -> str:
    """Return the page with every block filled anew. Exits when a command has no block."""
    places = {match["name"] for match in _BLOCK.finditer(page)}
    missing = {"whisperctl", *cli.list_commands(click.Context(cli))} - places
    if missing:
        raise SystemExit(f"{PAGE.name} has no place for the help of {', '.join(sorted(missing))}")
    return _BLOCK.sub(lambda match: f"{match[1]}```text\n{help_text(match['name'])}\n```\n{match[4]}", page)


def main() -> None:
    """Fill the page, or check it."""
    page = PAGE.read_text()
    wanted = filled(page)
    if "--check" in sys.argv[1:]:
        if page != wanted:
            raise SystemExit(f"{PAGE} is not up to date; run: python {sys.argv[0]}")
    elif page != wanted:
        PAGE.write_text(wanted)


if __name__ == "__main__":
    main()
