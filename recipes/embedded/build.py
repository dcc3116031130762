"""Build the embedded model: data, tokenizer, pre-training, the base's own answers, adapter. Resumable: run it again.

    python recipes/embedded/build.py

Every stage leaves a marker in `<folder>/done/` when it is through, and is skipped while the marker is there; an
interrupted pre-training goes on from its last checkpoint.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import answers
import data
import evaluate
import export
import finish
import pretrain
import problems
import torch

import foretell
from foretell import checkpoint, cli

MIXTURE = {"answers_code": 6, "answers_problems": 3, "code": 1}
ADAPTER_SETTINGS = Path(__file__).with_name("adapter.yaml")
ASSETS = Path(foretell.__file__).parent / "assets"


@dataclass(frozen=True)
class Settings:
    """What the command line decides."""

    folder: Path
    minutes: float
    problem_tokens: int
    assets: Path
    compiled: bool

    @property
    def tokens(self) -> Path:
        """The tokenizer and the token arrays."""
        return self.folder / "data"

    @property
    def loops(self) -> Path:
        """The pre-trained base's own text, with its loops."""
        return self.folder / "loops.jsonl"

    @property
    def adapter(self) -> Path:
        """The trained adapter."""
        return self.folder / "adapter"

    @property
    def base(self) -> Path:
        """The finished base model."""
        return self.folder / "base"


def data_stage(settings: Settings) -> None:
    """Check the generator, then write the tokenizer and the token arrays."""
    problems.check(20_000)
    data.prepare(settings.tokens, settings.problem_tokens)


def pretrain_stage(settings: Settings) -> None:
    """Train the base within its wall-clock budget."""
    pretrain.train(settings.folder, settings.minutes, pretrain.BATCH, settings.compiled, resume=True)


def loops_stage(settings: Settings) -> None:
    """Let the pre-trained base continue training code, to see where it falls into loops."""
    pretrained = settings.folder / "pretrained"
    export.export_base(settings.folder / "checkpoint", settings.tokens / "tokenizer", pretrained)
    export.export_text(settings.tokens / "tokenizer", settings.folder)
    finish.own_loops(pretrained, settings.folder / "code.jsonl", settings.loops)


def finish_stage(settings: Settings) -> None:
    """Train on: arithmetic first, and away from the base's own loops."""
    finish.finish(settings.folder, finish.MINUTES, settings.loops)


def export_stage(settings: Settings) -> None:
    """Write the base in bfloat16 and the held-out prompts."""
    export.export_base(settings.folder / "finished", settings.tokens / "tokenizer", settings.base)
    export.export_prompts(settings.folder / "prompts")


def evaluate_stage(settings: Settings) -> None:
    """Measure the exported base."""
    report = evaluate.evaluate(settings.base, settings.tokens)
    (settings.folder / "evaluation.json").write_text(json.dumps(report, indent=1))
    print({name: value for name, value in report.items() if name != "samples"})


def answers_stage(settings: Settings) -> None:
    """Let the finished base continue training prompts."""
    answers.write_answers(settings.base, settings.folder / "adapter_data")


def train_adapter(settings: Settings, data: list[str], output: Path, *more: str) -> None:
    """`foretell train`, going on where it was interrupted."""
    resume = ["--resume"] if (output / "checkpoint").exists() else []
    command = ["train", "--base", str(settings.base), "--data", *data, "--output", str(output)]
    if code := cli.main([*command, "--config", str(ADAPTER_SETTINGS), *more, *resume]):
        sys.exit(code)


def adapter_stage(settings: Settings) -> None:
    """The adapter, on problems and code."""
    train_adapter(settings, [str(settings.folder / "adapter_data")], settings.folder / "adapter_first")


def code_stage(settings: Settings) -> None:
    """The same adapter for a while on code alone, which is harder, with some problems so that it forgets nothing."""
    whole, data = settings.folder / "adapter_data", settings.folder / "adapter_code"
    data.mkdir(exist_ok=True)
    shutil.copy(whole / "answers_code.jsonl", data / "answers_code.jsonl")
    some = (whole / "answers_problems.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:500]
    (data / "answers_problems.jsonl").write_text("".join(some), encoding="utf-8")
    first = str(settings.folder / "adapter_first")
    output = settings.folder / "adapter_second"
    train_adapter(settings, [str(data)], output, "--init", first, "--steps", "560", "--lr", "1.5e-3")


def mixed_stage(settings: Settings) -> None:
    """And once more on what it will have to foresee: the base's own answers, and a little code that people wrote."""
    whole = settings.folder / "adapter_data"
    data = [f"{whole / name}.jsonl:{weight}" for name, weight in MIXTURE.items()]
    second = str(settings.folder / "adapter_second")
    train_adapter(settings, data, settings.adapter, "--init", second, "--steps", "3800", "--lr", "2.0e-3")


def install_stage(settings: Settings) -> None:
    """Put base, adapter (in bfloat16) and held-out prompts where the package has them."""
    assets = settings.assets
    for old in (assets / "embedded", assets / "prompts"):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(settings.base, assets / "embedded" / "base")
    shutil.copytree(settings.folder / "prompts", assets / "prompts")
    trained = foretell.load(settings.adapter, base=str(assets / "embedded" / "base"))
    checkpoint.save(trained, assets / "embedded" / "adapter", dtype=torch.bfloat16)


STAGES: tuple[tuple[str, Callable[[Settings], None]], ...] = (
    ("data", data_stage),
    ("pretrain", pretrain_stage),
    ("loops", loops_stage),
    ("finish", finish_stage),
    ("export", export_stage),
    ("evaluate", evaluate_stage),
    ("answers", answers_stage),
    ("adapter", adapter_stage),
    ("code", code_stage),
    ("mixed", mixed_stage),
    ("install", install_stage),
)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(".build/embedded"))
    parser.add_argument("--minutes", type=float, default=pretrain.MINUTES, help="wall-clock budget of the pre-training")
    parser.add_argument("--problem-tokens", type=int, default=data.PROBLEM_TOKENS)
    parser.add_argument("--assets", type=Path, default=ASSETS, help="where the finished model goes")
    parser.add_argument(
        "--no-compile", action="store_true", help="train without torch.compile (no C++ compiler needed)"
    )
    parser.add_argument(
        "--again", choices=[name for name, _ in STAGES], action="append", default=[], help="redo a stage"
    )
    args = parser.parse_args()
    settings = Settings(args.folder, args.minutes, args.problem_tokens, args.assets, not args.no_compile)
    done = args.folder / "done"
    done.mkdir(parents=True, exist_ok=True)
    for name, stage in STAGES:
        if (done / name).exists() and name not in args.again:
            print(f"{name}: done before", flush=True)
            continue
        print(f"{name}: starting", flush=True)
        stage(settings)
        (done / name).touch()


if __name__ == "__main__":
    main()
