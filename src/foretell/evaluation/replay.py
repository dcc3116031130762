"""A drafter for benchmarks that knows the plain continuation and spoils drafts as often as a profile says.

With it a model of random weights decodes as a trained one of that profile would: through the real loop, its masks and
sampler chain computed and paid for, only their tokens thrown away.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foretell.decoding.draft import Drafter
from foretell.errors import ForetellError
from foretell.evaluation.acceptance_profiles import check_profile

NO_INFORMATION = 0.5
SHARPNESS = 0.5  # of informative confidences: 0 tells nothing, 1 tells which drafts hold


class ReplayDrafter:
    """Runs `drafter`, then proposes tokens of the known continuations instead of its drafts.

    Draft j is the true token with the chance S_j / S_(j-1) of the profile, given that the drafts before it are true;
    else, and from then on, it is another token. What a draft becomes depends on the seed, the sequence and the place
    alone, so every strategy meets the same luck.

    Confidences are constant. With `informative` they are one of two levels per place, high or low, which is the very
    chance with which that draft holds; the profile stays the same on average.
    """

    def __init__(
        self,
        drafter: Drafter,
        continuations: Sequence[Sequence[int]],
        profile: Sequence[float],
        vocab_size: int,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        informative: bool = False,
    ) -> None:
        """continuations: the greedy new token ids of every prompt, in the order of the prompts.

        Raises ForetellError if there is none, one is empty, or the profile is none.
        """
        if not continuations or not all(continuations):
            raise ForetellError("a replay needs the continuation of every prompt, of at least one token each")
        self.drafter = drafter
        profile = check_profile(profile)
        self.masks = len(profile)
        self.lengths = [len(tokens) for tokens in continuations]
        # Tables for every sequence and place, on the device: a step then looks up without a transfer.
        truth = true_drafts(continuations, self.masks)  # (N, L, k)
        held, confidences = fates(profile, truth.shape, seed, informative)
        self.drafts = torch.where(held, truth, (truth + 1) % vocab_size).to(device)
        self.confidences = confidences.to(device)

    def __call__(
        self,
        latents: Tensor,
        before: Tensor,
        sequences: Sequence[int],
        places: Sequence[int],
        logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `Drafter`: latents (B, K, D), before (B, 2) -> drafts (B, K) int64, confidences (B, K) fp32.

        Raises ForetellError for more masks than the profile has chances and for a place past a continuation's end.
        """
        masks, keys = latents.shape[1], list(zip(sequences, places, strict=True))
        if masks > self.masks:
            raise ForetellError(f"the profile has {self.masks} chances, too few for blocks of {masks} masks")
        for sequence, place in keys:
            if place >= self.lengths[sequence]:
                raise ForetellError(
                    f"the continuation of prompt {sequence} ends before token {place}: nothing to replay"
                )
        drafts = torch.stack([self.drafts[key][:masks] for key in keys])
        confidences = torch.stack([self.confidences[key][:masks] for key in keys])
        self.drafter(latents, before, sequences, places, logits)
        return drafts, confidences


def true_drafts(continuations: Sequence[Sequence[int]], masks: int) -> Tensor:
    """(N, L, k) int64: token p + j of sequence n at [n, p, j]; 0 past its end."""
    longest = max(map(len, continuations))
    padded = torch.zeros(len(continuations), longest + masks, dtype=torch.long)
    for row, tokens in zip(padded, continuations, strict=True):
        row[: len(tokens)] = torch.tensor(list(tokens))
    return padded.unfold(1, masks, 1)[:, :longest]


def fates(profile: Sequence[float], shape: Sequence[int], seed: int, informative: bool) -> tuple[Tensor, Tensor]:
    """Which drafts (N, L, k) hold, bool and never after one that does not; and their confidences, fp32."""
    generator = torch.Generator().manual_seed(seed)
    before = torch.tensor([1.0, *profile[:-1]])
    chances = (torch.tensor(profile) / before.clamp(min=1e-12)).expand(*shape)  # (N, L, k)
    confidences = torch.full(tuple(shape), NO_INFORMATION)
    luck, level = torch.rand(2, *shape, generator=generator)
    if informative:
        # High with chance p. p · high + (1 - p) · low = p, so the average is the profile's.
        high, low = chances + (1 - chances) * SHARPNESS, chances * (1 - SHARPNESS)
        chances = confidences = torch.where(level < chances, high, low)
    return (luck < chances).cumprod(-1).bool(), confidences
