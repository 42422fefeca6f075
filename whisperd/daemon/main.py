"""The daemon's command: settings, locks, the order of starting and stopping, exit codes."""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import gc
import importlib.util
import logging
import os
import resource
import signal
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import click

from whisperd import __version__
from whisperd.daemon.config import Config, ConfigError, load_config
from whisperd.daemon.helpers.spawning import spawner
from whisperd.daemon.house import House
from whisperd.daemon.loop import READ, Loop
from whisperd.daemon.manager import ServiceManager
from whisperd.daemon.operations.handlers import dispatch
from whisperd.daemon.store.ballast import Ballast
from whisperd.daemon.store.database import Database
from whisperd.daemon.store.opening import StateError
from whisperd.daemon.wire.descriptors import use_closers
from whisperd.daemon.wire.listener import Listener, SocketTakenError, inherited_listener, make_folder
from whisperd.daemon.wire.server import Server
from whisperd.protocol import logs, systemd
from whisperd.protocol.errors import ErrorCode
from whisperd.protocol.paths import default_paths
from whisperd.protocol.spoolfolder import sync_folder

log = logging.getLogger("whisperd")

_STDIN = 0

EXIT_STORAGE = 1  # storage failed under it
EXIT_USAGE = 2  # wrong usage or configuration
EXIT_TAKEN = 3  # another daemon owns the socket or the state
EXIT_STATE = 4  # the state cannot be opened

# Looked for, never imported here: without them the helpers would start and die for ever.
_HELPERS_NEED = ("av", "torch", "whisper", "yt_dlp")
_INSTALL_SERVER = "install them with pip install 'whisperd[server]'"

# An exit that a restart cannot mend takes so long under systemd: clients that ask again and again are told why,
# and start the daemon once in that time and not as often as the machine can.
_REFUSE_FOR_S = 1.0

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _CannotStart(Exception):
    """A restart would not mend it: exit with `code`, and tell the log and whoever waits on the socket."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Command(click.Group):
    """A command whose wrong usage (a drop-in with a typing error) is told to the waiting clients too."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        try:
            return super().make_context(*args, **kwargs)
        except click.UsageError as error:
            with contextlib.suppress(ConfigError):
                _refuse(inherited_listener(), error.format_message())
            raise


@click.group(cls=_Command, context_settings=_CONTEXT, invoke_without_command=True)
@click.option("--config", metavar="FILE", help="Settings in TOML; docs/configuration.md lists them.")
@click.option("--socket", metavar="PATH", help="Unix socket to listen on.")
@click.option("--state-dir", metavar="DIR", help="Folder of the queue, the audio and the transcripts.")
@click.option("--cache-dir", metavar="DIR", help="Folder of models and compilers' caches.")
@click.option("--model", metavar="NAME|PATH", help="A name such as small, a checkpoint, a model folder, or demo.")
@click.option("--device", metavar="DEVICE", help="auto, cpu or cuda[:N].")
@click.option("--threads", metavar="N", type=int, help="CPU threads of the model; 0 = all cores.")
@click.option("--capacity", metavar="N", type=int, help="How many jobs may wait.")
@click.option("--log-level", metavar="LEVEL", help="debug, info, warning or error.")
@click.option("--until-eof", is_flag=True, help="Stop when standard input (a pipe) ends: another program's own daemon.")
@click.option("--check", is_flag=True, help="Check the settings and exit.")
@click.version_option(__version__, "-V", "--version", prog_name="whisperd")
@click.pass_context
def main(context: click.Context, /, check: bool, until_eof: bool, **flags: Any) -> None:
    """Own the GPU: load one Whisper model and transcribe for every program on this machine.

    Runs in the foreground and logs to stderr; `whisperctl` talks to it. `whisperd setup` makes systemd run it.
    """
    if context.invoked_subcommand is not None:
        return
    logs.configure()
    listener = None
    try:
        listener = None if check else inherited_listener()
        config = load_config(_given(flags), os.environ, default_paths())
        if check:
            click.echo("the settings are good")
            return
        logs.configure(config.log_level, background=True)
        sys.exit(serve(config, listener, until_eof=until_eof))
    except ConfigError as error:
        _end(EXIT_USAGE, str(error), listener)
    except _CannotStart as error:
        _end(error.code, str(error), listener)


@main.command("setup", context_settings=_CONTEXT)
@click.option("--user", is_flag=True, help="For you alone, run by your own systemd; the default for all but root.")
@click.option("--model", metavar="NAME", help="Take this model instead of the one that suits the device.")
@click.option("--remove", is_flag=True, help="Undo it; what was fetched and transcribed stays.")
def set_up(user: bool, model: str | None, remove: bool) -> None:
    """Open the socket in systemd, choose and fetch a model, and try it: the first five minutes.

    May be run again: what is done already stays as it is. Exit code 1 when a step failed, which says what to do.
    """
    from whisperd.daemon.setup.steps import Setup, StepFailed

    try:
        if missing := _missing_packages():
            raise StepFailed(missing)
        steps = Setup(user=user or os.geteuid() != 0)
        sys.exit(steps.remove() if remove else steps.run(model))
    except (StepFailed, ConfigError, OSError) as error:
        click.echo(f"whisperd setup: {error}", err=True)
        sys.exit(1)


def _missing_packages() -> str:
    missing = [name for name in _HELPERS_NEED if importlib.util.find_spec(name) is None]
    if not missing:
        return ""
    return f"the packages that the helpers need are not there ({', '.join(missing)}): {_INSTALL_SERVER}"


def serve(config: Config, listener: Listener | None = None, *, until_eof: bool = False) -> int:
    """Run the daemon until it is told to stop; return its exit code. `listener` is the inherited one, if any.

    `until_eof`: the end of standard input tells it too, so it ends with whoever holds the other end, even by kill -9.

    Raises `ConfigError` and `_CannotStart`.
    """
    # A crash, and systemd's watchdog, then leave in the log where the process stood.
    faulthandler.enable()
    if until_eof and not stat.S_ISFIFO(os.fstat(_STDIN).st_mode):
        raise ConfigError("--until-eof needs a pipe as standard input, whose end tells when to stop")
    if missing := _missing_packages():
        raise ConfigError(missing)
    os.umask(0o077)
    # The soft limit, often 1,024, is kept low for programs that use select(2); the loop does not.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    spawner()  # before any descriptor that it should not have
    locks = []
    try:
        for folder in (config.state_dir, config.cache_dir):
            if not folder.is_dir():
                folder.mkdir(mode=0o700, parents=True)
                with contextlib.suppress(PermissionError):  # a folder above us may be closed to us
                    sync_folder(folder.parent)
        locks.append(_lock(config.state_dir / "whisperd.lock"))
    except OSError as error:
        raise _CannotStart(
            EXIT_STATE, f"the state cannot be opened: {error}: check who owns {config.state_dir}"
        ) from None
    try:
        if listener is None:
            # A lock of its own: whoever is about to replace a stale socket must be alone at it.
            make_folder(config.socket.parent)
            locks.append(_lock(config.socket.with_name(f"{config.socket.name}.lock")))
    except OSError as error:
        raise ConfigError(f"no socket can be made at {config.socket}: {error}; name another with --socket") from None
    if None in locks:
        raise _CannotStart(
            EXIT_TAKEN,
            f"another whisperd works with {config.state_dir} or {config.socket}: stop it, or name another --state-dir "
            "and --socket",
        )
    try:
        return _Daemon(config, listener, until_eof=until_eof).run()
    except StateError as error:
        raise _CannotStart(EXIT_STATE, str(error)) from None
    except SocketTakenError as error:
        raise _CannotStart(EXIT_TAKEN, str(error)) from None


class _Daemon:
    """Starts the parts in order, and stops them in the opposite one."""

    def __init__(self, config: Config, listener: Listener | None, *, until_eof: bool) -> None:
        self._config = config
        self._listener = listener
        self._until_eof = until_eof
        self._loop = Loop()
        self._exit_code = 0
        self._stopping = False

    def run(self) -> int:
        config, loop = self._config, self._loop
        database = Database(
            config.state_dir / "whisperd.sqlite3",
            ballast=Ballast(config.state_dir / "ballast", config.ballast_bytes),
            backups=config.database_backups,
            deliver=loop.call_soon_threadsafe,
            failed=self._storage_failed,
        )
        use_closers(config.closers)
        self._house = house = House(loop, config, database)
        house.recover()
        # The socket comes last: who can connect finds a daemon that knows all its jobs.
        self._server = server = Server(
            loop,
            config,
            dispatch=lambda peer, request, descriptors: dispatch(house, peer, request, descriptors),
            closed=house.peer_closed,
            listener=self._listener,
            unlimited=house.is_admin,
        )
        house.connections = lambda: server.count
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.on_signal(number, self._stop)
        if self._until_eof:
            loop.register(_STDIN, READ, self._read_stdin)
        house.start()
        log.info(
            "started version=%s pid=%d socket=%s state=%s model=%s device=%s capacity=%d",
            *(__version__, os.getpid(), config.socket, config.state_dir, config.model, config.device, config.capacity),
        )
        self._manager = manager = ServiceManager(loop, house)
        loop.call_soon(manager.ready)
        # What is there now stays: Python's collector need not look at it again, which takes 15 ms each time.
        gc.freeze()
        loop.run()
        if self._exit_code:
            # Without a last word to the database: closing it would write to a disk that has just failed.
            logging.shutdown()
            os._exit(self._exit_code)
        database.stop()
        house.ledger.spool.stop()
        log.info("stopped")
        return 0

    def _read_stdin(self, events: int) -> None:
        if not os.read(_STDIN, 4096):
            self._loop.unregister(_STDIN)
            self._stop()

    def _stop(self) -> None:
        """Stop as asked: refuse what comes, return running work to the queue, let replies out, go."""
        if self._stopping:
            return
        self._stopping = True
        log.info("stopping")
        self._manager.stopping()
        self._server.stop_accepting()
        self._house.stop()
        self._loop.call_later(self._config.stop_grace_s, self._loop.stop)
        self._house.when_helpers_left(self._close)

    def _close(self) -> None:
        """Let the last replies out; the grace above is the latest."""
        # Everything handed to the store before this call is committed when it comes back.
        self._house.ledger.read(lambda db, now: None, lambda _: self._server.close_all(1.0, self._loop.stop))

    def _storage_failed(self, reason: str) -> None:
        """Storage is not to be trusted any more: no reply, no commit, out."""
        log.critical("storage failed: %s. Nothing that was acknowledged is lost; mend the disk and start again", reason)
        self._exit_code = EXIT_STORAGE
        self._house.stop()
        self._loop.stop()


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value is not None}


def _lock(path: Path) -> int | None:
    """Return a descriptor that holds the lock for the life of the process, or None when another has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def _end(code: int, message: str, listener: Listener | None) -> NoReturn:
    if logs.stderr_is_journal():
        log.critical("cannot start: %s", message)
    else:
        logging.shutdown()  # what was logged before is written first: this is the last word
        click.echo(f"whisperd: {message}", err=True)
    _refuse(listener, message)
    sys.exit(code)


def _refuse(listener: Listener | None, message: str) -> None:
    """Tell systemd and whoever waits on its socket why the daemon does not start."""
    if listener is not None:
        systemd.notify(f"STATUS=cannot start: {message}")
        text = f"whisperd cannot start: {message}"
        error = {"code": ErrorCode.UNAVAILABLE, "message": text}
        listener.refuse_waiting({"id": 0, "ok": False, "error": error}, for_s=_REFUSE_FOR_S)
