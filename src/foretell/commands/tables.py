"""How a report looks on a terminal, in a file and in a picture."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from foretell.evaluation.report import Cell, Report, Row, Spread

NOTHING = "–"


@dataclass(frozen=True)
class Column:
    """Shown on terminals of `narrowest` to `widest` characters."""

    title: str
    text: Callable[[Row], str]
    narrowest: int = 0
    widest: int = sys.maxsize


COLUMNS = (
    Column("tokens/step", lambda row: f"{row.counts.acceptance_rate:.2f}"),
    Column("tokens/s", lambda row: f"{row.tokens_per_second.median:.0f}"),
    Column("decoding/s", lambda row: number(row.decode_tokens_per_second, 0), 150),
    Column("first ms", lambda row: number(row.ms_to_first_token, 1), 108),
    Column("ms/step", lambda row: number(row.ms_per_step, 2), 100),
    Column("vs plain", lambda row: ratio(row.speedup), widest=99),
    Column("vs plain", lambda row: with_range(row.speedup), 100),
    Column("vs HF", lambda row: ratio(row.speedup_over_huggingface)),
    Column("drafts held, by place", lambda row: " ".join(map(percent, row.counts.draft_acceptance)), 150),
)


def report_renderables(report: Report, width: int) -> Iterator[RenderableType]:
    """Per point of the sweep a table and a sentence."""
    for cell in report.cells:
        yield report_table(report, cell, width)
        yield Text.assemble((f"{cell.point}: ", "bold"), cell.sentence(), f"; {repetition(cell)}")
        yield ""


def report_table(report: Report, cell: Cell, width: int) -> Table:
    """The rows of a cell, best one highlighted; narrow terminals get fewer columns."""
    best, count = cell.best(), cell.prompts
    title = f"{cell.point}: {count} prompt{'s' if count > 1 else ''}, "
    title += f"up to {report.settings['max_new_tokens']} new tokens each"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    columns = [column for column in COLUMNS if column.narrowest <= width <= column.widest]
    table.add_column("method")
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True)
    table.add_column("output", no_wrap=True)
    for row in cell.rows:
        output = {True: "identical", False: "differs", None: NOTHING}[row.identical]
        values = [column.text(row) for column in columns]
        table.add_row(str(row.method), *values, output, style="bold green" if row is best else "")
    for method, reason in cell.left_out.items():
        table.add_row(method, *[NOTHING] * len(columns), reason, style="dim")
    return table


def repetition(cell: Cell) -> str:
    """How much of the best row's text repeats itself: loops flatter acceptance."""
    return f"{percent(cell.best().counts.repeated_4gram_share)} % of 4-grams repeat"


def machine(report: Report) -> str:
    """What the seconds hold for, and how to read the columns."""
    return (
        f"{report.machine()}; vs plain, vs HF: how many times faster than plain decoding and than Hugging Face "
        "generate(), all with prefill; ms/step is decoding alone"
    )


def number(spread: Spread | None, digits: int) -> str:
    return NOTHING if spread is None else f"{spread.median:.{digits}f}"


def ratio(spread: Spread | None) -> str:
    return NOTHING if spread is None else f"{spread.median:.2f}x"


def with_range(spread: Spread) -> str:
    """The median with the least and the greatest, if they differ."""
    least, most = f"{spread.minimum:.2f}", f"{spread.maximum:.2f}"
    return ratio(spread) if least == most else f"{ratio(spread)} ({least}-{most})"


def percent(share: float) -> str:
    return f"{100 * share:.0f}"
