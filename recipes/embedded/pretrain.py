"""Train the small base model within a fixed wall-clock budget, on a CPU.

Muon drives the matrices of the blocks, AdamW everything else; the learning rates follow the share of the budget that
is spent, so that a run ends fully decayed on any machine. In the last part of the budget a quarter of the rows carries
artificial repetitions with the penalty of DITTO (Xu et al. 2022): a model this small otherwise decodes into loops.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import data
import muon
import numpy as np
import tokenizer
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH, BATCH, MINUTES = 512, 12, 55.0
CODE_SHARE = 0.43  # of the rows
MUON_RATE, ADAM_RATE = 0.02, 3e-3
WARM_UP = 0.01
ANTI_LOOP_FROM = 0.8
ANTI_LOOP_ROWS = 0.25


def build_model(vocabulary: int, end: int) -> LlamaForCausalLM:
    """A Llama of about seven million parameters."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            attn_implementation="sdpa",
            tie_word_embeddings=True,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


class Corpus:
    """The token arrays, and random rows of them."""

    def __init__(self, folder: Path, line_ends: np.ndarray, seed: int) -> None:
        """`line_ends` says of each token whether it contains a line end."""
        self.problems = np.load(folder / "problems_train.npy")
        self.code = np.load(folder / "code_train.npy")
        self.is_line_end = line_ends
        self.random = np.random.default_rng(seed)
        self.at = 0

    def _window(self, array: np.ndarray, size: int) -> np.ndarray:
        start = int(self.random.integers(0, len(array) - size))
        return array[start : start + size]

    def rows(self, count: int, code_share: float = CODE_SHARE) -> Tensor:
        """Plain rows: problems in order and never twice while they last, code from random places."""
        out = np.empty((count, LENGTH + 1), dtype=np.int64)
        for row in range(count):
            if self.random.random() < code_share:
                out[row] = self._window(self.code, LENGTH + 1)
                continue
            if self.at + LENGTH + 1 > len(self.problems):
                self.at = int(self.random.integers(0, LENGTH))
            out[row] = self.problems[self.at : self.at + LENGTH + 1]
            self.at += LENGTH
        return torch.from_numpy(out)

    def repetitive(self, count: int) -> tuple[Tensor, Tensor]:
        """Rows whose ending repeats one segment, and for each position its twin one repetition earlier (-1: none).

        Positions are those of the predicted tokens' logits, as in the loss.
        """
        out = np.empty((count, LENGTH + 1), dtype=np.int64)
        twin = np.full((count, LENGTH), -1, dtype=np.int64)
        for row in range(count):
            source = self.code if self.random.random() < 0.75 else self.problems
            prefix, size = int(self.random.integers(30, 151)), int(self.random.integers(4, 41))
            piece = self._window(source, prefix + size)
            ends = np.flatnonzero(self.is_line_end[piece[prefix:]])
            if len(ends) and ends[-1] >= 3:
                size = int(ends[-1]) + 1
            segment = piece[prefix : prefix + size]
            out[row, :prefix] = piece[:prefix]
            out[row, prefix:] = np.resize(segment, LENGTH + 1 - prefix)
            # Logits at t predict the token t + 1; the second repetition's first token stands at prefix + size.
            places = np.arange(prefix + size - 1, LENGTH)
            twin[row, places] = places - size
        return torch.from_numpy(out), torch.from_numpy(twin)


def cross_entropy(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """The mean loss of plain rows."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def mixed_loss(model: LlamaForCausalLM, rows: Tensor, twin: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the plain rows, which come first, plus the repetition penalty of the last `len(twin)` rows."""
    plain = len(rows) - len(twin)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    nll = functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="none")
    nll = nll.view(len(rows), -1)
    loss = nll[:plain].mean()
    p = (-nll[plain:]).exp()
    repeated = twin >= 0
    target = 0.5 * p.detach().gather(1, twin.clamp(min=0))
    penalty = -torch.log((1 - (p - target).abs()).clamp(min=1e-5))
    return loss, (penalty * repeated).sum() / repeated.sum()


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
    return [
        muon.BatchedMuon(matrices, lr=MUON_RATE, momentum=0.95, weight_decay=0.01, ns_steps=4),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
    ]


def rate_factor(spent: float) -> float:
    """Warm-up, a plateau to 30 % of the budget, then linear decay to nearly zero; `spent` is a share of the budget."""
    if spent < WARM_UP:
        return max(0.02, spent / WARM_UP)
    return max(0.01, min(1.0, (1 - spent) / 0.7))


def save(folder: Path, model: LlamaForCausalLM, optims: list[torch.optim.Optimizer], state: dict[str, float]) -> None:
    """A checkpoint to resume from, replaced as a whole."""
    new = folder.with_name(folder.name + ".new")
    new.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(new)
    for number, optim in enumerate(optims):
        tensors = {
            f"{index}.{key}": torch.as_tensor(value).clone()
            for index, values in optim.state_dict()["state"].items()
            for key, value in values.items()
        }
        save_file(tensors, new / f"optimizer{number}.safetensors")
    (new / "state.json").write_text(json.dumps(state))
    old = folder.with_name(folder.name + ".old")
    for path, target in ((folder, old), (new, folder)):
        if path.exists():
            if target.exists():
                for file in target.iterdir():
                    file.unlink()
                target.rmdir()
            path.rename(target)


def restore(folder: Path, model: LlamaForCausalLM, optims: list[torch.optim.Optimizer]) -> dict[str, float]:
    """Load what `save` wrote."""
    model.load_state_dict(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())
    for number, optim in enumerate(optims):
        state_dict = optim.state_dict()
        for name, tensor in load_file(folder / f"optimizer{number}.safetensors").items():
            index, key = name.split(".", 1)
            state_dict["state"].setdefault(int(index), {})[key] = tensor
        optim.load_state_dict(state_dict)
    state: dict[str, float] = json.loads((folder / "state.json").read_text())
    return state


@torch.no_grad()
def validation(model: LlamaForCausalLM, array: np.ndarray, rows: int = 24) -> float:
    """The loss on the evenly spaced windows of a held-out array."""
    starts = np.linspace(0, len(array) - LENGTH - 2, rows).astype(int)
    windows = torch.from_numpy(np.stack([array[s : s + LENGTH + 1] for s in starts]).astype(np.int64))
    return sum(float(cross_entropy(model, part)) * len(part) for part in windows.split(8)) / rows


def train(folder: Path, minutes: float, batch: int, compiled: bool, resume: bool) -> None:
    """The whole run; the budget counts training time alone, also across resumed runs."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    tok = tokenizer.load(folder / "data" / "tokenizer")
    line_end = np.array(["\n" in tok.decode([i]) for i in range(len(tok))])
    corpus = Corpus(folder / "data", line_end, seed=0)
    valid = {name: np.load(folder / "data" / f"{name}_valid.npy") for name in ("problems", "code")}
    model = build_model(len(tok), tok.eos_token_id)
    optims = optimizers(model)
    state = {"step": 0, "seconds": 0.0, "at": 0}
    checkpoint = folder / "checkpoint"
    if resume and (checkpoint / "state.json").exists():
        state = restore(checkpoint, model, optims)
        corpus.random = np.random.default_rng(int(state["step"]) + 1)
        corpus.at = int(state["at"])
    step, before = int(state["step"]), state["seconds"]
    if before >= minutes * 60:
        print(f"the budget was spent before, at step {step}", flush=True)
        return
    print(f"{sum(p.numel() for p in model.parameters())} parameters, from step {step}", flush=True)
    plain_loss, mix_loss = cross_entropy, mixed_loss
    if compiled:
        plain_loss, mix_loss = torch.compile(cross_entropy, dynamic=False), torch.compile(mixed_loss, dynamic=False)
    repeats = max(1, round(batch * ANTI_LOOP_ROWS))
    # Compile before the clock starts, or the warm-up would pass unseen.
    looped, twin = corpus.repetitive(repeats)
    whole = torch.cat([looped] * batch)[:batch]
    plain_loss(model, whole).backward()
    torch.stack(mix_loss(model, whole, twin)).sum().backward()
    model.zero_grad()
    budget, start = minutes * 60, time.monotonic()
    logged, saved, losses, penalties = start, start, [], []
    while (elapsed := before + time.monotonic() - start) < budget:
        factor = rate_factor(elapsed / budget)
        for optim, rate in zip(optims, (MUON_RATE, ADAM_RATE), strict=True):
            for group in optim.param_groups:
                group["lr"] = rate * factor
        if elapsed < ANTI_LOOP_FROM * budget:
            loss = plain_loss(model, corpus.rows(batch))
            total = loss
        else:
            looped, twin = corpus.repetitive(repeats)
            loss, penalty = mix_loss(model, torch.cat([corpus.rows(batch - repeats), looped]), twin)
            total = loss + penalty
            penalties.append(float(penalty.detach()))
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is {losses[-1]} at step {step}")
        step += 1
        now = time.monotonic()
        state = {"step": step, "seconds": before + now - start, "at": corpus.at}
        if step % 50 == 0:
            speed = len(losses) * batch * LENGTH / (now - logged)
            extra = f", repetition {np.mean(penalties):.3f}" if penalties else ""
            print(
                f"step {step}, {state['seconds'] / 60:.1f} min, rate {factor:.2f}, loss {np.mean(losses):.3f}{extra}, "
                f"{speed:.0f} tokens/s",
                flush=True,
            )
            logged, losses, penalties = now, [], []
        if step % 500 == 0:
            print("validation", {k: round(validation(model, v), 4) for k, v in valid.items()}, flush=True)
            logged = time.monotonic()
        if now - saved > 300:
            save(checkpoint, model, optims, state)
            saved = time.monotonic()
    save(checkpoint, model, optims, state)
    print("validation", {k: round(validation(model, v, 96), 4) for k, v in valid.items()}, flush=True)
    print("finished", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(".build/embedded"))
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--problem-tokens", type=int, default=data.PROBLEM_TOKENS)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    data.prepare(args.folder / "data", args.problem_tokens)
    train(args.folder, args.minutes, args.batch, not args.no_compile, args.resume)


if __name__ == "__main__":
    main()
