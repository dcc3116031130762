"""The model: a frozen base, its mask vectors, gated adapter and sampler head, and one forward over a layout."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from foretell.attention import AttentionMask, additive, attention_mask, is_windowed
from foretell.base import Base
from foretell.config import MTPConfig
from foretell.errors import ForetellError
from foretell.gated_lora import GatedLoRA, adapted_linears
from foretell.layout import Layout
from foretell.sampler import SamplerHead
from foretell.support import check_supported, self_test


class MTPModel(nn.Module):
    """Multi-token prediction on a frozen base (method.md sections 1 to 3).

    `base` is wrapped, not changed: with the gate closed its forwards are the base's own. Parameters of ours are
    `mask_vectors` (k, E), `adapter` and `sampler`: fp32 while training, in the base's dtype after `for_inference`.

    Raises ForetellError if the base can't be supported.
    """

    def __init__(self, base: Base, config: MTPConfig, tokenizer: Any = None, *, check: bool = True) -> None:
        super().__init__()
        if check:
            check_supported(base)
            self_test(base)
        self.base = base
        self.config = config
        self.tokenizer = tokenizer
        self.provenance: dict[str, Any] = {}
        mean, std = base.embedding_statistics()
        if config.masks_init == "mean":
            vectors = mean.cpu() + torch.randn(config.masks, base.d_embedding) * std * 0.1
        else:
            vectors = torch.randn(config.masks, base.d_embedding) * std
        self.mask_vectors = nn.Parameter(vectors, requires_grad=config.masks_trainable)
        self.adapter = GatedLoRA(
            adapted_linears(base.blocks), config.rank, config.alpha, gated=config.adapter == "gated"
        )
        self.sampler: SamplerHead | None = None
        if config.sampler != "none":
            self.sampler = SamplerHead(base.d_model, base.d_embedding, residual=config.sampler == "residual")
        self.own_modules_to(device=base.device)

    def own_modules_to(self, **kwargs: Any) -> None:
        """Moves or casts our parameters, never the base's."""
        for module in (self.adapter, self.sampler):
            if module is not None:
                module.to(**kwargs)
        self.mask_vectors.data = self.mask_vectors.data.to(**kwargs)

    def for_inference(self) -> MTPModel:
        """Casts our parameters to the base's dtype and freezes them; returns self."""
        self.own_modules_to(device=self.base.device, dtype=self.base.dtype)
        self.requires_grad_(False)
        return self.eval()

    def own_parameters(self) -> dict[str, Tensor]:
        """The parameters foretell adds, by name: what a checkpoint holds."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("base.")}

    @property
    def max_masks(self) -> int:
        """k: masks per block that the adapter was trained with."""
        return self.config.masks

    def step_embeddings(self, ids: Tensor, layout: Layout) -> Tensor:
        """ids (B, R) int64 -> (B, Q, E): regular tokens, then the mask vector of every mask row."""
        regular = self.base.embed(ids)
        if not layout.masks:
            return regular
        rows = self.mask_vectors[_mask_numbers(layout, self.base.device)].to(regular.dtype)
        return torch.cat([regular, rows.expand(ids.shape[0], -1, -1)], dim=1)

    def step(self, ids: Tensor, layout: Layout, cache: Cache, cached: int) -> Tensor:
        """One forward of a layout after `cached` tokens: ids (B, R) -> z (B, Q, D).

        The cache then holds Q more rows per sequence; the caller keeps the accepted ones.
        """
        if ids.shape[1] != layout.regular:
            raise ForetellError(f"a layout of {layout.regular} regular tokens was given {ids.shape[1]}")
        positions = (_position_offsets(layout, self.base.device) + cached).expand(ids.shape[0], -1)
        mask = self.step_mask(layout, cached, ids.shape[0])
        with self.adapter.open(layout.regular, layout.width) if layout.masks else nullcontext():
            return self.base.latents(self.step_embeddings(ids, layout), positions, mask, cache)

    def step_mask(self, layout: Layout, cached: int, batch: int) -> AttentionMask:
        """The additive mask (B, 1, Q, cached + Q) of a step, per layer type where the base wants it."""
        device, dtype = self.base.device, self.base.dtype
        if not is_windowed(self.base.text_config):
            mask = nn.functional.pad(_additive_visible(layout, device, dtype), (cached, 0)).expand(batch, 1, -1, -1)
            types = getattr(self.base.text_config, "layer_types", None)
            return mask if types is None else dict.fromkeys(types, mask)
        new = _position_offsets(layout, device) + cached
        keys = torch.cat([torch.arange(cached, device=device), new])
        visible = nn.functional.pad(layout.visible.to(device), (cached, 0), value=True)
        return attention_mask(
            visible.expand(batch, -1, -1), new.expand(batch, -1), keys.expand(batch, -1), self.base.text_config, dtype
        )

    def prefill(self, ids: Tensor, cache: Cache) -> Tensor:
        """Plain causal forward of a prompt (B, n) into the cache, gate closed -> z (B, n, D)."""
        return self.base.latents(self.base.embed(ids), cache=cache)


# A layout's tensors on a device: a handful of layouts recur at every step, so they are copied and converted once.
@lru_cache(maxsize=512)
def _mask_numbers(layout: Layout, device: torch.device) -> Tensor:
    return layout.mask_numbers.to(device)


@lru_cache(maxsize=512)
def _position_offsets(layout: Layout, device: torch.device) -> Tensor:
    return layout.position_offsets.to(device)


@lru_cache(maxsize=512)
def _additive_visible(layout: Layout, device: torch.device, dtype: torch.dtype) -> Tensor:
    return additive(layout.visible, dtype).to(device)
