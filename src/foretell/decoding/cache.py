"""A static key/value cache: allocated once, never moved.

A step writes its Q rows after the `length` tokens that are kept. Regular rows come first, so accepting a drafts is
`length += a + 1`: the rejected and the mask rows behind it are overwritten by the next step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


class StaticLayer(CacheLayerMixin):
    """Keys and values (B, H, capacity, D_head) of one layer; sliding windows keep all and are masked by position."""

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, not empty(): NaN in unwritten columns would leak through masked attention as 0 * NaN.
        self.keys, self.values = (
            torch.zeros((*states.shape[:2], self.capacity, states.shape[3]), dtype=states.dtype, device=states.device)
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes (B, H, Q, D_head) behind the kept tokens; returns views of all (B, H, length + Q, D_head)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        if end > self.keys.shape[2]:
            self._grow(end)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _grow(self, needed: int) -> None:
        """Doubles, for callers that could not foresee the length."""
        self.capacity = max(needed, 2 * self.keys.shape[2])
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = torch.zeros((*old.shape[:2], self.capacity, old.shape[3]), dtype=old.dtype, device=old.device)
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


class StaticCache(Cache):
    """One StaticLayer per block of the base; `keep(n)` makes the next n written rows part of the past."""

    def __init__(self, layers: int, capacity: int) -> None:
        super().__init__(layers=[StaticLayer(capacity) for _ in range(layers)])

    @property
    def length(self) -> int:
        """Tokens kept."""
        return self.layers[0].length

    def keep(self, rows: int) -> None:
        """Accepts the first `rows` rows of the last step."""
        for layer in self.layers:
            layer.length += rows
