"""Which step's adapter is kept, also after interruptions, and what is held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from foretell import checkpoint
from foretell.cli import main
from foretell.errors import ForetellError
from foretell.training import loop
from foretell.training.held_out import HeldOut

from .following import follow, lines, power_cut_at, save_places

VALUES = {2: 1.5, 4: 2.0, 6: 1.75}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_places(tmp_path_factory.mktemp("best"))


@pytest.fixture
def weights_at(monkeypatch: pytest.MonkeyPatch) -> dict[float, dict[str, torch.Tensor]]:
    """Held-out acceptance is VALUES by turns; here are the weights that had each value."""
    seen: dict[float, dict[str, torch.Tensor]] = {}

    def evaluate(self: HeldOut, autocast: Any = None) -> dict[str, Any]:
        measured.append(1)
        value = list(VALUES.values())[(len(measured) - 1) % len(VALUES)]
        seen[value] = {name: p.detach().clone() for name, p in self.model.own_parameters().items()}
        return {"held_out_agreement": [0.5, 0.25], "held_out_simulated_acceptance": value}

    measured: list[int] = []
    monkeypatch.setattr(HeldOut, "evaluate", evaluate)
    return seen


def saved(output: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read_safetensors(output / "foretell.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_best_step_is_kept(places: Path, tmp_path: Path, weights_at: dict[float, Any]) -> None:
    model = follow(places, tmp_path / "out")
    assert same(saved(tmp_path / "out"), weights_at[2.0]) and not same(weights_at[2.0], weights_at[1.75])
    assert same(model.own_parameters(), weights_at[2.0]), "the model returned is the one saved"
    provenance = json.loads((tmp_path / "out" / "foretell.json").read_text())["provenance"]
    assert (provenance["kept_step"], provenance["trained_steps"]) == (4, 6)
    assert provenance["held_out_simulated_acceptance"] == 2.0
    at_4 = next(line for line in lines(tmp_path / "out") if line["step"] == 4)
    assert {name: provenance[name] for name in ("loss", "held_out_agreement")} == {
        name: at_4[name] for name in ("loss", "held_out_agreement")
    }
    assert [row["step"] for row in provenance["curve"]] == [2, 4, 6], "of the whole training"
    state = checkpoint.read_safetensors(tmp_path / "out" / "checkpoint" / "foretell.safetensors")
    assert same(state, weights_at[1.75]), "the state to go on from is the last step's"


def test_without_keep_best_the_last_step_is_saved(places: Path, tmp_path: Path, weights_at: dict[float, Any]) -> None:
    follow(places, tmp_path / "out", {"keep_best": False})
    assert same(saved(tmp_path / "out"), weights_at[1.75])
    assert "kept_step" not in json.loads((tmp_path / "out" / "foretell.json").read_text())["provenance"]


@pytest.mark.parametrize("cut", [3, 5])
def test_an_interrupted_training_keeps_the_same(
    places: Path, tmp_path: Path, weights_at: dict[float, Any], cut: int
) -> None:
    follow(places, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power cut"):
        follow(places, tmp_path / "cut", on_step=power_cut_at(cut))
    assert same(saved(tmp_path / "cut"), weights_at[1.5 if cut == 3 else 2.0])
    state = json.loads((tmp_path / "cut" / "checkpoint" / "state.json").read_text())["step"]
    assert state == cut - 1, "what was best so far can be gone on from"
    follow(places, tmp_path / "cut", resume=True)
    assert same(saved(tmp_path / "cut"), saved(tmp_path / "whole"))
    follow(places, tmp_path / "cut", resume=True)  # nothing left to do
    assert same(saved(tmp_path / "cut"), weights_at[2.0])


def test_a_kill_between_adapter_and_state(places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best adapter is from a step after the state: the step comes again and gives the same."""
    real = loop.save_state

    def killed(*args: Any) -> None:
        if args[3] == 4:
            raise RuntimeError("killed")
        real(*args)

    monkeypatch.setattr(HeldOut, "evaluate", _rising)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_state", killed)
        with pytest.raises(RuntimeError, match="killed"):
            follow(places, tmp_path / "out")
    later = saved(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "foretell.json").read_text())["provenance"]["kept_step"] == 4
    follow(places, tmp_path / "out", resume=True)
    follow(places, tmp_path / "unbroken")
    assert same(saved(tmp_path / "out"), saved(tmp_path / "unbroken")) and not same(later, saved(tmp_path / "out"))


def _rising(self: HeldOut, autocast: Any = None) -> dict[str, Any]:
    """More the further the masks have moved from where they began, which is the same after an interruption."""
    moved = float(sum(p.square().sum() for name, p in self.model.own_parameters().items() if name.endswith(".b")))
    return {"held_out_agreement": [0.5, 0.25], "held_out_simulated_acceptance": 1 + moved}


def test_held_out_data_of_ones_own(places: Path, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    held_out = {"held_out": str(places / "held.jsonl")}
    model = follow(places, tmp_path / "own", held_out, on_step=seen.append)
    follow(places, tmp_path / "split")
    assert model.provenance["held_out_prompts"] == 3 and model.provenance["training"]["held_out"] == "held.jsonl"
    split = json.loads((tmp_path / "split" / "foretell.json").read_text())["provenance"]
    assert split["held_out_prompts"] == 1  # of 30 records
    (places / "held2.jsonl").write_text('{"text": "quite another text"}')
    with pytest.raises(ForetellError, match="another setting: the held-out data"):
        follow(places, tmp_path / "own", {"held_out": str(places / "held2.jsonl")}, resume=True)
    with pytest.raises(ForetellError, match=r"nowhere\.jsonl does not exist"):
        follow(places, tmp_path / "other", {"held_out": "nowhere.jsonl"})


def test_the_command_says_which_step_was_kept(
    places: Path, tmp_path: Path, weights_at: dict[float, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", "--base", str(places / "base"), "--data", str(places / "d.jsonl"), "--output", str(tmp_path / "o")]
    settings = {"steps": 6, "batch-size": 2, "seq-len": 24, "anchors": 4, "evaluate-every": 2, "masks": 2, "rank": 2}
    line += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    assert main([*line, "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "It is that of step 4 of 6, the best on held-out prompts." in shown
    assert "Simulated acceptance: 2.00 tokens per step on held-out prompts." in shown
