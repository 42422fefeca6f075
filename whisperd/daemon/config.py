"""All settings: one frozen dataclass, a help text each, and how they are read.

A command line flag wins over a `WHISPERD_...` variable, that over the TOML file, that over the default.
docs/configuration.md's table is made from the fields here by tools/write_config_docs.py.
"""

from __future__ import annotations

import contextlib
import difflib
import grp
import logging
import math
import os
import pwd
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from whisperd.protocol.catalogue import HOME_URL, catalogue
from whisperd.protocol.frames import MAX_REPLY_BYTES
from whisperd.protocol.logs import LEVELS
from whisperd.protocol.options import MODES
from whisperd.protocol.paths import Paths

log = logging.getLogger("whisperd.config")

PREFIX = "WHISPERD_"
# Named like settings, but not settings of the file: where the file lies.
_NO_SETTINGS = {"WHISPERD_CONFIG"}


class ConfigError(Exception):
    """A setting is wrong; the message names it and where it stands. The daemon ends with exit code 2."""


def _setting(value: Any, help: str, *, flag: bool = False, **check: Any) -> Any:
    """A field with its help text. Checks: `low` and `high` for numbers, `choices` or `pattern` for strings.

    `default` among them tells in words what None stands for. With `path` a string that is not empty is
    made a whole path.
    """
    return field(default=value, metadata={"help": help, "flag": flag, **check})


def _place(help: str) -> dict[str, Any]:
    """The metadata of a path. It has no default of its own: that depends on who runs the daemon."""
    return {"help": help, "flag": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The daemon's settings, checked. Names carry their units."""

    # --- places and access ---
    socket: Path = field(
        metadata=_place("The Unix socket to listen on. Not used when systemd hands over a listening socket.")
    )
    socket_group: str = _setting("", "Group that the socket belongs to; empty leaves it as it is.")
    socket_mode: str = _setting(
        "0660",
        "Permissions of the socket, octal: who may connect.",
        pattern=r"0?[0-7]{3}",
        wanted='octal, such as "0660"',
    )
    state_dir: Path = field(
        metadata=_place("Folder for the queue's database and the spooled audio. Must survive a reboot.")
    )
    cache_dir: Path = field(
        metadata=_place("Folder for models and compiled code. May be deleted while the daemon is stopped.")
    )
    admins: tuple[str, ...] = _setting(
        (), "Who may do everything besides root and the daemon's own user: user names, uids, or `@group`."
    )

    # --- the model ---
    model: str = _setting(
        "small",
        "A model's name, a checkpoint, a folder in CTranslate2's or Hugging Face's format, or `demo`.",
        flag=True,
    )
    models_url: str = _setting(
        HOME_URL,
        "Where named models that are not on this machine are downloaded from, as `URL/SHA256/NAME.pt`: OpenAI's own "
        "address, or a mirror of it. Empty: none are downloaded.",
        pattern=r"(https?://[^\s/]\S*)?",
        wanted="an http or https address, or empty",
    )
    extra_models: tuple[str, ...] = _setting(
        (),
        "Models of your own, each as `NAME=SHA256`: checkpoints `NAME.pt` that are downloaded from `models_url` and "
        "named like OpenAI's.",
    )
    device: str = _setting(
        "auto",
        "`auto`, `cpu`, `cuda` or `cuda:N`.",
        flag=True,
        pattern=r"auto|cpu|cuda(:\d{1,2})?",
        wanted="auto, cpu, cuda or cuda:N",
    )
    threads: int = _setting(0, "CPU threads of the model; 0 takes all cores.", flag=True, low=0, high=1024)
    dtype: str = _setting(
        "auto",
        "Number format of the model: `auto` is float16 on CUDA and float32 on a CPU. "
        "`bfloat16` is faster on CPUs that have it (AMX, AVX-512 BF16), and changes a few words.",
        choices=("auto", "float32", "float16", "bfloat16"),
    )
    batch_windows: int = _setting(
        0,
        "How many windows (30 s each) of background work are decoded together; interactive work has one place more. "
        "0: 8 on a CPU, 32 on CUDA, fewer where memory is short.",
        low=0,
        high=256,
    )
    device_memory_mb: int = _setting(
        0,
        "On CUDA alone: how much of the GPU's memory the model may take, in MiB, beside what CUDA, its libraries "
        "and recorded steps take; 0 for all that is free. On a CPU `batch_windows` is what keeps the model small.",
        low=0,
    )
    open_runs: int = _setting(
        0,
        "How many recordings the model works on at the same time; 0: one more than windows are decoded together.",
        low=0,
        high=256,
    )
    mode: str = _setting(
        "exact",
        "For submits that do not say: `exact` is openai-whisper's text, `fast` decodes windows beside each other.",
        choices=MODES,
    )
    fast_windows: int = _setting(
        8, "How many windows of one recording are decoded together in mode `fast`.", low=1, high=64
    )
    keep_alive_s: float | None = _setting(
        None,
        "Seconds without work after which the model is unloaded and its memory is free; the next job loads it again. "
        "0 keeps it loaded.",
        low=0,
        default="600 on CUDA, never on a CPU",
    )
    model_load_timeout_s: float = _setting(900.0, "Seconds that loading the model may take.", low=1)
    stall_timeout_s: float = _setting(
        600.0, "Seconds without a step of the model (a token, an encoded window) until its process is replaced.", low=1
    )

    suspect_windows: int = _setting(
        4,
        "Windows that a recording in whose presence the model's process died is worked on alone, before others are "
        "again; four times as many after each further death.",
        low=1,
    )
    sick_rest_s: float = _setting(
        60.0,
        "Seconds that the model rests when its process died of whisperd's own sample: the device is at fault then, "
        "not a recording.",
        low=0.01,
    )

    interactive_windows_in_a_row: int = _setting(
        8,
        "Windows of interactive recordings that the model takes in a row while background ones wait. Behind those a "
        "piece of background work (a block of the encoder) comes first after as many pieces of interactive work, until "
        "a background window has begun.",
        low=1,
    )

    # --- the queue ---
    capacity: int = _setting(1000, "How many jobs may wait; beyond it a submit is `queue_full`.", flag=True, low=2)
    interactive_capacity_share: float = _setting(
        0.1, "Part of `capacity` kept for interactive jobs (at least one place).", low=0, high=0.9
    )
    capacity_share_per_user: float = _setting(
        0.5,
        "Part of `capacity` that the waiting jobs of one user may take, and as many those that ask for what another of "
        "his is at (admins exempt).",
        low=0,
        high=1,
    )
    interactive_in_a_row: int = _setting(
        16,
        "Interactive pieces of work in a row, in a lane that does one at a time, while background work waits.",
        low=1,
    )
    interactive_per_user: int = _setting(8, "Interactive jobs of one user that may wait (admins exempt).", low=1)
    share_results: str = _setting(
        "user",
        "Whose results may answer the same audio again: the same `user`'s, or `everyone`'s. With `everyone` a quick "
        "answer tells that somebody had the same recording. Where downloads may have cookies (`fetch_cookies`, "
        "`fetch_socket`) each user's are his own.",
        choices=("user", "everyone"),
    )
    attach_grace_s: float = _setting(
        30.0,
        "After a restart: seconds within which an attached job's client must come back before it is cancelled; longer "
        "while submits of the same user wait for their answers.",
        low=0,
    )

    # --- disk ---
    min_free_bytes: int = _setting(
        512 * 2**20,
        "Free disk space below which a submit is refused as `storage_full`; twice `ballast_bytes`, if that is more, "
        "else queued audio could take the room that decoding it wants. Decoding leaves half of it free.",
        low=0,
    )
    ballast_bytes: int = _setting(
        8 * 2**20,
        "Size of a file that only takes room. On a full disk it is deleted, so that jobs can still be cancelled, "
        "forgotten and ended; it is made again when twice as much is free. 0 does without.",
        low=0,
    )
    database_backups: int = _setting(
        3, "Copies of the database that are kept of those made before an upgrade changes it; 0 makes none.", low=0
    )
    disk_check_s: float = _setting(5.0, "How often the free room is looked at, in seconds.", low=0.1)
    full_disk_pause_s: float = _setting(
        10.0,
        "Seconds that decoding and downloads pause after they met a full disk, before they look again. Where there is "
        "room, but too little, each pause is twice as long, up to ten minutes.",
        low=0.1,
    )
    spool_bytes_per_user: int = _setting(
        64 * 2**30,
        "Bytes of one user's audio on the disk, that of failed and cancelled jobs included (admins exempt).",
        low=1,
    )
    jobs_per_user: int = _setting(
        200_000,
        "Jobs of one user that are kept, ended ones included; beyond it a submit is `quota_exceeded` (admins exempt).",
        low=1,
    )
    retention_days: float = _setting(30.0, "Days that ended jobs and their transcripts are kept.", low=0)
    key_retention_days: float = _setting(
        30.0, "Days that idempotency keys are remembered after their jobs' rows are gone.", low=0
    )
    keep_failed_audio_hours: float = _setting(
        24.0, "Hours that the audio of failed and cancelled jobs is kept for `retry`.", low=0
    )
    clock_grace_hours: float = _setting(
        24.0,
        "When the machine's date jumps ahead by more than a day, nothing is deleted for its age until the date has "
        "stood for so many hours of running. 0 believes any date.",
        low=0,
    )

    # --- fetching ---
    fetch_extractors: tuple[str, ...] = _setting(
        ("youtube",), "yt-dlp extractors that may be used; an address none of them knows is refused."
    )
    fetch_allow_private: bool = _setting(
        False, "Allow addresses of private, loopback and link-local networks, also after redirects."
    )
    fetch_cookies: str = _setting(
        "",
        "Folder of cookie files (Netscape format), one a user: `UID.txt` or `NAME.txt`. They are read, never written, "
        "and used for that user's downloads alone. Empty: no cookies.",
        path=True,
    )
    fetch_socket: str = _setting(
        "",
        "Socket of `whisperd-fetch.socket`: each download runs in an instance of that unit. Empty: in the daemon's own "
        "processes.",
        path=True,
    )
    fetchers: int = _setting(
        2,
        "Processes that download, one recording at a time each. Of several, one is kept for interactive jobs: 2 means "
        "one background download at a time, which sites take better than many.",
        low=1,
        high=64,
    )
    fetch_timeout_s: float = _setting(120.0, "Seconds without a byte after which a download is given up.", low=1)
    fetch_limit_s: float = _setting(7200.0, "Seconds that one download may take in all.", low=1)
    fetch_ahead_bytes: int = _setting(
        2 * 2**30, "Bytes of downloaded audio waiting for the model beyond which background downloads wait.", low=1
    )
    fetch_backoff_s: float = _setting(
        10.0,
        "Seconds before a download that failed for the moment is tried again; three times, tripling. Where several of "
        "the background fail in a row and none succeeds, all of it rests so, up to ten minutes at a time, and for two "
        "hours no failure counts.",
        low=0.01,
    )
    fetch_rest_s: float = _setting(
        900.0,
        "Seconds that all downloads rest once a site has had too many requests and does not say how long to wait.",
        low=0.01,
    )

    # --- copying and decoding ---
    max_audio_s: float = _setting(43200.0, "Longest recording in seconds; a longer one fails as `too_long`.", low=1)
    max_source_bytes: int = _setting(
        16 * 2**30, "Largest file, copied or downloaded, in bytes; a larger one fails as `too_large`.", low=1
    )
    copiers: int = _setting(4, "Processes that copy files in.", low=1, high=64)
    copies_per_user: int = _setting(
        2, "Copies of one user at a time, and as many uploads; further ones wait (admins exempt).", low=1, high=64
    )
    copy_timeout_s: float = _setting(120.0, "Seconds without a byte after which a copy is given up.", low=1)
    copy_limit_s: float = _setting(7200.0, "Seconds that one copy or upload may take in all, its turn come.", low=1)
    receivers: int = _setting(
        8, "Processes that receive uploads, from clients that cannot pass descriptors.", low=1, high=64
    )
    upload_timeout_s: float = _setting(
        60.0, "Seconds without a chunk, all before answered, after which an upload is discarded.", low=0.1
    )
    upload_bytes_per_s: int = _setting(
        4096,
        "Slowest that an upload may come while others wait for its receiver, over `upload_timeout_s`; a slower one is "
        "discarded. 0: they wait.",
        low=0,
    )
    decoders: int = _setting(2, "Processes that decode audio.", low=1, high=64)
    decode_ahead: int = _setting(
        8,
        "Background recordings that are decoded ahead and wait for the model; decoded they take more room than as they "
        "came.",
        low=1,
        high=1000,
    )
    decode_cpu_s: int = _setting(3600, "CPU seconds that decoding one recording may take.", low=1)
    decode_memory_mb: int = _setting(1024, "Memory in MiB that decoding one recording may take.", low=256)
    decode_timeout_s: float = _setting(120.0, "Seconds without progress after which decoding is given up.", low=1)

    # --- connections ---
    max_connections: int = _setting(
        4096,
        "Connections in all (`admin_connections` more for admins). One user may have as many as are left for others.",
        low=1,
        high=1_000_000,
    )
    admin_connections: int = _setting(
        16, "Connections beyond `max_connections` that only admins may make.", low=0, high=10_000
    )
    refused_connections: int = _setting(
        64,
        "Connections beyond those bounds that are told why at a time; further ones are only closed.",
        low=0,
        high=10_000,
    )
    connections_per_user: int = _setting(1024, "Connections of one user (admins exempt).", low=1, high=1_000_000)
    listen_backlog: int = _setting(
        1024,
        "Connections that may wait to be accepted; a socket of systemd's has its unit's `Backlog=`.",
        low=1,
        high=65_535,
    )
    linger_s: float = _setting(
        1.0,
        "Seconds that a client who is refused may go on sending, so that it gets to read why.",
        low=0,
        high=60,
    )
    open_requests: int = _setting(
        64, "Unanswered requests of one connection; then it is not read on.", low=1, high=4096
    )
    turn_requests_per_user: int = _setting(
        64,
        "Requests of one user, by all his connections, that are handled before others have their turn; 64 take two or "
        "three milliseconds.",
        low=1,
        high=10_000,
    )
    turn_requests: int = _setting(
        2,
        "Requests of one connection that are handled before others have their turn; few, for a turn serves hundreds.",
        low=1,
        high=1000,
    )
    turn_reads_per_user: int = _setting(
        16, "Connections of one user that are read before others have their turn.", low=1, high=10_000
    )
    watches_per_user: int = _setting(
        2048, "Requests of one user that wait for jobs or follow them at a time (admins exempt).", low=1
    )
    max_output_bytes: int = _setting(
        8 * 2**20, "Bytes of events that may wait for one slow reader; beyond it the connection is closed.", low=65536
    )
    output_bytes_per_user: int = _setting(
        256 * 2**20,
        "Bytes of output that all connections of one user may leave unread; beyond it his further answers wait, and he "
        "is not read on.",
        low=2 * MAX_REPLY_BYTES,
    )
    store_calls_per_user: int = _setting(
        256, "Requests of one user that wait for the queue's database; with more he is not read on.", low=2
    )
    closers: int = _setting(
        32,
        "Threads that close what clients passed. While all of them wait for file systems that do not answer, "
        "recordings are taken as uploads only.",
        low=1,
        high=1024,
    )
    send_timeout_s: float = _setting(30.0, "Seconds that a client may leave waiting output unread.", low=0.1)
    frame_timeout_s: float = _setting(30.0, "Seconds that a frame may take from its first byte to its last.", low=0.1)

    # --- the daemon itself ---
    log_level: str = _setting("info", f"How much is logged: {', '.join(LEVELS)}.", flag=True, choices=LEVELS)
    helper_nice: int = _setting(10, "How far helpers give way to the daemon and other programs.", low=0, high=19)
    heartbeat_timeout_s: float = _setting(
        60.0, "Seconds of silence after which a helper is killed and replaced.", low=5
    )
    helper_backoff_s: float = _setting(1.0, "Seconds before a helper that died is started again; doubles.", low=0.01)
    helper_backoff_max_s: float = _setting(60.0, "Where that doubling ends.", low=0.01)
    cancel_grace_s: float = _setting(2.0, "Seconds that a helper has to obey a cancel before it is replaced.", low=0)
    stop_grace_s: float = _setting(8.0, "Seconds that a stop may take.", low=0)

    @property
    def kept_free_bytes(self) -> int:
        """What submits and downloads leave free: below two ballasts nothing is decoded, which alone makes room."""
        return max(self.min_free_bytes, 2 * self.ballast_bytes)

    @property
    def decoding_free_bytes(self) -> int:
        """What decoding leaves free: half of that, or submits that took all they may would leave it no room."""
        return self.kept_free_bytes // 2

    @property
    def socket_mode_bits(self) -> int:
        """`socket_mode` as a number."""
        return int(self.socket_mode, 8)


SETTINGS: Mapping[str, Field[Any]] = {setting.name: setting for setting in fields(Config)}


def load_config(flags: Mapping[str, Any], environ: Mapping[str, str], paths: Paths) -> Config:
    """Return the settings.

    `flags` are those of the command line by the settings' names, None where one was not given; `config` names the
    file. Raises `ConfigError` for a file that cannot be read, an unknown key, and a value that is wrong.
    """
    path, named = _config_file(flags, environ, paths)
    values: dict[str, Any] = {"socket": paths.socket, "state_dir": paths.state_dir, "cache_dir": paths.cache_dir}
    for name, value in _read_file(path, named=named).items():
        values[name] = _checked(SETTINGS[name], value, f"{path}: {name}")
    for name, text in _variables(environ):
        values[name] = _checked(SETTINGS[name], _from_text(SETTINGS[name], text), f"${PREFIX}{name.upper()}")
    for name, value in flags.items():
        if name != "config" and value is not None:
            values[name] = _checked(SETTINGS[name], value, f"--{name.replace('_', '-')}")
    if values["socket"] is None:
        raise ConfigError(
            "$XDG_RUNTIME_DIR is not set, so there is no safe place for the socket: name one with --socket"
        )
    config = Config(**values)
    _check_together(config)
    return config


def _config_file(flags: Mapping[str, Any], environ: Mapping[str, str], paths: Paths) -> tuple[Path, bool]:
    """Return the file to read and whether somebody named it (then it must be there)."""
    named = flags.get("config") or environ.get("WHISPERD_CONFIG")
    return (Path(named), True) if named else (paths.config_file, False)


def _read_file(path: Path, *, named: bool) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except (FileNotFoundError, NotADirectoryError):
        if named:
            raise ConfigError(f"{path}: there is no such file") from None
        return {}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    for name in values:
        if name not in SETTINGS:
            raise ConfigError(f"{path}: unknown key {name!r}{_nearest(name, SETTINGS)}")
    return values


def _variables(environ: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    for variable, text in sorted(environ.items()):
        if variable.startswith(PREFIX) and variable not in _NO_SETTINGS:
            name = variable.removeprefix(PREFIX).lower()
            if name in SETTINGS and variable == PREFIX + name.upper():
                yield name, text
            else:
                nearest = _nearest(variable, [PREFIX + setting.upper() for setting in SETTINGS])
                log.warning("unknown variable %s is ignored%s", variable, nearest)


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _from_text(setting: Field[Any], text: str) -> Any:
    """Return a variable's text as the setting's type; text that cannot be read is left for the check to refuse."""
    text = text.strip()
    match setting.type:
        case "bool":
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(
                text.lower(), text
            )
        case "int" | "float" | "float | None":
            try:
                return int(text) if setting.type == "int" else float(text)
            except ValueError:
                return text
        case "tuple[str, ...]":
            return [item.strip() for item in text.split(",") if item.strip()]
        case _:
            return text


def _checked(setting: Field[Any], value: Any, where: str) -> Any:
    """Return the value as the field holds it. `where` names the setting and where it stands, for the error."""
    match setting.type:
        case "Path":
            if isinstance(value, str | Path) and str(value):
                return _whole(value)
            wanted = "a path"
        case "str":
            if isinstance(value, str) and _allowed(setting, value):
                return str(_whole(value)) if value and setting.metadata.get("path") else value
            choices = setting.metadata.get("choices")
            wanted = " or ".join(map(repr, choices)) if choices else setting.metadata.get("wanted", "a string")
        case "bool":
            if isinstance(value, bool):
                return value
            wanted = "true or false"
        case "tuple[str, ...]":
            if isinstance(value, list | tuple) and all(type(item) in (str, int) and item != "" for item in value):
                return tuple(map(str, value))
            wanted = "a list of strings"
        case kind:
            low, high = setting.metadata.get("low", -math.inf), setting.metadata.get("high", math.inf)
            kinds = (int,) if kind == "int" else (int, float)
            if type(value) in kinds and low <= value <= high and math.isfinite(value):
                return value if kind == "int" else float(value)
            wanted = "a whole number" if kind == "int" else "a number"
            wanted += f" of at least {low:g}" if math.isinf(high) else f" from {low:g} to {high:g}"
    raise ConfigError(f"{where} must be {wanted}, not {value!r}")


def _whole(path: str | Path) -> Path:
    return Path(os.path.abspath(Path(path).expanduser()))


def _allowed(setting: Field[Any], value: str) -> bool:
    choices, pattern = setting.metadata.get("choices"), setting.metadata.get("pattern")
    return (choices is None or value in choices) and (pattern is None or re.fullmatch(pattern, value) is not None)


def _check_together(config: Config) -> None:
    if config.helper_backoff_max_s < config.helper_backoff_s:
        raise ConfigError("helper_backoff_max_s must not be less than helper_backoff_s")
    try:
        catalogue(config.extra_models)
    except ValueError as error:
        raise ConfigError(f"extra_models: {error}") from None
    if config.fetch_cookies and not os.path.isdir(config.fetch_cookies):
        log.warning("fetch_cookies: there is no folder %s, so no download has cookies", config.fetch_cookies)
    if config.socket_group:
        group_id(config.socket_group, "socket_group")
    admin_uids(config)


def group_id(name: str, where: str) -> int:
    """Return the number of a group by name or number. Raises `ConfigError`, naming the setting."""
    try:
        return int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError(f"{where}: there is no group {name!r}") from None


def admin_uids(config: Config) -> frozenset[int]:
    """Return the uids of all admins: root, the daemon's own user, and the configured users and members of groups.

    Raises `ConfigError` for a name that this machine does not know: a typing error must not pass unnoticed.
    """
    uids = {0, os.geteuid()}
    for name in config.admins:
        if not name.startswith("@"):
            uids.add(_user_id(name))
            continue
        gid = group_id(name[1:], "admins")
        uids |= {user.pw_uid for user in pwd.getpwall() if user.pw_gid == gid}
        uids |= _members(gid)
    return frozenset(uids)


def _members(gid: int) -> set[int]:
    uids = set()
    with contextlib.suppress(KeyError):  # a number without a name
        for member in grp.getgrgid(gid).gr_mem:
            with contextlib.suppress(KeyError):  # a user who is gone
                uids.add(pwd.getpwnam(member).pw_uid)
    return uids


def _user_id(name: str) -> int:
    try:
        return int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid
    except KeyError:
        raise ConfigError(f"admins: there is no user {name!r}") from None
