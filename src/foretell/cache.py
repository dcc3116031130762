"""A ragged static key/value cache: allocated once, one length per row, never moved.

A step writes its Q rows after the tokens that each sequence keeps. Regular rows come first, so accepting a drafts is
`length += a + 1`: the rejected and the mask rows behind it are overwritten by the next step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


class Places:
    """Where a step's rows go, worked out once for all layers."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths  # the cache's own list: one count per sequence
        self._key: tuple[object, ...] = ()
        self._index: Tensor | None = None

    def index(self, states: Tensor, rows: int) -> Tensor:
        """(B * H * rows,) int64: of the new rows of all sequences among those of `states` (.., H, capacity, D_head)."""
        heads, capacity = states.shape[1:3]
        key = (heads, capacity, rows, *self.lengths)
        if self._index is None or key != self._key:
            columns = torch.tensor(self.lengths)[:, None, None] + torch.arange(rows)
            first = torch.arange(len(self.lengths) * heads).view(-1, heads, 1) * capacity
            self._key, self._index = key, (first + columns).flatten().to(states.device)
        return self._index


class StaticLayer(CacheLayerMixin):
    """Keys and values (B, H, capacity, D_head) of one layer; sliding windows keep all and are masked by position."""

    is_sliding = False

    def __init__(self, places: Places, capacity: int) -> None:
        super().__init__()
        self.places, self.lengths = places, places.lengths  # the cache's own, the same for every layer
        self.capacity = capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, not empty(): NaN in unwritten columns would leak through masked attention as 0 * NaN.
        self.keys, self.values = (
            torch.zeros((*states.shape[:2], self.capacity, states.shape[3]), dtype=states.dtype, device=states.device)
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes (B, H, Q, D_head) behind the kept tokens of each row; returns views (B, H, longest + Q, D_head)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, rows = key_states.shape[0], key_states.shape[2]
        end = self.get_seq_length() + rows
        if end > self.keys.shape[2]:
            self._grow(end)
        if min(self.lengths) == max(self.lengths):
            self.keys[:batch, :, end - rows : end] = key_states
            self.values[:batch, :, end - rows : end] = value_states
        else:
            index = self.places.index(self.keys, rows)
            for states, new in ((self.keys, key_states), (self.values, value_states)):
                states.view(-1, states.shape[3]).index_copy_(0, index, new.reshape(-1, states.shape[3]))
        return self.keys[:batch, :, :end], self.values[:batch, :, :end]

    def room(self, end: int, heads: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B or more, heads, capacity, size) with room up to column `end`, of the dtype of `like` if
        there were none yet. Whoever writes into them does what `update` would."""
        if not self.is_initialized:
            none = like.new_empty(len(self.lengths), heads, 0, size)
            self.lazy_initialization(none, none)
        if end > self.keys.shape[2]:
            self._grow(end)
        return self.keys, self.values

    def _grow(self, needed: int) -> None:
        """Doubles, for callers that could not foresee the length."""
        kept, self.capacity = self.keys.shape[2], max(needed, 2 * self.keys.shape[2])
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = torch.zeros((*old.shape[:2], self.capacity, old.shape[3]), dtype=old.dtype, device=old.device)
            new[:, :, :kept] = old
            setattr(self, name, new)

    def move(self, source: int, target: int) -> None:
        """Copies the kept tokens of row `source` over row `target`."""
        length = self.lengths[source]
        for states in (self.keys, self.values):
            if states is not None:
                states[target, :, :length] = states[source, :, :length]

    def join(self, other: StaticLayer, lengths: Sequence[int]) -> None:
        """Copies the kept tokens of the rows of `other` behind the rows in use, of which there must have been more."""
        if other.keys is None:  # prompts of one token: there is nothing to copy
            return
        if max(lengths) > self.keys.shape[2]:
            self._grow(max(lengths))
        first = len(self.lengths)
        for states, new in ((self.keys, other.keys), (self.values, other.values)):
            for row, length in enumerate(lengths):
                states[first + row, :, :length] = new[row, :, :length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return max(self.lengths)

    def get_max_length(self) -> int:
        return -1


class StaticCache(Cache):
    """One StaticLayer per block of the base, and `lengths`: tokens kept of each sequence."""

    def __init__(self, layers: int, capacity: int, batch: int = 1) -> None:
        self.lengths = [0] * batch
        places = Places(self.lengths)
        super().__init__(layers=[StaticLayer(places, capacity) for _ in range(layers)])

    def keep(self, rows: Sequence[int]) -> None:
        """Accepts the first `rows[b]` rows of the last step of sequence b."""
        for sequence, count in enumerate(rows):
            self.lengths[sequence] += count

    def leave(self, sequence: int) -> None:
        """Takes a finished sequence out; the last one moves into its place, the only copy of a past there ever is."""
        last = len(self.lengths) - 1
        if sequence != last:
            for layer in self.layers:
                layer.move(last, sequence)
            self.lengths[sequence] = self.lengths[last]
        self.lengths.pop()

    def join(self, other: StaticCache) -> None:
        """Takes in the sequences of another cache, in the rows of such as have left."""
        for layer, new in zip(self.layers, other.layers, strict=True):
            layer.join(new, other.lengths)
        self.lengths += other.lengths  # in place: the layers hold the same list
