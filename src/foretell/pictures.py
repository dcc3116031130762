"""How foretell's pictures look, and what they may be called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretell.errors import ForetellError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
INK, GREY, GRID = "#222222", "#666666", "#e3e3e3"
# Colours that any colour vision tells apart (Okabe and Ito).
BLUE, ORANGE, GREEN, PINK, YELLOW = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b59f3b"
HEADING: dict[str, Any] = {"loc": "left", "fontsize": 11.5, "fontweight": "bold", "color": INK}
LABEL: dict[str, Any] = {"fontsize": 9.5, "color": INK}


def check_plot_path(path: str | Path) -> None:
    """Raises ForetellError for a name that says no picture format."""
    if Path(path).suffix.lower() not in FORMATS:
        raise ForetellError(f"{path} is not a picture's name: it must end in {', '.join(FORMATS)}")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.12))
    FigureCanvasAgg(figure)
    return figure


def plain_frame(axes: Axes) -> None:
    """Left and bottom spines only, no ticks, the grid behind what is drawn."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0, colors=INK)
    axes.set_axisbelow(True)


def caption(figure: Figure, title: str, below: str) -> None:
    """A title above and a line in small print below, both at the left."""
    figure.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold", color=INK)
    figure.supxlabel(below, x=0.012, ha="left", fontsize=9, color=GREY)
