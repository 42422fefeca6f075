"""`share_results = "everyone"`: whose work answers whom, and what cookies keep apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import NO_MODEL, PLAIN_OPTIONS, Daemon, RawClient, client_as, requires_root
from whisperd.daemon.config import Config
from whisperd.daemon.keys import share_key, source_key
from whisperd.protocol.systemd import child_environment

ADA, BOB = 20_001, 20_002
VIDEO = {"kind": "video", "id": "dQw4w9WgXcQ"}


def config(**settings: Any) -> Config:
    return Config(socket=Path("/s"), state_dir=Path("/state"), cache_dir=Path("/cache"), **settings)


@pytest.mark.parametrize(
    ("settings", "shared"),
    [
        ({}, False),
        ({"share_results": "everyone"}, True),
        ({"share_results": "everyone", "fetch_cookies": "/etc/cookies"}, False),
        # The cookies of a download unit are its credentials: no setting names them.
        ({"share_results": "everyone", "fetch_socket": "/run/whisperd/fetch.sock"}, False),
    ],
)
def test_an_address_is_everybodys_only_where_no_download_has_cookies(settings: dict[str, str], shared: bool) -> None:
    ada, bob = (source_key(config(**settings), uid, VIDEO, {}, ["tiny"]) for uid in (ADA, BOB))
    assert (ada == bob) is shared


def test_equal_audio_is_everybodys_where_the_setting_says_so() -> None:
    for settings, shared in (({}, False), ({"share_results": "everyone", "fetch_socket": "/run/s"}, True)):
        ada, bob = (share_key(config(**settings), uid, "ab12", {}, ["tiny"]) for uid in (ADA, BOB))
        assert (ada == bob) is shared


def test_helpers_of_the_daemons_own_have_no_credentials_of_systemds() -> None:
    assert child_environment({"CREDENTIALS_DIRECTORY": "/run/credentials", "PATH": "/bin"}) == {"PATH": "/bin"}


@requires_root
@pytest.mark.parametrize("fetch_socket", ["", "/run/whisperd/fetch.sock"])
def test_two_users_share_recordings_and_no_download_with_cookies(
    start_daemon: Callable[..., Daemon], recording: Callable[..., Path], fetch_socket: str
) -> None:
    daemon = start_daemon(model=NO_MODEL, socket_mode="0666", share_results="everyone", fetch_socket=fetch_socket)
    with daemon.client() as root, client_as(daemon, ADA) as ada, client_as(daemon, BOB) as bob:
        root.call("pause")  # nothing is downloaded
        path = recording(1)
        assert not submitted(ada, path)
        assert submitted(bob, path), "he has the bytes, too"
        for client, reused in ((ada, False), (bob, not fetch_socket)):
            assert client.call("submit", source=VIDEO, options=PLAIN_OPTIONS)["reused"] is reused


def submitted(client: RawClient, path: Path) -> bool:
    """Hand over a file; return whether its work was there already."""
    with path.open("rb") as file:
        source = {"kind": "fd", "name": path.name}
        reply = client.call("submit", descriptors=[file.fileno()], source=source, options=PLAIN_OPTIONS)
    return bool(reply["reused"])
