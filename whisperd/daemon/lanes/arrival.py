"""The daemon's own model, as long as its file is not on this machine: how far the download is, and how it ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from whisperd.daemon.lanes.weights import Listener, WeightsLane
from whisperd.protocol.catalogue import CHECKPOINTS
from whisperd.protocol.errors import WhisperdError


class Arrival:
    """Waits for the file of the model `name`; for a path, or `demo`, there is nothing to wait for.

    `step` is called as it gets further, `ended` with None when it is there, else with the reason and what mends it.
    """

    def __init__(
        self,
        weights: WeightsLane,
        name: str,
        step: Callable[[], None],
        ended: Callable[[WhisperdError | None], None],
    ) -> None:
        self._weights, self._name, self._step, self._ended = weights, name, step, ended
        self.wanted = weights.find(name)
        self._listener: Listener | None = None
        self.progress: float | None = None  # 0 to 1 while it is downloaded
        self._trouble = ""

    @property
    def words(self) -> str:
        """What goes on, for people; "" when nothing does."""
        if self.progress is None:
            return ""
        return f"downloading the model {self._name} ({self.progress:.0%}{self._trouble})"

    @property
    def path(self) -> str | None:
        """The file of a model of this daemon's own list, which openai-whisper does not know by its name."""
        place = None if self.wanted is None or self._name in CHECKPOINTS else self._weights.place(self.wanted)
        return None if place is None else str(place)

    def is_needed(self) -> bool:
        """True when the file is nowhere on this machine."""
        return self.wanted is not None and self._weights.place(self.wanted) is None

    def begin(self) -> None:
        """Ask for the file, unless that is done."""
        if self._listener is not None:
            return
        listener = Listener(owner=None, progressed=self._progressed, halted=self._halted, ended=self._came)
        try:
            self._weights.pull(self._name, listener)
        except WhisperdError as error:
            self._ended(self._with_remedy(error))
            return
        self._listener, self.progress, self._trouble = listener, 0.0, ""
        self._step()

    def give_up(self) -> None:
        """Wait no more; what has arrived stays for the next time."""
        if self._listener is not None:
            self._weights.leave(self._listener)
            self._listener, self.progress = None, None

    def _progressed(self, done: float, total: float) -> None:
        self.progress, self._trouble = done / total if total else 0.0, ""
        self._step()

    def _halted(self, error: WhisperdError, delay_s: float) -> None:
        self._trouble = f"; trying again in {delay_s:.0f} s: {error.message}"
        self._step()

    def _came(self, outcome: Path | WhisperdError) -> None:
        self._listener, self.progress = None, None
        self._ended(self._with_remedy(outcome) if isinstance(outcome, WhisperdError) else None)

    def _with_remedy(self, error: WhisperdError) -> WhisperdError:
        return WhisperdError(error.code, f"{error.message}; then run `whisperctl model load`")
