"""`list`, `cancel`, `forget`, `retry`, and what concerns the daemon: `health`, `stats`, `pause`, `resume`, `model`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from whisperctl.exits import Exit
from whisperctl.options import Shell, common_options, json_option
from whisperctl.output import to_json
from whisperctl.render import health_lines, job_table, model_words, stats_lines
from whisperd.protocol.jobs import Job, JobState

JOB = click.IntRange(min=1)
WATCH_S = 2.0
jobs_argument = click.argument("jobs", nargs=-1, required=True, type=JOB, metavar="JOB...")


@click.command("list")
@click.option("--state", type=click.Choice([str(state) for state in JobState]), help="Only jobs in this state.")
@click.option("--all", "everybody", is_flag=True, help="Everybody's jobs (for admins).")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="At most so many, the newest.")
@json_option
@common_options
@click.pass_obj
def list_jobs(shell: Shell, state: str | None, everybody: bool, limit: int, as_json: bool) -> int:
    """Show jobs, the newest first; with -q their ids alone."""
    jobs = shell.client.jobs(state=state, limit=limit + 1, all_users=everybody)
    more, jobs = len(jobs) > limit, jobs[:limit]
    screen = shell.screen
    if as_json or shell.quiet:
        for job in jobs:
            screen.data(to_json(job.to_wire()) if as_json else str(job.id))
        return Exit.DONE
    if not jobs:
        screen.note("no jobs" if state is None else f"no jobs are {state}")
        return Exit.DONE
    for line in job_table(jobs, colours=screen.colours, width=screen.columns):
        screen.data(line)
    if more:
        screen.note(f"(there are more; --limit {limit * 5} shows them)")
    return Exit.DONE


@click.command()
@jobs_argument
@json_option
@common_options
@click.pass_obj
def cancel(shell: Shell, jobs: Sequence[int], as_json: bool) -> int:
    """Cancel jobs; their work stops within two seconds. One that has ended stays as it is."""

    def cancel_one(job_id: int) -> Exit:
        job = shell.client.cancel(job_id)
        told = "cancelled" if job.state is JobState.CANCELLED else f"had ended already: {job.state}"
        _tell(shell, job, told, as_json=as_json)
        return Exit.DONE

    return shell.each(jobs, cancel_one)


@click.command()
@jobs_argument
@json_option
@common_options
@click.pass_obj
def forget(shell: Shell, jobs: Sequence[int], as_json: bool) -> int:
    """Delete ended jobs with their audio and transcripts, for good."""

    def forget_one(job_id: int) -> Exit:
        _tell(shell, shell.client.forget(job_id), "forgotten", as_json=as_json)
        return Exit.DONE

    return shell.each(jobs, forget_one)


@click.command()
@click.argument("jobs", nargs=-1, type=JOB, metavar="JOB...")
@click.option("--failed", is_flag=True, help="All failed jobs (the newest 200).")
@json_option
@common_options
@click.pass_obj
def retry(shell: Shell, jobs: Sequence[int], failed: bool, as_json: bool) -> int:
    """Try failed or cancelled jobs again, while their audio is kept; print the ids of the new jobs."""
    if bool(jobs) == failed:
        raise click.UsageError("name jobs, or give --failed")
    if failed:
        jobs = [job.id for job in reversed(shell.client.jobs(state=JobState.FAILED, limit=200))]

    def retry_one(job_id: int) -> Exit:
        job = shell.client.retry(job_id)
        shell.screen.data(to_json(job.to_wire()) if as_json else str(job.id))
        return Exit.DONE

    return shell.each(jobs, retry_one)


@click.command()
@json_option
@common_options
@click.pass_obj
def health(shell: Shell, as_json: bool) -> int:
    """Tell how the daemon is: exit 0 when it is ready or paused, else 3."""
    answer = shell.client.health()
    screen = shell.screen
    for line in [to_json(answer)] if as_json else health_lines(answer, colours=screen.colours):
        screen.data(line)
    return Exit.DONE if answer.get("status") in ("ready", "paused") else Exit.UNREACHABLE


@click.command()
@click.option("--watch", is_flag=True, help="Show it again every two seconds, until Ctrl-C.")
@json_option
@common_options
@click.pass_obj
def stats(shell: Shell, watch: bool, as_json: bool) -> int:
    """Tell what the daemon has done and is doing, in numbers."""
    import time

    screen = shell.screen
    while True:
        answer = shell.client.stats()
        if watch and screen.is_terminal and not as_json:
            click.clear()
        for line in [to_json(answer)] if as_json else stats_lines(answer, colours=screen.colours):
            screen.data(line)
        if not watch:
            return Exit.DONE
        if not as_json and not screen.is_terminal:
            screen.data("")
        time.sleep(WATCH_S)  # the numbers have no event that says when to look again


@click.command()
@click.option("--free-gpu", is_flag=True, help="Give the device's memory back; running work waits, too.")
@common_options
@click.pass_obj
def pause(shell: Shell, free_gpu: bool) -> int:
    """Let new work wait (for admins); jobs are accepted as ever."""
    shell.screen.note(f"whisperd is {shell.client.pause(free_gpu=free_gpu)}")
    return Exit.DONE


@click.command()
@common_options
@click.pass_obj
def resume(shell: Shell) -> int:
    """Go on after a pause (for admins)."""
    shell.screen.note(f"whisperd is {shell.client.resume()}")
    return Exit.DONE


@click.command()
@click.argument("action", type=click.Choice(("load", "unload")))
@json_option
@common_options
@click.pass_obj
def model(shell: Shell, action: str, as_json: bool) -> int:
    """Load the model, or unload it until it is loaded again (for admins).

    Unloading gives all memory of the device back; running work returns to the queue.
    """
    answer = shell.client.model(action)
    if as_json:
        shell.screen.data(to_json(answer))
    else:
        shell.screen.note(model_words(answer))
    return Exit.DONE


@click.command()
@click.argument("shell_name", metavar="SHELL", type=click.Choice(("bash", "zsh", "fish")))
@click.pass_context
def completion(context: click.Context, shell_name: str) -> int:
    """Print the completion script for bash, zsh or fish.

    For bash: whisperctl completion bash > ~/.local/share/bash-completion/completions/whisperctl
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell_name)
    assert kind is not None, shell_name
    root = context.find_root()
    # The class's own `source` for bash asks the shell's version, which is nothing to ask of a shell not running here.
    maker = kind(root.command, {}, "whisperctl", "_WHISPERCTL_COMPLETE")
    context.ensure_object(Shell).screen.data(maker.source_template % maker.source_vars())
    return Exit.DONE


def show_status(shell: Shell) -> int:
    """Show the daemon's health in a line, what runs and what waits (the command without a command)."""
    screen, client = shell.screen, shell.client
    answer = client.health()
    for line in health_lines(answer, colours=screen.colours):
        screen.data(line)
    live = [
        job
        for state in (JobState.RUNNING, JobState.QUEUED, JobState.FETCHING, JobState.PENDING)
        for job in client.jobs(state=state, limit=10)
    ]
    if live:
        screen.data("")
        for line in job_table(live, colours=screen.colours, width=screen.columns):
            screen.data(line)
    return Exit.DONE if answer.get("status") in ("ready", "paused") else Exit.UNREACHABLE


def _tell(shell: Shell, job: Job, words: str, *, as_json: bool) -> None:
    if as_json:
        shell.screen.data(to_json(job.to_wire()))
    else:
        shell.screen.note(f"job {job.id} {words}")
