"""What a model cannot do of what options ask: looked at when a job is submitted, and again before it is worked on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from whisperd.protocol.fields import bad_request
from whisperd.protocol.languages import LANGUAGES


def check_abilities(options: Mapping[str, Any], traits: Mapping[str, Any], name: str) -> None:
    """Raise `bad_request` for options (as `parse_options` returns them) that the model `name` cannot follow.

    `traits` are those of its `ModelStatus`.
    """
    language = options["language"]
    if language is not None and language not in list(LANGUAGES)[: traits["languages"]]:
        wanted = LANGUAGES[language].title()
        if not traits["multilingual"]:
            raise bad_request(
                f"model {name!r} knows English only, not {wanted}; leave language out, or ask for a multilingual model"
            )
        raise bad_request(f"model {name!r} does not know {wanted}; large-v3 does")
    if options["task"] == "translate" and not traits["translates"]:
        why = "was not trained to translate" if traits["multilingual"] else "knows English only"
        raise bad_request(f"model {name!r} cannot translate: it {why}; use task 'transcribe' or another model")
    vocabulary = traits["vocabulary"]
    tokens = [int(token) for token in options["suppress_tokens"].split(",") if token]
    if tokens and max(tokens) >= vocabulary:
        raise bad_request(
            f"options: suppress_tokens: {max(tokens)} is beyond the vocabulary of model {name!r} "
            f"(0 to {vocabulary - 1})"
        )
