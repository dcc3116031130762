"""Two passes against a slow interleaved reference written out here: same losses and gradients (method.md section 1)."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    MistralConfig,
)

from foretell.base import Base
from foretell.config import MTPConfig, TrainConfig
from foretell.errors import ForetellError
from foretell.gated_lora import adapted_linears
from foretell.model import MTPModel
from foretell.training.batches import Batch
from foretell.training.losses import Totals, mtp_losses, targets
from foretell.training.step import Stepper, make_plan
from foretell.training.two_pass import (
    anchor_groups,
    blocks_together,
    groups_needed,
    mask_pass,
    one_pass,
    regular_pass,
)

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 53, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
WINDOW, K, RANK, ALPHA = 4, 3, 4, 8.0
BASES = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=WINDOW),
    "gemma2": Gemma2Config(**SIZES, sliding_window=WINDOW, query_pre_attn_scalar=8),
    "gemma3": Gemma3TextConfig(
        **SIZES, sliding_window=WINDOW, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"]
    ),
}


def tiny_model(kind: str = "llama", **settings: object) -> MTPModel:
    torch.manual_seed(0)
    base = Base(AutoModelForCausalLM.from_config(BASES[kind]).float())
    config = MTPConfig(**{"masks": K, "rank": RANK, "alpha": ALPHA, **settings})
    model = MTPModel(base, config, check=False)
    for parameter in model.own_parameters().values():  # away from zero, so that every gradient is alive
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def interleaved_reference(model: MTPModel, ids: list[int], anchors: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """[x0 x1 m1 m2 m3 x2 ...] in one forward, every rule spelled out; z of the tokens and of the masks."""
    rows: list[tuple[int, int]] = []  # (token index, 0) for a token, (anchor, j) for mask j
    for index in range(len(ids)):
        rows.append((index, 0))
        if index in anchors:
            rows += [(index, j) for j in range(1, K + 1)]
    full = torch.full((len(rows), len(rows)), torch.finfo(torch.float32).min)
    sliding = full.clone()
    for q, (a, i) in enumerate(rows):
        for c, (b, j) in enumerate(rows):
            seen = b <= a if j == 0 else (b == a and i >= j)
            if seen:
                full[q, c] = 0.0
                if (a + i) - (b + j) < WINDOW:
                    sliding[q, c] = 0.0
    full, sliding = full[None, None], sliding[None, None]
    kind = model.base.lm.config.model_type
    mask = {
        "llama": full, "mistral": sliding,
    }.get(kind, {"full_attention": full, "sliding_attention": sliding})  # fmt: skip
    is_mask = torch.tensor([j > 0 for _, j in rows])
    embedding = model.base.lm.get_input_embeddings()
    vectors = [embedding(torch.tensor(ids[a])) if j == 0 else model.mask_vectors[j - 1] for a, j in rows]

    handles = []
    for name, module in adapted_linears(model.base.blocks).items():
        low = model.adapter.adapters[name.replace(".", "/")]

        def add(module: torch.nn.Module, args: tuple, output: torch.Tensor, low: torch.nn.Module = low) -> torch.Tensor:
            change = (args[0] @ low.a.T @ low.b.T) * (ALPHA / RANK)
            return torch.where(is_mask[None, :, None], output + change, output)

        handles.append(module.register_forward_hook(add))
    z = model.base.lm.base_model(
        inputs_embeds=torch.stack(vectors)[None],
        position_ids=torch.tensor([[a + j for a, j in rows]]),
        attention_mask=mask,
        use_cache=False,
    ).last_hidden_state[0]
    for handle in handles:
        handle.remove()
    blocks = [[rows.index((a, j)) for j in range(1, K + 1)] for a in anchors]
    return z[~is_mask], z[torch.tensor(blocks)]


def reference_loss(model: MTPModel, ids: list[int], anchors: list[int]) -> torch.Tensor:
    """Base and sampler cross-entropy plus the latent consistency loss, one label at a time."""
    z, masks = interleaved_reference(model, ids, anchors)
    base, sampler, apart = [], [], {}
    for block, anchor in enumerate(anchors):
        for j in range(1, K + 1):
            if anchor + j + 1 >= len(ids):
                continue
            latent, label = masks[block, j - 1], torch.tensor([ids[anchor + j + 1]])
            base.append(torch.nn.functional.cross_entropy(model.base.unembed(latent)[None], label))
            guess = model.sample(torch.tensor([ids[anchor + j], ids[anchor + j - 1]]), latent)
            sampler.append(torch.nn.functional.cross_entropy(model.base.unembed(guess)[None], label))
            apart.setdefault(anchor + j, []).append((z[anchor + j].detach() - latent).square().mean())
    lcm = torch.stack([torch.stack(same).mean() for same in apart.values()]).mean()
    return torch.stack(base).mean() + torch.stack(sampler).mean() + lcm


def gradients(model: MTPModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.own_parameters().items() if p.grad is not None}
    model.zero_grad()
    return found


IDS = [3, 17, 5, 40, 9, 22, 51, 8, 30, 12, 7]
ANCHORS = [1, 4, 5, 8]
CONFIG = TrainConfig(lcm_normalised=False)


@pytest.mark.parametrize("kind", BASES)
def test_losses_and_gradients_equal_the_interleaved_form(kind: str) -> None:
    model = tiny_model(kind)
    ids, anchors = torch.tensor([IDS]), torch.tensor([ANCHORS])
    trained = torch.ones_like(ids, dtype=torch.bool)
    target = targets(ids, trained, anchors, torch.ones_like(anchors, dtype=torch.bool), K)
    regular = regular_pass(model, ids)
    losses = mtp_losses(model, mask_pass(model, anchors, regular), regular.z, target, trained, CONFIG)
    losses["loss"].backward()
    fast = gradients(model)

    model.adapter.remove()  # the reference brings its own gate
    expected = reference_loss(model, IDS, ANCHORS)
    expected.backward()
    slow = gradients(model)
    assert abs(losses["loss"].item() - expected.item()) <= 1e-5
    assert all(p.abs().max() > 1e-6 for p in slow.values()), "a parameter without gradient would prove nothing"
    for name in slow:
        torch.testing.assert_close(fast[name], slow[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", BASES)
def test_one_pass_equals_two(kind: str) -> None:
    model = tiny_model(kind)
    ids, anchors = torch.tensor([IDS, IDS[::-1]]), torch.tensor([ANCHORS, [0, 2, 3, 9]])
    regular = regular_pass(model, ids)
    z, z_masks = one_pass(model, ids, anchors)
    torch.testing.assert_close(z, regular.z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(z_masks, mask_pass(model, anchors, regular), atol=1e-5, rtol=1e-5)


def test_padding_changes_nothing() -> None:
    model = tiny_model()
    anchors = torch.tensor([[2, 5]])
    short = mask_pass(model, anchors, regular_pass(model, torch.tensor([IDS])))
    padded = mask_pass(model, anchors, regular_pass(model, torch.tensor([[*IDS, 0, 0, 0, 0]])))
    torch.testing.assert_close(short[:, :, :], padded, atol=1e-5, rtol=1e-5)


def test_the_frozen_cache_survives_a_second_backward() -> None:
    model = tiny_model()
    regular = regular_pass(model, torch.tensor([IDS]))
    for _ in range(2):
        mask_pass(model, torch.tensor([ANCHORS]), regular).square().mean().backward()
        found = gradients(model)
    again = regular_pass(model, torch.tensor([IDS]))
    mask_pass(model, torch.tensor([ANCHORS]), again).square().mean().backward()
    fresh = gradients(model)
    for name, gradient in fresh.items():
        assert torch.equal(gradient, found[name]), name


@pytest.mark.parametrize("together", [1, 3, 4])
def test_spreading_blocks_over_rows_changes_nothing(together: int) -> None:
    model = tiny_model("mistral")
    ids, anchors = torch.tensor([IDS, IDS[::-1]]), torch.tensor([ANCHORS, [0, 2, 3, 9]])
    regular = regular_pass(model, ids)
    _, expected = one_pass(model, ids, anchors)
    torch.testing.assert_close(mask_pass(model, anchors, regular, together), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo"])
def test_bases_with_tables_of_positions_or_of_past_columns(kind: str) -> None:
    """Masks past the last position must not be looked up; GPT-Neo's attention has a table of N x N columns as well."""
    config = {
        "gpt2": GPT2Config(vocab_size=53, n_embd=32, n_layer=2, n_head=4, n_positions=len(IDS)),
        "gpt_neo": GPTNeoConfig(
            vocab_size=53, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global"], 2]],
            max_position_embeddings=len(IDS) + 2 * K,
        ),
    }[kind]  # fmt: skip
    torch.manual_seed(0)
    base = Base(AutoModelForCausalLM.from_config(config).float())
    model = MTPModel(base, MTPConfig(masks=K, rank=RANK, alpha=ALPHA), check=False)
    ids = torch.tensor([IDS])
    regular = regular_pass(model, ids)
    blocks = mask_pass(model, torch.tensor([[*ANCHORS, 9]]), regular)
    for block, anchor in zip(blocks[0], [*ANCHORS, 9], strict=True):
        # A mask block alone after a prefix, its adapter still at zero: the base on the prefix and the mask vectors.
        inside = min(K, len(IDS) - 1 - anchor)
        vectors = torch.cat([base.embed(ids[0, : anchor + 1]), model.mask_vectors[:inside]])
        expected = base.latents(vectors[None])[0, anchor + 1 :]
        torch.testing.assert_close(block[:inside], expected, atol=1e-5, rtol=1e-5)
    if kind == "gpt_neo":
        with pytest.raises(ForetellError, match=f"give --seq-len {len(IDS) + K}"):
            blocks_together(model, len(IDS) + 2 * K - 1)


def two_rows() -> Batch:
    ids = torch.tensor([IDS, IDS[::-1]])
    everything = torch.ones_like(ids, dtype=torch.bool)
    valid = torch.tensor([[True] * 4, [False, True, True, True]])
    return Batch(ids, everything, everything, torch.tensor([ANCHORS, [0, 0, 3, 8]]), valid)


@pytest.mark.parametrize("groups", [2, 3, 4, 6])
@pytest.mark.parametrize("settings", [{"offset_weights": "acceptance"}, {"base_objective": "kl", "masks_warmup": 9}])
def test_groups_of_blocks_add_up_to_all_together(groups: int, settings: dict[str, object]) -> None:
    """Masks of different groups share positions, so neither means nor counts may be a group's own; 6: two are empty."""
    model, batch, weights = tiny_model(), two_rows(), torch.tensor([1.0, 0.5, 0.2])
    config = TrainConfig(lcm_weight=2.0, **settings)  # type: ignore[arg-type]
    stepper, plan = Stepper(model, config), make_plan(model, batch, config, 5)
    totals = Totals.of(plan.target, batch.trained, weights)
    expected, whole = stepper.gradients(batch, plan, weights, totals, 1)
    slow = gradients(model)
    found, parts = stepper.gradients(batch, plan, weights, totals, groups)
    fast = gradients(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(parts.z_masks, whole.z_masks, atol=1e-5, rtol=1e-5)
    for name, gradient in slow.items():
        assert gradient.abs().max() > 1e-6, name
        torch.testing.assert_close(fast[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_activations_of_one_group_are_all_that_is_held() -> None:
    model, batch = tiny_model(), two_rows()
    stepper, plan, weights = Stepper(model, TrainConfig()), make_plan(model, batch), torch.ones(K)
    totals, held, most = Totals.of(plan.target, batch.trained, weights), 0, 0

    class Kept:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal held, most
            self.tensor = tensor
            held += tensor.numel()
            most = max(most, held)

        def __del__(self) -> None:
            nonlocal held
            held -= self.tensor.numel()

    peaks = {}
    for groups in (1, 4):
        most = 0
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            stepper.gradients(batch, plan, weights, totals, groups)
        assert held == 0
        peaks[groups] = most
    assert peaks[4] < 0.6 * peaks[1], "parameters and the past are saved by every group"


def test_how_blocks_are_grouped() -> None:
    assert anchor_groups(7, 3) == [slice(0, 2), slice(2, 4), slice(4, 7)]
    assert [which.stop - which.start for which in anchor_groups(2, 3)] == [0, 1, 1]
    model = tiny_model()
    anchors = torch.zeros(2, 200, dtype=torch.long)
    assert groups_needed(model, anchors) == -(-200 // (256 // (2 * K)))
    assert groups_needed(model, anchors, masks_at_once=64) == -(-200 // (64 // (2 * K)))
