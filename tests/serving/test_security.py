"""Body limits, careful headers, request ids, origins, proxies, and logs without secrets."""

import asyncio
import logging
from collections.abc import Iterable
from typing import Any

import httpx2 as httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.logging import AccessFormatter

from characterflywheel.errors import FlywheelError
from characterflywheel.serving.security import (
    REQUEST_ID,
    BodyLimit,
    Redact,
    RequestIds,
    SecurityHeaders,
    allow_origins,
    believe_proxies,
    guard_logs,
    redacted,
)


async def length(request: Request) -> Response:
    return PlainTextResponse(str(len(await request.body())))


async def careless(request: Request) -> Response:
    """Reads a body as some frameworks do: whatever happens while reading is the client's fault, 400."""
    try:
        await request.body()
    except Exception:
        return PlainTextResponse("could not read", 400)
    return PlainTextResponse("read")


async def early(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers while it reads, until the body ends or the client is gone."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while (message := await receive())["type"] == "http.request":
        await send({"type": "http.response.body", "body": message["body"], "more_body": True})
        if not message["more_body"]:
            break
    await send({"type": "http.response.body"})


async def whose(request: Request) -> Response:
    host = request.client.host if request.client else None
    return JSONResponse(
        {"id": request.state.request_id, "same": REQUEST_ID.get(), "client": host, "scheme": request.url.scheme}
    )


async def own_policy(request: Request) -> Response:
    return PlainTextResponse("x", headers={"Cache-Control": "max-age=60"})


async def fails(request: Request) -> Response:
    raise RuntimeError("a bug")


APP = Starlette(
    routes=[
        Route("/length", length, methods=["POST"]),
        Route("/careless", careless, methods=["POST"]),
        Route("/whose", whose, methods=["GET", "POST"]),
        Route("/own", own_policy),
        Route("/fails", fails, methods=["GET", "POST"]),
    ]
)


def send(app: ASGIApp, method: str, path: str, base: str = "http://here", **more: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=base) as client:
            return await client.request(method, path, **more)

    return asyncio.run(ask())


async def streamed(pieces: Iterable[bytes]) -> Any:
    for piece in pieces:
        yield piece


def test_a_body_up_to_the_limit_passes_and_one_byte_more_does_not() -> None:
    app = BodyLimit(APP, 1000)
    assert send(app, "POST", "/length", content=b"x" * 1000).text == "1000"
    answer = send(app, "POST", "/length", content=b"x" * 1001)
    assert answer.status_code == 413
    assert answer.json()["error"] == {
        "message": "The body has more than 1000 bytes.", "type": "invalid_request_error", "code": "body_too_large",
        "param": None,
    }  # fmt: skip


@pytest.mark.parametrize("path", ["/length", "/careless", "/fails"])
def test_a_streamed_body_is_counted_as_it_comes(path: str) -> None:
    app = BodyLimit(APP, 1000)
    assert send(app, "POST", "/length", content=streamed([b"x" * 300] * 3)).text == "900"
    answer = send(app, "POST", path, content=streamed([b"x" * 300] * 100))
    assert answer.status_code == (500 if path == "/fails" else 413)  # which fails before it reads


def test_nothing_after_the_limit_is_read() -> None:
    taken = []

    def pieces() -> Iterable[bytes]:
        for n in range(100):
            taken.append(n)
            yield b"x" * 300

    assert send(BodyLimit(APP, 1000), "POST", "/length", content=streamed(pieces())).status_code == 413
    assert len(taken) <= 5


def test_a_wrong_content_length_does_not_pass() -> None:
    assert send(BodyLimit(APP, 10), "POST", "/length", headers={"content-length": "-1"}).status_code == 413
    assert send(BodyLimit(APP, 10), "POST", "/length", headers={"content-length": "9" * 400}).status_code == 413


def test_an_answer_that_has_begun_breaks_off_at_the_limit() -> None:
    answer = send(BodyLimit(early, 1000), "POST", "/early", content=streamed([b"x" * 300] * 100))
    assert answer.status_code == 200
    assert len(answer.content) == 900


def test_answers_tell_browsers_to_be_careful() -> None:
    headers = send(RequestIds(SecurityHeaders(APP)), "GET", "/whose").headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == "'self'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"
    assert "strict-transport-security" not in headers
    assert send(SecurityHeaders(APP), "GET", "/own").headers["cache-control"] == "max-age=60"
    assert send(SecurityHeaders(APP), "GET", "/fails").headers["x-frame-options"] == "DENY"
    secure = send(SecurityHeaders(APP), "GET", "/own", base="https://here").headers
    assert secure["strict-transport-security"] == "max-age=31536000"


def test_every_request_has_an_id() -> None:
    app = RequestIds(APP)
    first, second = send(app, "GET", "/whose"), send(app, "GET", "/whose")
    assert first.json()["id"] == first.json()["same"] == first.headers["x-request-id"]
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    assert send(app, "GET", "/whose", headers={"X-Request-Id": "abc-1.2_3"}).json()["id"] == "abc-1.2_3"
    for bad in ("x" * 65, "a b", "<script>", "é"):
        assert send(app, "GET", "/whose", headers={"X-Request-Id": bad.encode()}).headers["x-request-id"] != bad  # type: ignore[dict-item]
    assert REQUEST_ID.get() is None


def test_other_origins_are_let_in_by_name_only() -> None:
    asking = {"Origin": "https://app.example.org"}
    assert allow_origins(APP, []) is APP
    assert "access-control-allow-origin" not in send(APP, "GET", "/own", headers=asking).headers
    app = allow_origins(APP, ["https://app.example.org"])
    allowed = send(app, "GET", "/own", headers=asking).headers
    assert allowed["access-control-allow-origin"] == "https://app.example.org"
    assert "access-control-allow-credentials" not in allowed
    for other in ("https://app.example.org.evil.org", "http://app.example.org", "null"):
        assert "access-control-allow-origin" not in send(app, "GET", "/own", headers={"Origin": other}).headers
    for wrong in ("*", "app.example.org", "https://app.example.org/", "https://*.example.org/x"):
        with pytest.raises(FlywheelError, match="must be exactly an origin"):
            allow_origins(APP, [wrong])


def test_only_trusted_proxies_say_who_the_client_is() -> None:
    said = {"X-Forwarded-For": "6.6.6.6, 9.9.9.9", "X-Forwarded-Proto": "https"}

    def client(proxies: list[str]) -> tuple[str, str]:
        found = send(RequestIds(believe_proxies(APP, proxies)), "GET", "/whose", headers=said).json()
        return found["client"], found["scheme"]

    assert client([]) == ("127.0.0.1", "http")
    assert client(["10.0.0.1"]) == ("127.0.0.1", "http")
    assert client(["127.0.0.0/8"]) == ("9.9.9.9", "https")  # what stands before it is the client's own claim
    with pytest.raises(FlywheelError, match="anybody"):
        believe_proxies(APP, ["*"])


KEY = "fw_0123456789abcdef_" + "S" * 43


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (f"Authorization: Bearer {KEY}", "Authorization: Bearer [secret]"),
        (f"b'authorization', b'Bearer {KEY}')", "b'authorization', b'Bearer [secret]')"),
        (f"GET /?key={KEY}&x=1", "GET /?key=[secret]&x=1"),
        ("Cookie: flywheel_session=abc.1.def; other=1", "Cookie: flywheel_session=[secret]; other=1"),
        ("__Host-flywheel_session=abc", "__Host-flywheel_session=[secret]"),
        ("upstream key sk-abcdefgh123", "upstream key [secret]"),
        ("the bearer of bad news", "the bearer [secret] bad news"),
        ("nothing here", "nothing here"),
    ],
)
def test_secrets_are_taken_out_of_a_text(text: str, clean: str) -> None:
    assert redacted(text) == clean


def test_no_log_shows_a_secret(capsys: pytest.CaptureFixture[str]) -> None:
    handler, logger = logging.StreamHandler(), logging.getLogger("test.redaction")
    handler.setFormatter(logging.Formatter("%(request_id)s %(message)s"))
    handler.addFilter(Redact())
    logger.addHandler(handler)
    logger.propagate = False
    try:
        logger.warning("key %s", KEY)
        logger.warning("headers %r", {"authorization": f"Bearer {KEY}"})
        logger.warning("headers %(authorization)s", {"authorization": KEY})
        logger.warning(f"{KEY} %d", "no number")
        try:
            raise ValueError(f"bad key {KEY}")
        except ValueError:
            logger.exception("failed")
        logger.warning("plain %s", 1)
    finally:
        logger.removeHandler(handler)
    shown = capsys.readouterr().err
    assert "SSSS" not in shown
    assert shown.count("[secret]") == 5
    assert "ValueError: bad key [secret]" in shown
    assert "None plain 1" in shown


def test_uvicorn_s_own_lines_pass_the_filter(capsys: pytest.CaptureFixture[str]) -> None:
    handler, logger = logging.StreamHandler(), logging.getLogger("uvicorn.access")
    handler.setFormatter(AccessFormatter("%(client_addr)s %(request_line)s %(status_code)s", use_colors=False))
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(logging.INFO)  # a server that an earlier test started in this process may have silenced it
    try:
        guard_logs(["uvicorn.access"])
        guard_logs(["uvicorn.access"])
        assert len(handler.filters) == 1
        logger.warning('%s - "%s %s HTTP/%s" %d', "1.2.3.4:5", "GET", f"/?key={KEY}", "1.1", 200)
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)
    assert capsys.readouterr().err == "1.2.3.4:5 GET /?key=[secret] HTTP/1.1 200 OK\n"
