"""What a comparison found: cells of rows with counts and seconds, as JSON and in plain words."""

from __future__ import annotations

import hashlib
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from torch import Tensor

import foretell
from foretell.decoding.generate import MTPForCausalLM
from foretell.errors import ForetellError
from foretell.evaluation.measure import Counts, Difference
from foretell.evaluation.methods import Method
from foretell.hardware import device_name


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
class Point:
    """Where in a sweep: a prompt set, and what is varied. Without `context` prompts are as long as they are."""

    set: str
    batch: int = 1
    temperature: float = 0.0
    context: int | None = None

    def __str__(self) -> str:
        """The set, and what differs from a single greedy text."""
        parts = [self.set]
        if self.batch > 1:
            parts.append(f"batch {self.batch}")
        if self.temperature:
            parts.append(f"temperature {self.temperature:g}")
        if self.context is not None:
            parts.append(f"context {self.context}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Row:
    """One method at one point. Ratios above 1 mean faster; each is the median of the ratios within a round."""

    point: Point
    method: Method
    counts: Counts
    seconds: Spread  # for all prompts, prefill included, with every method
    tokens_per_second: Spread  # of all sequences of a batch together
    decode_tokens_per_second: Spread | None  # without the time to the first token; None if there was no second step
    ms_to_first_token: Spread  # over batches and rounds; with several tokens in the first step, until all are there
    ms_per_step: Spread | None  # of decoding: after the first token
    speedup_in_steps: float  # acceptance rate over that of plain decoding, which is 1
    speedup: Spread  # seconds per token: plain decoding over this
    speedup_over_huggingface: Spread | None
    identical: bool | None  # to generate()'s token ids; drawn texts to plain decoding's; None: can't be compared
    difference: Difference | None

    def to_dict(self) -> dict[str, Any]:
        """Flat: point, method and counts are keys of their own."""
        values = asdict(self)
        point, method, counts = (values.pop(name) for name in ("point", "method", "counts"))
        return {"set": point.pop("set"), "method": method.pop("name"), **method, **point, **counts, **values}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises KeyError or TypeError for what is not a row."""
        spreads: dict[str, Any] = {
            name: None if values[name] is None else Spread(**values[name])
            for name in ("seconds", "tokens_per_second", "decode_tokens_per_second", "ms_to_first_token",
                         "ms_per_step", "speedup", "speedup_over_huggingface")
        }  # fmt: skip
        return cls(
            point=_part(Point, values),
            method=_part(Method, values | {"name": values["method"]}),
            counts=_part(Counts, values),
            speedup_in_steps=values["speedup_in_steps"],
            identical=values["identical"],
            difference=None if values["difference"] is None else Difference(**values["difference"]),
            **spreads,
        )


@dataclass(frozen=True)
class Cell:
    """All methods at one point, alternated; baselines first. `left_out` says which could not run there, and why."""

    point: Point
    prompts: int
    digest: str  # of the prompts' token ids
    rows: list[Row]
    left_out: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self.point),
            "prompts": self.prompts,
            "digest": self.digest,
            "best": str(self.best().method),
            "sentence": self.sentence(),
            "left_out": self.left_out,
            "rows": [row.to_dict() for row in self.rows],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        rows = [Row.from_dict(row) for row in values["rows"]]
        return cls(_part(Point, values), values["prompts"], values["digest"], rows, values["left_out"])

    def best(self) -> Row:
        """The row with masks that takes the fewest seconds per token."""
        return max((row for row in self.rows if row.method.masks), key=lambda row: row.speedup.median)

    def sentence(self) -> str:
        """The best row in plain words."""
        row = self.best()
        text = f"{row.method}: {row.counts.acceptance_rate:.1f} tokens per step, "
        text += f"{in_words(row.speedup.median)} plain decoding"
        if row.speedup_over_huggingface:
            text += f" and {in_words(row.speedup_over_huggingface.median)} Hugging Face generate()"
        return f"{text}, {agreement(row)}"


@dataclass(frozen=True)
class Report:
    """A cell per point of the sweep."""

    settings: dict[str, Any]
    environment: dict[str, Any]
    cells: list[Cell]

    def cell(self, point: Point) -> Cell:
        """Raises ForetellError for a point that was not measured."""
        for cell in self.cells:
            if cell.point == point:
                return cell
        raise ForetellError(f"the report has nothing on {point}; it has {'; '.join(str(c.point) for c in self.cells)}")

    def machine(self) -> str:
        """What the seconds hold for."""
        e, rounds = self.environment, self.settings["rounds"]
        threads = f", {e['threads']} thread{'s' if e['threads'] > 1 else ''}" if e["device"] == "cpu" else ""
        return (
            f"{e['device']} ({e['device_name']}{threads}), {e['dtype']}, torch {e['torch']}; "
            f"median of {rounds} round{'s' if rounds > 1 else ''} in alternation"
        )

    def to_dict(self) -> dict[str, Any]:
        """Ready for json.dumps."""
        return {**self.environment, "settings": self.settings, "cells": [cell.to_dict() for cell in self.cells]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises KeyError or TypeError for what is not a report."""
        environment = dict(values)
        settings, cells = environment.pop("settings"), environment.pop("cells")
        return cls(settings, environment, [Cell.from_dict(cell) for cell in cells])


def agreement(row: Row) -> str:
    """Whether the output is the reference's; if not, where it first differs and by how little."""
    if row.difference is None:
        return "output identical" + (" to plain decoding's with the same seed" if row.point.temperature else "")
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
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": model.source or None,
        "adapter": digest(model.own_parameters().values()),
        "base": Path(model.base.name).name if Path(model.base.name).is_dir() else model.base.name,
        "base_parameters": model.base.parameter_count,
        "device": device.type,
        "device_name": device_name(device),
        "dtype": str(model.base.dtype).removeprefix("torch."),
        "packed": model.base.packed,
        "weights": model.base.ways,
        "compiled": model.compiled is not None,
        "threads": torch.get_num_threads(),
        "attention": getattr(model.base.text_config, "_attn_implementation", None),
        "foretell": foretell.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def digest(tensors: Iterable[Tensor]) -> str:
    """12 hexadecimal digits that change with any of the tensors' values and their order."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
        sha.update(str(tuple(tensor.shape)).encode())
    return sha.hexdigest()[:12]


def _part(cls: Any, values: dict[str, Any]) -> Any:
    """The dataclass `cls` from those of `values` that are its fields."""
    return cls(**{f.name: values[f.name] for f in fields(cls)})
