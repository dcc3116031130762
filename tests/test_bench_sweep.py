"""The points of a sweep, their prompts, and taking an interrupted sweep up."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from foretell.errors import ForetellError
from foretell.evaluation import bench as bench_module
from foretell.evaluation.bench import bench, filled, sweep
from foretell.evaluation.measure import encode_prompts
from foretell.evaluation.report import Point, Report, digest
from foretell.evaluation.saved import load

from .compared import prompts, small
from .models import random_prompt, tiny_model


def test_points_of_a_sweep() -> None:
    points = sweep(["a", "b"], [1, 2, 1], [0, 1], [8])
    assert len(points) == len(set(points)) == 2 * 2 * 2 and points[0] == Point("a", 1, 0.0, 8)
    assert [str(point) for point in points[:4]] == [
        "a, context 8", "a, temperature 1, context 8", "a, batch 2, context 8", "a, batch 2, temperature 1, context 8"
    ]  # fmt: skip


def test_batches_are_full() -> None:
    ids = [random_prompt(n) for n in (1, 2, 3)]
    assert [own.shape[1] for own in filled(ids, 2)] == [1, 2, 3, 1]
    assert [own.shape[1] for own in filled(ids, 8)] == [1, 2, 3, 1, 2, 3, 1, 2]
    report = small(batch=(2,))
    assert [cell.prompts for cell in report.cells] == [2, 2]
    assert all(row.identical and row.counts.tokens == 24 for cell in report.cells for row in cell.rows)


def test_every_prompt_of_a_context_has_its_length() -> None:
    model = tiny_model()
    (ids, other) = encode_prompts(model, prompts(5, 30), 8, context=12)
    assert ids.shape == other.shape == (1, 12)
    assert other.tolist()[0] == prompts(30)[0][-12:]
    assert ids.tolist()[0] == prompts(30)[0][-7:] + prompts(5)[0]
    with pytest.raises(ForetellError, match="one, prompt 1: the prompt is too long"):
        small(context=(250,))


class Interruption:
    """Stands for a measurement: counts the points, and Ctrl-C comes at point number `at`."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.points, self.measure = at, list[Point](), bench_module._measure

    def __call__(self, model: Any, point: Point, *arguments: Any) -> Any:
        if len(self.points) == self.at:
            raise KeyboardInterrupt
        self.points.append(point)
        return self.measure(model, point, *arguments)


def test_an_interrupted_sweep_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "report.json"

    def attempt(at: int | None = None, **settings: Any) -> tuple[list[Point], Report | None]:
        watch = Interruption(at)
        monkeypatch.setattr(bench_module, "_measure", watch)
        try:
            return watch.points, small(output=output, resume=True, **settings)
        except KeyboardInterrupt:
            return watch.points, None
        finally:
            monkeypatch.setattr(bench_module, "_measure", watch.measure)

    points, report = attempt(2, batch=(1, 2))
    assert report is None and len(points) == 2 and [cell.point for cell in load(output).cells] == points
    kept = load(output).cells
    points, report = attempt(batch=(1, 2))
    assert report is not None and report.cells[:2] == kept and len(points) == 2 and len(report.cells) == 4
    assert load(output).cells == report.cells
    points, report = attempt(batch=(4, 2))  # a wider sweep
    assert report is not None and [point.batch for point in points] == [4, 4]
    assert [cell.point.batch for cell in report.cells] == [4, 2, 4, 2, 1, 1]
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"rounds": 2}, "it was measured with rounds 1, not 2"),
        ({"masks": [2]}, "it was measured with methods"),
        ({"max_new_tokens": 9}, "it was measured with max_new_tokens 12, not 9"),
    ],
)
def test_what_would_not_compare_is_not_resumed(settings: dict[str, Any], fault: str, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    small(output=output)
    before = output.read_text()
    with pytest.raises(ForetellError, match=fault):
        small(output=output, resume=True, **settings)
    assert output.read_text() == before
    with pytest.raises(ForetellError, match="exists already; go on from it with --resume"):
        small(output=output)
    assert output.read_text() == before


def test_other_prompts_models_and_files_are_not_resumed(tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    settings: dict[str, Any] = {"strategies": ["linear"], "masks": [1], "max_new_tokens": 2, "rounds": 1, "hf": False}
    bench(tiny_model(), {"set": prompts(5)}, output=output, **settings)
    with pytest.raises(ForetellError, match="it has set with other prompts"):
        bench(tiny_model(), {"set": prompts(6)}, output=output, resume=True, **settings)
    trained = tiny_model()
    trained.mask_vectors.data[0, 0] += 1
    with pytest.raises(ForetellError, match="it was measured with adapter"):
        bench(trained, {"set": prompts(5)}, output=output, resume=True, **settings)
    for content in ("{", "[]", '{"settings": {}}'):
        output.write_text(content)
        with pytest.raises(ForetellError, match="is not a report"):
            bench(tiny_model(), {"set": prompts(5)}, output=output, resume=True, **settings)


def test_digest() -> None:
    one, two = torch.arange(6), torch.arange(6).view(2, 3)
    assert digest([one]) == digest([one.clone()]) != digest([two])
    assert digest([one, one + 1]) != digest([one + 1, one])


def test_methods_take_turns_at_every_batch_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    texts: list[str] = []

    def noted(model: Any, ids: Any, method: Any, *arguments: Any, **settings: Any) -> Any:
        names.append(str(method))
        texts.append(digest(ids))
        return run(model, ids, method, *arguments, **settings)

    run = bench_module.run
    monkeypatch.setattr(bench_module, "run", noted)
    rounds = 6
    (cell, *_) = small(rounds=rounds).cells
    count = len(cell.rows)
    names = names[: count * (1 + rounds)]
    orders = [tuple(names[at : at + count]) for at in range(count, len(names), count)]
    assert all(sorted(order) == sorted(names[:count]) for order in orders)
    assert all(len(set(texts[at : at + count])) == 1 for at in range(0, len(names), count))
    neighbours = {pair for order in orders for pair in itertools.pairwise(order)}
    assert len(neighbours) > count  # turns alone would always put the same one behind each
