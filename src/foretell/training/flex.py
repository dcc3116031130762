"""FlexAttention for the mask rows of training: keys that none of them sees are skipped (method.md section 1)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from foretell.attention import FLEX
from foretell.base import Base
from foretell.errors import ForetellError


def check_attention(base: Base, attention: str) -> None:
    """Raises ForetellError for flex where it has no backward, or with a base that does not know it."""
    if attention != "flex":
        return
    if base.device.type != "cuda":
        raise ForetellError(
            f"flex attention has a backward on GPUs only, and this base is on {base.device}; leave out --attention"
        )
    if not getattr(base.lm, "_supports_flex_attn", False):
        raise ForetellError(f"{type(base.lm).__name__} does not know flex attention; leave out --attention")


@contextmanager
def attending(base: Base, attention: str) -> Iterator[None]:
    """Within this context the base attends by sdpa or flex, with masks of `attention_mask` in that form."""
    config, before = base.text_config, base.text_config._attn_implementation
    config._attn_implementation = FLEX if attention == "flex" else before
    try:
        yield
    finally:
        config._attn_implementation = before
