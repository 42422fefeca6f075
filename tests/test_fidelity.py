"""The criterion of `make fidelity`: what it lets pass, what it does not, and that it sees a decoder that is off."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.batch import Engines
from bench.fidelity import Answer, compare, reduced_verdict, verdict
from bench.forced import Choices
from bench.recordings import RATE, Spoken

THRESHOLDS = (-1.0, 0.6)
SAID = Answer(
    tokens=[5, 6, 7],
    temperature=0.0,
    avg_logprob=-0.3,
    no_speech_prob=0.1,
    margins=[2.0, 9e-4, 0.5, 3.0],  # that of the end too
)
OURS = replace(SAID, margins=())
WARM = replace(OURS, temperature=0.2)


def judge(*pairs: tuple[list[Answer], list[Answer]], gap_changes: tuple[float, ...] = ()) -> tuple[bool, str]:
    return verdict([compare(theirs, ours, thresholds=THRESHOLDS) for theirs, ours in pairs], gap_changes)


def other(tokens: list[int]) -> Answer:
    return replace(OURS, tokens=tokens)


@pytest.mark.parametrize(
    ("theirs", "ours", "met"),
    [
        ([SAID, SAID], [OURS, OURS], True),
        ([SAID, SAID], [OURS, other([5, 9, 7])], True),  # won by 9e-4
        ([SAID, SAID], [OURS, other([5])], True),  # the end instead of it
        ([SAID, SAID], [OURS, other([5, 6, 9])], False),
        ([SAID, SAID], [OURS, other([5, 6])], False),
        ([SAID, SAID], [OURS, other([5, 6, 7, 8])], False),  # beyond the end, which was won by 3
        ([replace(SAID, margins=())] * 2, [OURS, other([5, 9, 7])], False),  # nothing is known of it
        ([SAID, SAID], [other([5, 9, 7]), other([1, 2, 3])], True),  # what follows was asked otherwise
        ([SAID, SAID], [OURS], False),
        ([SAID], [OURS, OURS], False),
        ([SAID, SAID], [OURS, WARM], False),
        ([SAID, WARM], [OURS, replace(WARM, tokens=[1])], True),  # drawn
        ([WARM], [WARM], False),  # nothing was compared
        ([SAID], [replace(OURS, avg_logprob=-0.3002)], False),
        ([SAID], [replace(OURS, no_speech_prob=0.1002)], False),
        ([SAID], [replace(OURS, no_speech_prob=0.10005)], True),
        ([SAID], [replace(OURS, avg_logprob=math.nan)], False),
    ],
)
def test_what_counts_as_the_same(theirs: list[Answer], ours: list[Answer], met: bool) -> None:
    assert judge((theirs, ours))[0] is met


@pytest.mark.parametrize(
    "scores", [{"avg_logprob": -1.00005}, {"no_speech_prob": 0.59995}], ids=["log probability", "silence"]
)
def test_a_threshold_that_was_near_may_turn_what_is_asked_next(scores: dict[str, float]) -> None:
    near = replace(SAID, **scores)
    for ours in ([OURS, WARM], [OURS], [OURS, other([1, 2, 3])]):
        ours[0] = replace(near, margins=())
        assert judge(([near, SAID], ours))[0], "the same score on the other side of it"


def test_a_difference_tells_how_near_it_was() -> None:
    found = compare([SAID], [other([5, 9, 7])], thresholds=THRESHOLDS)
    assert found.difference == "window 1, token 1: [6, 7], won by 9.0e-04, and [9, 7]"


def test_near_ties_are_counted() -> None:
    equal, parted = ([SAID] * 100, [OURS] * 100), ([SAID], [other([5, 9, 7])])
    assert judge(parted)[0], "one alone is no rate"
    assert not judge(equal, parted, parted)[0]
    assert not judge(*[equal] * 19, parted, parted)[0]
    met, line = judge(*[equal] * 20, parted, parted)
    assert met
    assert "2002 windows compared; 2 recordings part at a near-tie of openai-whisper's own (allowed: 2), 0" in line


@pytest.mark.parametrize(("change", "met"), [(9e-4, True), (1.1e-3, False), (math.nan, False)])
def test_choices_that_are_moved_miss_it_however_equal_the_words_are(change: float, met: bool) -> None:
    assert judge(([SAID], [OURS]), gap_changes=(0.0, change, 1e-5))[0] is met


def test_a_decoder_that_is_a_little_off_is_seen(
    tmp_path: Path, micro: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the micro model: its words stay what they are, its choices are moved by a little more than they may."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(4)
    pcm = (torch.randn(4 * RATE, generator=generator) * 3000).short().numpy().tobytes()
    engines = Engines(str(micro), tmp_path, [Spoken(pcm=pcm, text="")])
    options = {"temperature": 0.0, "no_speech_threshold": None}
    choices = Choices()
    assert engines.compare(options, choices)
    out = capsys.readouterr().out
    assert "0 of 1 recordings differ" in out
    assert "fidelity met: 1 windows compared; 0 recordings part" in out
    assert min(len(window.choices) for window in choices.windows) > 10
    decoder = engines.runs.engine.decoder
    logits, moved = decoder._logits, 1.2e-3 * (torch.arange(decoder.vocabulary) % 2)
    monkeypatch.setattr(decoder, "_logits", lambda x: logits(x) + moved)
    assert not engines.compare(options, Choices())
    out = capsys.readouterr().out
    assert "0 of 1 recordings differ" in out
    assert "fidelity MISSED: 1 windows compared; 0 recordings part at a near-tie of openai-whisper's own (" in out


@pytest.mark.parametrize(
    ("errors", "ours", "met", "windows"),
    [
        ((5.4, 5.55), [OURS, OURS], True, "2 of 2 windows (100%)"),
        ((5.4, 5.55), [other([1]), OURS], True, "1 of 2 windows (50%)"),
        ((5.4, 5.55), [OURS, other([1]), OURS], True, "2 of 2"),  # one between them
        ((5.4, 5.55), [other([1]), replace(WARM, tokens=[5, 6, 7]), OURS], True, "2 of 2"),  # what it was left with
        ((5.4, 5.55), [OURS, WARM, OURS], True, "2 of 2"),
        ((5.4, 5.55), [replace(OURS, tokens=[8]), replace(WARM, tokens=[9])], True, "0 of 2"),
        ((5.4, 5.61), [OURS, OURS], False, "2 of 2"),
        ((5.4, 5.19), [OURS, OURS], False, "2 of 2"),  # other words all the same
        ((5.4, math.nan), [OURS, OURS], False, "2 of 2"),
    ],
)
def test_in_fewer_bits_the_word_error_rate_decides(
    errors: tuple[float, float], ours: list[Answer], met: bool, windows: str
) -> None:
    found, line = reduced_verdict([[SAID, SAID]], [ours], errors=errors, words=100)
    assert found is met
    assert windows in line


def test_fewer_bits_are_not_judged_by_float32s_criterion(
    tmp_path: Path, micro: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a processor without them too. The micro model's words are far apart; its gaps move by more than 1e-3."""
    torch.set_num_threads(1)
    pcm = (torch.randn(4 * RATE, generator=torch.Generator().manual_seed(4)) * 3000).short().numpy().tobytes()
    engines = Engines(str(micro), tmp_path, [Spoken(pcm=pcm, text="")], device="cpu", dtype="bfloat16")
    reference = engines.reference({"temperature": 0.0, "no_speech_threshold": None}, Choices())
    met, line = engines.judge(reference)
    assert met
    assert "1 of 1 windows (100%) have the same tokens" in line
    out = capsys.readouterr().out
    assert "our gaps differ by at most" in out
    assert "above 1e-3: 0)" not in out
    assert "fidelity" not in out
    decoder = engines.runs.engine.decoder
    logits = decoder._logits
    monkeypatch.setattr(decoder, "_logits", lambda x: -logits(x))
    reference.choices.gaps = False
    met, line = engines.judge(reference)
    assert not met
    assert "0 of 1 windows (0%) have the same tokens" in line
