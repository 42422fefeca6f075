"""`list`, `cancel`, `forget`, `retry`: what becomes of jobs."""

from __future__ import annotations

from collections.abc import Sequence

import click

from whisperctl.exits import Exit
from whisperctl.options import JOB, Shell, common_options, json_option
from whisperctl.render import job_table
from whisperctl.words import to_json
from whisperd.protocol.jobs import Job, JobState

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
@click.option("--failed", is_flag=True, help="All failed jobs (of the newest 200) that were not tried again yet.")
@json_option
@common_options
@click.pass_obj
def retry(shell: Shell, jobs: Sequence[int], failed: bool, as_json: bool) -> int:
    """Try failed or cancelled jobs again, while their audio is kept; print the ids of the new jobs."""
    if bool(jobs) == failed:
        raise click.UsageError("name jobs, or give --failed")
    if failed:
        found = reversed(shell.client.jobs(state=JobState.FAILED, limit=200))
        jobs = [job.id for job in found if not job.retried]

    def retry_one(job_id: int) -> Exit:
        job = shell.client.retry(job_id)
        shell.screen.data(to_json(job.to_wire()) if as_json else str(job.id))
        return Exit.DONE

    return shell.each(jobs, retry_one)


def _tell(shell: Shell, job: Job, words: str, *, as_json: bool) -> None:
    if as_json:
        shell.screen.data(to_json(job.to_wire()))
    else:
        shell.screen.note(f"job {job.id} {words}")
