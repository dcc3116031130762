"""FlexAttention for the mask rows of training: keys that none of them sees are skipped (method.md section 1)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from foretell.attention import FLEX, attending_by
from foretell.base import Base
from foretell.errors import ForetellError

LEAST_HEAD_SIZE = 16  # of torch's kernels on a GPU


def check_attention(base: Base, attention: str) -> None:
    """Raises ForetellError for flex: where it has no backward, a base that does not know it, or with smaller heads."""
    if attention != "flex":
        return
    if base.device.type != "cuda":
        raise ForetellError(
            f"flex attention has a backward on GPUs only, and this base is on {base.device}; leave out --attention"
        )
    if not getattr(base.lm, "_supports_flex_attn", False):
        raise ForetellError(f"{type(base.lm).__name__} does not know flex attention; leave out --attention")
    config = base.text_config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if size < LEAST_HEAD_SIZE:
        raise ForetellError(
            f"flex attention takes heads of {LEAST_HEAD_SIZE} numbers or more, and those of this base have {size}; "
            "leave out --attention"
        )


def attending(base: Base, attention: str) -> AbstractContextManager[None]:
    """Within this context the base attends by sdpa or flex, with masks of `attention_mask` in that form."""
    return attending_by(base.text_config, FLEX) if attention == "flex" else nullcontext()
