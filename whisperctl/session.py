"""What the commands of `work` do once their arguments are read."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from whisperctl.arguments import Argument, source_stem
from whisperctl.connection import seconds_left
from whisperctl.errors import DaemonUnreachable, SourceUnreadable, error_of
from whisperctl.exits import Exit, exit_code, exit_of_state
from whisperctl.options import Shell
from whisperctl.output import Output
from whisperctl.render import how_it_is, source_label, without_words
from whisperctl.results import Result, Segment
from whisperctl.watch import JobWatch, LiveText
from whisperctl.words import clock, duration, plural, safe, size, to_json
from whisperctl.work_options import OutputOptions, RequestOptions
from whisperd.protocol.errors import WhisperdError
from whisperd.protocol.jobs import Job, Priority


def transcribe_all(shell: Shell, arguments: Sequence[Argument], request: RequestOptions, options: OutputOptions) -> int:
    """Submit all, attached, and print each transcript in the order of the sources. Ctrl-C cancels what is left."""
    several = len(arguments) > 1
    output = _output(shell, options, several=several, stems=[argument.stem for argument in arguments])
    priority = request.priority or (Priority.BACKGROUND if several else Priority.INTERACTIVE)
    jobs: list[tuple[Argument, Job]] = []
    worst = Exit.DONE
    with _cancelling(shell, jobs):
        worst = _submit(
            shell, arguments, request, priority, attached=True, took=lambda argument, job: jobs.append((argument, job))
        )
        for place, (argument, job) in enumerate(jobs, 1):
            prefix = f"{place} of {len(jobs)}, {argument.label}: " if several else ""
            try:
                worst = max(worst, _print_one(shell, argument, job, output, prefix=prefix))
            except WhisperdError as error:
                shell.screen.error(f"{argument.label}: {error}")
                worst = max(worst, exit_code(error))
                if isinstance(error, DaemonUnreachable):
                    break
        jobs.clear()
    return worst


def _print_one(shell: Shell, argument: Argument, job: Job, output: Output, *, prefix: str) -> Exit:
    screen = shell.screen
    live = LiveText(lambda segment: screen.text(segment.text.strip()), screen.note) if output.is_live else None
    if live is not None:
        output.head(argument.label, job.id)
    JobWatch(shell.client, screen, prefix=prefix).follow(job, live)
    result = shell.client.result(job.id, wait=True)
    if live is not None and result.transcript is not None:
        live.complete(list(result.transcript.segments))
    else:
        if live is None and result.transcript is not None:
            output.head(argument.label, job.id)
        output.write(result, label=argument.label, stem=argument.stem)
    return _tell_end(shell, result, argument.label)


def _tell_end(shell: Shell, result: Result, label: str) -> Exit:
    job, screen = result.job, shell.screen
    if result.transcript is None:
        screen.error(f"{label}: {error_of(job) if job.ended else f'job {job.id} is not finished yet ({job.state})'}")
    else:
        if result.transcript.truncated:
            screen.note(f"{label}: the audio ends early or is damaged; the transcript covers what could be decoded")
        if result.transcript.coverage is not None and (gaps := result.transcript.coverage.gaps):
            screen.note(f"{label}: {without_words(gaps)}")
    if screen.verbose:
        screen.note(f"job {job.id} {job.state}" + (f", {words}" if (words := how_it_is(job)) else ""))
    return exit_of_state(job.state)


@contextmanager
def _cancelling(shell: Shell, jobs: Sequence[tuple[Argument, Job]]) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, BrokenPipeError):
        shell.screen.status("cancelling")
        with suppress(WhisperdError):
            cancelled = [job.id for _, job in jobs if shell.client.cancel(job.id).state == "cancelled"]
            if cancelled:
                shell.screen.note(f"cancelled job {', '.join(map(str, cancelled))}")
        shell.screen.status("")
        raise


def submit_all(shell: Shell, arguments: Sequence[Argument], request: RequestOptions, *, as_json: bool) -> int:
    """Submit each source and print its job's id (or the whole job) at once."""

    def took(argument: Argument, job: Job) -> None:
        shell.screen.data(to_json(job.to_wire()) if as_json else str(job.id))

    return _submit(shell, arguments, request, request.priority or Priority.BACKGROUND, attached=False, took=took)


def _submit(
    shell: Shell,
    arguments: Sequence[Argument],
    request: RequestOptions,
    priority: str,
    *,
    attached: bool,
    took: Callable[[Argument, Job], None],
) -> Exit:
    worst = Exit.DONE
    for place, argument in enumerate(arguments, 1):
        prefix = f"{place} of {len(arguments)}: " if len(arguments) > 1 else ""
        shell.screen.status(prefix + _handing_over(argument))
        if argument.is_also_a_file:
            shell.screen.note(f"{argument.text} is taken for a YouTube id; for the file write ./{argument.text}")
        try:
            job = argument.submit(
                shell.client,
                on_upload=_showing_upload(shell, prefix, argument),
                priority=priority,
                attached=attached,
                fresh=request.fresh,
                options=request.options,
            )
        except WhisperdError as error:
            alone = len(arguments) == 1 or isinstance(error, SourceUnreadable)  # that one names the source itself
            shell.screen.error(str(error) if alone else f"{argument.label}: {error}")
            worst = max(worst, exit_code(error))
            if isinstance(error, DaemonUnreachable):
                if left := len(arguments) - place:
                    shell.screen.error(f"{plural(left, 'source')} not submitted")
                break
            continue
        if shell.screen.verbose:
            shell.screen.note(f"job {job.id}: {argument.label}, {priority}, at {shell.client.socket_path}")
        took(argument, job)
    shell.screen.status("")
    return worst


def _showing_upload(shell: Shell, prefix: str, argument: Argument) -> Callable[[int, int | None], None]:
    def show(sent_bytes: int, size_bytes: int | None) -> None:
        how_far = f", {100 * sent_bytes // size_bytes} %" if size_bytes else ""
        shell.screen.status(f"{prefix}copying {argument.label} ({size(size_bytes or sent_bytes)}{how_far})")

    return show


def _handing_over(argument: Argument) -> str:
    match argument.kind:
        case "stdin":
            return "reading standard input"
        case "file":
            with suppress(OSError, ValueError):  # a NUL in a name of a list: the submit says so
                return f"copying {argument.label} ({size(os.stat(argument.text).st_size)})"
    return f"handing over {argument.label}"


def print_results(
    shell: Shell, job_ids: Sequence[int], options: OutputOptions, *, wait: bool, timeout_s: float | None
) -> int:
    """Print the transcripts of jobs, in the order given."""
    output = _output(shell, options, several=len(job_ids) > 1)
    deadline = None if timeout_s is None else time.monotonic() + timeout_s

    def print_one(job_id: int) -> Exit:
        if wait:
            _watch(shell, job_id, deadline, several=len(job_ids) > 1)
        result = shell.client.result(job_id)
        label = source_label(result.job)
        if result.transcript is not None:
            output.head(label, job_id)
        output.write(result, label=label, stem=source_stem(result.job))
        return _tell_end(shell, result, label if len(job_ids) > 1 else f"job {job_id}")

    return shell.each(job_ids, print_one)


def wait_for_all(shell: Shell, job_ids: Sequence[int], *, timeout_s: float | None, as_json: bool) -> int:
    """Wait for jobs in the order given, and print a line about each."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s

    def wait_for_one(job_id: int) -> Exit:
        _watch(shell, job_id, deadline, several=len(job_ids) > 1)
        job = shell.client.job(job_id)
        if as_json:
            shell.screen.data(to_json(job.to_wire()))
        elif not shell.quiet:
            words = "  ".join(filter(None, (f"{job.id}  {job.state}", source_label(job), how_it_is(job))))
            shell.screen.data(safe(words))
        return exit_of_state(job.state)

    return shell.each(job_ids, wait_for_one)


def _watch(shell: Shell, job_id: int, deadline: float | None, *, several: bool) -> None:
    job = shell.client.job(job_id)
    if not job.ended:
        prefix = f"job {job_id}: " if several else ""
        JobWatch(shell.client, shell.screen, prefix=prefix).follow(job, timeout_s=seconds_left(deadline))


def follow_job(shell: Shell, job_id: int, *, after_seq: int, as_json: bool) -> int:
    """Print a job's segments, or its events as JSON, until it ends."""
    client, screen = shell.client, shell.screen
    if as_json:
        state = None
        for event in client.follow(job_id, after_seq):
            screen.data(to_json(event.raw or {"event": event.kind, "job": job_id, "state": event.state}))
            state = event.state if event.kind == "end" else state
        return Exit.NOT_FINISHED if state is None else exit_of_state(state)

    def show(segment: Segment) -> None:
        screen.text(f"[{clock(segment.start)} - {clock(segment.end)}] {segment.text.strip()}")

    live = LiveText(show, screen.note)
    JobWatch(client, screen, prefix="").follow(client.job(job_id), live, after_seq=after_seq)
    result = client.result(job_id, wait=True)
    if result.transcript is not None and not after_seq:
        live.complete(list(result.transcript.segments))
    if result.transcript is not None and screen.is_terminal:
        screen.note(f"done: {duration(result.transcript.duration_s)} of audio")
    return _tell_end(shell, result, f"job {job_id}")


def _output(shell: Shell, options: OutputOptions, *, several: bool, stems: Sequence[str] = ()) -> Output:
    return Output(
        shell.screen,
        form=options.form,
        path=options.path,
        force=options.force,
        wrapped=options.as_json,
        several=several,
        stems=stems,
    )
