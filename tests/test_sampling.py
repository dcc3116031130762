"""Sampling: the law of the text is the base's own, and the text itself does not depend on the strategy."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from foretell.config import DecodeConfig
from foretell.decoding import loop
from foretell.decoding.generate import MTPForCausalLM
from foretell.decoding.pick import Picker

from .models import random_prompt, tiny_model
from .test_lossless import STRATEGIES, fitted

SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_same_seed_same_text_whatever_the_strategy(settings: dict[str, float]) -> None:
    model, known = fitted("llama")
    for prompt in (known, random_prompt(9)):
        for seed in (0, 1):
            texts = {
                tuple(
                    model.generate(
                        input_ids=prompt, max_new_tokens=40, strategy=strategy, drafts=drafts, seed=seed, **settings
                    ).token_ids
                )
                for strategy, drafts in itertools.product(STRATEGIES, ("best", "drawn"))
            }
            assert len(texts) == 1


def test_seeds_and_sequences_differ_and_batches_agree() -> None:
    model = tiny_model()
    ids = random_prompt(9)[0].tolist()
    batch = model.generate_batch([ids, ids, ids[:4]], max_new_tokens=30, temperature=1.0)
    assert batch[0].token_ids != batch[1].token_ids
    assert batch[0].token_ids == model.generate(input_ids=ids, max_new_tokens=30, temperature=1.0).token_ids
    assert batch[0].token_ids != model.generate(input_ids=ids, max_new_tokens=30, temperature=1.0, seed=5).token_ids


def small_vocabulary(drafts: str) -> MTPForCausalLM:
    """A random model, spiced so that its law is far from uniform but no token is certain."""
    model = tiny_model(masks=2)
    torch.manual_seed(3)
    model.base.lm.lm_head.weight.data.mul_(0.25)
    if drafts == "adversarial":  # never what the base likes best
        model.mask_vectors.data.mul_(-5)
    return model


def law_of_two(model: MTPForCausalLM, prompt: Tensor, temperature: float, allowed: int) -> Tensor:
    """(allowed, allowed): exact joint law of the next two tokens, all but the first `allowed` tokens forbidden."""

    def law(ids: Tensor) -> Tensor:
        with torch.no_grad():
            logits = model.base.lm(ids, attention_mask=torch.ones_like(ids)).logits[:, -1, :allowed]
        return torch.softmax(logits.double() / temperature, -1)

    first = law(prompt)[0]
    longer = torch.cat([prompt.expand(allowed, -1), torch.arange(allowed)[:, None]], dim=1)
    return first[:, None] * law(longer)


class Only(LogitsProcessor):
    """Forbids all but the first n tokens."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(torch.arange(scores.shape[-1]) >= self.n, -torch.inf)


def chi_square_p(counts: Tensor, law: Tensor) -> float:
    """Upper tail of the chi-square of counts against a law, by the Wilson-Hilferty approximation."""
    expected = law.flatten() * counts.sum()
    statistic = float(((counts.flatten() - expected) ** 2 / expected).sum())
    degrees = expected.numel() - 1
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    return 0.5 * math.erfc(z / math.sqrt(2))


def draw_pairs(model: MTPForCausalLM, prompt: Tensor, draws: int, temperature: float, drafts: str) -> Tensor:
    allowed = 5
    counts = torch.zeros(allowed, allowed, dtype=torch.double)
    for start in range(0, draws, 500):
        out = model.generate_batch(
            [prompt[0].tolist()] * 500,
            max_new_tokens=2,
            temperature=temperature,
            seed=start,
            drafts=drafts,
            logits_processor=LogitsProcessorList([Only(allowed)]),
        )
        for row in out:
            counts[row.token_ids[0], row.token_ids[1]] += 1
    return counts


@pytest.mark.parametrize(("temperature", "drafts"), [(1.0, "best"), (0.6, "drawn")])
def test_joint_law_of_two_tokens(temperature: float, drafts: str) -> None:
    model, prompt = small_vocabulary(drafts), random_prompt(6)
    counts = draw_pairs(model, prompt, 4000, temperature, drafts)
    assert chi_square_p(counts, law_of_two(model, prompt, temperature, 5)) > 0.001


def test_a_wrong_acceptance_rule_fails_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """Holding a draft that is merely among the two likeliest tokens must be found out."""
    model, prompt = small_vocabulary("best"), random_prompt(6)
    original = loop.pick_choices

    def lenient(picker: Picker, logits: Tensor, running: list[loop.Running], drafts: Tensor) -> Tensor:
        choices = original(picker, logits, running, drafts)
        choices[:, 0] = torch.where(choices[:, 0] == 1, logits[:, 0, :5].argmax(-1), choices[:, 0])
        return choices

    monkeypatch.setattr(loop, "pick_choices", lenient)
    counts = draw_pairs(model, prompt, 4000, 1.0, "best")
    assert chi_square_p(counts, law_of_two(model, prompt, 1.0, 5)) < 1e-6


@pytest.mark.parametrize("settings", SETTINGS)
def test_picker_draws_from_the_warped_distribution(settings: dict[str, float]) -> None:
    """One step, many places: frequencies against transformers' own warpers."""
    torch.manual_seed(0)
    logits = torch.randn(1, 12) * 2
    config = DecodeConfig(**settings)
    picker = Picker(config)
    text = torch.tensor([3, 5])
    places = list(range(20_000))
    drawn = picker.pick(logits.expand(len(places), -1), [0] * len(places), places, [text] * len(places))
    scores = picker.warpers(None, picker.processors(text[None], logits.clone()))
    law = torch.softmax(scores.double(), -1)[0]
    allowed = law > 0
    counts = torch.bincount(drawn, minlength=12).double()
    assert counts[~allowed].sum() == 0
    assert chi_square_p(counts[allowed], law[allowed]) > 0.001


def test_repetition_penalty_in_greedy_decoding_equals_generate() -> None:
    model = tiny_model()
    prompt = random_prompt(9)
    out = model.base.lm.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, repetition_penalty=1.3
    )
    for strategy in STRATEGIES:
        ours = model.generate(input_ids=prompt, max_new_tokens=40, strategy=strategy, repetition_penalty=1.3)
        assert ours.token_ids == out[0, 9:].tolist()


def test_drawn_drafts_are_accepted_more_often_than_independent_ones_would_be() -> None:
    model, known = fitted("llama")
    best, drawn = (
        model.generate(input_ids=known, max_new_tokens=150, temperature=1.0, drafts=drafts).acceptance_rate
        for drafts in ("best", "drawn")
    )
    assert best > 1.2 and drawn > 1.2
