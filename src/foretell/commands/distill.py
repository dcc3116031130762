"""`foretell distill`: a base's own answers, to train its adapter on. In Python: `foretell.distill(...)`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foretell.commands.common import (
    BaseOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    PackedOption,
    TrustOption,
    quiet_loading,
    to_json,
)
from foretell.commands.options import dataclass_options
from foretell.config import DecodeConfig, DistillConfig

if TYPE_CHECKING:
    from foretell.distillation import Distillation, Progress

NAMED = 5  # skipped prompts that are shown; --json has all


@dataclass_options(DistillConfig, DecodeConfig)
def command(
    prompts: Annotated[
        str,
        typer.Option(
            help="what is answered: .jsonl, .json or .parquet with messages, conversations, prompt, instruction, "
            "question or text in each record, .txt with a prompt per line, a directory, a Hub name, problems or code",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="file that the answers go to, for train --data", show_default=False)],
    model: ModelOption = None,
    base: BaseOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with what an earlier call began")] = False,
    json: JsonOption = False,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    packed: PackedOption = None,
    trust_remote_code: TrustOption = False,
    **values: Any,
) -> None:
    """Let a base answer prompts, so that its adapter learns the text it will have to foresee.

    With --base alone the base answers token by token; with --model its trained adapter makes that faster.
    """
    from foretell.distillation import distill
    from foretell.distillation.journal import part_of

    try:
        with quiet_loading(), progress_bar() as on_progress:
            done = distill(
                prompts, output, model=model, base=base, resume=resume, dtype=dtype, device=device, packed=packed,
                trust_remote_code=trust_remote_code, on_progress=on_progress, **values,
            )  # fmt: skip
    except KeyboardInterrupt:
        if part_of(output).exists():
            print(
                f"foretell: the answers so far are in {part_of(output)}; --resume goes on from there", file=sys.stderr
            )
        raise
    print(to_json(done.to_dict()) if json else report(done))


@contextmanager
def progress_bar() -> Iterator[Callable[[Progress], None]]:
    """Answers, tokens per second and per step on a terminal's stderr, gone when done; elsewhere a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from foretell.commands.render import NowAndThen

    console = Console(stderr=True)
    line = NowAndThen(console)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=None)

        def on_progress(now: Progress) -> None:
            speed = f"answering: {now.tokens / now.seconds:,.0f} tokens/s, {now.tokens / now.steps:.2f} tokens per step"
            bar.update(task, completed=now.done, total=now.total, description=speed)
            line(now.done, now.total, speed)

        yield on_progress


def report(done: Distillation) -> str:
    """What was answered, what was not and why, and what to do next."""
    lines = [f"{done.answers} answers to {done.prompts} prompts are in {done.output}."]
    if done.tokens:
        lines.append(
            f"{done.tokens} tokens in {done.seconds:.1f} s: {done.tokens_per_second:.0f} tokens per second, "
            f"{done.acceptance_rate:.2f} tokens per step."
        )
    if done.resumed:
        lines.append(f"{done.resumed} answers were there before.")
    if done.cut:
        fate = "left out" if done.left_out else "kept (--only-finished leaves them out)"
        lines.append(f"{done.cut} were cut off by the length and {fate}; a larger --max-new-tokens lets them end.")
    if done.skipped:
        lines.append(f"{len(done.skipped)} prompts were skipped:")
        lines += [f"  {one['prompt']}: {one['reason']}" for one in done.skipped[:NAMED]]
        if len(done.skipped) > NAMED:
            lines.append(f"  and {len(done.skipped) - NAMED} more; --json names them all")
    if not done.answers:
        return "\n".join([*lines, "There is nothing to train on."])
    base, data = shlex.quote(done.base), shlex.quote(done.output)
    return "\n".join([*lines, "Next:", f"  foretell train --base {base} --data {data} --output my-adapter"])
