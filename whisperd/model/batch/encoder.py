"""The encoder, a block at a time, so that nothing has to wait for a whole window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from whisper.model import AudioEncoder, MultiHeadAttention, ResidualAttentionBlock

from whisperd.model.batch.kernels import Kernels
from whisperd.model.batch.layers import Linear
from whisperd.model.batch.pieces import Pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    norm: Linear
    qkv: Linear
    out: Linear
    mlp_norm: Linear
    mlp_in: Linear
    mlp_out: Linear


class Encoder:
    """openai-whisper's encoder for one window at a time (on a CPU batches are slower: 550 ms alone, 608 in a batch)."""

    def __init__(
        self,
        encoder: AudioEncoder,
        kernels: Kernels,
        *,
        heads: int,
        packed: Callable[[ResidualAttentionBlock], None] = lambda block: None,
    ) -> None:
        """`packed` is called with each block whose weights are not needed any more."""
        self._kernels = kernels
        self._heads = heads
        self._conv1, self._conv2 = encoder.conv1, encoder.conv2
        self._positions = encoder.positional_embedding.detach()
        self._norm = kernels.norm(encoder.ln_post)
        self._blocks: list[_Block] = []
        for block in encoder.blocks:
            self._blocks.append(_pack(block, kernels, rows=len(self._positions)))
            packed(block)

    def encode(self, mel: Tensor) -> Pieces[Tensor]:
        """Compute a block at each `next`; return the features `(n_audio_ctx, n_audio_state)` of a mel `(n_mels, 3000)`.

        Every step of it wants `torch.inference_mode`.
        """
        x = self._kernels.send(mel, self._kernels.compute)[None]
        x = F.gelu(self._conv2(F.gelu(self._conv1(x))))[0].T
        # Laid out anew, once: sums keep the layout of what they add to, and every layer would have to copy.
        x = (x.contiguous() + self._positions).to(self._kernels.stream)
        yield
        for block in self._blocks:
            q, k, v = block.qkv(block.norm(x)).view(len(x), 3, self._heads, -1).permute(1, 2, 0, 3)
            attention = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
            x = x + block.out(attention.transpose(0, 1).flatten(1))
            x = x + block.mlp_out(F.gelu(block.mlp_in(block.mlp_norm(x))))
            yield
        return self._norm(x)


def _pack(block: ResidualAttentionBlock, kernels: Kernels, *, rows: int) -> _Block:
    weight, bias = fused_qkv(block.attn)
    return _Block(
        norm=kernels.norm(block.attn_ln),
        qkv=kernels.linear(weight, bias, rows=rows),
        out=kernels.linear(block.attn.out.weight, block.attn.out.bias, rows=rows),
        mlp_norm=kernels.norm(block.mlp_ln),
        mlp_in=kernels.linear(block.mlp[0].weight, block.mlp[0].bias, rows=rows),
        mlp_out=kernels.linear(block.mlp[2].weight, block.mlp[2].bias, rows=rows),
    )


def fused_qkv(attention: MultiHeadAttention) -> tuple[Tensor, Tensor]:
    """Return weight and bias of query, key and value as one layer. openai-whisper's keys have no bias: zeros."""
    query, key, value = attention.query, attention.key, attention.value
    weight = torch.cat([query.weight, key.weight, value.weight])
    return weight, torch.cat([query.bias, torch.zeros_like(query.bias), value.bias])
