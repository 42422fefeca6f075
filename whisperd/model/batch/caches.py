"""Keys and values of attention, in slots: the first n are in use, so a step reads them without gathering anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Cache:
    """For each layer keys and values of the shape `(slots, heads, length, width)`; where `turned`, length is last.

    Used twice: what a row has said (length is the text context), and what a window's audio offers (the audio context;
    all candidates of a window share one slot). Slots grow as they are asked for. `zeros` makes tensors of a shape.
    """

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        length: int,
        width: int,
        slots: int,
        zeros: Callable[..., Tensor],
        turned: bool = False,
    ) -> None:
        self.length = length
        self.generation = 0  # goes up when the tensors are others
        self._turned = turned
        self._shape = (heads, width, length) if turned else (heads, length, width)
        self._make_zeros = zeros
        # Zeros and not what lay there: a masked position counts nothing, but nothing times NaN is NaN.
        self.keys = [self._zeros(slots) for _ in range(layers)]
        self.values = [self._zeros(slots) for _ in range(layers)]

    @property
    def slots(self) -> int:
        # Of all layers: memory may have run out in the middle of a resize.
        return min(len(tensor) for tensor in (*self.keys, *self.values))

    def resize(self, slots: int, *, used: int) -> None:
        """Make it so many slots, a layer at a time; the first `used` keep what they hold."""
        self.generation += 1
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                if len(old) == slots:
                    continue
                new = self._zeros(slots)
                new[:used] = old[:used]
                tensors[layer] = new

    def put(self, layer: int, slot: int, keys: Tensor, values: Tensor) -> None:
        """Fill a slot's first positions with keys and values `(heads, positions, width)`; all where `turned`."""
        for tensors, new in ((self.keys, keys), (self.values, values)):
            if self._turned:
                tensors[layer][slot] = new.transpose(-1, -2)
            else:
                tensors[layer][slot, :, : new.shape[1]] = new

    def swap(self, one: int, other: int) -> None:
        """Let two slots have each other's keys and values. Where memory is short nothing has changed."""
        spare = torch.empty_like(self.keys[0][one])
        for tensor in (*self.keys, *self.values):
            spare.copy_(tensor[one])
            tensor[one] = tensor[other]
            tensor[other] = spare

    def copy(self, pairs: Sequence[tuple[int, int]], length: int | None = None) -> None:
        """Copy each (source, target) pair of slots; no target is a source too.

        `length` is how many positions, from the first; all of them by default, and always where `turned`.
        """
        if not pairs:
            return
        if len(pairs) == 1:
            ((source, target),) = pairs
            for tensor in (*self.keys, *self.values):
                tensor[target, :, :length] = tensor[source, :, :length]
            return
        sources, targets = torch.tensor(pairs, device=self.keys[0].device).T
        for tensor in (*self.keys, *self.values):
            part = tensor[:, :, :length]
            part.index_copy_(0, targets, part.index_select(0, sources))

    def clear(self, slot: int) -> None:
        """Let a slot hold zeros again."""
        for tensor in (*self.keys, *self.values):
            tensor[slot] = 0

    def spread(self, source: int, targets: slice, length: int) -> None:
        """Copy the first positions of a slot to neighbouring ones."""
        if targets.start < targets.stop:
            for tensor in (*self.keys, *self.values):
                tensor[targets, :, :length] = tensor[source, :, :length]

    def _zeros(self, slots: int) -> Tensor:
        return self._make_zeros(slots, *self._shape)
