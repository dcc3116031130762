"""One optimiser step: forward over a batch, losses, gradients, update (method.md sections 1 and 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate.utils import gather, reduce
from torch import Tensor

from foretell.config import TrainConfig
from foretell.errors import ForetellError
from foretell.model import MTPModel
from foretell.training.anchors import by_entropy, check_choice, keep_by_entropy
from foretell.training.batches import Batch
from foretell.training.flex import attending, check_attention
from foretell.training.losses import Targets, Totals, mtp_losses, targets, variance
from foretell.training.objectives import cross_entropy
from foretell.training.offsets import Held, block_lengths, offset_weights
from foretell.training.two_pass import Regular, anchor_groups, groups_needed, mask_pass, one_pass, regular_pass

# Constant, so that a resumed training needs no state of it; steps whose gradients overflow are left out.
FP16_LOSS_SCALE = 1024.0
OVERFLOWS_IN_A_ROW = 20


class Latents(NamedTuple):
    """z at the masks (B, A, K, D), z at the regular tokens (B, N, D), and what the masks are to predict."""

    z_masks: Tensor
    z: Tensor
    target: Targets
    anchors: Tensor  # (B, A) int64 and which of them count (B, A) bool: the batch's, or the kept ones of them
    anchor_valid: Tensor


class Plan(NamedTuple):
    """Which masks of a batch are trained, known before any of them is computed."""

    anchors: Tensor  # (B, A) int64 and which of them count (B, A) bool
    valid: Tensor
    lengths: Tensor | None  # (B, A) int64: masks per block, None: all
    target: Targets
    regular: Regular | None  # of the first pass, where the choice of anchors needed it

    def of_blocks(self, which: slice) -> Plan:
        """For some of the blocks. Without any left: the first one, of which then no mask has a label."""
        if which.start == which.stop:
            first = self.of_blocks(slice(0, 1))
            return first._replace(target=first.target._replace(valid=torch.zeros_like(first.target.valid)))
        lengths = None if self.lengths is None else self.lengths[:, which]
        return Plan(self.anchors[:, which], self.valid[:, which], lengths, self.target.of_blocks(which), self.regular)


def make_plan(model: MTPModel, batch: Batch, config: TrainConfig | None = None, number: int = 0) -> Plan:
    """At step `number` of a training by `config` blocks may be short, anchors left out; without one all are whole."""
    anchors, valid, lengths, regular = batch.anchors, batch.anchor_valid, None, None
    if config is not None:
        if by_entropy(config.anchor_choice):
            regular = regular_pass(model, batch.ids, batch.starts)
            anchors, valid = keep_by_entropy(model, regular.z, anchors, valid, config.anchors, config.anchor_choice)
        lengths = block_lengths(anchors, batch.ids, number, model.max_masks, config, model.bidirectional)
    if model.bidirectional:
        inside = (batch.ends(anchors) - 1 - anchors).clamp(1, model.max_masks)
        lengths = inside if lengths is None else torch.minimum(inside, lengths)
    target = targets(batch.ids, batch.trained, anchors, valid, model.max_masks, lengths)
    return Plan(anchors, valid, lengths, target, regular)


def forward(model: MTPModel, batch: Batch, plan: Plan | None = None) -> Latents:
    """Two passes with the gate; one pass for the ungated baseline, whose regular tokens depend on the adapter.

    `plan` defaults to whole blocks after all anchors.
    """
    anchors, valid, lengths, target, regular = plan or make_plan(model, batch)
    if model.adapter.gated:
        regular = regular or regular_pass(model, batch.ids, batch.starts)
        z_masks = mask_pass(model, anchors, regular, lengths=lengths, starts=batch.starts)
        z = regular.z
    else:
        z, z_masks = one_pass(model, batch.ids, anchors, lengths, batch.starts)
    return Latents(z_masks, z, target, anchors, valid)


@torch.no_grad()
def latent_variance(model: MTPModel, batches: Sequence[Batch]) -> Tensor:
    """Of the base's own latents over some sequences, adapter off: () fp32.

    A constant of base and data, so that the consistency loss has one scale in every process and micro-batch.
    """
    model.adapter.remove()
    placed = [batch.to(model.base.device) for batch in batches]
    z = torch.cat([regular_pass(model, batch.ids, batch.starts).z[batch.real] for batch in placed])
    if not model.adapter.gated:
        model.adapter.attach()
    return variance(z)


def all_losses(
    model: MTPModel,
    batch: Batch,
    latents: Latents,
    config: TrainConfig,
    weights: Tensor | None = None,
    totals: Totals | None = None,
) -> dict[str, Tensor]:
    """The terms by name and their weighted sum `loss`; `ntp` is a term only of the ungated baseline.

    weights (K,) fp32 of the masks by offset, None: all alike; totals where this batch is a part of the step's.
    `held` is no loss but counts, see `mtp_losses`.
    """
    losses = mtp_losses(model, latents.z_masks, latents.z, latents.target, batch.real, config, weights, totals)
    if not model.adapter.gated:
        after = batch.trained[:, 1:]
        rows, labels = latents.z[:, :-1][after], batch.ids[:, 1:][after]
        total = totals and totals.regular
        losses["ntp"] = cross_entropy(rows, labels, model.base.unembed, model.base.vocab_size, total=total)
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
    """Holds the optimiser and the estimate of which drafts hold.

    With `processes` > 1 gradients are summed over them by hand: only our own parameters have any, so the wrapper of
    torch's DDP, which expects one forward of a whole module, has nothing to add. `variance` () is `latent_variance`'s.
    """

    def __init__(
        self, model: MTPModel, config: TrainConfig, processes: int = 1, variance: Tensor | None = None
    ) -> None:
        check_choice(config.anchor_choice, model.adapter.gated)
        check_attention(model.base, config.attention)
        self.held = Held(model.max_masks, model.base.device)
        self.model, self.config, self.processes, self.variance = model, config, processes, variance
        self.parameters = {name: p for name, p in model.own_parameters().items() if p.requires_grad}
        self.optimizer = make_optimizer(self.parameters, config)
        self.dtype = getattr(torch, config.dtype)
        self._overflows = 0

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.model.base.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def step(self, batches: Sequence[Batch], number: int) -> tuple[dict[str, Tensor], Latents]:
        """Step `number`, counted from 0, over this process's micro-batches.

        Returns the losses over all processes and the last micro-batch's latents, both without gradient.
        Raises ForetellError if the loss is no longer a number.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(number, self.config)
        weights = offset_weights(self.config, self.held.chances)
        with self.autocast():
            plans = [make_plan(self.model, batch, self.config, number) for batch in batches]
        totals = self._totals(batches, plans, weights)
        if len(plans) > 1:  # keys and values of one micro-batch at a time
            plans = [plan._replace(regular=None) for plan in plans]
        scale = FP16_LOSS_SCALE if self.dtype == torch.float16 else 1.0
        losses: dict[str, Tensor] = {}
        for batch, plan, groups in zip(batches, plans, self._groups(plans), strict=True):
            terms, latents = self.gradients(batch, plan, weights, totals, groups, scale)
            losses = {name: losses[name] + value if name in losses else value for name, value in terms.items()}
        if self.processes > 1:
            self._sum_gradients()
            losses = {name: reduce(value, reduction="sum") for name, value in losses.items()}
        if scale != 1.0:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad.div_(scale)
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
        if "held" in losses:
            self.held.update(losses.pop("held"))
        return losses, latents

    def gradients(
        self,
        batch: Batch,
        plan: Plan,
        weights: Tensor,
        totals: Totals,
        groups: int,
        scale: float = 1.0,
    ) -> tuple[dict[str, Tensor], Latents]:
        """Adds those of one micro-batch's loss times `scale`; returns its losses and latents, without gradient.

        With the gate nothing that blocks share has a gradient and the loss is a sum over them: they go forward and
        backward in `groups`, one after the other, and never more than one group's activations are held.
        """
        if not self.model.adapter.gated:
            groups = 1
        elif plan.regular is None:
            with self.autocast():
                plan = plan._replace(regular=regular_pass(self.model, batch.ids, batch.starts))
        losses: dict[str, Tensor] = {}
        parts = []
        for which in anchor_groups(plan.anchors.shape[1], groups):
            with self.autocast(), attending(self.model.base, self.config.attention):
                part = forward(self.model, batch, plan.of_blocks(which))
                terms = all_losses(self.model, batch, part, self.config, weights, totals)
            (terms["loss"] * scale).backward()
            for name, value in terms.items():
                losses[name] = losses[name] + value.detach() if name in losses else value.detach()
            parts.append(part.z_masks[:, : which.stop - which.start].detach())
        return losses, Latents(torch.cat(parts, dim=1), part.z.detach(), plan.target, plan.anchors, plan.valid)

    def _groups(self, plans: Sequence[Plan]) -> list[int]:
        """Groups of blocks per micro-batch; alike in all processes, which with a sharded base run the same forwards."""
        wanted = [groups_needed(self.model, plan.anchors, self.config.masks_at_once) for plan in plans]
        if self.processes == 1:
            return wanted
        all_wanted = gather(torch.tensor([wanted], device=self.model.base.device))
        return [int(count) for count in all_wanted.amax(0)]

    def _totals(self, batches: Sequence[Batch], plans: Sequence[Plan], weights: Tensor) -> Totals:
        """Over all micro-batches of all processes."""
        parts = [
            torch.stack(Totals.of(plan.target, batch.trained, weights)[:3])
            for batch, plan in zip(batches, plans, strict=True)
        ]
        found = torch.stack(parts).sum(0)
        if self.processes > 1:
            found = reduce(found, reduction="sum")
        masks, positions, regular = found.clamp_min(torch.finfo(torch.float32).tiny)
        return Totals(masks, positions, regular, self.variance)

    def _sum_gradients(self) -> None:
        """One exchange of all gradients: hundreds of small ones would each wait for the network."""
        parameters = list(self.parameters.values())
        flat = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
        summed = reduce(torch.cat(flat), reduction="sum")
        for parameter, gradient in zip(parameters, summed.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)
