"""The planner's choice of layouts, and what it learns from the drafts made (docs/planner.md)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foretell.decoding.calibration import Experience
from foretell.decoding.lookup import TextLookup
from foretell.decoding.open_block import OpenBlock
from foretell.decoding.pausing import WOKEN_BY, Batch, Pause
from foretell.decoding.planner import Planner
from foretell.decoding.strategies import Running, within
from foretell.layout import Layout, plain

MARGIN = 1.15  # by which the text's own drafts must promise more than those of the masks: the better guess flatters
TIMED = 4  # of how many steps that nobody plans one is timed: they are alike, and to note what they take takes its time
# Steps in a pause or at rest at which nothing is asked, behind each at which it is: of one sequence, and of several.
QUIET, QUIET_TOGETHER = 7, 3
WATCHED = 4  # sequences of a batch that are watched while it rests: each of their tokens costs a microsecond


@dataclass
class Adaptive:
    """The planner's choice. Every draft made teaches it, also one never verified: the text tells in the end."""

    planner: Callable[[int], Planner]  # for a number of sequences: wider batches make wider steps dearer
    experience: Experience
    lookup: bool = True  # whether drafts also come from the text itself
    open: dict[int, list[OpenBlock]] = field(default_factory=dict)  # by sequence
    reach: dict[int, list[float]] = field(default_factory=dict)  # chances that the first 0, 1, ... drafts at hand hold
    # Drafts at hand that are the text's own, where they were planned for, and what masks made, if they did.
    taken: dict[int, tuple[OpenBlock, OpenBlock | None]] = field(default_factory=dict)
    verified: dict[int, int] = field(default_factory=dict)  # drafts in the last step, by sequence
    texts: dict[int, TextLookup] = field(default_factory=dict)
    pause: Pause | None = None  # None: it never pauses
    paused: bool = False
    rests: bool = False  # whether that is the planner's choice
    at_rest: int = 0  # steps
    quiet: int = 0  # of those to come, how many need nothing asked: their number is what a small model feels
    still: bool = False  # whether this is one of them
    habitual: bool = False  # whether it is one of the planner's habit
    followed: list[Layout] = field(default_factory=list)  # its layouts, if so
    blindly: int = 0  # steps of it
    blind: bool = False  # whether nobody has looked at the drafts at hand
    told: float = 0.0  # seconds that it took to note what the last planned step took
    trouble: float = 0.0  # seconds that planning took of this step
    listens: bool = False  # whether promising drafts of the text are looked for nevertheless
    planning: Planner | None = None  # who planned the last step
    made: float = 0.0  # drafts of the masks behind it, of a sequence on average
    urgency: dict[int, float] = field(default_factory=dict)  # of the sequences in the last step
    said: int = 0  # tokens of the last step
    gained: float = 0.0  # the same, weighted so
    sequences: int = 0  # in the last step
    batch: Batch | None = None  # if all texts began together and no others wait
    watched: int = 0  # sequences, in pauses
    foretold: int = 0  # times in a row that a watched one had said what the text foretold

    def layouts(self, running: Sequence[Running], refilled: bool = False) -> list[Layout]:
        self.still = self.quiet > 0
        if self.still:
            self.quiet -= 1
            return [plain()] * len(running)
        self.planning = planner = self.planner(len(running))
        if refilled:
            self.batch = None
        elif self.batch is not None:
            self.batch.step(self.sequences, self.gained / self.sequences, self.paused)
        elif self.pause is not None and not self.sequences and len(planner.prices.plain) == len(running):
            self.batch = Batch(planner.prices.plain.tolist())
        self.sequences, self.said, self.gained, self.urgency = len(running), 0, 0.0, {}
        self.habitual = planner.keeps_habit() or self.blind
        if self.habitual:
            self.paused = self.rests = False
            self.verified = {}
            if self.lookup and self.blindly % TIMED == 0 and self._foretold_run(running, 1 + QUIET) >= 2 * WOKEN_BY:
                planner.habit.end()
            self.followed = [within(planner.habit.layouts[row.drafts], row.remaining) for row in running]
            return self.followed
        begin = time.perf_counter()
        self.paused = self._pauses(running, planner)
        if self.paused:
            self.verified = {}
            return [plain()] * len(running)
        reach = [self.reach[row.sequence] if row.drafts else [1.0] for row in running]
        remaining, urgency = [row.remaining for row in running], None
        if len(running) > 1:
            urgency = planner.urgency(remaining, refilled)
            self.urgency = dict(zip((row.sequence for row in running), urgency, strict=True))
        layouts = planner.layouts(reach, remaining, urgency)
        most = max(layout.regular for layout in layouts)  # filler verifies, too, where there is any
        own = [layout.regular if planner.own_rows else most for layout in layouts]
        self.verified = {row.sequence: regular - 1 for row, regular in zip(running, own, strict=True)}
        self.trouble += time.perf_counter() - begin - planner.solved_in
        return [within(layout, left) for layout, left in zip(layouts, remaining, strict=True)]

    def decided(self, row: Running, tokens: Sequence[int]) -> None:
        self.said += len(tokens)
        self.gained += len(tokens) * self.urgency.get(row.sequence, 1.0)
        if self.habitual and row.remaining and self.planning is not None:
            self.planning.habit.gave(row.drafts, len(tokens), self.sequences)
        if blocks := self.open.get(row.sequence):
            self.open[row.sequence] = [block for block in blocks if block.follow(tokens)]
            self._count(row.sequence, blocks)
        if not row.remaining:  # others may take its place for hours
            self.quiet = 0
            self.experience.ended(row.stopped)
            self._learn_worth(row.place)
            for kept in (self.open, self.reach, self.texts, self.taken):
                kept.pop(row.sequence, None)

    def drafted(self, running: Sequence[Running], drafts: Tensor, confidences: Tensor | None) -> Tensor:
        self.made = drafts.shape[1] * sum(row.drafts > 0 for row in running) / len(running)
        self.blind = self.habitual and self.planning is not None and self.planning.habit.left > 0
        if self.still or self.blind:
            return drafts
        begin = time.perf_counter()
        if self.paused:
            if own := self._listen(running[0]) if self.listens else []:
                return drafts.new_tensor([own])
            self._be_quiet(len(running) == 1)
            return drafts
        made: list[list[float]] = [[] for _ in running]
        sure = made
        if confidences is not None and drafts.device.type == "cpu":
            made, sure = drafts.tolist(), confidences.tolist()
        elif confidences is not None:
            # One transfer for both; fp32 holds every token id below 2^24.
            made, sure = torch.stack([drafts.float(), confidences]).tolist()
        chosen = [self._choose(row, own, chances) for row, own, chances in zip(running, made, sure, strict=True)]
        self.trouble += time.perf_counter() - begin
        if not any(instead for _, instead in chosen):
            return drafts
        most = max(len(own) for own, _ in chosen)
        return torch.tensor([own + [0] * (most - len(own)) for own, _ in chosen], device=drafts.device)

    def took(self, layout: Layout, seconds: float | None, drafting: float = 0.0, width: float | None = None) -> None:
        if self.quiet or self.planning is None:
            return  # of steps at which nothing is asked the last one is timed
        trouble, self.trouble = self.trouble, 0.0
        if seconds is not None and not self.paused:
            self.planning.kept(self.habitual, seconds, self.said / self.sequences)
        if self.habitual:
            self.blindly += 1
            if self.blindly % TIMED == 1 and seconds is not None:
                self.planning.took(layout, seconds, self.made, drafting, habit=self.followed)
            return
        begin = time.perf_counter()
        if seconds is None:
            if self.pause is not None and not self.paused:
                self.pause.began()
            return
        if self.rests and not self.still:
            self.at_rest += 1
            if self.at_rest % TIMED:
                return
        if not self.paused:
            seconds += self.told
        sequences, share = self.planning.sequences, seconds / self.planning.prices.plain_seconds
        if self.pause is not None and self.paused:
            self.pause.rested(sequences, share)
            if self.pause.cold:
                return
        self.planning.took(layout, seconds, self.made, drafting, resting=self.paused, width=width)
        if self.pause is not None and not self.paused:
            worth = self.pause.worth(len(self.batch.plain)) if self.batch is not None else 1.0
            self.pause.worked(sequences, share, worth * self.gained / sequences, self.planning.gain)
        if not self.paused:
            self.told = time.perf_counter() - begin
            self.planning.habit.planned(trouble + self.told)

    def _count(self, sequence: int, blocks: Sequence[OpenBlock]) -> None:
        """What the last step shows of the worth of looking for drafts in the text."""
        for block in blocks:
            if block.counted and (block.closed or block.held >= block.counted):
                self.experience.looks.gained(min(block.held, block.counted), block.seconds)
                block.counted = 0
        if sequence in self.taken:
            found, made = self.taken.pop(sequence)
            verified = self.verified.get(sequence, 0)
            without = 0 if made is None else min(made.held, verified)
            self.experience.looks.gained(min(found.held, verified) - without)

    def _pauses(self, running: Sequence[Running], planner: Planner) -> bool:
        """Whether the next step is a plain one and nothing else: by the clock, or by what the planner expects."""
        if self.pause is None:
            return False
        paused = self.pause.paused()
        if self.pause.ended:
            planner.probe_soon()
        alone = len(running) == 1
        has_drafts = alone and running[0].drafts > 0
        self.rests = not (paused or has_drafts) and planner.rests(max(row.remaining for row in running))
        self.listens = self.rests and alone and self.lookup
        if self.rests or paused:
            if self.listens or not self._foretold(running):
                return True
            self.rests = False
            planner.wake()
        return False

    def _be_quiet(self, alone: bool) -> None:
        """In a pause or at rest: the next steps, if they neither look for drafts nor try masks."""
        if self.planning is None or self.pause is None:
            return
        most, looks = QUIET if alone else QUIET_TOGETHER, self.experience.looks
        if not self.rests:
            self.quiet = self.pause.pass_over(most)
        elif not self.listens:
            self.quiet = self.planning.rests_for(most)
        else:
            self.quiet = self.planning.rests_for(looks.idle(self._worth_of_token()))
            looks.pass_over(self.quiet)

    def _foretold(self, running: Sequence[Running]) -> bool:
        """Whether it is over because the text begins to foretell itself. One sequence a step is watched."""
        if not self.lookup or self.pause is None:
            return False
        woken = self.pause.foretold(self._foretold_run(running, 1 + QUIET if len(running) == 1 else 1))
        self.foretold *= not woken
        return woken

    def _foretold_run(self, running: Sequence[Running], most: int = 1) -> int:
        """How many times in a row a watched sequence has said what its text foretold; of each look up to `most`."""
        self.watched += 1
        row = running[self.watched % min(len(running), WATCHED)]
        index = self._text(row)
        before = index.run
        index.find(row.text, most)
        self.foretold = self.foretold + index.run - before if index.run > before else 0
        return self.foretold

    def _learn_worth(self, length: int) -> None:
        """A text of so many new tokens has ended."""
        if self.batch is None or self.pause is None:
            return
        self.batch.lengths.append(length)
        if self.batch.whole:
            self.batch.step(self.sequences, self.gained / self.sequences, self.paused)
            if (worth := self.batch.worth) is not None:
                self.pause.learn_worth(len(self.batch.plain), worth)

    def _listen(self, row: Running) -> list[int]:
        """At rest: drafts of the text itself, if verifying them is expected to gain and such drafts did; else they
        teach, that is all.

        At most steps there are none, and what is done here is most of what such a step takes beyond a plain one.
        """
        found = self._found(row)
        if found is None or self.planning is None:
            return []
        self.open.setdefault(row.sequence, []).append(found)
        found.counted, found.seconds = self.planning.verifies(found.reach)
        if not (found.counted and self.experience.looks.pays(self._worth_of_token())):
            return []
        self.reach[row.sequence], row.drafts = found.reach, len(found.drafts)
        return found.drafts

    def _text(self, row: Running) -> TextLookup:
        if row.sequence not in self.texts:
            self.texts[row.sequence] = TextLookup()
        return self.texts[row.sequence]

    def _choose(self, row: Running, made: Sequence[float], confidences: Sequence[float]) -> tuple[list[int], bool]:
        """The drafts of which more should hold: those of the masks, or those of the text itself (then True)."""
        best, promise = None, 1.0  # tokens
        blocks = []
        if row.drafts:
            logits = self.experience.made(confidences[: row.drafts])
            best = OpenBlock([int(token) for token in made[: row.drafts]], logits, self.experience.calibration)
            blocks, promise = [best], MARGIN * sum(best.reach)
        found, instead = self._found(row, promise), False
        if found is not None:
            blocks.append(found)
            if sum(found.reach) > promise:
                self.taken[row.sequence] = found, best
                best, instead = found, True
        self.open.setdefault(row.sequence, []).extend(blocks)
        self.reach[row.sequence], row.drafts = ([1.0], 0) if best is None else (best.reach, len(best.drafts))
        return [] if best is None else best.drafts, instead

    def _found(self, row: Running, promise: float = 1.0) -> OpenBlock | None:
        """The text's own drafts, where looking for them is due; None if there are none worth considering."""
        looks, block = self.experience.looks, None
        if self.lookup and looks.due(self._worth_of_token()):
            begin = time.perf_counter()
            block = self._find(row, promise)
            looks.looked(time.perf_counter() - begin)
        self.experience.found([1.0] if block is None else block.reach)
        return block

    def _find(self, row: Running, promise: float) -> OpenBlock | None:
        """None also if the first is too unlikely for more than so many tokens to come of them, or to pay for a row:
        mostly it is, and then the rest is spared."""
        found = self._text(row).find(row.text, min(self.experience.masks, row.remaining - 1))
        if not found.drafts:
            return None
        least, evidence = (promise - 1) / len(found.drafts), found.evidence()
        if self.planning is not None:
            least = max(least, self.planning.least_chance)
        if self.experience.lookup.chance(found.log_odds(0), 0, evidence) < least:
            return None
        logits = [found.log_odds(number) for number in range(len(found.drafts))]
        return OpenBlock(found.drafts, logits, self.experience.lookup, evidence)

    def _worth_of_token(self) -> float:
        """Seconds, of one sequence of those that share a step."""
        return math.inf if self.planning is None else self.planning.per_token / self.planning.sequences
