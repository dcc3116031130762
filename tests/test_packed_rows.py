"""Rows read out of oneDNN's blocks: the weight's own, bit for bit, or none at all."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from foretell import base as base_module
from foretell import packed_rows
from foretell.base import Base
from foretell.decoding.draft import draft
from foretell.packed import PackedLinear, reorder, ways, why_not
from foretell.packed_rows import rows_of

from .models import CONFIGS, tiny_lm, tiny_model

pytestmark = pytest.mark.skipif(
    why_not(torch.device("cpu"), torch.float32) is not None, reason="PyTorch without oneDNN"
)
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if "blocks" in ways(dtype)]


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_module, "LARGE_UNEMBEDDING", 0)


def weight(d_out: int, d_in: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d_out", "d_in"), [(96, 32), (300, 64), (1000, 100), (4096, 256), (517, 37), (49152, 16)])
def test_rows_are_those_of_the_weight(d_out: int, d_in: int, dtype: torch.dtype) -> None:
    own = weight(d_out, d_in, dtype)
    packed = reorder(own)
    rows = rows_of(packed, own)
    assert rows is not None
    del packed  # whose memory is read
    ids = torch.tensor([[0, d_out - 1, 7], [33, 64, 0]])
    for found in (rows(ids), rows(ids[0]), rows(torch.tensor(5))):
        assert found.dtype == dtype
    assert torch.equal(rows(ids), own[ids]) and torch.equal(rows(torch.tensor(5)), own[5])
    assert torch.equal(rows(torch.arange(d_out)), own)


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_another_weight_or_layout_none_are_read(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    own = weight(300, 64, dtype)
    assert rows_of(reorder(own), own.roll(1, 0)) is None
    assert rows_of(reorder(own), own.roll(1, 1)) is None
    assert rows_of(reorder(own[:64]), own) is None  # would end beyond its memory
    kinds: list[Callable[[Tensor], Tensor]] = [lambda w: w.to_mkldnn(), lambda w: reorder(w.roll(3, 1))]
    for kind in kinds:  # as if blocks were of another kind than those of the small weight
        found = rows_of(kind(own), own)
        assert found is None or torch.equal(found(torch.arange(300)), own)
    monkeypatch.setattr(packed_rows, "_memory", lambda packed, integers: None)
    assert rows_of(reorder(own), own) is None


def tied_lm(name: str) -> PreTrainedModel:
    """The same at every call."""
    config = copy.deepcopy(CONFIGS[name])
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gemma3", "falcon"])  # Gemma scales what it looks up
def test_a_tied_embedding_has_no_weight_of_its_own(name: str) -> None:
    plain, base = Base(tied_lm(name)), Base(tied_lm(name))
    base.pack(lambda: tied_lm(name))
    ids = torch.arange(base.vocab_size)
    assert torch.equal(base.embed(ids), plain.embed(ids))
    assert torch.equal(base.unembedding_rows(ids), plain.unembedding_rows(ids))
    assert base.device == plain.device and base.dtype == plain.dtype and base.parameter_count == plain.parameter_count
    assert base.fingerprint() == plain.fingerprint()
    assert base.unquantised_fingerprint() == plain.unquantised_fingerprint()
    assert isinstance(base.head, PackedLinear) and torch.equal(base.head.weight, plain.head.weight)
    assert base.head.kept is None and base.lm.get_input_embeddings() is base.embedding
    assert not any(weight.shape == plain.head.weight.shape for weight in base.lm.state_dict().values())


class Shifted(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


@pytest.mark.parametrize("why", ["small", "other rows", "it does more than look up"])
def test_where_rows_cannot_be_read_the_weight_stays(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, plain = tied_lm("llama"), Base(tied_lm("llama"))
    if why == "small":
        monkeypatch.setattr(base_module, "LARGE_UNEMBEDDING", 10**6)
    elif why == "other rows":
        monkeypatch.setattr(base_module, "rows_of", lambda packed, weight: None)
    else:
        for one in (lm, plain.lm):
            one.get_input_embeddings().__class__ = Shifted
    base = Base(lm)
    base.pack(lambda: lm)
    ids = torch.arange(base.vocab_size)
    assert isinstance(base.head, PackedLinear) and base.head.kept is base.embedding.weight
    assert torch.equal(base.embed(ids), plain.embed(ids))
    assert torch.equal(base.unembedding_rows(ids), plain.unembedding_rows(ids))


def test_an_untied_unembedding_has_its_rows_in_blocks_alone() -> None:
    base, plain = Base(tiny_lm("llama")), Base(tiny_lm("llama"))
    assert base.head.weight is not base.embedding.weight
    base.pack(lambda: tiny_lm("llama"))
    ids = torch.tensor([[1, 2], [90, 4]])
    assert isinstance(base.head, PackedLinear) and base.head.kept is None
    assert torch.equal(base.unembedding_rows(ids), plain.head.weight[ids])
    assert torch.equal(base.embed(ids), plain.embed(ids)) and isinstance(base.embedding, nn.Embedding)


@pytest.mark.parametrize("shortlist", [0, 8])
def test_drafts_are_the_same(shortlist: int) -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    model.base.pack(lambda: tiny_lm("llama"))
    latents = torch.randn(5, 4, plain.base.d_model, generator=torch.Generator().manual_seed(0))
    before = torch.arange(10).view(5, 2)
    with torch.no_grad():
        found, expected = (draft(m, latents, before, shortlist=shortlist) for m in (model, plain))
    assert torch.equal(found[0], expected[0]) and len(set(expected[0].flatten().tolist())) > 5
