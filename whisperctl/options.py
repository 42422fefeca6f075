"""The options that commands have in common, and what they add up to."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import click

from whisperctl.client import Client
from whisperctl.errors import DaemonUnreachable
from whisperctl.exits import Exit, exit_code
from whisperctl.terminal import Screen
from whisperd.protocol.errors import WhisperdError

Command = TypeVar("Command", bound=Callable[..., Any])

FORMATS = ("text", "json", "srt", "vtt", "tsv")


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
        return Client(self.socket, notify=self.screen.trouble)

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
        if "client" in self.__dict__:
            self.client.close()


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
                     help="The daemon's socket (else $WHISPERD_SOCKET, else the usual places)."),
    ):  # fmt: skip
        command = option(command)
    return command


json_option = click.option("--json", "as_json", is_flag=True, help="Write JSON for programs: an object a line.")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """How transcripts are to be written."""

    form: str
    path: str | None
    force: bool
    as_json: bool


def output_options(command: Command) -> Command:
    """Add `--format`, `-o`, `--force` and `--json`; the command receives them as `output`."""

    def wrapper(*, form: str, path: str | None, force: bool, as_json: bool, **rest: Any) -> Any:
        if as_json and form not in ("text", "json"):
            raise click.UsageError(f"--json and --format {form} exclude each other")
        return command(output=OutputOptions(form=form, path=path, force=force, as_json=as_json), **rest)

    wrapper = _like(command, wrapper)
    for option in (
        json_option,
        click.option("--force", is_flag=True, help="Write over files that are there already."),
        click.option("-o", "--output", "path", metavar="PATH",
                     help="Write into this file; for several sources a folder, which gets NAME.txt and so on."),
        click.option("--format", "form", type=click.Choice(FORMATS), default="text", show_default=True,
                     help="How a transcript is written."),
    ):  # fmt: skip
        wrapper = option(wrapper)
    return wrapper  # type: ignore[return-value]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """What is asked of the daemon with each source. `priority` None: as the command sees fit."""

    options: Mapping[str, Any]
    priority: str | None
    fresh: bool


def request_options(command: Command) -> Command:
    """Add the options of a transcription; the command receives them as `request`."""

    def wrapper(
        *,
        language: str | None,
        task: str | None,
        word_timestamps: bool,
        initial_prompt: str | None,
        beam_size: int | None,
        temperature: str | None,
        more: tuple[str, ...],
        priority: str | None,
        fresh: bool,
        **rest: Any,
    ) -> Any:
        named = {
            "language": language,
            "task": task,
            "word_timestamps": word_timestamps or None,
            "initial_prompt": initial_prompt,
            "beam_size": beam_size,
            "temperature": None if temperature is None else _temperatures(temperature),
        }
        options = {name: value for name, value in named.items() if value is not None}
        options |= dict(map(_named_option, more))
        return command(request=RequestOptions(options=options, priority=priority, fresh=fresh), **rest)

    wrapper = _like(command, wrapper)
    for option in (
        click.option("--fresh", is_flag=True, help="Compute anew what is known already."),
        click.option("--priority", type=click.Choice(("interactive", "background")),
                     help="Interactive work goes first.  [default: interactive for one source that is waited for, "
                     "else background]"),
        click.option("--option", "more", metavar="NAME=VALUE", multiple=True,
                     help="Any other option of whisper.transcribe, its value as JSON: best_of=5. May be repeated."),
        click.option("--temperature", metavar="T[,T...]",
                     help="Sampling temperature; several are tried one after the other.  [default: 0,0.2,...,1]"),
        click.option("--beam-size", type=click.IntRange(1), metavar="N", help="Search with N beams."),
        click.option("--initial-prompt", metavar="TEXT", help="Words that the first window is to continue."),
        click.option("--word-timestamps", is_flag=True, help="Give each word its times (in JSON)."),
        click.option("--task", type=click.Choice(("transcribe", "translate")),
                     help="Write what is said, or translate it into English.  [default: transcribe]"),
        click.option("--language", metavar="LANGUAGE", help="The language spoken: de, german.  [default: detect it]"),
    ):  # fmt: skip
        wrapper = option(wrapper)
    return wrapper  # type: ignore[return-value]


def _like(command: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    # Click finds the options declared so far, the name and the help text on the function itself.
    wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
    wrapper.__click_params__ = list(getattr(command, "__click_params__", []))  # type: ignore[attr-defined]
    return wrapper


def _temperatures(text: str) -> float | list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is not a number or numbers with commas", param_hint="--temperature"
        ) from None
    return values[0] if len(values) == 1 else values


def _named_option(text: str) -> tuple[str, Any]:
    import json

    name, equals, value = text.partition("=")
    if not equals or not name:
        raise click.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--option")
    try:
        return name.replace("-", "_"), json.loads(value)
    except ValueError:
        return name.replace("-", "_"), value  # a bare word is a string


def completion_environment() -> str | None:
    """Return the instruction that the shell's completion script passes, or None in an ordinary run."""
    return os.environ.get("_WHISPERCTL_COMPLETE")
