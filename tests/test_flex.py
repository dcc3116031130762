"""FlexAttention in training: what masks see by block masks, against the dense mask."""

from __future__ import annotations

import pytest
import torch

from foretell.attention import block_mask
from foretell.config import TrainConfig
from foretell.errors import ForetellError
from foretell.model import MTPModel
from foretell.training.flex import attending
from foretell.training.step import Stepper
from foretell.training.two_pass import mask_pass, one_pass, regular_pass, visibility

from .models import tiny_model

IDS = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(0))
ANCHORS = torch.tensor([[0, 7, 20, 33], [2, 3, 19, 30]])


def test_a_block_mask_shows_what_the_dense_one_shows() -> None:
    from torch.nn.attention.flex_attention import create_mask

    anchors = torch.arange(0, 300, 3).expand(2, -1)
    seen = visibility(anchors, 4, 310)
    mask = block_mask(seen)
    assert torch.equal(create_mask(mask.mask_mod, 2, None, *seen.shape[1:], device="cpu")[:, 0], seen)
    assert mask.sparsity() > 0  # blocks of 128 × 128 that are skipped


@pytest.mark.filterwarnings("ignore:flex_attention called")
@pytest.mark.parametrize("kind", ["llama", "gemma3", "mistral", "qwen2"])
@pytest.mark.parametrize("packed", [False, True])
def test_forward_equals_that_of_the_dense_mask(kind: str, packed: bool) -> None:
    model = tiny_model(kind, masks=4, mask_attention="bidirectional" if packed else "causal")
    starts = torch.tensor([[0] * 15 + [15] * 25, [0] * 18 + [18] * 22]) if packed else None

    def latents() -> tuple[torch.Tensor, torch.Tensor]:
        return mask_pass(model, ANCHORS, regular, starts=starts), one_pass(model, IDS, ANCHORS, starts=starts)[1]

    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        regular = regular_pass(model, IDS, starts)
        expected = latents()
        with attending(model.base, "flex"):
            found = latents()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert model.base.text_config._attn_implementation == "sdpa"


def test_flex_is_refused_where_it_can_not_train() -> None:
    with pytest.raises(ForetellError, match="on GPUs only, and this base is on cpu; leave out --attention"):
        Stepper(tiny_model(), TrainConfig(attention="flex"))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "gemma3", "mistral"])
def test_gradients_equal_those_of_the_dense_mask(kind: str) -> None:
    model = tiny_model(kind, masks=4).to("cuda")
    ids, anchors = IDS.to("cuda"), ANCHORS.to("cuda")

    def gradients(model: MTPModel, attention: str) -> dict[str, torch.Tensor]:
        regular = regular_pass(model, ids)
        with attending(model.base, attention):
            z = mask_pass(model, anchors, regular)
        z.float().square().mean().backward()
        found = {name: p.grad.clone() for name, p in model.own_parameters().items() if p.grad is not None}
        model.zero_grad()
        return found

    expected, found = gradients(model, "sdpa"), gradients(model, "flex")
    assert len(found) == len(expected) > 10
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
