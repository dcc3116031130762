"""foretell: a Hugging Face causal language model says several tokens per step, with the output it would give anyway."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from foretell.errors import ForetellError

if TYPE_CHECKING:
    from foretell.decoding.generate import Generation, MTPForCausalLM, load
    from foretell.distillation import distill

__version__ = "0.1.0"
__all__ = ["ForetellError", "Generation", "MTPForCausalLM", "distill", "load"]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; `foretell --help` should not wait for them.
    if name in ("Generation", "MTPForCausalLM", "load"):
        from foretell.decoding import generate

        return getattr(generate, name)
    if name == "distill":
        from foretell.distillation import distill

        return distill
    raise AttributeError(f"module 'foretell' has no attribute {name!r}")
