import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from characterflywheel.llm.base import Completion, Sampling
from characterflywheel.llm.native import NativeModel, draw, load_model
from characterflywheel.llm.shared_prefix import reply_logprobs
from characterflywheel.records import ChatMessage
from tiny_model import SYSTEM, asks, says, tiny_llama, tiny_tokenizer

CONVERSATIONS = (
    asks("hello"), asks("what do you like best about tea and bread?"), (says("user", "no system prompt here"),),
    asks("hello", says("system", "You are Bo.")),
    (SYSTEM, says("user", "hi"), says("assistant", "Yes?"), says("user", "why")),
    asks("the stars are out " * 6), asks("a"), asks("b b b"), (says("user", "?"),), asks("hello"),
)  # fmt: skip
PLAIN = Sampling(temperature=0.8, max_tokens=8)


def native(batch_replies: int = 64, **changes: object) -> NativeModel:
    return NativeModel(
        tiny_llama(**changes), tiny_tokenizer(), "tiny", max_prompt_tokens=256, threads=1, batch_replies=batch_replies
    )


def complete(
    model: NativeModel, conversations: tuple[tuple[ChatMessage, ...], ...] = CONVERSATIONS, n: int = 2,
    sampling: Sampling = PLAIN, seed: int = 0,
) -> list[list[Completion]]:  # fmt: skip
    seeds = [seed + i for i in range(len(conversations))]
    return model.complete(conversations, n=n, sampling=sampling, seeds=seeds)


def logprobs_of(replies: list[list[Completion]]) -> list[float]:
    return [value for several in replies for reply in several for value in reply.logprobs]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_sampled_logprobs_are_those_of_the_trainer(top_p: float) -> None:
    """The sampler decodes step by step from caches, the trainer runs everything at once; both in float32."""
    model = native()
    replies = complete(model, n=3, sampling=Sampling(temperature=0.7, top_p=top_p, max_tokens=10))
    paths = [
        (*model.format.prompt(c), reply.token_ids)
        for c, several in zip(CONVERSATIONS, replies, strict=True)
        for reply in several
    ]
    with torch.no_grad():
        trainer = reply_logprobs(model.model, paths, temperature=0.7).logprobs
    torch.testing.assert_close(torch.tensor(logprobs_of(replies)), trainer, atol=2e-5, rtol=0)


def test_bfloat16_stays_near_float32() -> None:
    model = native()
    model.model.to(torch.bfloat16)
    replies = complete(model, n=2)
    paths = [
        (*model.format.prompt(c), reply.token_ids)
        for c, several in zip(CONVERSATIONS, replies, strict=True)
        for reply in several
    ]
    with torch.no_grad():
        trainer = reply_logprobs(tiny_llama(), paths, temperature=PLAIN.temperature).logprobs
    difference = (torch.tensor(logprobs_of(replies)) - trainer).abs()
    assert 0 < difference.mean() < 0.05


def test_replies_are_repeatable_and_follow_their_seeds() -> None:
    model = native()
    first = complete(model)
    assert complete(model) == first
    other = complete(model, seed=100)
    assert other != first
    assert first[0] != first[-1], "the same conversation with another seed"
    assert all(len({reply.token_ids for reply in several}) == 2 for several in first)


def test_a_seed_belongs_to_its_conversation() -> None:
    """Whatever else is asked in the same call, and in whichever order."""
    model = native()
    seeds = list(range(len(CONVERSATIONS)))
    forward = model.complete(CONVERSATIONS, n=2, sampling=PLAIN, seeds=seeds)
    backward = model.complete(CONVERSATIONS[::-1], n=2, sampling=PLAIN, seeds=seeds[::-1])[::-1]
    alone = [model.complete([c], n=2, sampling=PLAIN, seeds=[s])[0] for c, s in zip(CONVERSATIONS, seeds, strict=True)]
    for other in (backward, alone):
        assert [[r.token_ids for r in several] for several in other] == [
            [r.token_ids for r in several] for several in forward
        ]


@pytest.mark.parametrize("batch_replies", [1, 2, 4, 6])
def test_few_slots_give_the_replies_of_many(batch_replies: int) -> None:
    """Ten conversations through one to three slots: a slot's caches are reused for prompts of other lengths."""
    ends = list(range(100))  # so that replies end early, at different steps
    many = complete(native(64, eos_token_id=ends), sampling=Sampling(max_tokens=12))
    few = complete(native(batch_replies, eos_token_id=ends), sampling=Sampling(max_tokens=12))
    lengths = [len(r.token_ids) for several in many for r in several]
    assert len(set(lengths)) > 3
    assert [[r.token_ids for r in several] for several in few] == [[r.token_ids for r in several] for several in many]
    np.testing.assert_allclose(logprobs_of(few), logprobs_of(many), atol=1e-4)


def test_a_reply_ends_at_an_end_token_or_at_max_tokens() -> None:
    """Some models end a turn with any of several tokens, which `generation_config` lists."""
    ends, llama = set(range(2, 60)), tiny_llama()
    llama.generation_config.eos_token_id = sorted(ends)
    model = NativeModel(llama, tiny_tokenizer(), "tiny", max_prompt_tokens=256, threads=1)
    replies = [r for several in complete(model, n=4, sampling=Sampling(max_tokens=6)) for r in several]
    assert {r.finish_reason for r in replies} == {"stop", "length"}
    for reply in replies:
        ended = [i for i, token in enumerate(reply.token_ids) if token in ends]
        assert len(reply.logprobs) == len(reply.token_ids) <= 6
        if reply.finish_reason == "stop":
            assert ended == [len(reply.token_ids) - 1]
            assert reply.text == model.format.decode(reply.token_ids[:-1]).strip()
        else:
            assert ended == []
            assert len(reply.token_ids) == 6
            assert reply.text == model.format.decode(reply.token_ids).strip()


@pytest.mark.parametrize("n", [1, 5])
def test_n_replies_and_progress(n: int) -> None:
    seen: list[tuple[int, int]] = []
    replies = native(4).complete(
        CONVERSATIONS[:3], n=n, sampling=Sampling(max_tokens=2), seeds=[1, 2, 3],
        on_progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert [len(several) for several in replies] == [n] * 3
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_nothing_asked_is_nothing_answered() -> None:
    assert native().complete([], seeds=[]) == []


def test_every_conversation_needs_a_seed() -> None:
    with pytest.raises(ValueError, match="2 prompts need as many seeds, got 1"):
        native().complete(CONVERSATIONS[:2], seeds=[1])


def test_temperature_zero_is_greedy() -> None:
    model = native()
    replies = complete(model, sampling=Sampling(temperature=0, max_tokens=5))
    for conversation, (one, two) in zip(CONVERSATIONS, replies, strict=True):
        assert one == two
        ids = [*(t for segment in model.format.prompt(conversation) for t in segment)]
        for token in one.token_ids:
            with torch.no_grad():
                assert token == int(model.model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)


def test_a_saved_folder_loads(tiny_folder) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer = load_model(tiny_folder, torch.float32)
    loaded = NativeModel(model, tokenizer, "tiny", max_prompt_tokens=256, threads=1)
    assert complete(loaded) == complete(native())


# What `draw` draws

LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -30.0])


def expected(temperature: float, top_p: float) -> np.ndarray:  # type: ignore[type-arg]
    """Softmax at the temperature, cut to the smallest set of most likely tokens that reaches `top_p`."""
    weights = np.exp(LOGITS.double().numpy() / temperature)
    weights /= weights.sum()
    order = np.argsort(-weights)
    size = int(np.searchsorted(np.cumsum(weights[order]), top_p)) + 1
    kept = np.zeros_like(weights)
    kept[order[:size]] = weights[order[:size]]
    return kept / kept.sum()


def drawn(uniforms: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    return draw(LOGITS.expand(len(uniforms), -1), uniforms, Sampling(temperature=temperature, top_p=top_p))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.5, 1.0), (1.0, 0.8), (0.7, 0.7)])
def test_draws_follow_softmax(temperature: float, top_p: float) -> None:
    tokens, _ = drawn(torch.rand(20_000, generator=torch.Generator().manual_seed(3)), temperature, top_p)
    counts, wanted = np.bincount(tokens, minlength=len(LOGITS)), expected(temperature, top_p)
    likely = wanted * len(tokens) >= 5
    assert counts[~likely].sum() <= 3
    rest = counts[likely].sum() * wanted[likely] / wanted[likely].sum()
    assert chisquare(counts[likely], rest).pvalue > 0.01


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8)])
def test_even_uniforms_give_exact_shares(temperature: float, top_p: float) -> None:
    """Inverse transform of an even grid: every share is right to one part of the grid."""
    grid = (torch.arange(4000) + 0.5) / 4000
    tokens, logs = drawn(grid, temperature, top_p)
    shares = np.bincount(tokens, minlength=len(LOGITS)) / 4000
    np.testing.assert_allclose(shares, expected(temperature, top_p), atol=1.5 / 4000)
    torch.testing.assert_close(logs, torch.log_softmax(LOGITS / temperature, -1)[tokens])


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(top_p: float) -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    edges = torch.tensor([0.0, 0.5 - 2**-25, 0.5, 1 - 2**-24])
    tokens, logs = draw(logits.expand(4, -1), edges, Sampling(top_p=top_p))
    assert set(tokens.tolist()) <= {1, 3}
    assert logs.isfinite().all()


@pytest.mark.parametrize("keeps", [True, False])
def test_new_weights_are_decoded_from_whether_the_copy_is_kept_or_not(keeps: bool) -> None:
    model = NativeModel(
        tiny_llama(), tiny_tokenizer(), "tiny", max_prompt_tokens=256, threads=1, keeps_copy=keeps
    )  # fmt: skip
    first = logprobs_of(complete(model))
    assert (model._weights is not None) == keeps
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.mul_(1.1)
    replies = complete(model)
    assert logprobs_of(replies) != first
    paths = [
        (*model.format.prompt(c), reply.token_ids)
        for c, several in zip(CONVERSATIONS, replies, strict=True)
        for reply in several
    ]
    with torch.no_grad():
        trainer = reply_logprobs(model.model, paths, temperature=PLAIN.temperature).logprobs
    torch.testing.assert_close(torch.tensor(logprobs_of(replies)), trainer, atol=2e-5, rtol=0)
