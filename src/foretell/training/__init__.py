"""Training: an adapter for a frozen base, from text or conversations (method.md sections 1 and 4)."""

from foretell.training.loop import train

__all__ = ["train"]
