"""Settings: which place wins, what is refused and how, and that the documentation knows them all."""

from __future__ import annotations

import dataclasses
import grp
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import to_toml
from whisperd.daemon.config import SETTINGS, Config, ConfigError, admin_uids, load_config
from whisperd.protocol.paths import Paths, default_paths
from whisperd.protocol.systemd import listen_fds, notify

ROOT = Path(__file__).parents[1]


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(
        socket=tmp_path / "socket",
        state_dir=tmp_path / "state",
        cache_dir=tmp_path / "cache",
        config_file=tmp_path / "whisperd.toml",
    )


def load(paths: Paths, text: str = "", environ: dict[str, str] | None = None, **flags: Any) -> Config:
    if text:
        paths.config_file.write_text(text)
    return load_config(flags, environ or {}, paths)


def test_without_anything_the_defaults_hold(paths: Paths) -> None:
    config = load(paths)
    assert (config.socket, config.state_dir, config.cache_dir) == (paths.socket, paths.state_dir, paths.cache_dir)
    assert (config.model, config.capacity, config.open_requests, config.fetch_extractors) == (
        "small",
        1000,
        64,
        ("youtube",),
    )
    assert config.socket_mode_bits == 0o660


def test_a_flag_wins_over_a_variable_over_the_file_over_the_default(paths: Paths) -> None:
    text, environ = "capacity = 10\nthreads = 1\nmodel = 'a'", {"WHISPERD_CAPACITY": "20", "WHISPERD_THREADS": "2"}
    config = load(paths, text, environ, capacity=30, threads=None)
    assert (config.capacity, config.threads, config.model, config.decoders) == (30, 2, "a", 2)


def test_every_setting_can_be_given_in_the_file_and_as_a_variable(paths: Paths) -> None:
    config = load(paths, "keep_alive_s = 600.0")  # the one whose default no value stands for
    values = {name: getattr(config, name) for name in SETTINGS}
    file = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    assert load(paths, to_toml(file)) == config
    variables = {
        f"WHISPERD_{name.upper()}": ",".join(value) if isinstance(value, tuple) else str(value)
        for name, value in values.items()
    }
    paths.config_file.unlink()
    assert load(paths, environ=variables) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("capcity = 10", "unknown key 'capcity'; did you mean 'capacity'"),
        ("[whisperd]\ncapacity = 10", "unknown key 'whisperd'"),
        ("capacity = 1", "capacity must be a whole number of at least 2, not 1"),
        ("capacity = 10.5", "capacity must be a whole number"),
        ("capacity = true", "capacity must be a whole number"),
        ("capacity = '10'", "capacity must be a whole number"),
        ("keep_alive_s = inf", "keep_alive_s must be a number"),
        ("keep_alive_s = nan", "keep_alive_s must be a number"),
        ("keep_alive_s = -1", "keep_alive_s must be a number of at least 0"),
        ("share_results = 'all'", "share_results must be 'user' or 'everyone', not 'all'"),
        ("socket_mode = '999'", "socket_mode must be octal"),
        ("socket_mode = 660", "socket_mode must be octal"),
        ("device = 'gpu'", "device must be auto, cpu, cuda or cuda:N"),
        ("log_level = 'loud'", "log_level must be 'debug' or"),
        ("fetch_allow_private = 1", "fetch_allow_private must be true or false"),
        ("admins = 'root'", "admins must be a list"),
        ("admins = ['no-such-user-here']", "there is no user 'no-such-user-here'"),
        ("admins = ['@no-such-group-here']", "there is no group 'no-such-group-here'"),
        ("socket_group = 'no-such-group-here'", "socket_group: there is no group"),
        ("state_dir = ''", "state_dir must be a path"),
        ("helper_backoff_s = 100", "helper_backoff_max_s must not be less"),
        ("capacity = ", "is not TOML"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(paths: Paths, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(paths, text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "text"), [("THREADS", "many"), ("KEEP_ALIVE_S", ""), ("FETCH_ALLOW_PRIVATE", "x")]
)
def test_what_is_wrong_in_a_variable_is_named(paths: Paths, variable: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(paths, environ={f"WHISPERD_{variable}": text})
    assert f"$WHISPERD_{variable} must be" in str(caught.value)


def test_what_is_wrong_in_a_flag_is_named(paths: Paths) -> None:
    with pytest.raises(ConfigError, match="--log-level must be"):
        load(paths, log_level="loud")


def test_an_unknown_variable_is_a_warning(paths: Paths, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load(paths, environ={"WHISPERD_CAPACTY": "5", "WHISPERD_SOCKET": "/tmp/s", "PATH": "/bin"})
    assert [record.getMessage() for record in caplog.records] == [
        "unknown variable WHISPERD_CAPACTY is ignored; did you mean 'WHISPERD_CAPACITY'?"
    ]


def test_lists_and_truths_in_variables(paths: Paths) -> None:
    config = load(
        paths, environ={"WHISPERD_FETCH_EXTRACTORS": "youtube, vimeo,", "WHISPERD_FETCH_ALLOW_PRIVATE": "Yes"}
    )
    assert config.fetch_extractors == ("youtube", "vimeo")
    assert config.fetch_allow_private is True


def test_a_file_that_was_named_must_be_there(paths: Paths, tmp_path: Path) -> None:
    for arguments in (
        {"config": str(tmp_path / "no.toml")},
        {"environ": {"WHISPERD_CONFIG": str(tmp_path / "no.toml")}},
    ):
        with pytest.raises(ConfigError, match="no such file"):
            load(paths, **arguments)  # type: ignore[arg-type]
    (tmp_path / "other.toml").write_text("capacity = 7")
    assert load(paths, config=str(tmp_path / "other.toml")).capacity == 7


def test_a_folder_for_a_file_is_an_error(paths: Paths, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(paths, config=str(tmp_path))


def test_a_user_without_a_runtime_folder_is_told_to_name_a_socket(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path)}
    with pytest.raises(ConfigError, match="--socket"):
        load_config({}, environ, default_paths(environ, euid=1000))
    config = load_config({"socket": "~/s"}, environ, default_paths(environ, euid=1000))
    assert config.socket == Path("~/s").expanduser()
    assert config.state_dir == tmp_path / ".local/state/whisperd"


def test_paths_become_absolute(paths: Paths) -> None:
    assert load(paths, state_dir="state/../here").state_dir == Path.cwd() / "here"


def test_where_cookies_and_the_fetch_socket_lie_may_be_said_with_a_tilde(
    paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "cookies").mkdir()
    config = load(paths, "fetch_cookies = '~/cookies'", {"WHISPERD_FETCH_SOCKET": "~/fetch.sock"})
    assert (config.fetch_cookies, config.fetch_socket) == (f"{tmp_path}/cookies", f"{tmp_path}/fetch.sock")
    assert not caplog.records
    config = load(paths, "fetch_cookies = ''")
    assert (config.fetch_cookies, config.fetch_socket) == ("", "")


def test_a_folder_of_cookies_that_is_not_there_is_a_warning(paths: Paths, tmp_path: Path) -> None:
    paths.config_file.write_text("fetch_cookies = '~/cookies'")
    command = [sys.executable, "-m", "whisperd", "--config", str(paths.config_file), "--socket", str(paths.socket)]
    done = subprocess.run(
        [*command, "--check"],
        cwd=ROOT,
        env=os.environ | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "the settings are good\n"
    assert f"fetch_cookies: there is no folder {tmp_path}/cookies, so no download has cookies" in done.stderr


def test_admins_are_root_the_daemon_and_who_is_named(paths: Paths) -> None:
    assert admin_uids(load(paths)) == {0, os.geteuid()}
    group = grp.getgrgid(os.getegid()).gr_name
    config = load(paths, f"admins = ['12345', 54321, '@{group}', '@99999999']")
    assert {0, os.geteuid(), 12345, 54321} <= admin_uids(config)


def test_every_setting_has_a_help_text_and_a_safe_frozen_value(paths: Paths) -> None:
    for setting in SETTINGS.values():
        assert setting.metadata["help"].endswith("."), setting.name
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(paths).capacity = 5  # type: ignore[misc]


def test_the_documentation_is_up_to_date() -> None:
    script = ROOT / "tools" / "write_config_docs.py"
    done = subprocess.run([sys.executable, script, "--check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_outside_systemd_nothing_is_inherited_and_nothing_is_told() -> None:
    assert listen_fds({}) == []
    assert not notify("READY=1", {})


def test_sockets_for_another_process_are_not_ours() -> None:
    environ = {"LISTEN_PID": str(os.getpid() + 1), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x", "OTHER": "y"}
    assert listen_fds(environ) == []
    assert environ == {"OTHER": "y"}


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(tmp_path: Path, abstract: bool) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        name = f"@whisperd-test-{os.getpid()}" if abstract else str(tmp_path / "n")
        sock.bind(name.replace("@", "\0", 1))
        assert notify("READY=1\nSTATUS=ready", {"NOTIFY_SOCKET": name})
        assert sock.recv(100) == b"READY=1\nSTATUS=ready"
    assert not notify("READY=1", {"NOTIFY_SOCKET": name}), "nobody listens any more: no error"
