"""A short `make torture`: the same blows, clients, files and oracle as in the long one, by fixed seeds."""

from __future__ import annotations

from torture.kills import Plan, torture
from torture.media import media


def test_a_short_torture_loses_nothing() -> None:
    report = torture(Plan(seed=4, minutes=0.25, kills=12, pause_s=0.4, clients=3, deep=6))
    assert report.violations == [], str(report)
    assert report.counts["kills in all"] > 0
    assert report.counts["submits acknowledged"] > 0
    assert report.counts["ends: done"] > 0


def test_hostile_media_stay_below_the_caps() -> None:
    report = media(seed=2, count=40, bomb_s=3600)
    assert report.violations == [], str(report)
    assert report.counts["ends: too_long"] > 0
    assert report.counts["ends: bad_audio"] > 0
