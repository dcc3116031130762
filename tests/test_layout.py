"""Layouts against tables written by hand from method.md sections 1 and 5."""

import pytest
import torch

from foretell.errors import ForetellError
from foretell.layout import Block, Layout, linear, plain, quadratic, training


def see(drawing: str) -> torch.Tensor:
    return torch.tensor([[mark == "#" for mark in row] for row in drawing.split()])


def test_training_layout_k2_by_hand() -> None:
    # x0 x1 x2 with blocks after x0 and x1; rows: x0 x1 x2 | a1 a2 | b1 b2
    layout = training(3, [0, 1], 2)
    assert layout.position_offsets.tolist() == [0, 1, 2, 1, 2, 2, 3]
    assert layout.label_offsets.tolist() == [1, 2, 3, 2, 3, 3, 4]
    assert layout.mask_numbers.tolist() == [0, 1, 0, 1]
    expected = see(
        """
        #......
        ##.....
        ###....
        #..#...
        #..##..
        ##...#.
        ##...##
        """
    )
    assert torch.equal(layout.visible, expected)


def test_linear_layout_k2_by_hand() -> None:
    # x s1 s2 | m1 m2
    layout = linear(2, 2)
    assert layout.position_offsets.tolist() == [0, 1, 2, 3, 4]
    assert layout.label_offsets.tolist() == [1, 2, 3, 4, 5]
    assert torch.equal(layout.visible, torch.ones(5, 5, dtype=torch.bool).tril())


def test_quadratic_layout_k2_by_hand() -> None:
    # x s1 s2 | blocks after x, s1 and s2, in this order: 9 = (k+1)² tokens
    layout = quadratic(2, 2)
    assert layout.width == 9
    assert layout.position_offsets.tolist() == [0, 1, 2, 1, 2, 2, 3, 3, 4]
    assert layout.label_offsets.tolist() == [1, 2, 3, 2, 3, 3, 4, 4, 5]
    expected = see(
        """
        #........
        ##.......
        ###......
        #..#.....
        #..##....
        ##...#...
        ##...##..
        ###....#.
        ###....##
        """
    )
    assert torch.equal(layout.visible, expected)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_quadratic_width_and_block_rows(k: int) -> None:
    layout = quadratic(k, k)
    assert layout.width == (k + 1) ** 2
    for after in range(k + 1):
        rows = layout.block_rows(after)
        assert rows is not None
        assert layout.position_offsets[rows].tolist() == list(range(after + 1, after + k + 1))


def test_blocks_of_different_lengths() -> None:
    layout = Layout(2, (Block(0, 2), Block(1, 1)))
    assert layout.block_rows(1) == slice(4, 5)
    assert layout.position_offsets.tolist() == [0, 1, 1, 2, 2]


def test_a_row_without_a_block_has_no_rows() -> None:
    assert linear(2, 2).block_rows(0) is None
    assert plain().masks == 0


def test_drawing_shows_names_positions_and_visibility() -> None:
    lines = str(linear(1, 1)).splitlines()
    assert lines[0] == "layout: 2 regular + 1 masks = 3 tokens"
    assert lines[3].split() == ["t1.m1", "@2", "###"]


@pytest.mark.parametrize("blocks", [(Block(2, 1),), (Block(-1, 1),), (Block(0, 0),)])
def test_blocks_that_do_not_fit_are_refused(blocks: tuple[Block, ...]) -> None:
    with pytest.raises(ForetellError, match="does not fit"):
        Layout(2, blocks)


def test_empty_layout_is_refused() -> None:
    with pytest.raises(ForetellError, match="at least one"):
        Layout(0)
