"""The guard before a server that is really started, and before a model that does as a drawn script says."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_server import Mock, Settings, serving

from characterflywheel.config import ServerConfig
from characterflywheel.llm.base import Sampling
from characterflywheel.records import ChatMessage
from characterflywheel.serving.endpoint import Endpoint
from characterflywheel.serving.guard import Guarded, Served
from characterflywheel.serving.replies import BackendBusy, BackendError, Chunk, Reply
from characterflywheel.serving.upstream import Upstream

ASKED = (ChatMessage(role="user", content="hello"),)
PLAIN = Sampling()


def guarding(test: Callable[[Mock, Callable[..., Guarded]], Awaitable[Any]], **limits: Any) -> Any:
    """The result of `test(mock, guarded)`, where `guarded(model)` guards a model of a started server."""

    async def bounded() -> Any:
        mock = Mock(Settings(words=5))
        async with asyncio.timeout(10), serving(mock) as address:
            upstream, server = Upstream(address), ServerConfig(**limits)
            try:
                return await test(mock, lambda model, **more: Guarded(Endpoint(model, upstream), server, **more))
            finally:
                await upstream.close()

    return asyncio.run(bounded())


async def ask(guarded: Guarded) -> str:
    return (await guarded.complete(ASKED, PLAIN, 0))[0].text


async def hear(guarded: Guarded) -> list[Chunk]:
    return [chunk async for chunk in guarded.stream(ASKED, PLAIN, 0)]


async def outcome(call: Awaitable[Any]) -> str:
    try:
        await call
    except BackendError as error:
        return error.code
    return "ok"


async def until_left(mock: Mock) -> None:
    """Wait until the server has noticed that its client left, for 3 s at most."""
    for _ in range(300):
        if mock.counts["left"]:
            return
        await asyncio.sleep(0.01)


def idle(guarded: Guarded) -> bool:
    return guarded.running == guarded.waiting == len(guarded._oldest) == 0


def test_what_passes_is_unchanged_and_counted() -> None:
    seen: list[Served] = []

    async def test(mock: Mock, guarded: Callable[..., Guarded]) -> Any:
        one = guarded("mock?first=0.02", on_served=seen.append)
        await guarded("mock").ready()
        return await ask(one), await hear(one), one

    text, chunks, one = guarding(test)
    assert "".join(chunk.text for chunk in chunks) == text == "The lamp is lit and"
    assert chunks[-1] == Chunk("", "stop", 1, 5)
    assert one.counters.outcomes == {"ok": 2}
    assert [(s.model, s.outcome) for s in seen] == [("mock?first=0.02", "ok")] * 2
    assert seen[0].first_s is None
    assert seen[1].first_s is not None
    assert 0.02 <= seen[1].first_s <= seen[1].seconds
    assert one.counters.seconds == pytest.approx(sum(s.seconds for s in seen))
    assert idle(one)


def test_the_queue_is_bounded_and_says_when_to_come_back() -> None:
    """Two at once, three wait, the sixth is told; all five are served in the order in which they came."""

    async def test(mock: Mock, guarded: Callable[..., Guarded]) -> Any:
        one, order = guarded("mock?first=0.1"), []
        await ask(one)

        async def numbered(number: int) -> None:
            await ask(one)
            order.append(number)

        tasks = [asyncio.create_task(numbered(number)) for number in range(5)]
        await asyncio.sleep(0.02)
        full, mean = (one.running, one.waiting), one._mean_s
        with pytest.raises(BackendBusy) as caught:
            await ask(one)
        with pytest.raises(BackendBusy):
            await hear(one)
        await asyncio.gather(*tasks)
        return full, caught.value, mean, order, mock.counts["ok"], one

    full, busy, mean, order, served, one = guarding(test, concurrent=2, waiting=3)
    assert full == (2, 3)
    assert (busy.status, busy.code) == (429, "queue_full")
    assert mean >= 0.1
    assert busy.retry_after == pytest.approx(2 * mean), "three wait and I, two at a time"
    assert sorted(order[:2]) == [0, 1]
    assert sorted(order[2:4]) == [2, 3]
    assert served == 6
    assert one.counters.outcomes == {"ok": 6, "queue_full": 2}
    assert idle(one)


def test_before_anything_was_measured_the_oldest_request_says_how_slow_the_model_is() -> None:
    async def test(mock: Mock, guarded: Callable[..., Guarded]) -> float:
        one = guarded("mock?first=3")
        task = asyncio.create_task(ask(one))
        await asyncio.sleep(0.2)
        with pytest.raises(BackendBusy) as caught:
            await ask(one)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return caught.value.retry_after

    assert 0.2 <= guarding(test, concurrent=1, waiting=0) < 2


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_a_model_that_hangs_is_an_answer(streamed: bool) -> None:
    async def test(mock: Mock, guarded: Callable[..., Guarded]) -> Any:
        one, began = guarded("mock?mode=hang"), time.monotonic()
        with pytest.raises(BackendError) as caught:
            await (hear(one) if streamed else ask(one))
        took = time.monotonic() - began
        await until_left(mock)
        return caught.value, took, mock.counts["left"], one

    error, took, left, one = guarding(test, timeout_s=0.3, first_token_s=0.15)
    assert (error.status, error.code) == ((504, "first_token_timeout") if streamed else (504, "timeout"))
    assert 0 <= took - (0.15 if streamed else 0.3) < 1
    assert left == 1, "the server hears that nobody waits any more"
    assert idle(one)


def test_a_stream_that_is_slow_to_begin_or_to_end() -> None:
    async def test(mock: Mock, guarded: Callable[..., Guarded]) -> Any:
        slow = [guarded("mock?first=2"), guarded("mock?piece=0.4"), guarded("mock?first=0.1&piece=0.01")]
        return [await outcome(hear(one)) for one in slow], all(map(idle, slow))

    outcomes, all_idle = guarding(test, timeout_s=1, first_token_s=0.6)
    assert outcomes == ["first_token_timeout", "timeout", "ok"]
    assert all_idle


def test_deadlines_include_the_wait_which_does_not_speak_against_the_model() -> None:
    async def test(mock: Mock, guarded: Callable[..., Guarded]) -> Any:
        one = guarded("mock?first=0.4", failures_in_a_row=1)
        outcomes = await asyncio.gather(*[outcome(ask(one)) for _ in range(4)], outcome(hear(one)))
        return outcomes, one.broken, one

    outcomes, broken, one = guarding(test, concurrent=1, timeout_s=1.05, first_token_s=0.1)
    assert outcomes == ["ok", "ok", "timeout", "queue_timeout", "queue_timeout"]
    assert not broken
    assert idle(one)


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_a_client_that_leaves_frees_its_place(streamed: bool) -> None:
    """One is with the model and one waits; both leave, and the next is served at once."""

    async def test(mock: Mock, guarded: Callable[..., Guarded]) -> Any:
        one = guarded("mock?piece=0.05&first=0.3")
        tasks = [asyncio.create_task(hear(one) if streamed else ask(one)) for _ in range(2)]
        await asyncio.sleep(0.1)
        before = one.running, one.waiting
        for task in reversed(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until_left(mock)
        return before, idle(one), await ask(one), one.counters.outcomes, mock.counts

    before, was_idle, text, outcomes, counts = guarding(test, concurrent=1)
    assert before == (1, 1)
    assert was_idle
    assert text == "The lamp is lit and"
    assert outcomes == {"cancelled": 2, "ok": 1}
    assert counts == {"ok": 2, "left": 1}, "the one that waited never came to the server"


def test_a_stream_that_is_closed_in_the_middle_frees_its_place() -> None:
    async def test(mock: Mock, guarded: Callable[..., Guarded]) -> Any:
        one = guarded("mock?piece=0.1")
        stream = one.stream(ASKED, PLAIN, 0)
        first = await anext(stream)
        running = one.running
        await stream.aclose()
        await until_left(mock)
        return first.text, running, idle(one), mock.counts["left"], one.counters.outcomes

    assert guarding(test) == ("The", 1, True, 1, {"cancelled": 1})


def test_the_place_is_free_before_the_last_piece_is_taken() -> None:
    async def test(mock: Mock, guarded: Callable[..., Guarded]) -> Any:
        one = guarded("mock")
        return [(chunk.finish, idle(one)) async for chunk in one.stream(ASKED, PLAIN, 0)]

    *before, last = guarding(test)
    assert last == ("stop", True)
    assert set(before) == {(None, False)}


@pytest.mark.parametrize("mode", ["crash", "truncated", "reset", "garbage", "status:500", "status:429", "failing"])
def test_whatever_breaks_frees_its_place(mode: str) -> None:
    async def test(mock: Mock, guarded: Callable[..., Guarded]) -> Any:
        one = guarded(f"mock?mode={mode}")
        return await outcome(hear(one)), idle(one), one.counters.outcomes

    code, was_idle, outcomes = guarding(test, concurrent=1)
    assert code.startswith("upstream_")
    assert was_idle
    assert outcomes == {code: 1}


def test_the_breaker_opens_lets_one_probe_through_and_closes() -> None:
    async def test(mock: Mock, guarded: Callable[..., Guarded]) -> Any:
        mock.settings = Settings(mode="status:500")
        one = guarded("mock", failures_in_a_row=3, rest_s=0.2)
        failed = [await outcome(ask(one)) for _ in range(3)]
        with pytest.raises(BackendError, match="failed 3 times in a row") as caught:
            await ask(one)
        resting = [await outcome(hear(one)) for _ in range(3)]
        asked = mock.counts.total()
        await asyncio.sleep(0.25)
        probe = await asyncio.gather(*[outcome(ask(one)) for _ in range(4)])
        mock.settings = Settings(first=0.05)
        await asyncio.sleep(0.25)
        healed = await asyncio.gather(*[outcome(ask(one)) for _ in range(4)])
        return failed, caught.value, resting, asked, probe, healed, await outcome(ask(one)), one

    failed, error, resting, asked, probe, healed, after, one = guarding(test)
    assert failed == ["upstream_failed"] * 3
    assert (error.status, error.code) == (503, "resting")
    assert 0 < error.retry_after <= 0.2
    assert resting == ["resting"] * 3
    assert asked == 3
    assert sorted(probe) == ["resting"] * 3 + ["upstream_failed"]
    assert sorted(healed) == ["ok"] + ["resting"] * 3
    assert after == "ok"
    assert not one.broken
    assert idle(one)


def test_a_probe_whose_client_leaves_makes_room_for_another() -> None:
    async def test(mock: Mock, guarded: Callable[..., Guarded]) -> Any:
        mock.settings = Settings(mode="reset")
        one = guarded("mock", failures_in_a_row=1, rest_s=0.05)
        await outcome(ask(one))
        await asyncio.sleep(0.1)
        mock.settings = Settings(mode="hang")
        probe = asyncio.create_task(ask(one))
        await asyncio.sleep(0.1)
        while_probing = await outcome(ask(one))
        probe.cancel()
        await asyncio.gather(probe, return_exceptions=True)
        mock.settings = Settings()
        return while_probing, await outcome(ask(one)), one.broken

    assert guarding(test) == ("resting", "ok", False)


def test_what_the_request_is_to_blame_for_does_not_open_the_breaker() -> None:
    async def test(mock: Mock, guarded: Callable[..., Guarded]) -> bool:
        one = guarded("mock?mode=status:400", failures_in_a_row=2)
        for _ in range(4):
            await outcome(ask(one))
        return one.broken

    assert guarding(test) is False


def test_those_who_wait_when_the_breaker_opens_are_told_at_once() -> None:
    async def test(mock: Mock, guarded: Callable[..., Guarded]) -> Any:
        one, began = guarded("mock?mode=status:500&first=0.3", failures_in_a_row=1), time.monotonic()
        return await asyncio.gather(*[outcome(ask(one)) for _ in range(6)]), time.monotonic() - began, idle(one)

    outcomes, took, was_idle = guarding(test, concurrent=1)
    assert outcomes == ["upstream_failed"] + ["resting"] * 5
    assert took < 1.5, "one after the other it would be 1.8 s"
    assert was_idle


def test_ready_asks_the_model_for_a_bounded_time() -> None:
    class Loading:
        name = "slow"

        async def ready(self) -> None:
            await asyncio.sleep(10)

    async def test() -> None:
        with pytest.raises(BackendError, match=r"not ready within 0\.1 s") as caught:
            await Guarded(Loading(), ServerConfig(first_token_s=0.1)).ready()  # type: ignore[arg-type]
        assert (caught.value.status, caught.value.code) == (503, "loading")

    asyncio.run(test())


def test_a_stream_that_just_stops_ends_with_an_error() -> None:
    class Stopping(Scripted):
        async def stream(
            self, messages: Sequence[ChatMessage], sampling: Sampling, seed: int
        ) -> AsyncGenerator[Chunk, None]:
            yield Chunk("so far")

    chunks = asyncio.run(hear(Guarded(Stopping(1), ServerConfig())))
    assert chunks == [Chunk("so far"), Chunk("", "error")]


class Scripted:
    """A model whose replies take as many turns of the event loop, and end, as their prompts say. It checks its load."""

    name = "scripted"

    def __init__(self, most: int) -> None:
        self.most, self.now, self.highest = most, 0, 0

    async def complete(self, messages: Sequence[ChatMessage], sampling: Sampling, seed: int, n: int = 1) -> list[Reply]:
        self.now += 1
        self.highest = max(self.highest, self.now)
        try:
            for _ in range(seed):
                await asyncio.sleep(0)
            if messages[0].content == "fail":
                raise BackendError("no", status=502, code="no")
        finally:
            self.now -= 1
        return [Reply("yes", "stop")] * n

    async def stream(
        self, messages: Sequence[ChatMessage], sampling: Sampling, seed: int
    ) -> AsyncGenerator[Chunk, None]:
        (reply,) = await self.complete(messages, sampling, seed)
        yield Chunk(reply.text)
        await asyncio.sleep(0)
        yield Chunk("", reply.finish)

    async def ready(self) -> None: ...

    async def close(self) -> None: ...


REQUESTS = st.lists(
    st.tuples(
        st.sampled_from(["ok", "ok", "fail"]), st.booleans(), st.integers(0, 5), st.none() | st.integers(0, 6),
        st.integers(0, 3),
    ),
    max_size=25,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(REQUESTS, st.integers(1, 4), st.integers(0, 6), st.integers(1, 5))
def test_places_are_neither_lost_nor_made(
    requests: list[tuple[str, bool, int, int | None, int]], concurrent: int, waiting: int, failures: int
) -> None:
    """Whatever comes, fails and leaves: never more than `concurrent` at once, and in the end every place is free."""
    model = Scripted(concurrent)
    guarded = Guarded(
        model, ServerConfig(concurrent=concurrent, waiting=waiting), failures_in_a_row=failures, rest_s=0.0
    )

    async def one(kind: str, streamed: bool, turns: int, leaves_after: int | None) -> None:
        messages = (ChatMessage(role="user", content=kind),)
        call: Any = guarded.complete(messages, PLAIN, turns)
        if streamed:
            call.close()
            call = _all(guarded.stream(messages, PLAIN, turns))
        task = asyncio.ensure_future(call)
        if leaves_after is not None:
            for _ in range(leaves_after):
                await asyncio.sleep(0)
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def everything() -> None:
        tasks = []
        for kind, streamed, turns, leaves_after, pause in requests:
            tasks.append(asyncio.create_task(one(kind, streamed, turns, leaves_after)))
            for _ in range(pause):
                await asyncio.sleep(0)
            assert guarded.running <= concurrent
            assert guarded.waiting <= waiting
        await asyncio.gather(*tasks)

    asyncio.run(everything())
    assert idle(guarded)
    assert guarded._probe is None
    assert model.highest <= concurrent
    assert guarded.counters.outcomes.total() <= len(requests)


async def _all(stream: AsyncGenerator[Chunk, None]) -> list[Chunk]:
    return [chunk async for chunk in stream]
