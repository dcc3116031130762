"""Rows of a step of several sequences, apart and together."""

import pytest
import torch

from foretell.layout import Layout, linear, plain, quadratic
from foretell.rows import Rows, aligned, surviving

STEPS = [
    [linear(0, 3)],
    [linear(1, 4)] * 3,
    [plain(2), linear(0, 2), quadratic(1, 3), plain()],
    [plain(), plain(4)],
]


@pytest.mark.parametrize("own", STEPS)
def test_together_are_all_regular_rows_then_all_masks(own: list[Layout]) -> None:
    rows = Rows(own)
    apart = torch.arange(float(rows.sequences * rows.width)).view(rows.sequences, -1, 1) + torch.tensor([0.0, 0.5])
    each = list(zip(apart, own, strict=True))
    regular = torch.cat([found[: layout.regular] for found, layout in each])
    masks = torch.cat([found[rows.regular : rows.regular + layout.masks] for found, layout in each])
    together = rows.together(apart)
    assert torch.equal(together[: rows.first], regular)
    assert torch.equal(together[rows.first :], masks)
    assert len(together) == rows.count == sum(layout.width for layout in own)
    for sequence, layout in enumerate(own):
        for found in (rows.apart(together), apart):
            assert torch.equal(found[sequence, : layout.regular], apart[sequence, : layout.regular])
        assert torch.equal(rows.of_regular(regular)[sequence, : layout.regular], apart[sequence, : layout.regular])


@pytest.mark.parametrize("own", STEPS)
def test_blocks_lie_where_the_filled_up_step_has_them(own: list[Layout]) -> None:
    rows, filled = Rows(own), aligned(own, 4)
    numbers = torch.arange(rows.sequences * rows.width).view(rows.sequences, -1)
    together = rows.together(numbers)
    for sequence, layout in enumerate(own):
        for after, _ in layout.blocks:
            block = rows.block(sequence, after)
            assert block is not None and block == filled[sequence].block_rows(after)
            read = rows.read(together, [sequence], [block])
            assert torch.equal(read, numbers[sequence : sequence + 1, block])
        assert rows.block(sequence, 7) is None


def test_a_shorter_block_is_filled_up_with_its_last_row() -> None:
    rows = torch.arange(12).view(2, 6)
    assert surviving(rows, [slice(1, 4), slice(2, 4)]).tolist() == [[1, 2, 3], [8, 9, 9]]
    assert surviving(rows, [slice(1, 3), slice(1, 3)]).tolist() == [[1, 2], [7, 8]]


def test_drafts_of_filler_are_none() -> None:
    rows = Rows([plain(3), linear(1, 2), plain()])
    assert rows.of_own(torch.full((3, 2), 5), -1).tolist() == [[5, 5], [5, -1], [-1, -1]]
    assert Rows([plain(3)]).of_own(torch.full((1, 2), 5), -1).tolist() == [[5, 5]]
