"""Transcripts as maps: the fields by their names, optional ones only where they say something."""

from __future__ import annotations

from dataclasses import asdict, replace

from whisperd.model.transcript import Segment, Word

SEGMENT = Segment(
    id=3,
    start=1.5,
    end=4.0,
    text=" So it is.",
    tokens=[407, 309, 307, 13],
    temperature=0.2,
    avg_logprob=-0.25,
    compression_ratio=1.5,
    no_speech_prob=0.01,
    words=None,
)


def test_a_segment_carries_all_of_its_fields() -> None:
    said = asdict(SEGMENT)
    del said["words"], said["speech"]
    assert SEGMENT.to_wire() == said
    words = [Word(word=" So", start=1.5, end=1.75, probability=0.5), Word(word=" it", start=1.75, end=2, probability=1)]
    full = replace(SEGMENT, words=words, speech=False)
    assert full.to_wire() == asdict(full)
    assert list(full.to_wire()) == list(asdict(full))
    assert replace(SEGMENT, words=[]).to_wire()["words"] == []
