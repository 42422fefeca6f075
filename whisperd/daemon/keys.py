"""What makes two pieces of work the same: digests of whose it is, what it is, how it is done and by which model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from whisperd.daemon.config import Config
from whisperd.daemon.store.rows import pack


def digest(value: Any) -> bytes:
    """Return the SHA-256 of a value as the database would keep it."""
    return hashlib.sha256(pack(value)).digest()


def share_key(config: Config, uid: int, sha256: str, options: Mapping[str, Any], model: Sequence[Any]) -> bytes:
    """Return the key of work whose audio is there."""
    owner = "everyone" if config.share_results == "everyone" else uid
    return digest([owner, sha256, dict(options), list(model)])


def source_key(
    config: Config, uid: int, source: Mapping[str, Any], options: Mapping[str, Any], model: Sequence[Any]
) -> bytes:
    """Return the key of work whose audio is still to be downloaded.

    With cookies, what one user can see is not for others, whatever `share_results` says.
    """
    owner = "everyone" if config.share_results == "everyone" and not config.fetch_cookies else uid
    return digest([owner, dict(source), dict(options), list(model)])
