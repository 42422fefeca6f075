"""How many jobs of one user are kept: rows are small, but a cached answer makes one in a millisecond."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.support import NO_MODEL, Daemon, error_of, requires_root, submit
from tests.test_admission import client_as


@requires_root
def test_the_jobs_of_one_user_that_are_kept_are_bounded(
    start_daemon: Callable[..., Daemon], recording: Callable[..., Path]
) -> None:
    daemon = start_daemon(model=NO_MODEL, socket_mode="0666", jobs_per_user=3)
    path = recording()
    with client_as(daemon, 20_001) as client, client_as(daemon, 20_002) as other, daemon.client() as admin:
        jobs = [submit(client, path, key=f"key {number}") for number in range(3)]
        assert error_of(lambda: submit(client, path)) == "quota_exceeded"
        assert submit(client, path, key="key 0")["id"] == jobs[0]["id"], "a retry is no new job"
        client.call("cancel", job=jobs[0]["id"])
        assert error_of(lambda: client.call("retry", job=jobs[0]["id"])) == "quota_exceeded"
        client.call("forget", job=jobs[0]["id"])
        assert submit(client, path)["state"] == "queued"
        assert error_of(lambda: submit(client, path)) == "quota_exceeded"
        assert submit(other, path)["state"] == "queued"
        assert len([submit(admin, path) for _ in range(5)]) == 5
