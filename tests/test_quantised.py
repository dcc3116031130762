"""Bases of 8 and 4 bits: trained and decoded with, and still bit-identical to themselves under the gate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import foretell
from foretell import quantised
from foretell.base import Base, load_base
from foretell.cli import main
from foretell.config import MTPConfig, TrainConfig
from foretell.errors import ForetellError
from foretell.model import MTPModel
from foretell.training.loop import train

from .models import random_prompt, reference
from .saved import save_base, save_model

pytest.importorskip("bitsandbytes")
KINDS = ("int8", "int4")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, and adapter with random weights for it."""
    root = tmp_path_factory.mktemp("quantised")
    save_model(root)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_the_gate_leaves_regular_rows_bit_identical(saved: Path, kind: str) -> None:
    """Rows of one forward whose masks and adapter differ, and the same rows after the adapter is taken off."""
    base = load_base(str(saved / "base"), quantise=kind)
    assert base.quantised == kind
    model = MTPModel(base, MTPConfig(masks=3, rank=4, alpha=8.0))
    embeddings = torch.cat([base.embed(random_prompt(7)), torch.zeros(1, 3, 32)], dim=1)
    found = []
    with torch.no_grad():
        for size in (0.0, 0.1, 0.5):
            for parameter in model.own_parameters().values():
                torch.nn.init.normal_(parameter, std=size)
            embeddings[:, 7:] = model.mask_vectors
            with model.adapter.open(7, 10):
                found.append(base.latents(embeddings)[:, :7])
        model.adapter.remove()
        found.append(base.latents(embeddings)[:, :7])
    for other in found[1:]:
        assert torch.equal(found[0], other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["linear", "quadratic"])
def test_output_is_the_quantised_bases_own(saved: Path, kind: str, strategy: str) -> None:
    model = foretell.load(saved / "adapter", quantise=kind)
    prompt = random_prompt(9)
    out = model.generate(input_ids=prompt, max_new_tokens=24, strategy=strategy, ignore_eos=True)
    assert out.token_ids == reference(model.base.lm, prompt, 24)


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_the_full_base_afterwards(saved: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "d.txt").write_text("\n<|endoftext|>\n".join(f"document number {n}" for n in range(24)))
    config = TrainConfig(steps=8, batch_size=4, seq_len=24, anchors=4, lr=1e-2, log_every=1, quantise=kind)
    lines: list[dict[str, float]] = []
    mtp = MTPConfig(masks=2, rank=4)
    train(str(saved / "base"), tmp_path / "d.txt", tmp_path / "out", mtp, config, device="cpu", on_step=lines.append)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    description = json.loads((tmp_path / "out" / "foretell.json").read_text())
    assert description["base_quantised"] == kind
    for quantise in ("none", *KINDS):
        out = foretell.load(tmp_path / "out", base=str(saved / "base"), quantise=quantise).generate(
            "document", max_new_tokens=4
        )
        assert out.new_tokens == 4


def test_another_base_is_refused_quantised_or_not(saved: Path, tmp_path: Path) -> None:
    other = str(save_base(tmp_path / "other", seed=5))
    with pytest.raises(ForetellError, match="their weights differ"):
        foretell.load(saved / "adapter", base=other, quantise="int8")
    path = saved / "adapter" / "foretell.json"
    whole = path.read_text()
    early = {k: v for k, v in json.loads(whole).items() if k != "base_unquantised_fingerprint"}
    path.write_text(json.dumps(early))
    try:
        with pytest.raises(ForetellError, match="load it once without quantise and save it again"):
            foretell.load(saved / "adapter", quantise="int8")
    finally:
        path.write_text(whole)
    base = load_base(str(saved / "base"))
    assert isinstance(base, Base)
    with pytest.raises(ForetellError, match="a base that is given stays as it is"):
        foretell.load(saved / "adapter", base=base, quantise="int4")


def test_the_command_line_and_a_missing_library(
    saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["generate", "--model", str(saved / "adapter"), "-p", "abc", "--max-new-tokens", "4", "--json"]
    assert main([*arguments, "--quantise", "int8"]) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] == 4
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    assert main([*arguments, "--quantise", "int4"]) == 2
    assert 'pip install "foretell[quantised]"' in capsys.readouterr().err
