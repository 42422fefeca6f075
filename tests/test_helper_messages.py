"""What daemon and helpers say to each other travels whole, also through a real socketpair with descriptors."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

from whisperd.protocol.channel import Channel
from whisperd.protocol.errors import WhisperdError
from whisperd.protocol.frames import MAX_REPLY_BYTES, encode_body, parse_body
from whisperd.protocol.helper_messages import (
    Cancel,
    Configure,
    Copied,
    CopyIn,
    Decode,
    Decoded,
    Failed,
    Fetch,
    Fetched,
    FetchFailed,
    FetchWeights,
    Finished,
    Heartbeat,
    HelperHello,
    HelperMessage,
    JournalEntry,
    JournalVoid,
    ModelStatus,
    NoRoom,
    Prioritise,
    Progress,
    SampleTried,
    Segments,
    Transcribe,
    TrySample,
    UploadBegin,
    UploadData,
    WeightsFetched,
    from_wire,
    to_wire,
)

MESSAGES: list[HelperMessage] = [
    HelperHello(role="copier", version="0.1.0", pid=42),
    Configure(settings={"spool": "/tmp/spool", "max_audio_s": 3600.0}),
    UploadBegin(run=1, generation=1, folder="f"),
    UploadData(run=1, generation=1, data=b"\x00bytes", last=True),
    CopyIn(run=1, generation=1, folder="ab12"),
    Copied(run=1, generation=1, sha256="0" * 64, size_bytes=5),
    Decode(run=1, generation=2, folder="ab12"),
    Decoded(run=1, generation=2, audio_s=12.5, truncated=True),
    NoRoom(run=1, generation=2, needed_bytes=1_152_000_000),
    Fetch(run=1, generation=1, folder="ab12", source={"kind": "video", "id": "-bcdefghijk"}, uid=1000),
    Fetched(run=1, generation=1, sha256="0" * 64, size_bytes=5, title="A talk"),
    FetchWeights(run=1, generation=2, file_name="small.pt", sha256="9e" * 32),
    WeightsFetched(run=1, generation=2, path="/cache/models/small.pt"),
    FetchFailed(run=1, generation=1, code="fetch_rate_limited", message="wait a minute", transient=True, wait_s=60.0),
    Transcribe(
        run=1,
        generation=3,
        folder="ab12",
        options={"language": None},
        interactive=True,
        truncated=False,
        journal=7,
        told=9,
    ),
    Prioritise(run=1, generation=3, interactive=False),
    TrySample(),
    SampleTried(error="out of memory"),
    JournalEntry(run=1, generation=3, entry=b"\x93"),
    JournalVoid(run=1, generation=3),
    Segments(run=1, generation=3, segments=[{"id": 0, "text": " Hello."}]),
    Progress(run=1, generation=3, done=1.5, total=12.5),
    Finished(run=1, generation=3, transcript=b"\x80"),
    Failed(run=1, generation=3, code="cancelled", message="cancelled"),
    Cancel(run=1, generation=3),
    ModelStatus(
        state="ready",
        name="demo",
        device="cpu",
        dtype="float32",
        error=None,
        capacity=2,
        traits={"multilingual": False},
        fingerprint="ab",
    ),
    Heartbeat(beat=3, gauges={"rss_bytes": 5}),
]


def test_every_message_is_tried_here() -> None:
    assert {type(message) for message in MESSAGES} == set(HelperMessage.__args__)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_round_trip(message: HelperMessage) -> None:
    assert from_wire(parse_body(encode_body(to_wire(message)), trusted=True)) == message


def test_whole_numbers_do_for_seconds() -> None:
    progress = from_wire({"type": "Progress", "run": 1, "generation": 1, "done": 3, "total": 12})
    assert progress == Progress(run=1, generation=1, done=3.0, total=12.0)


@pytest.mark.parametrize(
    "wire",
    [
        {},
        {"type": None},
        {"type": []},
        {"type": "Explode"},
        {"type": "object"},
        {"type": "Cancel"},
        {"type": "Cancel", "run": 1},
        {"type": "Cancel", "run": "1", "generation": 1},
        {"type": "Cancel", "run": 1, "generation": 1, "why": "because"},
        {"type": "Segments", "run": 1, "generation": 1, "segments": {}},
        {"type": "Finished", "run": 1, "generation": 1, "transcript": "text"},
    ],
)
def test_what_is_no_message_is_refused(wire: dict[str, Any]) -> None:
    with pytest.raises(WhisperdError):
        from_wire(wire)


@pytest.fixture
def channels() -> Any:
    pair = [Channel(end, max_bytes=MAX_REPLY_BYTES, descriptors=True) for end in socket.socketpair()]
    yield pair
    for channel in pair:
        channel.close()


def test_through_a_socketpair(channels: list[Channel]) -> None:
    for message in MESSAGES:
        channels[0].send(to_wire(message))
    assert [from_wire(channels[1].receive(5)[0]) for _ in MESSAGES] == MESSAGES


def test_a_descriptor_arrives_with_its_message_and_closes_on_exec(channels: list[Channel]) -> None:
    source = os.memfd_create("source")
    try:
        os.write(source, b"audio")
        channels[0].send(to_wire(MESSAGES[0]))
        channels[0].send(to_wire(CopyIn(run=1, generation=1, folder="ab12")), [source])
        channels[0].send(to_wire(Cancel(run=1, generation=1)))
        assert channels[1].receive(5)[1] == []
        wire, (received,) = channels[1].receive(5)
        assert from_wire(wire) == CopyIn(run=1, generation=1, folder="ab12")
        assert os.pread(received, 10, 0) == b"audio"
        assert not os.get_inheritable(received)
        os.close(received)
        assert channels[1].receive(5)[1] == []
    finally:
        os.close(source)


def test_a_closed_peer_and_a_silent_one(channels: list[Channel]) -> None:
    with pytest.raises(TimeoutError):
        channels[1].receive(0.01)
    channels[0].close()
    with pytest.raises(EOFError):
        channels[1].receive(5)


def test_closing_closes_descriptors_that_nobody_took(channels: list[Channel]) -> None:
    left, right = channels
    read_end, write_end = os.pipe()
    left.send(to_wire(MESSAGES[0]))
    left.send(to_wire(MESSAGES[0]), [write_end])
    os.close(write_end)
    right.receive(5)
    right.close()
    left.close()
    assert os.read(read_end, 1) == b"", "the last writer is gone"
    os.close(read_end)
