"""Want of memory at the model: less at once, nobody lost, and only what does not fit alone fails."""

from __future__ import annotations

import random
import socket
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import test_model_process as model_process
from tests.held_batcher import LikeAGpu, Windows, window_of
from tests.model_bench import open_bench, write_folders
from tests.support import wait_until
from whisperd.model.batch import batcher
from whisperd.model.batch.batcher import Limits, Request
from whisperd.model.batch.caches import Cache
from whisperd.model.batch.decoder import Decoder
from whisperd.model.batch.kernels import Kernels
from whisperd.model.batch.pieces import Pieces
from whisperd.model.batch.rows import LiveRows
from whisperd.model.helper import ModelHelper, Settings
from whisperd.model.speech import SpeechDetector
from whisperd.model.worker import Turn
from whisperd.protocol.channel import Channel
from whisperd.protocol.errors import ErrorCode
from whisperd.protocol.frames import MAX_REPLY_BYTES
from whisperd.protocol.helper_messages import Failed, Finished, from_wire
from whisperd.protocol.helpers import HelperLink
from whisperd.protocol.systemd import Watchdog


class ShortOfMemory(LiveRows[Request]):
    """Has no room for steps of more than `most` windows."""

    most = 2

    def step(self) -> Any:
        if len(self.owners) > self.most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return super().step()


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what the log's warnings say of what may be decoded at once."""
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    return [line.partition("at once ")[2] for line in lines if "out of memory" in line]


@pytest.mark.parametrize("most", [2, 0])
def test_want_of_memory_halves_the_batch_and_fails_only_what_does_not_fit_alone(
    tmp_path: Path, most: int, caplog: pytest.LogCaptureFixture
) -> None:
    windows = Windows(tmp_path, windows=8, live_rows=ShortOfMemory)
    batcher = windows.batcher
    batcher._live.most = most  # type: ignore[attr-defined]
    for n in range(5):
        windows.ask(f"window {n}", sound=n)
    windows.go.set()
    windows.join()
    wait_until(lambda: not batcher._live.count)  # who waited is told before his window is dropped
    if most:
        batcher._live.most = 99  # type: ignore[attr-defined]
        assert windows.outcomes == {f"window {n}": windows.alone(sound=n) for n in range(5)}
        assert (batcher._limits.windows, batcher._limits.rows) == (2, 10)
        assert told(caplog) == ["windows=4 rows=20", "windows=2 rows=10"], "once each time"
    else:
        assert {type(outcome) for outcome in windows.outcomes.values()} == {torch.cuda.OutOfMemoryError}
        assert batcher._limits.windows == 1
        assert told(caplog)[-1] == "windows=1 rows=1"
        assert len(told(caplog)) == len(set(told(caplog))), "not again when there is nothing left to halve"
    assert windows.engine.gauges()["batch_windows"] == batcher._limits.windows


@pytest.mark.parametrize("late", [False, True])
def test_wherever_memory_runs_out_each_window_is_found_once_and_right(tmp_path: Path, late: bool) -> None:
    """Whatever takes memory fails now and then, unless a window is alone: greedy, drawn and beams.

    In the middle of growing caches too, and of giving memory back.
    """
    chance, failures = random.Random(late), Counter[str]()

    def sometimes(name: str, likely: float, works: Callable[..., Any]) -> Callable[..., Any]:
        def work(*args: Any, **kwargs: Any) -> Any:
            if name == "copy" and len(args[1]) < 2:  # that takes no memory
                return works(*args, **kwargs)
            if len(windows.batcher._live.owners) > 1 and chance.random() < likely:
                failures[name] += 1
                raise chance.choice([torch.cuda.OutOfMemoryError, MemoryError])("out of memory")
            return works(*args, **kwargs)

        return work

    windows = Windows(tmp_path, windows=4, kernels=LikeAGpu() if late else None)
    kinds: list[dict[str, Any]] = [{}, {"beam_size": 3}, {"temperature": 0.4, "best_of": 3}, {"sample_len": 4}]
    asked = {f"window {n}": (n, {"sample_len": 16} | kinds[n % len(kinds)]) for n in range(32)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batcher, "_WELL_WINDOWS", 1)  # so that there are many at once again soon
        taking: list[tuple[type, str, float]]
        taking = [
            (Cache, "_zeros", 0.1),
            (Cache, "copy", 0.2),
            (Decoder, "step", 0.03),
            (Kernels, "send", 0.01),
        ]
        for kind, name, likely in taking:
            patch.setattr(kind, name, sometimes(name, likely, getattr(kind, name)))
        for name, (sound, options) in asked.items():
            windows.ask(name, sound=sound, **options)
        windows.go.set()
        windows.join()
    assert windows.outcomes.keys() == asked.keys(), "nobody waits for ever"
    assert all(failures[name] for _, name, _ in taking), failures
    for name, (sound, options) in asked.items():
        assert windows.outcomes[name] == windows.alone(sound=sound, **options), options
    assert not windows.batcher._live.count


def test_what_finds_no_memory_beside_live_windows_does_not_hold_them_up(tmp_path: Path) -> None:
    windows, tried = Windows(tmp_path, windows=3), 0

    def use(features: torch.Tensor) -> Pieces[str]:
        nonlocal tried
        yield
        tried += 1
        if windows.batcher._live.count:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return "used"

    for n in range(2):
        windows.ask(f"window {n}", sound=n)
    request = Request(Turn(), window_of(7), use=use)
    asking = threading.Thread(target=windows.batcher.call, args=(request,), daemon=True)
    asking.start()
    wait_until(lambda: request in windows.batcher._waiting)
    windows.go.set()
    windows.join()
    asking.join(60)
    assert [type(outcome) for outcome in windows.outcomes.values()] == [list, list]
    assert (request.outcome, request.error) == ("used", None)
    assert tried > 1


def test_a_job_that_does_not_fit_even_alone_fails_as_out_of_memory_and_the_next_one_is_done(
    micro: Path, tmp_path: Path
) -> None:
    settings = model_process.settings(tmp_path)
    spool = Path(settings["spool"])
    spool.mkdir()
    write_folders(spool, noise=np.random.default_rng(0).integers(-2000, 2000, 32_000).astype("<i2").tobytes())
    bench = open_bench(str(micro), spool, live_rows=ShortOfMemory)
    live: Any = bench.engine.batcher._live
    ours, theirs = socket.socketpair()
    with ours, theirs:
        link = HelperLink(Channel(theirs, max_bytes=MAX_REPLY_BYTES), {}, Watchdog())
        helper = ModelHelper(link, Settings.of(settings))
        helper._engine, helper._speech = bench.engine, SpeechDetector()
        heard = Channel(ours, max_bytes=MAX_REPLY_BYTES)
        for run, live.most in [(1, 0), (2, 9)]:
            helper._begin(replace(bench.begin("noise", temperature=0)[0].order, run=run))
            answer = from_wire(heard.receive(60)[0])
            while not isinstance(answer, Failed | Finished):
                answer = from_wire(heard.receive(60)[0])
            if run == 1:
                assert isinstance(answer, Failed)
                assert answer.code == ErrorCode.OUT_OF_MEMORY
        assert isinstance(answer, Finished)


def test_what_was_halved_grows_back_when_all_is_well_and_never_beyond_the_first() -> None:
    limits = Limits(windows=6, rows=9)

    def grown(most: int = 1000) -> list[tuple[int, int]]:
        """What it is after each change, over `most` windows that end well."""
        seen = [(limits.windows, limits.rows)]
        for _ in range(most):
            limits.window_ended()
            if (limits.windows, limits.rows) != seen[-1]:
                seen.append((limits.windows, limits.rows))
        return seen

    assert grown() == [(6, 9)]
    limits.halve()
    limits.halve()
    assert grown() == [(1, 2), (2, 4), (4, 8), (6, 9)]
    limits.halve()
    assert grown(150) == [(3, 4)], "not at once"
    limits.halve()
    assert grown(150) == [(1, 2)], "and the windows before the last want of memory do not count"
    assert grown(50)[-1] == (2, 4)
