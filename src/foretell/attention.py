"""Attention masks in the form each base wants, from who-sees-whom and positions.

A ready 4-D mask is used by transformers as it is. We give the additive form (0 and the dtype's minimum): sdpa takes it
as well as a boolean one, eager attention takes only it, and sdpa would convert a boolean mask in every layer. Only
FlexAttention gets block masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

AttentionMask = Tensor | dict[str, Tensor]

FLEX = "flex_attention"  # among transformers' attention implementations
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


def window_kinds(config: PretrainedConfig) -> dict[str | None, tuple[str, int] | None]:
    """Layer type -> (kind, size) of its attention window, None for none; the key None stands for every layer.

    transformers' own rule: models whose configuration has `layer_types` take a dict of masks, one per type; the others
    take one mask, windowed when `sliding_window` is set.
    """
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    if not hasattr(text, "layer_types"):
        return {None: (SLIDING, window) if window else None}
    sizes: dict[str, Any] = {SLIDING: window, CHUNKED: getattr(text, "attention_chunk_size", None)}
    kinds = dict.fromkeys(text.layer_types)
    return {kind: (kind, sizes[kind]) if sizes.get(kind) else None for kind in kinds}


def attention_mask(
    visible: Tensor, query_positions: Tensor, key_positions: Tensor, config: PretrainedConfig, dtype: torch.dtype
) -> AttentionMask:
    """Additive masks (B, 1, Q, S): 0 where a row may look, the dtype's minimum elsewhere. For flex `block_mask`s.

    visible (B, Q, S) bool; query_positions (B, Q) and key_positions (B, S) int64: windows go by position, not by
    column. Never -inf: a row that sees nothing would turn NaN, and NaN spreads.
    """
    masks: dict[str | None, Tensor] = {}
    for key, window in window_kinds(config).items():
        seen = visible
        if window is not None:
            kind, size = window
            query, cached = query_positions[:, :, None], key_positions[:, None, :]
            near = query - cached < size if kind == SLIDING else query // size == cached // size
            seen = visible & near
        flex = config.get_text_config()._attn_implementation == FLEX
        masks[key] = block_mask(seen) if flex else additive(seen, dtype)[:, None]
    return masks[None] if None in masks else {str(key): mask for key, mask in masks.items()}


@contextmanager
def attending_by(config: PretrainedConfig, implementation: str) -> Iterator[None]:
    """Within this context the base of that text configuration attends by one of transformers' implementations."""
    before = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """bool -> 0 where true, the dtype's minimum where false."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def block_mask(seen: Tensor) -> Any:
    """seen (B, Q, S) bool -> torch's BlockMask of it for FlexAttention, for all heads."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return seen[batch, row, column]

    batch, rows, columns = seen.shape
    return create_block_mask(sees, batch, None, rows, columns, device=seen.device)


def is_windowed(config: PretrainedConfig) -> bool:
    """Whether any layer limits how far back it looks."""
    return any(window is not None for window in window_kinds(config).values())
