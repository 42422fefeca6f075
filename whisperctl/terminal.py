"""The two streams of the command line: data on stdout, and on stderr notes and one status line that comes and goes."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TextIO

from whisperctl.words import safe, shortened

_CLEAR_LINE = "\r\x1b[K"


class Screen:
    """Writes data, notes and the status line so that they never run into each other."""

    def __init__(
        self,
        *,
        out: TextIO | None = None,
        err: TextIO | None = None,
        quiet: bool = False,
        verbose: bool = False,
        progress: bool = True,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._out = out or sys.stdout
        self._err = err or sys.stderr
        self._quiet = quiet
        self.verbose = verbose and not quiet
        dumb = environ.get("TERM") == "dumb"
        plain = bool(environ.get("NO_COLOR")) or dumb
        self.is_terminal = self._out.isatty()
        self.colours = self.is_terminal and not plain
        self.has_status = progress and not quiet and not dumb and self._err.isatty()
        # Where more than lines can be drawn.
        self.is_canvas = self.is_terminal and not dumb and "utf" in (self._out.encoding or "").lower()
        self._status = ""
        self._shown = False
        self._trouble = ""

    def drawable(self, text: str, plain: str) -> str:
        """Return `text`, or `plain` where stdout's encoding has no letters for it."""
        try:
            text.encode(self._out.encoding or "utf-8")
        except UnicodeEncodeError:
            return plain
        return text

    @property
    def columns(self) -> int | None:
        """The width of the terminal that data goes to; None when it goes elsewhere."""
        return _columns(self._out) if self.is_terminal else None

    def data(self, text: str) -> None:
        """Write a line to stdout at once, as it is: the caller has made it safe where a terminal shows it."""
        self._hide()
        self._out.write(text + "\n")
        self._out.flush()
        self._draw()

    def text(self, text: str) -> None:
        """Write a line that came from a recording or a name: harmless on a terminal, unchanged elsewhere."""
        self.data(safe(text) if self.is_terminal else text)

    def note(self, text: str) -> None:
        """Tell something on stderr, unless told to be quiet."""
        if not self._quiet:
            self._tell(text)

    def error(self, text: str) -> None:
        """Tell on stderr, in any case, what went wrong."""
        self._tell(f"whisperctl: {text}")

    def _tell(self, text: str) -> None:
        self._hide()
        self._err.write(safe(text) + "\n")
        self._err.flush()
        self._draw()

    def status(self, words: str) -> None:
        """Show what is being waited for; "" takes the line away."""
        self._status = words
        self._draw()

    def trouble(self, words: str) -> None:
        """Show this instead of the status, until it is called with "" (`Client`'s `notify`; any thread)."""
        self._trouble = words
        self._draw()

    def _draw(self) -> None:
        if not self.has_status:
            return
        words = self._trouble or self._status
        if not words:
            self._hide()
            return
        # One column stays free: a full line would wrap, and its first half could not be taken away.
        line = shortened(safe(words), _columns(self._err) - 1)
        self._err.write(f"{_CLEAR_LINE}{line}")
        self._err.flush()
        self._shown = True

    def _hide(self) -> None:
        if self._shown:
            self._err.write(_CLEAR_LINE)
            self._err.flush()
            self._shown = False


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
