"""Small comparisons of decoding methods on random models, for tests."""

from __future__ import annotations

from typing import Any

from foretell.evaluation.bench import bench
from foretell.evaluation.report import Report

from .models import random_prompt, tiny_model

FIXED = ("linear", "quadratic")


def prompts(*lengths: int) -> list[Any]:
    return [random_prompt(n, seed=n)[0].tolist() for n in lengths]


def small(**settings: Any) -> Report:
    """A comparison of few methods on two sets."""
    usual = {"strategies": ["quadratic"], "masks": [3], "prompt_lookup": (), "max_new_tokens": 12, "rounds": 1}
    return bench(tiny_model(masks=3), {"one": prompts(5, 9), "two": prompts(4)}, **(usual | settings))
