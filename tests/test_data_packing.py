"""Packing changes where tokens stand and nothing else: losses and gradients are those of the records by themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from foretell.config import MTPConfig, TrainConfig
from foretell.training.batches import Batch, Batches, generator, make_batch
from foretell.training.examples import Example, Examples, Part
from foretell.training.loop import train
from foretell.training.packing import best_fit, join, packed
from foretell.training.step import all_losses, forward

from .models import VOCAB, tiny_model
from .saved import save_base

LENGTHS = (23, 9, 17, 5)
FROM = (0, 4, 11, 0)  # the first trained token of each document


def documents() -> list[Example]:
    draw = torch.Generator().manual_seed(5)
    return [
        Example(torch.randint(VOCAB, (n,), generator=draw, dtype=torch.int32), torch.arange(n) >= first)
        for n, first in zip(LENGTHS, FROM, strict=True)
    ]


def everywhere(examples: list[Example]) -> Batch:
    return make_batch(examples, 10**6, generator("anchors"))


def gradients(
    model: torch.nn.Module, batch: Batch, config: TrainConfig
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    losses = all_losses(model, batch, forward(model, batch), config)  # type: ignore[arg-type]
    losses["loss"].backward()
    found = {name: p.grad.clone() for name, p in model.own_parameters().items() if p.grad is not None}  # type: ignore[operator]
    model.zero_grad()
    return {name: float(value.detach()) for name, value in losses.items()}, found


@pytest.mark.parametrize("adapter", ["gated", "standard", "bidirectional"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3", "gpt2", "llama4"])
def test_a_pack_has_the_losses_and_gradients_of_its_records(kind: str, adapter: str) -> None:
    """Windows of 16 are shorter than the pack; one row is padded as well."""
    settings = {"mask_attention": adapter} if adapter == "bidirectional" else {"adapter": adapter}
    model = tiny_model(kind, masks=3, **settings)
    for parameter in model.own_parameters().values():
        parameter.requires_grad_()
    config = TrainConfig(seq_len=64)
    apart = everywhere(documents())
    together = everywhere([join(documents()[:3]), documents()[3]])
    assert together.starts is not None and int(together.anchor_valid.sum()) == int(apart.anchor_valid.sum()) > 30
    (first, slow), (second, fast) = gradients(model, apart, config), gradients(model, together, config)
    assert second == pytest.approx(first, abs=1e-5, rel=1e-5)
    for name, gradient in slow.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(fast[name], gradient, atol=1e-5 * max(1.0, scale), rtol=1e-4)
    assert any(gradient.abs().max() > 1e-4 for gradient in slow.values())


def test_no_document_sees_another() -> None:
    model = tiny_model(masks=3)
    one, two, three = documents()[:3]
    other = Example(torch.full_like(one.ids, 7), one.trained)
    batch = everywhere([join([one, two, three])])
    mine, theirs = (forward(model, b) for b in (batch, everywhere([join([other, two, three])])))
    behind = batch.anchors[0] >= LENGTHS[0]
    torch.testing.assert_close(mine.z_masks[0][behind], theirs.z_masks[0][behind])
    torch.testing.assert_close(mine.z[0, LENGTHS[0] :], theirs.z[0, LENGTHS[0] :])
    assert not torch.allclose(mine.z_masks[0][~behind], theirs.z_masks[0][~behind])


def test_no_label_and_no_anchor_crosses_a_border() -> None:
    pack = join([Example(torch.arange(n, dtype=torch.int32), torch.ones(n, dtype=torch.bool)) for n in (6, 4, 5)])
    assert pack.starts is not None and pack.starts.tolist() == [0] * 6 + [6] * 4 + [10] * 5
    batch = make_batch([pack], 99, generator(0))
    assert batch.anchors.tolist() == [[0, 1, 2, 3, 6, 7, 10, 11, 12]]
    target = forward(tiny_model(masks=4), batch).target
    assert [int(n) for n in target.valid[0].sum(-1)] == [4, 3, 2, 1, 2, 1, 3, 2, 1]
    starts = pack.starts[target.positions[0] + 1]
    assert (starts == pack.starts[batch.anchors[0]][:, None])[target.valid[0]].all()


def test_packs_hold_everything_once_and_leave_little_room() -> None:
    draw = np.random.default_rng(0)
    lengths = draw.integers(3, 65, 500)
    pack_of = best_fit(lengths, 64)
    filled = np.bincount(pack_of, weights=lengths)
    assert filled.max() <= 64 and filled.mean() > 0.9 * 64
    assert (best_fit(lengths, 64) == pack_of).all()
    assert best_fit(np.array([64, 64]), 64).tolist() == [0, 1]
    made = [
        Example(torch.full((n,), i, dtype=torch.int32), torch.ones(n, dtype=torch.bool)) for i, n in enumerate(lengths)
    ]
    pool = packed(Examples([Part.of(made[:300], 1.0), Part.of(made[300:], 2.0)]), 64)
    assert sorted({int(i) for pack in pool for i in pack.ids.unique()}) == list(range(500))
    assert [len(pack.ids) for pack in pool] == pool.lengths.tolist()
    assert all((pack.ids < 300).all() or (pack.ids >= 300).all() for pack in pool), "sources are weighted, so not mixed"
    first, second = pool.draws()
    assert first + second == len(pool) and abs(second - 2 * first) <= 2


def test_batches_of_packs_depend_on_seed_and_number_alone() -> None:
    pool = packed(Examples([Part.of(documents() * 5)]), 32)
    later, fresh = Batches(pool, 2, 3, seed=1).batch(9), Batches(pool, 2, 3, seed=1)
    fresh.batch(2)
    assert all(torch.equal(a, b) for a, b in zip(later, fresh.batch(9), strict=True))
    padding = later.starts[~later.real]
    assert later.starts is not None and (padding == later.real.sum(1).repeat_interleave((~later.real).sum(1))).all()


def test_a_resumed_packed_mixture_gives_the_same_bits(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    for name, count in {"a": 25, "b": 6}.items():
        lines = [json.dumps({"text": f"{name} {n} of many"[: 6 + n % 7]}) for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*lines, "{"]))
    data = [f"{tmp_path / 'a.jsonl'}:1", f"{tmp_path / 'b.jsonl'}:2"]
    config = TrainConfig(steps=6, batch_size=2, seq_len=32, anchors=6, packing=True, checkpoint_every=2, log_every=3)
    mtp = MTPConfig(masks=3, rank=4, alpha=8.0)

    def fail(line: dict[str, object]) -> None:
        if line["step"] == 5:
            raise RuntimeError("power cut")

    model = train(str(base), data, tmp_path / "whole", mtp, config, device="cpu")
    assert model.provenance["data"] == "a.jsonl:1 b.jsonl:2"
    assert [source["bad"] for source in model.provenance["data_sources"]] == [1, 1]
    assert len((tmp_path / "whole" / "skipped.jsonl").read_text().splitlines()) == 2
    with pytest.raises(RuntimeError):
        train(str(base), data, tmp_path / "cut", mtp, config, device="cpu", on_step=fail)
    train(str(base), data, tmp_path / "cut", mtp, config, device="cpu", resume=True)
    name = "foretell.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
