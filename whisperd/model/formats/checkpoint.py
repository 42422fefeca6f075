"""Reads openai-whisper's own checkpoints: `dims` and `model_state_dict`, saved by torch."""

from __future__ import annotations

import base64
import gzip
import pickle
from pathlib import Path

import numpy as np
import torch
import whisper

from whisperd.model.formats.weights import Weights, unavailable


def read_checkpoint(path: Path, *, heads_of: str | None = None) -> Weights:
    """Return the weights of an openai-whisper checkpoint; `heads_of` is the listed model whose alignment heads it has.

    Raises `WhisperdError` (`model_unavailable`), saying what the file is instead.
    """
    mapped = _is_zip(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        # What torch says at length, people need in few words.
        raise unavailable(
            f"{path} cannot be loaded: it is no checkpoint of tensors alone ({str(error).splitlines()[0][:120]})"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, OSError, AttributeError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise unavailable(f"{path} cannot be loaded: it is no checkpoint, or a damaged one ({reason})") from None
    if not isinstance(checkpoint, dict) or not {"dims", "model_state_dict"} <= checkpoint.keys():
        raise unavailable(
            f"{path} is no openai-whisper checkpoint: it lacks 'dims' or 'model_state_dict' "
            "(a model of the transformers library is a folder: name that)"
        )
    heads = None
    dims = checkpoint["dims"]
    if heads_of is not None:
        mask = np.frombuffer(gzip.decompress(base64.b85decode(whisper._ALIGNMENT_HEADS[heads_of])), dtype=bool)
        layers, numbers = mask.reshape(dims["n_text_layer"], dims["n_text_head"]).nonzero()
        heads = list(zip(layers.tolist(), numbers.tolist(), strict=True))
    return Weights(dims=dims, state=checkpoint["model_state_dict"], alignment_heads=heads, mapped=mapped)


def _is_zip(path: Path) -> bool:
    # Checkpoints of torch before 1.6 are no zip archives and cannot be mapped.
    with path.open("rb") as file:
        return file.read(2) == b"PK"
