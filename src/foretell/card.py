"""The model card of a checkpoint: README.md, made from what foretell.json holds, so that it states no other facts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

# Facts of a training by the words that the card has for them; what is not known of a checkpoint is left out.
TRAINING = {
    "data": "data", "data_report": "read from it", "data_fingerprint": "sha256 of its token ids",
    "held_out_prompts": "held-out prompts", "trained_steps": "steps trained",
    "kept_step": "step kept, the best on held-out prompts", "seconds": "seconds", "hardware": "hardware",
    "date": "date",
}  # fmt: skip
VERSIONS = ("foretell", "torch", "transformers", "python")
HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")  # a path begins otherwise
CURVE = {"simulated_acceptance": "acceptance, training text", "held_out_simulated_acceptance": "acceptance, held out"}


def model_card(description: Mapping[str, Any], picture: str | None = None) -> str:
    """README.md of a checkpoint with this foretell.json; `picture` is the curves' file beside it, if there is one."""
    config, provenance = description["config"], description["provenance"]
    training = provenance.get("training", {})
    facts = [(words, provenance[key]) for key, words in TRAINING.items() if key in provenance]
    versions = [(name, provenance[name]) for name in VERSIONS if name in provenance]
    parts = [
        _head(description),
        _acceptance(provenance, training.get("evaluate_tokens")),
        _section("Training", table(("", ""), facts)) if facts else "",
        _curves(provenance.get("curve", []), picture),
        _section("Settings", table(("setting", "value"), [*config.items(), *training.items()])),
        _section("Versions", table(("", ""), versions)) if versions else "",
    ]
    return "\n".join(part for part in parts if part)


def _head(description: Mapping[str, Any]) -> str:
    config, base = description["config"], description["base"]
    named = f"base_model: {base}\n" if HUB_NAME.fullmatch(base) else ""  # the Hub refuses a card that names a path
    return f"""---
library_name: foretell
{named}tags: [multi-token-prediction, speculative-decoding]
---
# Several tokens per step for {base}

A foretell adapter (method: [arXiv 2507.11851](https://arxiv.org/abs/2507.11851)) with {config["masks"]} masks.
It makes the base say several tokens per step; the output is the base's own.

```python
import foretell

model = foretell.load("THIS_DIRECTORY_OR_REPOSITORY")
print(model.generate("...", max_new_tokens=128).text)
```

Or, where foretell is installed, from the base's own `generate()` in transformers:

```python
base.generate(**inputs, custom_generate="THIS_DIRECTORY_OR_REPOSITORY", trust_remote_code=True)
```

**The adapter must stay gated.** It acts on mask tokens only; merging it or loading it as an ordinary LoRA changes the
base's answers. It fits this base alone (fingerprint `{description["base_fingerprint"][:16]}`); foretell checks that at
load.
"""


def _acceptance(provenance: Mapping[str, Any], new_tokens: int | None) -> str:
    agreement = provenance.get("held_out_agreement")
    if not agreement:
        return ""
    columns = [f"held_out_{strategy}" for strategy in ("linear", "quadratic")]
    if any(name not in provenance for name in columns):  # written before there were these
        return _section(
            "Acceptance on held-out text",
            f"{provenance['held_out_simulated_acceptance']} tokens per step, simulated.\n\n"
            + table(("mask", "agreement with the base"), list(enumerate(agreement, 1))),
        )
    rows = list(zip(range(1, len(agreement) + 1), agreement, *(provenance[name] for name in columns), strict=True))
    prompts = provenance.get("held_out_prompts")
    return _section(
        "Acceptance on held-out prompts",
        f"Measured on the base's own greedy answers, of up to {new_tokens} tokens, to {prompts} prompts that were not "
        "trained on. Row j: how often the draft of mask j is the base's own choice, and the tokens per step that "
        "decoding with the first j masks takes over these answers (1 is plain decoding). Other text has other figures, "
        "and seconds are another matter: `foretell bench`.\n\n"
        + table(("mask", "agreement", "tokens per step, linear", "tokens per step, quadratic"), rows),
    )


def _curves(curve: Sequence[Mapping[str, Any]], picture: str | None) -> str:
    if not curve:
        return ""
    names = list(dict.fromkeys(name for row in curve for name in row))
    heads = [CURVE.get(name, name.replace("_", " ")) for name in names]
    rows = table(heads, [[row.get(name, "–") for name in names] for row in curve])
    return _section("Curves", (f"![curves of the training]({picture})\n\n" if picture else "") + rows)


def _section(title: str, content: str) -> str:
    return f"## {title}\n\n{content}\n"


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; a dash stands for None and for an empty list."""
    lines = [heads, ["---"] * len(heads), *([_cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value)) or None
    return "–" if value is None else str(value).replace("|", "\\|").replace("\n", " ")
