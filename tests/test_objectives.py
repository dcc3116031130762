"""Objectives, offset weights and anchors against plain loops over method.md section 4, and their resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foretell.config import MTPConfig, TrainConfig
from foretell.errors import ForetellError
from foretell.training.anchors import keep_by_entropy
from foretell.training.batches import choose_anchors, generator
from foretell.training.losses import Targets, mtp_losses, targets
from foretell.training.objectives import choices, row_mean, to_base, to_labels
from foretell.training.offsets import Held, block_lengths, count_held, offset_weights
from foretell.training.step import Stepper
from foretell.training.two_pass import regular_pass

from .models import VOCAB, tiny_model
from .test_training import CONFIG, MTP, base, data, run, weights  # noqa: F401

K = 3
OBJECTIVES = ("labels", "kl", "tv")


def plain_loss(objective: str, mine: Tensor, label: int, wanted: Tensor) -> Tensor:
    """Of one row: logits (V,) of a mask, the label, logits (V,) of the base."""
    q, p = mine.softmax(-1), wanted.softmax(-1)
    if objective == "labels":
        return -q[label].log()
    return (p * (p.log() - q.log())).sum() if objective == "kl" else (p - q).abs().sum() / 2


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_row_losses_in_chunks_equal_plain_ones(monkeypatch: pytest.MonkeyPatch, objective: str) -> None:
    monkeypatch.setattr("foretell.training.objectives.LOGITS_AT_ONCE", 3 * VOCAB)
    model, source = tiny_model(), torch.Generator().manual_seed(0)
    labels, at = torch.randint(VOCAB, (8,), generator=source), torch.tensor([2, 0, 1, 1, 2, 3, 3, 0])
    z, weight = torch.randn(4, 32, generator=source), torch.rand(8, generator=source)
    one, two = (torch.randn(8, 32, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    sizes = []

    def unembed(latents: Tensor) -> Tensor:
        sizes.append(len(latents))
        return model.base.unembed(latents)

    compare = to_labels(labels) if objective == "labels" else to_base(objective, model, z, at)
    chunked = row_mean(one, compare, unembed, VOCAB, weight)
    mine, wanted = model.base.unembed(two), model.base.unembed(z)[at]
    rows = [plain_loss(objective, mine[r], int(labels[r]), wanted[r]) for r in range(8)]
    whole = sum(weight[r] * rows[r] for r in range(8)) / weight.sum()
    (3 * chunked).backward()
    (3 * whole).backward()
    assert sizes == [3, 3, 2]  # never more logits at once
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(one.grad, two.grad, atol=1e-6, rtol=1e-4)
    assert float(one.grad.abs().max()) > 1e-4


def test_kl_and_tv_are_zero_at_the_bases_own_latents() -> None:
    model, z = tiny_model(), torch.randn(4, 32)
    for objective in ("kl", "tv"):
        loss = row_mean(z, to_base(objective, model, z, torch.arange(4)), model.base.unembed, VOCAB)
        assert abs(float(loss)) < 1e-6
        away = row_mean(-z, to_base(objective, model, z, torch.arange(4)), model.base.unembed, VOCAB)
        assert float(away) > 0.1
    assert float(row_mean(z[:0], to_labels(torch.zeros(0, dtype=torch.long)), model.base.unembed, VOCAB)) == 0.0


def case() -> tuple[Tensor, Tensor, Targets]:
    """z_masks (1, 4, K, D), z (1, 12, D); the last block reaches past the end."""
    source = torch.Generator().manual_seed(5)
    ids, anchors = torch.randint(VOCAB, (1, 12), generator=source), torch.tensor([[0, 2, 3, 9]])
    target = targets(ids, torch.ones_like(ids, dtype=torch.bool), anchors, torch.ones_like(anchors).bool(), K)
    assert target.valid.sum() == 3 * K + 1
    return torch.randn(1, 4, K, 32, generator=source), torch.randn(1, 12, 32, generator=source), target


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("weighting", ["uniform", "decay", "acceptance"])
def test_all_losses_by_hand(objective: str, weighting: str) -> None:
    model, (z_masks, z, target) = tiny_model(masks=K), case()
    config = TrainConfig(
        base_objective=objective, sampler_objective=objective, offset_weights=weighting, offset_decay=0.5,
        base_weight=2.0, sampler_weight=3.0, lcm_weight=0.5, lcm_normalised=False,
    )  # fmt: skip
    held = torch.tensor([0.6, 0.3, 0.2])
    expected_weights = {"uniform": [1, 1, 1], "decay": [1, 0.5, 0.25], "acceptance": [1, 0.6, 0.3]}[weighting]
    w = offset_weights(config, held)
    assert w.tolist() == pytest.approx(expected_weights)
    base_terms, sampler_terms, lcm, total, shares = [], [], {}, 0.0, {}
    for block, anchor in enumerate([0, 2, 3, 9]):
        for j in range(1, K + 1):
            t = anchor + j
            if t + 1 >= 12:
                continue
            latent, weight = z_masks[0, block, j - 1], expected_weights[j - 1]
            label, wanted = int(target.labels[0, block, j - 1]), model.base.unembed(z[0, t])
            base_terms.append(weight * plain_loss(objective, model.base.unembed(latent), label, wanted))
            drafted = model.sample(target.previous[0, block, j - 1], latent)
            sampler_terms.append(weight * plain_loss(objective, model.base.unembed(drafted), label, wanted))
            lcm.setdefault(t, []).append(weight * (latent - z[0, t]).square().mean())
            shares.setdefault(t, []).append(weight)
            total += weight
    losses = mtp_losses(model, z_masks, z, target, torch.ones(1, 12, dtype=torch.bool), config, w)
    torch.testing.assert_close(losses["base"], sum(base_terms) / total)
    torch.testing.assert_close(losses["sampler"], sum(sampler_terms) / total)
    means = sum(sum(same) / len(same) for same in lcm.values()) / sum(sum(s) / len(s) for s in shares.values())
    torch.testing.assert_close(losses["lcm"], means)
    torch.testing.assert_close(losses["loss"], 2 * losses["base"] + 3 * losses["sampler"] + 0.5 * losses["lcm"])
    assert ("held" in losses) == (weighting == "acceptance")


def test_what_held_is_counted_against_the_bases_choice() -> None:
    """Without a sampler a mask with the latent of its position drafts what the base will choose."""
    model, (_, z, target) = tiny_model(masks=K, sampler="none"), case()
    z_masks = z[0][target.positions[0]][None].clone()
    z_masks[0, 1, 1] *= -1  # the second block holds one draft
    config = TrainConfig(offset_weights="acceptance")
    held = mtp_losses(model, z_masks, z, target, torch.ones(1, 12, dtype=torch.bool), config)["held"]
    assert held.tolist() == [[4, 2, 2], [4, 3, 3]]
    match, valid = torch.tensor([[[1, 0, 1], [1, 1, 1]]]).bool(), torch.tensor([[[1, 1, 1], [1, 1, 0]]]).bool()
    assert count_held(match, valid).tolist() == [[2, 1, 0], [2, 2, 1]]


def test_the_estimate_follows_and_leaves_out_what_was_not_seen() -> None:
    estimate = Held(K, torch.device("cpu"))
    assert offset_weights(TrainConfig(offset_weights="acceptance"), estimate.chances).tolist() == [1, 1, 1]
    for _ in range(200):
        estimate.update(torch.tensor([[8.0, 1.0, 0.0], [10.0, 10.0, 0.0]]))
    assert estimate.chances.tolist() == pytest.approx([0.8, 0.1, 1.0], abs=1e-3)
    other = Held(K, torch.device("cpu"))
    other.load(json.loads(json.dumps(estimate.state())))
    assert torch.equal(other.chances, estimate.chances)
    assert offset_weights(TrainConfig(offset_weights="acceptance"), torch.zeros(K)).min() > 0


def test_choices_are_the_likeliest_tokens() -> None:
    model, latents = tiny_model(), torch.randn(7, 32)
    assert torch.equal(choices(model, latents), model.base.unembed(latents).argmax(-1))
    assert choices(model, latents[:0]).shape == (0,)


def test_blocks_grow_and_are_of_all_lengths_where_that_is_wanted() -> None:
    ids, anchors = torch.arange(64).expand(4, -1) * 31 % 97, torch.arange(60).expand(4, -1)
    config = TrainConfig(masks_warmup=8)

    def longest(number: int) -> int:
        return int(block_lengths(anchors, ids, number, 4, config, ragged=False).max())

    assert [longest(number) for number in range(10)] == [1, 1, 2, 2, 3, 3, 4, 4, 4, 4]
    ragged = [block_lengths(anchors, ids, number, 4, TrainConfig(), ragged=True) for number in range(20)]
    shares = torch.bincount(torch.cat(ragged).flatten(), minlength=5) / (20 * anchors.numel())
    assert shares.tolist() == pytest.approx([0, 1 / 8, 1 / 8, 1 / 8, 5 / 8], abs=0.05)
    assert not torch.equal(ragged[0], ragged[1])
    short = targets(ids, ids >= 0, anchors, anchors >= 0, 4, ragged[3]).valid
    assert torch.equal(short[:, :50].sum(-1), ragged[3][:, :50])


def test_every_position_or_a_run_of_neighbours() -> None:
    trained = torch.zeros(2, 20, dtype=torch.bool)
    trained[0, 4:18], trained[1, 15:19] = True, True  # candidates 3..15 (13) and 14..16 (3)
    seen = set()
    for seed in range(30):
        anchors, valid = choose_anchors(trained, 5, generator(seed), "every")
        assert valid[0].all() and anchors[0].tolist() == list(range(int(anchors[0, 0]), int(anchors[0, 0]) + 5))
        assert anchors[1][valid[1]].tolist() == [14, 15, 16]
        seen.add(int(anchors[0, 0]))
    assert seen == set(range(3, 12))
    anchors, valid = choose_anchors(trained, 99, generator(0), "every")
    assert anchors[0].tolist() == list(range(3, 16)) and int(valid.sum()) == 16


@pytest.mark.parametrize("choice", ["uncertain", "certain"])
def test_anchors_by_the_entropy_of_what_the_first_mask_must_say(choice: str) -> None:
    model = tiny_model()
    ids = torch.randint(VOCAB, (2, 30), generator=torch.Generator().manual_seed(0))
    anchors, valid = choose_anchors(torch.ones_like(ids, dtype=torch.bool), 6, generator(1), choice)
    assert anchors.shape == (2, 12)  # twice as many to choose from
    valid[1, 3:] = False
    z = regular_pass(model, ids).z
    kept, still = keep_by_entropy(model, z, anchors, valid, 6, choice)
    for row in range(2):
        entropy = {}
        for anchor in anchors[row][valid[row]].tolist():
            p = model.base.unembed(z[row, anchor + 1]).softmax(-1)
            entropy[anchor] = float(-(p * p.log()).sum())
        best = sorted(entropy, key=lambda anchor: entropy[anchor], reverse=choice == "uncertain")[:6]
        assert kept[row][still[row]].tolist() == sorted(best)


def test_entropy_is_not_known_to_the_ungated_baseline() -> None:
    with pytest.raises(ForetellError, match="give --anchor-choice random"):
        Stepper(tiny_model(adapter="standard"), TrainConfig(anchor_choice="certain"))


EVERYTHING: dict[str, Any] = {
    "base_objective": "kl", "sampler_objective": "tv", "offset_weights": "acceptance", "anchor_choice": "uncertain",
    "masks_warmup": 4, "steps": 7,
}  # fmt: skip


def test_a_training_with_every_objective_resumes_to_the_same_bits(base: str, data: Path, tmp_path: Path) -> None:  # noqa: F811
    config = TrainConfig(**{**CONFIG.to_dict(), **EVERYTHING})
    mtp = MTPConfig(**{**MTP.to_dict(), "sampler": "bigram", "sampler_rank": 2, "mask_attention": "bidirectional"})
    run(base, data, tmp_path / "whole", config, mtp)

    def fail_late(line: dict[str, Any]) -> None:
        if line["step"] == 5:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run(base, data, tmp_path / "cut", config, mtp, on_step=fail_late)
    held = json.loads((tmp_path / "cut" / "checkpoint" / "state.json").read_text())["held"]
    assert len(held) == 3 and held[0] < 1.0
    run(base, data, tmp_path / "cut", config, mtp, resume=True)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    saved = json.loads((tmp_path / "whole" / "foretell.json").read_text())["config"]
    assert (saved["sampler"], saved["sampler_rank"], saved["mask_attention"]) == ("bigram", 2, "bidirectional")


def test_trainings_and_models_of_earlier_versions_go_on(base: str, data: Path, tmp_path: Path) -> None:  # noqa: F811
    short = TrainConfig(**{**CONFIG.to_dict(), "steps": 3, "schedule": "flat", "keep_best": False})
    whole = TrainConfig(**{**short.to_dict(), "steps": 6, "warmup": 0})
    short = TrainConfig(**{**short.to_dict(), "warmup": 0})
    one = MTPConfig(**{**MTP.to_dict(), "sampler_tokens": 1})  # all that there was
    run(base, data, tmp_path / "whole", whole, one)
    run(base, data, tmp_path / "old", short, one)
    new = {"sampler_rank", "sampler_tokens", "mask_attention", *EVERYTHING, "offset_decay"} - {"steps"}
    for path, key in (("checkpoint/state.json", "settings"), ("foretell.json", "config")):
        file = tmp_path / "old" / path
        content = json.loads(file.read_text())
        content.pop("held", None)
        content[key] = {name: value for name, value in content[key].items() if name not in new}
        file.write_text(json.dumps(content))
    from foretell.decoding.generate import load

    assert not load(tmp_path / "old", device="cpu").bidirectional
    with pytest.raises(ForetellError, match=r"offset_weights \(was uniform, now decay\)"):
        decayed = TrainConfig(**{**whole.to_dict(), "offset_weights": "decay"})
        run(base, data, tmp_path / "old", decayed, one, resume=True)
    run(base, data, tmp_path / "old", whole, one, resume=True)
    assert weights(tmp_path / "old") == weights(tmp_path / "whole")
