"""A tiny training to follow: settings, base and data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from foretell.config import MTPConfig, TrainConfig
from foretell.model import MTPModel
from foretell.training.loop import train

from .saved import save_base

MTP = MTPConfig(masks=2, rank=2, alpha=4.0)
SETTINGS: dict[str, Any] = {
    "steps": 6, "batch_size": 2, "seq_len": 24, "anchors": 4, "log_every": 2, "checkpoint_every": 3,
    "evaluate_every": 2, "evaluate_tokens": 6, "lr": 1e-2,
}  # fmt: skip


def save_places(root: Path) -> Path:
    """root/base, root/d.jsonl and root/held.jsonl; returns root."""
    save_base(root / "base")
    records = [json.dumps({"text": f"number {n} of many"[: 10 + n % 9]}) for n in range(30)]
    (root / "d.jsonl").write_text("\n".join(records))
    (root / "held.jsonl").write_text("\n".join(json.dumps({"text": f"other text {n}"}) for n in range(3)))
    return root


def follow(places: Path, output: Path, settings: dict[str, Any] | None = None, **more: Any) -> MTPModel:
    config = TrainConfig(**(SETTINGS | (settings or {})))
    return train(str(places / "base"), places / "d.jsonl", output, MTP, config, device="cpu", **more)


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def power_cut_at(step: int) -> Any:
    """An `on_step` that raises there."""

    def fail(line: dict[str, Any]) -> None:
        if line["step"] == step:
            raise RuntimeError("power cut")

    return fail
