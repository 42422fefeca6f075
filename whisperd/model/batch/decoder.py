"""The decoder: one step of all rows; and a layer at a time, the prompt of one window, or a text without caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from whisper.model import ResidualAttentionBlock, TextDecoder

from whisperd.model.batch.caches import Cache
from whisperd.model.batch.encoder import fused_qkv
from whisperd.model.batch.kernels import Kernels
from whisperd.model.batch.layers import Linear
from whisperd.model.batch.pieces import Pieces

_ROWS = 8  # what the layers are laid out for; other numbers work too

Attend = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    norm: Linear
    qkv: Linear
    out: Linear
    cross_norm: Linear
    cross_query: Linear
    cross_kv: Linear
    cross_out: Linear
    mlp_norm: Linear
    mlp_in: Linear
    mlp_out: Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Which rows listen to which window, where that is not simply row n to window n.

    `rows` is `(windows, most rows of a window)`, filled up with any row; `places` says where in it each row stands.
    """

    rows: Tensor
    places: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt that was read: the logits `(len(read_at), vocabulary)` that were asked for, in float32.

    `said` has each layer's keys and values of its tokens, `(heads, len(tokens), width)`, for a row's slot.
    """

    logits: Tensor
    said: list[tuple[Tensor, Tensor]]


class Decoder:
    """openai-whisper's decoder on caches of our own. All methods want `torch.inference_mode`, so does every `next`."""

    def __init__(self, decoder: TextDecoder, kernels: Kernels, *, heads: int, audio_positions: int) -> None:
        self._kernels = kernels
        self._heads = heads
        self._audio_positions = audio_positions
        self._embeddings: Tensor = decoder.token_embedding.weight.detach()
        self._positions: Tensor = decoder.positional_embedding.detach()
        self.vocabulary: int = self._embeddings.shape[0]
        self.width: int = self._embeddings.shape[1]
        self._norm = kernels.norm(decoder.ln)
        self._logits = kernels.linear(self._padded_embeddings(), None, rows=_ROWS)
        self._blocks = [_pack(block, kernels, audio_positions) for block in decoder.blocks]

    @property
    def row_bytes(self) -> int:
        """What a row costs."""
        return self._bytes(len(self._positions))

    @property
    def window_bytes(self) -> int:
        """What a window costs, besides its rows."""
        return self._bytes(self._audio_positions)

    def row_cache(self, slots: int) -> Cache:
        """Return a cache for what rows have said."""
        return self._cache(len(self._positions), slots, turned=False)

    def window_cache(self, slots: int) -> Cache:
        """Return a cache for what windows offer."""
        return self._cache(self._audio_positions, slots, turned=self._kernels.turns_windows)

    def step(
        self, tokens: Tensor, positions: Sequence[int], rows: Cache, windows: Cache, routing: Routing | None
    ) -> Tensor:
        """Feed each of the first rows its token at its position; return `(rows, vocabulary)` float32 logits."""
        at, length = self._kernels.send(positions), max(positions) + 1
        return self.step_at(tokens, at, rows, windows, routing, length=length, masked=min(positions) + 1 < length)

    def step_at(
        self,
        tokens: Tensor,
        at: Tensor,
        rows: Cache,
        windows: Cache,
        routing: Routing | None,
        *,
        length: int,
        masked: bool,
    ) -> Tensor:
        """As `step`, with nothing that depends on what `tokens` and `at`, their positions, hold.

        A row attends to the first `length` positions, of which those behind its own are masked if `masked`.
        """
        device, count = self._kernels.device, len(tokens)
        each = torch.arange(count, device=device)
        mask = None
        if masked:
            beyond = torch.arange(length, device=device) > at[:, None]
            mask = torch.zeros(beyond.shape, dtype=self._kernels.stream, device=device)
            mask = mask.masked_fill_(beyond, -torch.inf)[:, None, None]

        def attend(layer: int, qkv: Tensor) -> Tensor:
            q, k, v = qkv.view(count, 3, self._heads, -1).unbind(1)
            keys, values = rows.keys[layer], rows.values[layer]
            keys[each, :, at] = k
            values[each, :, at] = v
            return F.scaled_dot_product_attention(
                q[:, :, None], keys[:count, :, :length], values[:count, :, :length], attn_mask=mask
            ).reshape(count, -1)

        def listen(layer: int, query: Tensor) -> Tensor:
            q = query.view(count, self._heads, 1, -1)
            if routing is not None:
                q = q[routing.rows, :, 0].transpose(1, 2)
            heard = self._kernels.listen(q, windows.keys[layer][: len(q)], windows.values[layer][: len(q)])
            if routing is not None:
                heard = heard.transpose(1, 2).flatten(0, 1)[routing.places]
            return heard.reshape(count, -1)

        x = self._embed(tokens, at)
        for layer in range(len(self._blocks)):
            x = self._layer(layer, x, attend, listen)
        return self._read(x)

    def begin(
        self,
        tokens: Sequence[int],
        read_at: Sequence[int],
        features: Tensor,
        offer: Callable[[int, Tensor, Tensor], None],
    ) -> Pieces[Prompt]:
        """Read a prompt against a window's features, a layer at each `next`; the logits are those behind `read_at`.

        `offer` gets each layer's keys and values of the audio, `(heads, audio positions, width)`.
        """
        said: list[tuple[Tensor, Tensor]] = []

        def attend(layer: int, qkv: Tensor) -> Tensor:
            return self._attend_causally(qkv, said)

        def listen(layer: int, query: Tensor) -> Tensor:
            keys, values = self._offer(layer, features)
            offer(layer, keys, values)
            # Not from the cache: it is laid out for few queries, and a prompt has hundreds.
            return _join(F.scaled_dot_product_attention(self._split(query)[None], keys[None], values[None])[0])

        x = yield from self._through(self._embed_from_start(tokens), attend, listen, read_at=read_at)
        return Prompt(logits=self._read(x), said=said)

    def read_through(
        self, tokens: Sequence[int], features: Tensor, on_weights: Callable[[int, Tensor], None] | None = None
    ) -> Pieces[Tensor]:
        """Read a whole text, a layer at each `next`; return the logits behind each token.

        They are `(len(tokens), vocabulary)`, float32.

        `on_weights` gets, of each layer, how much each token wants each moment of the audio: before the softmax,
        `(heads, len(tokens), audio positions)` float32, computed as openai-whisper does for word times.
        """

        def listen(layer: int, query: Tensor) -> Tensor:
            q, (keys, values) = self._split(query), self._offer(layer, features)
            if on_weights is None:
                return _join(F.scaled_dot_product_attention(q[None], keys[None], values[None])[0])
            scale = q.shape[-1] ** -0.25
            wanted = ((q * scale) @ (keys * scale).transpose(-1, -2)).float()
            on_weights(layer, wanted)
            return _join(F.softmax(wanted, dim=-1).to(q.dtype) @ values)

        x = self._embed_from_start(tokens)
        x = yield from self._through(x, lambda layer, qkv: self._attend_causally(qkv), listen)
        return self._read(x)

    def _through(
        self, x: Tensor, attend: Attend, listen: Attend, *, read_at: Sequence[int] | None = None
    ) -> Pieces[Tensor]:
        """Return what comes out of the last layer for each token, or for those at `read_at` alone."""
        last = len(self._blocks) - 1
        for layer in range(len(self._blocks)):
            x = self._layer(layer, x, attend, listen, read_at=read_at if layer == last else None)
            yield
        return x

    def _layer(
        self, layer: int, x: Tensor, attend: Attend, listen: Attend, *, read_at: Sequence[int] | None = None
    ) -> Tensor:
        block = self._blocks[layer]
        attended = attend(layer, block.qkv(block.norm(x)))
        if read_at is not None:  # from here on nothing is kept of the others
            at = self._kernels.send(read_at)
            x, attended = x[at], attended[at]
        x = x + block.out(attended)
        x = x + block.cross_out(listen(layer, block.cross_query(block.cross_norm(x))))
        return x + block.mlp_out(F.gelu(block.mlp_in(block.mlp_norm(x))))

    def _embed_from_start(self, tokens: Sequence[int]) -> Tensor:
        return self._embed(self._kernels.send(tokens), torch.arange(len(tokens), device=self._kernels.device))

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return (self._embeddings[tokens] + self._positions[positions]).to(self._kernels.stream)

    def _read(self, x: Tensor) -> Tensor:
        logits: Tensor = self._logits(self._norm(x))[:, : self.vocabulary].float()
        return logits

    def _attend_causally(self, qkv: Tensor, said: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        q, k, v = (self._split(part) for part in qkv.chunk(3, dim=-1))
        if said is not None:
            said.append((k, v))
        return _join(F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0])

    def _offer(self, layer: int, features: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._blocks[layer].cross_kv(features).chunk(2, dim=-1)
        return self._split(keys), self._split(values)

    def _split(self, x: Tensor) -> Tensor:
        """`(length, heads * width)` to `(heads, length, width)`."""
        return x.view(*x.shape[:-1], self._heads, -1).transpose(0, 1)

    def _cache(self, length: int, slots: int, *, turned: bool) -> Cache:
        return Cache(
            layers=len(self._blocks),
            heads=self._heads,
            length=length,
            width=self.width // self._heads,
            slots=slots,
            zeros=self._kernels.zeros,
            turned=turned,
        )

    def _bytes(self, length: int) -> int:
        return 2 * len(self._blocks) * length * self.width * self._kernels.stream.itemsize

    def _padded_embeddings(self) -> Tensor:
        missing = -self.vocabulary % self._kernels.rows_multiple
        return F.pad(self._embeddings, (0, 0, 0, missing)) if missing else self._embeddings


def _join(x: Tensor) -> Tensor:
    """`(heads, length, width)` to `(length, heads * width)`."""
    return x.transpose(0, 1).flatten(1)


def _pack(block: ResidualAttentionBlock, kernels: Kernels, audio_positions: int) -> _Block:
    cross = block.cross_attn
    kv_weight = torch.cat([cross.key.weight, cross.value.weight])
    kv_bias = torch.cat([torch.zeros_like(cross.value.bias), cross.value.bias])
    weight, bias = fused_qkv(block.attn)
    return _Block(
        norm=kernels.norm(block.attn_ln),
        qkv=kernels.linear(weight, bias, rows=_ROWS),
        out=kernels.linear(block.attn.out.weight, block.attn.out.bias, rows=_ROWS),
        cross_norm=kernels.norm(block.cross_attn_ln),
        cross_query=kernels.linear(cross.query.weight, cross.query.bias, rows=_ROWS),
        cross_kv=kernels.linear(kv_weight, kv_bias, rows=audio_positions),
        cross_out=kernels.linear(cross.out.weight, cross.out.bias, rows=_ROWS),
        mlp_norm=kernels.norm(block.mlp_ln),
        mlp_in=kernels.linear(block.mlp[0].weight, block.mlp[0].bias, rows=_ROWS),
        mlp_out=kernels.linear(block.mlp[2].weight, block.mlp[2].bias, rows=_ROWS),
    )
