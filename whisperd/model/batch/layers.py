"""Linear layers on a CPU, by the library that multiplies with their matrix and the layout which that wants."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor], Tensor]

_ROWS_AT_ONCE = 1024  # of a matrix that is looked at: a copy of the whole would be the most memory of a start


def with_onednn(weight: Tensor, bias: Tensor | None, *, rows: int) -> Linear:
    """Return the layer for an x of mostly so many rows, in the type of the weight."""
    operation = torch.ops.mkldnn._linear_pointwise
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: operation(x, packed, bias, "none", [], "")


def _with_fbgemm(weight: Tensor, bias: Tensor | None) -> Linear:
    """Return the layer that reads its matrix in float16 and computes in float32.

    FBGEMM packs one number after the other, 25 ns each.
    """
    operation = torch.ops.quantized.linear_dynamic_fp16
    packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
    return lambda x: operation(x, packed)


def _is_half(weight: Tensor) -> bool:
    """True if float16 has every number of it. Not of infinite ones: FBGEMM makes them finite, in the weight itself."""
    return all(
        bool(rows.isfinite().all()) and torch.equal(rows, rows.half().float())
        for rows in torch.split(weight, _ROWS_AT_ONCE)
    )


class SettlingLinear:
    """A layer in float32 for an x of few rows, which waits for the memory that its matrix comes from.

    It works at once, with the matrix as it lies, and at its best from `settle` on. OpenAI publishes weights in float16:
    these are read as such then, and no number changes. Of other weights oneDNN has the layout.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, rows: int) -> None:
        """`rows` is how many rows x mostly has."""
        self._weight, self._bias, self._rows = weight, bias, rows
        self._apply: Linear = lambda x: F.linear(x, weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self._apply(x)

    def settle(self) -> None:
        """Lay the matrix out anew, once. For a thread of its own: others may call the layer meanwhile."""
        if "fbgemm" in torch.backends.quantized.supported_engines and _is_half(self._weight):
            self._apply = _with_fbgemm(self._weight, self._bias)
        else:
            self._apply = with_onednn(self._weight, self._bias, rows=self._rows)
        del self._weight
