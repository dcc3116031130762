"""Benchmarks that are stopped: what was measured is kept, and the same run goes on without measuring it again."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from foretell.decoding.generate import MTPForCausalLM

from .models import random_prompt, tiny_model
from .saved import save_model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Benchmarks are scripts: they find each other in their own directory."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def stop_at(number: int, measure: Callable[..., Any]) -> tuple[list[Any], Callable[..., Any]]:
    """`measure`, interrupted at its call of that number, from 1; and the results of its calls."""
    done: list[Any] = []

    def counted(*arguments: Any, **more: Any) -> Any:
        if len(done) + 1 == number:
            raise KeyboardInterrupt
        done.append(measure(*arguments, **more))
        return done[-1]

    return done, counted


def without_times(part: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key != "run"}


def test_the_acceptance_part_goes_on_with_the_row_it_was_stopped_at(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded = script("embedded")
    adapter, output, plain = save_model(tmp_path, masks=2), tmp_path / "embedded.json", embedded.run
    monkeypatch.setattr(embedded, "NEW_TOKENS", 6)

    def attempt(number: int, place: Path = output, *more: str) -> int:
        """How many times something was decoded."""
        done, counted = stop_at(number, plain)
        monkeypatch.setattr(embedded, "run", counted)
        words = ["--part", "acceptance", "--prompts", "1", "--threads", "1", "--output", str(place), *more]
        monkeypatch.setattr("sys.argv", ["embedded.py", "--model", str(adapter), *words])
        with contextlib.suppress(KeyboardInterrupt):
            embedded.main()
        return len(done)

    everything = attempt(0, tmp_path / "whole.json")
    whole = json.loads((tmp_path / "whole.json").read_text())["acceptance"]
    assert everything == 2 * (1 + 4 + 2) and not list(tmp_path.glob("*.unfinished"))

    output.write_text(json.dumps({"answers": {"kept": 1}, "acceptance": {"old": 1}}))
    assert attempt(4) == 3
    assert json.loads(output.read_text())["acceptance"] == {"old": 1}, "the result is there until the new one is whole"
    assert attempt(1) == 0, "nothing is measured again"
    assert attempt(0) == everything - 3
    result = json.loads(output.read_text())
    assert result["answers"] == {"kept": 1} and without_times(result["acceptance"]) == without_times(whole)
    assert result["acceptance"]["run"]["minutes"] > 0 and not list(tmp_path.glob("*.unfinished"))

    assert attempt(6) == 5
    assert attempt(0, output, "--fresh") == everything
    assert attempt(6) == 5
    assert attempt(0, output, "--prompts", "2") == everything, "another run's rows don't count"


@pytest.fixture
def model() -> MTPForCausalLM:
    model = tiny_model(masks=2)
    model.source = "tiny"
    return model


def test_a_stream_goes_on_with_the_next_set(
    script: Callable[[str], ModuleType], model: MTPForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams, unfinished = script("streams"), script("unfinished")
    sets = {name: [random_prompt(5, seed)[0].tolist()] for seed, name in enumerate("abc")}
    plain = streams.bench

    def attempt(number: int) -> tuple[int, Any]:
        """How many sets were measured, and the result."""
        done, counted = stop_at(number, plain)
        monkeypatch.setattr(streams, "bench", counted)
        kept = unfinished.Unfinished(tmp_path / "s.json", "trained", model, {"new": 8})
        try:
            result = streams.measure(model, sets, 8, 1, kept)
        except KeyboardInterrupt:
            return len(done), None
        return len(done), result

    assert attempt(3) == (2, None)
    measured, result = attempt(0)
    assert measured == 1
    assert list(result["verdicts"]) == [cell["set"] for cell in result["report"]["cells"]] == ["a", "b", "c"]
    assert set(result["verdicts"]["a"]) == {"best_fixed", "adaptive_over_best_fixed", "adaptive_over_plain"}


@pytest.mark.parametrize("content", ["{", "[]", '{"settings": {}}'])
def test_a_damaged_file_starts_anew(
    content: str, script: Callable[[str], ModuleType], model: MTPForCausalLM, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    unfinished = script("unfinished")
    (tmp_path / "r.part.unfinished").write_text(content)
    kept = unfinished.Unfinished(tmp_path / "r.json", "part", model, {})
    assert "r.part.unfinished is damaged: part starts anew" in capsys.readouterr().err
    assert kept.get("row", lambda: (1, 2)) == [1, 2], "as it will be read again"
    again = unfinished.Unfinished(tmp_path / "r.json", "part", model, {})
    assert again.get("row", lambda: pytest.fail("measured again")) == [1, 2] and again.seconds == kept.seconds
    assert unfinished.Unfinished(tmp_path / "r.json", "part", model, {"new": 3}).measured == {}
    assert "was measured with new None, not 3: part starts anew" in capsys.readouterr().err
