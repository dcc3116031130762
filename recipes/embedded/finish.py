"""The last part of the base's training: arithmetic first, and no loops of its own.

After pre-training the base reads a problem well but miscalculates, and falls into loops in code. Here digits weigh
more, results of equations most; and in the base's own greedy loops (written by `own_loops`) it learns to say the next
best thing instead.
"""

import itertools
import json
import os
import time
from pathlib import Path

import answers
import data
import numpy as np
import pretrain
import tokenizer
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

from foretell.base import load_base
from foretell.config import MTPConfig
from foretell.decoding.generate import MTPForCausalLM

MINUTES = 12.0
ROWS = {"problems": 6, "code": 3, "loops": 3}
DIGIT_WEIGHT, RESULT_WEIGHT, QUESTION_WEIGHT = 2.0, 5.0, 0.1
RATE = 0.5  # of pre-training's highest
RUN = 8  # repeated 4-grams in a row that make a loop; shorter repetition is natural in code


def own_loops(base: Path, adapter_code: Path, out: Path, count: int = 1536) -> None:
    """The base's greedy continuations of training code: {"prompt": ids, "new": ids} per line."""
    tok = tokenizer.load(base)
    model = MTPForCausalLM(load_base(str(base)), MTPConfig(masks=1, rank=1), tok)  # decodes plainly: no adapter yet
    prompts = sorted(itertools.islice(answers.code_prompts(adapter_code, tok), count), key=len)
    with out.open("w", encoding="utf-8") as file:
        for start in range(0, len(prompts), answers.BATCH):
            group = prompts[start : start + answers.BATCH]
            done = model.generate_batch(group, max_new_tokens=128, strategy="autoregressive")
            for prompt, row in zip(group, done, strict=True):
                file.write(json.dumps({"prompt": tok(prompt)["input_ids"], "new": row.token_ids}) + "\n")


def looping(ids: list[int], start: int) -> np.ndarray:
    """(len(ids),) bool: tokens from `start` on that end a 4-gram seen before, in runs of at least RUN."""
    seen: set[tuple[int, ...]] = set()
    repeated = np.zeros(len(ids), dtype=bool)
    for end in range(4, len(ids) + 1):
        gram = tuple(ids[end - 4 : end])
        repeated[end - 1] = gram in seen and end > start
        seen.add(gram)
    marked, run = np.zeros_like(repeated), 0
    for place in range(len(ids) + 1):
        if place < len(ids) and repeated[place]:
            run += 1
            continue
        if run >= RUN:
            marked[place - run : place] = True
        run = 0
    return marked


class Loops:
    """Rows of own loops, several to a row, and which tokens are to become unlikely."""

    def __init__(self, path: Path, end: int, seed: int) -> None:
        self.random, self.end = np.random.default_rng(seed), end
        self.pieces = []
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            ids = record["prompt"] + record["new"]
            marked = looping(ids, len(record["prompt"]))
            if marked.any():
                self.pieces.append((ids, marked))

    def rows(self, count: int) -> tuple[Tensor, Tensor]:
        """(count, LENGTH + 1) ids and (count, LENGTH) bool: the predicted tokens to push down."""
        ids = np.full((count, pretrain.LENGTH + 1), self.end, dtype=np.int64)
        marks = np.zeros((count, pretrain.LENGTH + 1), dtype=bool)
        for row in range(count):
            at = 0
            while at < pretrain.LENGTH - 100:
                piece, marked = self.pieces[int(self.random.integers(len(self.pieces)))]
                size = min(len(piece), pretrain.LENGTH + 1 - at)
                ids[row, at : at + size], marks[row, at : at + size] = piece[:size], marked[:size]
                at += size + 1
        return torch.from_numpy(ids), torch.from_numpy(marks[:, 1:])


class Weights:
    """How much each predicted token counts: digits more, results of equations most, a problem's question little.

    Most of a problem's text is names and things, which nobody can foresee; its solution is what is to be learned.
    """

    def __init__(self, tok: tokenizer.PreTrainedTokenizerFast) -> None:
        pieces = [tok.decode([i]).strip() for i in range(len(tok))]
        self.digit = np.array([piece.isdigit() for piece in pieces])
        self.equals = np.array([piece == "=" for piece in pieces])
        self.blank = np.array([piece == "" for piece in pieces])
        self.opens, self.closes = (tok(word)["input_ids"][0] for word in ("Problem:", "Solution:"))

    def __call__(self, ids: Tensor) -> Tensor:
        """(rows, LENGTH + 1) -> (rows, LENGTH) fp32."""
        tokens = ids.numpy()
        weights = np.where(self.digit[tokens], DIGIT_WEIGHT, 1.0)
        result, asked = np.zeros((2, len(tokens)), dtype=bool)
        for place in range(tokens.shape[1]):
            column = tokens[:, place]
            result = self.equals[column] | (result & (self.digit[column] | self.blank[column]))
            weights[:, place] = np.where(result & self.digit[column], RESULT_WEIGHT, weights[:, place])
            weights[:, place] = np.where(asked, QUESTION_WEIGHT, weights[:, place])
            asked = (asked | (column == self.opens)) & (column != self.closes)
        return torch.from_numpy(weights[:, 1:]).float()


def losses(
    model: LlamaForCausalLM, reference: LlamaForCausalLM, ids: Tensor, weights: Tensor, unlikely: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy of the first len(weights) rows, and the way out of the loops in the others.

    At a marked token the target is what the reference would say if it could not say that token. Plain unlikelihood,
    -log(1 - p), was tried: the probability it takes away went to one junk token.
    """
    plain = len(weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        with torch.no_grad():
            wanted = reference(input_ids=ids[plain:, :-1], use_cache=False).logits
    nll = functional.cross_entropy(logits[:plain].flatten(0, 1).float(), ids[:plain, 1:].flatten(), reduction="none")
    looped = logits[plain:][unlikely].float()
    target = wanted[unlikely].float().scatter(1, ids[plain:, 1:][unlikely][:, None], -torch.inf).softmax(-1)
    return (nll.view(plain, -1) * weights).sum() / weights.sum(), functional.cross_entropy(looped, target)


def finish(folder: Path, minutes: float, loops: Path) -> None:
    """Trains `checkpoint` on and writes `finished`; the budget is wall-clock, the rate falls to nothing at its end."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    tok = tokenizer.load(folder / "data" / "tokenizer")
    corpus = pretrain.Corpus(folder / "data", np.zeros(len(tok), dtype=bool), seed=1)
    corpus.at = json.loads((folder / "checkpoint" / "state.json").read_text())["at"]
    own, weigh = Loops(loops, tok.eos_token_id, seed=1), Weights(tok)
    valid = {name: np.load(folder / "data" / f"{name}_valid.npy") for name in ("problems", "code")}
    model = LlamaForCausalLM.from_pretrained(folder / "checkpoint", dtype=torch.float32)
    reference = LlamaForCausalLM.from_pretrained(folder / "checkpoint", dtype=torch.bfloat16)
    optims = pretrain.optimizers(model)

    def batch() -> tuple[Tensor, Tensor, Tensor]:
        looped, unlikely = own.rows(ROWS["loops"])
        corpus_rows = [corpus.rows(ROWS[name], float(name == "code")) for name in ("problems", "code")]
        plain = torch.cat(corpus_rows)
        return torch.cat([plain, looped]), weigh(plain), unlikely

    start, step, seen = time.monotonic(), 0, []
    while (spent := (time.monotonic() - start) / (minutes * 60)) < 1:
        for optim, rate in zip(optims, (pretrain.MUON_RATE, pretrain.ADAM_RATE), strict=True):
            for group in optim.param_groups:
                group["lr"] = rate * RATE * max(0.01, min(1.0, spent / 0.03, 1 - spent))
        loss, penalty = losses(model, reference, *batch())
        (loss + penalty).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad()
        step += 1
        seen.append((float(loss.detach()), float(penalty.detach())))
        if step % 25 == 0:
            means = np.mean(seen, axis=0)
            print(f"step {step}, {100 * spent:.0f} %, loss {means[0]:.3f}, loops {means[1]:.3f}", flush=True)
            seen = []
        if step % 200 == 0:
            print("validation", {k: round(pretrain.validation(model, v), 4) for k, v in valid.items()}, flush=True)
            model.save_pretrained(folder / "finished")
    model.save_pretrained(folder / "finished")
    print("finished", flush=True)


if __name__ == "__main__":
    home = Path(".build/embedded")
    data.prepare(home / "data", data.PROBLEM_TOKENS)
    finish(home, MINUTES, home / "loops.jsonl")
