"""What transformers runs for `base.generate(**inputs, custom_generate="THIS_REPOSITORY", trust_remote_code=True)`."""

from typing import Any

from foretell.decoding.repository import generate_with_adapter


def generate(model: Any, **arguments: Any) -> Any:
    """`model.generate(**arguments)` in several tokens per step, with the adapter of this repository.

    Takes `strategy` and `masks` besides. The model must be the base that the adapter was trained for.
    """
    return generate_with_adapter(model, **arguments)
