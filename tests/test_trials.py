"""Who is tried alone after a death, for how long, and who is accused."""

from __future__ import annotations

from dataclasses import replace

from whisperd.daemon.lanes.trials import Trials
from whisperd.daemon.store.rows import RunRow
from whisperd.protocol.jobs import JobState

RUN = RunRow(
    id=1,
    uid=1,
    state=JobState.RUNNING,
    share_key=b"",
    folder="f",
    sha256="",
    size_bytes=1,
    options={},
    decoded=True,
    audio_s=1.0,
    truncated=False,
    starts=1,
    segments=0,
    deaths=0,
    source=None,
    source_key=None,
    fresh=False,
    fetch_failures=0,
    title=None,
    made_by=None,
    edition=1,
    suspicion=0,
    created_at=0.0,
    ended_at=None,
    audio_expires_at=None,
    retried=False,
)


def answers_needed(trials: Trials, run: RunRow) -> int:
    count = 1
    while not trials.answered(run):
        count += 1
    return count


def test_who_was_at_no_death_is_no_suspect() -> None:
    trials = Trials(4)
    assert not trials.is_suspect(RUN)
    assert not trials.answered(RUN)


def test_a_suspect_gets_through_and_must_get_further_after_each_death() -> None:
    trials = Trials(4)
    for suspicion, answers in ((1, 4), (2, 16), (3, 64)):
        run = replace(RUN, suspicion=suspicion)
        assert not trials.died([1, 2])
        assert trials.is_suspect(run)
        assert answers_needed(trials, run) == answers
        assert not trials.is_suspect(run)


def test_a_trial_that_was_cut_off_begins_anew() -> None:
    trials = Trials(4)
    run = replace(RUN, suspicion=1)
    for _ in range(3):
        trials.answered(run)
    trials.died([1])
    assert answers_needed(trials, run) == 4


def test_only_who_was_alone_is_accused() -> None:
    trials = Trials(4)
    for present, accused in (([1, 2], None), ([], None), ([7], 7), ([], 7), ([1, 7], None)):
        assert trials.died(present) == (accused is not None)
        assert trials.accused == accused
