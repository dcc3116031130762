"""The attention of steps by foretell's own kernel, against one written out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from foretell import native
from foretell.attended import HeadNorms, Past
from foretell.cache import StaticCache
from foretell.layout import Layout, linear, plain, quadratic
from foretell.rows import Rows, aligned

from .lying import lying
from .models import CONFIGS, WIDE, tiny_lm, tiny_model

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no native code: {native.why_not()}")

CAPACITY = 400
STEPS: list[tuple[list[int], list[Layout]]] = [
    ([0], [plain()]),
    ([5], [plain(3)]),
    ([300], [quadratic(2, 3)]),
    ([130, 7, 0, 257], [plain(), linear(2, 4), plain(2), quadratic(1, 2)]),
]


class Case:
    """A layer's worth of random numbers: rows together, and what sequences have cached."""

    def __init__(self, dtype: torch.dtype, heads: int, shared: int, size: int, normed: bool = False) -> None:
        self.dtype, self.heads, self.shared, self.size = dtype, heads, shared, size
        self.random = torch.Generator().manual_seed(0)
        self.norms = None
        if normed:
            self.norms = HeadNorms(self.numbers(size) + 1, self.numbers(size) + 1, 1e-6)

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random).to(self.dtype)

    def cached(self, sequences: int) -> tuple[Tensor, Tensor]:
        shape = sequences, self.shared, CAPACITY, self.size
        return self.numbers(*shape), self.numbers(*shape)

    def turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(1, N, size) cosine and signed sine."""
        angles = positions[:, None] / 100 ** torch.arange(0, 1, 2 / self.size)
        sine = angles.sin()
        return torch.cat([angles.cos()] * 2, 1)[None].to(self.dtype), torch.cat([-sine, sine], 1)[None].to(self.dtype)

    def attend(
        self, made: Tensor, own: Sequence[Layout], lengths: Sequence[int], kept: tuple[Tensor, Tensor]
    ) -> Tensor:
        past = Past(Rows(own), lengths, False)
        past.turn(*self.turns(past.positions), self.heads, self.size**-0.5)
        return past.attend(made, self.shared, *kept, self.norms)

    def expected(
        self, made: Tensor, own: Sequence[Layout], lengths: Sequence[int], kept: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """What the rows see (N, heads, size), in double precision behind the base's own roundings; new keys of each
        sequence."""
        rows = Rows(own)
        parts = made[0, :, : (self.heads + 2 * self.shared) * self.size].view(rows.count, -1, self.size)
        query, key, value = parts.split([self.heads, self.shared, self.shared], 1)
        if self.norms is not None:
            query, key = (
                F.rms_norm(x.float(), (self.size,), None, self.norms.epsilon).to(self.dtype) * weight
                for x, weight in ((query, self.norms.query), (key, self.norms.key))
            )
        out, keys = torch.empty(rows.count, self.heads, self.size, dtype=torch.double), []
        start, order = 0, rows.order
        for b, (layout, length) in enumerate(zip(own, lengths, strict=True)):
            at = order[start : start + layout.width]
            start += layout.width
            cos, sin = (turn[0, :, None] for turn in self.turns(layout.position_offsets + length))
            q, k = (x[at] * cos + x[at].roll(self.size // 2, -1) * sin for x in (query, key))
            keys.append(k.transpose(0, 1))
            seen = torch.cat([torch.ones(layout.width, length, dtype=torch.bool), layout.visible], 1)
            every = torch.cat([kept[0][b, :, :length], k.transpose(0, 1)], 1).double()
            values = torch.cat([kept[1][b, :, :length], value[at].transpose(0, 1)], 1).double()
            every, values = (x.repeat_interleave(self.heads // self.shared, 0) for x in (every, values))
            scores = q.transpose(0, 1).double() @ every.mT * self.size**-0.5
            out[at] = (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(0, 1)
        return out, keys


@pytest.mark.parametrize("lengths, own", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, shared, size, normed", [(4, 2, 16, False), (9, 3, 64, True), (2, 2, 80, False)])
def test_rows_see_what_their_layouts_say(
    lengths: list[int], own: list[Layout], dtype: torch.dtype, heads: int, shared: int, size: int, normed: bool
) -> None:
    case = Case(dtype, heads, shared, size, normed)
    rows, kept = Rows(own), case.cached(len(own))
    made = case.numbers(1, rows.count, (heads + 2 * shared) * size + 5)  # an adapter's numbers may lie behind
    before = [x.clone() for x in kept]
    expected, keys = case.expected(made, own, lengths, kept)
    found = case.attend(made, own, lengths, kept)
    assert found.dtype == dtype
    error = (found[0].view(expected.shape) - expected).abs().max()
    assert error <= (2e-5 if dtype == torch.float32 else 0.02) * expected.abs().max()
    for b, (length, new) in enumerate(zip(lengths, keys, strict=True)):
        end = length + own[b].width
        close = 1e-5 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(kept[0][b, :, length:end], new, rtol=close, atol=close)
        for now, then in zip(kept, before, strict=True):
            assert torch.equal(now[b, :, :length], then[b, :, :length])
            assert torch.equal(now[b, :, end:], then[b, :, end:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_regular_row_has_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    case, length = Case(dtype, 6, 2, 64), 126  # its rows lie on both sides of a chunk's end
    kept = case.cached(3)
    made = case.numbers(1, 40, 10 * 64)
    alone = [x[:1].clone() for x in kept]
    one_by_one = [case.attend(made[:, n : n + 1], [plain()], [length + n], (alone[0], alone[1])) for n in range(4)]
    for own in ([plain(4)], [linear(3, 2)], [quadratic(3, 5)], [plain(4), linear(1, 3), plain()]):
        rows, company = Rows(own), [x.clone() for x in kept]
        together = made[:, : rows.count].clone()
        found = case.attend(together, own, [length, 300, 9][: len(own)], (company[0], company[1]))
        for n, expected in enumerate(one_by_one):
            assert torch.equal(found[0, n], expected[0, 0])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "smollm3"])
def test_steps_are_those_of_the_base(name: str, bidirectional: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged steps of several sequences over their own pasts, against those of lean steps that are filled up."""
    lying("streamed", monkeypatch)
    monkeypatch.setitem(CONFIGS, name, type(CONFIGS[name])(**WIDE))
    model = tiny_model(name, mask_attention="bidirectional" if bidirectional else "causal")
    model.base.pack(lambda: tiny_lm(name))
    model.for_inference()
    own, lengths = [quadratic(1, 2), plain(), linear(2, 3)], [9, 4, 6]
    rows, latents = Rows(own), []
    for ours in (True, False):
        cache = StaticCache(len(model.base.blocks), 40, 3)
        with torch.inference_mode():
            model.prefill(torch.arange(27).view(3, 9) % model.base.vocab_size, cache)
            cache.keep(lengths)
            if not ours:
                monkeypatch.setattr("foretell.model.MOST_ROWS", 0)
            found = model.step(torch.arange(9).view(3, 3), aligned(own, 3), cache, cache.lengths, rows)
        latents.append(rows.together(found))
    assert not torch.equal(*latents)  # so that there is something to compare
    assert (latents[0] - latents[1]).abs().max() <= 2e-5 * latents[1].abs().max()
