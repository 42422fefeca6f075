"""`health`, `stats`, `pause`, `resume`, `model`: the daemon itself; and the shell's completion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from whisperctl.exits import Exit
from whisperctl.options import Shell, common_options, json_option
from whisperctl.words import bar, duration, model_words, number, paint, safe, size, to_json
from whisperd.protocol.errors import WhisperdError

_HEALTH_COLOURS = {"ready": "green", "degraded": "red", "paused": "yellow"}


@click.command()
@json_option
@common_options
@click.pass_obj
def health(shell: Shell, as_json: bool) -> int:
    """Tell how the daemon is: exit 0 when it is ready or paused, else 3."""
    answer = shell.link.call("health", {}, patient=False)
    screen = shell.screen
    for line in [to_json(answer)] if as_json else health_lines(answer, colours=screen.colours):
        screen.data(line)
    return Exit.DONE if answer.get("status") in ("ready", "paused") else Exit.UNREACHABLE


@click.command()
@click.option("--watch", is_flag=True, help="Show it again every two seconds, until Ctrl-C.")
@click.option("--prometheus", is_flag=True, help="Write it in Prometheus' text format.")
@json_option
@common_options
@click.pass_obj
def stats(shell: Shell, watch: bool, prometheus: bool, as_json: bool) -> int:
    """Tell what the daemon has done and is doing, in numbers.

    With --watch on a terminal as a screen (needs whisperd[watch]), elsewhere and on a dumb terminal as a line a look.
    A daemon that restarts meanwhile is waited for.
    """
    if prometheus and (watch or as_json):
        raise click.UsageError("--prometheus goes with neither --watch nor --json")
    if watch:
        from whisperctl.watching import watch as watch_daemon

        watch_daemon(shell, as_json=as_json)
    screen, answer = shell.screen, shell.client.stats()
    if prometheus:
        from whisperctl.prometheus import exposition

        screen.data(exposition(answer, shell.client.health()).removesuffix("\n"))
        return Exit.DONE
    from whisperctl.render import stats_lines

    for line in [to_json(answer)] if as_json else stats_lines(answer, colours=screen.colours):
        screen.data(line)
    return Exit.DONE


@click.command()
@click.option("--free-gpu", is_flag=True, help="Give the device's memory back; running work waits, too.")
@json_option
@common_options
@click.pass_obj
def pause(shell: Shell, free_gpu: bool, as_json: bool) -> int:
    """Let new work wait (for admins); jobs are accepted as ever."""
    _tell_status(shell, shell.client.pause(free_gpu=free_gpu), as_json=as_json)
    return Exit.DONE


@click.command()
@json_option
@common_options
@click.pass_obj
def resume(shell: Shell, as_json: bool) -> int:
    """Go on after a pause (for admins)."""
    _tell_status(shell, shell.client.resume(), as_json=as_json)
    return Exit.DONE


def _tell_status(shell: Shell, status: str, *, as_json: bool) -> None:
    if as_json:
        shell.screen.data(to_json({"status": status}))
    else:
        shell.screen.note(f"whisperd is {safe(status)}")


@click.command()
@click.argument("action", type=click.Choice(("load", "unload", "pull")))
@click.argument("name", required=False)
@json_option
@common_options
@click.pass_obj
def model(shell: Shell, action: str, name: str | None, as_json: bool) -> int:
    """Load the model, or unload it until it is loaded again; or pull one (for admins).

    Unloading gives all memory of the device back; running work returns to the queue. `pull NAME` downloads a model
    ahead of time, whichever the daemon works with, and prints where it lies; Ctrl-C stops that, and another pull
    goes on from there.
    """
    if (name is None) == (action == "pull"):
        raise click.UsageError("pull needs the NAME of a model, load and unload take none")
    if name is not None:
        return _pull(shell, name, as_json=as_json)
    answer = shell.client.model(action)
    if as_json:
        shell.screen.data(to_json(answer))
    elif action == "load" and answer.get("state") != "ready":
        shell.screen.note(
            f"model {safe(answer.get('name', ''))} is being loaded; 'whisperctl health' tells when it is ready"
        )
    else:
        shell.screen.note(model_words(answer))
    return Exit.DONE


def _pull(shell: Shell, name: str, *, as_json: bool) -> int:
    screen = shell.screen

    def progressed(done_bytes: int, total_bytes: int) -> None:
        part = done_bytes / total_bytes if total_bytes else 0.0
        screen.status(f"{safe(name)} {bar(part)} {part:.0%} of {size(total_bytes)}")

    def halted(error: WhisperdError, wait_s: float) -> None:
        screen.note(f"trying again in {duration(wait_s)}: {error.message}")

    screen.status(f"asking for model {safe(name)}")
    path = shell.client.pull_model(name, on_progress=progressed, on_retry=halted)
    screen.status("")
    screen.data(to_json({"model": name, "path": path}) if as_json else safe(path))
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


def show_status(shell: Shell, *, as_json: bool) -> int:
    """Show the daemon's health in a line, what runs and what waits (the command without a command).

    It is for looking: whatever the daemon is, it is done once it has answered. What exits by that is `health`.
    """
    from whisperctl.render import LIVE_STATES, job_table

    screen, client = shell.screen, shell.client
    answer = client.health()
    for line in [] if as_json else health_lines(answer, colours=screen.colours):
        screen.data(line)
    live = [job for state in LIVE_STATES for job in client.jobs(state=state, limit=10)]
    if as_json:
        screen.data(to_json({**answer, "jobs": [job.to_wire() for job in live]}))
    elif live:
        screen.data("")
        for line in job_table(live, colours=screen.colours, width=screen.columns):
            screen.data(line)
    return Exit.DONE


def health_lines(health: Mapping[str, Any], *, colours: bool) -> list[str]:
    """Return the daemon's health: a line, and one for each problem."""
    status = str(health.get("status", "?"))
    queue = health.get("queue") or {}
    parts = [
        paint(safe(status), _HEALTH_COLOURS.get(status), colours=colours),
        model_words(health.get("model") or {}),
        f"{number(queue.get('depth'))} of {number(queue.get('capacity'))} waiting",
        f"up {duration(health.get('uptime_s') or 0)}",
        f"version {safe(health.get('version', '?'))}",
    ]
    problems = [safe(problem) for problem in health.get("problems") or []]
    error = (health.get("model") or {}).get("error")
    if error and not any(safe(error) in problem for problem in problems):
        problems.append(safe(error))
    # While it starts nothing is wrong: that is what it waits for.
    label = "" if status == "starting" else paint("problem: ", "red", colours=colours)
    return [" · ".join(parts), *(label + problem for problem in problems)]
