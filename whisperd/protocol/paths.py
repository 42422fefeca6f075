"""Where socket, state, cache and configuration lie, as root and as a user."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

SYSTEM_SOCKET = Path("/run/whisperd/whisperd.sock")


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    """Default places. `socket` is None for a user without $XDG_RUNTIME_DIR: there is no safe default then."""

    socket: Path | None
    state_dir: Path
    cache_dir: Path
    config_file: Path


def default_paths(environ: Mapping[str, str] = os.environ, *, euid: int | None = None) -> Paths:
    """Return the daemon's defaults: the system's folders as root, the XDG base directories as a user.

    Folders that systemd made for the service (systemd.exec(5), StateDirectory= and its kin) come before both.
    """
    return _with_service_folders(_usual_paths(environ, euid), environ)


def _with_service_folders(paths: Paths, environ: Mapping[str, str]) -> Paths:
    def made(variable: str, usual: Path) -> Path:
        value = environ.get(variable, "").split(":")[0]
        return Path(value) if value.startswith("/") else usual

    return replace(
        paths,
        state_dir=made("STATE_DIRECTORY", paths.state_dir),
        cache_dir=made("CACHE_DIRECTORY", paths.cache_dir),
        config_file=made("CONFIGURATION_DIRECTORY", paths.config_file.parent) / paths.config_file.name,
    )


def _usual_paths(environ: Mapping[str, str], euid: int | None) -> Paths:
    if (os.geteuid() if euid is None else euid) == 0:
        return Paths(
            socket=SYSTEM_SOCKET,
            state_dir=Path("/var/lib/whisperd"),
            cache_dir=Path("/var/cache/whisperd"),
            config_file=Path("/etc/whisperd/whisperd.toml"),
        )
    home = Path(environ.get("HOME", "/"))

    def xdg(variable: str, fallback: str) -> Path:
        # The XDG specification: a relative path is invalid and must be ignored.
        value = environ.get(variable, "")
        return (Path(value) if value.startswith("/") else home / fallback) / "whisperd"

    return Paths(
        socket=user_socket(environ),
        state_dir=xdg("XDG_STATE_HOME", ".local/state"),
        cache_dir=xdg("XDG_CACHE_HOME", ".cache"),
        config_file=xdg("XDG_CONFIG_HOME", ".config") / "whisperd.toml",
    )


def user_socket(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return the socket in the user's runtime folder, or None where there is no such folder."""
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    return Path(runtime) / "whisperd" / "whisperd.sock" if runtime.startswith("/") else None


def client_sockets(environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Return the sockets a client tries in order when none is named: the user's own, then the system's."""
    own = user_socket(environ)
    return [own, SYSTEM_SOCKET] if own else [SYSTEM_SOCKET]
