"""Each kind of helper is hurt in each way, again and again: it must be replaced, and the next job must be done."""

from __future__ import annotations

import shutil
import tempfile
import time
from itertools import product
from pathlib import Path
from random import Random

import psutil

from tests.models import micro_checkpoint
from tests.support import PLAIN_OPTIONS, RawClient, wait_until
from torture.kills import SETTINGS, undisturbed, write_recordings
from torture.machine import HELPERS, Victim, victim
from torture.oracle import tokens_of
from torture.report import Report
from whisperd.protocol.errors import ErrorCode, WhisperdError

HURTS = ("KILL", "SEGV", "STOP", "memory")
_DONE_S = 120.0


def deaths(seed: int, times: int, minutes: float) -> Report:
    """Hurt each helper `times` times in each way, in turns, or as often as `minutes` allow."""
    report = Report(f"deaths of helpers, seed {seed}")
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    deadline = time.monotonic() + minutes * 60
    try:
        model = micro_checkpoint(folder)
        recording = write_recordings(folder, Random(f"{seed}:recordings"), (2,))[0]
        tokens = undisturbed(model, [recording])[recording]
        with victim(report, model=str(model), **SETTINGS | {"copy_timeout_s": 1, "decode_timeout_s": 1}) as target:
            target.start()
            target.daemon.wait_ready(120)
            with target.daemon.client() as client:
                # The model's process takes seconds to come back: last, as often as there is time.
                for module, _, how in product(HELPERS, range(times), HURTS):
                    if time.monotonic() > deadline:
                        break
                    _one(target, client, recording, tokens, module, how)
    finally:
        shutil.rmtree(folder)
        report.end()
    return report


def _one(target: Victim, client: RawClient, recording: Path, tokens: list[list[int]], module: str, how: str) -> None:
    report = target.report

    def present() -> list[psutil.Process]:
        found = target.daemon.helpers(module)
        if not found:  # those for audio are started when there is work for them
            _job(client, recording, tokens, report)
        return found

    helper = wait_until(present, _DONE_S, f"there is a {module}")[0]
    target.hurt_helper(Random(0), module, how)
    report.count(f"{module.removeprefix('whisperd.')}: {how}")
    code = _job(client, recording, tokens, report)
    if code:
        # A file that cannot be read on is given up, and so is a decoding; under a memory limit anything may fail.
        report.count(f"{module.removeprefix('whisperd.')}: {how}: the job under way failed ({code})")
        allowed = how == "memory" or (how == "STOP" and code == ErrorCode.TIMED_OUT)
        report.require(allowed, f"a job failed by {how} of {module}: {code}")
        code = _job(client, recording, tokens, report)
        report.require(not code, f"after {how} of {module} no job is done any more: {code}")
    report.require(how == "memory" or helper.pid not in {h.pid for h in target.daemon.helpers(module)}, "not replaced")
    if how == "memory" and helper.is_running():
        report.count(f"{module.removeprefix('whisperd.')}: memory: went on under the limit")
        helper.kill()
        psutil.wait_procs([helper], timeout=_DONE_S)


def _job(client: RawClient, recording: Path, tokens: list[list[int]], report: Report) -> str:
    """Have a job done; return the code of what went wrong."""
    try:
        job = client.submit(recording, options=PLAIN_OPTIONS, fresh=True)
        answer = client.result(job["id"], _DONE_S)
    except WhisperdError as error:
        return str(error.code)
    if answer["job"]["state"] != "done":
        return str(answer["job"]["error"]["code"])
    report.require(tokens_of(answer["transcript"]) == tokens, f"job {job['id']} has other tokens than undisturbed")
    report.count("jobs done after it, with the same tokens")
    return ""
