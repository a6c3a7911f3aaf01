"""Who asks: the principal behind a request, the user it speaks for, and whether both may ask again already."""

import hashlib
import time
from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, Request

from ..records import User
from .auth import Principal, Unauthorized
from .durable import ask
from .errors import ApiError
from .hub import Hub


async def hub_of(request: Request) -> Hub:  # async, or FastAPI would run it in a thread
    hub: Hub = request.app.state.hub
    return hub


def may(scope: str) -> Callable[[Request], Awaitable[Principal]]:
    """A dependency that lets in whoever has `scope` (or `admin`), within the key's rate limit.

    Raises:
        ApiError: 401 without a valid key or session, 403 without the scope, 429 above the rate.
    """

    async def principal(request: Request) -> Principal:
        hub = await hub_of(request)
        try:
            found = hub.authenticator.authenticate(request.headers, request.cookies, request.method)
        except Unauthorized as error:
            if error.code != "invalid_api_key" or not hub.authenticator.may_look_again:
                raise
            async with hub.reading_keys:
                if hub.authenticator.may_look_again:
                    await ask(hub.authenticator.reload)
            found = hub.authenticator.authenticate(request.headers, request.cookies, request.method)
        found.require(scope)
        _within(hub, "key", found.id)
        return found

    return principal


_REMEMBER_SECONDS, _REMEMBER_USERS = 30.0, 4_000
Chatting = Annotated[Principal, Depends(may("chat"))]
Creating = Annotated[Principal, Depends(may("characters"))]
Reviewing = Annotated[Principal, Depends(may("review"))]
Experimenting = Annotated[Principal, Depends(may("experiments"))]
Shared = Annotated[Hub, Depends(hub_of)]


def named_in(request: Request) -> str | None:
    """The user whom a request names outside its body."""
    header = request.headers.get("x-flywheel-user")
    if header is None:
        return request.query_params.get("user")
    try:
        return header.encode("latin-1").decode()  # HTTP reads headers as latin-1, clients write UTF-8
    except UnicodeDecodeError as error:
        raise ApiError(400, "invalid_user", "X-Flywheel-User must be UTF-8.", "user") from error


async def user_of(hub: Hub, request: Request, principal: Principal, named: str | None = None) -> User:
    """The user that a request speaks for: the principal's own, or for an application's key whom the request names.

    Raises:
        ApiError: 403 where a bound key or a session names somebody else, 429 above the user's rate.
    """
    id = principal.speaks_for(named or named_in(request))
    if len(id) > 128 or not id.isprintable():
        raise ApiError(400, "invalid_user", "A user's id has at most 128 printable characters.", "user")
    if id != f"key-{principal.id}":  # an application that names nobody is limited as a key
        _within(hub, "user", id)
    now = time.monotonic()
    recent = hub.users.get(id)
    if recent is not None and now - recent[1] < _REMEMBER_SECONDS:
        return recent[0]
    user = await ask(hub.store.user, id) or User(
        id=id, population="user", consent=hub.config.server.consent, created_at=hub.clock()
    )  # fmt: skip
    if len(hub.users) >= _REMEMBER_USERS:
        hub.users.clear()
    hub.users[id] = (user, now)
    return user


async def harmless_name(hub: Hub, name: str | None) -> str:
    """The name by which a character calls the user: theirs, unless safety does not let it pass."""
    usual = "User"
    if name is None or name == usual or not (await hub.moderator.check(name, subject="prompt")).allowed:
        return usual
    return name


def key_of(request: Request, principal: str, user: User) -> str | None:
    """The digest of a request's idempotency key, for this principal and user alone; None where it has none."""
    given = request.headers.get("idempotency-key")
    if given is None:
        return None
    if not 1 <= len(given) <= 255:
        raise ApiError(400, "invalid_request", "An Idempotency-Key has 1 to 255 characters.", "Idempotency-Key")
    return hashlib.sha256(f"{principal}\x1f{user.id}\x1f{given}".encode()).hexdigest()


def _within(hub: Hub, what: str, id: str) -> None:
    limits = hub.key_limits if what == "key" else hub.user_limits
    seconds = limits.take(id)
    if seconds is not None:
        hub.metrics.limited.labels(what).inc()
        raise ApiError(
            429, "rate_limited", f"Too many requests of this {what}: come back in {seconds:.1f} s.",
            headers={"Retry-After": f"{max(1, round(seconds + 0.5))}"},
        )  # fmt: skip
