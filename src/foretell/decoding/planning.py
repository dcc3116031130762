"""A model's planner, kept from text to text with what decoding has taught it."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from foretell.config import DecodeConfig
from foretell.decoding.adaptive import Adaptive
from foretell.decoding.calibration import Experience, Floats
from foretell.decoding.costs import Costs, costs, of_batch, plain_steps
from foretell.decoding.pausing import Pause
from foretell.decoding.planner import Planner
from foretell.decoding.ragged import RaggedPlanner
from foretell.decoding.strategies import Fixed, Strategy
from foretell.model import MTPModel

# By the settings that decide how likely drafts hold and what they cost; a model takes its planners with it.
_plannings: WeakKeyDictionary[MTPModel, dict[tuple[object, ...], Planning]] = WeakKeyDictionary()


class Planning:
    """The planner of one model in one manner of drafting, with what steps of any number of sequences cost."""

    def __init__(self, model: MTPModel, config: DecodeConfig) -> None:
        self.config = config
        self.experience = Experience(config.masks or model.max_masks)
        self.pause = Pause()
        self._costs: dict[int, Costs] = {}  # by number of sequences, as measured
        self._between: dict[int, tuple[Costs, Floats]] = {}  # of those asked for, and of plain steps
        self._sequences = 1  # that the planner now plans for
        self._planner: Planner | None = None

    def prepare(self, model: MTPModel, sequences: int) -> None:
        """For batches of up to the next power of two: where such steps and those of one sequence were not timed yet,
        they are now, so that nothing is timed in the midst of decoding."""
        for size in {1, 1 << (sequences - 1).bit_length()} - self._costs.keys():
            self._costs[size] = costs(model, self.config, size)
            self._between.clear()
        if self._planner is None:
            kind = RaggedPlanner if model.skips_filler else Planner
            self._planner = kind(self._costs[1], self.experience)

    def planner(self, sequences: int) -> Planner:
        """For so many sequences: as some leave a batch, the steps of the others get cheaper."""
        assert self._planner is not None
        if sequences != self._sequences:
            self._sequences = sequences
            if sequences not in self._between:
                self._between[sequences] = of_batch(self._costs, sequences), plain_steps(self._costs, sequences)
            self._planner.reprice(*self._between[sequences])
        return self._planner


def strategy_of(model: MTPModel, config: DecodeConfig, sequences: int) -> Strategy:
    """What `config.strategy` names, for one call of the loop with so many prompts."""
    if config.strategy != "adaptive":
        return Fixed(config.strategy, config.masks or model.max_masks)
    place = (
        model.base.device,
        model.base.dtype,
        torch.get_num_threads(),
        model.compiled is not None,
        model.skips_filler,
    )
    drafting = (config.masks, config.use_sampler, config.shortlist, config.drafts, config.lookup, config.temperature)
    of_model = _plannings.setdefault(model, {})
    if (planning := of_model.get((*place, *drafting))) is None:
        planning = of_model[*place, *drafting] = Planning(model, config)
    planning.prepare(model, sequences)
    planning.experience.begin_text(sequences)
    planning.planner(sequences).begin_text()
    planning.pause.begin_text(sequences)
    return Adaptive(planning.planner, planning.experience, config.lookup, pause=planning.pause)
