"""The batcher on real weights: many runs at once say what each says alone, and the urgent ones come first."""

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
from whisper.decoding import DecodingOptions

from bench.words import word_error_rate
from tests import models
from tests import test_model_process as model_process
from tests.model_bench import Bench, check_same, open_bench, speak_into, write_folders
from tests.support import requires_program, wait_until
from whisperd.model.batch import batcher
from whisperd.model.batch.batcher import EXIT_BROKEN, Batcher, Limits, Request
from whisperd.model.batch.caches import Cache
from whisperd.model.batch.decoder import Decoder
from whisperd.model.batch.kernels import Kernels
from whisperd.model.batch.rows import LiveRows
from whisperd.model.batch.windows import KeptWindows, Window
from whisperd.model.engine import Engine
from whisperd.model.helper import ModelHelper, Settings
from whisperd.model.loading import load
from whisperd.model.run import Run
from whisperd.model.speech import SpeechDetector
from whisperd.model.transcript import Transcript
from whisperd.model.worker import INTERACTIVE_IN_A_ROW, Turn
from whisperd.protocol.channel import Channel
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.frames import MAX_REPLY_BYTES
from whisperd.protocol.helper_messages import Failed, Finished, from_wire
from whisperd.protocol.helpers import HelperLink
from whisperd.protocol.systemd import Watchdog

TEXT = (
    "The harbour was quiet in the morning. A small boat came in with the tide, and two men carried fish to the market."
)
# A few seconds each: what they are about is that they run beside each other.
JOBS: list[dict[str, Any]] = [
    {},
    {"condition_on_previous_text": False, "initial_prompt": "A story of the sea."},
    {"word_timestamps": True, "clip_timestamps": [0, 4]},
    {"beam_size": 5, "patience": 1.5, "temperature": 0, "clip_timestamps": [1, 5]},
    {"temperature": [0.0, 0.0], "logprob_threshold": 0.0, "clip_timestamps": [2, 6]},  # always tried again
    {"suppress_tokens": "", "clip_timestamps": [3]},
]


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spool = tmp_path_factory.mktemp("spool")
    speak_into(spool, TEXT)
    write_folders(spool, silence=bytes(2 * 16_000 * 65))
    return spool


@pytest.fixture(scope="module")
def tiny(spool: Path) -> Bench:
    return open_bench("demo", spool)


def at_once(bench: Bench, runs: list[Run]) -> list[Transcript]:
    """Return the transcripts of runs that all begin together; interactive ones break in after some steps of others."""
    found: dict[int, Transcript] = {}
    batcher, break_in = bench.engine._batcher, threading.Event()
    break_in_at = bench.engine.counters.steps + 5

    def look() -> None:
        if bench.engine.counters.steps >= break_in_at and batcher._live.count and not break_in.is_set():
            break_in.set()
            with batcher._changed:
                batcher._changed.wait_for(lambda: any(each.turn.interactive for each in batcher._waiting), 60)

    def work(n: int, run: Run) -> None:
        if run.turn.interactive:
            assert break_in.wait(60)
        found[n] = run.transcribe()

    bench.on_step = look
    threads = [threading.Thread(target=work, args=each) for each in enumerate(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    bench.on_step = lambda: None
    return [found[n] for n in range(len(runs))]


@requires_program("flite")
@pytest.mark.parametrize("count", [2, 5, 16, "5, read late as on a GPU"])
def test_runs_beside_each_other_say_what_upstream_says(
    tiny: Bench, count: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(count, str):
        monkeypatch.setattr(Kernels, "reads_late", True)
        monkeypatch.setattr(Kernels, "encodes_beside_steps", True)
        count = 5
    jobs = [JOBS[n % len(JOBS)] for n in range(count)]
    random.Random(count).shuffle(jobs)
    runs = [tiny.begin(**options)[0] for options in jobs]
    for run in runs[::4]:
        run.turn.interactive = True
    counters = tiny.engine.counters
    steps, together = counters.steps, counters.window_steps
    for options, transcript in zip(jobs, at_once(tiny, runs), strict=True):
        segments = [segment.to_wire() for segment in transcript.segments]
        for segment in segments:
            segment.pop("speech", None)
        check_same(segments, tiny.upstream_segments(**options))
    if count > 2:
        assert counters.window_steps - together > 1.5 * (counters.steps - steps), "they stepped together"


def test_a_window_seen_before_is_not_decoded_again(tiny: Bench) -> None:
    options = {"temperature": 0, "condition_on_previous_text": False, "no_speech_threshold": None}
    counters = tiny.engine.counters
    windows, reused = counters.windows, counters.reused
    transcript = tiny.begin("silence", **options)[0].transcribe()
    assert (counters.windows - windows, counters.reused - reused) == (2, 1)
    assert [segment.tokens for segment in transcript.segments] == [
        segment["tokens"] for segment in tiny.upstream("silence", **options)["segments"]
    ]
    assert transcript.timing.windows == 2


@requires_program("flite")
def test_bfloat16_hears_the_same_words(spool: Path) -> None:
    try:
        model = load("demo", cache_dir=spool, device="cpu", dtype="bfloat16", on_step=lambda: None, environ={})
    except WhisperdError as error:
        pytest.skip(error.message)
    bench = Bench(model, spool, release=True)
    transcript = bench.begin(temperature=0, word_timestamps=True)[0].transcribe()
    assert word_error_rate(TEXT, transcript.text) < 0.15
    assert all(segment.words for segment in transcript.segments)


# --- who comes first: the babbler, window by window ---


OPTIONS = DecodingOptions(language="en", fp16=False, sample_len=16)


class Windows:
    """An engine that is held until it is let go, and looked at between any two pieces of its work."""

    def __init__(self, folder: Path, *, windows: int, interactive_in_a_row: int = INTERACTIVE_IN_A_ROW) -> None:
        torch.set_num_threads(1)
        model = load(str(models.babbler_checkpoint(folder)), cache_dir=folder, device="cpu", dtype="auto",
                     on_step=lambda: None, environ={})  # fmt: skip
        self.go = threading.Event()
        self.look: Callable[[], None] = lambda: None
        self.begun: list[str] = []  # in the order in which their first token was said
        self.outcomes: dict[str, Any] = {}
        self._names: dict[int, str] = {}
        self._threads: list[threading.Thread] = []
        self.left: list[int] = []  # with which status the process would have ended
        self.engine = Engine(model, on_step=self._between, windows=windows, interactive_in_a_row=interactive_in_a_row,
                             leave=self._leave)  # fmt: skip
        self.batcher: Batcher = self.engine._batcher
        self.held = True

    def _between(self) -> None:
        if hasattr(self, "held"):
            assert self.go.wait(60)
            for request in self.batcher._live.owners:
                name = self._names.get(id(request.turn), "")
                if name not in self.begun:
                    self.begun.append(name)
            self.look()

    def _leave(self, status: int) -> None:
        """Do what the end of the process does: nobody waits any longer."""
        self.left.append(status)
        for request in [*self.batcher._waiting, *self.batcher._live.owners]:
            request.settle(error=SystemExit(status))

    def ask(self, name: str, *, interactive: bool = False, sound: int = 0, **options: Any) -> Turn:
        """Have a window decoded by a thread of its own, and return its turn."""
        turn = Turn(interactive=interactive)
        self._names[id(turn)] = name
        wanted = replace(OPTIONS, **options)
        waiting = len(self.batcher._waiting)

        def work() -> None:
            try:
                self.outcomes[name] = self.engine.decode(turn, KeptWindows(), window_of(sound), wanted, seed=0).tokens
            except BaseException as error:
                self.outcomes[name] = error

        self._threads.append(threading.Thread(target=work, daemon=True))
        self._threads[-1].start()
        if not self.go.is_set():
            wait_until(lambda: len(self.batcher._waiting) > waiting)
        return turn

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)

    def alone(self, *, sound: int = 0, **options: Any) -> list[int]:
        """Return the tokens of such a window with nobody beside it, once all that was asked for is done."""
        self.look = lambda: None
        wanted = replace(OPTIONS, **options)
        return self.engine.decode(Turn(), KeptWindows(), window_of(sound), wanted, seed=0).tokens


def window_of(sound: int) -> Window:
    """Return half a minute of a sound that does not change; of another one the babbler says something else."""
    spectrum = torch.randn(80, 1, generator=torch.Generator().manual_seed(sound))
    return KeptWindows().window(spectrum.repeat(1, 3000))


def test_an_interactive_window_has_a_place_and_no_background_window_is_encoded_beside_it(tmp_path: Path) -> None:
    windows = Windows(tmp_path, windows=2)
    seen: list[tuple[bool, int, int]] = []

    def look() -> None:
        live = windows.batcher._live.owners
        urgent = any(request.turn.interactive for request in live)
        seen.append((urgent, len(live), windows.engine.counters.encoded))
        if len(live) == 2 and len(windows._threads) == 4:
            windows.ask("urgent", interactive=True, sound=9)
            wait_until(lambda: any(request.turn.interactive for request in windows.batcher._waiting))

    windows.look = look
    lengths = [6, 16, 16, 16]  # the first one ends early: others move to where it was
    for n, length in enumerate(lengths):
        windows.ask(f"background {n}", sound=n, sample_len=length)
    windows.go.set()
    windows.join()
    assert windows.begun[:3] == ["background 0", "background 1", "urgent"]
    assert max(live for urgent, live, _ in seen if urgent) == 3, "both places were taken, and there was one more"
    assert len({encoded for urgent, _, encoded in seen if urgent}) == 1, "nothing was encoded beside it"
    assert max(live for urgent, live, _ in seen if not urgent) == 2
    alone = {f"background {n}": windows.alone(sound=n, sample_len=length) for n, length in enumerate(lengths)}
    assert windows.outcomes == alone | {"urgent": windows.alone(sound=9)}, "who broke in changed nothing"
    assert len({tuple(tokens) for tokens in alone.values()}) > 2, (
        "a model that says the same to everybody shows nothing"
    )


def test_background_windows_move_under_a_stream_of_interactive_ones(tmp_path: Path) -> None:
    windows = Windows(tmp_path, windows=1)
    windows.ask("background")
    for n in range(2 * INTERACTIVE_IN_A_ROW):
        windows.ask(f"urgent {n}", interactive=True)
    windows.go.set()
    windows.join()
    assert windows.begun.index("background") == INTERACTIVE_IN_A_ROW


def test_interactive_windows_do_not_wait_for_background_ones_that_move(tmp_path: Path) -> None:
    """As many as may be in a row have begun, another background window waits, and those that live take all places."""
    windows = Windows(tmp_path, windows=2, interactive_in_a_row=2)

    def look() -> None:
        if len(windows.batcher._live.owners) == 2 and len(windows._threads) == 3:
            for n in range(4):
                windows.ask(f"urgent {n}", interactive=True, sample_len=3)
            wait_until(lambda: len(windows.batcher._waiting) == 5)

    windows.look = look
    for n in range(3):
        windows.ask(f"background {n}")
    windows.go.set()
    windows.join()
    assert sorted(windows.begun[2:6]) == [f"urgent {n}" for n in range(4)]
    assert windows.begun == ["background 0", "background 1", *windows.begun[2:6], "background 2"]


def test_a_window_of_many_rows_gets_its_turn_beside_a_stream_of_narrow_ones(tmp_path: Path) -> None:
    """It fits only alone, and the narrow ones never end together. Urgent ones do not wait for it."""
    windows, wide, short = Windows(tmp_path, windows=3), {"beam_size": 15, "sample_len": 8}, {"sample_len": 3}
    narrow = [{"beam_size": 5, "sample_len": 6 + 3 * (n % 3)} for n in range(9)]

    def look() -> None:
        if len(windows.begun) == 5 and len(windows._threads) == 10:
            windows.ask("urgent", interactive=True, sound=1, **short)
            wait_until(lambda: any(request.turn.interactive for request in windows.batcher._waiting))

    windows.look = look
    for n, options in enumerate(narrow):
        if n == 2:
            windows.ask("wide", sound=9, **wide)
        windows.ask(f"narrow {n}", sound=n, **options)
    windows.go.set()
    windows.join()
    assert windows.begun[:7] == [*(f"narrow {n}" for n in range(5)), "urgent", "wide"], "three of them passed it over"
    alone = {f"narrow {n}": windows.alone(sound=n, **options) for n, options in enumerate(narrow)}
    alone |= {"wide": windows.alone(sound=9, **wide), "urgent": windows.alone(sound=1, **short)}
    assert windows.outcomes == alone


def test_a_cancelled_window_ends_at_the_next_step_and_the_others_go_on(tmp_path: Path) -> None:
    windows = Windows(tmp_path, windows=3)
    turns = [windows.ask(f"window {n}", sound=n) for n in range(3)]
    cancelled_at: list[int] = []

    def look() -> None:
        live = windows.batcher._live.owners
        if len(live) == 3 and not cancelled_at:
            turns[1].cancelled = True
            cancelled_at.append(windows.engine.counters.steps)
        elif cancelled_at and windows.engine.counters.steps == cancelled_at[0] + 1:
            assert turns[1] not in [request.turn for request in live]

    windows.look = look
    windows.go.set()
    windows.join()
    assert cancelled_at
    assert isinstance(windows.outcomes["window 1"], WhisperdError)
    assert {n: windows.outcomes[f"window {n}"] for n in (0, 2)} == {n: windows.alone(sound=n) for n in (0, 2)}


class Undroppable(LiveRows[Request]):
    """Gives up nothing."""

    def drop(self, owner: Request) -> None:
        raise ValueError("its slot is not in the list")


def test_a_batcher_that_fails_says_so_and_ends_its_process_and_blames_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    windows = Windows(tmp_path, windows=2)
    windows.batcher._live.__class__ = Undroppable
    turn = windows.ask("cancelled")
    windows.ask("other", sound=1)
    windows.ask("waiting", sound=2)

    def look() -> None:
        turn.cancelled = len(windows.batcher._live.owners) == 2

    windows.look = look
    windows.go.set()
    windows.join()
    assert windows.left == [EXIT_BROKEN]
    assert [type(windows.outcomes[name]) for name in ("other", "waiting")] == [SystemExit, SystemExit]
    (line,) = [record for record in caplog.records if record.levelname == "CRITICAL"]
    assert line.exc_info is not None
    assert isinstance(line.exc_info[1], ValueError)


# --- want of memory ---


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
    windows = Windows(tmp_path, windows=8)
    batcher = windows.batcher
    batcher._live.__class__ = ShortOfMemory
    batcher._live.most = most  # type: ignore[attr-defined]
    for n in range(5):
        windows.ask(f"window {n}", sound=n)
    windows.go.set()
    windows.join()
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
    assert not batcher._live.count


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

    windows = Windows(tmp_path, windows=4)
    kinds: list[dict[str, Any]] = [{}, {"beam_size": 3}, {"temperature": 0.4, "best_of": 3}, {"sample_len": 4}]
    asked = {f"window {n}": (n, {"sample_len": 16} | kinds[n % len(kinds)]) for n in range(32)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernels, "reads_late", late)
        patch.setattr(Kernels, "encodes_beside_steps", late)
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

    def use(features: torch.Tensor) -> str:
        nonlocal tried
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
    bench = open_bench(str(micro), spool)
    live: Any = bench.engine._batcher._live
    live.__class__ = ShortOfMemory
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


def test_digest_tells_windows_apart() -> None:
    kept, mel = KeptWindows(), torch.zeros(80, 3000)
    first = kept.window(mel)
    assert kept.window(mel.clone()) is first
    mel[3, 7] = np.nextafter(np.float32(0), np.float32(1)).item()
    assert kept.window(mel) is not first
