"""What the client returns: transcripts, results and events, read from the wire once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from whisperctl.errors import JobTimeout, error_of
from whisperd.protocol.jobs import Job, JobState


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A piece of speech; `start` and `end` are seconds from the start of the audio.

    `speech` is False where no speech was detected between them; the other fields are Whisper's own.
    """

    id: int
    start: float
    end: float
    text: str
    tokens: Sequence[int] = ()
    temperature: float = 0.0
    avg_logprob: float = 0.0
    compression_ratio: float = 0.0
    no_speech_prob: float = 0.0
    words: Sequence[Mapping[str, Any]] | None = None
    speech: bool = True

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Segment:
        """Read a segment's map; keys that this version does not know are ignored."""
        return cls(**{name: wire[name] for name in _SEGMENT_FIELDS if name in wire})


_SEGMENT_FIELDS = tuple(each.name for each in fields(Segment))


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Seconds in which speech was detected, and those of them inside segments with text.

    `gaps` are stretches of speech, of a second and more, that no segment covers: start and end, in seconds.
    """

    speech_s: float
    transcribed_s: float
    gaps: Sequence[tuple[float, float]]

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Coverage:
        """Read the map that a transcript carries."""
        gaps = [(start, end) for start, end in wire["gaps"]]
        return cls(speech_s=wire["speech_s"], transcribed_s=wire["transcribed_s"], gaps=gaps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds at the model, of the last start if there were several; windows decoded in it, tokens chosen for them."""

    model_s: float
    windows: int
    tokens: int

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Timing:
        """Read the map that a transcript carries."""
        return cls(model_s=wire["model_s"], windows=wire["windows"], tokens=wire["tokens"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """The words of a recording. `truncated`: the audio ended early, or has a stretch that does not decode.

    `mode` is `exact` or `fast`. It, `coverage` and `timing` are None where the daemon does not tell them.
    """

    text: str
    language: str | None
    duration_s: float
    segments: Sequence[Segment]
    model: str
    truncated: bool
    versions: Mapping[str, str] = field(default_factory=dict)
    mode: str | None = None
    coverage: Coverage | None = None
    timing: Timing | None = None
    raw: Mapping[str, Any] = field(repr=False)

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Transcript:
        """Read a Transcript map; `raw` keeps it whole."""
        coverage, timing = wire.get("coverage"), wire.get("timing")
        return cls(
            text=wire["text"],
            language=wire.get("language"),
            duration_s=wire.get("duration_s") or 0.0,
            segments=[Segment.from_wire(segment) for segment in wire.get("segments", ())],
            model=str(wire.get("model", "")),
            truncated=bool(wire.get("truncated", False)),
            versions=wire.get("versions") or {},
            mode=wire.get("mode"),
            coverage=None if coverage is None else Coverage.from_wire(coverage),
            timing=None if timing is None else Timing.from_wire(timing),
            raw=wire,
        )

    def to_wire(self) -> dict[str, Any]:
        """Return the map that the protocol calls Transcript, as it came."""
        return dict(self.raw)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A job, and its transcript once it is done. A failed job is a result too: `require` tells why."""

    job: Job
    transcript: Transcript | None

    def require(self) -> Transcript:
        """Return the transcript. Raises `JobFailed`, `JobCancelled`, or `JobTimeout` while the job goes on."""
        if self.transcript is not None:
            return self.transcript
        if self.job.ended:
            raise error_of(self.job)
        raise JobTimeout(f"job {self.job.id} is not finished yet ({self.job.state})", job_id=self.job.id)

    @property
    def text(self) -> str:
        """The transcript's text; raises as `require` does."""
        return self.require().text


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to a job: `kind` is `state`, `segment`, `progress` or `end`.

    `seq` counts the job's events, without a gap; `progress` has none. `discard`: the segments so far are void.
    """

    kind: str
    job_id: int
    seq: int | None = None
    state: JobState | None = None
    discard: bool = False
    segment: Segment | None = None
    progress: float | None = None
    phase: str = ""
    position: int | None = None
    eta_s: float | None = None
    error: Mapping[str, str] | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Event:
        """Read a pushed event's map."""
        state, segment = wire.get("state"), wire.get("segment")
        return cls(
            kind=wire["event"],
            job_id=wire["job"],
            seq=wire.get("seq"),
            state=None if state is None else JobState(state),
            discard=bool(wire.get("discard", False)),
            segment=None if segment is None else Segment.from_wire(segment),
            progress=wire.get("progress"),
            phase=wire.get("phase") or "",
            position=wire.get("position"),
            eta_s=wire.get("eta_s"),
            error=wire.get("error"),
            raw={name: value for name, value in wire.items() if name != "id"},
        )
