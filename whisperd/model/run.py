"""One run in its own thread: the library's own `transcribe`, on the proxy model and a mel that is read from disk."""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from whisper import transcribe
from whisper.audio import FRAMES_PER_SECOND

from whisperd.model import fast
from whisperd.model.batch.windows import KeptWindows
from whisperd.model.coverage import coverage_of, joined
from whisperd.model.engine import Engine
from whisperd.model.journal import Journal, read_journal
from whisperd.model.mel import FileMel
from whisperd.model.proxy import ProxyModel
from whisperd.model.speech import SpeechDetector, SpeechTrack, Stretch, speech_in
from whisperd.model.transcript import Segment, Timing, Transcript, segment_of
from whisperd.model.worker import Turn, Worker
from whisperd.protocol.abilities import check_abilities
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.helper_messages import HelperMessage, JournalEntry, Progress, Segments
from whisperd.protocol.helper_messages import Transcribe as Order

log = logging.getLogger("whisperd.model")

# Upstream's loop can ask for the same window for ever (word times that do not move it on). Twice may be honest for each
# clip that it lies in: the same stretch may be asked for again and again.
MAX_SAME_WINDOW = 2


class Run:
    """A `Transcribe` message being worked on. `send` takes what it has to say on the way.

    `turn` is what the daemon's `Cancel` and `Prioritise` change.
    """

    def __init__(
        self,
        order: Order,
        *,
        spool: Path,
        engine: Engine,
        speech: SpeechDetector,
        fast_windows: int,
        mel_worker: Worker,
        speech_worker: Worker,
        send: Callable[[HelperMessage], None],
        on_step: Callable[[], None],
    ) -> None:
        self.order = order
        self.turn = Turn(interactive=order.interactive)
        self.audio_s = 0.0  # how far it is
        self._folder = spool / order.folder
        self._engine = engine
        self._speech = speech
        self._fast_windows = fast_windows
        self._track: SpeechTrack | None = None
        self._mel_worker, self._speech_worker = mel_worker, speech_worker
        self._send = send
        self._on_step = on_step
        self._words = bool(order.options["word_timestamps"])
        self._total_s = 0.0
        self._told = 0  # segments so far, those that an earlier start told included
        self._entries = itertools.count(order.journal)
        # Upgraded daemons may have runs from before there was a choice.
        self._mode = str(order.options.get("mode") or "exact")
        self._window = (-1, -1)
        self._times_seen: Counter[tuple[int, int]] = Counter()
        self._clips: list[Stretch] = []

    def transcribe(self) -> Transcript:
        """Do the work and return the transcript.

        Raises `WhisperdError`: `bad_request` for what this model cannot do, `cancelled`, or `internal`; `VoidJournal`
        when what an earlier start left is not of this work; and whatever torch raises.
        """
        began = time.monotonic()
        loaded = self._engine.model
        kept = KeptWindows()
        check_abilities(self.order.options, loaded.traits(), loaded.name)
        mel = FileMel(
            self._folder / "audio.pcm",
            n_mels=loaded.whisper.dims.n_mels,
            worker=self._mel_worker,
            turn=self.turn,
            on_window=self._on_window,
            on_step=self._on_step,
        )
        try:
            self._total_s = mel.duration_s
            journal = Journal(read_journal(self._folder / "journal", self.order.journal), self._record)
            options = upstream_options(self.order.options, content_frames=mel.content_frames)
            self._clips = clips_of(options["clip_timestamps"], self._total_s)
            asked_for = joined(self._clips)
            self._track = track = SpeechTrack(
                self._speech,
                mel.samples,
                mel.samples_at,
                worker=self._speech_worker,
                turn=self.turn,
                on_step=self._on_step,
            )
            if self._mode == "fast":
                result = self._transcribe_fast(mel, track, journal, kept, options, asked_for)
            else:
                model = ProxyModel(self._engine, self.turn, self, journal.strand("all"), kept)
                result = transcribe(model, mel, **options)
            speech = speech_in(track.probabilities(), mel.samples, check=self.turn.check)
            segments = self._segments_of(result["segments"])
        finally:
            mel.close()
        self._progress(self._total_s)
        return Transcript(
            text=result["text"],
            language=result["language"],
            duration_s=self._total_s,
            segments=segments,
            model=loaded.name,
            truncated=self.order.truncated,
            mode=self._mode,
            coverage=coverage_of(speech, texts_of(segments), asked_for=asked_for),
            timing=Timing(
                model_s=round(time.monotonic() - began, 3), windows=self.turn.windows, tokens=self.turn.tokens
            ),
        )

    def _segments_of(self, upstream: Sequence[Mapping[str, Any]]) -> list[Segment]:
        """Return typed segments, those marked between whose ends nobody speaks. No text is changed.

        Raises `WhisperdError` (`cancelled`): thousands of segments take a second.
        """
        assert self._track is not None, "listening begins before the first window"
        segments = []
        for one in upstream:
            self.turn.check()
            segment = segment_of(one, words=self._words)
            segments.append(replace(segment, speech=self._track.speaks_between(segment.start, segment.end)))
        return segments

    def _transcribe_fast(
        self,
        mel: FileMel,
        track: SpeechTrack,
        journal: Journal,
        kept: KeptWindows,
        options: Mapping[str, Any],
        asked_for: list[Stretch],
    ) -> dict[str, Any]:
        speech = speech_in(
            track.probabilities(),
            mel.samples,
            min_silence_ms=fast.MIN_SILENCE_MS,
            pad_ms=fast.PAD_MS,
            max_speech_s=fast.MAX_SPEECH_S,
            check=self.turn.check,
        )

        def on_window(found: fast.WindowResult) -> None:
            self.on_segments(found.segments)
            self._progress(found.end_s)

        return fast.transcribe_windows(
            mel,
            fast.windows_of(speech, asked_for),
            proxy=lambda name, speech_until_s: ProxyModel(
                self._engine, self.turn, fast.Unheard(), journal.strand(name), kept, speech_until_s=speech_until_s
            ),
            options=options,
            at_once=self._fast_windows,
            on_window=on_window,
        )

    def _record(self, entry: bytes) -> None:
        self._send(JournalEntry(run=self.order.run, generation=self.order.generation, entry=entry))
        log.debug("model: answered run=%d call=%d bytes=%d", self.order.run, next(self._entries), len(entry))

    def on_segments(self, segments: list[dict[str, Any]]) -> None:
        """Pass on what a window added, unless an earlier start of the run has done so."""
        new = segments[max(0, self.order.told - self._told) :]
        self._told += len(segments)
        wire = [segment.to_wire() for segment in self._segments_of(new)]
        if wire:
            self._send(Segments(run=self.order.run, generation=self.order.generation, segments=wire))

    def on_frames(self, frames: int) -> None:
        """A window ended `frames` after its beginning."""
        self._progress((self._window[0] + frames) / FRAMES_PER_SECOND)

    def _on_window(self, start: int, stop: int) -> None:
        self._times_seen[start, stop] += 1
        if self._stands_still(start, stop):
            advice = "without word_timestamps" if self._words else "with clip_timestamps that leave it out"
            raise WhisperdError(
                ErrorCode.INTERNAL,
                f"openai-whisper does not get past second {start / FRAMES_PER_SECOND:.2f} of this recording with these "
                f"options; try again {advice}",
            )
        if self._mode == "exact":  # else windows come in any order
            self._window = (start, stop)
            self._progress(start / FRAMES_PER_SECOND)

    def _stands_still(self, start: int, stop: int) -> bool:
        """Return whether a window was asked for more often than the clips that it lies in explain."""
        times = self._times_seen[start, stop]
        if times <= MAX_SAME_WINDOW:
            return False
        holding = [
            clip
            for clip in self._clips
            if round(clip.start_s * FRAMES_PER_SECOND) <= start < round(clip.end_s * FRAMES_PER_SECOND)
        ]
        return times > MAX_SAME_WINDOW * max(1, len(holding))

    def _progress(self, done_s: float) -> None:
        if done_s > self.audio_s:
            self.audio_s = min(done_s, self._total_s)
            self._send(
                Progress(run=self.order.run, generation=self.order.generation, done=self.audio_s, total=self._total_s)
            )


def clips_of(clip_timestamps: str | Sequence[float], total_s: float) -> list[Stretch]:
    """Return the clips that `clip_timestamps` (as `upstream_options` gives it) asks for, in the order asked."""
    times = list(map(float, clip_timestamps.split(","))) if isinstance(clip_timestamps, str) else list(clip_timestamps)
    if len(times) % 2:
        times.append(total_s)
    pairs = zip(times[::2], times[1::2], strict=True)
    return [Stretch(start_s=start, end_s=max(start, end)) for start, end in pairs]


def texts_of(segments: Sequence[Segment]) -> list[Stretch]:
    """Return where the segments with text lie."""
    return [Stretch(start_s=one.start, end_s=one.end) for one in segments if one.text.strip() and one.end > one.start]


def upstream_options(options: Mapping[str, Any], *, content_frames: int) -> dict[str, Any]:
    """Return the keyword arguments of `whisper.transcribe` for options as `parse_options` returns them."""
    arguments = {name: value for name, value in options.items() if name != "mode"}
    arguments["temperature"] = tuple(options["temperature"])
    clips = options["clip_timestamps"]
    if not isinstance(clips, str):
        # Upstream never ends when a clip ends after the audio. One that begins after it then transcribes nothing.
        end_s = content_frames / FRAMES_PER_SECOND
        arguments["clip_timestamps"] = [min(time_s, end_s) for time_s in clips]
    return arguments | {"verbose": None, "fp16": False}
