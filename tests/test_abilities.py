"""What a model cannot do is refused by name, from what its process tells of it."""

from __future__ import annotations

from typing import Any

import pytest

from whisperd.protocol.abilities import check_abilities
from whisperd.protocol.errors import ErrorCode, WhisperdError
from whisperd.protocol.options import parse_options

TRAITS: dict[str, dict[str, Any]] = {
    "tiny.en": {"multilingual": False, "languages": 1, "translates": False, "vocabulary": 51864},
    "base": {"multilingual": True, "languages": 99, "translates": True, "vocabulary": 51865},
    "large-v3": {"multilingual": True, "languages": 100, "translates": True, "vocabulary": 51866},
    "turbo": {"multilingual": True, "languages": 100, "translates": False, "vocabulary": 51866},
}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("tiny.en", {"language": "de"}, "'tiny.en' knows English only, not German"),
        ("tiny.en", {"language": "yue"}, "knows English only, not Cantonese"),
        ("tiny.en", {"task": "translate"}, "cannot translate: it knows English only"),
        ("tiny.en", {"suppress_tokens": "1,60000"}, "60000 is beyond the vocabulary"),
        ("base", {"language": "yue"}, "'base' does not know Cantonese"),
        ("base", {"suppress_tokens": [51865]}, "0 to 51864"),
        ("turbo", {"task": "translate"}, "was not trained to translate"),
    ],
)
def test_what_a_model_cannot_do(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(WhisperdError, match=words) as caught:
        check_abilities(parse_options(options), TRAITS[name], name)
    assert caught.value.code == ErrorCode.BAD_REQUEST


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in TRAITS),
        ("tiny.en", {"language": "en", "suppress_tokens": "-1,51863"}),
        ("base", {"language": "de", "task": "translate"}),
        ("base", {"language": "su", "suppress_tokens": "51864"}),
        ("large-v3", {"language": "yue", "task": "translate"}),
        ("turbo", {"language": "yue", "suppress_tokens": ""}),
    ],
)
def test_what_a_model_can_do(name: str, options: dict[str, Any]) -> None:
    check_abilities(parse_options(options), TRAITS[name], name)
