"""Jobs: the moves are the contract's and no others, and a Job looks on the wire as it should."""

from __future__ import annotations

import itertools

import pytest

from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.frames import encode_body, parse_body
from whisperd.protocol.jobs import ENDED, TRANSITIONS, WAITING, IllegalMove, Job, JobState, Priority, check_move

# The contract's sentences, one after the other.
MOVES = {
    "pending fetching",
    "fetching queued",
    "queued running",
    "running done",
    "fetching pending",
    "running queued",
    "pending queued",
    "pending done",
    "queued done",
} | {f"{old} {new}" for old in ("pending", "fetching", "queued", "running") for new in ("failed", "cancelled")}


def test_exactly_the_moves_of_the_contract() -> None:
    assert {f"{old} {new}" for old, moves in TRANSITIONS.items() for new in moves} == MOVES


def test_any_other_move_raises() -> None:
    for old, new in itertools.product(JobState, JobState):
        if f"{old} {new}" in MOVES:
            check_move(old, new)
        else:
            with pytest.raises(IllegalMove):
                check_move(old, new)


def test_every_state_is_waiting_running_or_an_end() -> None:
    assert WAITING | ENDED | {JobState.RUNNING} == set(JobState)
    assert not WAITING & ENDED
    assert all(state.ended == (not TRANSITIONS[state]) for state in JobState)


JOB = Job(
    id=2**53 - 1,
    state=JobState.FAILED,
    priority=Priority.INTERACTIVE,
    uid=1000,
    source={"kind": "fd", "name": "talk.m4a"},
    options={"language": "de"},
    submitted_at=1.5,
    started_at=2.5,
    ended_at=3.5,
    position=None,
    phase="transcribing",
    progress=0.5,
    eta_s=None,
    audio_s=17.25,
    attempts=2,
    retried=True,
    error={"code": "bad_audio", "message": "no audio track"},
)


def test_a_job_on_the_wire() -> None:
    wire = parse_body(encode_body(JOB.to_wire()))
    assert wire == {
        "id": 2**53 - 1,
        "state": "failed",
        "priority": "interactive",
        "uid": 1000,
        "source": {"kind": "fd", "name": "talk.m4a"},
        "options": {"language": "de"},
        "submitted_at": 1.5,
        "started_at": 2.5,
        "ended_at": 3.5,
        "position": None,
        "phase": "transcribing",
        "progress": 0.5,
        "eta_s": None,
        "audio_s": 17.25,
        "attempts": 2,
        "retried": True,
        "error": {"code": "bad_audio", "message": "no audio track"},
    }
    assert Job.from_wire(wire | {"of a newer daemon": 1}) == JOB


def test_the_codes_are_the_contracts() -> None:
    codes = """
        bad_frame bad_request unknown_op too_large no_descriptor key_conflict queue_full quota_exceeded not_found
        forbidden bad_audio too_long fetch_failed fetch_unavailable fetch_private fetch_age_restricted
        fetch_rate_limited fetch_blocked model_unavailable out_of_memory worker_crashed timed_out cancelled
        storage_full unavailable stopping internal
    """
    assert [str(code) for code in ErrorCode] == codes.split()


def test_an_error_is_plain_strings_on_the_wire() -> None:
    error = WhisperdError(ErrorCode.BAD_AUDIO, "nothing decodes")
    assert encode_body(error.to_wire()) == encode_body({"code": "bad_audio", "message": "nothing decodes"})
    assert str(error) == "nothing decodes"
