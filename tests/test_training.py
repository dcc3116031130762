"""Losses by hand, and whole trainings of tiny models: learning, resuming, refusing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from foretell.config import MTPConfig, TrainConfig
from foretell.errors import ForetellError
from foretell.model import MTPModel
from foretell.training.loop import train
from foretell.training.losses import latent_consistency, mtp_losses, targets
from foretell.training.metrics import Agreement, agreement
from foretell.training.objectives import cross_entropy
from foretell.training.step import learning_rate

from .models import random_prompt, reference, tiny_lm, tiny_model
from .saved import character_tokenizer, save_base

MTP = MTPConfig(masks=3, rank=4, alpha=8.0)
CONFIG = TrainConfig(steps=6, batch_size=2, seq_len=24, anchors=4, log_every=2, checkpoint_every=3, lr=1e-2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_base(tmp_path_factory.mktemp("trained") / "base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "d.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"number {n} of many"[: 10 + n % 9]}) for n in range(30)))
    return path


def run(
    base: str, data: Path, output: Path, config: TrainConfig = CONFIG, mtp: MTPConfig = MTP, **more: Any
) -> MTPModel:
    return train(base, data, output, mtp, config, device="cpu", **more)


def weights(output: Path) -> bytes:
    return (output / "foretell.safetensors").read_bytes()


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_latent_consistency_by_hand() -> None:
    z = torch.tensor([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0]], requires_grad=True)
    masks = torch.tensor([[1.0, 1.0], [3.0, 1.0], [1.0, 4.0]], requires_grad=True)
    # Two masks share position 1: errors 0 and (4 + 0) / 2 = 2, mean 1. Position 2 has one: (16 + 1) / 2 = 8.5.
    loss = latent_consistency(masks, z, torch.tensor([1, 1, 2]))
    assert loss.item() == pytest.approx((1.0 + 8.5) / 2)
    loss.backward()
    assert z.grad is None, "the base's latents are constants"
    assert masks.grad is not None and masks.grad[1].tolist() == pytest.approx([0.5, 0.0])


def test_cross_entropy_in_chunks_equals_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foretell.training.objectives.LOGITS_AT_ONCE", 3 * 11)
    torch.manual_seed(0)
    head, labels = torch.nn.Linear(5, 11).requires_grad_(False), torch.randint(11, (8,))
    one, two = (torch.randn(8, 5, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    chunked, whole = cross_entropy(one, labels, head, 11), torch.nn.functional.cross_entropy(head(two), labels)
    (3 * chunked).backward()
    (3 * whole).backward()
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(one.grad, two.grad)


def test_labels_stop_at_the_end_of_text_and_of_the_answer() -> None:
    ids = torch.arange(10, 18)[None]
    trained = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1]], dtype=torch.bool)
    target = targets(ids, trained, torch.tensor([[1, 2, 5]]), torch.tensor([[True, True, False]]), 3)
    assert target.valid.tolist() == [[[True, True, False], [True, False, False], [False] * 3]]
    assert target.labels[0, 0, :2].tolist() == [13, 14]  # x_{1+1+1}, x_{1+2+1}
    assert target.previous[0, 0, :2].tolist() == [[12, 11], [13, 12]]
    assert target.positions[0, 0, :2].tolist() == [2, 3]


def test_agreement_counts_prefixes() -> None:
    """Without a sampler, drafts are the base's argmax at the masks: latents made to match or not give known counts."""
    model = tiny_model(masks=2, sampler="none")
    ids, anchors = torch.arange(8)[None], torch.tensor([[0, 2, 4]])
    target = targets(ids, torch.ones(1, 8, dtype=torch.bool), anchors, torch.ones(1, 3, dtype=torch.bool), 2)
    z = torch.randn(1, 8, 32)
    z_masks = torch.stack([z[0, [1, 2]], z[0, [3, 4]], z[0, [5, 6]]])[None].clone()
    whole = agreement(model, z_masks, z, anchors, target)
    assert whole.per_mask() == [1.0, 1.0] and whole.simulated_acceptance() == 3.0
    z_masks[0, 1, 0] *= -1  # the second block misses its first draft, so its second does not count
    partly = agreement(model, z_masks, z, anchors, target)
    assert partly.per_mask() == [0.6667, 1.0] and partly.simulated_acceptance() == round(1 + 4 / 3, 4)
    assert isinstance(whole + partly, Agreement) and (whole + partly).blocks == 6


def test_learning_rate_warms_up_and_comes_down() -> None:
    config = TrainConfig(steps=100, warmup=10, lr=1.0)
    assert [round(learning_rate(step, config), 2) for step in (0, 4, 9, 10, 55, 99)] == [0.1, 0.5, 1.0, 1.0, 0.5, 0.0]
    assert learning_rate(99, TrainConfig(steps=100, warmup=10, lr=1.0, schedule="flat")) == 1.0


def test_simulated_acceptance_rises_on_text_of_the_base(base: str, tmp_path: Path) -> None:
    ids = random_prompt(4)
    text = character_tokenizer().decode(ids[0].tolist() + reference(tiny_lm(), ids, 27))
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for _ in range(24)))
    config = TrainConfig(
        steps=40,
        batch_size=4,
        seq_len=32,
        anchors=8,
        lr=1e-2,
        warmup=5,
        log_every=40,
        evaluate_every=39,
        lcm_weight=0.1,
    )
    measured: list[dict[str, Any]] = []
    model = run(base, path, tmp_path / "out", config, on_step=measured.append)
    untrained = TrainConfig(**{**config.to_dict(), "steps": 1, "lr": 0.0})
    first = run(base, path, tmp_path / "first", untrained).provenance["held_out_simulated_acceptance"]
    last = measured[-1]["held_out_simulated_acceptance"]
    assert first < 1.5 and last > 2.5, (first, last)
    assert model.provenance["held_out_simulated_acceptance"] == last
    assert model.provenance["trained_steps"] == 40 and model.provenance["data"] == "d.jsonl"


def test_a_resumed_training_gives_the_same_bits(base: str, data: Path, tmp_path: Path) -> None:
    run(base, data, tmp_path / "whole")

    def fail_late(line: dict[str, Any]) -> None:
        if line["step"] == 5:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run(base, data, tmp_path / "cut", on_step=fail_late)
    assert [line["step"] for line in lines(tmp_path / "cut")] == [2, 4]
    assert weights(tmp_path / "cut") != weights(tmp_path / "whole")
    seen: list[int] = []
    run(base, data, tmp_path / "cut", resume=True, on_step=lambda line: seen.append(line["step"]))
    assert seen == [3, 4, 5, 6]  # the first says where it goes on
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert [line["step"] for line in lines(tmp_path / "cut")] == [2, 4, 6]
    assert lines(tmp_path / "cut")[-1]["agreement"] == lines(tmp_path / "whole")[-1]["agreement"]


def test_a_killed_process_can_be_resumed_to_the_same_bits(base: str, data: Path, tmp_path: Path) -> None:
    """SIGKILL while checkpoints are written at every step."""
    output, config = tmp_path / "killed", TrainConfig(**{**CONFIG.to_dict(), "steps": 12, "checkpoint_every": 1})
    # The callback waits at the eighth step, so that the training can't be over before it is killed.
    script = f"""
import time
from foretell.config import MTPConfig, TrainConfig
from foretell.training.loop import train
train({base!r}, {str(data)!r}, {str(output)!r}, MTPConfig(**{MTP.to_dict()}), TrainConfig(**{config.to_dict()}),
      device="cpu", on_step=lambda line: line["step"] == 8 and time.sleep(300))
"""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    try:
        state = output / "checkpoint" / "state.json"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (state.exists() and json.loads(state.read_text())["step"] >= 5):
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    run(base, data, output, config, resume=True)
    run(base, data, tmp_path / "whole", config)
    assert weights(output) == weights(tmp_path / "whole")


@pytest.mark.parametrize("left", ["old", "old and new"])
def test_a_kill_between_the_two_renames_loses_nothing(base: str, data: Path, tmp_path: Path, left: str) -> None:
    run(base, data, tmp_path / "out")
    expected = weights(tmp_path / "out")
    checkpoint = tmp_path / "out" / "checkpoint"
    if left == "old and new":
        subprocess.run(["cp", "-r", str(checkpoint), str(checkpoint) + ".new"], check=True)
    checkpoint.rename(str(checkpoint) + ".old")
    run(base, data, tmp_path / "out", resume=True)
    assert weights(tmp_path / "out") == expected and checkpoint.is_dir()


def test_an_interrupt_saves_and_is_passed_on(base: str, data: Path, tmp_path: Path) -> None:
    def press(line: dict[str, Any]) -> None:
        if line["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run(base, data, tmp_path / "out", on_step=press)
    assert signal.getsignal(signal.SIGTERM) is before
    assert json.loads((tmp_path / "out" / "checkpoint" / "state.json").read_text())["step"] == 2
    assert MTPConfig.from_dict(json.loads((tmp_path / "out" / "foretell.json").read_text())["config"]) == MTP


def test_what_is_there_is_never_overwritten(base: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ForetellError, match="holds no checkpoint"):
        run(base, data, tmp_path / "out", resume=True)
    run(base, data, tmp_path / "out")
    with pytest.raises(ForetellError, match="holds a training at step 6; go on with --resume"):
        run(base, data, tmp_path / "out")
    changed = TrainConfig(**{**CONFIG.to_dict(), "lr": 0.5})
    with pytest.raises(ForetellError, match=r"lr \(was 0\.01, now 0\.5\)"):
        run(base, data, tmp_path / "out", changed, resume=True)
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "something else"}')
    with pytest.raises(ForetellError, match="the data"):
        run(base, other, tmp_path / "out", resume=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("mine")
    with pytest.raises(ForetellError, match=r"already holds README\.md"):
        run(base, data, tmp_path / "notes")


def test_sequences_longer_than_the_base_allows_are_refused(base: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ForetellError, match="has 256 positions; give --seq-len 256 or less"):
        run(base, data, tmp_path / "out", TrainConfig(seq_len=257))


@pytest.mark.parametrize("adapter", ["gated", "standard"])
def test_only_the_ungated_baseline_changes_the_next_token_loss(
    base: str, data: Path, tmp_path: Path, adapter: str
) -> None:
    config = TrainConfig(**{**CONFIG.to_dict(), "batch_size": 29, "lr": 1e-1, "log_every": 1, "anchors": 30})
    run(base, data, tmp_path / "out", config, MTPConfig(**{**MTP.to_dict(), "adapter": adapter}))
    losses = [line["ntp_loss"] for line in lines(tmp_path / "out")]
    # One text of 30 is held out; every batch holds all others whole, so the base's own loss is one number.
    assert (max(losses) - min(losses) < 1e-3) == (adapter == "gated"), losses


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains(base: str, data: Path, tmp_path: Path, dtype: str) -> None:
    model = run(base, data, tmp_path / "out", TrainConfig(**{**CONFIG.to_dict(), "dtype": dtype}))
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.own_parameters().values())
    assert model.own_parameters()["adapter.adapters.0/mlp/up_proj.b"].abs().max() > 0


def test_a_draft_chain_follows_the_choices_of_the_base() -> None:
    """A sampler that repeats the previous token's embedding: its draft depends on that token alone."""
    model = tiny_model(masks=2)
    model.sampler.forward = lambda embedding, latent: embedding[:, 0]  # type: ignore[union-attr, method-assign]
    torch.manual_seed(3)
    ids, anchors, z = torch.randint(97, (1, 40)), torch.arange(0, 36)[None], torch.randn(1, 40, 32)
    target = targets(ids, torch.ones(1, 40, dtype=torch.bool), anchors, torch.ones(1, 36, dtype=torch.bool), 2)
    choice = model.base.unembed(z[0]).argmax(-1)
    for t in range(1, 40, 2):  # every other choice is made to agree with what the sampler says after the one before
        z[0, t] = 20 * model.base.head.weight[model.base.unembed(model.base.embed(choice[t - 1])).argmax()]
    choice = model.base.unembed(z[0]).argmax(-1)
    after = model.base.unembed(model.base.embed(choice)).argmax(-1)
    match = [[bool(after[i + j - 1] == choice[i + j]) for j in (1, 2)] for i in range(36)]
    expected = 1 + sum(first + (first and second) for first, second in match) / 36
    found = agreement(model, torch.randn(1, 36, 2, 32), z, anchors, target)
    assert found.simulated_acceptance() == round(expected, 4) and 1.2 < expected < 2.5

    # And one that repeats the embedding before: at a block's first mask that is of the anchor itself.
    model.sampler.forward = lambda embedding, latent: embedding[:, 1]  # type: ignore[union-attr, method-assign]
    of_anchor = model.base.unembed(model.base.embed(ids[0])).argmax(-1)
    match = [[bool(of_anchor[i] == choice[i + 1]), bool(after[i] == choice[i + 2])] for i in range(36)]
    expected = 1 + sum(first + (first and second) for first, second in match) / 36
    found = agreement(model, torch.randn(1, 36, 2, 32), z, anchors, target)
    assert found.simulated_acceptance() == round(expected, 4) and expected > 1


def test_the_normalised_consistency_loss_ignores_the_scale_of_the_base() -> None:
    model = tiny_model(masks=2, sampler="none")
    ids, anchors = torch.arange(8)[None], torch.tensor([[0, 2, 4]])
    target = targets(ids, torch.ones(1, 8, dtype=torch.bool), anchors, torch.ones(1, 3, dtype=torch.bool), 2)
    z, z_masks, real = torch.randn(1, 8, 32), torch.randn(1, 3, 2, 32), torch.arange(8)[None] < 7
    plain, normalised = (
        mtp_losses(model, z_masks, z, target, real, TrainConfig(lcm_normalised=flag))["lcm"] for flag in (False, True)
    )
    variance = sum((z[0, :7, d] - z[0, :7, d].mean()).square().mean() for d in range(32)) / 32
    torch.testing.assert_close(normalised, plain / variance)


def test_a_training_can_start_from_another(base: str, data: Path, tmp_path: Path) -> None:
    run(base, data, tmp_path / "first")
    still = TrainConfig(**{**CONFIG.to_dict(), "lr": 0.0})  # does not move from where it starts
    run(base, data, tmp_path / "from_first", still, init=tmp_path / "first")
    run(base, data, tmp_path / "anew", still)
    assert weights(tmp_path / "from_first") == weights(tmp_path / "first") != weights(tmp_path / "anew")
    with pytest.raises(ForetellError, match="does not hold the weights"):
        run(base, data, tmp_path / "other", mtp=MTPConfig(masks=2, rank=4), init=tmp_path / "first")
