"""A model server on the other end of kept-open connections, and a name for everything that can go wrong with it.

Whatever the server does ends in bytes or in a `BackendError`. The key is read from the environment once and appears
nowhere else: not in messages, not in what an error keeps for the log, nor in a chain of exceptions.
"""

import asyncio
import math
import os
import time
from collections.abc import AsyncGenerator

import aiohttp
from yarl import URL

from ..addresses import refuse_password
from ..config import ServerConfig
from ..errors import FlywheelError
from .replies import BackendBusy, BackendError

CONNECT_S = 5.0
STALE_S = 0.5  # a kept connection that the server has closed meanwhile shows at once
LEFTOVER_S = 0.05  # how long the end of an answer may lag behind its last event
MOST_BYTES = 8 * 2**20
_BROKEN = (aiohttp.ClientError, TimeoutError, OSError)


class Upstream:
    """An OpenAI-compatible server: its address, the key, and a pool of connections that opens with the first request.

    `base` ends where `/chat/completions` follows; `timeout_s` is the longest silence that is borne.
    """

    def __init__(self, base: str, *, key: str | None = None, timeout_s: float = 60.0) -> None:
        """Raises:
        FlywheelError: `base` is no http address or holds a password, or the key cannot be sent.
        """
        refuse_password(base, "server.endpoint", "that server.endpoint_key_env names")
        url = URL(base)
        if url.scheme not in ("http", "https") or not url.host:
            raise FlywheelError(f"server.endpoint = {base!r} is no address such as http://HOST:8000/v1.")
        key = (key or "").strip()
        if not (key.isascii() and key.isprintable()):
            raise FlywheelError("the endpoint's key has characters that cannot be sent: set the variable again.")
        self._chat, self._models = url / "chat" / "completions", url / "models"
        self._key, self._timeout_s = key, timeout_s
        self._session: aiohttp.ClientSession | None = None

    @classmethod
    def from_config(cls, server: ServerConfig) -> "Upstream":
        key = os.environ.get(server.endpoint_key_env)
        return cls(server.endpoint or "", key=key, timeout_s=server.timeout_s)

    async def chat(self, body: bytes) -> aiohttp.ClientResponse:
        """The answer to a chat request, with status 200; the caller releases it.

        A connection that the server closed while it was idle is noticed by writing to it; then another one is tried.
        """
        for attempt in (1, 2):
            began = time.monotonic()
            try:
                response = await self._pool.post(self._chat, data=body, allow_redirects=False)
            except _BROKEN as error:
                if attempt == 1 and _dropped(error) and time.monotonic() - began < STALE_S:
                    continue
                raise self.trouble(error) from None
            if response.status == 200:
                return response
            raise await self._refusal(response)
        raise AssertionError("the second attempt returns or raises")

    async def models(self) -> bytes | None:
        """The server's list of models; None from a server that has none."""
        try:
            response = await self._pool.get(self._models, allow_redirects=False)
        except _BROKEN as error:
            raise self.trouble(error) from None
        if response.status in (404, 405):
            response.release()
            return None
        if response.status != 200:
            raise await self._refusal(response)
        return await self.whole(response)

    async def whole(self, response: aiohttp.ClientResponse) -> bytes:
        """All of an answer's bytes."""
        blocks = bytearray()
        async for block in self.blocks(response):
            blocks += block
        return bytes(blocks)

    async def blocks(self, response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
        """An answer's bytes as they arrive; releases it, which drops the connection where something is left."""
        size = 0
        try:
            async for block in response.content.iter_any():
                size += len(block)
                if size > MOST_BYTES:
                    raise self.garbage(f"more than {MOST_BYTES} bytes")
                yield block
        except _BROKEN as error:
            raise self.trouble(error) from None
        finally:
            response.release()

    async def close(self) -> None:
        if self._session:
            await self._session.close()

    def trouble(self, error: Exception) -> BackendError:
        """What a failed exchange is called. It is not chained: some of aiohttp's errors carry the request's headers."""
        detail = self._harmless(f"{self._chat.host}: {type(error).__name__}: {error}")
        if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            message = "the model server cannot be reached: start it, or correct server.endpoint."
            return BackendError(message, status=503, code="upstream_unreachable", detail=detail)
        if isinstance(error, TimeoutError):
            message = f"the model server was silent for {self._timeout_s:g} s."
            return BackendError(message, status=504, code="upstream_timeout", detail=detail)
        message = "the model server dropped the connection before its reply was complete."
        return BackendError(message, status=502, code="upstream_disconnected", detail=detail)

    def garbage(self, said: object) -> BackendError:
        """The error for an answer that cannot be read."""
        return BackendError(
            "the model server's answer cannot be read: is server.endpoint an OpenAI-compatible server?",
            status=502, code="upstream_garbage", detail=self._harmless(str(said)[:300]),
        )  # fmt: skip

    def failed(self, said: object) -> BackendError:
        """The error for a server that reports one in the middle of a reply."""
        detail = self._harmless(str(said)[:300])
        return BackendError("the model server failed.", status=502, code="upstream_failed", detail=detail)

    @property
    def _pool(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            authorization = {"Authorization": f"Bearer {self._key}"} if self._key else {}
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),  # the guard limits
                headers={"Content-Type": "application/json", "Accept-Encoding": "identity", **authorization},
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=self._timeout_s),
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("User-Agent",),
            )
        return self._session

    async def _refusal(self, response: aiohttp.ClientResponse) -> BackendError:
        """What a status other than 200 is called; what the server says goes to the log."""
        try:
            async with asyncio.timeout(1):
                said = (await response.content.read(2048)).decode(errors="replace")
        except _BROKEN:
            said = ""
        finally:
            response.release()
        status, later = response.status, _seconds(response.headers.get("Retry-After"))
        detail = self._harmless(f"status {status}: {said[:300]}")
        if status == 429:
            message = "the model server has too much to do: come back later."
            return BackendBusy(message, retry_after=later or 1.0, code="upstream_busy", detail=detail)
        answer, code, message = _REFUSALS.get(status, (502, "upstream_failed", f"the model server answered {status}."))
        blamed = code != "upstream_rejected"
        return BackendError(message, status=answer, code=code, retry_after=later, detail=detail, blames_backend=blamed)

    def _harmless(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


_KEY = (
    502,
    "upstream_key",
    "the model server does not accept the key: set the variable server.endpoint_key_env names.",
)
_SLOW = (504, "upstream_timeout", "the model server gave up waiting for its reply.")
_REQUEST = (
    502,
    "upstream_rejected",
    "the model server does not accept this request; it may be too long for the model.",
)
_REFUSALS: dict[int, tuple[int, str, str]] = {
    400: _REQUEST, 413: _REQUEST, 422: _REQUEST, 401: _KEY, 403: _KEY, 408: _SLOW, 504: _SLOW,
    404: (503, "model_missing", "the model server has no such model: serve it there, or set server.endpoint_model."),
    503: (503, "upstream_unavailable", "the model server is not available: come back later."),
}  # fmt: skip


def _dropped(error: Exception) -> bool:
    """Whether a connection that stood was closed by the other side."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return False
    return isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError | ConnectionError)


def _seconds(header: str | None) -> float | None:
    """Retry-After in seconds; None where it is absent or a date."""
    try:
        seconds = float(header or "")
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None
