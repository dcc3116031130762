"""Weights that stay in their file: the same numbers, only the pages that are read, and nothing ever written there."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from foretell import base as base_module
from foretell import mapped
from foretell.base import Base, load_base
from foretell.mapped import MAPS, region_of, regions, resident, separate
from foretell.packed import PackedLinear, why_not

from .models import GQA

pytestmark = [
    pytest.mark.usefixtures("kept"),
    pytest.mark.skipif(not MAPS.exists(), reason="a system that does not tell what is mapped"),
    pytest.mark.skipif(why_not(torch.device("cpu"), torch.float32) is not None, reason="PyTorch without oneDNN"),
]
VOCABULARY = 2**17  # an embedding of 16 MB
IDS = torch.tensor([[5, 6, 30_000, 7]])


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unembedding keeps its weight, as where rows can't be read out of a packed one."""
    monkeypatch.setattr(base_module, "LARGE_UNEMBEDDING", float("inf"))


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "tie_word_embeddings": request.param}
    LlamaForCausalLM(LlamaConfig(**GQA | sizes)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def packed(directory: Path, dtype: torch.dtype = torch.float32) -> Base:
    base = load_base(str(directory), dtype=dtype)
    base.pack(lambda: load_base(str(directory), dtype=dtype).lm)
    return base


def file_of(weight: Tensor) -> str | None:
    region = region_of(weight, regions())
    return region and region.path


@torch.inference_mode()
def outputs(base: Base) -> tuple[Tensor, Tensor]:
    embeddings = base.embed(IDS)
    return embeddings, base.unembed(base.latents(embeddings))


def test_what_is_left_of_a_packed_base_is_mapped_from_its_file(directory: Path) -> None:
    base = packed(directory)
    assert file_of(base.embedding.weight) == file_of(base.head.weight) == str(directory / "model.safetensors")
    # The mapping that transformers loaded from is gone, with the pages of every weight that was packed.
    spans = [region.end - region.start for region in regions() if region.path == str(directory / "model.safetensors")]
    held = {weight.data_ptr(): weight.nbytes for weight in (base.embedding.weight, base.head.weight)}
    assert len(spans) == len(held) and sum(spans) <= sum(held.values()) + 2 * 4096 * len(held)


def test_only_rows_that_are_read_come_into_memory(directory: Path) -> None:
    base = packed(directory)
    weights = [base.embedding.weight]
    size = base.embedding.weight.nbytes
    base.embedding_statistics()
    outputs(base)
    assert resident(weights)[0] == size and resident(weights)[1] < size / 2  # in and about two places
    base.embedding.weight.sum()
    assert resident(weights)[1] >= size
    assert resident([torch.ones(4)]) == (0, 0)


def test_outputs_and_everything_saved_are_as_before(directory: Path, tmp_path: Path) -> None:
    base, plain = packed(directory), load_base(str(directory))
    before = plain.embedding_statistics()
    assert torch.equal(base.embedding_statistics()[0], before[0]) and base.embedding_statistics()[1] == before[1]
    assert base.fingerprint() == plain.fingerprint()
    assert base.unquantised_fingerprint() == plain.unquantised_fingerprint()
    for found, expected in zip(outputs(base), outputs(plain), strict=True):
        torch.testing.assert_close(found, expected)
    assert torch.equal(outputs(base)[0], outputs(plain)[0])
    own, kept = plain.lm.state_dict(), base.lm.state_dict()
    assert "model.embed_tokens.weight" in kept
    assert torch.equal(kept.pop("lm_head.kept"), own["lm_head.weight"])
    assert all(torch.equal(kept[name], own[name]) for name in kept)
    assert not base.embedding.weight.requires_grad and not base.embedding.weight.is_inference()
    base.unpacked().save_pretrained(tmp_path / "again")
    first, again = (load_file(folder / "model.safetensors") for folder in (directory, tmp_path / "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def test_a_file_that_is_deleted_stays_readable(directory: Path) -> None:
    base = packed(directory)
    expected = outputs(load_base(str(directory)))[0]
    (directory / "model.safetensors").unlink()
    assert torch.equal(outputs(base)[0], expected)
    separate(base.lm.parameters())  # nothing to map anew
    assert torch.equal(outputs(base)[0], expected)


def test_another_dtype_stays_in_memory(directory: Path) -> None:
    base = packed(directory, torch.bfloat16)
    assert file_of(base.embedding.weight) is None and file_of(base.head.weight) is None
    assert torch.equal(outputs(base)[0], outputs(load_base(str(directory), dtype=torch.bfloat16))[0])


def test_a_weight_that_was_written_to_keeps_its_numbers(directory: Path) -> None:
    before = (directory / "model.safetensors").read_bytes()
    base = load_base(str(directory))
    base.embedding.weight[5] = 1.0
    base.pack(lambda: load_base(str(directory)).lm)
    assert (outputs(base)[0][0, 0] == 1).all()
    other = packed(directory)
    other.embedding.weight[5] = 2.0
    assert (outputs(other)[0][0, 0] == 2).all()
    assert isinstance(other.head, PackedLinear) and (directory / "model.safetensors").read_bytes() == before


def test_moved_and_cast_like_any_weight(directory: Path) -> None:
    embedding = packed(directory).embedding
    expected = embedding.weight.to(torch.float64)
    assert torch.equal(embedding.to(torch.float64).weight, expected) and file_of(embedding.weight) is None


def test_shared_memory_stays_shared() -> None:
    weight = torch.ones(2**20).share_memory_()
    address = weight.data_ptr()
    separate([weight])
    assert weight.data_ptr() == address and weight.is_shared()


def test_where_the_system_does_not_tell_all_stays_as_it_was(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "MAPS", tmp_path / "none")
    base = packed(directory)
    assert torch.equal(outputs(base)[0], outputs(load_base(str(directory)))[0])
