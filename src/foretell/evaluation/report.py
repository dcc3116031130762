"""What a comparison found: rows of counts and seconds, as JSON and in plain words."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import torch
import transformers

import foretell
from foretell.decoding.generate import MTPForCausalLM
from foretell.errors import ForetellError
from foretell.evaluation.measure import AUTOREGRESSIVE, HUGGINGFACE, Counts, Difference, Method


@dataclass(frozen=True)
class Spread:
    """Median over rounds, with the least and the greatest."""

    median: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Row:
    """One method on one prompt set. Ratios above 1 mean faster; each is the median of the ratios within a round."""

    method: Method
    counts: Counts
    seconds: Spread  # for all prompts of the set, prefill included
    tokens_per_second: float
    ms_per_step: float
    ms_to_first_token: float | None  # median over prompts; None where the method returns all tokens at once
    speedup_in_steps: float  # acceptance rate over that of plain decoding, which is 1
    speedup: Spread  # seconds per token: plain decoding over this
    speedup_over_huggingface: Spread | None
    identical: bool  # token ids equal those of Hugging Face generate() for every prompt
    difference: Difference | None

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        method, counts = values.pop("method"), values.pop("counts")
        return {"method": method["name"], "masks": method["masks"], **counts, **values}


@dataclass(frozen=True)
class Report:
    """`sets` maps the name of a prompt set to its rows; the baselines come first."""

    settings: dict[str, Any]
    environment: dict[str, Any]
    sets: dict[str, list[Row]]

    def to_dict(self) -> dict[str, Any]:
        """Ready for json.dumps."""
        sets = {
            name: {
                "prompts": self.settings["prompts"][name],
                "best": self.best(name).to_dict() | {"sentence": self.sentence(name)},
                "rows": [row.to_dict() for row in rows],
            }
            for name, rows in self.sets.items()
        }
        return {**self.environment, "settings": self.settings, "sets": sets}

    def best(self, name: str) -> Row:
        """The row with masks that takes the fewest seconds. Raises ForetellError for an unknown set."""
        if name not in self.sets:
            raise ForetellError(f"the report has no prompt set {name!r}; it has {', '.join(self.sets)}")
        return max((row for row in self.sets[name] if row.method.masks), key=lambda row: row.speedup.median)

    def sentence(self, name: str) -> str:
        """The best row in plain words."""
        row = self.best(name)
        text = f"{row.method}: {row.counts.acceptance_rate:.1f} tokens per step, "
        text += f"{in_words(row.speedup.median)} plain decoding"
        if row.speedup_over_huggingface:
            text += f" and {in_words(row.speedup_over_huggingface.median)} Hugging Face generate()"
        return f"{text}, {self.agreement(row)}"

    def agreement(self, row: Row) -> str:
        """Whether the output is the reference's; if not, where it first differs and by how little."""
        if row.difference is None:
            return "output identical"
        where = f"prompt {row.difference.prompt + 1}, token {row.difference.position + 1}"
        return f"output differs from {where} on (logit gap {row.difference.logit_gap:.1e})"


def in_words(ratio: float) -> str:
    """1.6 -> "1.6x faster than", 0.8 -> "1.2x slower than"."""
    if 0.995 < ratio < 1.005:
        return "as fast as"
    size, word = (ratio, "faster") if ratio > 1 else (1 / ratio, "slower")
    return f"{size:.2f}x {word} than" if size < 1.1 else f"{size:.1f}x {word} than"


def environment(model: MTPForCausalLM) -> dict[str, Any]:
    """Everything about the machine and the model that seconds depend on."""
    device = model.base.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": model.source or None,
        "base": Path(model.base.name).name if Path(model.base.name).is_dir() else model.base.name,
        "base_parameters": sum(p.numel() for p in model.base.lm.parameters()),
        "device": device.type,
        "device_name": name,
        "dtype": str(model.base.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "attention": getattr(model.base.text_config, "_attn_implementation", None),
        "foretell": foretell.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def order(rows: Sequence[Row]) -> list[Row]:
    """Baselines first, then by strategy and masks."""
    rank = {HUGGINGFACE: 0, AUTOREGRESSIVE: 1}
    return sorted(rows, key=lambda row: (rank.get(row.method.name, 2), row.method.name, row.method.masks))
