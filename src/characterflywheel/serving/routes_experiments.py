"""`/v1/experiments`: start, ramp and stop experiments on the users of this service (DESIGN section 8)."""

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import Field

from ..experiment import running
from ..records import Record
from ..service_records import Experiment
from .durable import ask
from .errors import not_found
from .hub import Hub
from .schemas import Id, Request
from .who import Experimenting, Shared

router = APIRouter(tags=["experiments"])
Share = Annotated[float, Field(ge=0, le=1)]


class ExperimentList(Record):
    """`GET /v1/experiments`: every experiment at its newest state."""

    data: tuple[Experiment, ...]


class ArmRequest(Request):
    """An arm: the model that serves it and its share of all users."""

    model: Id
    share: Share


class ExperimentRequest(Request):
    """`POST /v1/experiments`. `arms` are `control` and `treatment`."""

    name: Id
    arms: dict[str, ArmRequest]


class ExperimentChange(Request):
    """`PATCH /v1/experiments/{name}`: raise shares, or stop."""

    shares: dict[str, Share] | None = None
    state: Literal["running", "stopped"] | None = None


@router.get("/v1/experiments")
async def experiments(hub: Shared, principal: Experimenting) -> ExperimentList:
    """Every experiment, running or stopped, by name."""
    found = await ask(hub.store.experiments)
    return ExperimentList(data=tuple(found[name] for name in sorted(found)))


@router.post("/v1/experiments", status_code=201)
async def start(body: ExperimentRequest, hub: Shared, principal: Experimenting) -> Experiment:
    """Start an experiment; it takes users at once."""
    arms = {name: running.Arm(arm.model, arm.share) for name, arm in body.arms.items()}
    models = hub.backends.names if hub.config.server.backend == "native" else None  # an endpoint may know more
    made = await asyncio.to_thread(running.start, hub.store, body.name, arms, hub.clock(), models)
    await _reload(hub)
    return made


@router.patch("/v1/experiments/{name}")
async def change(name: str, body: ExperimentChange, hub: Shared, principal: Experimenting) -> Experiment:
    """Ramp an experiment up, or stop it. Nobody changes arms."""
    if name not in await ask(hub.store.experiments):
        raise not_found("experiment", name)
    changed = await asyncio.to_thread(running.find, hub.store, name)
    if body.shares:
        changed = await asyncio.to_thread(running.ramp, hub.store, name, body.shares, hub.clock())
    if body.state == "running":
        changed = await asyncio.to_thread(running.running, hub.store, name)
    if body.state == "stopped":
        changed = await asyncio.to_thread(running.stop, hub.store, name, hub.clock())
    await _reload(hub)
    return changed


async def _reload(hub: Hub) -> None:
    await asyncio.to_thread(hub.assigner.reload)
