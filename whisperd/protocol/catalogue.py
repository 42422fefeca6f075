"""The models that openai-whisper knows by name: their files, their hashes, and where on this machine they may lie.

A copy of its list, because the daemon and the fetch helper must not import torch for it. A test compares the two.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

# openai-whisper's own address; the setting `models_url` names another one. Below it: <sha256>/<file name>.
HOME_URL = "https://openaipublic.azureedge.net/main/whisper/models"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model's file. Some have two names."""

    file_name: str
    sha256: str

    def url(self, base: str) -> str:
        """Return the address of the file below a base."""
        return f"{base.rstrip('/')}/{self.sha256}/{self.file_name}"

    def home(self, cache_dir: Path) -> Path:
        """Return where whisperd puts it."""
        return cache_dir / "models" / self.file_name

    def places(self, cache_dir: Path, environ: Mapping[str, str]) -> list[Path]:
        """Return where it is looked for: whisperd's own folder first, then where openai-whisper keeps a user's."""
        user_cache = Path(environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME", "/")) / ".cache")
        return [self.home(cache_dir), cache_dir / self.file_name, user_cache / "whisper" / self.file_name]

    def only_by_hand(self, cache_dir: Path) -> str:
        """Return for people what to do where no models are downloaded."""
        return (
            "this daemon downloads no models (the setting models_url is empty): put the file of sha256 "
            f"{self.sha256} at {self.home(cache_dir)}"
        )

    def present(self, cache_dir: Path, environ: Mapping[str, str]) -> list[Path]:
        """Return the places that have it, whole or not: its hash tells. A folder that must not be read has nothing."""
        return [path for path in self.places(cache_dir, environ) if os.path.isfile(path) and os.access(path, os.R_OK)]


def _checkpoint(name: str, sha256: str) -> Checkpoint:
    return Checkpoint(file_name=f"{name}.pt", sha256=sha256)


_LARGE_V3 = _checkpoint("large-v3", "e5b1a55b89c1367dacf97e3e19bfd829a01529dbfdeefa8caeb59b3f1b81dadb")
_TURBO = _checkpoint("large-v3-turbo", "aff26ae408abcba5fbf8813c21e62b0941638c5f6eebfb145be0c9839262a19a")

CHECKPOINTS: Mapping[str, Checkpoint] = {
    "tiny.en": _checkpoint("tiny.en", "d3dd57d32accea0b295c96e26691aa14d8822fac7d9d27d5dc00b4ca2826dd03"),
    "tiny": _checkpoint("tiny", "65147644a518d12f04e32d6f3b26facc3f8dd46e5390956a9424a650c0ce22b9"),
    "base.en": _checkpoint("base.en", "25a8566e1d0c1e2231d1c762132cd20e0f96a85d16145c3a00adf5d1ac670ead"),
    "base": _checkpoint("base", "ed3a0b6b1c0edf879ad9b11b1af5a0e6ab5db9205f891f668f8b0e6c6326e34e"),
    "small.en": _checkpoint("small.en", "f953ad0fd29cacd07d5a9eda5624af0f6bcf2258be67c92b79389873d91e0872"),
    "small": _checkpoint("small", "9ecf779972d90ba49c06d968637d720dd632c55bbf19d441fb42bf17a411e794"),
    "medium.en": _checkpoint("medium.en", "d7440d1dc186f76616474e0ff0b3b6b879abc9d1a4926b7adfa41db2d497ab4f"),
    "medium": _checkpoint("medium", "345ae4da62f9b3d59415adc60127b97c714f32e89e936602e85993674d08dcb1"),
    "large-v1": _checkpoint("large-v1", "e4b87e7e0bf463eb8e6956e646f1e277e901512310def2c24bf0e11bd3c28e9a"),
    "large-v2": _checkpoint("large-v2", "81f7c96c852ee8fc832187b0132e569d6c3065a3252ed18e56effd0b6a73e524"),
    "large-v3": _LARGE_V3,
    "large": _LARGE_V3,
    "large-v3-turbo": _TURBO,
    "turbo": _TURBO,
}


def catalogue(own: Iterable[str]) -> Mapping[str, Checkpoint]:
    """Return all models by name: openai-whisper's, and `own` ones, each as `NAME=SHA256` with the file `NAME.pt`.

    Raises `ValueError` for an own one that is written otherwise, or has a name that openai-whisper knows.
    """
    known = dict(CHECKPOINTS)
    for entry in own:
        match = re.fullmatch(r"([0-9A-Za-z_][0-9A-Za-z._-]{0,99})=([0-9a-f]{64})", entry)
        if match is None:
            raise ValueError(f"{entry!r} is not NAME=SHA256 (letters, digits, . _ -; and 64 digits in small letters)")
        if match[1] in CHECKPOINTS or match[1] == "demo":
            raise ValueError(f"{match[1]!r} is a name that is taken: choose another")
        known[match[1]] = _checkpoint(match[1], match[2])
    return known
