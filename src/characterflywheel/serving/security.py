"""What every request passes before and after the routes: size, headers, an id, other origins, and what a log may say.

Pure ASGI middlewares, each of a few microseconds (DESIGN section 10, HTTP; PAPER section 9 for failing closed).
"""

import json
import logging
import re
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from ..errors import FlywheelError
from ..ids import uuid7

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the request that is being answered; it is also in `request.state.request_id` and in the answer."""

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "font-src 'self'; manifest-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}
_RAW_HEADERS = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
_HSTS = (b"strict-transport-security", b"max-age=31536000")
_WELL_FORMED_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SECRETS = re.compile(
    r"(?P<scheme>\bBearer\s+)[^\s'\",;]+"
    r"|\bfw_[0-9a-f]{16}_[A-Za-z0-9_-]+"
    r"|\bsk-[A-Za-z0-9_-]{8,}"
    r"|(?P<cookie>flywheel_session=)[^\s;'\",]+",
    re.IGNORECASE,
)

_CONTROL = re.compile(rb"%[01][0-9a-fA-F]|%7[fF]")


class BodyLimit:
    """Refuses bodies above `most` bytes with 413: by Content-Length before anything is read, else as they come.

    `larger` gives paths that begin so another bound.
    """

    def __init__(self, app: ASGIApp, most: int, larger: Mapping[str, int] | None = None) -> None:
        self.app, self.most, self.larger = app, most, dict(larger or {})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        most = next((bound for begin, bound in self.larger.items() if path.startswith(begin)), self.most)
        said = next((value for name, value in scope["headers"] if name == b"content-length"), None)
        if said is not None and (not said.isdigit() or int(said) > most):
            await _refuse(send, most)
            return
        read, over, begun = 0, False, False

        async def counted() -> Message:
            nonlocal read, over
            message = await receive()
            if message["type"] == "http.request":
                read += len(message.get("body", b""))
                if read > most:
                    over = True
                    return {
                        "type": "http.disconnect"
                    }  # nothing more is read, and what the route makes of it is dropped
            return message

        async def sent(message: Message) -> None:
            nonlocal begun
            if over and not begun:
                return
            begun = True
            await send(message)

        try:
            await self.app(scope, counted, sent)
        except Exception:
            if not over or begun:
                raise
        if over and not begun:
            await _refuse(send, most)


async def _refuse(send: Send, most: int) -> None:
    for message in _error(413, "body_too_large", f"The body has more than {most} bytes."):
        await send(message)


class SecurityHeaders:
    """Adds the headers that make browsers careful; a header that the route has set stays as it is."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        secure = scope.get("scheme") == "https"

        async def careful(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                own = {name for name, _ in headers}
                headers += [pair for pair in _RAW_HEADERS if pair[0] not in own]
                if secure:
                    headers.append(_HSTS)
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, careful)


class PlainAddresses:
    """Refuses addresses with control characters with 400: no database is asked about them, and no log holds them."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (
            any(character < " " for character in scope["path"]) or _CONTROL.search(scope.get("query_string", b""))
        ):
            for message in _error(400, "invalid_address", "The address holds control characters."):
                await send(message)
            return
        await self.app(scope, receive, send)


class RequestIds:
    """Gives every request an id, the client's own where it sent a well-formed one, and tells it in `X-Request-Id`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        said = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        id = said if _WELL_FORMED_ID.fullmatch(said) else uuid7()
        scope.setdefault("state", {})["request_id"] = id
        token = REQUEST_ID.set(id)

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = id
            await send(message)

        try:
            await self.app(scope, receive, named)
        finally:
            REQUEST_ID.reset(token)


def allow_origins(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Let pages of exactly these origins use the API with keys; none by default. Cookies never cross origins.

    Raises:
        FlywheelError: an origin is not `scheme://host[:port]`; `*` is not taken.
    """
    for origin in origins:
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https") or not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}":
            raise FlywheelError(f"cors_origins: {origin!r} must be exactly an origin, e.g. https://app.example.org.")
    if not origins:
        return app
    return CORSMiddleware(
        app, allow_origins=list(origins), allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
        allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "X-Flywheel-User", "X-Request-Id"],
        expose_headers=["X-Request-Id", "Retry-After"], max_age=600,
    )  # fmt: skip


def believe_proxies(app: ASGIApp, proxies: Sequence[str]) -> ASGIApp:
    """Take the client's address and scheme from `X-Forwarded-For` and `-Proto` where one of these proxies says them.

    `proxies` are addresses or networks. Run uvicorn with `proxy_headers=False`, for it believes this machine's own.

    Raises:
        FlywheelError: `*`, which would believe anybody.
    """
    if "*" in proxies:
        raise FlywheelError("trusted_proxies: '*' would believe anybody; name addresses or networks, e.g. 10.0.0.0/8.")
    if not proxies:
        return app
    return ProxyHeadersMiddleware(app, trusted_hosts=list(proxies))  # type: ignore[arg-type,return-value]


def redacted(text: str) -> str:
    """The text without API keys, bearer tokens and session cookies."""
    return _SECRETS.sub(lambda found: f"{found['scheme'] or found['cookie'] or ''}[secret]", text)


class Redact(logging.Filter):
    """Removes secrets from what is logged, tracebacks included, and adds `request_id` to the record."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = REQUEST_ID.get()
        if record.exc_info and not record.exc_text:
            record.exc_text = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
        if record.exc_text:
            record.exc_text = redacted(record.exc_text)
        if record.stack_info:
            record.stack_info = redacted(record.stack_info)
        try:
            message = record.getMessage()
        except (TypeError, ValueError):  # the handler would print the arguments to say that they do not fit
            record.msg, record.args = f"{redacted(str(record.msg))} (arguments that do not fit)", ()
            return True
        if (clean := redacted(message)) != message:
            arguments = record.args if isinstance(record.args, tuple) else ()
            # uvicorn's formatter of access lines unpacks its arguments, so they stay where mending them is enough
            record.args = tuple(redacted(one) if isinstance(one, str) else one for one in arguments)
            if not arguments or redacted(text := record.getMessage()) != text:
                record.msg, record.args = clean, ()
        return True


def guard_logs(names: Iterable[str] = ("", "uvicorn", "uvicorn.error", "uvicorn.access")) -> None:
    """Put `Redact` before every handler of these loggers, so that whatever they write passes it."""
    for name in names:
        for handler in logging.getLogger(name or None).handlers:
            if not any(isinstance(one, Redact) for one in handler.filters):
                handler.addFilter(Redact())


def _error(status: int, code: str, message: str) -> list[Message]:
    """An answer in the shape of every error (`serving.errors`), ready to be sent; the connection is closed."""
    detail = {"message": message, "type": "invalid_request_error", "code": code, "param": None}
    body = json.dumps({"error": detail}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    return [
        {"type": "http.response.start", "status": status, "headers": headers},
        {"type": "http.response.body", "body": body},
    ]
