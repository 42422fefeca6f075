"""The worker: one piece at a time, interactive runs first, and a cancelled run waits for nothing."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from whisper.tokenizer import get_tokenizer

from tests import test_model_process as model_process
from tests.held_batcher import window_of
from tests.support import wait_until
from whisperd.model import substitutes
from whisperd.model.engine import Engine
from whisperd.model.helper import ModelHelper, Settings, speech_threads
from whisperd.model.loading import load
from whisperd.model.speech import SpeechDetector
from whisperd.model.worker import INTERACTIVE_IN_A_ROW, Turn, Worker
from whisperd.protocol.errors import WhisperdError
from whisperd.protocol.helper_messages import Transcribe
from whisperd.protocol.helpers import HelperLink
from whisperd.protocol.options import parse_options
from whisperd.protocol.systemd import Watchdog


class Held:
    """Keeps all threads of a worker busy until it is let go."""

    def __init__(self, worker: Worker, *, threads: int = 1) -> None:
        self._let_go = threading.Event()
        self._all_busy = threading.Barrier(threads + 1)
        self._threads = [start(lambda: worker.call(Turn(), self._wait)) for _ in range(threads)]
        self._all_busy.wait(30)

    def _wait(self) -> None:
        self._all_busy.wait(30)
        assert self._let_go.wait(60)

    def release(self) -> None:
        self._let_go.set()
        for thread in self._threads:
            thread.join(10)


def start(work: object) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)  # type: ignore[arg-type]
    thread.start()
    return thread


def test_results_and_errors_come_back_to_the_caller() -> None:
    worker = Worker("test")
    assert worker.call(Turn(), lambda: 42) == 42
    with pytest.raises(ZeroDivisionError):
        worker.call(Turn(), lambda: 1 / 0)
    assert worker.call(Turn(), lambda: "still serving") == "still serving"


def test_interactive_runs_come_before_those_that_came_earlier() -> None:
    worker, order = Worker("test"), []
    held = Held(worker)
    threads = []
    promoted = Turn()
    turns = [("first", Turn()), ("second", Turn()), ("promoted", promoted), ("interactive", Turn(interactive=True))]
    for number, (name, turn) in enumerate(turns, 1):
        threads.append(start(lambda name=name, turn=turn: worker.call(turn, lambda: order.append(name))))
        wait_until(lambda number=number: len(worker._waiting) == number)
    promoted.interactive = True  # a priority that changes counts for what waits already
    held.release()
    for thread in threads:
        thread.join(10)
    assert order == ["promoted", "interactive", "first", "second"]


def in_a_row(worker: Worker) -> int:
    """Return how many interactive pieces a worker takes, of more, before one of two in the background that wait."""
    order: list[str] = []
    held = Held(worker)
    threads = []
    most = 20
    for number in range(2 + most):
        name, turn = ("background", Turn()) if number < 2 else ("interactive", Turn(interactive=True))
        threads.append(start(lambda name=name, turn=turn: worker.call(turn, lambda: order.append(name))))
        wait_until(lambda number=number: len(worker._waiting) == number + 1)
    held.release()
    for thread in threads:
        thread.join(10)
    first = order.index("background")
    assert order.index("background", first + 1) == 2 * first + 1, "again as many before the second"
    return first


def test_several_threads_work_on_pieces_beside_each_other() -> None:
    Held(Worker("test", threads=2), threads=2).release()


def test_background_work_moves_under_a_stream_of_interactive_work() -> None:
    assert in_a_row(Worker("test")) == INTERACTIVE_IN_A_ROW
    assert in_a_row(Worker("test", interactive_in_a_row=3)) == 3


def test_the_helpers_workers_do_as_its_settings_say(micro: Path, tmp_path: Path) -> None:
    """The batcher's windows: `test_in_a_row.py`."""
    settings = Settings.of(model_process.settings(tmp_path) | {"interactive_windows_in_a_row": 3})
    helper = ModelHelper(cast(Any, None), settings)
    assert in_a_row(helper._mel_worker) == 3
    assert helper._speech_worker._most_in_a_row == 3  # its threads may be several
    model = load(str(micro), cache_dir=tmp_path, device="cpu", dtype="auto", on_step=lambda: None, environ={})
    engine = Engine(model, on_step=lambda: None, interactive_in_a_row=3)
    assert in_a_row(engine._aligner.worker) == 3


def test_recordings_that_are_listened_to_hold_up_no_others_window_and_no_cancel(micro: Path, tmp_path: Path) -> None:
    substitutes.install()
    model = load(str(micro), cache_dir=tmp_path, device="cpu", dtype="auto", on_step=lambda: None, environ={})
    helper = ModelHelper(HelperLink(cast(Any, None), {}, Watchdog()), Settings.of(model_process.settings(tmp_path)))
    helper._engine, helper._speech = Engine(model, on_step=lambda: None), SpeechDetector()
    (tmp_path / "audio.pcm").write_bytes(bytes(5 * 32_000))
    order = Transcribe(run=1, generation=0, folder="", options=parse_options({"language": "en"}), interactive=False,
                       truncated=False, journal=0, told=0)  # fmt: skip
    helper._runs[1, 0] = run = helper._run(order, spool=tmp_path, send=lambda message: None)
    others = Held(helper._speech_worker, threads=speech_threads())
    raised: list[str] = []

    def transcribe() -> None:
        try:
            run.transcribe()
        except WhisperdError as error:
            raised.append(error.code)

    thread = start(transcribe)
    wait_until(lambda: len(helper._speech_worker._waiting) == 1)
    assert helper._engine.counters.windows == 1
    helper._mark(1, 0, cancelled=True)
    thread.join(30)
    assert raised == ["cancelled"]
    others.release()


def test_few_texts_at_a_time_are_read_for_the_times_of_their_words(micro: Path, tmp_path: Path) -> None:
    """What was read takes memory until it is aligned. Interactive runs do not wait, cancelled ones neither."""
    model = load(str(micro), cache_dir=tmp_path, device="cpu", dtype="auto", on_step=lambda: None, environ={})
    engine = Engine(model, on_step=lambda: None)
    link = HelperLink(cast(Any, None), {}, Watchdog())
    helper = ModelHelper(link, Settings.of(model_process.settings(tmp_path)))
    helper._engine, helper._speech = engine, SpeechDetector()
    order = Transcribe(run=1, generation=0, folder="", options=parse_options({}), interactive=False, truncated=False,
                       journal=0, told=0)  # fmt: skip
    helper._runs[1, 0] = urgent = helper._run(order, spool=tmp_path, send=lambda message: None)
    tokenizer = get_tokenizer(True, num_languages=model.whisper.num_languages, language="en", task="transcribe")
    found: list[Any] = []

    def words(turn: Turn) -> threading.Thread:
        def work() -> None:
            try:
                found.append(engine.align(turn, window_of(1), tokenizer, [1500, 1600], 3000))
            except WhisperdError as error:
                found.append(error.code)

        return start(work)

    aligner, turns, most = engine._aligner, [Turn() for _ in range(7)], 4
    held = Held(aligner.worker)
    threads = [words(turn) for turn in turns[:most]]
    wait_until(lambda: len(aligner.worker._waiting) == most)
    threads += [words(turn) for turn in (*turns[most:], urgent.turn)]
    engine.detect_language(Turn(), window_of(2))  # whoever was to be read before it has been
    assert len(aligner.worker._waiting) == most
    helper._mark(1, 0, interactive=True)
    wait_until(lambda: len(aligner.worker._waiting) == most + 1)
    for some in (turns[most:], turns[:most]):  # those who have no place first: nobody gives them one
        before = len(found)
        for turn in some:
            turn.cancelled = True
        engine.wake()
        wait_until(lambda before=before, some=some: len(found) == before + len(some))
    assert found == ["cancelled"] * len(turns)
    threads.append(words(Turn()))
    wait_until(lambda: len(aligner.worker._waiting) == 2)
    held.release()
    for thread in threads:
        thread.join(30)
    assert [[word.tokens for word in each] for each in found[len(turns) :]] == [[[1500, 1600]]] * 2


def test_a_device_that_failed_silences_no_heartbeat(
    micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper = ModelHelper(cast(Any, None), Settings.of(model_process.settings(tmp_path)))
    model = load(str(micro), cache_dir=tmp_path, device="cpu", dtype="auto", on_step=lambda: None, environ={})
    helper._engine = engine = Engine(model, on_step=lambda: None)
    engine.model = replace(model, device=torch.device("cuda"))
    answers: list[Any] = [(3, 10), torch.AcceleratorError("CUDA error: an illegal memory access was encountered")]

    def ask(device: torch.device) -> tuple[int, int]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return cast("tuple[int, int]", answer)

    monkeypatch.setattr(torch.cuda, "mem_get_info", ask)
    well, failed = helper._gauges(), helper._gauges()
    assert (well.pop("device_used_bytes"), well.pop("device_total_bytes")) == (7, 10)
    assert failed == well


def test_a_cancelled_run_does_not_wait_for_its_turn() -> None:
    worker, turn, raised = Worker("test"), Turn(), []
    held = Held(worker)

    def wait() -> None:
        try:
            worker.call(turn, lambda: None)
        except WhisperdError as error:
            raised.append(error.code)

    waiting = start(wait)
    wait_until(lambda: len(worker._waiting) == 1)
    turn.cancelled = True
    worker.wake()
    waiting.join(10)
    assert raised == ["cancelled"]
    held.release()


def test_what_is_only_begun_holds_up_nobody_and_its_error_ends_with_it() -> None:
    worker, go, seen = Worker("test"), threading.Event(), list[str]()

    def slow() -> None:
        go.wait()
        seen.append("slow")
        raise ValueError("nobody hears of it")

    worker.begin(slow)  # returns at once, else `go` is never set
    go.set()
    worker.call(Turn(), lambda: seen.append("next"))
    assert seen == ["slow", "next"]
