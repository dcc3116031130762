"""On a GPU: every strategy gives generate()'s tokens there too."""

import pytest
import torch

from foretell.config import STRATEGIES

from .fitted import fitted
from .models import random_prompt, reference, tiny_model


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
def test_output_on_a_gpu_is_the_bases_own(name: str) -> None:
    models = [(tiny_model(name), random_prompt(9)), fitted(name)]
    for model, prompt in models:
        model.to("cuda")
        prompt = prompt[:, :12].to("cuda")
        expected = reference(model.base.lm, prompt, 40)
        for strategy in STRATEGIES:
            out = model.generate(input_ids=prompt, max_new_tokens=40, strategy=strategy)
            assert out.token_ids == expected, strategy
    assert torch.cuda.memory_allocated() > 0
