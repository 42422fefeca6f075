"""What makes two pieces of work the same: digests of whose it is, what it is, how it is done and by which model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from whisperd.daemon.config import Config
from whisperd.daemon.store.rows import pack
from whisperd.protocol.options import DEFAULTS, MODES, OWN_DEFAULTS

_DIGEST_BYTES = 32


def digest(value: Any) -> bytes:
    """Return the SHA-256 of a value as the database would keep it."""
    return hashlib.sha256(pack(value)).digest()


def fingerprints(source: Sequence[Any], options: Mapping[str, Any]) -> tuple[bytes, ...]:
    """Return the digest of what a submit asks for, and behind it those that earlier versions may have kept of the same.

    `options` are as asked, so `mode` may be None, and of them only those count that are not the default: neither a
    setting that is changed nor an upgrade that knows one option more makes other work of a key.
    """
    defaults = DEFAULTS | OWN_DEFAULTS
    asked = {name: options[name] for name in sorted(options) if options[name] != defaults[name]}
    # Before, all options counted, the mode as the daemon's setting had it at that time.
    modes = MODES if options["mode"] is None else (options["mode"],)
    return digest([*source, asked]), *(digest([*source, {**options, "mode": mode}]) for mode in modes)


def early_fingerprints(size_bytes: int, options: Mapping[str, Any]) -> tuple[bytes, ...]:
    """Return what is known of a file before its bytes are there: the first half of its fingerprint.

    The same for a descriptor and an upload: a client may submit by one, and after a broken connection by the other.
    Behind it stand those that earlier versions may have kept.
    """
    return fingerprints(["fd", size_bytes], options)


def fingerprint_of(early: bytes, sha256: str) -> bytes:
    """Return the fingerprint of a file: what a later submit of the same key must have again.

    `early` is its first half, or any fingerprint that begins with it.
    """
    return early[:_DIGEST_BYTES] + digest([sha256])


def share_key(config: Config, uid: int, sha256: str, options: Mapping[str, Any], model: Sequence[Any]) -> bytes:
    """Return the key of work whose audio is there."""
    owner = "everyone" if config.share_results == "everyone" else uid
    return digest([owner, sha256, dict(options), list(model)])


def source_key(
    config: Config, uid: int, source: Mapping[str, Any], options: Mapping[str, Any], model: Sequence[Any]
) -> bytes:
    """Return the key of work whose audio is still to be downloaded.

    With cookies, what one user can see is not for others, whatever `share_results` says. A download unit may have some,
    as its credentials: whether it has is not known here.
    """
    cookies = config.fetch_cookies or config.fetch_socket
    owner = "everyone" if config.share_results == "everyone" and not cookies else uid
    return digest([owner, dict(source), dict(options), list(model)])
