"""Whether what a GPU says is openai-whisper's: in float32 by the criterion, in fewer bits by the word error rate."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import redirect_stdout

from bench.batch import Engines
from bench.forced import Choices
from bench.gpu_place import Place
from bench.report import Row

_REDUCED = ("float16", "bfloat16")


def measure(place: Place) -> Iterator[Row]:
    """Compare with openai-whisper in float32 on the CPU. The details go to stderr."""
    recordings, what = place.recordings()
    setting, device = place.spoken_model(), str(place.device)
    with redirect_stdout(sys.stderr):
        engines = Engines(setting, place.new_folder("float32"), recordings, device=device, dtype="float32")
        reference = engines.reference(place.spoken_options(), Choices())
        met, line = engines.judge(reference)
    what = f"tiny.en, {what} ({engines.audio_s:.0f} s)"
    yield Row(what=f"{what}, float32: tokens, scores and gaps", goal="the criterion", measured=line, met=met, runs="1")
    reference.choices.gaps = False
    for dtype in _REDUCED:
        with redirect_stdout(sys.stderr):
            engines = Engines(setting, place.new_folder(dtype), recordings, device=device, dtype=dtype)
            met, line = engines.judge(reference)
        goal = "within 0.2 points of float32"
        yield Row(what=f"{what}, {dtype}: word error rate", goal=goal, measured=line, met=met, runs="1")
