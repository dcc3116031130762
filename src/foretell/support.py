"""Which bases foretell can serve: static rules with their reasons, and a self-test on the model itself."""

from __future__ import annotations

import torch

from foretell.attention import CHUNKED, FULL, SLIDING, attention_mask, window_kinds
from foretell.base import Base
from foretell.errors import ForetellError
from foretell.layout import quadratic

NEEDED = ("inputs_embeds", "position_ids", "attention_mask")


def check_supported(base: Base) -> None:
    """Raises ForetellError with the reason if decoding with layouts would be wrong on this base."""
    reason = refusal(base)
    if reason:
        raise ForetellError(
            f"{type(base.lm).__name__} is not supported: {reason}; choose a base with plain attention layers"
        )


def refusal(base: Base) -> str | None:
    """Why this base is refused by its configuration and signature alone, or None."""
    config = base.text_config
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    types = set(getattr(config, "layer_types", None) or ())
    if unknown := types - {FULL, SLIDING, CHUNKED}:
        return f"it has layers of type {', '.join(sorted(unknown))}, whose state can't skip rejected tokens"
    if getattr(base.lm, "_is_stateful", False):
        return "it keeps a recurrent state, which can't skip rejected tokens"
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "its ALiBi attention bias goes by column, not by position id"
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return "its local attention goes by column, not by position id"
    if getattr(config, "attn_temperature_tuning", False) and config.floor_scale <= config.max_position_embeddings:
        return "its attention temperature goes by row, not by position id"
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    for parameters_of_rope in nested or [rope]:
        kind = parameters_of_rope.get("rope_type", "default")
        if kind in ("dynamic", "longrope"):
            return f"its rotary frequencies ({kind}) depend on the longest position in the batch"
    missing = [name for name in NEEDED if name not in base.takes]
    if base.cache_argument is None:
        missing.append("cache")
    if missing:
        return f"its forward takes no {' and no '.join(missing)}, so masks can't be placed"
    return None


def self_test(base: Base) -> None:
    """One layout against plain forwards, on random tokens, with a context longer than a short window.

    Raises ForetellError if a regular row's logits differ from the base's own beyond rounding, or if the base fails on
    the layout: whatever the rules missed (positions by row index, other mask forms, hidden state) shows here.
    """
    name = type(base.lm).__name__
    try:
        error = layout_error(base)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as failure:  # from code of any author
        reason = (str(failure).strip() or type(failure).__name__).splitlines()[0].rstrip(".")
        raise ForetellError(
            f"{name} is not supported: it fails on a step with masks ({reason}); please report the architecture"
        ) from failure
    exact = base.dtype == torch.float32 and base.quantised == "none"  # activations of 8 bits may fall to either side
    limit = 1e-3 if exact else 0.1
    if not error < limit:
        raise ForetellError(
            f"{name} is not supported: a step with masks changed its own logits by {error:.1e} of "
            "their range, so its output would not be the base's; please report the architecture"
        )


@torch.no_grad()
def layout_error(base: Base) -> float:
    """The largest difference between the regular rows' logits in a layout and in a plain forward, over their range."""
    layout = quadratic(2, 1)
    windows = [window[1] for window in window_kinds(base.text_config).values() if window]
    context = max([8] + [size + 3 for size in windows if size <= 512])
    if base.max_positions is not None:
        context = min(context, base.max_positions - 5)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, base.vocab_size, (1, context + 3), generator=generator).to(base.device)
    expected = base.lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -3:].float()

    # The whole sequence as one layout without a cache: prefix, then [x s1 s2], then a mask row after each of them.
    positions = torch.cat([torch.arange(context), context + layout.position_offsets])
    total = context + layout.width
    visible = torch.zeros(total, total, dtype=torch.bool)
    visible[:context, :context] = torch.ones(context, context, dtype=torch.bool).tril()
    visible[context:, :context] = True
    visible[context:, context:] = layout.visible
    embeddings = torch.cat([base.embed(ids), base.embed(ids[:, : layout.masks])], dim=1)
    # The regular rows last: a base that goes by row or column instead of position id or mask then gives itself away.
    rows = torch.arange(total)
    rows = torch.cat([rows[:context], rows[-layout.masks :], rows[context : -layout.masks]]).to(base.device)
    positions, visible = positions.to(base.device)[None, rows], visible.to(base.device)[None, rows][:, :, rows]
    mask = attention_mask(visible, positions, positions, base.text_config, base.dtype)
    logits = base.unembed(base.latents(embeddings[:, rows], positions, mask))[0, -layout.regular :].float()
    return float((logits - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
