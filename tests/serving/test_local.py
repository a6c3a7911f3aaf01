import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from characterflywheel.errors import FlywheelError
from characterflywheel.llm.base import Completion, Sampling
from characterflywheel.llm.native import NativeModel
from characterflywheel.records import ChatMessage
from characterflywheel.serving.local import Local, Worker
from characterflywheel.serving.replies import BackendError, Chunk, Reply
from tiny_model import asks, says, tiny_llama, tiny_tokenizer

PLAIN = Sampling(temperature=0.8, max_tokens=24)
QUESTIONS = [
    asks(f"what about {word}?")
    for word in ("tea", "bread", "stars", "the sea", "tonight", "you", "my friend", "me", "home", "all that")
]


def tiny(batch_replies: int = 8) -> NativeModel:
    torch.set_num_threads(1)
    return NativeModel(
        tiny_llama(), tiny_tokenizer(), "tiny", max_prompt_tokens=400, threads=1, batch_replies=batch_replies
    )


@pytest.fixture(scope="module")
def model() -> NativeModel:
    return tiny()


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.stop()


def run(test: Callable[[], Awaitable[Any]]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(20):
            return await test()

    return asyncio.run(bounded())


async def pieces(backend: Local, messages: Sequence[ChatMessage], seed: int, sampling: Sampling = PLAIN) -> list[Chunk]:
    return [chunk async for chunk in backend.stream(messages, sampling, seed)]


def test_replies_are_those_of_the_sampler(model: NativeModel, worker: Worker) -> None:
    """Ten requests at once through eight slots, streamed and not: the very words that the sampler writes alone."""

    async def test() -> tuple[list[list[Reply]], list[list[Chunk]]]:
        backend = Local("tiny", lambda: model, worker)
        whole = [backend.complete(q, PLAIN, seed) for seed, q in enumerate(QUESTIONS)]
        streamed = [pieces(backend, q, seed) for seed, q in enumerate(QUESTIONS)]
        return await asyncio.gather(*whole), await asyncio.gather(*streamed)

    alone = [model.complete([q], sampling=PLAIN, seeds=[seed])[0][0] for seed, q in enumerate(QUESTIONS)]
    whole, streamed = run(test)
    assert [reply.text for (reply,) in whole] == [one.text for one in alone]
    assert [reply.finish for (reply,) in whole] == [one.finish_reason for one in alone]
    assert [reply.completion_tokens for (reply,) in whole] == [len(one.token_ids) for one in alone]
    assert ["".join(chunk.text for chunk in chunks) for chunks in streamed] == [one.text for one in alone]
    for chunks, (reply,) in zip(streamed, whole, strict=True):
        assert [chunk.finish for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1][1:] == reply[1:]
    assert sum(map(len, streamed)) > 3 * len(streamed), "a reply comes in several pieces"


def test_a_stream_is_heard_while_it_is_written(model: NativeModel, worker: Worker) -> None:
    async def test() -> int:
        backend = Local("tiny", lambda: model, worker)
        stream = backend.stream(QUESTIONS[0], Sampling(max_tokens=400), 3)
        await anext(stream)
        (writer,) = worker._writers
        running = len(writer._writing)  # type: ignore[attr-defined]
        await stream.aclose()
        return running

    assert run(test) == 1


def test_drafts_differ_and_repeat(model: NativeModel, worker: Worker) -> None:
    async def test() -> tuple[list[Reply], list[Reply], list[Reply]]:
        backend = Local("tiny", lambda: model, worker)
        three = await backend.complete(QUESTIONS[0], PLAIN, 7, n=3)
        return (
            three,
            await backend.complete(QUESTIONS[0], PLAIN, 7, n=3),
            await backend.complete(QUESTIONS[0], PLAIN, 7),
        )

    first, again, single = run(test)
    assert first == again
    assert len({reply.text for reply in first}) == 3
    assert first[0] == single[0]


@pytest.mark.parametrize(
    "other",
    [Sampling(temperature=0.0, max_tokens=8), Sampling(temperature=0.8, top_p=0.5, max_tokens=8),
     Sampling(temperature=0.8, max_tokens=300), Sampling(temperature=0.8, max_tokens=3)],
)  # fmt: skip
def test_requests_that_sample_differently_share_the_worker(model: NativeModel, worker: Worker, other: Sampling) -> None:
    async def test() -> list[list[Reply]]:
        backend = Local("tiny", lambda: model, worker)
        asked = [(PLAIN, 1), (other, 2), (PLAIN, 3), (other, 4)]
        return await asyncio.gather(*[backend.complete(QUESTIONS[0], sampling, seed) for sampling, seed in asked])

    one, two, three, four = run(test)
    for (reply,), sampling, seed in ((one, PLAIN, 1), (two, other, 2), (three, PLAIN, 3), (four, other, 4)):
        assert reply.text == model.complete([QUESTIONS[0]], sampling=sampling, seeds=[seed])[0][0].text


def test_a_client_that_leaves_takes_its_job_along(model: NativeModel, worker: Worker) -> None:
    async def test() -> tuple[list[Reply], int]:
        backend = Local("tiny", lambda: model, worker)
        endless = Sampling(temperature=0.8, max_tokens=20_000)
        tasks = [asyncio.create_task(backend.complete(QUESTIONS[i % 9], endless, i)) for i in range(12)]
        await asyncio.sleep(0.2)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        reply = await backend.complete(QUESTIONS[0], PLAIN, 0)
        await asyncio.sleep(0.05)
        return reply, sum(writer.busy for writer in worker._writers)

    reply, busy = run(test)
    assert reply[0].text == model.complete([QUESTIONS[0]], sampling=PLAIN, seeds=[0])[0][0].text
    assert busy == 0


def test_a_prompt_that_is_too_long_fails_alone(model: NativeModel, worker: Worker) -> None:
    async def test() -> list[Any]:
        backend = Local("tiny", lambda: model, worker)
        long = asks("hello", says("system", "You are Mo. " * 400))
        return await asyncio.gather(
            backend.complete(long, PLAIN, 0), backend.complete(QUESTIONS[0], PLAIN, 0), return_exceptions=True
        )

    error, reply = run(test)
    assert isinstance(error, BackendError)
    assert (error.status, error.code, error.blames_backend) == (502, "prompt", False)
    assert "raise max_prompt_tokens" in str(error)
    assert reply[0].finish in ("stop", "length")


class Recorder:
    """A chat model that is no sampler of ours: it notes its batches, and fails where told."""

    name = "recorder"

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.threads: set[str] = set()

    def complete(
        self, conversations: Sequence[Sequence[ChatMessage]], *, n: int = 1, sampling: Sampling = PLAIN,
        seeds: Sequence[int],
    ) -> list[list[Completion]]:  # fmt: skip
        self.batches.append(len(conversations))
        self.threads.add(threading.current_thread().name)
        said = [c[-1].content for c in conversations]
        if "crash" in said:
            raise RuntimeError("out of memory")
        if "odd" in said:
            raise FlywheelError("this conversation is odd: say something else.")
        return [[Completion(text.upper(), (1,), (0.0,), "stop")] for text in said]


def test_what_waits_is_written_together(worker: Worker) -> None:
    recorder = Recorder()

    async def test() -> list[Any]:
        backend = Local("recorder", lambda: recorder, worker)
        await backend.ready()
        with worker._wake:  # hold the worker while they come in
            tasks = [asyncio.create_task(backend.complete(asks(f"a{i}"), PLAIN, i)) for i in range(20)]
            odd = asyncio.create_task(backend.complete(asks("odd"), PLAIN, 0))
            other = asyncio.create_task(backend.complete(asks("b"), Sampling(), 0))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        return await asyncio.gather(*tasks, odd, other, return_exceptions=True)

    *replies, odd, other = run(test)
    assert [reply[0].text for reply in replies] == [f"A{i}" for i in range(20)]
    assert isinstance(odd, BackendError)
    assert other[0].text == "B"
    assert max(recorder.batches) > 10
    assert recorder.threads == {"flywheel-models"}


def test_a_model_that_crashes_is_an_error_and_goes_on(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> tuple[BackendError, list[Reply], list[Chunk]]:
        backend = Local("recorder", Recorder, worker)
        with pytest.raises(BackendError) as caught:
            await backend.complete(asks("crash"), PLAIN, 0)
        return caught.value, await backend.complete(asks("fine"), PLAIN, 0), await pieces(backend, asks("on"), 0)

    error, after, streamed = run(test)
    assert (error.status, error.code, error.detail) == (502, "model_failed", "RuntimeError: out of memory")
    assert after[0].text == "FINE"
    assert streamed == [Chunk("ON", "stop", None, 1)]
    assert "failed while writing" in caplog.text


def test_a_sampler_that_crashes_in_the_middle_is_an_error_and_goes_on(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from characterflywheel.llm.native import Decoder  # noqa: PLC0415

    model, steps, step = tiny(), iter(range(1000)), Decoder.step

    def failing(decoder: Decoder) -> Any:
        if next(steps) == 3:
            raise RuntimeError("no memory")
        return step(decoder)

    async def test() -> tuple[list[Any], list[Reply]]:
        monkeypatch.setattr(Decoder, "step", failing)
        backend = Local("tiny", lambda: model, worker)
        both = await asyncio.gather(
            pieces(backend, QUESTIONS[0], 0), backend.complete(QUESTIONS[1], PLAIN, 0), return_exceptions=True
        )
        return both, await backend.complete(QUESTIONS[0], PLAIN, 0)

    both, after = run(test)
    assert [error.code for error in both] == ["model_failed"] * 2
    assert after[0].text == model.complete([QUESTIONS[0]], sampling=PLAIN, seeds=[0])[0][0].text
    assert "no memory" in caplog.text


def test_loading_happens_once_and_is_tried_again_when_it_failed(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    tries: list[int] = []

    def load() -> Recorder:
        tries.append(1)
        if len(tries) == 1:
            raise OSError("half a file")
        return Recorder()

    async def test() -> tuple[list[Any], list[Any]]:
        backend = Local("recorder", load, worker)
        first = await asyncio.gather(*[backend.ready() for _ in range(3)], return_exceptions=True)
        return first, await asyncio.gather(*[backend.complete(asks("hi"), PLAIN, 0) for _ in range(3)])

    first, replies = run(test)
    assert {(error.status, error.code) for error in first} == {(503, "model_unloadable")}
    assert [reply.text for (reply,) in replies] == ["HI"] * 3
    assert len(tries) == 2


def test_stopping_ends_what_is_not_finished(model: NativeModel) -> None:
    async def test() -> list[Any]:
        worker = Worker()
        backend = Local("tiny", lambda: model, worker)
        tasks = [asyncio.create_task(backend.complete(q, Sampling(max_tokens=20_000), 0)) for q in QUESTIONS]
        await asyncio.sleep(0.2)
        await asyncio.to_thread(worker.stop)
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        return [*ended, *await asyncio.gather(backend.complete(QUESTIONS[0], PLAIN, 0), return_exceptions=True)]

    *ended, after = run(test)  # a reply may end by itself before it is stopped
    stopped = [one for one in ended if isinstance(one, BackendError)]
    assert stopped
    assert {error.code for error in [*stopped, after]} == {"closing"}


def test_a_model_that_is_let_go_answers_first(model: NativeModel, worker: Worker) -> None:
    async def test() -> tuple[list[Reply], int]:
        backend = Local("tiny", lambda: model, worker)
        task = asyncio.create_task(backend.complete(QUESTIONS[0], Sampling(temperature=0.8, max_tokens=300), 0))
        await asyncio.sleep(0.05)
        await backend.close()
        reply = await task
        await asyncio.sleep(0.05)
        with pytest.raises(BackendError, match="ask again"):
            await backend.complete(QUESTIONS[0], PLAIN, 0)
        return reply, len(worker._writers)

    reply, left = run(test)
    assert reply[0].finish in ("stop", "length")
    assert left == 0
