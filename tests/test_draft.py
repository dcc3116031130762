"""The draft chain against a plain reading of method.md section 3, and the shortlist against the exact chain."""

import pytest
import torch
from torch import Tensor

from foretell.decoding.draft import Open, draft, unseen
from foretell.model import MTPModel
from foretell.packed import Way
from foretell.sampler import BigramHead, CombinedHead, SamplerHead, SplitLinear

from .lying import WAYS, in_16_bits, lying
from .models import VOCAB, random_prompt, reference, tiny_model


def plain_chain(model: MTPModel, latents: Tensor, before: Tensor) -> list[int]:
    """y = argmax W · MLP([E_y; E_y'; z]), one mask after another; before (2,), the latest first."""
    assert model.sampler is not None
    text = before.flip(0).tolist()
    for latent in latents:
        latest = torch.tensor(text[: -1 - model.sampler.tokens : -1])
        text.append(int(model.base.unembed(model.sampler(model.base.embed(latest), latent)).argmax(-1)))
    return text[2:]


@pytest.mark.parametrize(
    ("sampler", "tokens"), [("mlp", 1), ("residual", 2), ("bigram", 1), ("bigram", 2), ("combined", 2)]
)
@pytest.mark.parametrize("name", ["llama", "opt", "gemma2"])
def test_chain_equals_the_plain_reading(name: str, sampler: str, tokens: int) -> None:
    model = tiny_model(name, sampler=sampler, sampler_tokens=tokens)
    for seed in range(8):
        latents = torch.randn(4, model.base.d_model, generator=torch.Generator().manual_seed(seed))
        before = torch.tensor([seed, seed + 3])
        expected = plain_chain(model, latents, before)
        for shortlist in (0, VOCAB, 10**6):
            assert draft(model, latents[None], before[None], shortlist=shortlist)[0].tolist() == [expected]


@pytest.mark.parametrize("sampler", ["mlp", "bigram", "combined"])
@pytest.mark.parametrize("way", (*WAYS, "streamed"))
def test_a_head_whose_weights_are_laid_out_drafts_the_same(
    sampler: str, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    lying(way, monkeypatch)
    model = tiny_model(sampler=sampler, sampler_tokens=2)
    assert model.sampler is not None
    in_16_bits(model.sampler)
    latents = torch.randn(3, 4, model.base.d_model, generator=torch.Generator().manual_seed(0))
    before = torch.tensor([[1, 2], [3, 4], [5, 6]])
    expected = draft(model, latents, before)[0]
    with torch.inference_mode():
        model.sampler.lay_out()
        assert torch.equal(draft(model, latents, before)[0], expected)
        for linear in (module for module in model.sampler.modules() if isinstance(module, SplitLinear)):
            linear.weight.copy_(torch.randn_like(linear.weight))  # copies are used, until it is moved or cast
        assert torch.equal(draft(model, latents, before)[0], expected)
        model.sampler.to(torch.float64).to(torch.float32)
        assert not torch.equal(draft(model, latents, before)[0], expected)


@pytest.mark.parametrize("tokens", [1, 2])
def test_chain_depends_on_the_tokens_before(tokens: int) -> None:
    model = tiny_model(sampler_tokens=tokens)
    latents = torch.randn(4, model.base.d_model, generator=torch.Generator().manual_seed(0))
    for latest_first in (1, -1):
        before = torch.stack([torch.arange(30), torch.full((30,), 7)][::latest_first], dim=1)
        chains = draft(model, latents.expand(30, -1, -1), before)[0].tolist()  # a batch with other tokens each
        assert (len({tuple(chain) for chain in chains}) > 1) == (tokens == 2 or latest_first == 1)
        assert chains == [plain_chain(model, latents, own) for own in before]


def test_shortlist_of_one_is_the_base_argmax() -> None:
    model = tiny_model(sampler="mlp")
    latents = torch.randn(1, 4, model.base.d_model, generator=torch.Generator().manual_seed(0))
    before = torch.tensor([[3, 5]])
    expected = model.base.unembed(latents).argmax(-1)
    assert torch.equal(draft(model, latents, before, shortlist=1)[0], expected)
    assert torch.equal(draft(model, latents, before, use_sampler=False)[0], expected)
    assert not torch.equal(draft(model, latents, before)[0], expected)


@pytest.mark.parametrize("use_sampler", [True, False])
def test_logits_read_along_change_nothing(use_sampler: bool) -> None:
    model = tiny_model()
    latents = torch.randn(3, 4, model.base.d_model, generator=torch.Generator().manual_seed(0))
    before, logits = torch.tensor([[3, 1], [4, 2], [5, 3]]), model.base.unembed(latents)
    read = draft(model, latents, before, use_sampler, shortlist=5, logits=logits)[0]
    assert torch.equal(read, draft(model, latents, before, use_sampler, shortlist=5)[0])


@pytest.mark.parametrize("shortlist", [0, VOCAB])
@pytest.mark.parametrize("use_sampler", [True, False])
def test_confidence_is_the_drafts_own_probability(
    use_sampler: bool, shortlist: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foretell.decoding.draft.LEAST_REACH", 0.0)  # unlikely ones are made again, too
    model = tiny_model()
    latents = torch.randn(1, 4, model.base.d_model, generator=torch.Generator().manual_seed(0))
    before = torch.tensor([[3, 5]])
    drafts, confidences = draft(model, latents, before, use_sampler, shortlist, confident=True)
    assert confidences is not None and draft(model, latents, before, use_sampler, shortlist)[1] is None
    text = [5, 3, *drafts[0].tolist()]
    for mask, (token, confidence) in enumerate(zip(drafts[0].tolist(), confidences[0].tolist(), strict=True)):
        latent = latents[0, mask]
        if use_sampler:
            latent = model.sample(torch.tensor([text[mask + 1], text[mask]]), latent)
        assert confidence == pytest.approx(float(model.base.unembed(latent).softmax(-1)[token]), abs=1e-6)


def test_shortlist_never_changes_the_output() -> None:
    model = tiny_model()
    prompt = random_prompt(9)
    expected = reference(model.base.lm, prompt, 40)
    assert model.generate(input_ids=prompt, max_new_tokens=40, shortlist=3).token_ids == expected


def test_a_chain_that_was_guessed_takes_one_sweep_and_any_no_more_than_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    sweeps = 0
    finish = SamplerHead.finish

    def counted(self: SamplerHead, *args: Tensor) -> Tensor:
        nonlocal sweeps
        sweeps += 1
        return finish(self, *args)

    monkeypatch.setattr(SamplerHead, "finish", counted)
    latents = torch.randn(30, 6, 32, generator=torch.Generator().manual_seed(0))
    before = torch.stack([torch.arange(30), torch.arange(30)], dim=1)
    own = tiny_model(sampler="residual", random_adapter=False)  # its head starts at the base's own choice
    assert torch.equal(draft(own, latents, before)[0], own.base.unembed(latents).argmax(-1)) and sweeps == 1
    other = tiny_model(sampler="mlp")
    expected = [plain_chain(other, one, two) for one, two in zip(latents, before, strict=True)]
    sweeps = 0
    assert draft(other, latents, before)[0].tolist() == expected
    assert 2 <= sweeps <= 6
    sweeps = 0
    draft(other, latents[:, :1], before)
    assert sweeps == 1


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_chain_made_without_a_look_is_the_same(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(sampler="combined", sampler_tokens=tokens)
    latents = torch.randn(6, 5, model.base.d_model, generator=torch.Generator().manual_seed(0))
    before = torch.arange(12).view(6, 2)
    monkeypatch.setattr("foretell.decoding.draft.LEAST_REACH", 0.0)
    looked, sure = draft(model, latents, before, confident=True)
    monkeypatch.setattr("foretell.decoding.draft.seen", unseen)
    queued, also_sure = draft(model, latents, before, confident=True)
    assert torch.equal(queued, looked) and sure is not None and also_sure is not None
    torch.testing.assert_close(also_sure, sure)
    monkeypatch.setattr("foretell.decoding.draft.UNSEEN_SWEEPS", 1)
    assert not torch.equal(draft(model, latents, before)[0], looked)


def test_only_drafts_behind_changed_ones_are_made_again() -> None:
    """Two blocks of four, each draft made behind the two before it."""
    open = Open([[10, 11, 1, 2, 3, 4], [12, 13, 5, 6, 7, 8]], 2)
    assert open.before[:4] == [[11, 10], [1, 11], [2, 1], [3, 2]] and open.before[4] == [13, 12]
    assert open.again([1, 9, 3, 4, 5, 6, 7, 9], None) == [2, 3]  # nothing lies behind the last of a block
    assert open.before == [[9, 1], [3, 9]]
    assert open.again([3, 9], None) == []
    sure = [0.5, 0.5, 0.9, 0.9, 0.9, 0.05, 0.9, 0.9]
    open = Open([[10, 1, 2, 3, 4], [11, 5, 6, 7, 8]], 1)
    assert open.again([9, 9, 3, 4, 5, 9, 9, 8], sure) == [1, 2]  # the end of the second is hardly reached
    assert open.again([9, 4], [0.9, 0.9]) == [3]
    open = Open([[10, 1, 2]], 1)
    assert open.again([9, 2], [0.05, 1.0]) == []


def test_the_bigram_head_adds_a_low_rank_table_to_the_logits() -> None:
    model = tiny_model(sampler="bigram", sampler_rank=3)
    assert isinstance(model.sampler, BigramHead)
    before, latents = torch.stack([torch.arange(VOCAB), torch.arange(VOCAB).flip(0)], dim=1), torch.randn(VOCAB, 32)

    def added(latents: torch.Tensor) -> torch.Tensor:
        return model.base.unembed(model.sample(before, latents)) - model.base.unembed(latents)

    assert torch.linalg.matrix_rank(added(latents), rtol=1e-4) == 3
    # In units of the latents' own size, whatever that is.
    torch.testing.assert_close(added(5 * latents), 5 * added(latents), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", ["residual", "bigram", "combined"])
def test_heads_start_at_the_bases_own_choice(sampler: str) -> None:
    head = tiny_model(sampler=sampler, random_adapter=False).sampler
    assert head is not None
    latents = torch.randn(5, 32)
    assert torch.equal(head(torch.randn(5, 2, 32), latents), latents)


def test_the_combined_head_is_the_sum_of_the_two() -> None:
    model = tiny_model(sampler="combined", sampler_rank=3)
    assert isinstance(model.sampler, CombinedHead)
    embedding, latents = torch.randn(5, 2, 32), torch.randn(5, 32)
    out = model.sampler(embedding, latents)
    size = latents.pow(2).mean(-1, keepdim=True).sqrt()
    units = embedding / (embedding.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    table = size * (units.flatten(1) @ model.sampler.bigram.a.weight.T @ model.sampler.bigram.b.weight.T)
    residual = SamplerHead(32, 32, 2, residual=True)
    residual.load_state_dict({k: v for k, v in model.sampler.state_dict().items() if not k.startswith("bigram")})
    torch.testing.assert_close(out, residual(embedding, latents) + table)
    assert table.abs().mean() > 1e-4
