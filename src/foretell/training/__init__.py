"""Training: an adapter for a frozen base, from text or conversations (method.md sections 1 and 4)."""

from foretell.training.loop import train
from foretell.training.preview import preview

__all__ = ["preview", "train"]
