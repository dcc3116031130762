"""Curves of trainings and the model card: that they show what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from foretell import checkpoint
from foretell.card import model_card
from foretell.cli import main
from foretell.decoding.generate import EMBEDDED
from foretell.errors import ForetellError
from foretell.training.curves import Run, draw, milestones, read_run

from .following import follow, lines, save_places


def line(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "loss": 3.0 / step, "kl_loss": 1.0, "agreement": [0.5, 0.2], **values}


def held_out(value: float) -> dict[str, Any]:
    rates = {"held_out_linear": [1.0, value - 0.1], "held_out_quadratic": [1.1, value]}
    return {"held_out_agreement": [0.4, 0.1], "held_out_simulated_acceptance": value, **rates}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    places = save_places(tmp_path_factory.mktemp("drawn"))
    often = {"steps": 10, "log_every": 1, "evaluate_every": 5}
    follow(places, places / "out", {"held_out": str(places / "held.jsonl"), **often})
    return places / "out"


def test_reading_a_run_that_is_being_written(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line(10)) + '\n{"step": 20, "lo')
    run = read_run(tmp_path)
    assert run.lines == [line(10)] and run.kept_step is None and run.held_out() is None
    with pytest.raises(ForetellError, match=r"has no metrics\.jsonl; give the --output directory"):
        read_run(tmp_path / "nowhere")


def test_series_terms_and_the_step_kept() -> None:
    run = Run("r", [line(1), line(2, **held_out(1.5)), {"step": 3, **held_out(1.2)}, line(4, ntp_loss=2.0)], 2)
    assert run.terms() == ["loss", "kl_loss", "ntp_loss"]
    assert run.series("held_out_simulated_acceptance") == ([2, 3], [1.5, 1.2])
    assert run.held_out() == run.lines[1] and Run("r", run.lines).held_out() == run.lines[2]


def test_milestones_are_few_and_end_with_the_last() -> None:
    run = Run("r", [line(step, **(held_out(1.5) if step % 2 == 0 else {})) for step in range(1, 100)])
    rows = milestones(run, 7)
    steps = [row["step"] for row in rows]
    assert len(rows) == 7 and steps == sorted(set(steps)) and steps[0] == 2 and steps[-1] == 98
    assert rows[0] == {"step": 2, "loss": 1.5, "kl_loss": 1.0, "held_out_simulated_acceptance": 1.5}
    assert [row["step"] for row in milestones(Run("r", [line(1), line(2)]))] == [1, 2], "nothing was held out"
    assert milestones(Run("r", [])) == []


@pytest.mark.parametrize("several", [False, True])
def test_pictures(tmp_path: Path, several: bool) -> None:
    first = Run("first", [line(step, **(held_out(1.5) if step % 4 == 0 else {})) for step in range(1, 60)], 8)
    runs = [first, Run("second", [line(1, loss=100.0), line(2, loss=0.5)])] if several else [first]
    draw(runs, tmp_path / "p.svg")
    text = (tmp_path / "p.svg").read_text()
    for words in ("sum of losses", "kl loss", "simulated acceptance by masks", *(run.name for run in runs)):
        assert f"<!-- {words}" in text or f"{words} -->" in text, words
    assert ("<!-- mask 2" in text) == (not several)
    with pytest.raises(ForetellError, match="holds no measurement yet"):
        draw([Run("new", [])], tmp_path / "q.svg")
    assert not (tmp_path / "q.svg").exists()


def test_the_command(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "both.png"
    assert main(["plot", str(trained), str(trained), "--output", str(picture), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert picture.read_bytes().startswith(b"\x89PNG") and found["picture"] == str(picture)
    assert found["runs"][0]["metrics"] == lines(trained) and found["runs"][0]["run"] == "out"
    before = (trained / "training.png").stat().st_mtime_ns
    assert main(["plot", str(trained)]) == 0
    assert "tokens per step on held-out prompts" in capsys.readouterr().out
    assert (trained / "training.png").stat().st_mtime_ns > before
    for wrong, reason in (
        ([str(trained), str(trained)], "several runs need --output"),
        ([str(trained), "--output", "x.txt"], "must end in .png, .svg, .pdf"),
        ([str(tmp_path)], "has no metrics.jsonl"),
    ):
        assert main(["plot", *wrong]) == 2
        assert reason in capsys.readouterr().err


def rows_under(card: str, title: str) -> list[list[str]]:
    section = card.split(f"## {title}\n")[1].split("\n## ")[0]
    return [
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in re.findall(r"^\|.*\|$", section, re.MULTILINE)
        if not row.startswith("| ---")
    ]


def test_the_card_states_the_facts_of_the_run(trained: Path) -> None:
    card = (trained / "README.md").read_text()
    description = checkpoint.read_description(trained)
    provenance = description["provenance"]
    kept = next(one for one in lines(trained) if one["step"] == provenance["kept_step"])
    columns = [kept[f"held_out_{name}"] for name in ("agreement", "linear", "quadratic")]
    expected = [[str(j), *(str(values[j - 1]) for values in columns)] for j in (1, 2)]
    assert rows_under(card, "Acceptance on held-out prompts")[1:] == expected
    assert "of up to 6 tokens, to 3 prompts that were not trained on" in card

    facts = dict(rows_under(card, "Training")[1:])
    assert facts["data"] == "d.jsonl" and facts["steps trained"] == "10" and facts["held-out prompts"] == "3"
    assert facts["step kept, the best on held-out prompts"] == str(kept["step"])
    assert (
        facts["hardware"] == provenance["hardware"]
        and facts["sha256 of its token ids"] == provenance["data_fingerprint"]
    )
    settings = dict(rows_under(card, "Settings")[1:])
    assert settings == {
        n: "–" if v in (None, []) else str(v) for n, v in (description["config"] | provenance["training"]).items()
    }
    versions = dict(rows_under(card, "Versions")[1:])
    assert versions == {name: provenance[name] for name in ("foretell", "torch", "transformers", "python")}

    heads, *curve = rows_under(card, "Curves")
    assert [row[0] for row in curve] == ["5", "10"] and heads[:2] == ["step", "loss"]
    assert [row[1] for row in curve] == [str(one["loss"]) for one in lines(trained) if one["step"] % 5 == 0]
    assert "![curves of the training](training.png)" in card and (trained / "training.png").exists()
    assert "The adapter must stay gated" in card and "foretell.load(" in card


def test_cards_without_all_facts(trained: Path) -> None:
    old = checkpoint.read_description(EMBEDDED)
    for name in ("curve", "picture"):  # as foretell wrote none before
        old["provenance"].pop(name, None)
    card = model_card(old)
    assert "## Curves" not in card and "training.png" not in card
    assert str(old["provenance"]["held_out_simulated_acceptance"]) in card
    bare = model_card({**old, "provenance": {"foretell": "0"}})
    assert (
        "## Acceptance" not in bare
        and "## Training" not in bare
        and rows_under(bare, "Versions")[1:] == [["foretell", "0"]]
    )
