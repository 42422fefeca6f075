"""A window begins, and a text is read, a layer at a time: whoever is cancelled or urgent waits for no more than one."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from whisper.decoding import DecodingOptions
from whisper.model import Whisper
from whisper.tokenizer import get_tokenizer

from tests import models
from tests.held_batcher import CountsBlocks, window_of
from tests.support import wait_until
from tests.test_batch_rules import CPU, Late, assert_same, live_rows, said_alone, task_of
from whisperd.model.batch.batcher import Request
from whisperd.model.batch.caches import Cache
from whisperd.model.batch.kernels import Kernels
from whisperd.model.batch.pieces import Pieces
from whisperd.model.batch.search import Outcome, search_of
from whisperd.model.batch.windows import KeptWindows
from whisperd.model.engine import Engine
from whisperd.model.loading import LoadedModel
from whisperd.model.worker import Turn
from whisperd.protocol.errors import WhisperdError

LAYERS = 4
OPTIONS = DecodingOptions(language="en", fp16=False, sample_len=12)


@pytest.fixture(scope="module")
def babbler() -> Whisper:
    torch.set_num_threads(1)
    return models.babbler(LAYERS)


@pytest.fixture(scope="module")
def far_hearing() -> Whisper:
    """Return one whose encoder has as many layers, and its decoder one."""
    torch.set_num_threads(1)
    return models.babbler(audio_layers=LAYERS)


# --- the live rows: others come and go meanwhile ---


@torch.inference_mode()
def test_windows_that_begin_beside_each_other_say_what_each_says_alone(babbler: Whisper) -> None:
    """Others step, end and are given up while they begin, and they are given up themselves."""
    options: list[dict[str, Any]] = [
        {},
        {"temperature": 0.4, "best_of": 3},
        {"beam_size": 3},
        {"prompt": [900] * 40},
        {"sample_len": 3},
        {"sample_len": 5},
    ]
    tasks = [task_of(babbler, **{"sample_len": 9} | each) for each in options]
    features = torch.randn(len(tasks), models.MICRO.n_audio_ctx, models.MICRO.n_audio_state)
    alone = said_alone(babbler, tasks, features)
    chance, given_up, beside = random.Random(4), 0, set[tuple[int, int]]()
    for late in [False, True] * 3:
        live, waiting = live_rows(babbler, Late() if late else None), [*range(len(tasks))]
        begun, found = dict[int, Pieces[None]](), dict[int, Outcome]()
        while waiting or begun or live.count:
            if waiting and chance.random() < 0.3:
                owner = waiting.pop(chance.randrange(len(waiting)))
                begun[owner] = live.begin_in_pieces(
                    owner, tasks[owner], search_of(tasks[owner], owner), features[owner]
                )
            if begun:
                owner = chance.choice([*begun])
                if next(begun[owner], "over"):
                    del begun[owner]
            beside.add((len(live.owners), len(live.beginning)))
            if live.count and chance.random() < 0.5:
                found |= dict(live.step())
            if (live.owners or begun) and chance.random() < 0.05:
                waiting.append(chance.choice([*live.owners, *begun]))
                live.drop(waiting[-1])
                begun.pop(waiting[-1], None)
                given_up += 1
            if chance.random() < 0.05:
                live.shrink(windows=1, rows=1)
        assert not live.beginning
        assert_same(found, alone)
    assert given_up > 6
    assert {(0, 3), (2, 1), (2, 2)} <= beside


def test_slots_are_swapped_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(layers=2, heads=2, length=4, width=3, slots=3, zeros=Kernels(CPU, torch.float32).zeros, turned=True)
    tensors = (*cache.keys, *cache.values)
    for tensor in tensors:
        tensor.copy_(torch.randn(tensor.shape))
    before = [tensor.clone() for tensor in tensors]
    cache.swap(0, 2)
    assert all(torch.equal(tensor, was[[2, 1, 0]]) for tensor, was in zip(tensors, before, strict=True))

    def no_memory(*args: Any, **kwargs: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    for name in ("empty", "empty_like", "clone"):
        monkeypatch.setattr(torch, name, no_memory)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        cache.swap(0, 2)
    assert all(torch.equal(tensor, was[[2, 1, 0]]) for tensor, was in zip(tensors, before, strict=True))


# --- the batcher: who has to wait ---


class Watched:
    """An engine that is looked at between any two pieces of its work."""

    def __init__(self, model: Whisper, **options: Any) -> None:
        self.look: Callable[[], None] = lambda: None
        loaded = LoadedModel(whisper=model, name="random", device=CPU, dtype=torch.float32)
        self.engine = Engine(loaded, on_step=lambda: self.look(), windows=2, **options)
        self.batcher = self.engine.batcher
        self.live = self.batcher._live

    def decode(self, turn: Turn, seed: int, **options: Any) -> list[int]:
        wanted = replace(OPTIONS, **options)
        return list(self.engine.decode(turn, KeptWindows(), window_of(seed), wanted, seed=0).tokens)

    def language(self, turn: Turn, seed: int) -> object:
        return self.engine.detect_language(turn, window_of(seed))

    def words(self, turn: Turn, seed: int) -> object:
        model = self.engine.model.whisper
        tokenizer = get_tokenizer(True, num_languages=model.num_languages, language="en", task="transcribe")
        return self.engine.align(turn, window_of(seed), tokenizer, [400, 500, 600], 3000)


@pytest.mark.parametrize("ask", [Watched.decode, Watched.language, Watched.words])
def test_a_cancel_is_obeyed_between_the_layers_of_what_is_read(
    babbler: Whisper, ask: Callable[[Watched, Turn, int], object]
) -> None:
    watched, turn, looks = Watched(babbler), Turn(), 0

    def look() -> None:
        nonlocal looks
        if watched.engine.counters.encoded:
            looks += 1
            turn.cancelled = looks == LAYERS - 1

    watched.look = look
    with pytest.raises(WhisperdError, match="cancelled"):
        ask(watched, turn, 1)
    assert looks == LAYERS - 1
    assert not watched.engine.counters.steps
    assert not watched.live.beginning
    watched.look = lambda: None
    assert ask(watched, Turn(), 1) is not None


def test_an_urgent_window_overtakes_one_that_is_being_begun(babbler: Whisper) -> None:
    watched, urgent = Watched(babbler), Turn(interactive=True)
    found = dict[str, list[int]]()
    asking = threading.Thread(target=lambda: found.update(urgent=watched.decode(urgent, 2)), daemon=True)
    overtook = False

    def look() -> None:
        nonlocal overtook
        if watched.live.beginning and not asking.ident:
            asking.start()
            wait_until(lambda: len(watched.batcher._waiting) == 2)
        turns = [
            [request.turn.interactive for request in each] for each in (watched.live.owners, watched.live.beginning)
        ]
        overtook = overtook or turns == [[True], [False]]

    watched.look = look
    found["background"] = watched.decode(Turn(), 1)
    asking.join(60)
    assert overtook
    watched.look = lambda: None
    assert found == {"urgent": watched.decode(Turn(), 2), "background": watched.decode(Turn(), 1)}


@pytest.mark.parametrize("beside_steps", [False, True], ids=["cpu", "gpu"])
def test_an_urgent_window_waits_for_one_block_and_one_step(far_hearing: Whisper, beside_steps: bool) -> None:
    """One window is live, and the next one is in the middle of its first block."""
    kernels = CountsBlocks(encodes_beside_steps=beside_steps)
    watched = Watched(far_hearing, kernels=kernels)
    turns = [Turn(), Turn(), Turn(interactive=True)]
    live, encoded, urgent = [
        threading.Thread(target=watched.decode, args=(turn, seed), daemon=True) for seed, turn in enumerate(turns)
    ]
    done: list[tuple[int, int]] = []  # blocks and steps, when the urgent one comes, and as long as it waits

    def note() -> None:
        done.append((kernels.blocks, watched.live.steps))

    def begin(asking: threading.Thread) -> None:
        waiting = len(watched.batcher._waiting)
        asking.start()
        wait_until(lambda: len(watched.batcher._waiting) > waiting)

    def break_in() -> None:
        if encoded.ident and not urgent.ident:
            begin(urgent)
            note()

    def look() -> None:
        if watched.live.owners and not encoded.ident:
            begin(encoded)
        if any(request.turn.interactive and request.pieces is None for request in watched.batcher._waiting):
            note()

    kernels.on_block, watched.look = break_in, look
    live.start()
    for thread in (live, encoded, urgent):  # each has asked before the one before it is done
        thread.join(60)
    assert done[0][0] == LAYERS + 1, "it came in the first block of the second window"
    (blocks, steps), (blocks_at_last, steps_at_last) = done[0], done[-1]
    assert blocks_at_last == blocks, "the block that was under way, and none besides"
    assert steps_at_last <= steps + beside_steps


def test_an_urgent_window_waits_for_few_blocks_of_what_stood_still(far_hearing: Whisper) -> None:
    """Behind a stream of urgent windows another one is due, and gets a block now and then: not all at once."""
    kernels = CountsBlocks()
    in_a_row, turn = 4, Turn(interactive=True)
    watched = Watched(far_hearing, kernels=kernels, interactive_in_a_row=in_a_row)
    said = list[list[int]]()
    began_behind, of_others, waited_for = -1, 0, dict[Request, list[int]]()

    def stream() -> None:
        for seed in range(4 * in_a_row):
            if began_behind < 0:
                watched.decode(turn, seed, sample_len=3)

    streaming = threading.Thread(target=stream, daemon=True)
    waiting = threading.Thread(target=lambda: said.append(watched.decode(Turn(), 99)), daemon=True)

    def urgent() -> list[Request]:
        return [each for each in (*watched.batcher._waiting, *watched.live.owners) if each.turn.interactive]

    def on_block() -> None:
        nonlocal of_others
        (running,) = [each for each in watched.batcher._waiting if getattr(each.pieces, "gi_running", False)]
        of_others += not running.turn.interactive

    def look() -> None:
        nonlocal began_behind
        if not waiting.ident:
            waiting.start()
            wait_until(lambda: len(watched.batcher._waiting) == 2)
        wait_until(lambda: urgent() or not streaming.is_alive())
        for each in watched.batcher._waiting:
            if each.turn.interactive:
                waited_for.setdefault(each, []).append(of_others)
        if began_behind < 0 and any(not each.turn.interactive for each in watched.live.owners):
            began_behind = len(waited_for)

    kernels.on_block, watched.look = on_block, look
    streaming.start()
    streaming.join(120)
    waiting.join(60)
    assert in_a_row < began_behind < 4 * in_a_row, "it moved, when its turn came"
    assert of_others == LAYERS
    assert max(counts[-1] - counts[0] for counts in waited_for.values()) in (1, 2)
    watched.look = lambda: None
    assert said == [watched.decode(Turn(), 99)]
