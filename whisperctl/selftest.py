"""`selftest`: is this installation whole? Step by step, each with what to do about it."""

from __future__ import annotations

import click

from whisperctl.exits import Exit
from whisperctl.options import Shell, common_options, json_option
from whisperctl.words import paint, safe, to_json


@click.command()
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=1), metavar="SECONDS", default=600, show_default=True,
              help="Wait no longer than this for the model, and then for the sample's words.")  # fmt: skip
@json_option
@common_options
@click.pass_obj
def selftest(shell: Shell, timeout_s: float, as_json: bool) -> int:
    """Prove the whole installation: exit 0 only if all of it works.

    Looks at the socket, permissions, versions, model, device, FFmpeg, yt-dlp and the disk, then has a spoken sample
    that comes with whisperd transcribed in the background and while somebody waits, at the same time. Each step is a
    line: a tick, or a cross and what to do. The sample's jobs are forgotten again.
    """
    from whisperctl.inspection import NAMES, Inspection, Step

    screen = shell.screen
    inspection = Inspection(shell.client, timeout_s=timeout_s, tell=screen.status)
    pad = max(map(len, NAMES))

    def show(step: Step) -> None:
        if not as_json:
            mark, colour = _MARKS[step.ok]
            name = step.name.ljust(pad)
            words = step.told + (f": {step.mend}" if step.mend else "")
            screen.data(f"{paint(screen.drawable(*mark), colour, colours=screen.colours)} {name}  {safe(words)}")

    steps = []
    for step in inspection.steps():
        screen.status("")
        steps.append(step)
        show(step)
    ok = all(step.ok for step in steps)
    if as_json:
        screen.data(to_json({"ok": ok, "steps": [step.to_wire() for step in steps]}))
    if ok:
        return Exit.DONE
    return Exit.JOB_FAILED if steps[0].ok else Exit.UNREACHABLE


_MARKS = {True: (("✓", "ok"), "green"), False: (("✗", "no"), "red"), None: (("-", "-"), "dim")}
