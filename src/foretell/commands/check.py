"""`foretell check`: is the output the base's own? In Python: `foretell.evaluation.check.check(...)`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from foretell.commands.common import (
    BaseOption,
    CompiledOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    PackedOption,
    QuantiseOption,
    TrustOption,
    load_model,
    to_json,
)

if TYPE_CHECKING:
    from rich.table import Table

    from foretell.decoding.generate import MTPForCausalLM
    from foretell.evaluation.check import CheckReport

SHOWN = 20  # differences in the table; --json has them all


def command(
    prompts: Annotated[
        str,
        typer.Option(
            help="problems, code, or a file: .jsonl with prompt, question or messages in each line, or .txt with "
            "a prompt per line"
        ),
    ] = "problems",
    limit: Annotated[int | None, typer.Option(help="prompts taken of the set \\[all]", min=1)] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="put prompts through the base's chat template")
    ] = False,
    model: ModelOption = None,
    base: BaseOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="generate at most this many tokens per prompt")] = 128,
    strategy: Annotated[str | None, typer.Option(help="which layout every step uses \\[that of generate]")] = None,
    masks: Annotated[int | None, typer.Option(help="masks per block \\[the k the adapter was trained with]")] = None,
    batch_size: Annotated[int, typer.Option(help="prompts decoded side by side")] = 1,
    upcast: Annotated[
        bool,
        typer.Option(
            "--upcast/--no-upcast", help="also give gaps in float32, on a widened copy of the base, if anything differs"
        ),
    ] = True,
    simulated: Annotated[
        bool,
        typer.Option(
            "--simulated/--no-simulated",
            help="also simulate linear and quadratic decoding of the prompts, as training does with held-out ones, "
            "and compare the tokens per step",
        ),
    ] = False,
    json: JsonOption = False,
    dtype: DtypeOption = "bfloat16",
    device: DeviceOption = None,
    packed: PackedOption = None,
    compiled: CompiledOption = False,
    quantise: QuantiseOption = "none",
    trust_remote_code: TrustOption = False,
) -> None:
    """Compare the output with the base's own generate(), token for token, and weigh every difference.

    Ends with exit code 1 if a token differs that is not a near-tie, which rounding may decide either way, or if
    simulated acceptance is more than 5 % off.
    """
    from foretell.evaluation.check import check
    from foretell.evaluation.foreseen import foreseen
    from foretell.evaluation.prompts import load_prompts, prompts_path

    prompts_path(prompts)  # a misspelt name shows before the model is loaded
    loaded = load_model(model, base, dtype, device, trust_remote_code, packed, quantise, compiled)
    texts = load_prompts(prompts, tokenizer=loaded.tokenizer, chat=chat, limit=limit)

    from foretell.commands.render import progress_bar, stdout_console

    with progress_bar() as on_progress:
        report = check(
            loaded,
            texts,
            max_new_tokens=max_new_tokens,
            strategy=strategy,
            masks=masks,
            batch_size=batch_size,
            upcast=upcast,
            on_progress=on_progress,
        )
        compared = None
        if simulated:
            compared = foreseen(loaded, texts, max_new_tokens=max_new_tokens, on_progress=on_progress)
    if json:
        both = {"simulated_acceptance": compared.to_dict()} if compared else {}
        print(to_json(report.to_dict() | both, indent=2))
    else:
        console = stdout_console()
        if report.divergences:
            console.print(table(report, loaded))
        console.print(f"{report.environment['dtype']}: {report.sentence()}")
        if compared:
            console.print(compared.sentence())
    if not (report.passed and (compared is None or compared.passed)):
        raise typer.Exit(1)


def table(report: CheckReport, model: MTPForCausalLM) -> Table:
    """The first differences, each with both tokens and the gap between their logits."""
    from rich.table import Table

    more = len(report.divergences) - SHOWN
    rows = Table(box=None, padding=(0, 2, 0, 0), caption=f"and {more} more" if more > 0 else None)
    for title in ("prompt", "token", "generate()", "ours", "logit gap", "units", "gap in float32", "near-tie"):
        rows.add_column(title, justify="left" if title in ("generate()", "ours", "near-tie") else "right")
    for d in report.divergences[:SHOWN]:
        rows.add_row(
            str(d.prompt + 1),
            str(d.position + 1),
            in_words(d.expected, model),
            in_words(d.found, model),
            f"{d.logit_gap:.2g}",
            f"{d.logit_gap / d.unit:.1f}" if d.unit else "–",
            "–" if d.logit_gap_float32 is None else f"{d.logit_gap_float32:.2g}",
            "yes" if d.near_tie else "no",
            style="" if d.near_tie else "bold red",
        )
    return rows


def in_words(token: int | None, model: MTPForCausalLM) -> str:
    """A token's text in quotes, or its id where there is no tokenizer."""
    from rich.markup import escape

    if token is None:
        return "(ended)"
    return str(token) if model.tokenizer is None else escape(repr(model.tokenizer.decode([token])))
