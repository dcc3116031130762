"""Which step's adapter lies in the output directory: that of the best held-out acceptance.

Its own foretell.json says which step that is, so a training that goes on needs no other record: a step that was
measured before the interruption comes out the same again, and the first of equals is kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from foretell import checkpoint
from foretell.model import MTPModel

MEASURE, KEPT = "held_out_simulated_acceptance", "kept_step"


class Best:
    """`provenance` is that of the adapter kept in `output`, None if there is none yet or `on` is false."""

    def __init__(self, output: Path, on: bool) -> None:
        self.output, self.on = output, on
        self.provenance: dict[str, Any] | None = None
        path = output / checkpoint.CONFIG_FILE
        if on and path.exists():
            provenance = checkpoint.read_description(output).get("provenance", {})
            if KEPT in provenance:
                self.provenance = provenance

    def beaten_by(self, metrics: dict[str, Any]) -> bool:
        """Whether these are held-out metrics, better than those of the adapter kept."""
        if not self.on or MEASURE not in metrics:
            return False
        return self.provenance is None or metrics[MEASURE] > self.provenance[MEASURE]

    def keep(self, model: MTPModel, provenance: dict[str, Any], step: int) -> None:
        """Saves the model as it is now."""
        # As a later run will read it, so that an unbroken training and a resumed one compare the same numbers.
        self.provenance = json.loads(json.dumps({**provenance, KEPT: step}, default=str))
        model.provenance = dict(self.provenance)
        checkpoint.save(model, self.output)

    def bring_back(self, model: MTPModel, facts: dict[str, Any]) -> None:
        """The kept weights into `model`, with their metrics and `facts` of the whole training."""
        assert self.provenance is not None
        checkpoint.load_weights(model, self.output / checkpoint.WEIGHTS_FILE)
        model.provenance = {**self.provenance, **facts}
