"""The scoring server: one generation's reward models over HTTP, for RL, selection and evaluation to share (DESIGN 6).

    POST /v1/score    {prompts, replies, by} -> {model, scores, parts}
    POST /v1/prefer   {prompts, firsts, seconds, by} -> {model, probabilities, orders}
    GET  /v1/model    which models these are (`wire.Card`); /healthz, /readyz

Routes only check and queue; one thread computes (`joining.Worker`). Errors have OpenAI's shape. Safety is not asked
here: the veto belongs to whoever selects, beside the policy that it answers for.
"""

import asyncio
import hmac
import ipaddress
import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from .. import __version__
from ..errors import FlywheelError
from ..pipeline import ArtifactRecord, output_hashes
from ..serving.errors import ApiError, ErrorBody, add_handlers
from ..serving.security import BodyLimit
from . import stored
from .composite import RewardModels, precision_of
from .joining import Closing, Full, Models, NotFinite, Request, Worker
from .wire import KEY_VARIABLE, Card, Health, Limits, PreferAnswer, PreferRequest, ScoreAnswer, ScoreRequest, content_of

_GRACE_SECONDS = 20
_NOT_FINITE = "The reward models gave a score that is not finite: look at their training before going on."


def make_app(models: Models, card: Card, key: str | None = None) -> ASGIApp:
    """The server as an ASGI application; its worker lives as long as the application. Without `key` anybody may ask."""
    limits = card.limits
    workers: list[Worker] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        workers.append(worker := Worker(models, card.id, limits))
        try:
            yield
        finally:
            await asyncio.to_thread(worker.stop)

    api = FastAPI(
        title="CharacterFlywheel scoring server", version=__version__, lifespan=lifespan, docs_url=None,
        redoc_url=None, responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )  # fmt: skip
    add_handlers(api)

    async def answered(request: Request) -> ScoreAnswer | PreferAnswer:
        if request.texts > limits.max_replies:
            said = f"replies: {request.texts} in one request, at most {limits.max_replies}: split it."
            raise ApiError(422, "too_many_replies", said, "replies")
        try:
            return await asyncio.wrap_future(workers[-1].put(request))
        except Full as full:
            said = f"{full.waiting} requests wait already: come back in {full.seconds} s."
            raise ApiError(429, "busy", said, headers={"Retry-After": str(full.seconds)}) from None
        except Closing:
            raise ApiError(503, "closing", "The scoring server is stopping.", headers={"Retry-After": "1"}) from None
        except NotFinite:
            raise ApiError(500, "score_not_finite", _NOT_FINITE) from None

    @api.post("/v1/score", response_model=ScoreAnswer)
    async def score(request: ScoreRequest) -> Response:
        return _json(await answered(request))

    @api.post("/v1/prefer", response_model=PreferAnswer)
    async def prefer(request: PreferRequest) -> Response:
        return _json(await answered(request))

    @api.get("/v1/model")
    async def model() -> Card:
        return card

    @api.get("/healthz")
    async def healthz() -> Health:
        return Health(status="ok")

    @api.get("/readyz", responses={503: {"model": Health}})
    async def readyz(response: Response) -> Health:
        well = bool(workers) and workers[-1].alive
        response.status_code = 200 if well else 503
        return Health(status="ok" if well else "unavailable")

    app: ASGIApp = BodyLimit(api, limits.max_body_bytes)
    return _KeyAsked(app, key) if key else app


def _json(answer: ScoreAnswer | PreferAnswer) -> Response:
    """Already a record: FastAPI would validate and copy every score once more."""
    return Response(answer.model_dump_json(), media_type="application/json")


class _KeyAsked:
    """Refuses requests below /v1 without the key, before anything of them is read."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self._expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            sent = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not hmac.compare_digest(sent, self._expected):
                said = f"Send the key that the server has in {KEY_VARIABLE}: `Authorization: Bearer ...`."
                refusal = ApiError(401, "invalid_api_key", said, headers={"WWW-Authenticate": "Bearer"}).response()
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)


def card_of(models: RewardModels, folder: Path, generation: int, limits: Limits | None = None) -> Card:
    """What `models`, loaded from a reward stage's artifact, are.

    Raises:
        FlywheelError: the folder is no complete artifact, or its files are not those that the stage wrote.
    """
    record = stored.read(folder / "artifact.json", ArtifactRecord, "complete artifact")
    content = content_of(output_hashes(folder))
    if content != content_of(record.outputs):
        raise FlywheelError(f"{folder}: files have changed since the reward stage wrote them: remove it and run again.")
    return Card(
        artifact=folder.name, content=content, generation=generation, mean=models.pointwise.scale.mean,
        deviation=models.pointwise.scale.deviation, signals=tuple(sorted(models.signals.usable)),
        weights=models.weights, gold=models.gold is not None, limits=limits or Limits(),
        precision=precision_of(models.pointwise),
    )  # fmt: skip


def serve(models: Models, card: Card, host: str, port: int) -> None:
    """Answer on `host` and `port` (0: any free one) until SIGINT or SIGTERM; running requests are finished first.

    Raises:
        FlywheelError: others could reach `host` and no key is set, or the address is in use.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key and not _only_this_machine(host):
        raise FlywheelError(f"{host} can be reached by others: set a key in {KEY_VARIABLE}, or listen on 127.0.0.1.")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise FlywheelError(f"cannot listen on {host}:{port} ({error.strerror}); name another: --port.") from error
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    settings = uvicorn.Config(
        make_app(models, card, key or None), log_config=None, access_log=False, server_header=False, lifespan="on",
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )  # fmt: skip
    who = "with a key" if key else "without a key, for this machine only"
    where = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    print(f"scoring with {card.id} of generation {card.generation} on {where} {who}; stop with Ctrl-C", flush=True)
    uvicorn.Server(settings).run(sockets=[listening])


def _only_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
