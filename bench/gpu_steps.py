"""What a step of the decoder costs on a GPU, and whether recordings of it hold when things go wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from whisper.decoding import DecodingOptions, DecodingTask
from whisper.model import Whisper
from whisper.tokenizer import get_tokenizer

from bench import steps
from bench.gpu_place import Place
from bench.report import Row
from whisperd.model.batch.decoder import Decoder
from whisperd.model.batch.kernels import Kernels
from whisperd.model.batch.rows import Ended, LiveRows
from whisperd.model.batch.search import search_of
from whisperd.model.engine import Engine
from whisperd.model.loading import load

_WINDOWS = (1, 8, 32)
_BEFORE = 5  # and as many as are timed: all within the first 64 positions, so of one recording


def measure(place: Place, size: str) -> Iterator[Row]:
    """Operations of a step, that torch waits for the device in none, and how long steps take."""
    model = load(
        place.planted(size),
        cache_dir=place.folder,
        device=str(place.device),
        dtype="auto",
        on_step=lambda: None,
        environ={},
    )
    engine = Engine(model, on_step=lambda: None, windows=1)
    engine.settle()
    yield from steps.count(engine, size)
    yield _waiting(place, size, engine)
    for windows in _WINDOWS[: place.pick(3, 1)]:
        count = place.pick(40, 3)
        step_ms = _step_ms(place, engine, windows, count)
        yield Row(
            what=f"{size}: a step of {windows} greedy windows", measured=f"{step_ms:.2f} ms", runs=f"{count} steps"
        )


@torch.inference_mode()
def _step_ms(place: Place, engine: Engine, windows: int, count: int) -> float:
    live = steps.begin_windows(engine, windows)
    for _ in range(_BEFORE):
        live.step()
    began = place.now()
    for _ in range(count):
        live.step()
    return 1e3 * (place.now() - began) / count


@torch.inference_mode()
def _waiting(place: Place, size: str, engine: Engine) -> Row:
    """Return whether torch waits for the device in a step of eight greedy windows: it is told to refuse that.

    Not seen are waits for an event, such as the late read of what the step before has chosen.
    """
    what = f"{size}: torch waits for the device in a step"
    live, measured = steps.begin_windows(engine, 8), "never"
    for _ in range(_BEFORE):
        live.step()
    if not place.on_gpu:
        live.step()
        return Row(what=what, measured="not on a CPU")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            live.step()
    except RuntimeError as error:
        measured = str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Row(what=what, goal="never", measured=measured, met=measured == "never", runs="20 steps")


# --- recordings ---


class Breaking(Kernels):
    """Records steps; the next recordings fail, each at the end of what is recorded, as often as `breaks` says.

    On a CPU what is recorded is done again at each replay.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        self.breaks: list[Callable[[], None]] = []
        self.recordings = self.replays = 0

    @property
    def replays_steps(self) -> bool:
        return True

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        if self.breaks:
            work = partial(_both, work, self.breaks.pop(0))
            if self.device.type != "cuda":
                work()
        replay = super().record(work) if self.device.type == "cuda" else work
        self.recordings += 1

        def counted() -> None:
            self.replays += 1
            replay()

        return counted


class Launching(Kernels):
    """Launches every step by itself."""

    @property
    def replays_steps(self) -> bool:
        return False


def recording(place: Place) -> Iterator[Row]:
    """What goes wrong while a step is recorded leaves the device as it was, and what comes later is recorded again.

    Random weights in float32: what they say depends on all that was said and heard, so a wrong cache would be seen.
    """
    from tests.models import babbler

    logging.getLogger("whisperd.model").addHandler(logging.NullHandler())  # the warnings are wanted here
    model = babbler(layers=2).to(place.device)
    generator = torch.Generator().manual_seed(1)
    features = [
        torch.randn(model.dims.n_audio_ctx, model.dims.n_audio_state, generator=generator).to(place.device)
        for _ in range(3)
    ]
    wanted = _said(model, Launching(place.device, torch.float32), features, [])
    ways: dict[str, Callable[[], None]] = {
        "an error of ours": _fail,
        "want of memory": _run_out,
        "what may not be recorded": partial(_wait_for, place),
    }
    for name, way in ways.items():
        kernels = Breaking(place.device, torch.float32)
        seen: list[tuple[int, int]] = []
        try:
            kernels.breaks.append(way)
            said = _said(model, kernels, features, seen)
            place.finish()
            torch.ones(1, device=place.device).sum().item()
            measured = _outcome(said == wanted, seen)
        except Exception as error:  # the device may be lost: that is what is asked
            said, measured = [], f"{type(error).__name__}: {str(error).splitlines()[0]}"
        well = said == wanted and seen[0] == (0, 0) and min(seen[1]) > 0
        yield Row(
            what=f"a recording that fails by {name}: steps go on, and after the caches shrank they are recorded again",
            goal="the same tokens",
            measured=measured,
            met=well,
            runs="1",
        )


def _outcome(same: bool, seen: Sequence[tuple[int, int]]) -> str:
    return (
        f"{'the same tokens' if same else 'OTHER TOKENS'}; recorded and replayed {seen[0]} times after the failure, "
        f"{seen[1]} times after the shrink"
    )


@torch.inference_mode()
def _said(model: Whisper, kernels: Kernels, features: Sequence[Tensor], seen: list[tuple[int, int]]) -> list[list[int]]:
    """Return what the windows say, shrunk to half the slots midway; `seen` gets recordings and replays of each half."""
    dims, slots = model.dims, 2 * len(features)
    decoder = Decoder(model.decoder, kernels, heads=dims.n_text_head, audio_positions=dims.n_audio_ctx)
    live: LiveRows[int] = LiveRows(decoder, kernels, windows=slots, rows=slots)
    end = get_tokenizer(model.is_multilingual).eot
    options = DecodingOptions(language="en", fp16=False, suppress_tokens=[end], sample_len=24)
    for owner, each in enumerate(features):
        task = DecodingTask(model, options)
        live.begin(owner, task, search_of(task, 0), each)
    ended: Ended[int] = []
    for half in range(2):
        if half:
            live.shrink(windows=len(features), rows=len(features))
        before = _counts(kernels)
        for _ in range(8):
            ended += live.step()
        after = _counts(kernels)
        seen.append((after[0] - before[0], after[1] - before[1]))
    while live.count:
        ended += live.step()
    said = {owner: list(outcome.candidates[0][0]) for owner, outcome in ended}
    return [said[owner] for owner in range(len(features))]


def _counts(kernels: Kernels) -> tuple[int, int]:
    return (kernels.recordings, kernels.replays) if isinstance(kernels, Breaking) else (0, 0)


def _both(one: Callable[[], None], other: Callable[[], None]) -> None:
    one()
    other()


def _fail() -> None:
    raise RuntimeError("forced")


def _run_out() -> None:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory, forced")


def _wait_for(place: Place) -> None:
    """Do what a recording forbids: wait for a number of the device."""
    if place.on_gpu:
        torch.ones(1, device=place.device).sum().item()
    raise RuntimeError("operation not permitted when stream is capturing, forced")
