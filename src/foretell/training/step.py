"""One optimiser step: forward over a batch, losses, gradients, update (method.md sections 1 and 4)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from accelerate.utils import reduce
from torch import Tensor

from foretell.config import TrainConfig
from foretell.errors import ForetellError
from foretell.model import MTPModel
from foretell.training.batches import Batch
from foretell.training.losses import Targets, cross_entropy, mtp_losses, targets
from foretell.training.two_pass import mask_pass, one_pass, regular_pass

# Constant, so that a resumed training needs no state of it; steps whose gradients overflow are left out.
FP16_LOSS_SCALE = 1024.0
OVERFLOWS_IN_A_ROW = 20


class Latents(NamedTuple):
    """z at the masks (B, A, K, D), z at the regular tokens (B, N, D), and what the masks are to predict."""

    z_masks: Tensor
    z: Tensor
    target: Targets


def forward(model: MTPModel, batch: Batch) -> Latents:
    """Two passes with the gate; one pass for the ungated baseline, whose regular tokens depend on the adapter."""
    if model.adapter.gated:
        regular = regular_pass(model, batch.ids, batch.starts)
        z_masks, z = mask_pass(model, batch.anchors, regular, starts=batch.starts), regular.z
    else:
        z, z_masks = one_pass(model, batch.ids, batch.anchors, batch.starts)
    target = targets(batch.ids, batch.trained, batch.anchors, batch.anchor_valid, model.max_masks)
    return Latents(z_masks, z, target)


def all_losses(model: MTPModel, batch: Batch, latents: Latents, config: TrainConfig) -> dict[str, Tensor]:
    """The terms by name and their weighted sum `loss`; `ntp` is a term only of the ungated baseline."""
    losses = mtp_losses(model, latents.z_masks, latents.z, latents.target, batch.real, config)
    if not model.adapter.gated:
        after = batch.trained[:, 1:]
        rows, labels = latents.z[:, :-1][after], batch.ids[:, 1:][after]
        losses["ntp"] = cross_entropy(rows, labels, model.base.unembed, model.base.vocab_size)
        losses["loss"] = losses["loss"] + losses["ntp"]
    return losses


def make_optimizer(parameters: dict[str, Tensor], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; vectors (norms, biases) and the mask embeddings are not decayed."""
    decayed = [p for name, p in parameters.items() if p.dim() > 1 and name != "mask_vectors"]
    plain = [p for name, p in parameters.items() if p.dim() <= 1 or name == "mask_vectors"]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters.values())
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.lr, fused=fused)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Of the step after `step` steps: linear warm-up, then flat or a cosine down to zero at the last step."""
    warmup = min(config.warmup, config.steps // 5)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "flat":
        return config.lr
    done = (step - warmup) / max(1, config.steps - warmup)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * done))


class Stepper:
    """Holds the optimiser. `processes` > 1 averages gradients over them."""

    def __init__(self, model: MTPModel, config: TrainConfig, processes: int = 1) -> None:
        self.model, self.config, self.processes = model, config, processes
        self.parameters = {name: p for name, p in model.own_parameters().items() if p.requires_grad}
        self.optimizer = make_optimizer(self.parameters, config)
        self.dtype = getattr(torch, config.dtype)
        self._overflows = 0

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.model.base.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def step(self, batch: Batch, number: int) -> tuple[dict[str, Tensor], Latents]:
        """Step `number`, counted from 0: the losses and the latents, both without gradient.

        Raises ForetellError if the loss is no longer a number.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(number, self.config)
        with self.autocast():
            latents = forward(self.model, batch)
            losses = all_losses(self.model, batch, latents, self.config)
        scale = FP16_LOSS_SCALE if self.dtype == torch.float16 else 1.0
        (losses["loss"] * scale).backward()
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        for gradient in gradients:
            if self.processes > 1:
                gradient.copy_(reduce(gradient, reduction="mean"))
            if scale != 1.0:
                gradient.div_(scale)
        limit = self.config.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        if torch.isfinite(norm):
            self.optimizer.step()
            self._overflows = 0
        else:
            self._overflows += 1
            if self.dtype != torch.float16 or self._overflows >= OVERFLOWS_IN_A_ROW:
                raise ForetellError(
                    f"the loss is not a number any more at step {number + 1}; train with a lower --lr or in float32"
                )
        self.optimizer.zero_grad(set_to_none=True)
        detached = {name: value.detach() for name, value in losses.items()}
        return detached, Latents(latents.z_masks.detach(), latents.z.detach(), latents.target)
