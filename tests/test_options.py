"""Options: openai-whisper's own names and defaults, one canonical form, refusals that name the option."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_frames import leaves
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.frames import encode_body, parse_body
from whisperd.protocol.languages import ALIASES, LANGUAGES, language_code
from whisperd.protocol.options import DEFAULTS, OWN_DEFAULTS, parse_options


def test_the_defaults_are_those_of_whisper_transcribe() -> None:
    import whisper

    own = {
        name: parameter.default
        for name, parameter in inspect.signature(whisper.transcribe).parameters.items()
        if name not in ("model", "audio", "verbose", "decode_options", "prepend_punctuations", "append_punctuations")
    }
    # The rest are DecodingOptions, which transcribe passes on; `temperature` it sets itself.
    decoding = {
        name: parameter.default for name, parameter in inspect.signature(whisper.DecodingOptions).parameters.items()
    }
    own |= {name: decoding[name] for name in DEFAULTS.keys() - own.keys()}
    own["temperature"] = list(own["temperature"])
    assert dict(DEFAULTS) == own


def test_the_languages_are_whispers() -> None:
    from whisper.tokenizer import LANGUAGES as OWN
    from whisper.tokenizer import TO_LANGUAGE_CODE

    assert list(LANGUAGES.items()) == list(OWN.items()), "the order is the order of the tokens"
    assert {name: language_code(name) for name in TO_LANGUAGE_CODE} == TO_LANGUAGE_CODE
    assert {value: code for code, value in LANGUAGES.items()} | ALIASES == TO_LANGUAGE_CODE


def test_nothing_given_is_the_defaults() -> None:
    assert parse_options({}) == dict(DEFAULTS | OWN_DEFAULTS)


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        ({"language": " German "}, {"language": "de"}),
        ({"language": "MANDARIN"}, {"language": "zh"}),
        ({"language": "yue"}, {"language": "yue"}),
        ({"language": None}, {"language": None}),
        ({"temperature": 0}, {"temperature": [0.0]}),
        ({"temperature": [0, 0.5]}, {"temperature": [0.0, 0.5]}),
        ({"temperature": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)}, {}),
        ({"mode": "fast"}, {"mode": "fast"}),
        ({"clip_timestamps": "0"}, {}),
        ({"clip_timestamps": ""}, {}),
        ({"clip_timestamps": []}, {}),
        ({"clip_timestamps": [0]}, {}),
        ({"clip_timestamps": "5"}, {"clip_timestamps": [5.0]}),
        ({"clip_timestamps": "1.5, 3"}, {"clip_timestamps": [1.5, 3.0]}),
        ({"clip_timestamps": [1.5, 3]}, {"clip_timestamps": [1.5, 3.0]}),
        ({"suppress_tokens": None}, {"suppress_tokens": ""}),
        ({"suppress_tokens": []}, {"suppress_tokens": ""}),
        ({"suppress_tokens": [-1, 50257]}, {"suppress_tokens": "-1,50257"}),
        ({"suppress_tokens": "-1, 50257"}, {"suppress_tokens": "-1,50257"}),
        ({"beam_size": 5, "patience": 2}, {"beam_size": 5, "patience": 2.0}),
        ({"compression_ratio_threshold": None}, {"compression_ratio_threshold": None}),
        ({"logprob_threshold": -2}, {"logprob_threshold": -2.0}),
        ({"hallucination_silence_threshold": 2}, {"hallucination_silence_threshold": 2.0}),
    ],
)
def test_one_form_for_equal_options(given: dict[str, Any], canonical: dict[str, Any]) -> None:
    """Results are shared between equal options, so equal ones must compare equal."""
    options = parse_options(given)
    assert options == DEFAULTS | OWN_DEFAULTS | canonical
    assert parse_options(options) == options
    assert parse_options(parse_body(encode_body(options))) == options


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"beams": 5}, "beams"),
    ({"mode": "quick"}, "mode"),
    ({"verbose": True}, "verbose"),
    ({"fp16": True}, "fp16"),
    ({"language": "klingon"}, "language"),
    ({"language": 5}, "language"),
    ({"task": "summarise"}, "task"),
    ({"task": None}, "task"),
    ({"word_timestamps": 1}, "word_timestamps"),
    ({"initial_prompt": 5}, "initial_prompt"),
    ({"initial_prompt": "x" * 16_385}, "initial_prompt"),
    ({"initial_prompt": "The end.<|endoftext|>"}, "initial_prompt holds '<|endoftext|>'"),
    ({"temperature": None}, "temperature"),
    ({"temperature": "0"}, "temperature"),
    ({"temperature": []}, "temperature"),
    ({"temperature": [0.0] * 17}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"beam_size": 0}, "beam_size"),
    ({"beam_size": 33}, "beam_size"),
    ({"beam_size": 2.5}, "beam_size"),
    ({"best_of": 0}, "best_of"),
    ({"patience": 1.0}, "beam_size"),
    ({"patience": 0, "beam_size": 5}, "patience"),
    ({"patience": 0.01, "beam_size": 1}, "patience"),
    ({"length_penalty": 1.5}, "length_penalty"),
    ({"length_penalty": -0.5}, "length_penalty"),
    ({"condition_on_previous_text": None}, "condition_on_previous_text"),
    ({"compression_ratio_threshold": "2"}, "compression_ratio_threshold"),
    ({"logprob_threshold": True}, "logprob_threshold"),
    ({"no_speech_threshold": [0.6]}, "no_speech_threshold"),
    ({"clip_timestamps": "1,two"}, "clip_timestamps"),
    ({"clip_timestamps": 5}, "clip_timestamps"),
    ({"clip_timestamps": [-1]}, "clip_timestamps"),
    ({"clip_timestamps": "nan"}, "clip_timestamps"),
    ({"clip_timestamps": "inf"}, "clip_timestamps"),
    ({"hallucination_silence_threshold": 0}, "hallucination_silence_threshold"),
    ({"hallucination_silence_threshold": -1}, "hallucination_silence_threshold"),
    ({"suppress_tokens": "a"}, "suppress_tokens"),
    ({"suppress_tokens": [1.5]}, "suppress_tokens"),
    ({"suppress_tokens": [-2]}, "suppress_tokens"),
    ({"suppress_tokens": 5}, "suppress_tokens"),
    ({"carry_initial_prompt": "yes"}, "carry_initial_prompt"),
]


@pytest.mark.parametrize(("options", "named"), REFUSED)
def test_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(WhisperdError) as caught:
        parse_options(options)
    assert caught.value.code == ErrorCode.BAD_REQUEST
    assert named in caught.value.message


def test_a_prompt_is_refused_for_what_whispers_tokenizer_refuses_and_for_nothing_else() -> None:
    from whisper.tokenizer import get_encoding

    special = get_encoding("multilingual", num_languages=len(LANGUAGES)).special_tokens_set
    assert get_encoding("gpt2").special_tokens_set < special
    assert len(special) > 1600
    for token in special:
        with pytest.raises(WhisperdError, match="initial_prompt holds") as caught:
            parse_options({"initial_prompt": f"So it is.{token} And so it goes."})
        assert token in caught.value.message
    for prompt in ("<|0.01|>", "<|30.02|>", "<|010.00|>", "<|klingon|>", "<|EN|>", "<| en |>", "<|en>", "a < |b| > c"):
        get_encoding("multilingual", num_languages=len(LANGUAGES)).encode(prompt)
        assert parse_options({"initial_prompt": prompt})["initial_prompt"] == prompt


@given(st.dictionaries(st.sampled_from(sorted(DEFAULTS | OWN_DEFAULTS)), leaves | st.lists(leaves, max_size=4)))
def test_whatever_is_accepted_is_canonical(options: dict[str, Any]) -> None:
    try:
        parsed = parse_options(options)
    except WhisperdError as error:
        assert error.code == ErrorCode.BAD_REQUEST
    else:
        assert parsed.keys() == (DEFAULTS | OWN_DEFAULTS).keys()
        assert parse_options(parsed) == parsed
