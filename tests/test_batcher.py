"""The batcher on real weights: runs beside each other say what openai-whisper says about each recording alone.

Recordings of several windows among them, so that prompts grow, seeks move and tries above temperature 0 come in while
others are on their way.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from whisper.decoding import DecodingResult

from bench.fidelity import NEAR_TIE
from bench.reduced import load_as
from bench.words import word_error_rate
from tests.held_batcher import LikeAGpu
from tests.model_bench import Bench, Job, beside_each_other, fed_the_same, hard_to_hear, open_bench, write_folders
from tests.support import requires_program, speak, speak_apart
from whisperd.model.batch.windows import MOST_RESULTS, KeptWindows

# A window of speech and the beginning of a second: a prompt of a hundred tokens.
DENSE = (
    "The harbour was quiet in the morning. A small boat came in with the tide, and two men carried fish to the market. "
    "Nobody spoke, because there was nothing to say. Later in the day the wind changed, and the boats that were still "
    "outside began to come home one after the other. The old man at the window counted them, as he did every evening, "
    "and when the last one was in he closed the shutters and lit his lamp. Then it was night. The sea went on with its "
    "work, and in the houses people slept until the first bell called them back to the water."
)
SHORT = (
    "The harbour was quiet in the morning. A small boat came in with the tide, and two men carried fish to the market."
)
# Three windows, and few words.
SPARSE = (
    "Every morning the old man walked down to the river. Nobody ever asked him. Then he went home to his wife. "
    "On a good day there were more than thirty boats. The children of the village thought that he was waiting. "
    "In the evening he wrote the number into a small black book"
)
A_STORY = "A story of the sea, of an old man, and of the boats that he counted."

KINDS: dict[str, Job] = {
    "as it comes": ("dense", {}),
    "a prompt for each window": ("sparse", {"initial_prompt": A_STORY, "carry_initial_prompt": True}),
    "no conditioning": (
        "sparse", {"condition_on_previous_text": False, "initial_prompt": A_STORY, "clip_timestamps": [21]},
    ),
    "words in clips": ("sparse", {"word_timestamps": True, "clip_timestamps": [0, 9, 10.5, 20]}),
    # Always tried again, and drawn then; behind what was drawn above 0.5 the prompt begins anew.
    "drawn": (
        "sparse", {"temperature": [0.0, 0.6], "logprob_threshold": 0.0, "best_of": 3, "clip_timestamps": [21]},
    ),
    # Tried again because it is hard to hear.
    "noisy": ("noisy", {}),
    "beams": ("short", {"beam_size": 5, "patience": 1.5, "temperature": 0}),
    "short": ("short", {}),
    "no symbol forbidden": ("short", {"suppress_tokens": "", "clip_timestamps": [1]}),
}  # fmt: skip


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spool = tmp_path_factory.mktemp("spool")
    speech = {
        "dense": speak(DENSE, spool / "dense.wav"),
        "short": speak(SHORT, spool / "short.wav"),
        "sparse": speak_apart(SPARSE, spool / "sparse.wav", every_s=10.5),
    }
    write_folders(spool, **{name: path.read_bytes()[44:] for name, path in speech.items()})
    write_folders(spool, silence=bytes(2 * 16_000 * 60), noisy=hard_to_hear(speech["short"]))
    return spool


@pytest.fixture(scope="module")
def tiny(spool: Path) -> Bench:
    return open_bench("demo", spool)


@requires_program("flite")
@pytest.mark.parametrize(
    ("names", "read_late"),
    [
        (["noisy"], False),
        (["short", "beams"], False),
        (["a prompt for each window", "drawn", "words in clips", "beams", "noisy"], True),
        ([*KINDS, "beams", *["short", "no symbol forbidden"] * 3], False),
    ],
    ids=["one", "two", "five, read late as on a GPU", "sixteen"],
)
def test_runs_beside_each_other_say_what_upstream_says(tiny: Bench, names: list[str], read_late: bool) -> None:
    bench = Bench(tiny.model, tiny.spool, kernels=LikeAGpu()) if read_late else tiny
    names = random.Random(len(names)).sample(names, len(names))
    transcripts, windows_a_step = beside_each_other(bench, [KINDS[name] for name in names], upstream=tiny)
    assert windows_a_step > 1.5 or len(names) < 5
    for name, transcript in zip(names, transcripts, strict=True):
        temperatures = {segment.temperature for segment in transcript.segments}
        if name in ("drawn", "noisy"):
            assert min(temperatures) > 0
        assert transcript.timing.windows >= (1 if KINDS[name][0] == "short" else 2)


@requires_program("flite")
def test_fed_the_same_tokens_our_decoder_sees_each_choice_as_upstream_does(tiny: Bench) -> None:
    """Equal texts show that no choice fell the other way; this shows that none came near to."""
    kinds = ("as it comes", "a prompt for each window", "no symbol forbidden")
    changes = fed_the_same(tiny, [KINDS[name] for name in kinds])
    assert len(changes) > 200
    assert all(change <= NEAR_TIE for change in changes)


def test_a_window_seen_before_is_not_decoded_again(tiny: Bench) -> None:
    options = {"temperature": 0, "condition_on_previous_text": False, "no_speech_threshold": None}
    counters = tiny.engine.counters
    windows, reused = counters.windows, counters.reused
    transcript = tiny.begin("silence", **options)[0].transcribe()
    assert (counters.windows - windows, counters.reused - reused) == (1, 1)
    assert [segment.tokens for segment in transcript.segments] == [
        segment["tokens"] for segment in tiny.upstream("silence", **options)["segments"]
    ]
    assert transcript.timing.windows == 1


@requires_program("flite")
def test_bfloat16_hears_the_same_words(spool: Path) -> None:
    """A processor without it rounds to it, so that all but its own matrix products is what is tested."""
    model, kernels = load_as("demo", spool, device="cpu", dtype="bfloat16")
    bench = Bench(model, spool, release=True, kernels=kernels)
    transcript = bench.begin("short", temperature=0, word_timestamps=True)[0].transcribe()
    assert word_error_rate(SHORT, transcript.text) < 0.15
    assert all(segment.words for segment in transcript.segments)


def test_digest_tells_windows_apart() -> None:
    kept, mel = KeptWindows(), torch.zeros(80, 3000)
    first = kept.window(mel)
    assert kept.window(mel.clone()) is first
    mel[3, 7] = np.nextafter(np.float32(0), np.float32(1)).item()
    assert kept.window(mel) is not first


def test_as_many_results_are_kept_as_is_said_and_no_failures() -> None:
    kept, asked = KeptWindows(), list[int]()

    def decode(number: int) -> DecodingResult:
        asked.append(number)
        if asked == [0]:
            raise RuntimeError("out of memory")
        return DecodingResult(audio_features=torch.empty(0), language=str(number))

    with pytest.raises(RuntimeError):
        kept.decoded(0, partial(decode, 0))
    found = [kept.decoded(number, partial(decode, number)) for number in (*range(MOST_RESULTS), 0)]
    assert [result.language for result, known in found if known] == ["0"]
    found = [kept.decoded(number, partial(decode, number)) for number in (MOST_RESULTS, 0, 1)]
    assert [known for _, known in found] == [False, True, False], "the one that was asked for longest ago is forgotten"
