"""`foretell data`: what training text becomes before a model sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from foretell.commands.common import JsonOption, TrustOption, to_json
from foretell.commands.options import dataclass_options
from foretell.config import TrainConfig

if TYPE_CHECKING:
    from rich.console import Console

    from foretell.training.preview import Preview, Shown

group = typer.Typer()

TRAINED, READ, ANCHOR = "green", "dim", "bold reverse"
SETTINGS = ("batch_size", "seq_len", "packing", "anchors", "seed")
OTHERS = tuple(name for name in TrainConfig.__dataclass_fields__ if name not in SETTINGS)


@group.callback(invoke_without_command=True)
def _group(context: typer.Context) -> None:
    """Look at training text as the model will see it."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@group.command()
@dataclass_options(TrainConfig, exclude=OTHERS)
def show(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE...", help="as `foretell train --data`: a file, directory, Hub name")
    ],
    base: Annotated[str, typer.Option(help="base model, of which the tokenizer is used: a directory or a Hub name")],
    records: Annotated[int, typer.Option(min=0, help="sequences to show, the first that training draws")] = 3,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
    **values: Any,
) -> None:
    """Print the first sequences of a training, coloured by what is learnt, with anchors, and what reading came to.

    Give the same settings as to `foretell train`, and these are its very sequences.
    """
    from rich.console import Console

    from foretell.training.data import Report
    from foretell.training.preview import preview

    with Console(stderr=True).status("reading") as status:

        def reading(report: Report) -> None:
            status.update(f"reading, {report.records:,} records")

        settings = TrainConfig.from_dict(values)
        found = preview(
            sources, base, settings, records=records, trust_remote_code=trust_remote_code, on_progress=reading
        )
    if as_json:
        typer.echo(to_json(found.to_dict()))
        return
    console = Console(highlight=False)
    for sequence in found.shown:
        _print_sequence(console, sequence)
    _print_report(console, found)


def _print_sequence(console: Console, shown: Shown) -> None:
    from rich.text import Text

    several = f", {len(shown.starts)} documents" if len(shown.starts) > 1 else ""
    heading = (
        f"-- step {shown.step}, sequence {shown.row}: {len(shown.ids)} tokens, {sum(shown.trained)} trained, "
        f"{len(shown.anchors)} anchors{several}"
    )
    console.print(Text(heading, "bold"))
    line, inside = Text(), False
    for stretch in shown.stretches:
        if stretch.begins:
            line.append(("]]" if inside else "") if not _coloured(console) else "").append(
                "\n-- next document\n", "bold"
            )
            inside = False
        if _coloured(console):
            line.append(
                stretch.text, f"{TRAINED if stretch.trained else READ} {ANCHOR if stretch.anchor else ''}".strip()
            )
            continue
        if stretch.trained != inside:
            line.append("[[" if stretch.trained else "]]")
            inside = stretch.trained
        line.append(stretch.text + ("^" if stretch.anchor else ""))
    console.print(line.append("]]" if inside else ""), soft_wrap=not console.is_terminal)
    console.print()


def _print_report(console: Console, found: Preview) -> None:
    from rich.text import Text

    if found.shown:
        legend = Text("How to read it: ")
        if _coloured(console):
            legend.append("learnt", TRAINED).append(", ").append("only read", READ).append(", ")
            legend.append("a mask block hangs after this token", f"{TRAINED} {ANCHOR}")
        else:
            legend.append("[[learnt]], only read; ^ a mask block hangs after this token")
        console.print(legend)
    for line in found.corpus.describe() if len(found.corpus.sources) > 1 else ():
        console.print(
            f"{line['source']}: {line['share']:.0%} of what is drawn, {line['examples']} sequences", markup=False
        )
    console.print(str(found.corpus.report), markup=False, soft_wrap=True)
    console.print(
        f"{found.held_out} sequences are held out to measure on; an epoch draws {found.sequences}", markup=False
    )


def _coloured(console: Console) -> bool:
    return console.is_terminal and console.color_system is not None
