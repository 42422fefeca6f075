"""The options that commands have in common, and what they add up to."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import click

from whisperctl.errors import DaemonUnreachable
from whisperctl.exits import Exit, exit_code
from whisperctl.link import Link
from whisperctl.terminal import Screen
from whisperd.protocol.errors import WhisperdError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from whisperctl.client import Client

Command = TypeVar("Command", bound=Callable[..., Any])


class Shell:
    """What every command works with: the client and the screen, made when first used from the common options."""

    def __init__(self) -> None:
        self.socket: str | None = None
        self.quiet = False
        self.verbose = False
        self.progress = True

    @cached_property
    def screen(self) -> Screen:
        """The two output streams."""
        return Screen(quiet=self.quiet, verbose=self.verbose, progress=self.progress)

    @cached_property
    def client(self) -> Client:
        """The connection to the daemon, made at the first request."""
        from whisperctl.client import Client

        return Client(self.socket, notify=self.screen.trouble)

    @cached_property
    def link(self) -> Link:
        """A connection without the Client around it, for the one command that must start fast."""
        return Link(self.socket)

    def each(self, job_ids: Sequence[int], action: Callable[[int], Exit]) -> Exit:
        """Do something with each job; an error is told and does not stop the others. Return the largest exit code."""
        worst = Exit.DONE
        for job_id in job_ids:
            try:
                worst = max(worst, action(job_id))
            except WhisperdError as error:
                message = str(error)
                known = len(job_ids) == 1 or re.search(rf"\bjob {job_id}\b", message)
                self.screen.error(message if known else f"job {job_id}: {message}")
                worst = max(worst, exit_code(error))
                if isinstance(error, DaemonUnreachable):
                    break
        return worst

    def close(self) -> None:
        """Leave the daemon, and the terminal as it was."""
        if "screen" in self.__dict__:
            self.screen.status("")
        for name in ("client", "link"):
            if name in self.__dict__:
                getattr(self, name).close()


def complete_file(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Have the shell complete a file's name by itself: our script stands in the place of its own completion."""
    from click.shell_completion import CompletionItem  # only who completes pays for it

    return [CompletionItem(incomplete, type="file")]


def _store(name: str, *, negate: bool = False) -> Callable[[click.Context, click.Parameter, Any], None]:
    def callback(context: click.Context, parameter: click.Parameter, value: Any) -> None:
        # An option may stand before the command or after it: the one that was given counts.
        if value:
            setattr(context.ensure_object(Shell), name, False if negate else value)

    return callback


def common_options(command: Command) -> Command:
    """Add `--socket`, `-q`, `-v` and `--no-progress`, which the group and every command understand."""
    for option in (
        click.option("--no-progress", is_flag=True, expose_value=False, callback=_store("progress", negate=True),
                     help="Show no status line."),
        click.option("-v", "--verbose", is_flag=True, expose_value=False, callback=_store("verbose"),
                     help="Tell more on stderr."),
        click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=_store("quiet"),
                     help="Tell nothing but errors on stderr."),
        click.option("--socket", metavar="PATH", expose_value=False, callback=_store("socket"),
                     shell_complete=complete_file,
                     help="The daemon's socket (else $WHISPERD_SOCKET, else the usual places)."),
    ):  # fmt: skip
        command = option(command)
    return command


JOB = click.IntRange(min=1)
json_option = click.option("--json", "as_json", is_flag=True, help="Write JSON for programs: an object a line.")
