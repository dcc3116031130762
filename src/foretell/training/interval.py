"""What a line of metrics says of the steps since the line before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from foretell.training.batches import Batch


class Interval:
    """Losses and speed since the last logged step; losses also of the steps before an interruption."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self._losses: dict[str, Tensor | float] = dict(state["losses"]) if state else {}
        self._steps = int(state["steps"]) if state else 0
        self._tokens, self._seconds = 0, 0.0

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"steps": self._steps, "losses": {name: float(value) for name, value in self._losses.items()}}

    def add(self, losses: dict[str, Tensor], batches: Sequence[Batch], seconds: float) -> None:
        for name, value in losses.items():
            self._losses[name] = self._losses[name] + value if name in self._losses else value
        self._steps += 1
        self._tokens += sum(int(batch.real.sum()) for batch in batches)
        self._seconds += seconds

    def close(self, processes: int) -> dict[str, Any]:
        """Mean losses and regular tokens per second; starts over."""
        means = {name: round(float(value) / self._steps, 4) for name, value in self._losses.items()}
        means = {name if name == "loss" else f"{name}_loss": value for name, value in means.items()}
        speed = round(self._tokens * processes / max(1e-9, self._seconds), 1)
        self.__init__()  # type: ignore[misc]
        return {**means, "tokens_per_second": speed}
