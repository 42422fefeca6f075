"""Requests: every operation, every refusal by name; replies and jobs as the contract draws them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_frames import leaves, maps
from whisperd.protocol import messages
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.frames import MAX_REQUEST_BYTES, encode_frame
from whisperd.protocol.jobs import JobState, Priority
from whisperd.protocol.messages import parse_request, parse_source, request_id, source_to_wire
from whisperd.protocol.options import DEFAULTS, OWN_DEFAULTS

FILE = {"kind": "fd", "name": "talk.m4a"}


def parse(op: str, **params: Any) -> Any:
    return parse_request({"id": 7, "op": op, "params": params}).params


def refusal(message: dict[str, Any]) -> WhisperdError:
    with pytest.raises(WhisperdError) as caught:
        parse_request(message)
    return caught.value


ACCEPTED = [
    ("hello", {}, messages.Hello()),
    ("health", {}, messages.Health()),
    ("stats", {}, messages.Stats(inspect=False)),
    ("stats", {"inspect": True}, messages.Stats(inspect=True)),
    ("result", {"job": 1}, messages.Result(job=1, wait_s=0)),
    ("result", {"job": 2**53 - 1, "wait_s": None}, messages.Result(job=2**53 - 1, wait_s=None)),
    ("result", {"job": 1, "wait_s": 2}, messages.Result(job=1, wait_s=2.0)),
    ("jobs", {}, messages.Jobs(state=None, limit=50, before=None, all=False)),
    (
        "jobs",
        {"state": "done", "limit": 200, "before": 9, "all": True},
        messages.Jobs(state=JobState.DONE, limit=200, before=9, all=True),
    ),
    (
        "jobs",
        {"state": None, "limit": None, "before": None},
        messages.Jobs(state=None, limit=50, before=None, all=False),
    ),
    ("cancel", {"job": 3}, messages.Cancel(job=3)),
    ("retry", {"job": 3}, messages.Retry(job=3)),
    ("forget", {"job": 3}, messages.Forget(job=3)),
    ("subscribe", {}, messages.Subscribe(job=None, after_seq=0)),
    ("subscribe", {"job": 3, "after_seq": 12}, messages.Subscribe(job=3, after_seq=12)),
    ("model", {"action": "load"}, messages.Model(action="load")),
    ("model", {"action": "unload"}, messages.Model(action="unload")),
    ("pause", {}, messages.Pause(free_gpu=False)),
    ("pause", {"free_gpu": True}, messages.Pause(free_gpu=True)),
    ("resume", {}, messages.Resume()),
    ("chunk", {"upload": 7, "data": b"x" * 61_440}, messages.Chunk(upload=7, data=b"x" * 61_440, last=False)),
    ("chunk", {"upload": 7, "data": b"", "last": True}, messages.Chunk(upload=7, data=b"", last=True)),
]


@pytest.mark.parametrize(("op", "params", "wanted"), ACCEPTED)
def test_accepted(op: str, params: dict[str, Any], wanted: messages.Params) -> None:
    request = parse_request({"id": 2**64 - 1, "op": op, "params": params})
    assert (request.id, request.op, request.params) == (2**64 - 1, op, wanted)


def test_every_operation_of_the_contract_is_known() -> None:
    known = refusal({"id": 1, "op": "nonsense"}).message
    for op in "hello health stats submit chunk result jobs cancel retry forget subscribe model pause resume".split():
        assert op in known


def test_params_may_be_left_out() -> None:
    assert parse_request({"id": 1, "op": "health"}).params == messages.Health()
    assert parse_request({"id": 1, "op": "health", "params": None}).params == messages.Health()


def test_a_submit_and_its_defaults() -> None:
    assert parse("submit", source=FILE) == messages.Submit(
        source=messages.FileSource(name="talk.m4a"),
        options=DEFAULTS | OWN_DEFAULTS,
        priority=Priority.BACKGROUND,
        key=None,
        attached=False,
        fresh=False,
    )
    full = parse(
        "submit",
        source=FILE,
        options={"language": "German"},
        priority="interactive",
        key="k" * 128,
        attached=True,
        fresh=True,
    )
    assert full == messages.Submit(
        source=messages.FileSource(name="talk.m4a"),
        options=DEFAULTS | OWN_DEFAULTS | {"language": "de"},
        priority=Priority.INTERACTIVE,
        key="k" * 128,
        attached=True,
        fresh=True,
    )


# What is sent, and what the refusal must name.
REFUSED = [
    ("submit", {}, "source"),
    ("submit", {"source": FILE, "colour": "red"}, "colour"),
    ("submit", {"source": "talk.m4a"}, "source"),
    ("submit", {"source": {"kind": "fd", "path": "/etc/passwd"}}, "path"),
    ("submit", {"source": {"kind": "path", "name": "x"}}, "kind"),
    ("submit", {"source": {"name": "x"}}, "kind"),
    ("submit", {"source": {"kind": "fd", "name": "a\0b"}}, "name"),
    ("submit", {"source": {"kind": "fd", "name": "n" * 256}}, "name"),
    ("submit", {"source": {"kind": "upload", "name": "x", "size_bytes": -1}}, "size_bytes"),
    ("submit", {"source": {"kind": "upload", "name": "x", "size_bytes": 1.5}}, "size_bytes"),
    ("submit", {"source": {"kind": "video", "id": "too-short"}}, "id"),
    ("submit", {"source": {"kind": "video", "id": "dQw4w9WgXcQ\n"}}, "id"),
    ("submit", {"source": {"kind": "video", "id": "dQw4w9WgXcé"}}, "id"),
    ("submit", {"source": {"kind": "url", "url": "file:///etc/passwd"}}, "url"),
    ("submit", {"source": {"kind": "url", "url": "https://"}}, "url"),
    ("submit", {"source": {"kind": "url", "url": "FTP://example.org/talk"}}, "url"),
    ("submit", {"source": {"kind": "url", "url": "http\u017f://example.org/talk"}}, "url"),  # \u017f: a long s
    ("submit", {"source": {"kind": "url", "url": "https://x/" + "a" * 2048}}, "url"),
    ("submit", {"source": FILE, "priority": "urgent"}, "priority"),
    ("submit", {"source": FILE, "priority": 1}, "priority"),
    ("submit", {"source": FILE, "key": "k" * 129}, "key"),
    ("submit", {"source": FILE, "key": "é" * 65}, "key"),
    ("submit", {"source": FILE, "key": ""}, "key"),
    ("submit", {"source": FILE, "key": 5}, "key"),
    ("submit", {"source": FILE, "attached": 1}, "attached"),
    ("submit", {"source": FILE, "fresh": "yes"}, "fresh"),
    ("submit", {"source": FILE, "options": []}, "options"),
    ("submit", {"source": FILE, "options": {"beams": 5}}, "beams"),
    ("result", {}, "job"),
    ("result", {"job": "1"}, "job"),
    ("result", {"job": 0}, "job"),
    ("result", {"job": -1}, "job"),
    ("result", {"job": 2**53}, "job"),
    ("result", {"job": True}, "job"),
    ("result", {"job": 1.0}, "job"),
    ("result", {"job": 1, "wait_s": -1}, "wait_s"),
    ("result", {"job": 1, "wait_s": "long"}, "wait_s"),
    ("jobs", {"limit": 0}, "limit"),
    ("jobs", {"limit": 201}, "limit"),
    ("jobs", {"state": "lost"}, "state"),
    ("jobs", {"before": 0}, "before"),
    ("jobs", {"all": 1}, "all"),
    ("cancel", {"job": None}, "job"),
    ("forget", {}, "job"),
    ("retry", {"job": 1, "now": True}, "now"),
    ("subscribe", {"job": 0}, "job"),
    ("subscribe", {"after_seq": -1}, "after_seq"),
    ("model", {}, "action"),
    ("model", {"action": "explode"}, "action"),
    ("pause", {"free_gpu": None}, "free_gpu"),
    ("resume", {"now": True}, "now"),
    ("health", {"verbose": True}, "verbose"),
    ("chunk", {"upload": 7, "data": b"x" * 61_441}, "data"),
    ("chunk", {"upload": 7, "data": "text"}, "data"),
    ("chunk", {"upload": -7, "data": b""}, "upload"),
]


@pytest.mark.parametrize(("op", "params", "named"), REFUSED)
def test_refused_by_name(op: str, params: dict[str, Any], named: str) -> None:
    error = refusal({"id": 7, "op": op, "params": params})
    assert error.code == ErrorCode.BAD_REQUEST
    assert named in error.message
    assert len(error.message) < 500, "what a client sent must not come back at length"


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({}, "id"),
        ({"op": "health"}, "id"),
        ({"id": -1, "op": "health"}, "id"),
        ({"id": "1", "op": "health"}, "id"),
        ({"id": 1}, "op"),
        ({"id": 1, "op": 5}, "op"),
        ({"id": 1, "op": "health", "params": []}, "health"),
        ({"id": 1, "op": "health", "parms": {}}, "parms"),
    ],
)
def test_a_request_that_is_none(message: dict[str, Any], named: str) -> None:
    error = refusal(message)
    assert error.code == ErrorCode.BAD_REQUEST
    assert named in error.message


def test_unknown_operation() -> None:
    assert refusal({"id": 1, "op": "HEALTH"}).code == ErrorCode.UNKNOWN_OP
    assert refusal({"id": 1, "op": "__init__"}).code == ErrorCode.UNKNOWN_OP
    endless = refusal({"id": 1, "op": "health" * 10_000})
    assert endless.code == ErrorCode.UNKNOWN_OP
    assert len(endless.message) < 500, "what a client sent must not come back at length"


@pytest.mark.parametrize(
    ("message", "number"),
    [({"id": 5}, 5), ({"id": 2**64 - 1}, 2**64 - 1), ({"id": -5}, 0), ({"id": True}, 0), ({"id": "5"}, 0), ({}, 0)],
)
def test_the_id_to_answer_under(message: dict[str, Any], number: int) -> None:
    assert request_id(message) == number


operations = st.sampled_from([op for op, _, _ in ACCEPTED] + ["submit", "x"])
names = st.sampled_from(["job", "source", "options", "wait_s", "limit", "data", "key", "kind", "id", "state", "action"])


@given(maps | st.fixed_dictionaries({"id": leaves, "op": operations, "params": st.dictionaries(names, leaves | maps)}))
def test_whatever_comes_only_these_errors_go_out(message: dict[str, Any]) -> None:
    try:
        parse_request(message)
    except WhisperdError as error:
        assert error.code in (ErrorCode.BAD_REQUEST, ErrorCode.UNKNOWN_OP)
        encode_frame(messages.error_reply(request_id(message), error))


@pytest.mark.parametrize(
    "source",
    [
        FILE,
        {"kind": "upload", "name": "talk.m4a", "size_bytes": None},
        {"kind": "upload", "name": "talk.m4a", "size_bytes": 5},
        {"kind": "video", "id": "-Qw4w9WgXcQ"},
        {"kind": "url", "url": "https://example.org/talk?part=1"},
    ],
)
def test_a_job_shows_the_source_as_it_was_sent(source: dict[str, Any]) -> None:
    assert source_to_wire(parse_source(source)) == source


@pytest.mark.parametrize("scheme", ["https", "HTTPS", "Https", "HTTP"])
def test_the_scheme_of_an_address_may_be_in_any_case(scheme: str) -> None:
    source = parse_source({"kind": "url", "url": f"{scheme}://Example.org/Talk"})
    assert source == messages.UrlSource(url=f"{scheme.lower()}://Example.org/Talk")


def test_the_largest_chunk_fits_a_request() -> None:
    request = {"id": 2**64 - 1, "op": "chunk", "params": {"upload": 2**64 - 1, "data": bytes(61_440), "last": False}}
    assert len(encode_frame(request)) <= 4 + MAX_REQUEST_BYTES


def test_replies() -> None:
    assert messages.ok_reply(3, {"a": 1}) == {"id": 3, "ok": True, "result": {"a": 1}}
    error = WhisperdError(ErrorCode.NOT_FOUND, "no such job")
    assert messages.error_reply(3, error) == {
        "id": 3,
        "ok": False,
        "error": {"code": "not_found", "message": "no such job"},
    }
    assert type(messages.error_reply(3, error)["error"]["code"]) is str
