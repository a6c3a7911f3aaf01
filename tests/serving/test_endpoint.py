"""The endpoint against a server that is really started, on real sockets, and misbehaves in every way it knows."""

import asyncio
import gc
import json
import logging
import socket
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_server import Mock, Settings, serving

from characterflywheel.config import ServerConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.llm.base import Sampling
from characterflywheel.records import ChatMessage
from characterflywheel.serving.endpoint import Endpoint, _Told
from characterflywheel.serving.replies import BackendBusy, BackendError, Chunk, Reply
from characterflywheel.serving.upstream import Upstream

ASKED = (ChatMessage(role="system", content="You are Mo."), ChatMessage(role="user", content="Good evening, “Mo” ☂"))
SAMPLING = Sampling(temperature=0.7, top_p=0.9, max_tokens=40)
SAID = "The lamp is lit and the sea"
SEVEN = Settings(words=7)


def asking(test: Callable[[Mock, Upstream], Awaitable[Any]], mock: Any = None, key: str = "") -> Any:
    """The result of `test` against a started server."""
    mock = mock or Mock(SEVEN)

    async def bounded() -> Any:
        async with asyncio.timeout(10), serving(mock) as address:
            upstream = Upstream(address, key=key, timeout_s=0.5)
            try:
                return await test(mock, upstream)
            finally:
                await upstream.close()

    return asyncio.run(bounded())


async def hear(endpoint: Endpoint, text: list[str]) -> None:
    async with aclosing(endpoint.stream(ASKED, SAMPLING, 0)) as stream:
        async for chunk in stream:
            text.append(chunk.text)


async def chunks(endpoint: Endpoint) -> list[Chunk]:
    return [chunk async for chunk in endpoint.stream(ASKED, SAMPLING, 5)]


def test_what_is_asked_and_what_is_answered() -> None:
    async def test(mock: Mock, upstream: Upstream) -> Any:
        return await Endpoint("mock", upstream).complete(ASKED, SAMPLING, 2**40 + 5), mock.last, mock.headers

    replies, body, headers = asking(test, key="sk-1")
    assert replies == [Reply(SAID, "stop", 7, 7)]
    assert body == {
        "model": "mock", "temperature": 0.7, "top_p": 0.9, "max_tokens": 40, "seed": 5,
        "messages": [{"role": "system", "content": "You are Mo."}, {"role": "user", "content": "Good evening, “Mo” ☂"}],
    }  # fmt: skip
    assert headers["Authorization"] == "Bearer sk-1"
    assert headers["Content-Type"] == "application/json"


def test_a_stream_has_the_same_words_and_one_end() -> None:
    async def test(mock: Mock, upstream: Upstream) -> Any:
        return await chunks(Endpoint("mock?piece=0.01", upstream)), mock.last

    got, body = asking(test)
    assert "".join(chunk.text for chunk in got) == SAID
    assert len(got) > 4, "pieces are given on as they come"
    assert got[-1] == Chunk("", "stop", 7, 7)
    assert all(chunk.finish is None for chunk in got[:-1])
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}


def test_drafts_are_asked_for_together() -> None:
    async def test(mock: Mock, upstream: Upstream) -> Any:
        return await Endpoint("mock", upstream).complete(ASKED, SAMPLING, 0, n=3), mock.last["n"], mock.counts["ok"]

    assert asking(test) == ([Reply(SAID, "stop", 7, None)] * 3, 3, 1)


def test_a_server_that_knows_no_drafts_is_asked_again() -> None:
    class Single(Mock):  # type: ignore[misc, valid-type]
        def _whole(self, body: dict[str, Any], now: Any) -> Any:
            return super()._whole(body | {"n": 1}, now)

    async def test(mock: Mock, upstream: Upstream) -> Any:
        return await Endpoint("mock", upstream).complete(ASKED, SAMPLING, 5, n=3), mock.counts["ok"], mock.last["seed"]

    replies, requests, seed = asking(test, Single(SEVEN))
    assert len(replies) == requests == 3
    assert seed == 7, "another seed each time"


FAILURES = {
    "status:400": (502, "upstream_rejected"), "status:401": (502, "upstream_key"), "status:404": (503, "model_missing"),
    "status:429": (429, "upstream_busy"), "status:500": (502, "upstream_failed"),
    "status:302": (502, "upstream_failed"),
    "status:503": (503, "upstream_unavailable"), "status:504": (504, "upstream_timeout"),
    "reset": (502, "upstream_disconnected"), "crash": (502, "upstream_disconnected"),
    "truncated": (502, "upstream_disconnected"), "garbage": (502, "upstream_garbage"),
    "unusable": (502, "upstream_garbage"), "hang": (504, "upstream_timeout"), "failing": (502, "upstream_failed"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "streamed"),
    [*((mode, True) for mode in FAILURES), *((mode, False) for mode in FAILURES if mode != "failing")],
)
def test_every_failure_is_an_error_with_its_name(mode: str, streamed: bool) -> None:
    """And the next request is served, over the same pool."""

    async def test(mock: Mock, upstream: Upstream) -> Any:
        broken, text = Endpoint(f"mock?mode={mode}", upstream), []
        call = hear(broken, text) if streamed else broken.complete(ASKED, SAMPLING, 0)
        with pytest.raises(BackendError) as caught:
            await call
        return caught.value, "".join(text), await Endpoint("mock", upstream).complete(ASKED, SAMPLING, 0)

    error, text, after = asking(test)
    assert (error.status, error.code) == FAILURES[mode]
    assert error.__cause__ is None
    assert after[0].text == SAID
    assert error.blames_backend is (mode not in ("status:400", "status:429"))
    if streamed and mode in ("crash", "truncated", "failing"):
        assert text == "The lamp is", "what came before is given on"
    if mode == "status:429":
        assert isinstance(error, BackendBusy)
        assert error.retry_after == 7.0


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]

        async def test() -> list[BackendError]:
            upstream = Upstream(f"http://127.0.0.1:{port}/v1")
            endpoint, errors = Endpoint("mock", upstream), []
            for call in (endpoint.complete(ASKED, SAMPLING, 0), chunks(endpoint), endpoint.ready()):
                with pytest.raises(BackendError, match=r"start it, or correct server\.endpoint") as caught:
                    await call
                errors.append(caught.value)
            await upstream.close()
            return errors

        assert {(e.status, e.code) for e in asyncio.run(test())} == {(503, "upstream_unreachable")}


def test_a_connection_that_went_stale_is_replaced() -> None:
    async def test(mock: Mock, upstream: Upstream) -> Any:
        return await Endpoint("mock?mode=refused:1", upstream).complete(ASKED, SAMPLING, 0), mock.counts

    replies, counts = asking(test)
    assert replies[0].text == SAID
    assert counts["refused:1"] == 2


def test_connections_are_kept_also_after_streams() -> None:
    ports: set[int] = set()

    class Watched(Mock):  # type: ignore[misc, valid-type]
        async def chat(self, request: Any) -> Any:
            ports.add(request.transport.get_extra_info("peername")[1])
            return await super().chat(request)

    async def test(mock: Mock, upstream: Upstream) -> None:
        endpoint = Endpoint("mock", upstream)
        for _ in range(5):
            await endpoint.complete(ASKED, SAMPLING, 0)
            await chunks(endpoint)
            with pytest.raises(BackendError):
                await Endpoint("mock?mode=status:500", upstream).complete(ASKED, SAMPLING, 0)

    asking(test, Watched(SEVEN))
    assert len(ports) == 1


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_leaving_stops_the_server_too(streamed: bool) -> None:
    async def test(mock: Mock, upstream: Upstream) -> int:
        if streamed:
            stream = Endpoint("mock?piece=0.1", upstream).stream(ASKED, SAMPLING, 0)
            await anext(stream)
            await stream.aclose()
        else:
            task = asyncio.create_task(Endpoint("mock?first=5", upstream).complete(ASKED, SAMPLING, 0))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        for _ in range(300):
            if mock.counts["left"]:
                break
            await asyncio.sleep(0.01)
        return int(mock.counts["left"])

    assert asking(test) == 1


def test_ready_says_what_is_missing() -> None:
    async def test(mock: Mock, upstream: Upstream) -> None:
        await Endpoint("mock", upstream).ready()
        with pytest.raises(
            BackendError, match=r"no model 'gen3', it has mock, other: .*server\.endpoint_model"
        ) as caught:
            await Endpoint("gen3", upstream).ready()
        assert (caught.value.status, caught.value.code) == (503, "model_missing")

    asking(test, Mock(SEVEN, models=("mock", "other")))


def test_the_key_is_nowhere(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that repeats the key in its error, and one that drops the connection."""
    key = "sk-very-secret-123"
    monkeypatch.setenv("KEY", f"{key}\n")
    caplog.set_level(logging.DEBUG)

    async def test() -> list[BackendError]:
        errors = []
        async with serving(Mock(Settings(mode="status:401"))) as address:
            upstream = Upstream.from_config(ServerConfig(endpoint=address, endpoint_key_env="KEY"))
            for name in (f"mock?mode=status:500&{key}", "mock?mode=reset", "mock?mode=garbage"):
                with pytest.raises(BackendError) as caught:
                    await Endpoint(name, upstream).complete(ASKED, SAMPLING, 0)
                errors.append(caught.value)
            errors += [upstream.garbage(f"header: Bearer {key}"), upstream.failed({"said": key})]
            logging.getLogger("test").error("%r", upstream, exc_info=errors[0])
            await upstream.close()
        return errors

    errors = asyncio.run(test())
    said = " ".join(f"{e!r} {e} {e.detail} {e.__cause__!r}" for e in errors) + caplog.text
    assert key not in said
    assert "***" in said


def test_addresses_and_keys_that_cannot_be() -> None:
    for base in ("localhost:8000", "ftp://host/v1", "/v1", ""):
        with pytest.raises(FlywheelError, match="is no address such as"):
            Upstream(base)
    with pytest.raises(FlywheelError, match="characters that cannot be sent") as caught:
        Upstream("http://host/v1", key="schlüssel\n1")
    assert "schl" not in str(caught.value)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["choices", "message", "delta", "content", "usage", "error", "x"]), inner)
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.one_of(ANYTHING.map(lambda value: json.dumps(value).encode()), st.binary(max_size=30)))
def test_whatever_is_answered_is_a_reply_or_an_error(said: bytes) -> None:
    endpoint = Endpoint("mock", Upstream("http://127.0.0.1:1/v1"))
    with suppress(BackendError):
        assert all(isinstance(reply.text, str) for reply in endpoint._replies(said))
    told = _Told()
    assert isinstance(endpoint._text([b"data: " + said], told), str)
    assert told.error is None or told.error.code in ("upstream_garbage", "upstream_failed")


def test_an_endless_answer_is_cut() -> None:
    class Endless(Mock):  # type: ignore[misc, valid-type]
        async def _answer(self, request: Any, body: Any, now: Any) -> Any:
            from aiohttp import web  # noqa: PLC0415

            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            while True:
                await response.write(b"x" * 2**20)

    async def test(mock: Mock, upstream: Upstream) -> None:
        with pytest.raises(BackendError) as caught:
            await chunks(Endpoint("mock", upstream))
        assert caught.value.code == "upstream_garbage"

    asking(test, Endless(SEVEN))
    gc.collect()
