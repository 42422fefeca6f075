"""What any kind of model file is turned into."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from whisperd.protocol.errors import ErrorCode, WhisperdError


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """openai-whisper's dimensions and state dict.

    `alignment_heads` are (layer, head) pairs, or None where the file names none. `mapped` if all of the state lies in a
    mapped file, which is read where it is looked at.
    """

    dims: dict[str, int]
    state: dict[str, torch.Tensor]
    alignment_heads: list[tuple[int, int]] | None
    mapped: bool = False


def unavailable(message: str) -> WhisperdError:
    """Return the error that a model which cannot be had ends with; `message` says why and what to do."""
    return WhisperdError(ErrorCode.MODEL_UNAVAILABLE, message)


def cannot_load(folder: object, what: str) -> WhisperdError:
    """Return the error of a file or folder that holds no usable model."""
    return unavailable(f"{folder} cannot be loaded: {what}")
