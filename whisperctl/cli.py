"""The command `whisperctl`: its commands, and the one place that turns errors into words and exit codes."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

from whisperctl.exits import Exit, exit_code
from whisperctl.options import Shell, common_options, json_option
from whisperctl.words import safe
from whisperd import __version__
from whisperd.protocol.errors import WhisperdError

_PLACES = {
    "transcribe": "work:transcribe",
    "submit": "work:submit",
    "result": "work:result",
    "wait": "work:wait",
    "follow": "work:follow",
    "list": "manage:list_jobs",
    "cancel": "manage:cancel",
    "forget": "manage:forget",
    "retry": "manage:retry",
    "stats": "service:stats",
    "health": "service:health",
    "selftest": "selftest:selftest",
    "pause": "service:pause",
    "resume": "service:resume",
    "model": "service:model",
    "completion": "service:completion",
}


class Commands(click.Group):
    """Loads a command's module when the command is used: `health` does not pay for `transcribe`."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(_PLACES)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _PLACES:
            return None
        module, _, attribute = _PLACES[name].partition(":")
        command: click.Command = getattr(import_module(f"whisperctl.{module}"), attribute)
        return command


@click.group(
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, "--version", prog_name="whisperctl")
@json_option
@common_options
@click.pass_context
def cli(context: click.Context, as_json: bool) -> int:
    """Hand recordings to whisperd and get the words back.

    Without a command: how the daemon is, what runs, what waits.
    """
    if context.invoked_subcommand is not None:
        if as_json:  # not every command has it
            raise click.UsageError(f"--json goes behind the command: whisperctl {context.invoked_subcommand} --json")
        return Exit.DONE
    from whisperctl.service import show_status

    return show_status(context.ensure_object(Shell), as_json=as_json)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; never raises, never shows a traceback."""
    instruction = os.environ.get("_WHISPERCTL_COMPLETE")
    if instruction is not None:
        from click.shell_completion import shell_complete

        return shell_complete(cli, {}, "whisperctl", "_WHISPERCTL_COMPLETE", instruction)
    _prepare_streams()
    shell = Shell()
    code: int
    try:
        try:
            code = _run(list(sys.argv[1:] if argv is None else argv), shell)
        finally:
            shell.close()
    except KeyboardInterrupt:
        code = Exit.INTERRUPTED
    except BrokenPipeError:
        _drop_output()  # whoever read us has enough
        code = Exit.CLOSED_PIPE
    return int(code)


def _run(argv: list[str], shell: Shell) -> int:
    try:
        # Not cli.main(): it would answer Ctrl-C and a closed pipe with 1.
        with cli.make_context("whisperctl", argv, obj=shell) as context:
            code = cli.invoke(context)
            sys.stdout.flush()
            return code if isinstance(code, int) else Exit.DONE
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return Exit.INTERRUPTED
    except WhisperdError as error:
        _tell(shell, str(error))
        return exit_code(error)
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_output()
        _tell(shell, f"cannot write: {error.strerror or error}")
        return Exit.JOB_FAILED
    except Exception as error:
        _tell(shell, _defect(error))
        return Exit.JOB_FAILED


def _prepare_streams() -> None:
    codecs.register_error("whisperctl.json", _escape)
    if sys.stdin is None:
        # Closed (`<&-`): its number is held, by what cannot be read, or our own socket would become what `-` reads.
        os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us (`>&-`)
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (it stays open to the end)
        # A name may hold what the stream's encoding has no letter for.
        getattr(sys, name).reconfigure(errors="whisperctl.json")


def _escape(error: UnicodeError) -> tuple[str, int]:
    """Write as JSON does what an encoding has no letter for: JSON stays JSON, and people can read it too."""
    import json

    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def _drop_output() -> None:
    """Send nowhere what Python would still write to stdout, and complain of, at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())


def _tell(shell: Shell, message: str) -> None:
    shell.screen.status("")
    shell.screen.error(message)


def _defect(error: Exception) -> str:
    trace: Any = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}" if trace else "somewhere"
    return f"this is a defect, please report it: {type(error).__name__} at {place}: {safe(error)}"
