"""Terms of tokens that are looked up against those that are multiplied."""

import copy

import pytest
import torch
from torch import Tensor

from foretell import token_terms
from foretell.model import MTPModel

from .models import VOCAB, tiny_model


def drawn(count: int, tokens: int, seed: int) -> list[list[int]]:
    return torch.randint(VOCAB, (count, tokens), generator=torch.Generator().manual_seed(seed)).tolist()


def plain(model: MTPModel, tokens: list[list[int]]) -> Tensor:
    assert model.sampler is not None
    return model.sampler.terms(model.base.embed(torch.tensor(tokens)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("sampler", "tokens"), [("mlp", 1), ("residual", 2), ("bigram", 1), ("bigram", 2), ("combined", 2)]
)
def test_sums_are_those_of_the_head(sampler: str, tokens: int, dtype: torch.dtype) -> None:
    model = tiny_model(sampler=sampler, sampler_tokens=tokens)
    assert model.sampler is not None and model.sampler.remembered is None
    model.to(dtype)
    model.sampler.lay_out()
    assert model.sampler.remembered is not None
    for seed in range(3):  # others each time, some of them known
        own = drawn(7, tokens, seed)
        found, expected = model.sampler.remembered.of(own, model.base.embed), plain(model, own)
        assert found.dtype == dtype
        close = 2**-5 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found, expected, rtol=close, atol=close)
        assert not torch.equal(found, plain(model, [row[::-1] for row in own])) or tokens == 1
    model.sampler.to(torch.float64)
    assert model.sampler.remembered is None


def test_known_tokens_are_not_multiplied_again_and_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_terms, "KEPT", 5)
    model = tiny_model(sampler="combined", sampler_tokens=2)
    assert model.sampler is not None
    asked: list[int] = []

    def embed(ids: Tensor) -> Tensor:
        asked.extend(ids.flatten().tolist())
        return model.base.embed(ids)

    remembered = token_terms.TokenTerms(model.sampler.terms)

    def learnt_for(tokens: list[list[int]]) -> set[int]:
        asked.clear()
        torch.testing.assert_close(remembered.of(tokens, embed), plain(model, tokens))
        return set(asked)

    assert learnt_for([[1, 2], [2, 3]]) == {1, 2, 3}
    assert learnt_for([[3, 1], [2, 2]]) == set()
    assert learnt_for([[4, 1], [5, 5]]) == {4, 5}
    assert learnt_for([[6, 1]]) == {6, 1}  # there was no room: anew
    assert learnt_for([[6, 1], [1, 6]]) == set()
    assert learnt_for([[1, 2], [3, 4], [5, 6]]) == {1, 2, 3, 4, 5, 6}  # more than there is room for
    assert learnt_for([[1, 7]]) == {7}
    remembered = copy.deepcopy(remembered)
    assert learnt_for([[7, 1]]) == {7, 1}  # a copy has yet to meet them
