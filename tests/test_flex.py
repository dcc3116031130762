"""FlexAttention in training: what masks see by block masks, against the dense mask."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import flex_attention

from foretell.attention import block_mask
from foretell.config import TrainConfig
from foretell.errors import ForetellError
from foretell.training.batches import Batch
from foretell.training.flex import attending, check_attention
from foretell.training.losses import Totals
from foretell.training.step import Stepper, make_plan
from foretell.training.two_pass import mask_pass, one_pass, regular_pass, visibility

from .models import CONFIGS, tiny_model

IDS = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(0))
ANCHORS = torch.tensor([[0, 7, 20, 33], [2, 3, 19, 30]])
STARTS = torch.tensor([[0] * 15 + [15] * 25, [0] * 18 + [18] * 22])  # of packed documents


def test_a_block_mask_shows_what_the_dense_one_shows() -> None:
    anchors = torch.arange(0, 300, 3).expand(2, -1)
    seen = visibility(anchors, 4, 310)
    mask = block_mask(seen)
    assert torch.equal(flex_attention.create_mask(mask.mask_mod, 2, None, *seen.shape[1:], device="cpu")[:, 0], seen)
    assert mask.sparsity() > 0  # blocks of 128 × 128 that are skipped


@pytest.mark.filterwarnings("ignore:flex_attention called")
@pytest.mark.parametrize("kind", ["llama", "gemma3", "mistral", "qwen2"])
@pytest.mark.parametrize("packed", [False, True])
def test_forward_equals_that_of_the_dense_mask(kind: str, packed: bool) -> None:
    model = tiny_model(kind, masks=4, mask_attention="bidirectional" if packed else "causal")
    starts = STARTS if packed else None

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
    base = tiny_model().base
    on_gpu = SimpleNamespace(device=torch.device("cuda"), lm=base.lm, text_config=base.text_config)
    with pytest.raises(ForetellError, match="heads of 16 numbers or more, and those of this base have 8; leave out"):
        check_attention(on_gpu, "flex")
    unknowing = SimpleNamespace(device=torch.device("cuda"), lm=base, text_config=base.text_config)
    with pytest.raises(ForetellError, match="Base does not know flex attention"):
        check_attention(unknowing, "flex")


@pytest.mark.filterwarnings("ignore:flex_attention called")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "mistral", "gpt_neox"])
def test_gradients_of_a_step_equal_those_of_the_dense_mask(
    kind: str, packed: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU flex is traced as on a GPU, but computed by torch's dense reference, forward and backward.

    The reference can do both; only a check in the public function keeps a backward from running.
    """
    config = deepcopy(CONFIGS[kind])  # with heads of 16, as torch's kernels on a GPU want them
    if kind == "gpt_neox":  # the one of these with as many heads of keys as of queries
        config.num_attention_heads = 2
    else:
        config.head_dim = 16
    monkeypatch.setitem(CONFIGS, kind, config)
    if device == "cpu":
        monkeypatch.setattr(flex_attention, "_validate_device", lambda query, key, value: None)
    model = tiny_model(kind, masks=4, mask_attention="bidirectional" if packed else "causal").to(device)
    for parameter in model.own_parameters().values():
        parameter.requires_grad_()
    ones = torch.ones_like(IDS, dtype=torch.bool)
    batch = Batch(IDS, ones, ones, ANCHORS, ones[:, :4], STARTS if packed else None).to(model.base.device)
    plan, weights = make_plan(model, batch, TrainConfig()), torch.ones(4, device=device)
    totals = Totals.of(plan.target, batch.trained, weights)
    stepper = Stepper(model, TrainConfig())

    def gradients(attention: str) -> dict[str, torch.Tensor]:
        stepper.config = TrainConfig(attention=attention)  # below the check of a Stepper's own making
        model.zero_grad()
        with torch.compiler.set_stance(force_backend="aot_eager" if device == "cpu" else None):
            stepper.gradients(batch, plan, weights, totals, groups=2)
        return {name: parameter.grad.clone() for name, parameter in model.own_parameters().items()}

    expected, found = gradients("sdpa"), gradients("flex")
    assert any(not torch.equal(found[name], gradient) for name, gradient in expected.items()), "the same kernel twice"
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert scale > 1e-3, name  # not a comparison of rounding errors
        torch.testing.assert_close(
            found[name], gradient, atol=1e-4 * scale, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
