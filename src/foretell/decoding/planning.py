"""A model's planners: one per number of sequences, sharing what decoding has taught, kept from text to text."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from foretell.config import DecodeConfig
from foretell.decoding.calibration import Experience
from foretell.decoding.costs import costs
from foretell.decoding.planner import Planner
from foretell.decoding.strategies import Adaptive, Fixed, Strategy
from foretell.model import MTPModel

# By the settings that decide how likely drafts hold and what they cost; a model takes its planners with it.
_planners: WeakKeyDictionary[MTPModel, dict[tuple[object, ...], Planners]] = WeakKeyDictionary()


class Planners:
    """Planners of one model in one manner of drafting."""

    def __init__(self, model: MTPModel, config: DecodeConfig) -> None:
        self.config = config
        self.experience = Experience(config.masks or model.max_masks)
        self._by_size: dict[int, Planner] = {}

    def prepare(self, model: MTPModel, sequences: int) -> None:
        """For batches of up to the next power of two; the first of a size may have to time some steps."""
        size = 1 << (sequences - 1).bit_length()
        if size not in self._by_size:
            stops_early = model.base.device.type == "cpu"  # elsewhere each look at a confidence would hold up the queue
            self._by_size[size] = Planner(costs(model, self.config, size), self.experience, stops_early)

    def planner(self, sequences: int) -> Planner:
        """That of the nearest size prepared: as sequences leave a batch, nothing is timed in the midst of decoding."""
        return self._by_size[min(size for size in self._by_size if size >= sequences)]


def strategy_of(model: MTPModel, config: DecodeConfig, sequences: int) -> Strategy:
    """What `config.strategy` names, for one call of the loop with so many prompts."""
    if config.strategy != "adaptive":
        return Fixed(config.strategy, config.masks or model.max_masks)
    place = (model.base.device, model.base.dtype, torch.get_num_threads(), model.compiled is not None)
    drafting = (config.masks, config.use_sampler, config.shortlist, config.drafts, config.lookup, config.temperature)
    of_model = _planners.setdefault(model, {})
    planners = of_model.setdefault((*place, *drafting), Planners(model, config))
    planners.prepare(model, sequences)
    planners.experience.begin_text()
    planners.planner(sequences).begin_text()
    return Adaptive(planners.planner, planners.experience, config.lookup)
