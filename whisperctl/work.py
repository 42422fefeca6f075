"""`transcribe`, `submit`, `result`, `wait`, `follow`: handing work over and getting words back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from whisperctl.options import JOB, Shell, common_options, complete_file, json_option
from whisperctl.work_options import OutputOptions, RequestOptions, output_options, request_options

timeout_option = click.option("--timeout", "timeout_s", type=click.FloatRange(min=0), metavar="SECONDS",
                              help="Wait no longer than this; the jobs go on (exit 7).")  # fmt: skip

sources_argument = click.argument("sources", nargs=-1, metavar="SOURCE...", shell_complete=complete_file)
from_option = click.option("--from", "lists", multiple=True, metavar="FILE", shell_complete=complete_file,
                           help="Read sources from a list, one a line (- for standard input).")  # fmt: skip


@click.command()
@sources_argument
@from_option
@request_options
@output_options
@common_options
@click.pass_obj
def transcribe(
    shell: Shell, sources: tuple[str, ...], lists: tuple[str, ...], request: RequestOptions, output: OutputOptions
) -> int:
    """Hand recordings over, wait, and print their words.

    SOURCE is a file, - for standard input, a YouTube id, or an address. One source goes before all background work;
    several run as background work. Ctrl-C, or the end of this command, cancels them.

    On a terminal each piece of speech appears as soon as it is decoded; elsewhere the transcript alone is written.
    """
    from whisperctl.session import transcribe_all

    return transcribe_all(shell, _arguments(sources, lists), request, output)


@click.command()
@sources_argument
@from_option
@click.option("--wait", is_flag=True, help="Wait for the transcripts and print them: the same as transcribe.")
@request_options
@output_options
@common_options
@click.pass_obj
def submit(
    shell: Shell,
    sources: tuple[str, ...],
    lists: tuple[str, ...],
    wait: bool,
    request: RequestOptions,
    output: OutputOptions,
) -> int:
    """Hand recordings over and print the ids of their jobs.

    SOURCE is a file, - for standard input, a YouTube id, or an address (write -- before an id that begins with -, and
    ./ before a file whose name could be an id). The ids come one a line, in the order of the sources; once an id is
    there, its recording is safe with the daemon. A source that fails is told on stderr and does not stop the others.
    """
    from whisperctl.session import submit_all, transcribe_all

    arguments = _arguments(sources, lists)
    if wait:
        return transcribe_all(shell, arguments, request, output)
    if output.path is not None or output.force or output.form != "text":
        raise click.UsageError("--format, -o and --force are for transcripts: add --wait")
    return submit_all(shell, arguments, request, as_json=output.as_json)


@click.command()
@click.argument("jobs", nargs=-1, required=True, type=JOB, metavar="JOB...")
@click.option("--wait", is_flag=True, help="Wait until the jobs have ended.")
@timeout_option
@output_options
@common_options
@click.pass_obj
def result(shell: Shell, jobs: tuple[int, ...], wait: bool, timeout_s: float | None, output: OutputOptions) -> int:
    """Print the transcripts of jobs that have ended."""
    from whisperctl.session import print_results

    if timeout_s is not None and not wait:
        raise click.UsageError("--timeout needs --wait")
    return print_results(shell, jobs, output, wait=wait, timeout_s=timeout_s)


@click.command()
@click.argument("jobs", nargs=-1, required=True, type=JOB, metavar="JOB...")
@timeout_option
@json_option
@common_options
@click.pass_obj
def wait(shell: Shell, jobs: tuple[int, ...], timeout_s: float | None, as_json: bool) -> int:
    """Wait until jobs have ended, and tell how each did."""
    from whisperctl.session import wait_for_all

    return wait_for_all(shell, jobs, timeout_s=timeout_s, as_json=as_json)


@click.command()
@click.argument("job", type=JOB, metavar="JOB")
@click.option("--after-seq", type=click.IntRange(min=0), default=0, metavar="N",
              help="Leave out the events up to this one.")  # fmt: skip
@json_option
@common_options
@click.pass_obj
def follow(shell: Shell, job: int, after_seq: int, as_json: bool) -> int:
    """Print what a job hears, as it is decoded, from its beginning to its end.

    With --json every event is a line, as the protocol names them. Ctrl-C leaves the job alone.
    """
    from whisperctl.session import follow_job

    return follow_job(shell, job, after_seq=after_seq, as_json=as_json)


def _arguments(sources: Sequence[str], lists: Sequence[str]) -> list[Any]:
    from whisperctl.arguments import STDIN, parse_argument, read_list

    texts = [*sources]
    for path in lists:
        texts += read_list(path)
    if not texts:
        raise click.UsageError("no SOURCE: name a file, - for standard input, a YouTube id or an address")
    if texts.count(STDIN) + list(lists).count(STDIN) > 1:
        raise click.UsageError("standard input (-) can be read only once")
    return [parse_argument(text) for text in texts]
