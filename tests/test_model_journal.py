"""A run that is resumed from its journal says the same to the last bit, and asks the model for nothing twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from whisper.decoding import DecodingOptions, DecodingTask

from tests import models
from tests.model_bench import Bench, check_same, open_bench, speak_into, write_folders
from tests.support import requires_program
from whisperd.model.batch.windows import KeptWindows
from whisperd.model.fast import Unheard
from whisperd.model.journal import Journal, VoidJournal, fingerprint, read_journal
from whisperd.model.mel import FileMel, MelWindow
from whisperd.model.proxy import ProxyModel
from whisperd.model.worker import Turn, Worker
from whisperd.protocol.helper_messages import MAX_JOURNAL_ENTRY_BYTES, HelperMessage, JournalEntry, Segments

SENTENCE = "Every morning the old man walked down to the river and counted the boats that went by. "


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a spool with `noise`, 100 s (four windows)."""
    spool = tmp_path_factory.mktemp("spool")
    samples = 3000 * np.random.default_rng(3).standard_normal(100 * 16_000)
    write_folders(spool, noise=samples.astype("<i2").tobytes())
    return spool


@pytest.fixture(scope="module")
def micro(spool: Path) -> Bench:
    return open_bench(str(models.micro_checkpoint(spool)), spool)


@pytest.fixture(scope="module")
def tiny(spool: Path) -> Bench:
    speak_into(spool, SENTENCE * 8)
    return open_bench("demo", spool)


def entries(sent: list[HelperMessage]) -> list[bytes]:
    return [message.entry for message in sent if isinstance(message, JournalEntry)]


def segments(sent: list[HelperMessage]) -> list[dict[str, Any]]:
    return [segment for message in sent if isinstance(message, Segments) for segment in message.segments]


def lay_out(bench: Bench, folder: str, journal: list[bytes]) -> None:
    """Write a journal as the daemon does."""
    (bench.spool / folder / "journal").write_bytes(b"".join(map(msgpack.packb, journal)))


def check_resumed(bench: Bench, folder: str, **options: Any) -> list[bytes]:
    """Cut a run off after each answer of the model, and compare; return the whole journal."""
    counters = bench.engine.counters
    run, sent = bench.begin(folder, **options)
    before = counters.windows
    whole = run.transcribe().to_wire() | {"timing": None}
    windows = counters.windows - before
    own = {"segments": [], "timing": {}}  # compared by themselves, and not the same
    journal, told = entries(sent), segments(sent)
    assert max(map(len, journal)) < MAX_JOURNAL_ENTRY_BYTES / 3
    for kept in range(len(journal) + 1):
        lay_out(bench, folder, journal[:kept])
        # What was told goes with what was answered: of the segments after the last answer, none was told yet.
        place = sent.index(next(m for m in sent if isinstance(m, JournalEntry) and m.entry == journal[kept - 1]))
        said = len(segments(sent[: place if kept else 0]))
        run, again = bench.begin(folder, journal=kept, told=said, **options)
        before = counters.windows
        transcript = run.transcribe().to_wire()
        assert transcript | own == whole | own, kept
        check_same(transcript["segments"], whole["segments"])
        kept_windows = sum(b"compression_ratio" in entry for entry in journal[:kept])
        assert counters.windows - before == windows - kept_windows, kept
        if options.get("mode") == "fast":  # windows step together, and round by who is beside them
            assert len(entries(again)) == len(journal) - kept, kept
        else:
            assert entries(again) == journal[kept:], kept
        check_same(segments(again), told[said:])
    return journal


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({"condition_on_previous_text": False}, 5),  # the language, four windows
        ({"language": "en", "word_timestamps": True, "temperature": 0}, 8),
        ({"language": "en", "temperature": [0, 0.7], "compression_ratio_threshold": 0.01, "best_of": 2}, 8),
        ({"language": "en", "temperature": 1.0}, 4),
    ],
    ids=["language", "words", "fallback", "drawn"],
)
def test_a_run_goes_on_wherever_it_was_cut_off(micro: Bench, options: dict[str, Any], calls: int) -> None:
    assert len(check_resumed(micro, "noise", **options)) >= calls


@requires_program("flite")
@pytest.mark.parametrize(
    "options",
    [
        {"word_timestamps": True, "clip_timestamps": [0, 8, 20, 28]},
        {"mode": "fast", "temperature": [0.4], "clip_timestamps": [0, 5, 28, 33]},  # too far apart for one window
    ],
    ids=["exact", "fast"],
)
def test_real_speech_goes_on_too(tiny: Bench, options: dict[str, Any]) -> None:
    assert len(check_resumed(tiny, "speech", **options)) >= 2


def test_what_is_drawn_above_temperature_0_is_drawn_again(micro: Bench) -> None:
    results = []
    for _ in range(2):
        run, _ = micro.begin("noise", temperature=1.0, language="en")
        results.append([segment.tokens for segment in run.transcribe().segments])
    assert results[0] == results[1]
    assert len({str(tokens) for tokens in results[0]}) > 1


def test_a_resumed_run_reads_no_more_of_the_recording_than_it_needs(micro: Bench) -> None:
    run, sent = micro.begin("noise", language="en")
    run.transcribe()
    journal = entries(sent)
    lay_out(micro, "noise", journal)
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1

    run, _ = micro.begin("noise", language="en", journal=len(journal), told=1000)
    micro.on_step = count
    try:
        run.transcribe()
    finally:
        micro.on_step = lambda: None
    assert steps == 0, "the engine was not asked"


def test_a_cancelled_run_is_not_replayed_to_its_end(micro: Bench) -> None:
    run, sent = micro.begin("noise", language="en")
    run.transcribe()
    lay_out(micro, "noise", entries(sent))
    run, again = micro.begin("noise", language="en", journal=len(entries(sent)))
    run.turn.cancelled = True
    with pytest.raises(Exception, match="cancelled"):
        run.transcribe()
    assert segments(again) == []
    with pytest.raises(Exception, match="cancelled"):
        run._segments_of([{}])  # of ten hours thousands, at the end


def test_a_question_has_no_more_of_the_prompt_than_the_model_reads(micro: Bench) -> None:
    """With conditioning the prompt is all that was said; the same last tokens are the same question."""
    journal, counters = list[bytes](), micro.engine.counters
    proxy = ProxyModel(micro.engine, Turn(), Unheard(), Journal([], journal.append).strand("all"), KeptWindows())
    mel = FileMel(
        micro.spool / "noise" / "audio.pcm",
        n_mels=80,
        worker=Worker("mel"),
        turn=Turn(),
        on_window=lambda start, stop: None,
        on_step=lambda: None,
    )
    read = [*range(400, 400 + proxy.dims.n_text_ctx // 2 - 1)]
    found, tokens, reused = [], [], counters.reused
    for prompt in (read, [500] * 100_000 + read, read[1:]):
        options = DecodingOptions(language="en", fp16=False, prompt=prompt)
        found.append(proxy.decode(MelWindow(mel, 0, 3000), options).tokens)
        tokens.append(DecodingTask(micro.model.whisper, options).initial_tokens)
    mel.close()
    assert tokens[0] == tokens[1] != tokens[2]
    assert found[0] == found[1]
    assert counters.reused == reused + 1
    checks = [msgpack.unpackb(entry)[1] for entry in journal]
    assert checks[0] == checks[1] != checks[2]


# --- journals of something else ---


def test_the_journal_of_other_work_is_void(micro: Bench) -> None:
    run, sent = micro.begin("noise", language="en")
    run.transcribe()
    lay_out(micro, "noise", entries(sent)[:2])
    for options in ({"language": "de"}, {"language": "en", "temperature": 0.5}, {"language": "en", "beam_size": 2}):
        run, again = micro.begin("noise", journal=2, **options)
        with pytest.raises(VoidJournal, match="another one"):
            run.transcribe()
        assert not segments(again)


@pytest.mark.parametrize("content", [None, b"", b"\xc1\xc1", b"\x81", msgpack.packb(7), msgpack.packb(b"x") * 2])
def test_a_journal_that_is_not_there_or_damaged_is_void(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "journal"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(VoidJournal):
        read_journal(path, 1)
    assert read_journal(path, 0) == []


@pytest.mark.parametrize("entry", [b"", b"\xc1", msgpack.packb(7), msgpack.packb(["a", 1]), msgpack.packb([[], 1, 1])])
def test_an_entry_that_is_damaged_is_void(entry: bytes) -> None:
    with pytest.raises(VoidJournal):
        Journal([entry], lambda entry: None)


def test_numbers_come_back_as_they_went_in() -> None:
    strand = Journal([], lambda entry: None).strand("all")
    odd = {"avg_logprob": float("-inf"), "temperature": 0, "seconds": 0.1 + 0.2}
    assert strand.ask("q", lambda: odd) == odd
    assert np.isnan(strand.ask("r", lambda: float("nan")))


def test_a_fingerprint_tells_models_apart(micro: Bench, tiny: Bench, tmp_path: Path) -> None:
    assert fingerprint(micro.model) == fingerprint(micro.model)
    other = open_bench(str(models.micro_checkpoint(tmp_path, seed=1)), tmp_path)
    assert len({fingerprint(bench.model) for bench in (micro, tiny, other)}) == 3
