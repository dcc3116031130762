"""The replayed acceptance profile, the shapes it runs on, and the costs measured beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foretell.config import DecodeConfig
from foretell.decoding import loop
from foretell.decoding.draft import SamplerDrafter
from foretell.decoding.generate import MTPForCausalLM
from foretell.decoding.pick import Picker
from foretell.decoding.verify import decide
from foretell.errors import ForetellError
from foretell.evaluation.optimum import fixed_rate
from foretell.evaluation.overhead import held_bytes, memory, overhead
from foretell.evaluation.random_models import random_model
from foretell.evaluation.replay import ReplayDrafter, fates, true_drafts
from foretell.evaluation.report import Spread
from foretell.evaluation.step_cost import PLAIN, StepBench, alternate, strategy_layouts, timings
from tests.models import random_prompt, tiny_model

PROFILE = (0.8, 0.5, 0.2)
NEW = 60


class Counted:
    """A drafter that proposes nonsense and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self,
        latents: Tensor,
        before: Tensor,
        sequences: object,
        places: object,
        logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        self.calls += 1
        return torch.full(latents.shape[:2], 3), None


@pytest.fixture(scope="module")
def model() -> MTPForCausalLM:
    return tiny_model(masks=3)


def decode(
    model: MTPForCausalLM, prompts: list[Tensor], strategy: str, drafter: ReplayDrafter | None = None, masks: int = 3
) -> tuple[list[list[int]], list[int]]:
    """Tokens of every prompt, and the tokens of every step in order."""
    config = DecodeConfig(strategy=strategy, masks=masks, max_new_tokens=NEW)
    texts: list[list[int]] = [[] for _ in prompts]
    sizes = []
    for steps in loop.steps(model, [ids[0] for ids in prompts], config, Picker(config), drafter=drafter):
        for step in steps:
            texts[step.sequence] += step.tokens
            sizes.append(len(step.tokens))
    return texts, sizes


@pytest.mark.parametrize("strategy", ["linear", "quadratic"])
def test_replays_through_the_real_loop_with_ragged_batches(model: MTPForCausalLM, strategy: str) -> None:
    prompts = [random_prompt(5, 1), random_prompt(9, 2), random_prompt(3, 3)]
    expected, _ = decode(model, prompts, "autoregressive")
    assert len(set(expected[0])) > 10  # of a dull text a wrong place would not show
    own = Counted()
    drafter = ReplayDrafter(own, expected, PROFILE, model.base.vocab_size)
    texts, sizes = decode(model, prompts, strategy, drafter)
    assert texts == expected
    assert own.calls > 20
    rate = fixed_rate(strategy, 3, PROFILE, lambda regular, masks: 1.0)
    assert sum(sizes) / len(sizes) == pytest.approx(rate, rel=0.15)


def test_perfect_and_hopeless_profiles(model: MTPForCausalLM) -> None:
    prompts = [random_prompt(5, 1)]
    expected, _ = decode(model, prompts, "autoregressive")
    perfect = ReplayDrafter(Counted(), expected, (1.0, 1.0, 1.0), model.base.vocab_size)
    hopeless = ReplayDrafter(Counted(), expected, (0.0, 0.0, 0.0), model.base.vocab_size)
    assert set(decode(model, prompts, "quadratic", perfect)[1][1:-1]) == {4}
    assert set(decode(model, prompts, "quadratic", hopeless)[1]) == {1}


def test_real_sampler_chain_runs(model: MTPForCausalLM) -> None:
    prompts = [random_prompt(5, 1)]
    expected, _ = decode(model, prompts, "autoregressive")
    config = DecodeConfig(strategy="quadratic", masks=3)
    drafter = ReplayDrafter(SamplerDrafter(model, config, Picker(config)), expected, PROFILE, model.base.vocab_size)
    calls = 0

    def count(*args: object) -> None:
        nonlocal calls
        calls += 1

    handle = model.base.head.register_forward_hook(count)
    steps = len(decode(model, prompts, "quadratic", drafter)[1])
    handle.remove()
    assert calls > 3 * (steps - 2)  # the base's rows, and the chain's three reads of the unembedding a step


def test_the_same_luck_whatever_asks_and_another_with_another_seed() -> None:
    expected = [list(range(50)), list(range(20, 40))]
    one, two = (ReplayDrafter(Counted(), expected, PROFILE, 97) for _ in range(2))
    other = ReplayDrafter(Counted(), expected, PROFILE, 97, seed=1)
    latents, first = torch.zeros(2, 2, 4), torch.zeros(2, dtype=torch.long)
    drafts, confidences = one(latents, first, [1, 0], [4, 7])
    assert drafts.shape == confidences.shape == (2, 2)
    assert torch.equal(drafts[1:], two(latents[:1], first[:1], [0], [7])[0])
    assert not torch.equal(one.drafts, other.drafts)


def test_true_drafts_by_hand() -> None:
    table = true_drafts([[5, 6, 7], [8]], 2)
    assert table.tolist() == [[[5, 6], [6, 7], [7, 0]], [[8, 0], [0, 0], [0, 0]]]


@pytest.mark.parametrize("informative", [False, True])
def test_drafts_hold_as_often_as_the_profile_says(informative: bool) -> None:
    held, confidences = fates(PROFILE, (200, 200, 3), 0, informative)
    spread = 4 * 0.5 / 200  # four standard deviations of a share of 40,000
    for j, chance in enumerate(PROFILE):
        assert float(held[..., j].float().mean()) == pytest.approx(chance, abs=spread)
    if not informative:
        assert set(confidences.flatten().tolist()) == {0.5}
        return
    # Calibrated: of the drafts whose forerunners hold, those of each level hold as often as the level says.
    for j in range(3):
        reached = held[..., j - 1] if j else torch.ones_like(held[..., 0])
        levels = confidences[..., j][reached].unique()
        assert len(levels) == 2
        for level in levels.tolist():
            these = held[..., j][reached & (confidences[..., j] == level)].float()
            assert float(these.mean()) == pytest.approx(level, abs=2 / len(these) ** 0.5)


def test_replay_refuses_what_it_can_not_replay() -> None:
    latents, before = torch.zeros(1, 4, 4), torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(ForetellError, match="every prompt"):
        ReplayDrafter(Counted(), [[1], []], PROFILE, 97)
    with pytest.raises(ForetellError, match="never rise"):
        ReplayDrafter(Counted(), [[1]], (0.5, 0.7), 97)
    drafter = ReplayDrafter(Counted(), [[1, 2]], PROFILE, 97)
    with pytest.raises(ForetellError, match="3 chances"):
        drafter(latents, before, [0], [0])
    with pytest.raises(ForetellError, match="ends before token 2"):
        drafter(latents[:, :2], before, [0], [2])


def test_a_random_shape_decodes_finitely_and_its_adapter_acts() -> None:
    model = random_model("tiny", dtype="float32", device="cpu", masks=3, rank=4)
    ids = torch.arange(10)[None]
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert torch.isfinite(model.base.lm(input_ids=ids).logits).all()
    assert all(bool(p.any()) for p in model.own_parameters().values() if p.ndim == 2)
    (text,), _ = decode(model, [ids], "quadratic")
    assert text == [(9 + n) % model.base.vocab_size for n in range(1, NEW + 1)]  # the head is made to count


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ForetellError, match="135M"):
        random_model("70B")


def test_tasks_take_turns_and_the_first_round_is_not_counted() -> None:
    calls: list[str] = []
    tasks = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = alternate(tasks, torch.device("cpu"), rounds=2)
    assert calls == ["a", "b"] * 3
    assert [len(values) for values in seconds.values()] == [2, 2]
    with pytest.raises(ForetellError, match="rounds"):
        alternate(tasks, torch.device("cpu"), rounds=0)


def test_ratios_are_taken_within_a_round() -> None:
    found = timings({"wide": [2.0, 9.0, 4.0], PLAIN: [1.0, 3.0, 4.0]}, PLAIN)
    assert found["wide"].ratio == Spread(2.0, 1.0, 3.0)
    assert found["wide"].seconds == Spread(4.0, 2.0, 9.0)


@pytest.mark.parametrize("batch", [1, 3])
def test_every_layout_and_part_is_timed(model: MTPForCausalLM, batch: int) -> None:
    bench, layouts = StepBench(model, 20, batch), strategy_layouts(model.max_masks)
    assert {layout.width for layout in layouts.values()} == {1, 3, 4, 5, 7, 9, 16}
    assert set(bench.steps(layouts, 1)) == set(layouts)
    parts = bench.parts(layouts, 1)
    assert {"unembed 4", "verify 4", "chain 3, exact", "chain 1, 128", "rescore 2, 64", "masks quadratic 3"} <= set(
        parts
    )
    assert bench.cache.lengths == [20 - row for row in range(batch)]  # nothing timed lengthens the cache
    with pytest.raises(ForetellError, match="batch"):
        StepBench(model, 4, 5)


def test_verification_brings_counts_and_choices() -> None:
    drafts, choices = torch.tensor([[5, 6], [5, 7]]), torch.tensor([[5, 6, 1], [5, 6, 2]])
    assert decide(drafts, choices) == [[2, 5, 6, 1], [1, 5, 6, 2]]


def test_overhead_of_the_real_loop(model: MTPForCausalLM) -> None:
    found = overhead(model, masks=2, context=20, steps=12, rounds=1)
    assert found.steps >= 6
    assert 0 < found.outside_share < 1
    assert min(found.forward_ms, found.unembed_ms, found.draft_ms, found.rest_ms) > 0
    assert found.forward_ms < found.step_ms
    assert not model.base.decoder._forward_hooks  # the watch leaves nothing behind
    assert not model.base.head._forward_hooks
    if found.memory is not None:  # else a system that does not tell
        assert found.first_memory is not None and found.memory.cache == found.first_memory.cache
        assert found.to_dict()["memory"]["ratio"] == found.memory.ratio


def test_memory_counts_weights_and_cache(model: MTPForCausalLM) -> None:
    bench = StepBench(model, 20)
    found = memory(model, 20 + 4**2, [1000], held_bytes(model.base))
    assert found is not None
    assert found.cache == sum(layer.keys.nbytes + layer.values.nbytes for layer in bench.cache.layers)
    assert found.base == 4 * sum(p.numel() for p in model.base.lm.parameters())
    assert found.working == 1000
    assert memory(model, 36, [], 0) is None
