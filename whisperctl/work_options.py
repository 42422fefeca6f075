"""The options of the commands that hand work over or print transcripts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from whisperctl.options import complete_file, json_option
from whisperd.protocol.options import MODES

Command = TypeVar("Command", bound=Callable[..., Any])

FORMATS = ("text", "json", "srt", "vtt", "tsv")


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
        click.option("-o", "--output", "path", metavar="PATH", shell_complete=complete_file,
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
        mode: str | None,
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
            "mode": mode,
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
        click.option("--mode", type=click.Choice(MODES),
                     help="Exactly openai-whisper's text, or windows cut at silences, decoded together.  "
                     "[default: as the daemon is set]"),
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
