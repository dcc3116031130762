"""The ablation runner on a tiny base: what it writes, what it leaves out, and its own reading of recipes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from foretell.errors import ForetellError

from .saved import save_base

RUNNER = Path(__file__).parents[1] / "benchmarks" / "ablation.py"
RECIPES = """
common: {masks: 2, rank: 2, alpha: 4, batch_size: 2, seq_len: 32, anchors: 4, warmup: 0}
recipes:
  paper: {answers: data, sampler: mlp}
  its own: {based_on: paper, answers: own}
"""


@pytest.fixture
def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ablation", RUNNER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_recipes_build_on_one_another(runner: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "recipes.yaml"
    path.write_text(RECIPES)
    recipes = runner.load_recipes(path)
    assert recipes["its own"] == recipes["paper"] | {"answers": "own"} and recipes["paper"]["sampler"] == "mlp"
    path.write_text(RECIPES.replace("answers: own", "answers: mine"))
    with pytest.raises(ForetellError, match="recipe its own: answers must be own or data"):
        runner.load_recipes(path)
    assert runner.load_recipes(runner.RECIPES)["paper"]["masks_trainable"] is False


def test_runs_are_written_once_and_shown(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, data, recipes, output = (tmp_path / name for name in ("base", "d.jsonl", "r.yaml", "runs.jsonl"))
    save_base(base)
    data.write_text("\n".join(json.dumps({"text": f"a text that is number {n} of many, all alike"}) for n in range(26)))
    recipes.write_text(RECIPES)
    sizes = {"steps": 2, "texts": 22, "prompts": 2, "prompt-tokens": 8, "new-tokens": 12}
    common = ["ablation", *(f"--{name}={size}" for name, size in sizes.items()), f"--recipes-file={recipes}"]
    common += [f"--bases={base}", f"--data={data}", f"--output={output}", "--seeds"]
    monkeypatch.setattr(sys, "argv", [*common, "0"])
    runner.main()
    first = [json.loads(line) for line in output.read_text().splitlines()]
    assert [run["recipe"] for run in first] == ["paper", "its own"]
    assert all(run["tokens"] == 24 and 1.0 <= run["acceptance_rate"] <= 3.0 for run in first)
    assert all(run["simulated_acceptance"] >= 1.0 and run["settings"]["rank"] == 2 for run in first)
    monkeypatch.setattr(sys, "argv", [*common, "0", "1"])
    runner.main()
    runs = [json.loads(line) for line in output.read_text().splitlines()]
    assert runs[:2] == first and [run["seed"] for run in runs] == [0, 0, 1, 1]
    shown = capsys.readouterr().out
    assert "its own" in shown and "×1.00" in shown and "±" in shown
    assert not runner.same_run(first[0], first[0] | {"settings": first[0]["settings"] | {"rank": 3}})
    assert runner.same_run(first[0], {key: first[0][key] for key in ("base", "recipe", "seed")} | {"settings": {}})
