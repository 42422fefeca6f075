"""How long the model may have nothing to do before it is unloaded."""

from __future__ import annotations

from collections.abc import Callable

from whisperd.daemon.loop import Loop, Timer

_KEEP_ALIVE_ON_CUDA_S = 600.0


def keep_alive_s(setting: float | None, device: str) -> float | None:
    """Return how long a model without work stays loaded on `device`; None: for ever.

    A GPU's memory is wanted by others, and loading again takes seconds; a CPU's can be paged out and costs nobody much.
    """
    if setting is None:
        return _KEEP_ALIVE_ON_CUDA_S if device.startswith("cuda") else None
    return setting or None


class Idleness:
    """Calls `enough` once there has been nothing to do for as long as it was told, without a break."""

    def __init__(self, loop: Loop, enough: Callable[[], None]) -> None:
        self._loop, self._enough = loop, enough
        self._timer: Timer | None = None

    def look(self, after_s: float | None) -> None:
        """Take what is the case now: idle, and to be told of `after_s` from the beginning of that; or None."""
        if after_s is None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        elif self._timer is None:
            self._timer = self._loop.call_later(after_s, self._late)

    def _late(self) -> None:
        self._timer = None
        self._enough()
