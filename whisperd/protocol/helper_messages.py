"""What the daemon and its helpers say to each other: the client's frames with message types of their own.

A message travels as `{"type": ClassName, field: value, ...}`. Each one about a piece of work carries the run and its
generation (how often the run was started), so that a late one from a replaced helper is recognised and dropped.
A copy comes before its run exists: there `run` is the daemon's ticket number for the copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, get_origin, get_type_hints

from whisperd.protocol.errors import ErrorCode, WhisperdError

# A window has at most 224 tokens, each of few bytes: with word times about 10 KiB.
MAX_JOURNAL_ENTRY_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class HelperHello:
    """First message of every helper. `version` must be the daemon's own."""

    role: str
    version: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Configure:
    """First message to every helper: the settings of its role, by the configuration's names."""

    settings: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyIn:
    """To a copier, with one descriptor: copy it to `<folder>/source`, hash it, make it durable, answer `Copied`.

    Without `keep` it is only hashed, and nothing is written.
    """

    run: int
    generation: int
    folder: str
    keep: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadBegin:
    """To a receiver: what comes as `UploadData` goes to `<folder>/source`, hashed, made durable, answered `Copied`."""

    run: int
    generation: int
    folder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadData:
    """To a receiver: the next bytes, and whether they are the last. Each is answered by a `Progress` once written."""

    run: int
    generation: int
    data: bytes
    last: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """From a copier or a receiver: `<folder>/source` is there, whole and durable."""

    run: int
    generation: int
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """To a decoder: `<folder>/source` → `<folder>/audio.pcm` (16 kHz mono s16le), answer `Decoded`."""

    run: int
    generation: int
    folder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    run: int
    generation: int
    audio_s: float
    truncated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class NoRoom:
    """From a decoder, in place of `Failed`: the disk has no room for this PCM, which has at least `needed_bytes`."""

    run: int
    generation: int
    needed_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """To a fetcher: download a video or an address (`source` as a Job shows it) to `<folder>/source`, hash it, make it
    durable, answer `Fetched`. `uid` is the user whose cookies may be used.
    """

    run: int
    generation: int
    folder: str
    source: dict[str, Any]
    uid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """`title` is empty where the site does not tell."""

    run: int
    generation: int
    sha256: str
    size_bytes: int
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchWeights:
    """To a fetcher: see that a model's file lies in one of its places, whole; answer `WeightsFetched`.

    `run` is the daemon's number for this download. What an earlier try left is gone on with.
    """

    run: int
    generation: int
    file_name: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsFetched:
    """`path` is the file, wherever it was found or put."""

    run: int
    generation: int
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchFailed:
    """From a fetcher, in place of `Failed`. `transient`: trying again may help, but not before `wait_s`."""

    run: int
    generation: int
    code: str
    message: str
    transient: bool
    wait_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcribe:
    """To the model helper: transcribe `<folder>/audio.pcm` with these options (as `parse_options` returns them).

    A run that was cut off before has a journal: its first `journal` entries lie in `<folder>/journal`, one packed byte
    string after the other, and its first `told` segments have been sent already.
    """

    run: int
    generation: int
    folder: str
    options: dict[str, Any]
    interactive: bool
    truncated: bool
    journal: int
    told: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prioritise:
    """To the model helper: this run's priority has changed (an interactive job joined it, or the last one left)."""

    run: int
    generation: int
    interactive: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TrySample:
    """To the model helper: transcribe the sample that ships with whisperd, answer `SampleTried`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleTried:
    """From the model helper: `error` says what went wrong, and is empty when nothing did."""

    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalEntry:
    """From the model helper: one answer of the model (a window, a language, word times), before what follows from it.

    `entry` has at most `MAX_JOURNAL_ENTRY_BYTES` and means nothing to the daemon, which keeps it with the run.
    """

    run: int
    generation: int
    entry: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalVoid:
    """From the model helper, in place of an end: the journal is not that of this work. The run must begin anew."""

    run: int
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """From the model helper: the segments that one window added, as they will stand in the transcript."""

    run: int
    generation: int
    segments: list[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run is, in a helper's own unit (bytes copied, seconds decoded or transcribed) out of `total`."""

    run: int
    generation: int
    done: float
    total: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """From the model helper: `transcript` is the Transcript map, packed, ready to be stored and spliced."""

    run: int
    generation: int
    transcript: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The work ended without a result. A cancelled one ends so too, with the code `cancelled`."""

    run: int
    generation: int
    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """To any helper: give up this run; answer `Failed` with `cancelled` within the grace, else be replaced."""

    run: int
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """From the model helper, at each change. `traits` says what the model can do, `capacity` how many runs at once.

    traits: `multilingual` bool, `languages` int (how many of `LANGUAGES` it knows, from the first on), `translates`
    bool, `vocabulary` int (its tokens). `fingerprint` tells this model's answers from another's: a journal is good for
    one fingerprint. Until the model is ready, only `error` may differ from its default.
    """

    state: str  # loading | ready | failed
    name: str
    device: str = ""
    dtype: str = ""
    error: str | None = None
    capacity: int = 0
    traits: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """From every helper while it lives, once a second, from a thread that proves the work goes on.

    `beat` grows whenever the work got a step further; `gauges` are numbers for `stats`.
    """

    beat: int
    gauges: dict[str, Any]


HelperMessage = (
    HelperHello
    | Configure
    | CopyIn
    | UploadBegin
    | UploadData
    | Copied
    | Decode
    | Decoded
    | NoRoom
    | Fetch
    | Fetched
    | FetchWeights
    | WeightsFetched
    | FetchFailed
    | Transcribe
    | Prioritise
    | TrySample
    | SampleTried
    | JournalEntry
    | JournalVoid
    | Segments
    | Progress
    | Finished
    | Failed
    | Cancel
    | ModelStatus
    | Heartbeat
)
_TYPES: Mapping[str, type[Any]] = {kind.__name__: kind for kind in HelperMessage.__args__}


@cache
def _checks(name: str) -> Mapping[str, Any]:
    """Return the fields of a message with their types as `isinstance` takes them: `dict[str, Any]` is `dict`."""
    hints = get_type_hints(_TYPES[name])
    return {key: get_origin(hint) if get_origin(hint) in (dict, list) else hint for key, hint in hints.items()}


def to_wire(message: HelperMessage) -> dict[str, Any]:
    """Return the map that travels."""
    return {"type": type(message).__name__} | {each.name: getattr(message, each.name) for each in fields(message)}


def from_wire(wire: Mapping[str, Any]) -> HelperMessage:
    """Return the message of a map. Raises `WhisperdError` (`bad_request`) when it is none: its helper is replaced."""
    name = wire.get("type")
    if not isinstance(name, str) or name not in _TYPES:
        raise WhisperdError(ErrorCode.BAD_REQUEST, f"unknown helper message {name!r}")
    checks = _checks(name)
    values = {key: value for key, value in wire.items() if key != "type"}
    for key, kind in checks.items():
        if kind is float and isinstance(values.get(key), int):
            values[key] = float(values[key])
        if key not in values or not isinstance(values[key], kind):
            raise WhisperdError(ErrorCode.BAD_REQUEST, f"helper message {name}: {key} is missing or ill-typed")
    if len(values) != len(checks):
        raise WhisperdError(ErrorCode.BAD_REQUEST, f"helper message {name} has unknown fields")
    message: HelperMessage = _TYPES[name](**values)
    return message
