"""Mutated frames against the parser, the connection and the ear for helpers; `python -m torture fuzz` has millions."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torture.fuzz import fuzz_parser, fuzz_socket
from torture.mutating import mutated_frame
from torture.targets import HELPER_MESSAGES, feed_connection, feed_helper_link

seeds = st.integers(0, 2**32)


@settings(deadline=None, max_examples=200)
@given(seeds, st.integers(1, 4))
def test_mutated_requests_break_their_own_connection_at_most(seed: int, count: int) -> None:
    random = Random(seed)
    feed_connection(b"".join(mutated_frame(random) for _ in range(count)), random)


@settings(deadline=None, max_examples=100)
@given(seeds)
def test_mutated_helper_messages_are_read_or_refused(seed: int) -> None:
    feed_helper_link(mutated_frame(Random(seed), HELPER_MESSAGES))


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=400), seeds)
def test_any_bytes(data: bytes, seed: int) -> None:
    feed_connection(data, Random(seed))
    feed_helper_link(data)


def test_the_target_sees_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parser that lets an exception of its own through would be found."""

    def broken(*_: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr("whisperd.daemon.wire.connection.parse_request", broken)
    assert fuzz_parser(1, 50).violations


def test_ten_thousand_frames_and_a_live_socket() -> None:
    assert fuzz_parser(2, 10_000).violations == []
    report = fuzz_socket(2, 1000)
    # How fast is measured where nothing else runs.
    assert [broken for broken in report.violations if "p99" not in broken] == []
