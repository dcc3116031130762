"""The curves of trainings: losses, agreement and simulated acceptance over the steps, read from metrics.jsonl."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretell.checkpoint import CONFIG_FILE, PICTURE, write_bytes
from foretell.errors import ForetellError
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

METRICS_FILE = "metrics.jsonl"
HELD_OUT = "held_out_simulated_acceptance"
FIRST_TERMS = ("loss", "base_loss", "sampler_loss", "lcm_loss")  # others, such as ntp_loss, come behind
COLOURS = (BLUE, ORANGE, GREEN, PINK, YELLOW, "#56b4e9", "#5f5f5f")
COLUMNS, WIDTH, ROW = 5, 13.0, 2.7  # most loss panels in a row; inches
SECOND = 1.3  # height of the panels below, in rows of losses
SMOOTHED_FROM = 40  # points: fewer are drawn as they are
NAN = float("nan")  # a mask that had no label
WIDE_RANGE = 20  # greatest over least from which a loss gets a logarithmic axis


@dataclass(frozen=True)
class Run:
    """A training's directory: its lines of metrics by step, and the step whose adapter it keeps (None: the last)."""

    name: str
    lines: list[dict[str, Any]]
    kept_step: int | None = None

    def series(self, name: str) -> tuple[list[int], list[Any]]:
        """Steps and values where `name` was measured."""
        found = [(line["step"], line[name]) for line in self.lines if line.get(name) is not None]
        return [step for step, _ in found], [value for _, value in found]

    def terms(self) -> list[str]:
        """The losses measured, the sum first."""
        names = {name: None for line in self.lines for name in line if name == "loss" or name.endswith("_loss")}
        return [name for name in FIRST_TERMS if name in names] + [name for name in names if name not in FIRST_TERMS]

    def held_out(self) -> dict[str, Any] | None:
        """The held-out measurement of the adapter kept; None without any."""
        measured = [line for line in self.lines if HELD_OUT in line]
        kept = [line for line in measured if line["step"] == self.kept_step]
        found = kept or measured
        return found[-1] if found else None

    def to_dict(self) -> dict[str, Any]:
        return {"run": self.name, "kept_step": self.kept_step, "held_out": self.held_out(), "metrics": self.lines}


def read_run(directory: str | Path) -> Run:
    """The metrics in a training's output directory, also of one that still runs.

    Raises ForetellError if there are none.
    """
    directory = Path(directory)
    try:
        text = (directory / METRICS_FILE).read_text(encoding="utf-8")
    except OSError as error:
        raise ForetellError(
            f"{directory} has no {METRICS_FILE}; give the --output directory of a `foretell train`"
        ) from error
    lines = []
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue  # being written at this moment, or cut in two by a kill
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            lines.append(values)
    try:
        kept = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))["provenance"].get("kept_step")
    except (OSError, ValueError, KeyError, AttributeError):
        kept = None
    return Run(directory.resolve().name, lines, kept)


def milestones(run: Run, most: int = 10) -> list[dict[str, Any]]:
    """At most so many steps, the last among them, with the latest losses and acceptance of each: a curve as a table.

    They are steps measured on held-out text, where there are any.
    """
    wanted = HELD_OUT if any(HELD_OUT in line for line in run.lines) else "loss"
    names = [*run.terms(), "simulated_acceptance", HELD_OUT]
    rows: list[dict[str, Any]] = []
    latest: dict[str, Any] = {}
    for line in run.lines:
        latest |= {name: line[name] for name in names if line.get(name) is not None}
        if wanted in line:
            rows.append({"step": line["step"], **latest})
    return [rows[-1 - i * (len(rows) - 1) // max(1, most - 1)] for i in range(most)][::-1] if len(rows) > most else rows


def picture_path(directory: str | Path) -> Path:
    """Where a training's own picture lies."""
    return Path(directory) / PICTURE


def draw(runs: Sequence[Run], path: str | Path) -> None:
    """Writes a picture: a panel per loss, simulated acceptance, agreement per mask, acceptance by number of masks.

    Several runs are laid over each other. Raises ForetellError for a name that says no picture format, for runs in
    which nothing was measured yet, and if the file can't be written.
    """
    check_plot_path(path)
    if empty := [run.name for run in runs if not run.lines]:
        raise ForetellError(f"{empty[0]} holds no measurement yet; wait for its first --log-every steps")
    terms = list(dict.fromkeys(term for run in runs for term in run.terms()))
    rows, columns = -(-len(terms) // COLUMNS) or 1, min(len(terms), COLUMNS) or 1
    figure = new_figure(WIDTH, ROW * (rows + SECOND) + 0.6)
    losses, measured = figure.subfigures(2, 1, squeeze=False, height_ratios=(rows, SECOND))[:, 0]
    panels = losses.subplots(rows, columns, squeeze=False).flatten()
    for axes, term in zip(panels, terms, strict=False):
        _loss(axes, runs, term)
    for axes in panels[len(terms) :]:
        axes.set_axis_off()
    over_steps, per_mask, by_masks = measured.subplots(1, 3)
    _acceptance(over_steps, runs)
    if len(runs) == 1:
        _agreement_over_steps(per_mask, runs[0])
    else:
        _agreement_now(per_mask, runs)
    if len(runs) > 1 or len(panels[0].lines) > 1:
        panels[0].legend(frameon=False, fontsize=9)
    _by_masks(by_masks, runs)
    for axes in (*panels[: len(terms)], over_steps, per_mask, by_masks):
        plain_frame(axes)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
    lasts = [f"{run.name}: {run.lines[-1]['step']} steps" for run in runs]
    caption(figure, "foretell train: " + ", ".join(run.name for run in runs), "; ".join(lasts))
    content = io.BytesIO()
    figure.savefig(content, dpi=110, facecolor="white", format=Path(path).suffix[1:].lower())
    write_bytes(content.getvalue(), Path(path))


def _loss(axes: Axes, runs: Sequence[Run], term: str) -> None:
    least, most, several = float("inf"), 0.0, len(runs) > 1
    for run, colour in _coloured(runs):
        steps, values = run.series(term)
        if not values:
            continue
        smooth = _smoothed(values)
        if smooth != values:
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3, label=None if several else "as measured")
        axes.plot(steps, smooth, color=colour, linewidth=1.8, label=run.name if several else "smoothed")
        least, most = min(least, *values), max(most, *values)
    if least > 0 and most > WIDE_RANGE * least:
        axes.set_yscale("log")
    axes.set_title("sum of losses" if term == "loss" else term.replace("_", " "), **HEADING)
    axes.set_xlabel("step", **LABEL)


def _acceptance(axes: Axes, runs: Sequence[Run]) -> None:
    several = len(runs) > 1
    for run, colour in _coloured(runs):
        faint: dict[str, Any] = {"color": colour, "linewidth": 1, "alpha": 0.45}
        axes.plot(*run.series("simulated_acceptance"), label=None if several else "training text, estimate", **faint)
        steps, values = run.series(HELD_OUT)
        label = run.name if several else "held-out prompts"
        axes.plot(steps, values, color=colour, linewidth=2, marker="o", markersize=4, label=label)
        if (kept := run.held_out()) is not None:
            place = (kept["step"], kept[HELD_OUT])
            axes.plot(*place, marker="*", markersize=14, color=colour, markeredgecolor="white", zorder=5)
            axes.annotate(
                f"{kept[HELD_OUT]:.2f}", place, (-6, 8), textcoords="offset points", ha="right", fontsize=9.5,
                fontweight="bold", color=colour,
            )  # fmt: skip
    axes.margins(y=0.15)
    axes.set_title("simulated acceptance" + (" (★ kept)" if any(run.held_out() for run in runs) else ""), **HEADING)
    axes.set_ylabel("tokens per step, quadratic", **LABEL)
    axes.set_xlabel("step", **LABEL)
    axes.legend(frameon=False, fontsize=9, loc="lower right")


def _agreement_over_steps(axes: Axes, run: Run) -> None:
    from matplotlib import colormaps

    held_out = run.held_out() is not None
    steps, values = run.series("held_out_agreement" if held_out else "agreement")
    masks = max(map(len, values), default=0)
    for mask in range(masks):
        colour = colormaps["viridis"](0.9 * mask / max(1, masks - 1))
        line = [NAN if value[mask] is None else value[mask] for value in values]  # a gap
        axes.plot(steps, line, color=colour, linewidth=1.8, marker="o" if len(steps) < 30 else "", markersize=3,
                  label=f"mask {mask + 1}")  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_title(f"agreement, {'held-out prompts' if held_out else 'training text'}", **HEADING)
    axes.set_xlabel("step", **LABEL)
    if masks:
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.02), handlelength=1.2)


def _agreement_now(axes: Axes, runs: Sequence[Run]) -> None:
    for run, colour in _coloured(runs):
        found = run.held_out()
        values = found["held_out_agreement"] if found else (run.series("agreement")[1] or [[]])[-1]
        values = [NAN if value is None else value for value in values]
        axes.plot(range(1, len(values) + 1), values, color=colour, linewidth=2, marker="o", markersize=4)
    axes.set_ylim(bottom=0)
    _masks_below(axes)
    axes.set_title("agreement per mask", **HEADING)
    axes.set_xlabel("mask", **LABEL)


def _by_masks(axes: Axes, runs: Sequence[Run]) -> None:
    for run, colour in _coloured(runs):
        found = run.held_out() or {}
        for strategy, style in (("quadratic", "-"), ("linear", (0, (4, 2)))):
            values = found.get(f"held_out_{strategy}", [])
            axes.plot(
                range(1, len(values) + 1), values, color=colour, linewidth=2, linestyle=style, marker="o", markersize=4,
                label=strategy if run is runs[0] else None,
            )  # fmt: skip
    axes.set_title("simulated acceptance by masks", **HEADING)
    axes.set_ylabel("tokens per step, held-out prompts", **LABEL)
    axes.set_ylim(bottom=1)
    axes.set_xlabel("masks", **LABEL)
    _masks_below(axes)
    if any(run.held_out() for run in runs):
        axes.legend(frameon=False, fontsize=9, loc="best")
    else:
        axes.text(0.5, 0.5, "nothing was held out", transform=axes.transAxes, ha="center", color=INK)


def _masks_below(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _coloured(runs: Sequence[Run]) -> list[tuple[Run, str]]:
    return [(run, COLOURS[number % len(COLOURS)]) for number, run in enumerate(runs)]


def _smoothed(values: Sequence[float]) -> list[float]:
    """An exponential mean over about a twentieth of the curve; a short curve as it is."""
    if len(values) < SMOOTHED_FROM:
        return list(values)
    weight, mean, total, out = 1 - 20 / len(values), 0.0, 0.0, []
    for value in values:
        mean, total = weight * mean + value, weight * total + 1
        out.append(mean / total)
    return out
