"""`mode: fast`: windows cut at silences and decoded beside each other, each by openai-whisper's own `transcribe`.

A window is a clip of at most 30 s around speech. Each is given to the unmodified function as `clip_timestamps`, in a
thread of its own, without the text before it; so they are independent of each other, their order changes nothing, and
the engine decodes them as one batch. Where nobody speaks, nothing is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from whisper import transcribe
from whisper.audio import CHUNK_LENGTH, FRAMES_PER_SECOND, N_FRAMES

from whisperd.model.coverage import without
from whisperd.model.mel import FileMel, MelWindow
from whisperd.model.proxy import ProxyModel
from whisperd.model.speech import Stretch
from whisperd.model.threads import compute_on

# What a window is widened by before and behind its speech, and the longest speech that then still fits.
PAD_MS = 400
MIN_SILENCE_MS = 160
MAX_SPEECH_S = CHUNK_LENGTH - 2 * PAD_MS / 1000 - 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowResult:
    """What one window gave: upstream's dicts, and where the window ends, in seconds."""

    text: str
    segments: list[dict[str, Any]]
    end_s: float


class Unheard:
    """The listener of a window's own loop: what it adds is heard of in the recording's order, from the whole."""

    def on_segments(self, segments: list[dict[str, Any]]) -> None:
        """Leave them to `WindowResult`."""

    def on_frames(self, frames: int) -> None:
        """Leave progress to `WindowResult`."""


def windows_of(speech: Sequence[Stretch], asked_for: Sequence[Stretch]) -> list[Stretch]:
    """Return windows of at most 30 s that hold all speech inside what was asked for, each ending in a silence.

    `speech` is in order and without overlaps, none longer than a window; two may touch, where a long one was cut. So is
    `asked_for`, and no window reaches from one of its stretches into another: what lies between was not asked for.
    """
    left_out = without([Stretch(start_s=0.0, end_s=float("inf"))], asked_for)
    windows: list[Stretch] = []
    clip = 0
    for stretch in without(speech, left_out):
        while asked_for[clip].end_s <= stretch.start_s:
            clip += 1
        began_s = windows[-1].start_s if windows else -1.0
        if began_s >= asked_for[clip].start_s and stretch.end_s - began_s <= CHUNK_LENGTH:
            windows[-1] = Stretch(start_s=began_s, end_s=stretch.end_s)
        else:
            windows.append(stretch)
    return windows


def transcribe_windows(
    mel: FileMel,
    windows: Sequence[Stretch],
    *,
    proxy: Callable[[str, float], ProxyModel],
    options: Mapping[str, Any],
    at_once: int,
    on_window: Callable[[WindowResult], None],
) -> dict[str, Any]:
    """Return `text`, `segments` and `language`, as `whisper.transcribe` does, from these windows alone.

    `proxy` makes the model for a window, given a name that is the same whenever the work is done; `options` are
    upstream's keyword arguments. `on_window` hears of each window in the recording's order, its segments numbered on.
    Raises what a window raised first; the others are given up.
    """
    # Held to the end, and with it what it heard: that is the first window, which is then not encoded again.
    listening = proxy("language", 0.0)
    language = options["language"] or _language(mel, windows, listening)
    shared = dict(options) | {
        "language": language,
        "condition_on_previous_text": False,
        # Every window is the first one here, so the prompt is each one's.
        "carry_initial_prompt": options["initial_prompt"] is not None,
    }

    # As in `upstream_options`: a clip that ends after the last whole frame never ends.
    end_s = mel.content_frames / FRAMES_PER_SECOND

    def work(window: Stretch) -> WindowResult:
        result = transcribe(
            proxy(f"{window.start_s:.3f}", window.end_s - PAD_MS / 1000),
            mel,
            **shared | {"clip_timestamps": [window.start_s, min(window.end_s, end_s)]},
        )
        return WindowResult(text=result["text"], segments=result["segments"], end_s=window.end_s)

    texts: list[str] = []
    segments: list[dict[str, Any]] = []
    with ThreadPoolExecutor(
        max_workers=at_once, thread_name_prefix="window", initializer=compute_on, initargs=(1,)
    ) as pool:
        futures = [pool.submit(work, window) for window in windows]
        try:
            for future in futures:
                found = future.result()
                for segment in found.segments:
                    segment["id"] = len(segments)
                    segments.append(segment)
                texts.append(found.text)
                on_window(found)
        finally:
            for future in futures:
                future.cancel()
    return {"text": "".join(texts), "segments": segments, "language": language}


def _language(mel: FileMel, windows: Sequence[Stretch], model: ProxyModel) -> str:
    """Return the language of the first window: the beginning of a file may be music, or nothing."""
    if not model.is_multilingual:
        return "en"
    heard = MelWindow(mel, 0, N_FRAMES)
    if windows:  # the very frames that `transcribe` will ask for first
        first, stop = (round(time_s * FRAMES_PER_SECOND) for time_s in (windows[0].start_s, windows[0].end_s))
        heard = MelWindow(mel, first, min(stop, first + N_FRAMES, mel.content_frames), N_FRAMES)
    _, probabilities = model.detect_language(heard)
    return max(probabilities, key=probabilities.__getitem__)
