"""Checkpoints of a running training: everything needed to go on as if it had never stopped, without pickles.

A directory `checkpoint` with our weights (fp32), the optimiser's tensors and state.json. A new one is written beside
and then takes its place, so that a kill at any moment leaves a whole one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foretell.checkpoint import WEIGHTS_FILE, load_weights, read_safetensors, write_safetensors, write_text
from foretell.config import MTPConfig, TrainConfig
from foretell.errors import ForetellError
from foretell.model import MTPModel

DIRECTORY, OPTIMIZER_FILE, STATE_FILE = "checkpoint", "optimizer.safetensors", "state.json"
# These may differ when a training goes on: they change when it ends and what is written, not what a step does.
# How a step's sequences are shared out among processes and micro-batches is free too, as long as there are as many.
FREE_SETTINGS = (
    "steps", "checkpoint_every", "log_every", "evaluate_every", "batch_size", "accumulation", "masks_at_once",
    "attention", "shard_base", "keep_best", "tracker",
)  # fmt: skip

SEQUENCES = "sequences per step (batch_size × accumulation × processes)"

# Settings that trainings of earlier versions did not name, and what they did.
BEFORE = {
    "sampler_rank": MTPConfig().sampler_rank,  # of a head that they did not have
    "sampler_tokens": 1,
    "mask_attention": "causal",
    "base_objective": "labels",
    "sampler_objective": "labels",
    "offset_weights": "uniform",
    "offset_decay": TrainConfig().offset_decay,  # without effect
    "anchor_choice": "random",
    "masks_warmup": 0,
    "packing": False,
    "quantise": "none",
}


def settings(model: MTPModel, config: TrainConfig, data: str, sequences: int) -> dict[str, Any]:
    """What must be the same for a training to go on; `data` fingerprints the token ids, `sequences` are per step."""
    fixed = {name: value for name, value in config.to_dict().items() if name not in FREE_SETTINGS}
    return {**model.config.to_dict(), **fixed, "base": model.base.fingerprint(), "data": data, SEQUENCES: sequences}


def save_state(
    output: Path,
    model: MTPModel,
    optimizer: torch.optim.Optimizer,
    step: int,
    fixed: dict[str, Any],
    seconds: float,
    metrics: dict[str, Any],
    held: list[float],
    interval: dict[str, Any],
) -> None:
    """Writes output/checkpoint after `step` steps and `seconds` of training; held as `Held.state` gives it, interval as
    `Interval.state`."""
    new, old, final = (output / (DIRECTORY + suffix) for suffix in (".new", ".old", ""))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        new.mkdir(parents=True)
    except OSError as error:
        raise ForetellError(f"{new} can't be made ({error.strerror}); give another output directory") from error
    own = model.own_parameters()
    write_safetensors({name: _portable(p) for name, p in own.items()}, new / WEIGHTS_FILE)
    write_safetensors(_optimizer_tensors(optimizer, own), new / OPTIMIZER_FILE)
    state = {
        "step": step,
        "seconds": seconds,
        "metrics": metrics,
        "held": held,
        "interval": interval,
        "settings": fixed,
    }
    write_text(json.dumps(state, indent=2) + "\n", new / STATE_FILE)
    if final.exists():
        os.replace(final, old)
    os.replace(new, final)
    shutil.rmtree(old, ignore_errors=True)


def find_state(output: Path) -> dict[str, Any] | None:
    """state.json of the checkpoint in `output`, or None. Completes a swap that a kill cut in two."""
    new, old, final = (output / (DIRECTORY + suffix) for suffix in (".new", ".old", ""))
    if not final.exists() and old.exists():
        os.replace(new if (new / STATE_FILE).exists() else old, final)
    try:
        return dict(json.loads((final / STATE_FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ForetellError(f"{final / STATE_FILE} is damaged ({error}); train anew into another directory") from error


def restore(
    output: Path,
    state: Mapping[str, Any],
    model: MTPModel,
    optimizer: torch.optim.Optimizer,
    fixed: Mapping[str, Any],
) -> int:
    """Loads weights and optimiser; returns the step to go on from.

    Raises ForetellError naming the first setting that differs from the interrupted training's.
    """
    for name, value in fixed.items():
        before = state["settings"].get(name, BEFORE.get(name))
        if before != value:
            what = (
                "the base"
                if name == "base"
                else "the data"
                if name == "data"
                else "the held-out data"
                if name == "held_out"
                else f"{name} (was {before}, now {value})"
            )
            raise ForetellError(
                f"the training in {output} was made with another setting: {what}; give the same, or a new --output"
            )
    directory = output / DIRECTORY
    load_weights(model, directory / WEIGHTS_FILE)
    tensors = read_safetensors(directory / OPTIMIZER_FILE)
    for name, parameter in model.own_parameters().items():
        kept = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items() if key.rpartition(".")[0] == name}
        if kept:
            # The step counter stays on the CPU unless the optimiser is fused, which keeps it beside the weights.
            optimizer.state[parameter] = {key: tensor.to(parameter.device) for key, tensor in kept.items()}
    return int(state["step"])


def _optimizer_tensors(optimizer: torch.optim.Optimizer, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, parameter in own.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}.{key}"] = _portable(value)
    return found


def _portable(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()
