"""A window begins, and a text is read, a layer at a time: whoever is cancelled or urgent waits for no more than one."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from whisper.decoding import DecodingOptions
from whisper.model import Whisper
from whisper.tokenizer import get_tokenizer

from tests import models
from tests.held_batcher import window_of
from tests.support import wait_until
from tests.test_batch_rules import CPU, Late, assert_same, live_rows, said_alone, task_of
from whisperd.model.batch.caches import Cache
from whisperd.model.batch.pieces import Pieces
from whisperd.model.batch.search import Outcome, search_of
from whisperd.model.batch.kernels import Kernels
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

    def __init__(self, model: Whisper) -> None:
        self.look: Callable[[], None] = lambda: None
        loaded = LoadedModel(whisper=model, name="random", device=CPU, dtype=torch.float32)
        self.engine = Engine(loaded, on_step=lambda: self.look(), windows=2)
        self.batcher = self.engine.batcher
        self.live = self.batcher._live

    def decode(self, turn: Turn, seed: int) -> list[int]:
        return list(self.engine.decode(turn, KeptWindows(), window_of(seed), OPTIONS, seed=0).tokens)

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
