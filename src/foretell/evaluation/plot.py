"""A report as a picture: speed-up and acceptance by method, and as lines over what a sweep varied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretell.evaluation.methods import ADAPTIVE, ASSISTED, AUTOREGRESSIVE, HUGGINGFACE, PROMPT_LOOKUP, Method
from foretell.evaluation.report import Cell, Point, Report, Row, Spread
from foretell.pictures import (
    BLUE,
    GREEN,
    GRID,
    HEADING,
    INK,
    LABEL,
    ORANGE,
    PINK,
    YELLOW,
    caption,
    check_plot_path,
    new_figure,
    plain_frame,
)  # fmt: skip

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VARIED = {
    "batch": "batch: prompts side by side",
    "temperature": "temperature",
    "context": "context: tokens of a prompt",
}

# Baselines in muted colours.
COLOURS = {
    HUGGINGFACE: "#a3a3a3",
    PROMPT_LOOKUP: YELLOW,
    ASSISTED: "#8a6a55",
    AUTOREGRESSIVE: "#5f5f5f",
    "linear": BLUE,
    "quadratic": ORANGE,
    ADAPTIVE: GREEN,
}
OTHER = PINK
SPEED, STEPS = "times as fast as plain decoding", "tokens per step"

# Inches: the figure, a bar, what stands above and below a panel, a panel of lines, title and machine.
WIDTH, BAR, AROUND, LINES, MARGINS = 13.0, 0.27, 1.0, 2.5, 0.8


def plot(report: Report, path: str | Path) -> None:
    """Writes a picture of the report: per prompt set bars for all methods, and lines over every quantity varied.

    Bars are those of the first point of each set. Lines show every strategy with the number of masks that is best
    over them all, the rest of the sweep at its first values.
    Raises ForetellError for a name that says no picture format, OSError if the file can't be written.
    """
    check_plot_path(path)
    panels: list[tuple[list[Cell], str | None]] = []  # cells, and the quantity that lines are drawn over
    firsts: dict[str, Cell] = {}
    for cell in report.cells:
        firsts.setdefault(cell.point.set, cell)
    for first in firsts.values():
        panels.append(([first], None))
        lines = [(cells_along(report, first.point, varied), varied) for varied in VARIED]
        panels += [(cells, varied) for cells, varied in lines if len(cells) > 1]
    heights = [AROUND + (LINES if varied else BAR * len(cells[0].rows)) for cells, varied in panels]
    figure = new_figure(WIDTH, sum(heights) + MARGINS)
    grid = figure.subplots(len(panels), 2, squeeze=False, height_ratios=heights)
    for (speed, steps), (cells, varied) in zip(grid, panels, strict=True):
        if varied:
            _lines(speed, steps, cells, varied)
        else:
            _bars(speed, steps, cells[0])
        for axes in (speed, steps):
            plain_frame(axes)
    name = report.environment["model"] or report.environment["base"]
    new = f"up to {report.settings['max_new_tokens']} new tokens per prompt"
    caption(figure, f"foretell bench: {name}", f"{report.machine()}; {new}")
    figure.savefig(path, dpi=150, facecolor="white")


def cells_along(report: Report, first: Point, name: str) -> list[Cell]:
    """The cells that differ from `first` in the quantity `name` only, by its size; prompts as they are have none."""

    def others(point: Point) -> list[Any]:
        return [getattr(point, other) for other in ("set", *VARIED) if other != name]

    cells = [c for c in report.cells if others(c.point) == others(first) and getattr(c.point, name) is not None]
    return sorted(cells, key=lambda cell: getattr(cell.point, name))


def methods_along(cells: Sequence[Cell]) -> list[Method]:
    """Those drawn as lines: of every name the variant with the greatest sum of speed-ups where all cells have it."""
    speeds = [{row.method: row.speedup.median for row in cell.rows} for cell in cells]
    best: dict[str, Method] = {}
    for method in speeds[0]:
        if all(method in own for own in speeds):
            total = sum(own[method] for own in speeds)
            if method.name not in best or total > sum(own[best[method.name]] for own in speeds):
                best[method.name] = method
    return [method for method in best.values() if method.name != AUTOREGRESSIVE]  # which is the line at 1


def _bars(speed: Axes, steps: Axes, cell: Cell) -> None:
    rows, best, places = cell.rows, cell.best(), range(len(cell.rows))
    colours = [_colour(row.method) for row in rows]
    ratios, rates = [row.speedup.median for row in rows], [row.counts.acceptance_rate for row in rows]
    tops = [row.speedup.maximum for row in rows]
    speed.errorbar(ratios, places, xerr=_whiskers([row.speedup for row in rows]), fmt="none", ecolor=INK, elinewidth=1)
    for axes, values, ends, unit in ((speed, ratios, tops, "×"), (steps, rates, rates, "")):
        axes.barh(places, values, height=0.7, color=colours)
        for place, row in enumerate(rows):
            axes.annotate(
                f"{values[place]:.2f}{unit}",
                (ends[place], place),
                (5, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                fontweight="bold" if row is best else "normal",
                color=INK,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            )
        axes.axvline(1, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_xlim(0, max(ends) * 1.14)
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        axes.spines["left"].set_visible(False)
    speed.set_yticks(places, [str(row.method) for row in rows])
    steps.set_yticks([])
    speed.set_title(f"{cell.point} ({cell.prompts} prompt{'s' if cell.prompts > 1 else ''})", **HEADING)
    speed.set_xlabel(SPEED, **LABEL)
    steps.set_xlabel(STEPS, **LABEL)


def _lines(speed: Axes, steps: Axes, cells: Sequence[Cell], name: str) -> None:
    values = [getattr(cell.point, name) for cell in cells]
    places = range(len(values))  # evenly spaced: values usually double
    for method in methods_along(cells):
        rows = [_row_of(cell, method) for cell in cells]
        line: dict[str, Any] = {"color": _colour(method), "marker": "o", "markersize": 5, "linewidth": 2}
        ratios = [row.speedup for row in rows]
        speed.errorbar(
            places, [r.median for r in ratios], yerr=_whiskers(ratios), elinewidth=1, label=str(method), **line
        )
        steps.plot(places, [row.counts.acceptance_rate for row in rows], **line)
    speed.axhline(1, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), label="plain decoding")
    for axes in (speed, steps):
        axes.set_xticks(places, [f"{value:g}" for value in values])
        axes.set_xlim(-0.25, len(values) - 0.75)
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.set_xlabel(VARIED[name], **LABEL)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
    steps.legend(
        *speed.get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, fontsize=9
    )
    same = replace(cells[0].point, **{name: getattr(Point, name)})  # with the default, which is not named
    speed.set_title(f"{same}, by {name}", **HEADING)
    speed.set_ylabel(SPEED, **LABEL)
    steps.set_ylabel(STEPS, **LABEL)


def _row_of(cell: Cell, method: Method) -> Row:
    return next(row for row in cell.rows if row.method == method)


def _whiskers(spreads: Sequence[Spread]) -> list[list[float]]:
    """From least to greatest, as matplotlib wants them: distances below and above."""
    return [[s.median - s.minimum for s in spreads], [s.maximum - s.median for s in spreads]]


def _colour(method: Method) -> str:
    return COLOURS.get(method.name, OTHER)
