"""For balancers, orchestrators and Prometheus: alive, ready, measured. And the web page's session."""

import asyncio
from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from ..errors import FlywheelError
from .auth import refuse_other_sites
from .backends import BackendError
from .durable import ask
from .errors import ApiError
from .hub import Hub
from .schemas import Health, MeView
from .who import Shared

router = APIRouter(tags=["operations"])
_SECONDS = 5.0


@router.get("/healthz")
async def healthz() -> Health:
    """Whether the process answers at all."""
    return Health(status="ok")


@router.get("/readyz", responses={503: {"model": Health}})
async def readyz(hub: Shared, response: Response) -> Health:
    """Whether people can talk now: store, journal, model, safety and characters, each in a word or a sentence."""
    parts: dict[str, Callable[[], Awaitable[None]]] = {
        "store": lambda: _store(hub), "model": lambda: hub.backends.get(hub.backends.default).ready(),
        "safety": hub.moderator.ready, "characters": lambda: _characters(hub),
    }  # fmt: skip
    said = await asyncio.gather(*(_asked(part) for part in parts.values()))
    checks = dict(zip(parts, said, strict=True))
    well = all(word == "ok" for word in said)
    response.status_code = 200 if well else 503
    return Health(status="ok" if well else "unavailable", checks=checks)


@router.get("/metrics", response_class=Response)
async def metrics(hub: Shared) -> Response:
    """Counters for Prometheus."""
    return Response(hub.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.post("/v1/session")
async def session(request: Request, hub: Shared, response: Response) -> MeView:
    """An anonymous visitor of the web page: sets a cookie that only this service can sign, or renews it."""
    if not hub.config.server.web:
        raise ApiError(404, "not_found", "There is no web page here: server.web is off.")
    refuse_other_sites(request.method, request.headers)
    address = request.client.host if request.client else "unknown"
    if (seconds := hub.user_limits.take(f"address {address}")) is not None:
        raise ApiError(429, "rate_limited", "Too many sessions.", headers={"Retry-After": f"{seconds + 1:.0f}"})
    secure = request.url.scheme == "https"
    try:
        principal = hub.authenticator.authenticate({}, request.cookies, "GET")
        cookie = hub.authenticator.renewal(request.cookies, secure)
    except ApiError:  # no session, or one that has ended: a new one
        principal, cookie = hub.authenticator.new_session(secure)
    if cookie:
        response.headers["set-cookie"] = cookie
    assert principal.user_id
    user = await ask(hub.store.user, principal.user_id)
    return MeView(id=principal.user_id, consent=user.consent if user else hub.config.server.consent)


async def _asked(part: Callable[[], Awaitable[None]]) -> str:
    """ok, or why not. A boundary: whatever a part raises is what people are told."""
    try:
        async with asyncio.timeout(_SECONDS):
            await part()
    except TimeoutError:
        return f"no answer within {_SECONDS:g} s"
    except (BackendError, FlywheelError, OSError) as error:
        return str(error)
    return "ok"


async def _store(hub: Hub) -> None:
    await ask(hub.store.position)
    if hub.journal.trouble:
        raise FlywheelError(hub.journal.trouble)


async def _characters(hub: Hub) -> None:
    if not await hub.cast.approved():
        raise FlywheelError("no character is approved: see `flywheel characters list`.")
