"""Sweeps of the sampler head in one call, against those of PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch

from foretell import native
from foretell.decoding.draft import Sweeps, draft, largest
from foretell.model import MTPModel
from foretell.sampled import SampledHead

from .lying import in_16_bits, lying
from .models import VOCAB, tiny_lm, tiny_model

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no native code: {native.why_not()}")

HEADS = [("mlp", 1), ("residual", 2), ("bigram", 1), ("bigram", 2), ("combined", 2)]
DTYPES = [torch.float32, torch.bfloat16]


def packed_model(
    sampler: str, tokens: int, dtype: torch.dtype, patch: pytest.MonkeyPatch, way: str = "streamed"
) -> MTPModel:
    lying(way, patch)  # type: ignore[arg-type]
    model = in_16_bits(tiny_model(sampler=sampler, sampler_tokens=tokens)).to(dtype)
    model.base.pack(lambda: in_16_bits(tiny_lm()).to(dtype))
    model.for_inference()
    return model


def sweeps(model: MTPModel, latents: torch.Tensor, confident: bool = True) -> Sweeps:
    assert model.sampler is not None
    return Sweeps(model, model.sampler, latents, None, largest, confident)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sampler", "tokens"), HEADS)
def test_scores_are_those_of_the_head(
    sampler: str, tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed_model(sampler, tokens, dtype, monkeypatch)
    head, random = model.sampled_head, torch.Generator().manual_seed(0)
    assert head is not None and head.unembeds and model.sampled_head is head
    latents = torch.randn(7, model.base.d_model, generator=random).to(dtype)
    own, block = sweeps(model, latents), head.block(latents, True)
    for numbers in (None, [2], [0, 3, 6]):
        before = torch.randint(VOCAB, (7 if numbers is None else len(numbers), tokens), generator=random).tolist()
        of = None if numbers is None else torch.tensor(numbers)
        assert model.sampler is not None and model.sampler.remembered is not None
        terms = model.sampler.remembered.of(before, model.base.embed)
        sampled = model.sampler.finish(
            *(model.sampler.prepare(latents) if of is None else model.sampler.prepare(latents)[of], terms),
            latents if of is None else latents[of],
        )
        expected = model.base.unembed(sampled).float()
        size = float(expected.abs().max())
        torch.testing.assert_close(block.sampled(before, numbers).float(), sampled.float(), rtol=0.05, atol=0.05)
        scores = block.scores(before, numbers)
        assert (scores - expected).abs().max() < 0.03 * size and scores.dtype == torch.float32
        tokens_made, sure = block.likeliest(before, numbers)
        assert tokens_made == scores.argmax(-1).tolist()
        assert sure == pytest.approx(scores.softmax(-1).amax(-1).tolist(), rel=1e-4)
        assert own.look(before, numbers)[0] == tokens_made
        other = [[(token + 1) % VOCAB for token in row] for row in before]
        assert not torch.equal(block.scores(other, numbers), scores)


@pytest.mark.parametrize("sampler", ["mlp", "combined"])
def test_a_chain_is_that_of_the_head(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for ties that the rounding of weights and rows makes, which are few."""
    model = packed_model(sampler, 2, torch.float32, monkeypatch)
    latents = torch.randn(40, 6, model.base.d_model, generator=torch.Generator().manual_seed(0))
    before = torch.arange(80).view(40, 2) % VOCAB
    found, sure = draft(model, latents, before, confident=True)
    assert draft(model, latents, before)[1] is None  # nobody asked how sure they are
    monkeypatch.setattr("foretell.sampled.SampledHead.of", lambda *args: None)
    model.for_inference()  # lays it out anew
    assert model.sampled_head is None
    expected, expected_sure = draft(model, latents, before, confident=True)
    assert (found == expected).float().mean() > 0.9
    assert sure is not None and expected_sure is not None
    same = found == expected
    torch.testing.assert_close(sure[same], expected_sure[same], rtol=0.1, atol=0.05)


def test_drafts_that_are_drawn_and_shortlists_go_by_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_model("combined", 2, torch.float32, monkeypatch)
    latents = torch.randn(5, 4, model.base.d_model, generator=torch.Generator().manual_seed(0))
    before = torch.arange(10).view(5, 2)
    expected = draft(model, latents, before)[0]

    def likewise(scores: torch.Tensor, tokens: object, numbers: object) -> torch.Tensor:
        return scores.argmax(-1)

    assert torch.equal(draft(model, latents, before, choose=likewise)[0], expected)
    assert torch.equal(draft(model, latents, before, shortlist=VOCAB)[0], expected)


def test_other_heads_and_machines_go_without(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = packed_model("mlp", 1, torch.float32, monkeypatch, way="stored")
    head = stored.sampled_head
    assert head is not None and not head.unembeds  # the base unembeds what it samples
    latents, before = torch.randn(3, 4, stored.base.d_model), torch.arange(6).view(3, 2)
    drafts = draft(stored, latents, before)[0]
    assert drafts.shape == (3, 4)
    assert copy.deepcopy(head) is None
    assert tiny_model(sampler="none").sampled_head is None
    monkeypatch.setattr("foretell.sampled.MULTIPLE", 7)
    assert stored.sampler is not None and SampledHead.of(stored.sampler, stored.base) is None
    monkeypatch.undo()
    monkeypatch.setattr("foretell.native.library", lambda: None)
    assert SampledHead.of(stored.sampler, stored.base) is None
