"""`stats --prometheus`: the counters in Prometheus' text exposition format 0.0.4.

https://prometheus.io/docs/instrumenting/exposition_formats/ for the format, and .../practices/naming/ for the names:
base units, written out at the end, and `_total` for what only grows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from whisperctl.words import map_in

_PREFIX = "whisperd_"
_DAY_S = 86400


@dataclass(frozen=True, slots=True)
class _Rule:
    """How keys of `stats` become samples of one metric: the named groups of `keys` are labels."""

    keys: str
    name: str
    kind: str
    help: str
    factor: float = 1


@dataclass(slots=True)
class _Metric:
    kind: str
    help: str
    samples: list[tuple[Mapping[str, str], float]] = field(default_factory=list)


_RULES = (
    _Rule(r"jobs\.since_start\.(?P<state>\w+)", "job_moves_total", "counter", "Jobs that came into a state."),
    _Rule(r"jobs\.total\.(?P<state>\w+)", "jobs", "gauge", "Jobs in a state now, ended ones until retention is over."),
    _Rule(r"queue\.(?P<priority>interactive|background)", "queue_jobs", "gauge", "Jobs that wait."),
    _Rule(r"queue\.capacity", "queue_capacity_jobs", "gauge", "Jobs that may wait."),
    _Rule(r"wait_s\.(?P<priority>\w+)\.(?P<quantile>p\d+)", "wait_seconds", "summary",
          "Time from submit to the model, of the last 1,000 jobs."),
    _Rule(r"run_s\.(?P<priority>\w+)\.(?P<quantile>p\d+)", "run_seconds", "summary",
          "Time from the model to done, of the last 1,000 jobs."),
    _Rule(r"audio\.transcribed_s", "audio_transcribed_seconds_total", "counter", "Audio of jobs that are done."),
    _Rule(r"audio\.speed", "audio_speed_ratio", "gauge", "Audio time in the model's working time."),
    _Rule(r"model\.rss_bytes", "model_resident_memory_bytes", "gauge", "Memory of the model's process."),
    _Rule(r"model\.starts", "model_starts_total", "counter", "Starts of the model's process."),
    _Rule(r"model\.crashes", "model_crashes_total", "counter", "Unasked ends of the model's process."),
    _Rule(r"model\.windows", "model_windows_total", "counter", "Windows that the model's process has decoded."),
    _Rule(r"model\.windows_reused", "model_windows_reused_total", "counter", "Windows that were decoded before."),
    _Rule(r"model\.steps", "model_steps_total", "counter", "Decoder steps, each of all windows being decoded."),
    _Rule(r"model\.batch_windows", "model_batch_windows", "gauge", "Windows that may be decoded together."),
    _Rule(r"model\.tokens", "model_tokens_total", "counter", "Tokens that the model's process has decoded."),
    _Rule(r"model\.audio_s", "model_audio_seconds_total", "counter", "Audio that the model's process is through with."),
    _Rule(r"model\.busy_s", "model_busy_seconds_total", "counter", "Time that the model's process has worked."),
    _Rule(r"model\.windows_per_s", "model_windows_per_busy_second", "gauge", "Windows in a second of work."),
    _Rule(r"model\.tokens_per_s", "model_tokens_per_busy_second", "gauge", "Tokens in a second of work."),
    _Rule(r"model\.batch_occupancy", "model_batch_occupancy_ratio", "gauge", "Used part of the model's places."),
    _Rule(r"model\.device_used_bytes", "device_memory_used_bytes", "gauge", "Used memory of the GPU."),
    _Rule(r"model\.device_total_bytes", "device_memory_size_bytes", "gauge", "Memory of the GPU."),
    _Rule(r"lanes\.(?P<lane>\w+)\.active", "lane_active", "gauge", "Recordings that a lane works on."),
    _Rule(r"lanes\.(?P<lane>\w+)\.waiting", "lane_waiting", "gauge", "Recordings that wait for a lane."),
    _Rule(r"lanes\.(?P<lane>\w+)\.failed", "lane_failures_total", "counter", "Tries of a lane that failed."),
    _Rule(r"lanes\.fetch\.rests_until", "fetch_rests_until_timestamp_seconds", "gauge", "No download begins before."),
    _Rule(r"lanes\.fetch\.yt_dlp_age_days", "yt_dlp_age_seconds", "gauge", "Age of yt-dlp.", _DAY_S),
    _Rule(r"cache_hits", "cache_hits_total", "counter", "Submits that needed no work of their own."),
    _Rule(r"spool_bytes", "spool_bytes", "gauge", "Audio on the daemon's disk."),
    _Rule(r"database_bytes", "database_bytes", "gauge", "The queue's database."),
    _Rule(r"free_bytes", "disk_free_bytes", "gauge", "Free room on the daemon's disk."),
    _Rule(r"min_free_bytes", "disk_min_free_bytes", "gauge", "Free room below which submits are refused."),
    _Rule(r"connections", "connections", "gauge", "Open connections."),
    _Rule(r"daemon\.rss_bytes", "daemon_resident_memory_bytes", "gauge", "Memory of the daemon's process."),
    _Rule(r"daemon\.cpu_s", "daemon_cpu_seconds_total", "counter", "CPU time of the daemon's process."),
    _Rule(r"daemon\.uptime_s", "daemon_uptime_seconds", "gauge", "Time since the daemon's start."),
    _Rule(r"software\.cuda_devices", "cuda_devices", "gauge", "CUDA devices that torch sees."),
)  # fmt: skip
_NO_METRICS = re.compile(r"model\.pid|daemon\.pid")  # numbers that measure nothing
_STATES = ("unloaded", "downloading", "loading", "ready", "failed")
_STATUSES = ("starting", "ready", "degraded", "paused", "stopping")


def exposition(stats: Mapping[str, Any], health: Mapping[str, Any]) -> str:
    """Return the text that a scrape gets. A number that only a newer daemon tells appears under its key's own name."""
    metrics = {"up": _Metric("gauge", "1: the daemon answers.", [({}, 1.0)])}
    metrics |= _states("status", "1 for what the daemon is.", _STATUSES, health.get("status"))
    metrics |= _states("model_state", "1 for what the model is.", _STATES, map_in(stats, "model").get("state"))
    metrics["problems"] = _Metric("gauge", "Things that keep the daemon from working well.",
                                  [({}, float(len(health.get("problems") or ())))])  # fmt: skip
    metrics["build_info"] = _Metric("gauge", "Versions of what does the work.", [(_build(stats, health), 1.0)])
    for key, value in _numbers(stats):
        _add(metrics, key, value)
    return "".join(_text(f"{_PREFIX}{name}", metric) for name, metric in metrics.items() if metric.samples)


def _add(metrics: dict[str, _Metric], key: str, value: float) -> None:
    if _NO_METRICS.fullmatch(key):
        return
    for rule in _RULES:
        if (match := re.fullmatch(rule.keys, key)) is not None:
            metric = metrics.setdefault(rule.name, _Metric(rule.kind, rule.help))
            metric.samples.append((_labels(match.groupdict()), value * rule.factor))
            return
    name = re.sub(r"_s$", "_seconds", re.sub(r"\W", "_", key))
    metrics.setdefault(name, _Metric("gauge", f"The key {key} of stats.")).samples.append(({}, value))


def _labels(found: Mapping[str, str]) -> dict[str, str]:
    return {name: str(int(text[1:]) / 100) if name == "quantile" else text for name, text in found.items()}


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):  # true is 1, and null is no sample
            yield prefix + key, value


def _states(name: str, help: str, known: tuple[str, ...], now: Any) -> dict[str, _Metric]:
    states = [*known, *([str(now)] if now and now not in known else [])]
    return {name: _Metric("gauge", help, [({name.rpartition("_")[2]: each}, float(each == now)) for each in states])}


def _build(stats: Mapping[str, Any], health: Mapping[str, Any]) -> dict[str, str]:
    software, fetch = map_in(stats, "software"), map_in(map_in(stats, "lanes"), "fetch")
    model = map_in(health, "model")
    told = {
        "version": health.get("version"),
        **{name: software.get(name) for name in ("python", "torch", "whisper", "cuda", "av", "ffmpeg")},
        "yt_dlp": fetch.get("yt_dlp"),
        **{name: model.get(key) for name, key in (("model", "name"), ("device", "device"), ("dtype", "dtype"))},
    }
    return {name: str(value) for name, value in told.items() if value}


def _text(name: str, metric: _Metric) -> str:
    lines = [f"# HELP {name} {_escaped(metric.help)}", f"# TYPE {name} {metric.kind}"]
    for labels, value in metric.samples:
        inner = ",".join(f'{label}="{_escaped(text, quotes=True)}"' for label, text in labels.items())
        lines.append(f"{name}{{{inner}}} {_value(value)}" if inner else f"{name} {_value(value)}")
    return "\n".join(lines) + "\n"


def _escaped(text: str, *, quotes: bool = False) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quotes else text


def _value(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(int(value)) if value == int(value) and abs(value) < 2**53 else repr(float(value))
