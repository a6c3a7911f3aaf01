import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from characterflywheel.llm.shared_prefix import Path, plant, reply_logprobs
from characterflywheel.training.batching import WORTH_SHARING, forest_rows, plan, share_prefixes
from tiny_model import tiny_llama

HEADS = tuple(tuple(range(10 * h, 10 * h + 18)) for h in range(3))
TOKENS = st.lists(st.integers(1, 3), max_size=6).map(tuple)
PATHS = st.lists(
    st.tuples(st.sampled_from(HEADS), TOKENS, TOKENS.filter(len)).map(lambda p: (p[0], p[1] or (9,), p[2])),
    min_size=1, max_size=12,
)  # fmt: skip


@settings(max_examples=30)
@given(st.lists(PATHS, max_size=5), st.integers(1, 200))
def test_every_item_runs_once_and_forests_keep_the_limit(items: list[list[Path]], limit: int) -> None:
    batches = plan(items, limit)
    assert sorted(i for batch in batches for i in batch) == list(range(len(items)))
    sizes = [forest_rows(item) for item in items]
    for batch in batches:
        forest = plant([path for i in batch for path in items[i]])
        assert forest.tokens == forest_rows([path for i in batch for path in items[i]])
        assert forest.tokens <= max(limit, sizes[batch[0]])
        assert max(sizes[i] for i in batch) == sizes[batch[0]]
    assert [sizes[b[0]] for b in batches] == sorted((sizes[b[0]] for b in batches), reverse=True), "longest first"


def test_items_that_share_a_prefix_land_together() -> None:
    """Four conversations of 100 tokens with two replies of 10 each; three forests of 240 rows hold all eight items.

    Alone an item has 110 rows; beside its sibling it adds 10. So two conversations fit a forest: 2 x 120 rows.
    """
    asked = [tuple(range(1000 * c, 1000 * c + 100)) for c in range(4)]
    items = [[(asked[i % 4], (i,) * 10)] for i in range(8)]
    batches = plan(items, 240)
    assert [sorted(i % 4 for i in batch) for batch in batches] == [[0, 0, 1, 1], [2, 2, 3, 3]]
    assert plan(items, 240) == batches
    assert plan([], 10) == []


@settings(max_examples=50)
@given(PATHS)
def test_sharing_changes_no_token_and_no_reply(paths: list[Path]) -> None:
    shared = share_prefixes(paths)
    for before, after in zip(paths, shared, strict=True):
        assert sum(before, ()) == sum(after, ())
        assert (before[0], before[-1]) == (after[0], after[-1])
    assert forest_rows(shared) <= forest_rows(paths)


def test_a_conversation_learnt_turn_by_turn_runs_once() -> None:
    """Turn 2's prompt holds turn 1's question and reply: it adds 4 + 2 rows to their 20 + 5 + 3."""
    head, asked, said, more, last = tuple(range(20)), (31,) * 5, (32,) * 3, (33,) * 4, (34,) * 2
    one, two = (head, asked, said), (head, asked + said + more, last)
    assert forest_rows([one, two]) == 42
    assert share_prefixes([one, two]) == [one, (head, asked, said, more, last)]
    assert forest_rows(share_prefixes([one, two])) == 34
    other = (head, (31, 31, 39), said)  # another user's question begins with the same two tokens
    assert forest_rows(share_prefixes([one, two, other])) == 34 + 1 + 3


def test_few_common_tokens_do_not_join_trees() -> None:
    few, many = (7,) * (WORTH_SHARING - 1), (7,) * WORTH_SHARING
    for common, trees in ((few, 2), (many, 1)):
        paths = [((), (*common, 1), (5,)), ((), (*common, 2), (5,))]
        assert len(plant(share_prefixes(paths)).trees) == trees


@settings(max_examples=10, deadline=None)
@given(PATHS, st.integers(20, 100))
def test_a_step_in_micro_batches_has_the_gradient_of_the_full_batch(paths: list[Path], limit: int) -> None:
    """To 1e-6 of the largest entry, in float32, whatever the limit and however prefixes are shared."""
    model = tiny_llama()
    total = sum(len(path[-1]) for path in paths)

    def gradient(batches: list[list[Path]]) -> torch.Tensor:
        model.zero_grad()
        for batch in batches:
            (-reply_logprobs(model, batch).logprobs.sum() / total).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole = gradient([paths])
    shared = share_prefixes(paths)
    cut = gradient([[shared[i] for i in batch] for batch in plan([[path] for path in shared], limit)])
    assert (whole - cut).abs().max() <= 1e-6 * max(1.0, float(whole.abs().max()))


def test_the_full_batch_is_the_padded_one() -> None:
    """The oracle is transformers' own cross-entropy over separate sequences, labels only on the replies."""
    model = tiny_llama()
    paths = share_prefixes(
        [(HEADS[0], (40, 41, 42), (50, 2)), (HEADS[0], (40, 41), (51, 52, 2)), (HEADS[1], (9,), (2,))]
    )
    (-reply_logprobs(model, paths).logprobs.sum() / 6).backward()
    mine = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    for path in paths:
        ids = torch.tensor([sum(path, ())])
        labels = ids.clone()
        labels[0, : -len(path[-1])] = -100
        (model(input_ids=ids, labels=labels).loss * len(path[-1]) / 6).backward()
    theirs = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert mine == pytest.approx(theirs, abs=2e-6)
