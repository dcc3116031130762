"""What a training looks like while it runs: a live panel on a terminal, one line per measurement elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

BAR = 12  # characters of a full agreement bar
EIGHTHS = " ▏▎▍▌▋▊▉"


class Display:
    """Give it to `train` as `on_step`, inside `with`. `console` defaults to standard error."""

    def __init__(self, steps: int, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.latest: dict[str, Any] = {}
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=self.console,
        )  # fmt: skip
        self._task = self._progress.add_task("loading", total=steps)
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(self.render(), console=self.console, refresh_per_second=4).__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)

    def __call__(self, line: dict[str, Any]) -> None:
        if "reading" in line:
            self._progress.update(self._task, description=f"reading, {line['reading']:,} records")
        elif "data" in line:
            self._progress.update(self._task, description="training")
            self.console.print(line["data"], soft_wrap=not self.console.is_terminal, highlight=False, markup=False)
        self.latest |= line
        self._progress.update(self._task, completed=line["step"], total=line["steps"])
        if self._live is not None:
            self._live.update(self.render())
        elif "loss" in line or "held_out_agreement" in line:
            self.console.print(plain_line(self.latest), soft_wrap=True, highlight=False, markup=False)

    def render(self) -> Group:
        """Progress, losses and agreement; the latest of each."""
        return Group(self._progress, Text(losses_line(self.latest)), *self._agreement())

    def _agreement(self) -> Iterator[RenderableType]:
        table = Table.grid(padding=(0, 1))
        held_out = self.latest.get("held_out_agreement")
        values = held_out or self.latest.get("agreement") or []
        for number, value in enumerate(values, 1):
            shown = "   –" if value is None else f"{value:4.0%}"
            table.add_row(f"mask {number}", Text(bar(value or 0.0), style="green"), shown)
        name = "held_out_simulated_acceptance" if held_out else "simulated_acceptance"
        if values:
            yield table
        if values and self.latest[name] is not None:
            where = "held-out text" if held_out else "training text"
            yield Text(f"{self.latest[name]:.2f} tokens per step, simulated on {where}")


def bar(value: float) -> str:
    """A bar of at most BAR characters for a value from 0 to 1."""
    eighths = round(min(max(value, 0.0), 1.0) * BAR * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (EIGHTHS[rest] if rest else "")).ljust(BAR)


def losses_line(line: dict[str, Any]) -> str:
    names = {
        "loss": "loss", "base_loss": "base", "sampler_loss": "sampler", "lcm_loss": "lcm", "ntp_loss": "ntp", "lr": "lr"
    }  # fmt: skip
    parts = [f"{short} {line[name]:.4g}" for name, short in names.items() if name in line]
    if "tokens_per_second" in line:
        parts.append(f"{line['tokens_per_second']:,.0f} tokens/s")
    return "  ".join(parts)


def plain_line(line: dict[str, Any]) -> str:
    text = f"step {line['step']}/{line['steps']}  {losses_line(line)}"
    if "agreement" in line:
        text += "  agreement " + " ".join("–" if value is None else f"{value:.2f}" for value in line["agreement"])
        if line["simulated_acceptance"] is not None:
            text += f"  simulated acceptance {line['simulated_acceptance']:.2f}"
    if "held_out_simulated_acceptance" in line:
        text += f"  held out {line['held_out_simulated_acceptance']:.2f}"
    return text
