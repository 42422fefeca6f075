"""Number formats that a processor has no instructions for, computed all the same: what they do to the words."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whisper.model import Conv1d, Linear

from whisperd.model.batch.kernels import Kernels
from whisperd.model.batch.layers import Linear as Layer
from whisperd.model.loading import DTYPES, LoadedModel, choose_device, choose_dtype, load
from whisperd.protocol.errors import WhisperdError


class Rounding(Kernels):
    """Gives the numbers that a processor with the format gives: operands and outcome rounded to it, sums in float32.

    How long that takes says nothing.
    """

    def linear(self, weight: Tensor, bias: Tensor | None, *, rows: int) -> Layer:
        wide = weight.detach().to(self.compute).float()
        wide_bias = None if bias is None else bias.detach().to(self.compute).float()
        return lambda x: F.linear(x.to(self.compute).float(), wide, wide_bias).to(self.compute).float()


def load_as(setting: str, folder: Path, *, device: str, dtype: str) -> tuple[LoadedModel, Kernels | None]:
    """Return the model, and what has to stand in for the engine's own kernels, or None.

    What the engine refuses to compute on a CPU is rounded there.
    """

    def loaded(kind: str) -> LoadedModel:
        return load(setting, cache_dir=folder, device=device, dtype=kind, on_step=lambda: None, environ=os.environ)

    place = choose_device(device)
    try:
        choose_dtype(dtype, place)
    except WhisperdError:
        model = replace(loaded("float32"), dtype=DTYPES[dtype])
        for module in model.whisper.modules():
            if isinstance(module, Linear | Conv1d | nn.Embedding):
                module.to(model.dtype)
        return model, Rounding(place, model.dtype)
    return loaded(dtype), None


def is_reduced(model: LoadedModel) -> bool:
    """True where the model computes in fewer bits than float32 has."""
    return model.dtype is not torch.float32
