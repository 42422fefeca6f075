"""An engine whose batcher is held until a test lets it go, and windows of a model whose words tell them apart."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from whisper.decoding import DecodingOptions

from tests import models
from tests.support import wait_until
from whisperd.model.batch.batcher import Request
from whisperd.model.batch.kernels import Kernels
from whisperd.model.batch.layers import Linear
from whisperd.model.batch.rows import LiveRows
from whisperd.model.batch.windows import KeptWindows, Window
from whisperd.model.engine import Engine
from whisperd.model.loading import load
from whisperd.model.worker import INTERACTIVE_IN_A_ROW, Turn

AUDIO_POSITIONS = models.MICRO.n_audio_ctx  # of all models
OPTIONS = DecodingOptions(language="en", fp16=False, sample_len=16)


class LikeAGpu(Kernels):
    """Has what a step chose read late, and windows encoded beside steps, as on a GPU."""

    reads_late = True
    encodes_beside_steps = True

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), torch.float32)


class CountsBlocks(Kernels):
    """Counts the blocks of the encoder that are computed, on a CPU, and says so in the middle of each."""

    def __init__(self, *, encodes_beside_steps: bool = False) -> None:
        super().__init__(torch.device("cpu"), torch.float32)
        self.blocks = 0
        self.on_block: Callable[[], None] = lambda: None
        self._encodes_beside_steps = encodes_beside_steps

    @property
    def encodes_beside_steps(self) -> bool:
        return self._encodes_beside_steps

    def linear(self, weight: Tensor, bias: Tensor | None, *, rows: int) -> Linear:
        layer = super().linear(weight, bias, rows=rows)
        height, width = weight.shape
        if rows != AUDIO_POSITIONS or height != 4 * width:  # each block of the encoder has one such
            return layer

        def counted(x: Tensor) -> Tensor:
            self.blocks += 1
            self.on_block()
            return layer(x)

        return counted


class Windows:
    """An engine that is held until it is let go, and looked at between any two pieces of its work."""

    def __init__(
        self,
        folder: Path,
        *,
        windows: int,
        interactive_in_a_row: int = INTERACTIVE_IN_A_ROW,
        kernels: Kernels | None = None,
        live_rows: type[LiveRows[Request]] = LiveRows,
    ) -> None:
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
                             leave=self._leave, kernels=kernels, live_rows=live_rows)  # fmt: skip
        self.batcher = self.engine.batcher
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
