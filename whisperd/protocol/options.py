"""The options of a transcription: openai-whisper's own names, meanings and defaults, checked once.

The defaults are those of the function `whisper.transcribe` (not of its command, which differs); a test holds them so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from whisperd.protocol.fields import Fields, bad_request, is_number
from whisperd.protocol.languages import LANGUAGES, language_code

MAX_PROMPT_BYTES = 16 * 1024
MAX_CANDIDATES = 32  # beams, or samples of best_of
MAX_TEMPERATURES = 16

# The texts that Whisper's tokenizer has a token of its own for; openai-whisper fails of a prompt with one of them. The
# last ones are times, from 0 to 30 s in steps of 20 ms.
_WORDS = "endoftext|startoftranscript|translate|transcribe|startoflm|startofprev|nospeech|notimestamps"
_SPECIAL_TOKEN = re.compile(rf"<\|(?:{_WORDS}|{'|'.join(LANGUAGES)}|[12]?[0-9]\.[0-9][02468]|30\.00)\|>")

DEFAULTS: dict[str, Any] = {
    "language": None,
    "task": "transcribe",
    "word_timestamps": False,
    "initial_prompt": None,
    "temperature": [0.0, 0.2, 0.4, 0.6, 0.8, 1.0],
    "beam_size": None,
    "best_of": None,
    "patience": None,
    "length_penalty": None,
    "condition_on_previous_text": True,
    "compression_ratio_threshold": 2.4,
    "logprob_threshold": -1.0,
    "no_speech_threshold": 0.6,
    "clip_timestamps": "0",
    "hallucination_silence_threshold": None,
    "suppress_tokens": "-1",
    "carry_initial_prompt": False,
}
# The options that are ours; None: as the daemon's setting of that name says.
OWN_DEFAULTS: dict[str, Any] = {"mode": None}
MODES = ("exact", "fast")


def parse_options(values: Any) -> dict[str, Any]:
    """Return every option with its value, defaults filled in, in one canonical form (equal options compare equal).

    Raises `bad_request`, naming the option, for an unknown name, a wrong type, or a combination that openai-whisper
    refuses or would quietly ignore.
    """
    fields = Fields(values, "options")
    d = DEFAULTS
    options: dict[str, Any] = {
        "language": _language(fields),
        "task": _task(fields),
        "word_timestamps": fields.boolean("word_timestamps", d["word_timestamps"]),
        "initial_prompt": _initial_prompt(fields),
        "temperature": _temperature(fields),
        "beam_size": fields.integer("beam_size", None, low=1, high=MAX_CANDIDATES),
        "best_of": fields.integer("best_of", None, low=1, high=MAX_CANDIDATES),
        "patience": fields.number("patience", None),
        "length_penalty": fields.number("length_penalty", None, low=0, high=1),
        "condition_on_previous_text": fields.boolean("condition_on_previous_text", True),
        "compression_ratio_threshold": _threshold(fields, "compression_ratio_threshold"),
        "logprob_threshold": _threshold(fields, "logprob_threshold"),
        "no_speech_threshold": _threshold(fields, "no_speech_threshold"),
        "clip_timestamps": _clip_timestamps(fields),
        "hallucination_silence_threshold": fields.number("hallucination_silence_threshold", None),
        "suppress_tokens": _suppress_tokens(fields),
        "carry_initial_prompt": fields.boolean("carry_initial_prompt", False),
        "mode": _mode(fields),
    }
    fields.done()
    _check_together(options)
    return options


def _check_together(options: Mapping[str, Any]) -> None:
    patience, beam_size = options["patience"], options["beam_size"]
    if patience is not None:
        if beam_size is None:
            raise bad_request("options: patience needs beam_size")
        if not 0 < patience <= MAX_CANDIDATES or round(beam_size * patience) < 1:
            raise bad_request(f"options: patience must be more than 0, at most {MAX_CANDIDATES}, and leave a candidate")
    silence = options["hallucination_silence_threshold"]
    if silence is not None and silence <= 0:
        # whisper.transcribe can seek to the same place for ever with it.
        raise bad_request("options: hallucination_silence_threshold must be more than 0 seconds")


def _language(fields: Fields) -> str | None:
    name = fields.text("language", None, max_bytes=64)
    if name is None:
        return None
    code = language_code(name)
    if code is None:
        raise fields.wrong("language", name, "a language Whisper knows, such as 'de' or 'german'")
    return code


def _task(fields: Fields) -> str:
    task = fields.text("task", "transcribe", max_bytes=64)
    if task not in ("transcribe", "translate"):
        raise fields.wrong("task", task, "'transcribe' or 'translate'")
    return task


def _mode(fields: Fields) -> str | None:
    mode = fields.text("mode", None, max_bytes=64)
    if mode not in (None, *MODES):
        raise fields.wrong("mode", mode, "'exact' or 'fast'")
    return mode


def _initial_prompt(fields: Fields) -> str | None:
    prompt = fields.text("initial_prompt", None, max_bytes=MAX_PROMPT_BYTES)
    if prompt is not None and (token := _SPECIAL_TOKEN.search(prompt)):
        raise bad_request(f"options: initial_prompt holds {token[0]!r}, a sign of Whisper's own: leave it out")
    return prompt


def _temperature(fields: Fields) -> list[float]:
    value = fields.value("temperature", DEFAULTS["temperature"])
    values = value if isinstance(value, list | tuple) else [value]
    if not 1 <= len(values) <= MAX_TEMPERATURES or not all(is_number(t) and 0 <= t <= 10 for t in values):
        raise fields.wrong("temperature", value, f"a number from 0 to 10, or a list of 1 to {MAX_TEMPERATURES} of them")
    return [float(t) for t in values]


def _threshold(fields: Fields, name: str) -> float | None:
    value = fields.value(name, DEFAULTS[name])
    if value is not None and not is_number(value):
        raise fields.wrong(name, value, "a number or null")
    return None if value is None else float(value)


def _clip_timestamps(fields: Fields) -> str | list[float]:
    value = fields.value("clip_timestamps", DEFAULTS["clip_timestamps"])
    wanted = "seconds: 'start,end,start,...' or a list of numbers"
    times = value
    if isinstance(value, str):
        try:
            times = [float(time) for time in value.split(",")] if value else []
        except ValueError:
            raise fields.wrong("clip_timestamps", value, wanted) from None
    if not isinstance(times, list) or not all(is_number(time) and 0 <= time <= 1e7 for time in times):
        raise fields.wrong("clip_timestamps", value, wanted)
    times = [float(time) for time in times]
    return "0" if times in ([], [0.0]) else times


def _suppress_tokens(fields: Fields) -> str:
    value = fields.value("suppress_tokens", DEFAULTS["suppress_tokens"])
    wanted = "token numbers: '-1' (symbols that are not speech), '1,2,3' or a list; null or '' for none"
    if value is None:
        return ""
    if isinstance(value, list):
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in value):
            raise fields.wrong("suppress_tokens", value, wanted)
        value = ",".join(map(str, value))
    if not isinstance(value, str) or not re.fullmatch(r"(-1|\d{1,6})(,(-1|\d{1,6}))*|", value.replace(" ", "")):
        raise fields.wrong("suppress_tokens", value, wanted)
    return value.replace(" ", "")
