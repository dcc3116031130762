"""Metrics say nothing of masks that had no label, wherever they are written or shown."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from foretell.card import model_card
from foretell.config import MTPConfig, TrainConfig
from foretell.training.curves import draw, milestones, read_run
from foretell.training.display import Display, plain_line
from foretell.training.loop import train
from foretell.training.metrics import Agreement
from foretell.training.tracking import scalars

from .following import follow, lines, power_cut_at, save_places
from .saved import save_base


def short_texts(root: Path, lengths: list[int]) -> tuple[str, Path]:
    path = root / "d.jsonl"
    path.write_text("\n".join(json.dumps({"text": "abcdefghijklmnop"[: n - 1]}) for n in lengths))
    return str(save_base(root / "base")), path


def followed(root: Path, lengths: list[int]) -> list[dict[str, Any]]:
    base, data = short_texts(root, lengths)
    config = TrainConfig(steps=2, batch_size=len(lengths), seq_len=24, anchors=32, log_every=1)
    model = train(base, data, root / "out", MTPConfig(masks=4, rank=2, alpha=4.0), config, device="cpu")
    assert "simulated_acceptance" not in model.provenance or model.provenance["simulated_acceptance"] >= 1
    return [json.loads(line) for line in (root / "out" / "metrics.jsonl").read_text().splitlines()]


def test_masks_without_a_label_have_no_agreement(tmp_path: Path) -> None:
    """Texts of four tokens: masks 1 and 2 have labels, masks 3 and 4 none."""
    for line in followed(tmp_path, [4, 4, 4]):
        assert [value is None for value in line["agreement"]] == [False, False, True, True]
        assert line["simulated_acceptance"] is None and line["loss"] > 0


def test_the_sequences_with_most_labels_are_measured(tmp_path: Path) -> None:
    """A batch lies by length: its first sequences would tell least."""
    for line in followed(tmp_path, [4, 4, 4, 12]):
        assert None not in line["agreement"] and line["simulated_acceptance"] >= 1


def test_sums_of_what_was_seen() -> None:
    nothing = Agreement(torch.zeros(2, dtype=torch.long), torch.tensor([0, 0]), torch.zeros(2), 0)
    some = Agreement(torch.tensor([1, 0]), torch.tensor([4, 0]), torch.zeros(2), 0)
    assert nothing.per_mask() == [None, None] and nothing.simulated_acceptance() is None
    assert (some + nothing).per_mask() == [0.25, None] and (some + nothing).simulated_acceptance() is None
    whole = Agreement(torch.tensor([1, 0]), torch.tensor([4, 2]), torch.tensor([1, 0]), 2)
    assert (whole + some).per_mask() == [0.25, 0.0] and (whole + some).simulated_acceptance() == 1.5


def test_losses_are_means_of_all_steps_whenever_a_training_was_stopped(tmp_path: Path) -> None:
    places, settings = save_places(tmp_path), {"steps": 8, "log_every": 4, "checkpoint_every": 1}
    follow(places, tmp_path / "whole", settings)
    for step in (2, 7):
        with pytest.raises(RuntimeError):
            follow(places, tmp_path / "cut", settings, on_step=power_cut_at(step), resume=step > 2)
    follow(places, tmp_path / "cut", settings, resume=True)
    whole, cut = (
        [{k: v for k, v in line.items() if k not in ("elapsed", "tokens_per_second")} for line in lines(tmp_path / n)]
        for n in ("whole", "cut")
    )
    assert cut == whole and len(whole) > 2


LINE: dict[str, Any] = {"step": 1, "steps": 2, "loss": 2.0, "agreement": [0.5, None], "simulated_acceptance": None}


def test_what_was_not_judged_is_shown_as_a_dash() -> None:
    assert plain_line(LINE).endswith("agreement 0.50 –")
    out = io.StringIO()
    with Display(2, Console(file=out, width=100)) as display:
        display(LINE)
        display.console.print(display.render())
    assert "mask 1 ██████" in out.getvalue() and "50%" in out.getvalue()
    assert out.getvalue().splitlines()[-1].split() == ["mask", "2", "–"]
    assert scalars(LINE).keys() == {"step", "steps", "loss", "agreement/1"}


def test_curves_and_card_leave_it_out(tmp_path: Path) -> None:
    second = LINE | {"step": 2, "loss": 1.0, "agreement": [0.5, 0.25], "simulated_acceptance": 1.5}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (LINE, second)))
    run = read_run(tmp_path)
    assert run.series("simulated_acceptance") == ([2], [1.5])
    assert milestones(run) == [
        {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "simulated_acceptance": 1.5}
    ]  # fmt: skip
    draw([run], tmp_path / "one.png")
    (tmp_path / "metrics.jsonl").write_text(json.dumps(LINE) + "\n")
    draw([run, read_run(tmp_path)], tmp_path / "two.png")
    provenance = {
        "curve": milestones(run), "held_out_agreement": [0.5, None], "held_out_linear": [1.5, 1.5],
        "held_out_quadratic": [1.5, 1.5],
    }  # fmt: skip
    card = model_card({"base": "b", "base_fingerprint": "0" * 64, "config": {"masks": 2}, "provenance": provenance})
    assert "| 2 | – | 1.5 | 1.5 |" in card and "| 1 | 2.0 | – |" in card
