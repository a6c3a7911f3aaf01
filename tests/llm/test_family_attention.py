"""Attention by families against one masked product over each tree."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from characterflywheel.llm import family_attention, forest
from characterflywheel.llm.forest import Forest, Path, plant

SEGMENTS = st.lists(st.integers(0, 3), min_size=1, max_size=6).map(tuple)
PATHS = st.lists(st.lists(SEGMENTS, min_size=1, max_size=4).map(tuple), min_size=1, max_size=8)


def compare(layout: Forest, *, queries: int = 4, keys: int = 2) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(layout.tokens, heads, 8, generator=draw).requires_grad_() for heads in (queries, keys, keys))
    weights = torch.randn(layout.tokens, 8 * queries, generator=draw)
    found = family_attention.attend(q, k, v, layout.families)
    alike = (q, *(t.repeat_interleave(queries // keys, 1) for t in (k, v)))
    trees = [([t[tree.start : tree.stop].transpose(0, 1) for t in alike], tree.mask) for tree in layout.trees]
    masked = [scaled_dot_product_attention(*parts, attn_mask=mask) for parts, mask in trees]
    expected = torch.cat([out.transpose(0, 1).flatten(1) for out in masked])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    ours, theirs = (torch.autograd.grad((out * weights).sum(), [q, k, v]) for out in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(PATHS)
def test_any_forest(paths: list[Path]) -> None:
    layout = plant(paths)
    rows = [row for family in layout.families for row in range(family.start, family.stop)]
    assert rows == list(range(layout.tokens))
    compare(layout)


@pytest.mark.parametrize("bound", [0, 6, 30])
@pytest.mark.parametrize("paths", [[((0,) * 9, (1, 2))], [((0,) * 3, (i,) * (2 + i)) for i in range(5)]])
def test_large_families_are_divided_and_large_spans_attend_by_flash(
    bound: int, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forest, "PLAIN_PAIRS", bound)
    monkeypatch.setattr(family_attention, "PLAIN_PAIRS", bound)
    compare(plant(paths))


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (1, 1), (4, 1)])
def test_any_number_of_heads(queries: int, keys: int) -> None:
    compare(plant([((0, 1, 2), (i,) * (1 + i)) for i in range(3)] + [((5,), (6, 7))]), queries=queries, keys=keys)


def test_replies_to_a_prompt_are_one_family_and_a_chain_is_one_span() -> None:
    """Rows: 0-4 system and history in one, 5-12 four replies of one or two tokens, 13-15 another chain."""
    replies = [((1, 2), (3, 4, 5), reply) for reply in ((6, 7), (8,), (9, 9), (7, 7), (6,))]
    made = plant([*replies, ((4,), (5, 6))]).families
    assert [(f.start, f.stop, f.size, f.longest) for f in made] == [(0, 5, 1, 5), (5, 13, 5, 2), (13, 16, 1, 3)]
    assert [f.above for f in made] == [(), ((0, 0, 5),), ()]
    assert made[1].rows is not None
    assert made[1].back is not None
    assert made[1].rows.tolist() == [0, 0, 1, 0, 2, 3, 4, 5, 6, 7]
    assert made[1].back.tolist() == [0, 2, 4, 5, 6, 7, 8, 9]


def test_siblings_of_very_different_lengths_part() -> None:
    """Lengths 1, 9 and 10 after SLACK = 8: 9 <= 1.5 x 1 + 8 joins, 10 does not."""
    made = plant([((0,), (i,) * length) for i, length in enumerate((1, 9, 10), 1)]).families
    assert [f.size for f in made] == [1, 2, 1]
