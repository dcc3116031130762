"""Self-generated training text: a base answers prompts, and what it says is what its adapter has to foresee."""

from foretell.distillation.answering import Distillation, Progress
from foretell.distillation.api import distill

__all__ = ["Distillation", "Progress", "distill"]
