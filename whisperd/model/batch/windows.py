"""What a run keeps of its windows: encoded once, and not decoded again with the same prompt and options."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable

import torch
from torch import Tensor
from whisper.decoding import DecodingResult

# Further temperatures, word times and language detection ask for the window they had a moment ago.
_KEPT_FEATURES = 2
# Digital silence in the middle of a recording is one window again and again.
_KEPT_RESULTS = 16


class Window:
    """30 s of audio: the mel `(n_mels, 3000)` until it is encoded, the features afterwards."""

    __slots__ = ("digest", "features", "mel")

    def __init__(self, mel: Tensor, digest: bytes) -> None:
        self.mel: Tensor | None = mel
        self.digest = digest
        self.features: Tensor | None = None


class KeptWindows:
    """The windows of one run, found again by what they sound like. Never shared between runs.

    A quick answer to one user must not tell that another's audio held the same.
    """

    def __init__(self) -> None:
        self._windows: OrderedDict[bytes, Window] = OrderedDict()
        self._results: OrderedDict[Hashable, DecodingResult] = OrderedDict()

    def window(self, mel: Tensor) -> Window:
        """Return the window with exactly this mel, known already or new."""
        digest = hashlib.blake2b(mel.to(torch.float32).contiguous().numpy().data, digest_size=16).digest()
        window = self._windows.get(digest)
        if window is None:
            self._windows[digest] = window = Window(mel, digest)
            if len(self._windows) > _KEPT_FEATURES:
                self._windows.popitem(last=False)
        self._windows.move_to_end(digest)
        return window

    def result(self, key: Hashable) -> DecodingResult | None:
        """Return what was remembered under `key`."""
        return self._results.get(key)

    def remember(self, key: Hashable, result: DecodingResult) -> None:
        """Keep a result; the oldest ones are forgotten."""
        self._results[key] = result
        while len(self._results) > _KEPT_RESULTS:
            self._results.popitem(last=False)
