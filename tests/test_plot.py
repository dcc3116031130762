"""Pictures of a report: what is drawn, not how it looks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from foretell.errors import ForetellError
from foretell.evaluation.measure import Counts
from foretell.evaluation.methods import AUTOREGRESSIVE, HUGGINGFACE, PROMPT_LOOKUP, Method
from foretell.evaluation.plot import cells_along, methods_along, plot
from foretell.evaluation.report import Cell, Point, Report, Row, Spread

PLAIN, ONE, FOUR = Method(AUTOREGRESSIVE), Method("linear", 1), Method("linear", 4)
SETTINGS = {"max_new_tokens": 8, "rounds": 3}
ENVIRONMENT = {"model": "mine", "device": "cpu", "device_name": "x", "threads": 2, "dtype": "f", "torch": "2"}


def row(point: Point, method: Method, speed: float) -> Row:
    counts = Counts(8, 4, 2.0, 1.6, 2.0, [0, 4], [1.0], 0.0)
    spread = Spread(speed, speed * 0.9, speed * 1.1)
    return Row(point, method, counts, spread, spread, None, spread, None, 2.0, spread, None, None, None)


def cell(point: Point, speeds: dict[Method, float]) -> Cell:
    return Cell(point, 2, "0", [row(point, method, speed) for method, speed in speeds.items()])


def report(*points: Point) -> Report:
    speeds = {Method(HUGGINGFACE): 0.9, PLAIN: 1.0, ONE: 1.2, FOUR: 1.1, Method("quadratic", 4): 1.5}
    return Report(SETTINGS, ENVIRONMENT, [cell(point, speeds) for point in points])


def test_cells_along_a_quantity() -> None:
    points = [Point("a", 4), Point("a", 1), Point("a", 1, 1.0), Point("b", 2), Point("a", 1, 0.0, 64)]
    whole = report(*points)
    assert [c.point for c in cells_along(whole, points[1], "batch")] == [Point("a", 1), Point("a", 4)]
    assert [c.point for c in cells_along(whole, points[1], "temperature")] == [Point("a", 1), Point("a", 1, 1.0)]
    assert [c.point for c in cells_along(whole, points[1], "context")] == [Point("a", 1, 0.0, 64)]


def test_lines_are_those_of_the_best_number_of_masks() -> None:
    lookup = Method(PROMPT_LOOKUP, lookup=3)
    cells = [
        cell(Point("a", 1), {PLAIN: 1.0, lookup: 1.9, ONE: 1.4, FOUR: 1.6}),
        cell(Point("a", 2), {PLAIN: 1.0, ONE: 1.3, FOUR: 0.9}),
    ]
    assert methods_along(cells) == [ONE]
    assert methods_along(cells[:1]) == [lookup, FOUR]


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_pictures(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"report.{ending}"
    plot(report(Point("a"), Point("a", 2), Point("b"), Point("b", 1, 0.5)), path)
    assert path.read_bytes()[:4] in (b"\x89PNG", b"<?xm", b"%PDF")
    if ending == "svg":
        text = path.read_text()
        for words in ("a, by batch", "b, by temperature", "quadratic with 4 masks", "foretell bench: mine"):
            assert f"<!-- {words}" in text, words
        assert "a, by temperature" not in text and "by context" not in text


def test_what_is_no_picture(tmp_path: Path) -> None:
    nothing: Any = None
    with pytest.raises(ForetellError, match=r"must end in \.png, \.svg, \.pdf"):
        plot(nothing, tmp_path / "report.txt")
