"""Attention of a step, for bases whose query heads share keys and values in groups.

transformers copies keys and values once per query head of a group, in every layer, as soon as there is a mask and more
than one row; without a mask it asks PyTorch to share them, which on a CPU in bf16 takes longer than copying. Instead
the heads of a group are put one below the other, as if they were rows of one head: nothing of the past is copied, and
every head still sees what it saw.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from foretell.attention import attending_by

NAME = "foretell_grouped"  # among transformers' attention implementations


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (B, H, Q, D_head), key, value (B, H_kv, S, D_head), additive mask (B or 1, 1, Q, S) -> (B, Q, H, D_head).

    A single row needs no mask. What is beyond that (many rows without a mask, one per head, a position bias) goes to
    transformers' own sdpa attention.
    """
    batch, heads, rows, size = query.shape
    groups = heads // key.shape[1]
    biased = any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    apart = rows > 1 if attention_mask is None else attention_mask.shape[1] != 1
    if groups == 1 or biased or apart:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if query.requires_grad and query.device.type == "cpu":
        # A stacked mask would be kept for the backward in every layer; torch's kernel for the CPU knows groups itself.
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None
    stacked = query.reshape(batch, -1, groups * rows, size)
    mask = attention_mask
    if mask is not None and rows == 1:
        mask = mask.expand(-1, -1, groups, -1)
    elif mask is not None:
        mask = mask.expand(-1, groups, -1, -1).reshape(len(mask), 1, groups * rows, -1)
    out = F.scaled_dot_product_attention(stacked, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return out.view(batch, heads, rows, -1).transpose(1, 2).contiguous(), None


def can_group(lm: PreTrainedModel) -> bool:
    """Whether a base has groups of heads, runs on sdpa and takes other attention implementations."""
    config = lm.config.get_text_config()
    heads, shared = (getattr(config, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
    grouped = isinstance(heads, int) and isinstance(shared, int) and shared < heads
    return grouped and config._attn_implementation == "sdpa" and lm._can_set_attn_implementation()


def grouped(config: PreTrainedConfig) -> AbstractContextManager[None]:
    """Within this context the base of that text configuration attends by `grouped_attention`."""
    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return attending_by(config, NAME)
