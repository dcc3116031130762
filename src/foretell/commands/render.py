"""How steps, and the progress of long work, look on a terminal."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from torch import Tensor

    from foretell.decoding.generate import Generation, MTPForCausalLM
    from foretell.decoding.loop import Step

HUES = ("dark_cyan", "dark_orange3")  # readable on dark and on light backgrounds
PLAIN_WIDTH = 110  # columns where no terminal says
EVERY = 30.0  # seconds


def stdout_console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def origin_style(number: int, origin: str) -> str:
    """Step `number` gives the hue; drafts are underlined, the base's own token is bold."""
    hue = HUES[number % len(HUES)]
    return f"underline {hue}" if origin == "draft" else f"bold {hue}"


def styled_runs(piece: str, style: str) -> Iterator[tuple[str, str]]:
    """Words in the style, white space in none: underlined indentation would look like a form to fill in."""
    for part in re.findall(r"\s+|\S+", piece):
        yield part, "" if part.isspace() else style


def bar_of(console: Console) -> str:
    """What ends a step where there are no colours to tell steps apart; "" where there are."""
    if console.color_system is not None:
        return ""
    return "│" if console.encoding.startswith("utf") else "|"


class LiveText:
    """Prints a prompt and its steps token by token, and keeps all of it as one `Text` for a picture.

    Without colours a bar ends every step if `bars`.
    """

    def __init__(self, console: Console, model: MTPForCausalLM, ids: Tensor, *, bars: bool = False) -> None:
        from foretell.decoding.text import TextStream

        self.console = console
        self.text = Text()
        self._stream = TextStream(model.tokenizer, ids[0].tolist())
        self._steps = 0
        self._bar = bar_of(console) if bars else ""

    def add(self, piece: str, style: str = "") -> None:
        for part, own in styled_runs(piece, style):
            self.text.append(part, own)
            # out(), not print(): pieces must not be wrapped, trimmed or read as markup one by one.
            self.console.out(part, style=own or None, end="", highlight=False)
        self.console.file.flush()

    def prompt(self, text: str) -> None:
        self.add(text, "dim")

    def step(self, step: Step) -> None:
        for token, origin in zip(step.tokens, step.origins, strict=True):
            self.add(self._stream.push(token), origin_style(self._steps, origin))
        self.console.out(self._bar, end="", highlight=False)
        self._steps += 1

    def end(self) -> None:
        self.add(self._stream.flush())
        self.console.out("", highlight=False)


def generate_live(
    console: Console, model: MTPForCausalLM, ids: Tensor, live: LiveText, settings: dict[str, Any]
) -> Generation:
    """`model.generate` that shows every step; its seconds leave out the printing."""
    steps, done, seconds = model.steps(input_ids=ids, **settings), [], 0.0
    while True:
        start = time.perf_counter()
        step = next(steps, None)
        seconds += time.perf_counter() - start
        if step is None:
            break
        live.step(step)
        done.append(step)
    live.end()
    return model.account(done, ids.shape[1], seconds, model.decode_config(settings))


def summary(generation: Generation) -> str:
    """One line: tokens, steps, acceptance, seconds."""
    how = generation.strategy
    if generation.masks:
        how += f" with {generation.masks} mask{'s' if generation.masks > 1 else ''}"
    g = generation
    return (
        f"{g.new_tokens} tokens in {g.steps} steps, {g.acceptance_rate:.2f} tokens per step; "
        f"{g.seconds:.2f} s, {g.tokens_per_second:.0f} tokens per second; {how}"
    )


class NowAndThen:
    """A line of progress every EVERY seconds where there is no terminal to draw a bar on; quick work says nothing."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._next = time.monotonic() + EVERY

    def __call__(self, done: int, total: int | None, what: str) -> None:
        if not self.console.is_terminal and (now := time.monotonic()) >= self._next:
            self._next = now + EVERY
            self.console.print(f"{done}/{total} {what}", soft_wrap=True, highlight=False, markup=False)


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on a terminal's stderr, gone when done; elsewhere a line now and then."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    line = NowAndThen(console)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=None)

        def on_progress(done: int, total: int, label: str) -> None:
            progress.update(task, completed=done, total=total, description=f"measuring {label}")
            line(done, total, f"measuring {label}")

        yield on_progress
