"""Who comes first at the model, window by window; and who is given up, or told, when something ends early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import models
from tests.held_batcher import LikeAGpu, Windows
from tests.support import wait_until
from whisperd.model.batch.batcher import EXIT_BROKEN, Request
from whisperd.model.batch.rows import LiveRows
from whisperd.model.worker import INTERACTIVE_IN_A_ROW
from whisperd.protocol.errors import WhisperdError

EOT = 50257  # of the multilingual vocabulary


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


def test_a_gpu_takes_in_all_that_may_come_in_and_encodes_beside_steps_where_an_interactive_window_lives(
    tmp_path: Path,
) -> None:
    windows = Windows(tmp_path, windows=8, kernels=LikeAGpu())
    unending: dict[str, Any] = {"suppress_tokens": [EOT]}
    seen: list[tuple[int, int, int]] = []  # while the interactive window lives: windows, steps, encoded windows
    most = 0

    def look() -> None:
        nonlocal most
        live, counters = windows.batcher._live.owners, windows.engine.counters
        if any(request.turn.interactive for request in live):
            seen.append((len(live), counters.steps, counters.encoded))
        else:
            most = max(most, len(live))
        if len(live) == 8 and len(windows._threads) == 10:
            windows.ask("urgent", interactive=True, **unending)
            wait_until(lambda: any(request.turn.interactive for request in windows.batcher._waiting))

    windows.look = look
    for n in range(10):
        windows.ask(f"background {n}", sound=n, sample_len=6 if n < 2 else 16, **unending)
    windows.go.set()
    windows.join()
    assert most == 8
    assert seen[0][0] == 9
    steps = [step for _, step, _ in seen]
    assert steps == [*range(steps[0], steps[0] + len(steps))], "it waits for no more than a piece before its next step"
    assert seen[-1][2] > seen[0][2], "windows that came later were encoded beside it"


def test_background_windows_move_under_a_stream_of_interactive_ones(tmp_path: Path) -> None:
    windows = Windows(tmp_path, windows=1)
    windows.ask("background")
    for n in range(2 * INTERACTIVE_IN_A_ROW):
        windows.ask(f"urgent {n}", interactive=True)
    windows.go.set()
    windows.join()
    # From then on a piece of it comes first after so many pieces: a window is few of those here.
    assert INTERACTIVE_IN_A_ROW <= windows.begun.index("background") < 2 * INTERACTIVE_IN_A_ROW


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


def test_a_window_of_which_nothing_can_be_drawn_fails_alone(tmp_path: Path) -> None:
    windows = Windows(tmp_path, windows=3)
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {},
        "impossible": {"temperature": 0.5, "suppress_tokens": [*range(models.MICRO.n_vocab)]},
        "drawn": {"temperature": 0.4},
    }
    for sound, (name, options) in enumerate(kinds.items()):
        windows.ask(name, sound=sound, **options)
    windows.go.set()
    windows.join()
    error = windows.outcomes.pop("impossible")
    assert isinstance(error, WhisperdError), error
    assert (error.code, windows.left) == ("bad_request", [])
    assert windows.outcomes == {"greedy": windows.alone(sound=0), "drawn": windows.alone(sound=2, **kinds["drawn"])}


class Undroppable(LiveRows[Request]):
    """Gives up nothing."""

    def drop(self, owner: Request) -> None:
        raise ValueError("its slot is not in the list")


def test_a_batcher_that_fails_says_so_and_ends_its_process_and_blames_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    windows = Windows(tmp_path, windows=2, live_rows=Undroppable)
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
