"""The one place where a CPU and a GPU compute differently: how a matrix is laid out, and in which types."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Linear = Callable[[Tensor], Tensor]


class Kernels:
    """Makes the layers of a model for one device.

    `compute` is the type of matrices and caches of weights, `stream` the type of what flows between layers and of
    attention. They differ on a CPU in bfloat16 alone: its matrix products are twice as fast as float32's, but its
    attention of one query 3.4 times as slow.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.compute = dtype
        self.stream = torch.float32 if device.type == "cpu" else dtype
        # oneDNN's own weight layout: the logits of 8 rows of base take 4.5 instead of 15 ms.
        self._packs = device.type == "cpu" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]

    @property
    def encodes_beside_steps(self) -> bool:
        """True where an encoder block between steps costs the rows little: a GPU waits for launches in both."""
        return self.device.type != "cpu"

    def linear(self, weight: Tensor, bias: Tensor | None, *, rows: int) -> Linear:
        """Return the layer `x -> x @ weight.T + bias`; `rows` is how many rows x mostly has."""
        weight = weight.detach().to(self.device, self.compute).contiguous()
        bias = None if bias is None else bias.detach().to(self.device, self.compute).contiguous()
        if self._packs:
            return self._packed(weight, bias, rows)
        return lambda x: F.linear(x, weight, bias)

    def _packed(self, weight: Tensor, bias: Tensor | None, rows: int) -> Linear:
        operation = torch.ops.mkldnn._linear_pointwise
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        if self.compute is torch.float32:
            return lambda x: operation(x, packed, bias, "none", [], "")
        return lambda x: operation(x.to(self.compute), packed, bias, "none", [], "").float()

    @property
    def turns_windows(self) -> bool:
        """True where `listen` wants keys and values with the positions last: a CPU reads them 1.5 times as fast so."""
        return self.device.type == "cpu"

    def listen(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the attention of few queries `(..., queries, width)` over many positions, none of them masked.

        PyTorch's own attention on a CPU is made for as many queries as keys: for one it takes 2.1 ms a layer (8 windows
        of tiny.en), two products and a softmax take 1.1.
        """
        if not self.turns_windows:
            return F.scaled_dot_product_attention(query, keys, values)
        scores: Tensor = (query * query.shape[-1] ** -0.5) @ keys
        return scores.softmax(-1) @ values.transpose(-1, -2)

    def norm(self, norm: nn.LayerNorm) -> Linear:
        """Return the layer norm, computed in float32 as openai-whisper does."""
        shape, eps = norm.normalized_shape, norm.eps
        weight, bias = norm.weight.detach().to(self.device), norm.bias.detach().to(self.device)
        return lambda x: F.layer_norm(x.float(), shape, weight, bias, eps).to(x.dtype)
