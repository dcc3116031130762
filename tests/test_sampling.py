"""Sampling: the law of the text is the base's own, and the text itself does not depend on the strategy."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from foretell.base import Base
from foretell.config import STRATEGIES, DecodeConfig, MTPConfig
from foretell.decoding import loop, pick
from foretell.decoding.draft import numbered
from foretell.decoding.generate import MTPForCausalLM
from foretell.decoding.pick import Picker, first_largest, log_waits

from .fitted import fitted
from .models import GQA, random_prompt, tiny_model

SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.2},
]


@pytest.fixture(scope="module")
def accepting() -> tuple[MTPForCausalLM, Tensor]:
    return fitted("llama")


@pytest.mark.parametrize("settings", SETTINGS)
def test_same_seed_same_text_whatever_the_strategy(
    accepting: tuple[MTPForCausalLM, Tensor], settings: dict[str, float]
) -> None:
    model, known = accepting
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


WORDS, NEW, BATCH = 6, 3, 2000
LENGTH = NEW + 1  # the last token of a text is never a draft, so one more than the law is asked of


@pytest.fixture(scope="module")
def small_vocabulary() -> MTPForCausalLM:
    """A random model of WORDS tokens whose law is far from uniform, with no token certain."""
    lm = AutoModelForCausalLM.from_config(LlamaConfig(**{**GQA, "vocab_size": WORDS, "num_hidden_layers": 2}))
    torch.manual_seed(3)
    for parameter in lm.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model = MTPForCausalLM(Base(lm), MTPConfig(masks=2, rank=2))
    model.for_inference()
    return model


def joint_law(model: MTPForCausalLM, prompt: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """(WORDS,) * NEW, fp64: the exact law of the next NEW tokens, from plain forwards."""
    texts, law = prompt, torch.ones(1, dtype=torch.double)
    for _ in range(NEW):
        with torch.no_grad():
            logits = model.base.lm(texts, attention_mask=torch.ones_like(texts)).logits[:, -1]
        each = torch.softmax(logits.double() / temperature, -1)
        likeliest = each.sort(descending=True)
        before = likeliest.values.cumsum(-1) - likeliest.values  # of the likelier ones
        each = each.masked_fill((before >= top_p).gather(-1, likeliest.indices.argsort()), 0)
        law = (law[:, None] * each / each.sum(-1, keepdim=True)).flatten()
        every = torch.arange(WORDS).repeat(len(texts))[:, None]
        texts = torch.cat([texts.repeat_interleave(WORDS, 0), every], dim=1)
    return law.view((WORDS,) * NEW)


def chi_square_p(counts: Tensor, law: Tensor) -> float:
    """Upper tail of the chi-square of counts against a law, by the Wilson-Hilferty approximation.

    Cells that should hold fewer than 5 are taken together; 0 if a cell holds what the law forbids.
    """
    counts, expected = counts.flatten().double(), law.flatten() * counts.sum()
    if counts[expected == 0].any():
        return 0.0
    rare = expected < 5
    counts, expected = (torch.cat([each[~rare], each[rare].sum()[None]]) for each in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = float(((counts - expected) ** 2 / expected).sum())
    degrees = expected.numel() - 1
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    return 0.5 * math.erfc(z / math.sqrt(2))


@dataclass(frozen=True)
class Scripted:
    """A drafter that reads its drafts off texts (BATCH, LENGTH), whatever the model says."""

    texts: Tensor

    def __call__(
        self,
        latents: Tensor,
        before: Tensor,
        sequences: Sequence[int],
        places: Sequence[int],
        logits: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        columns = torch.tensor(places)[:, None] + torch.arange(latents.shape[1])
        return self.texts[torch.tensor(sequences)[:, None], columns.clamp(max=LENGTH - 1)], None


def decode(
    model: MTPForCausalLM, prompt: Tensor, config: DecodeConfig, picker: Picker, drafter: Scripted | None = None
) -> tuple[Tensor, int]:
    """BATCH continuations (BATCH, LENGTH) of one prompt, and how many drafts were accepted."""
    texts: list[list[int]] = [[] for _ in range(BATCH)]
    accepted = 0
    for batch in loop.steps(model, [prompt[0]] * BATCH, config, picker, drafter=drafter):
        for step in batch:
            texts[step.sequence] += step.tokens
            accepted += step.accepted
    return torch.tensor(texts), accepted


def draw(
    model: MTPForCausalLM,
    prompt: Tensor,
    drafter: str,
    picker: type[Picker] = Picker,
    draws: int = 20_000,
    **settings: Any,
) -> tuple[Tensor, float]:
    """Counts (WORDS,) * NEW of so many texts, and accepted drafts per text.

    Drafters: own, the random adapter's, which is bad; oracle, always what the base will pick; adversary, never that.
    """
    counts, accepted = torch.zeros(WORDS**NEW), 0
    for seed in range(draws // BATCH):
        config = DecodeConfig(max_new_tokens=LENGTH, seed=seed, **settings)
        script = None
        if drafter != "own":
            plain, _ = decode(model, prompt, replace(config, strategy="autoregressive"), Picker(config))
            script = Scripted(plain if drafter == "oracle" else (plain + 1) % WORDS)
        texts, held = decode(model, prompt, config, picker(config), script)
        counts += torch.bincount((texts[:, :NEW] * WORDS ** torch.arange(NEW - 1, -1, -1)).sum(1), minlength=WORDS**NEW)
        accepted += held
    return counts.view((WORDS,) * NEW), accepted / draws


LAWS: list[tuple[str, dict[str, Any]]] = [
    ("own", {"temperature": 1.0}),
    ("own", {"temperature": 0.6, "drafts": "drawn", "strategy": "linear"}),
    ("oracle", {"temperature": 1.0, "top_p": 0.8}),
    ("adversary", {"temperature": 1.5, "top_p": 0.9, "strategy": "linear"}),
]


@pytest.mark.parametrize(("drafter", "settings"), LAWS)
def test_joint_law_of_three_tokens(small_vocabulary: MTPForCausalLM, drafter: str, settings: dict[str, Any]) -> None:
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    counts, accepted = draw(small_vocabulary, prompt, drafter, **{"strategy": "quadratic", **settings})
    law = joint_law(small_vocabulary, prompt, settings["temperature"], settings.get("top_p", 1.0))
    assert chi_square_p(counts, law) > 0.001
    # The first step has no draft at hand and the last token is never one: two of LENGTH can be.
    assert {"oracle": accepted == 2, "adversary": accepted == 0}.get(drafter, 0 < accepted < 2)


class WrongRule(Picker):
    """Looks at the drafts, which it finds in the texts before the later places, and holds more of them than it may."""

    @property
    def reads_text(self) -> bool:
        return True

    def pick(
        self, logits: Tensor, sequences: Sequence[int], places: Sequence[int], texts: Sequence[Tensor] | None = None
    ) -> Tensor:
        choices = super().pick(logits, sequences, places, texts)
        law = torch.softmax(self.scores(logits, texts), -1)
        for row, place in enumerate(places[1:]):
            if texts is not None and place == places[row] + 1 and sequences[row + 1] == sequences[row]:
                draft = texts[row + 1][-1]
                choices[row] = draft if self.holds(float(law[row, draft])) else choices[row]
        return choices

    def holds(self, probability: float) -> bool:
        raise NotImplementedError


class Plausible(WrongRule):
    """Holds whatever is likely enough, as lossy schemes do."""

    def holds(self, probability: float) -> bool:
        return probability > 0.2


class NoResidual(WrongRule):
    """Holds a draft with its probability, rightly, but a rejected one may be drawn again."""

    def holds(self, probability: float) -> bool:
        return float(torch.rand(())) < probability


@pytest.mark.parametrize("rule", [Plausible, NoResidual])
def test_a_wrong_acceptance_rule_fails_the_law(small_vocabulary: MTPForCausalLM, rule: type[Picker]) -> None:
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    torch.manual_seed(0)
    counts, _ = draw(small_vocabulary, prompt, "own", rule, 6000, temperature=1.0, strategy="quadratic")
    assert chi_square_p(counts, joint_law(small_vocabulary, prompt, 1.0)) < 1e-6


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
    assert chi_square_p(torch.bincount(drawn, minlength=12), law) > 0.001


def test_repetition_penalty_in_greedy_decoding_equals_generate() -> None:
    model = tiny_model()
    prompt = random_prompt(9)
    out = model.base.lm.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, repetition_penalty=1.3
    )
    for strategy in STRATEGIES:
        ours = model.generate(input_ids=prompt, max_new_tokens=40, strategy=strategy, repetition_penalty=1.3)
        assert ours.token_ids == out[0, 9:].tolist()


def test_drawn_drafts_are_accepted_more_often_than_independent_ones_would_be(
    accepting: tuple[MTPForCausalLM, Tensor],
) -> None:
    model, known = accepting
    best, drawn = (
        model.generate(input_ids=known, max_new_tokens=150, temperature=1.0, drafts=drafts).acceptance_rate
        for drafts in ("best", "drawn")
    )
    assert best > 1.2 and drawn > 1.2


def test_waits_are_exponential_and_a_row_depends_on_its_key_alone() -> None:
    waits = log_waits([5, 6, 5], 50_000, torch.device("cpu")).exp()
    assert torch.equal(waits[0], waits[2]) and not torch.equal(waits[0], waits[1])
    assert waits.dtype == torch.float32 and waits.isfinite().all() and (waits > 0).all()
    for own in waits[:2]:
        equal = -torch.log1p(-torch.arange(1, 50) / 50)  # ends of 50 equally likely classes
        counts = torch.bincount(torch.bucketize(own, equal), minlength=50)
        assert chi_square_p(counts, torch.full((50,), 0.02).double()) > 0.001


def test_short_waits_lie_on_no_grid_and_none_is_zero() -> None:
    """They decide: of 24 bits the shortest of so many would be multiples of 2^-24, and likely one of them 0."""
    rows = [log_waits(range(start, start + 50), 50_000, torch.device("cpu")).exp() for start in range(0, 400, 50)]
    shortest = torch.cat([row.flatten().topk(20, largest=False).values for row in rows]).double() * 2**24
    assert (shortest > 0).all() and shortest.min() < 3
    assert ((shortest - shortest.round()).abs() > 0.1).double().mean() > 0.6


@pytest.mark.parametrize("kept", [0, 40 * 4 * 5, 2**26])
def test_a_place_is_drawn_for_once_while_there_is_room(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For block after block of drafts and for the base; what is kept changes no draw."""
    vocab, drawn = 40, []

    def counted(keys: Sequence[int], *rest: Any) -> torch.Tensor:
        drawn.extend(keys)
        return log_waits(keys, *rest)

    monkeypatch.setattr(pick, "log_waits", counted)
    monkeypatch.setattr(pick, "KEPT_BYTES", kept)
    config = DecodeConfig(temperature=1.0, seed=1)
    picker, scores = Picker(config), torch.randn(4, vocab)
    for place in range(0, 40, 2):
        choose = picker.race([0], [place], 4, vocab)
        drafts = choose(scores, None, None).tolist()
        alone = [Picker(config).pick(scores[row, None], [0], [place + row]).item() for row in range(4)]
        assert drafts == alone == picker.pick(scores, [0] * 4, range(place, place + 4)).tolist()
        assert len(picker._waits) <= kept // (4 * vocab)
    own = len(drawn) - 20 * 4  # without those of the pickers that pick once
    assert own == (42 if kept else 20 * 8)


def test_a_certain_token_is_drawn_whatever_its_wait() -> None:
    picker = Picker(DecodeConfig(temperature=1.0, seed=1))
    scores = torch.full((1, 300), -torch.inf)
    scores[0, 77] = 3.0
    assert all(picker.pick(scores, [0], [place]).item() == 77 for place in range(300))


def test_of_equal_scores_the_first_is_taken_as_by_argmax() -> None:
    scores = torch.randint(0, 4, (40, 5000), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(first_largest(scores), scores.argmax(-1))


def test_the_race_of_drafts_is_the_one_that_the_base_will_run() -> None:
    """All places of a block at once, over all tokens or over a shortlist, as place by place."""
    picker = Picker(DecodeConfig(temperature=0.8, top_p=0.95, seed=3))
    vocab, masks, sequences, places = 40, 3, [5, 0], [7, 2]
    scores = 2 * torch.randn(2, masks, vocab, generator=torch.Generator().manual_seed(0))
    tokens = scores.topk(12, sorted=False).indices
    for shortlist in (None, tokens):
        everywhere = scores
        if shortlist is not None:
            everywhere = torch.full_like(scores, -torch.inf).scatter(2, shortlist, scores.gather(2, shortlist))
        rows = [picker.pick(everywhere[:, mask], sequences, [p + mask for p in places]) for mask in range(masks)]
        expected = torch.stack(rows, dim=1)
        choose = picker.race(sequences, places, masks, vocab)
        own = scores if shortlist is None else scores.gather(2, shortlist)
        for numbers in (None, torch.tensor([4, 1]), None):  # any of them, the same each time it is run
            of = None if shortlist is None else numbered(shortlist.flatten(0, 1), numbers)
            index = choose(numbered(own.flatten(0, 1), numbers), of, numbers)
            drawn = index if of is None else of.gather(1, index[:, None])[:, 0]
            assert torch.equal(drawn, numbered(expected.flatten(), numbers))
    assert len(set(expected.flatten().tolist())) > 2
