"""Training recipes compared by real decoding: tokens per step on held-out prompts, quadratic, greedy.

    python benchmarks/ablation.py --bases embedded path/to/model --data embedded.jsonl stories.jsonl --output runs.jsonl

For every base, recipe (benchmarks/ablation.yaml) and seed an adapter is trained for `--steps` steps on texts that
begin with a prompt, and decodes the prompts of texts it never saw. Only what follows a prompt is trained: the file's
own text or the base's greedy continuation, which is made once per base and kept in `--cache`. One line of JSON per run;
runs that are in the file already, with the same settings, are left out. `--table` prints what is there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import torch
import yaml
from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from foretell.base import load_base
from foretell.checkpoint import load_tokenizer, write_text
from foretell.config import MTPConfig, TrainConfig
from foretell.decoding.generate import EMBEDDED, MTPForCausalLM
from foretell.decoding.generation import repeated_ngram_share
from foretell.errors import ForetellError
from foretell.training.data import Corpus, Report
from foretell.training.examples import Example
from foretell.training.loop import Training
from foretell.training.sources import Source
from foretell.training.store import Writer

RECIPES = Path(__file__).with_name("ablation.yaml")
BATCH = 32  # prompts answered side by side
SELDOM = ("checkpoint_every", "log_every", "evaluate_every")  # at the last step only
Ids = list[int]
Column = tuple[str, int, int, float]  # base, steps, texts, learning rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=[], help="models, or embedded")
    parser.add_argument("--data", nargs="+", default=[], type=Path, help="for each base a file of texts")
    parser.add_argument("--recipes", nargs="+", help="names out of the file of recipes [all]")
    parser.add_argument("--recipes-file", type=Path, default=RECIPES)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="over the file's common settings")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--texts", type=int, default=500, help="texts to train on")
    parser.add_argument("--prompts", type=int, default=32, help="held-out prompts, of the texts after those")
    parser.add_argument("--prompt-tokens", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=96, help="at most, per held-out prompt")
    parser.add_argument("--cache", type=Path, help="folder of the bases' own answers [beside the output]")
    parser.add_argument("--output", nargs="+", type=Path, required=True, help="the first is written, all are read")
    parser.add_argument("--table", action="store_true", help="print what is there and train nothing")
    args = parser.parse_args()
    if not args.table:
        if len(args.bases) != len(args.data):
            parser.error("give as many files of --data as --bases")
        try:
            run_missing(args)
        except ForetellError as error:
            raise SystemExit(f"error: {error}") from None
    Console(width=240).print(table(read_runs(args.output)))


def run_missing(args: argparse.Namespace) -> None:
    recipes = load_recipes(args.recipes_file, dict(one.split("=", 1) for one in args.set))
    for name in args.recipes or ():
        if name not in recipes:
            raise ForetellError(f"there is no recipe {name!r}; known: {', '.join(recipes)}")
    cache = args.cache or args.output[0].parent / "answers"
    for seed in args.seeds:
        for base, data in zip(args.bases, args.data, strict=True):
            for name in args.recipes or recipes:
                run = {
                    "base": Path(base).name, "data": data.stem, "recipe": name, "seed": seed, "steps": args.steps,
                    "texts": args.texts, "prompts": args.prompts, "prompt_tokens": args.prompt_tokens,
                    "new_tokens": args.new_tokens, "settings": recipes[name],
                }  # fmt: skip
                if any(same_run(done, run) for done in read_runs(args.output)):
                    continue
                line = run | train_and_measure(base, data, run, cache)
                args.output[0].parent.mkdir(parents=True, exist_ok=True)
                with args.output[0].open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(
                    f"{line['base']:14} {name:24} seed {seed}: {line['acceptance_rate']:.3f} tokens per step "
                    f"(simulated {line['simulated_acceptance']}), {line['seconds']:.0f} s",
                    flush=True,
                )


def load_recipes(path: Path, common: Mapping[str, str] = MappingProxyType({})) -> dict[str, dict[str, Any]]:
    """For every recipe `answers` and all settings of MTPConfig and TrainConfig but steps and seed."""
    read = yaml.safe_load(path.read_text(encoding="utf-8"))
    own: dict[str, dict[str, Any]] = read["recipes"]

    def differences(name: str) -> dict[str, Any]:
        changes = {key: value for key, value in own[name].items() if key != "based_on"}
        return (differences(own[name]["based_on"]) if "based_on" in own[name] else {}) | changes

    recipes = {}
    for name in own:
        more = {key: yaml.safe_load(value) for key, value in common.items()}
        settings = read["common"] | more | differences(name)
        answers = settings.pop("answers")
        if answers not in ("own", "data"):
            raise ForetellError(f"recipe {name}: answers must be own or data, not {answers!r}")
        mtp, training = configs(settings, steps=1, seed=0)
        everything = {**mtp.to_dict(), **training.to_dict()}
        del everything["steps"], everything["seed"]
        recipes[name] = {"answers": answers, **everything}
    return recipes


def configs(settings: dict[str, Any], **more: Any) -> tuple[MTPConfig, TrainConfig]:
    settings = {key: value for key, value in settings.items() if key != "answers"} | more
    ours = {key: settings.pop(key) for key in list(settings) if key in MTPConfig().to_dict()}
    return MTPConfig.from_dict(ours), TrainConfig.from_dict(settings)


def same_run(done: dict[str, Any], run: dict[str, Any]) -> bool:
    """Settings that came after a run was made are taken to be what it had."""
    before, now = done["settings"], json.loads(json.dumps(run["settings"]))  # where a tuple is a list
    alike = all(before[key] == now[key] for key in before.keys() & now.keys())
    return alike and all(done.get(key) == value for key, value in run.items() if key != "settings")


def read_runs(paths: list[Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for path in paths if path.exists() for line in path.read_text("utf-8").splitlines()]


def train_and_measure(base: str, data: Path, run: dict[str, Any], cache: Path) -> dict[str, Any]:
    start = time.process_time()  # of the processor: a busy machine does not count
    name = str(EMBEDDED.parent / "base") if base == "embedded" else base
    mtp, config = configs(run["settings"], steps=run["steps"], seed=run["seed"])
    texts, prompts = tokenised(name, data, run, config.seq_len)
    size = run["prompt_tokens"]
    if run["settings"]["answers"] == "own":
        answers = own_answers(name, [text[:size] for text in texts], config.seq_len - size, cache)
        texts = [text[:size] + answer for text, answer in zip(texts, answers, strict=True)]
    examples = [
        Example(torch.tensor(ids, dtype=torch.int32), torch.arange(len(ids)) >= size)
        for ids in texts
        if len(ids) >= size + 2
    ]
    torch.manual_seed(config.seed)
    model = MTPForCausalLM(load_base(name), mtp, load_tokenizer(name))
    quiet = TrainConfig.from_dict(config.to_dict() | dict.fromkeys(SELDOM, 10**9))
    with TemporaryDirectory() as output:
        with Writer(Path(output) / "text") as writer:
            for example in examples:
                writer.add(example)
            store = writer.finish({"report": vars(Report()), "fingerprint": ""})
        corpus = Corpus([Source(str(data))], [store])
        training = Training(model, corpus, Path(output), quiet, PartialState(cpu=True))
        training.run(None)
    trained = time.process_time() - start
    model.for_inference()
    accepted = measure(model, prompts, mtp.masks, run["new_tokens"])
    losses = {key: value for key, value in training.metrics.items() if key.endswith("loss")}
    return {
        **accepted, **losses,
        "simulated_acceptance": training.metrics.get("held_out_simulated_acceptance"),
        "agreement": training.metrics.get("held_out_agreement"),
        "training_seconds": round(trained, 1), "seconds": round(time.process_time() - start, 1),
        "torch": torch.__version__, "threads": torch.get_num_threads(),
    }  # fmt: skip


def tokenised(base: str, data: Path, run: dict[str, Any], seq_len: int) -> tuple[list[Ids], list[Ids]]:
    """Texts to train on, cut at `seq_len` tokens, and held-out prompts."""
    tokenizer, wanted = load_tokenizer(base), run["texts"] + run["prompts"]

    def long_enough() -> Iterator[Ids]:
        for _, record in Source(str(data)).records():
            ids = list(tokenizer(record, verbose=False)["input_ids"]) if isinstance(record, str) else []
            if len(ids) >= run["prompt_tokens"] + 8:
                yield ids[:seq_len]

    texts = list(islice(long_enough(), wanted))
    if len(texts) < wanted:
        raise ForetellError(f"{data} has {len(texts)} texts of {run['prompt_tokens'] + 8} tokens, not {wanted}")
    return texts[: run["texts"]], [ids[: run["prompt_tokens"]] for ids in texts[run["texts"] :]]


def own_answers(base: str, prompts: list[Ids], new_tokens: int, cache: Path) -> list[Ids]:
    """The base's greedy continuations, from the cache if they are there."""
    key = hashlib.sha256(json.dumps([prompts, new_tokens]).encode()).hexdigest()[:12]
    path = cache / f"{Path(base).parent.name}-{Path(base).name}-{key}.json"
    if path.exists():
        return list(json.loads(path.read_text(encoding="utf-8")))
    model = MTPForCausalLM(load_base(base), MTPConfig(masks=1, rank=1), load_tokenizer(base))
    answers = [
        generation.token_ids
        for first in range(0, len(prompts), BATCH)
        for generation in model.generate_batch(
            prompts[first : first + BATCH], max_new_tokens=new_tokens, strategy="autoregressive"
        )
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(json.dumps(answers), path)
    return answers


def measure(model: MTPForCausalLM, prompts: list[Ids], masks: int, new_tokens: int) -> dict[str, Any]:
    """Over all prompts together; loops flatter acceptance, so their share stands beside it."""
    answers = [
        generation
        for first in range(0, len(prompts), BATCH)
        for generation in model.generate_batch(
            prompts[first : first + BATCH], max_new_tokens=new_tokens, strategy="quadratic", masks=masks
        )
    ]
    tokens, steps = sum(a.new_tokens for a in answers), sum(a.steps for a in answers)
    weighted = sum(repeated_ngram_share(a.token_ids) * a.new_tokens for a in answers)
    return {
        "acceptance_rate": round(tokens / steps, 4),
        "tokens": tokens,
        "repeated_4gram_share": round(weighted / tokens, 4),
    }


def column_of(run: dict[str, Any]) -> Column:
    return run["base"], run["steps"], run["texts"], run["settings"]["lr"]


def table(runs: list[dict[str, Any]]) -> Table:
    """Mean ± standard deviation over seeds, and the ratio to the paper's recipe; the last column is over all columns.

    A column for every base, number of steps and of texts, and learning rate: only runs alike in these are compared.
    """
    columns = list(dict.fromkeys(column_of(run) for run in runs))
    recipes = list(dict.fromkeys(run["recipe"] for run in runs))

    def rates(column: Column, recipe: str) -> list[float]:
        return [run["acceptance_rate"] for run in runs if (column_of(run), run["recipe"]) == (column, recipe)]

    shown = Table(title="tokens per step on held-out prompts (quadratic, greedy): mean ± spread over seeds, × paper")
    shown.add_column("recipe")
    for column in columns:
        loops = statistics.mean(run["repeated_4gram_share"] for run in runs if column_of(run) == column)
        base, steps, texts, rate = column
        shown.add_column(f"{base}, {steps} steps\n{texts} texts, lr {rate:g}\n({loops:.0%} repeated)", justify="right")
    shown.add_column("× paper,\nall columns", justify="right")
    for recipe in recipes:
        cells, ratios = [], []
        for column in columns:
            found, paper = rates(column, recipe), rates(column, "paper")
            if not found:
                cells.append("")
                continue
            spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
            ratio = statistics.mean(found) / statistics.mean(paper) if paper else math.nan
            ratios += [ratio] if paper else []
            cells.append(f"{statistics.mean(found):.2f}{spread} (×{ratio:.2f})")
        shown.add_row(recipe, *cells, f"{statistics.geometric_mean(ratios):.2f}" if ratios else "")
    return shown


if __name__ == "__main__":
    main()
