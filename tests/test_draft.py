"""The draft chain against a plain reading of method.md section 3, and the shortlist against the exact chain."""

import pytest
import torch
from torch import Tensor

from foretell.decoding.draft import GoOn, draft
from foretell.model import MTPModel
from foretell.sampler import BigramHead, CombinedHead, SamplerHead

from .models import VOCAB, random_prompt, reference, tiny_model


def plain_chain(model: MTPModel, latents: Tensor, token: Tensor) -> list[int]:
    """y = argmax W · MLP([E_y; z]), one mask after another."""
    assert model.sampler is not None
    drafts = []
    for latent in latents:
        token = model.base.unembed(model.sampler(model.base.embed(token), latent)).argmax(-1)
        drafts.append(int(token))
    return drafts


@pytest.mark.parametrize("sampler", ["mlp", "residual", "bigram", "combined"])
@pytest.mark.parametrize("name", ["llama", "opt", "gemma2"])
def test_chain_equals_the_plain_reading(name: str, sampler: str) -> None:
    model = tiny_model(name, sampler=sampler)
    for seed in range(8):
        latents = torch.randn(4, model.base.d_model, generator=torch.Generator().manual_seed(seed))
        first = torch.tensor(seed)
        expected = plain_chain(model, latents, first)
        for shortlist in (0, VOCAB, 10**6):
            assert draft(model, latents[None], first[None], shortlist=shortlist)[0].tolist() == [expected]


def test_chain_depends_on_the_token_before() -> None:
    model = tiny_model()
    latents = torch.randn(4, model.base.d_model, generator=torch.Generator().manual_seed(0))
    chains = draft(model, latents.expand(30, -1, -1), torch.arange(30))[0].tolist()  # a batch with one token each
    assert len({tuple(chain) for chain in chains}) > 1
    assert chains == [plain_chain(model, latents, torch.tensor(first)) for first in range(30)]


def test_shortlist_of_one_is_the_base_argmax() -> None:
    model = tiny_model(sampler="mlp")
    latents = torch.randn(1, 4, model.base.d_model, generator=torch.Generator().manual_seed(0))
    first = torch.tensor([3])
    expected = model.base.unembed(latents).argmax(-1)
    assert torch.equal(draft(model, latents, first, shortlist=1)[0], expected)
    assert torch.equal(draft(model, latents, first, use_sampler=False)[0], expected)
    assert not torch.equal(draft(model, latents, first)[0], expected)


@pytest.mark.parametrize("use_sampler", [True, False])
def test_logits_read_along_change_nothing(use_sampler: bool) -> None:
    model = tiny_model()
    latents = torch.randn(3, 4, model.base.d_model, generator=torch.Generator().manual_seed(0))
    first, logits = torch.tensor([3, 4, 5]), model.base.unembed(latents)
    read = draft(model, latents, first, use_sampler, shortlist=5, logits=logits)[0]
    assert torch.equal(read, draft(model, latents, first, use_sampler, shortlist=5)[0])


@pytest.mark.parametrize("shortlist", [0, VOCAB])
@pytest.mark.parametrize("use_sampler", [True, False])
def test_confidence_is_the_drafts_own_probability(use_sampler: bool, shortlist: int) -> None:
    model = tiny_model()
    latents = torch.randn(1, 4, model.base.d_model, generator=torch.Generator().manual_seed(0))
    first = torch.tensor([3])
    drafts, confidences = draft(model, latents, first, use_sampler, shortlist, confident=True)
    assert confidences is not None and draft(model, latents, first, use_sampler, shortlist)[1] is None
    before = [int(first), *drafts[0].tolist()]
    for mask, (token, confidence) in enumerate(zip(drafts[0].tolist(), confidences[0].tolist(), strict=True)):
        latent = latents[0, mask]
        if use_sampler:
            assert model.sampler is not None
            latent = model.sampler(model.base.embed(torch.tensor(before[mask])), latent)
        assert confidence == pytest.approx(float(model.base.unembed(latent).softmax(-1)[token]), abs=1e-6)


def test_shortlist_never_changes_the_output() -> None:
    model = tiny_model()
    prompt = random_prompt(9)
    expected = reference(model.base.lm, prompt, 40)
    assert model.generate(input_ids=prompt, max_new_tokens=40, shortlist=3).token_ids == expected


def test_a_chain_ends_when_told() -> None:
    def above(floor: float) -> GoOn:
        reach = torch.ones(2)
        return lambda confidences: float(reach.mul_(confidences).max()) >= floor

    model = tiny_model()
    latents = torch.randn(2, 4, model.base.d_model, generator=torch.Generator().manual_seed(0))
    first = torch.tensor([3, 4])
    drafts, sure = draft(model, latents, first, confident=True)
    assert sure is not None
    reach = sure.cumprod(1).amax(0)  # of the sequence that fares best
    for made in (1, 2, 3):
        floor = float(reach[made - 1]) * 1.001
        early, confidences = draft(model, latents, first, confident=True, go_on=above(floor))
        assert torch.equal(early, drafts[:, :made]) and torch.equal(confidences, sure[:, :made])
    assert draft(model, latents, first, confident=True, go_on=above(0.0))[0].shape == (2, 4)


def test_the_bigram_head_adds_a_low_rank_table_to_the_logits() -> None:
    model = tiny_model(sampler="bigram", sampler_rank=3)
    assert isinstance(model.sampler, BigramHead)
    tokens, latents = torch.arange(VOCAB), torch.randn(VOCAB, 32)

    def added(latents: torch.Tensor) -> torch.Tensor:
        return model.base.unembed(model.sampler(model.base.embed(tokens), latents)) - model.base.unembed(latents)

    assert torch.linalg.matrix_rank(added(latents), rtol=1e-4) == 3
    # In units of the latents' own size, whatever that is.
    torch.testing.assert_close(added(5 * latents), 5 * added(latents), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", ["residual", "bigram", "combined"])
def test_heads_start_at_the_bases_own_choice(sampler: str) -> None:
    head = tiny_model(sampler=sampler, random_adapter=False).sampler
    assert head is not None
    latents = torch.randn(5, 32)
    assert torch.equal(head(torch.randn(5, 32), latents), latents)


def test_the_combined_head_is_the_sum_of_the_two() -> None:
    model = tiny_model(sampler="combined", sampler_rank=3)
    assert isinstance(model.sampler, CombinedHead)
    embedding, latents = torch.randn(2, 5, 32)
    out = model.sampler(embedding, latents)
    size = latents.pow(2).mean(-1, keepdim=True).sqrt()
    units = embedding / (embedding.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    table = size * (units @ model.sampler.bigram.a.weight.T @ model.sampler.bigram.b.weight.T)
    residual = SamplerHead(32, 32, residual=True)
    residual.load_state_dict({k: v for k, v in model.sampler.state_dict().items() if not k.startswith("bigram")})
    torch.testing.assert_close(out, residual(embedding, latents) + table)
    assert table.abs().mean() > 1e-4
