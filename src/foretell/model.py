"""The model: a frozen base, its mask vectors, gated adapter and sampler head, and one forward over a layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import Cache

from foretell.attended import MOST_ROWS, Past
from foretell.attention import AttentionMask, additive, attention_mask
from foretell.base import Base
from foretell.cache import StaticCache
from foretell.captured import CapturedSteps
from foretell.compiled import CompiledSteps
from foretell.config import MTPConfig
from foretell.errors import ForetellError
from foretell.gated_lora import GatedLoRA, adapted_modules
from foretell.layout import RECURRING, Layout
from foretell.lean import LeanSteps
from foretell.rows import Rows
from foretell.sampled import SampledHead
from foretell.sampler import Sampler, make_sampler
from foretell.support import check_supported, self_test

CACHED = 512  # tokens before a step up to which its mask is part of one that is kept


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
            adapted_modules(base.blocks, base.text_config.hidden_size),
            config.rank,
            config.alpha,
            gated=config.adapter == "gated",
        )
        self.sampler: Sampler | None = make_sampler(config, base.d_model, base.d_embedding)
        self._sampled: SampledHead | None = None
        self.compiled: CompiledSteps | CapturedSteps | None = None
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
        if self.base.packed and self.sampler is not None:
            self.sampler.lay_out()
        return self.eval()

    @property
    def sampled_head(self) -> SampledHead | None:
        """The sampler head laid out for sweeps of one call each, where that is possible."""
        if self.sampler is None or self.sampler.remembered is None:
            return None
        if self._sampled is None or self._sampled.terms is not self.sampler.remembered:
            self._sampled = SampledHead.of(self.sampler, self.base)
        return self._sampled

    def own_parameters(self) -> dict[str, Tensor]:
        """The parameters foretell adds, by name: what a checkpoint holds."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("base.")}

    @property
    def max_masks(self) -> int:
        """k: masks per block that the adapter was trained with."""
        return self.config.masks

    @property
    def bidirectional(self) -> bool:
        """Whether a mask sees all masks of its block."""
        return self.config.mask_attention == "bidirectional"

    def step(
        self,
        ids: Tensor,
        layouts: Sequence[Layout],
        cache: Cache,
        lengths: Sequence[int],
        rows: Rows | None = None,
    ) -> Tensor:
        """One forward: ids (B, R) int64 with a layout and a number of cached tokens per sequence -> z (B, Q, D).

        All layouts have the same R and M; `rows` says which rows are no filler, if there is any: where `skips_filler`
        the others may be anything. The cache then holds Q more rows per sequence, behind the first `lengths[b]`;
        the caller keeps the accepted ones.
        Raises ForetellError if ids and layouts do not fit each other.
        """
        shapes = {(layout.regular, layout.masks) for layout in layouts}
        if shapes != {(ids.shape[1], layouts[0].masks)} or len(layouts) != ids.shape[0]:
            raise ForetellError(f"ids of shape {tuple(ids.shape)} do not fit layouts of (R, M) {sorted(shapes)}")
        rows = rows or Rows(layouts)
        if (lean := self._attending(rows, cache)) is not None:
            return self._attended(lean, ids, rows, cast(StaticCache, cache), lengths)
        embeddings = self.base.embed(ids)
        if layouts[0].masks:
            numbers = torch.stack([on_device(layout, self.base.device).mask_numbers for layout in layouts])
            masks = nn.functional.embedding(numbers, self.mask_vectors)  # a fraction of the time that indexing takes
            embeddings = torch.cat([embeddings, masks.to(embeddings.dtype)], dim=1)
        if self.bidirectional:  # strategies need not know how the masks were trained
            layouts = [replace(layout, bidirectional=True) for layout in layouts]
        gate = layouts[0].regular, layouts[0].width
        compiled = self.compiled
        runs = compiled is not None and compiled.can_run(cache, lengths, *gate)
        explicit = runs or (compiled is not None and len(lengths) == 1)  # one that runs eager may be compiled from
        positions, mask = step_attention(layouts, lengths, self.base, explicit)
        if compiled is not None and runs:
            return compiled.latents(embeddings, positions, mask, cache, lengths, layouts[0].regular)
        together = len(lengths) > 1 and (layouts[0].masks > 0 or not rows.whole)
        if together and (lean := self.base.lean_for(embeddings.shape[1], mask)):
            with self.adapter.open(rows.first, rows.count):
                return lean.latents(embeddings, positions, mask, cache, rows)
        with self.adapter.open(*gate):
            return self.base.latents(embeddings, positions, mask, cache)

    def _attending(self, rows: Rows, cache: Cache) -> LeanSteps | None:
        """Lean steps with an attention of their own, if they can do this one."""
        base = self.base
        if self.compiled is not None or base.lean is None or base.windowed or not isinstance(cache, StaticCache):
            return None
        return base.lean_for(1, None) if rows.width <= MOST_ROWS and base.lean.attends else None

    def _attended(self, lean: LeanSteps, ids: Tensor, rows: Rows, cache: StaticCache, lengths: Sequence[int]) -> Tensor:
        past = Past(rows, lengths, self.bidirectional)
        embeddings = self.base.embed(rows.regular_together(ids))
        if len(past.numbers):
            masks = nn.functional.embedding(past.numbers, self.mask_vectors)
            embeddings = torch.cat([embeddings, masks.to(embeddings.dtype)])
        with self.adapter.open(rows.first, rows.count):
            return rows.apart(lean.attended(embeddings[None], past, cache.layers)[0])

    @property
    def skips_filler(self) -> bool:
        """Whether rows of a step of several sequences that only fill it up cost next to nothing."""
        return self.base.lean is not None and self.compiled is None

    def sample(self, tokens: Tensor, latents: Tensor) -> Tensor:
        """The sampler head's latents (..., D), for the two tokens (..., 2) int64 before each, the latest first."""
        assert self.sampler is not None
        return self.sampler(self.base.embed(tokens[..., : self.sampler.tokens]), latents)

    def prefill(self, ids: Tensor, cache: Cache) -> Tensor:
        """Plain causal forward of a prompt (B, n) into the cache, gate closed -> z (B, n, D)."""
        return self.base.latents(self.base.embed(ids), cache=cache)


class LayoutOnDevice(NamedTuple):
    """A layout's tensors where the base is; a handful of layouts recur at every step."""

    mask_numbers: Tensor  # (M,) int64
    position_offsets: Tensor  # (Q,) int64
    visible: Tensor  # (Q, Q) bool


def on_device(layout: Layout, device: torch.device) -> LayoutOnDevice:
    return (_on_device if recurs(layout) else _on_device.__wrapped__)(layout, device)


@lru_cache(maxsize=1024)
def _on_device(layout: Layout, device: torch.device) -> LayoutOnDevice:
    return LayoutOnDevice(layout.mask_numbers.to(device), layout.position_offsets.to(device), layout.visible.to(device))


@lru_cache(maxsize=256)
def _additive(layout: Layout, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(Q, CACHED + Q): a step over CACHED tokens."""
    return nn.functional.pad(additive(layout.visible, dtype).to(device), (CACHED, 0))


def recurs(layout: Layout) -> bool:
    """Whether its tensors are worth keeping: a step with a whole prompt in it is wide, and met once."""
    return layout.regular <= RECURRING


def step_attention(
    layouts: Sequence[Layout], lengths: Sequence[int], base: Base, explicit: bool = False
) -> tuple[Tensor, AttentionMask | None]:
    """Position ids (B, Q) and additive masks (B, 1, Q, longest + Q) of a step over a ragged cache.

    Row b's new columns lie behind its own `lengths[b]` kept ones; what lies beyond them belongs to no one. No mask
    where everything is seen, unless it is to be explicit: with one, sdpa would copy keys and values for grouped heads.
    """
    device, dtype, longest = base.device, base.dtype, max(lengths)
    if min(lengths) == longest and len(set(layouts)) == 1 and not base.windowed:
        positions = (on_device(layouts[0], device).position_offsets + longest).expand(len(layouts), -1)
        if layouts[0].width == 1 and not explicit:
            return positions, None
        mask = (_additive if recurs(layouts[0]) else _additive.__wrapped__)(layouts[0], device, dtype)
        if explicit or longest > CACHED or device.type != "cpu":  # graphs and GPUs want it in one piece
            mask = nn.functional.pad(mask[:, CACHED:], (longest, 0))
        else:
            mask = mask[:, CACHED - longest :]
        mask = mask.expand(len(layouts), 1, -1, -1)
        return positions, mask if base.layer_types is None else dict.fromkeys(base.layer_types, mask)
    width, masks = layouts[0].width, layouts[0].masks
    cached = torch.tensor(lengths, device=device)[:, None]
    if masks:
        positions = torch.stack([on_device(layout, device).position_offsets for layout in layouts]) + cached
    else:
        positions = torch.arange(width, device=device) + cached
    if base.max_positions is not None:  # filler rows near the end may point past a table of learned positions
        positions = positions.clamp(max=base.max_positions - 1)
    columns = torch.arange(longest + width, device=device)
    if not masks:  # every token lies in the column of its position
        visible = columns <= positions[:, :, None]
        return positions, attention_mask(visible, positions, columns[None], base.text_config, dtype)
    columns = columns - cached  # (B, S): below 0 kept, 0..Q-1 new, above no one's
    new = columns.clamp(0, width - 1)
    visible = torch.stack([on_device(layout, device).visible for layout in layouts])
    visible = visible.gather(2, new[:, None].expand(-1, width, -1)) & (columns < width)[:, None]
    visible |= (columns < 0)[:, None]
    keys = torch.where(columns < 0, columns + cached, positions.gather(1, new))
    return positions, attention_mask(visible, positions, keys, base.text_config, dtype)
