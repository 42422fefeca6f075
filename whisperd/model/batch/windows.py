"""What a run keeps of its windows: encoded once, and not decoded again with the same prompt and options."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from whisper.decoding import DecodingResult

# Those of the last eight hours, if no window was tried again: 5 MB, and never more than 13.
MOST_RESULTS = 1000


class Window:
    """30 s of audio: the mel `(n_mels, 3000)` until it is encoded, the features afterwards."""

    __slots__ = ("__weakref__", "digest", "features", "mel")

    def __init__(self, mel: Tensor, digest: bytes) -> None:
        self.mel: Tensor | None = mel
        self.digest = digest
        self.features: Tensor | None = None


class _Answer:
    __slots__ = ("decoding", "result")

    def __init__(self) -> None:
        self.decoding = threading.Lock()
        self.result: DecodingResult | None = None


class KeptWindows:
    """The windows of one run, found again by what they sound like, from all of its threads. Never shared between runs.

    A quick answer to one user must not tell that another's audio held the same.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._windows: WeakValueDictionary[bytes, Window] = WeakValueDictionary()
        self._answers: OrderedDict[Hashable, _Answer] = OrderedDict()

    def window(self, mel: Tensor) -> Window:
        """Return the window with exactly this mel: the known one while anybody holds it, else a new one."""
        digest = hashlib.blake2b(mel.to(torch.float32).contiguous().numpy().data, digest_size=16).digest()
        with self._lock:
            window = self._windows.get(digest)
            if window is None:
                self._windows[digest] = window = Window(mel, digest)
            return window

    def decoded(self, key: Hashable, decode: Callable[[], DecodingResult]) -> tuple[DecodingResult, bool]:
        """Return what was found under `key` before, or what `decode` returns; and whether it was known.

        Who asks while another thread decodes the same waits for that. Raises what `decode` raises, which then counts
        for nothing. The last `MOST_RESULTS` are known.
        """
        with self._lock:
            answer = self._answers.setdefault(key, _Answer())
            self._answers.move_to_end(key)
            if len(self._answers) > MOST_RESULTS:
                self._answers.popitem(last=False)
        with answer.decoding:
            known = answer.result is not None
            result = answer.result = answer.result or decode()
        return result, known
