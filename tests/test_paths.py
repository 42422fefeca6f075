"""Default places, as root and as a user."""

from __future__ import annotations

from pathlib import Path

from whisperd.protocol.paths import SYSTEM_SOCKET, Paths, client_sockets, default_paths, user_socket


def test_as_root() -> None:
    environ = {"HOME": "/root", "XDG_RUNTIME_DIR": "/run/user/0", "XDG_STATE_HOME": "/elsewhere"}
    assert default_paths(environ, euid=0) == Paths(
        socket=Path("/run/whisperd/whisperd.sock"),
        state_dir=Path("/var/lib/whisperd"),
        cache_dir=Path("/var/cache/whisperd"),
        config_file=Path("/etc/whisperd/whisperd.toml"),
    )


def test_as_a_user() -> None:
    assert default_paths({"HOME": "/home/ada", "XDG_RUNTIME_DIR": "/run/user/1000"}, euid=1000) == Paths(
        socket=Path("/run/user/1000/whisperd/whisperd.sock"),
        state_dir=Path("/home/ada/.local/state/whisperd"),
        cache_dir=Path("/home/ada/.cache/whisperd"),
        config_file=Path("/home/ada/.config/whisperd/whisperd.toml"),
    )


def test_as_a_user_with_folders_of_their_own() -> None:
    environ = {
        "HOME": "/home/ada",
        "XDG_RUNTIME_DIR": "/r",
        "XDG_STATE_HOME": "/s",
        "XDG_CACHE_HOME": "/c",
        "XDG_CONFIG_HOME": "/o",
    }
    assert default_paths(environ, euid=1000) == Paths(
        socket=Path("/r/whisperd/whisperd.sock"),
        state_dir=Path("/s/whisperd"),
        cache_dir=Path("/c/whisperd"),
        config_file=Path("/o/whisperd/whisperd.toml"),
    )


def test_folders_that_systemd_made_come_first() -> None:
    environ = {
        "HOME": "/var/lib/whisperd",
        "XDG_CACHE_HOME": "/c",
        "STATE_DIRECTORY": "/var/lib/whisperd:/var/lib/more",
        "CACHE_DIRECTORY": "",
        "CONFIGURATION_DIRECTORY": "/etc/whisperd",
    }
    paths = default_paths(environ, euid=990)
    assert paths.state_dir == Path("/var/lib/whisperd")
    assert paths.cache_dir == Path("/c/whisperd")
    assert paths.config_file == Path("/etc/whisperd/whisperd.toml")


def test_relative_folders_are_ignored() -> None:
    environ = {"HOME": "/home/ada", "XDG_RUNTIME_DIR": "run", "XDG_STATE_HOME": "state", "XDG_CACHE_HOME": ""}
    paths = default_paths(environ, euid=1000)
    assert paths.socket is None
    assert paths.state_dir == Path("/home/ada/.local/state/whisperd")
    assert paths.cache_dir == Path("/home/ada/.cache/whisperd")


def test_without_a_runtime_folder_there_is_no_default_socket() -> None:
    assert user_socket({"HOME": "/home/ada"}) is None
    assert default_paths({"HOME": "/home/ada"}, euid=1000).socket is None
    assert client_sockets({}) == [SYSTEM_SOCKET]


def test_a_client_tries_its_own_daemon_first() -> None:
    own = Path("/run/user/1000/whisperd/whisperd.sock")
    assert client_sockets({"XDG_RUNTIME_DIR": "/run/user/1000"}) == [own, SYSTEM_SOCKET]
