"""The chat service over HTTP: its parts, opened in order and closed in reverse, and its routes (DESIGN section 10).

Stateless but for caches of seconds: any number of processes may serve one PostgreSQL store behind a balancer.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp

from .. import __version__
from ..config import FlywheelConfig, ServerConfig
from ..errors import FlywheelError
from ..safety.moderator import Moderator, make_moderator
from ..store import EventStore
from ..store.journal import Journal
from ..workspace import Workspace
from . import routes_characters, routes_chat, routes_experiments, routes_health, routes_people
from .assignment import Assigner
from .auth import Authenticator, load_secret
from .backends import BackendError, make_backends
from .cast import Cast
from .errors import ApiError, ErrorBody, add_handlers
from .hub import Hub
from .limits import RateLimiter
from .metrics import Metrics, Observed
from .publication import Publisher, was_checked
from .security import BodyLimit, PlainAddresses, RequestIds, SecurityHeaders, allow_origins, believe_proxies

_log = logging.getLogger(__name__)
_REFRESH_SECONDS = 5.0
_CHECK_AGAIN_SECONDS = 15.0
_FOLD_SECONDS = 2.0
_UNLIMITED = 10**9  # requests a minute
_STORE_PATIENCE_SECONDS = 10.0
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "refused"}, "5XX": {"model": ErrorBody, "description": "not able to"},
}  # fmt: skip
_DAY_SECONDS = 86_400.0
_SOON_SECONDS = 600.0
_ANSWERS_KEPT = timedelta(days=3)


def make_app(workspace: Workspace, config: FlywheelConfig, opened: Callable[[Hub], None] = lambda hub: None) -> ASGIApp:
    """The service of a workspace as an ASGI application; its parts open with the application's lifespan.

    `opened` is given the parts once they are open, for programs that embed the service.

    Raises:
        FlywheelError: the configuration names something that cannot be.
    """
    bounds, metrics = config.server, Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            app.state.hub = hub = await _open(workspace, config, metrics, stack)
            opened(hub)
            for chore in (_follow_releases(hub), _fold_log(hub), _check_again(hub), _retire_daily(hub)):
                task = asyncio.create_task(chore)
                task.add_done_callback(_ended)
                stack.callback(task.cancel)
            yield

    api = FastAPI(
        title="CharacterFlywheel", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        responses=_ERRORS,
    )  # fmt: skip
    add_handlers(api)
    for routes in (routes_chat, routes_people, routes_characters, routes_experiments, routes_health):
        api.include_router(routes.router)
    if bounds.web:
        from ..web import routes as pages  # noqa: PLC0415

        api.router.routes.extend(pages())
    app: ASGIApp = BodyLimit(api, bounds.max_body_bytes, {"/v1/characters": bounds.max_card_bytes})
    app = Observed(PlainAddresses(app), metrics)
    app = allow_origins(app, bounds.cors_origins)
    return RequestIds(believe_proxies(SecurityHeaders(app), bounds.trusted_proxies))


async def _open(workspace: Workspace, config: FlywheelConfig, metrics: Metrics, stack: AsyncExitStack) -> Hub:
    """Open every part; whatever was opened is closed again where a later one fails."""
    bounds = config.server
    store = stack.enter_context(
        EventStore.open(config.store.url or workspace.database, patience_s=_STORE_PATIENCE_SECONDS, folds_log=False)
    )
    journal = Journal(store, commit_ms=config.store.commit_ms)
    journal.start()
    stack.push_async_callback(journal.stop)
    moderator = make_moderator(config.safety)
    stack.push_async_callback(moderator.close)
    backends = make_backends(workspace, config, metrics.served)
    stack.push_async_callback(backends.close)
    authenticator = stack.enter_context(
        Authenticator(store, load_secret(workspace.root), session_days=bounds.session_days)
    )
    assigner = stack.enter_context(Assigner(store))
    publisher = Publisher(store, moderator, workspace.pictures, config.safety.pictures == "trust")
    await publisher.publish_folder(workspace)
    cast = Cast(store)
    await cast.refresh()
    _watch(metrics, journal, moderator)
    return Hub(
        workspace=workspace, config=config, store=store, journal=journal, backends=backends, moderator=moderator,
        authenticator=authenticator, key_limits=_limits(bounds, bounds.key_requests_per_minute, 60_000),
        user_limits=_limits(bounds, bounds.user_requests_per_minute, 300), assigner=assigner, cast=cast,
        publisher=publisher, metrics=metrics,
    )  # fmt: skip


def _limits(bounds: ServerConfig, per_minute: int | None, usual: int) -> RateLimiter:
    """The configured rate, else the usual one; the echo is there to be loaded, and has none unless it is configured."""
    return RateLimiter(per_minute or (_UNLIMITED if bounds.backend == "echo" else usual))


def _watch(metrics: Metrics, journal: Journal, moderator: Moderator) -> None:
    metrics.watch("flywheel_journal_waiting", "requests whose rows wait for a commit", lambda: journal.waiting)
    metrics.watch("flywheel_journal_commits", "commits so far", lambda: journal.commits)
    metrics.watch("flywheel_journal_rows", "rows committed so far", lambda: journal.rows)
    metrics.watch("flywheel_journal_commit_seconds", "the last commit, fsync included", lambda: journal.commit_seconds)
    metrics.watch("flywheel_safety_checks", "texts judged so far", lambda: moderator.checks)
    failures = "classifiers that failed or took too long so far, so that a text was not let pass"
    metrics.watch("flywheel_safety_failures", failures, moderator.caught.counts.total)


def _ended(chore: asyncio.Task[None]) -> None:
    if not chore.cancelled() and (error := chore.exception()):
        _log.error("a chore of the service has ended and must not: %r", error)


async def _follow_releases(hub: Hub) -> None:
    """Let a promotion, a rollback or an experiment take effect without a restart."""
    while True:
        await asyncio.sleep(_REFRESH_SECONDS)
        in_use = {model for experiment in hub.assigner.running for model in experiment.models.values()}
        try:
            await hub.backends.refresh(in_use)
        except (BackendError, FlywheelError, OSError) as error:  # the model before goes on serving
            _log.error("the model now in service cannot answer: %s", error)
            hub.metrics.not_followed.inc()


async def _fold_log(hub: Hub) -> None:
    """Keep SQLite's log short, beside the commits rather than within them."""
    while True:
        await asyncio.sleep(_FOLD_SECONDS)
        try:
            await asyncio.to_thread(hub.store.fold_log)
        except (FlywheelError, OSError) as error:  # the log grows until it works again
            _log.error("the store's log could not be folded: %s", error)


async def _check_again(hub: Hub) -> None:
    """Publish the folder's characters that safety could not check at the start, once it can."""
    checked = False
    while not checked:
        try:
            decided = await asyncio.to_thread(hub.store.publications)
            checked = all(map(was_checked, decided.values()))
            if not checked:
                await hub.publisher.publish_folder(hub.workspace)
                await hub.cast.refresh()
        except (ApiError, FlywheelError, OSError) as error:  # tried again
            _log.error("characters could not be checked again: %s", error)
        await asyncio.sleep(_CHECK_AGAIN_SECONDS)


async def _retire_daily(hub: Hub) -> None:
    """Erase conversations untouched for `server.retention_days`, and answers kept for repeated requests."""
    from ..erase import retain  # noqa: PLC0415 - only where something is erased
    from ..store.erase import drop_answers  # noqa: PLC0415

    while True:
        try:
            await asyncio.to_thread(drop_answers, hub.store, hub.clock() - _ANSWERS_KEPT)
            if hub.config.server.retention_days is not None:
                await asyncio.to_thread(retain, hub.workspace, hub.config.server.retention_days)
        except (FlywheelError, OSError) as error:  # a run has the workspace, for hours perhaps
            _log.warning("what is too old was not erased yet: %s", error)
            await asyncio.sleep(_SOON_SECONDS)
        else:
            await asyncio.sleep(_DAY_SECONDS)
