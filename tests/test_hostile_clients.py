"""Clients that mean no good against whole daemons: each finds a bound, and its neighbour notices nothing."""

from __future__ import annotations

from collections.abc import Callable

import msgpack
import psutil

from tests.support import Daemon
from tests.test_daemon_faults import job_of_the_past

NO_MODEL = "/nowhere/model.pt"  # jobs are accepted, decoded, and wait
MIB = 2**20


def test_many_large_answers_to_who_does_not_read_cost_bounded_memory(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(model=NO_MODEL, output_bytes_per_user=128 * MIB, send_timeout_s=60)
    transcript = msgpack.packb({"text": "x" * 20 * MIB})
    job_id = job_of_the_past(daemon.state_dir, [], transcript)
    daemon.start()
    process = psutil.Process(daemon.pid)
    before = process.memory_info().rss
    with daemon.client() as neighbour:
        deaf = [daemon.client() for _ in range(2)]
        ids = [[client.send("result", job=job_id) for _ in range(10)] for client in deaf]  # 400 MiB of answers
        most = 0
        for _ in range(50):
            neighbour.call("health")
            neighbour.call("stats")
            most = max(most, process.memory_info().rss - before)
        assert most < 250 * MIB, "at most the user's budget, beside what SQLite and Python hold of one answer"
        # All of them are answered once they are read.
        for client, numbers in zip(deaf, ids, strict=True):
            for number in numbers:
                assert len(client.reply(number)["result"]["transcript"]["text"]) == 20 * MIB
            client.close()
