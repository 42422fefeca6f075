"""The decoder's step where launching costs more than computing: recorded once a shape, then replayed as a whole."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from whisperd.model.batch.caches import Cache
from whisperd.model.batch.decoder import Decoder, Routing
from whisperd.model.batch.kernels import Kernels
from whisperd.model.memory import is_out_of_memory

log = logging.getLogger("whisperd.model")

# What is rounded up needs fewer recordings: rows too many say nothing to anybody, positions too many are masked. With
# more rows than these a step computes for longer than it takes to launch.
_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48)
_POSITIONS = 64
_MOST_KEPT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recording:
    """A step with rows and positions of one number, on a routing of its own, to be filled before it is replayed."""

    routing: Routing | None
    replay: Callable[[], None]


class Replays:
    """Steps as `Decoder.step` does: launched one by one when a shape is new, recorded the second time, then replayed.

    A recording reads and writes where the caches lay, so none outlives them.
    """

    def __init__(self, decoder: Decoder, kernels: Kernels) -> None:
        self._decoder, self._kernels = decoder, kernels
        # Shared by all recordings: what they are fed, and what comes out.
        self._place = torch.zeros(2, _ROWS[-1], dtype=torch.int64, device=kernels.device)
        self._logits = torch.zeros(_ROWS[-1], decoder.vocabulary, device=kernels.device)
        self._seen = set[Hashable]()
        self._kept: dict[Hashable, _Recording] = {}
        self._tensors: Hashable = None
        self._records = True  # False: what was tried last could not be recorded

    def forget(self) -> None:
        """Give back what recordings hold, and make new ones."""
        self._kernels.forget_recordings()
        self._seen.clear()
        self._kept.clear()
        self._tensors, self._records = None, True

    def step(
        self, tokens: Tensor, positions: Sequence[int], rows: Cache, windows: Cache, routing: Routing | None
    ) -> Tensor:
        """As `Decoder.step`, but what it returns is overwritten by the next call."""
        count = len(tokens)
        if not self._records or count > _ROWS[-1]:
            return self._decoder.step(tokens, positions, rows, windows, routing)
        if self._tensors != (rows.generation, windows.generation):
            self.forget()
            self._tensors = (rows.generation, windows.generation)
        # Rows that do not stand in the order of the windows, beams, have a routing for just so many.
        most = count if routing is not None else min(rows.slots, windows.slots)
        padding = [0] * (next((each for each in _ROWS if count <= each <= most), count) - count)
        length = min(rows.length, -(-(max(positions) + 1) // _POSITIONS) * _POSITIONS)
        place = self._place[:, : count + len(padding)]
        place[0, :count] = tokens  # behind them lie tokens of earlier steps: as good as any
        place[1] = self._kernels.send([*positions, *padding])

        def launch(routing: Routing | None) -> Tensor:
            return self._decoder.step_at(place[0], place[1], rows, windows, routing, length=length, masked=True)

        key = (place.shape[1], length, None if routing is None else routing.rows.shape)
        recording = self._kept.pop(key, None)
        if recording is None and key in self._seen:
            recording = self._record(launch, routing)
        if recording is None:
            self._seen.add(key)
            return launch(routing)[:count]
        self._keep(key, recording)
        if routing is not None and recording.routing is not None:
            recording.routing.rows.copy_(routing.rows)
            recording.routing.places.copy_(routing.places)
        recording.replay()
        return self._logits[:count]

    def _keep(self, key: Hashable, recording: _Recording) -> None:
        self._kept[key] = recording  # behind all others, so the first is the longest unused
        if len(self._kept) > _MOST_KEPT:
            unused = next(iter(self._kept))
            del self._kept[unused]
            self._seen.discard(unused)

    def _record(self, launch: Callable[[Routing | None], Tensor], routing: Routing | None) -> _Recording | None:
        if routing is not None:
            routing = Routing(rows=routing.rows.clone(), places=routing.places.clone())

        def work() -> None:
            logits = launch(routing)
            self._logits[: len(logits)].copy_(logits)

        try:
            return _Recording(routing=routing, replay=self._kernels.record(work))
        except RuntimeError as error:
            # It works without, unless the device itself has failed: then the next launch says so.
            log.warning("model: steps are not recorded any more error=%s", error, exc_info=not is_out_of_memory(error))
            self.forget()
            self._records = False
            return None
