"""Requests, replies and events: one frozen dataclass an operation, validated here once and never again."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.fields import Fields, bad_request
from whisperd.protocol.frames import MAX_REQUEST_BYTES
from whisperd.protocol.jobs import JobState, Priority
from whisperd.protocol.options import parse_options

MAX_KEY_BYTES = 128
MAX_NAME_BYTES = 255
MAX_URL_BYTES = 2048
MAX_CHUNK_BYTES = 61_440
MAX_UNANSWERED_CHUNKS = 16
MAX_JOBS_LIMIT = 200
VIDEO_ID = re.compile(r"[0-9A-Za-z_-]{11}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSource:
    """A descriptor that came with the request."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadSource:
    """Bytes that will come as `chunk` requests."""

    name: str
    size_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSource:
    """A YouTube video by its 11-character id."""

    video_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UrlSource:
    """An address that an allowed extractor understands."""

    url: str


Source = FileSource | UploadSource | VideoSource | UrlSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    inspect: bool  # wait for what helpers know of their libraries, and start one where none is there yet


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    source: Source
    options: Mapping[str, Any]
    priority: Priority
    key: str | None
    attached: bool
    fresh: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    upload: int
    data: bytes
    last: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    job: int
    wait_s: float | None  # 0 = answer now, None = when it ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Jobs:
    state: JobState | None
    limit: int
    before: int | None
    all: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    job: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    job: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Forget:
    job: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscribe:
    job: int | None
    after_seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    action: str  # load | unload


@dataclass(frozen=True, slots=True, kw_only=True)
class Pull:
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    free_gpu: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    pass


Params = (
    Hello
    | Health
    | Stats
    | Submit
    | Chunk
    | Result
    | Jobs
    | Cancel
    | Retry
    | Forget
    | Subscribe
    | Model
    | Pull
    | Pause
    | Resume
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request; `params` is the dataclass of its operation."""

    id: int
    op: str
    params: Params


def request_id(message: Mapping[str, Any]) -> int:
    """Return the id to answer under: the request's own, or 0 when it carries none that is usable."""
    value = message.get("id")
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**64 else 0


def parse_request(message: Mapping[str, Any]) -> Request:
    """Return the request that a frame's map holds.

    Raises `bad_request` (naming the field) or `unknown_op`; the connection stays usable, answer under `request_id`.
    """
    fields = Fields(message, "request")
    number = fields.integer("id", high=2**64 - 1)
    op = fields.text("op", max_bytes=MAX_REQUEST_BYTES)  # a name that is too long is no name that is known
    params = fields.value("params", {})
    fields.done()
    parse = _PARSERS.get(op)
    if parse is None:
        raise WhisperdError(ErrorCode.UNKNOWN_OP, f"unknown operation {op[:64]!r}; known: {', '.join(_PARSERS)}")
    own = Fields({} if params is None else params, op)
    parsed = parse(own)
    own.done()
    return Request(id=number, op=op, params=parsed)


def parse_source(value: Any) -> Source:
    """Return the source of a submit. Raises `bad_request`."""
    fields = Fields(value, "source")
    kind = fields.text("kind", max_bytes=64)
    source: Source
    if kind == "fd":
        source = FileSource(name=_name(fields))
    elif kind == "upload":
        source = UploadSource(name=_name(fields), size_bytes=fields.integer("size_bytes", None))
    elif kind == "video":
        video_id = fields.text("id", max_bytes=64)
        if not VIDEO_ID.fullmatch(video_id):
            raise fields.wrong("id", video_id, "a YouTube id of 11 characters (letters, digits, - and _)")
        source = VideoSource(video_id=video_id)
    elif kind == "url":
        url = fields.text("url", max_bytes=MAX_URL_BYTES)
        # A scheme may be written in any case (RFC 3986, section 3.1); the same address is to be the same work.
        scheme, colon, rest = url.partition(":")
        normal = scheme.lower() + colon + rest
        if not re.match(r"https?://[^\s/]", normal):
            raise fields.wrong("url", url, "an http or https address")
        source = UrlSource(url=normal)
    else:
        raise fields.wrong("kind", kind, "'fd', 'upload', 'video' or 'url'")
    fields.done()
    return source


def source_to_wire(source: Source) -> dict[str, Any]:
    """Return the map that a Job shows as its `source`."""
    match source:
        case FileSource():
            return {"kind": "fd", "name": source.name}
        case UploadSource():
            return {"kind": "upload", "name": source.name, "size_bytes": source.size_bytes}
        case VideoSource():
            return {"kind": "video", "id": source.video_id}
        case UrlSource():
            return {"kind": "url", "url": source.url}


def _name(fields: Fields) -> str:
    name = fields.text("name", "", max_bytes=MAX_NAME_BYTES)
    if "\0" in name:
        raise bad_request("source: name must not hold a NUL")
    return name


def _parse_submit(fields: Fields) -> Submit:
    key = fields.text("key", None, max_bytes=MAX_KEY_BYTES)
    if key == "":
        raise bad_request("submit: key must not be empty")
    return Submit(
        source=parse_source(fields.value("source")),
        options=parse_options(_map_or_empty(fields.value("options", None))),
        priority=fields.choice("priority", Priority, Priority.BACKGROUND),
        key=key,
        attached=fields.boolean("attached", False),
        fresh=fields.boolean("fresh", False),
    )


def _map_or_empty(value: Any) -> Any:
    return {} if value is None else value


def _parse_chunk(fields: Fields) -> Chunk:
    upload, data, last = fields.integer("upload", high=2**64 - 1), fields.value("data"), fields.boolean("last", False)
    if not isinstance(data, bytes) or len(data) > MAX_CHUNK_BYTES:
        raise bad_request(f"chunk: data must be at most {MAX_CHUNK_BYTES} bytes of binary")
    return Chunk(upload=upload, data=data, last=last)


def _parse_result(fields: Fields) -> Result:
    wait_s = fields.value("wait_s", 0)
    if wait_s is not None:
        wait_s = Fields({"wait_s": wait_s}, "result").number("wait_s", low=0, high=1e9)
    return Result(job=_job(fields), wait_s=wait_s)


def _parse_jobs(fields: Fields) -> Jobs:
    state = fields.value("state", None)
    return Jobs(
        state=None if state is None else Fields({"state": state}, "jobs").choice("state", JobState),
        limit=fields.integer("limit", 50, low=1, high=MAX_JOBS_LIMIT),
        before=fields.integer("before", None, low=1),
        all=fields.boolean("all", False),
    )


def _parse_subscribe(fields: Fields) -> Subscribe:
    return Subscribe(job=fields.integer("job", None, low=1), after_seq=fields.integer("after_seq", 0))


def _parse_model(fields: Fields) -> Model:
    action = fields.text("action", max_bytes=64)
    if action not in ("load", "unload"):
        raise fields.wrong("action", action, "'load' or 'unload'")
    return Model(action=action)


def _job(fields: Fields) -> int:
    return fields.integer("job", low=1)


_PARSERS: Mapping[str, Callable[[Fields], Params]] = {
    "hello": lambda fields: Hello(),
    "health": lambda fields: Health(),
    "stats": lambda fields: Stats(inspect=fields.boolean("inspect", False)),
    "submit": _parse_submit,
    "chunk": _parse_chunk,
    "result": _parse_result,
    "jobs": _parse_jobs,
    "cancel": lambda fields: Cancel(job=_job(fields)),
    "retry": lambda fields: Retry(job=_job(fields)),
    "forget": lambda fields: Forget(job=_job(fields)),
    "subscribe": _parse_subscribe,
    "model": _parse_model,
    "pull": lambda fields: Pull(model=fields.text("model", max_bytes=MAX_NAME_BYTES)),
    "pause": lambda fields: Pause(free_gpu=fields.boolean("free_gpu", False)),
    "resume": lambda fields: Resume(),
}


def ok_reply(number: int, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a reply map that carries a result."""
    return {"id": number, "ok": True, "result": result}


def error_reply(number: int, error: WhisperdError) -> dict[str, Any]:
    """Return a reply map that carries an error."""
    return {"id": number, "ok": False, "error": error.to_wire()}
