"""`/v1/characters` and `/v1/reviews`: creating, changing, retiring, and a person's word on the doubtful ones.

Safety runs at creation and at every change and fails closed (PAPER section 9): see `publication`.
"""

import asyncio
import json
from typing import Annotated, Any, Literal, NamedTuple

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field, ValidationError

from ..cards import card_of, character_of, greetings, read_png, write_png
from ..cards.card import read_json
from ..cards.png import picture_of
from ..records import Character, Record
from ..service_records import Publication, PublicationState
from .durable import ask
from .errors import ApiError, not_found
from .hub import Hub
from .pictures import find
from .schemas import Request as Body
from .who import Chatting, Creating, Reviewing, Shared

router = APIRouter(tags=["characters"])
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "our record, a Character Card V2 or V3 as JSON, or its PNG",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "image/png": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


class CharacterView(Record):
    """A character as those who talk to it see it."""

    id: str
    version: int
    name: str
    category: str
    traits: tuple[str, ...]
    greetings: tuple[str, ...]
    picture: str | None = Field(None, description="address of its picture on this service")


class CharacterList(Record):
    """`GET /v1/characters`."""

    data: tuple[CharacterView, ...]


class CharacterState(Record):
    """A character as its creator sees it: the version, and whether people can talk to it."""

    character: Character
    state: PublicationState | Literal["unpublished"]
    reason: str
    in_service: int | None = Field(description="the version that people talk to; None where there is none")
    picture: str | None = Field(None, description="in the queue: the address of its picture, which the same key reads")


class Made(NamedTuple):
    """What a request's body holds: a character and, where it came as a PNG, its picture without the card."""

    character: Character
    picture: bytes | None = None


class VersionList(Record):
    """Every version of a character, oldest first, and every decision about it."""

    data: tuple[Character, ...]
    decisions: tuple[Publication, ...]


class ReviewList(Record):
    """Characters that wait for a person's decision."""

    data: tuple[CharacterState, ...]


class ReviewRequest(Body):
    """`POST /v1/reviews/{character_id}`."""

    decision: Literal["approved", "refused"]
    reason: Annotated[str, Field(min_length=1, max_length=2000)]
    version: int | None = Field(None, ge=1, description="the version that was read; refused if there is a newer one")


@router.get("/v1/characters")
async def characters(hub: Shared, principal: Chatting) -> CharacterList:
    """The characters that can be talked to."""
    return CharacterList(data=tuple(_view(hub, one) for one in (await hub.cast.approved()).values()))


@router.get("/v1/characters/{id}")
async def character(id: str, hub: Shared, principal: Chatting) -> CharacterView:
    """A character that can be talked to."""
    found = await hub.cast.get(id)
    if found is None:
        raise not_found("character", id)
    return _view(hub, found)


@router.get("/v1/characters/{id}/picture", response_class=Response, responses={200: {"content": {"image/png": {}}}})
async def picture(id: str, hub: Shared, principal: Chatting) -> Response:
    """The picture of a character that can be talked to."""
    serving = await hub.cast.get(id)
    path = find(hub.workspace.pictures, serving) if serving else None
    if path is None:
        raise not_found("picture", id)
    return Response(
        await asyncio.to_thread(path.read_bytes), 200, {"Cache-Control": "private, max-age=300"}, "image/png"
    )


@router.post("/v1/characters", status_code=201, openapi_extra=_BODY)
async def create(request: Request, hub: Shared, principal: Creating) -> CharacterState:
    """Submit a character. It is published if safety finds nothing, else a person decides."""
    made = await _read(request, None)
    id = made.character.id
    if await ask(hub.store.character, id) is not None:
        raise ApiError(409, "character_exists", f"Character {id!r} exists: change it with PUT.", "id")
    return await _submit(hub, made, principal.id)


@router.put("/v1/characters/{id}", openapi_extra=_BODY)
async def change(id: str, request: Request, hub: Shared, principal: Creating) -> CharacterState:
    """Submit a new version. The version in service goes on until the new one is approved."""
    await _newest(hub, id)
    return await _submit(hub, await _read(request, id), principal.id)


@router.delete("/v1/characters/{id}")
async def retire(id: str, hub: Shared, principal: Creating) -> CharacterState:
    """Take a character out of service; its versions and conversations stay."""
    await _newest(hub, id)
    await asyncio.to_thread(hub.publisher.retire, id, principal.id, "retired by its creator", hub.clock())
    await hub.cast.refresh()
    return await _state(hub, id)


@router.get("/v1/characters/{id}/versions")
async def versions(id: str, hub: Shared, principal: Creating) -> VersionList:
    """Every version, and every decision."""
    await _newest(hub, id)
    found = await ask(hub.store.versions, id)
    decisions = await ask(hub.store.publication_history, id)
    return VersionList(data=tuple(found), decisions=tuple(decisions))


@router.get(
    "/v1/characters/{id}/card",
    response_class=Response,
    responses={200: {"content": {"application/json": {}, "image/png": {}}}},
)
async def card(
    id: str, hub: Shared, principal: Creating, version: Literal["v2", "v3"] = "v2",
    form: Annotated[Literal["json", "png"], Query(alias="as")] = "json",
) -> Response:  # fmt: skip
    """The newest version as a character card."""
    found = await _newest(hub, id)
    if form == "png":
        path = find(hub.workspace.pictures, found)
        kept = await asyncio.to_thread(path.read_bytes) if path else None
        return Response(await asyncio.to_thread(write_png, found, kept), media_type="image/png")
    return Response(json.dumps(card_of(found, version), ensure_ascii=False), media_type="application/json")


@router.get("/v1/reviews")
async def reviews(hub: Shared, principal: Reviewing) -> ReviewList:
    """Characters whose newest version waits for a person."""
    decided = await ask(hub.store.publications)
    waiting = [id for id, publication in sorted(decided.items()) if publication.state == "review"]
    return ReviewList(data=tuple([await _state(hub, id, pictured=True) for id in waiting]))


@router.get(
    "/v1/reviews/{character_id}/picture", response_class=Response, responses={200: {"content": {"image/png": {}}}}
)
async def waiting_picture(character_id: str, hub: Shared, principal: Reviewing) -> Response:
    """The picture of a character's newest version, which nobody else sees before it is approved."""
    path = find(hub.workspace.pictures, await _newest(hub, character_id))
    if path is None:
        raise not_found("picture", character_id)
    return Response(await asyncio.to_thread(path.read_bytes), 200, {"Cache-Control": "no-store"}, "image/png")


@router.post("/v1/reviews/{character_id}")
async def review(character_id: str, body: ReviewRequest, hub: Shared, principal: Reviewing) -> CharacterState:
    """Decide about a character's newest version."""
    newest = await _newest(hub, character_id)
    if body.version not in (None, newest.version):
        raise ApiError(
            409, "newer_version", f"Version {newest.version} is newer than the one read, {body.version}.", "version"
        )
    await asyncio.to_thread(hub.publisher.decide, newest, body.decision, body.reason, principal.id, hub.clock())
    await hub.cast.refresh()
    return await _state(hub, character_id)


async def _submit(hub: Hub, made: Made, by: str) -> CharacterState:
    await hub.publisher.submit(made.character, by, hub.clock(), made.picture)
    await hub.cast.refresh()
    return await _state(hub, made.character.id)


async def _read(request: Request, id: str | None) -> Made:
    """The character in a request's body: a PNG card, a card's JSON, or our record."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    raw = await request.body()
    if kind == "image/png":
        return await asyncio.to_thread(lambda: Made(character_of(read_png(raw), id), picture_of(raw)))
    if kind not in ("application/json", ""):
        raise ApiError(415, "unsupported_type", f"Content-Type {kind!r}: send application/json or image/png.")
    values = await asyncio.to_thread(read_json, raw)
    if "spec" in values or "data" in values or "first_mes" in values:
        return Made(character_of(values, id))
    try:
        return Made(Character.model_validate(values | ({"id": id} if id else {}) | {"safety": "approved"}))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "character"
        raise ApiError(422, "invalid_character", f"{where}: {first['msg']}", where) from error


async def _newest(hub: Hub, id: str) -> Character:
    found = await ask(hub.store.character, id)
    if found is None:
        raise not_found("character", id)
    return found


async def _state(hub: Hub, id: str, pictured: bool = False) -> CharacterState:
    newest, decided = await _newest(hub, id), await ask(hub.store.publications)
    serving, publication = await hub.cast.get(id), decided.get(id)
    path = find(hub.workspace.pictures, newest) if pictured else None
    address = f"/v1/reviews/{id}/picture" if path else None
    return CharacterState(
        character=newest, state=publication.state if publication else "unpublished",
        reason=publication.reason if publication else "nobody has checked it yet",
        in_service=serving.version if serving else None, picture=address,
    )  # fmt: skip


def _view(hub: Hub, one: Character) -> CharacterView:
    path = find(hub.workspace.pictures, one)
    picture = f"/v1/characters/{one.id}/picture?v={path.stem}" if path else None
    return CharacterView(
        id=one.id, version=one.version, name=one.name, category=one.category, traits=one.traits,
        greetings=greetings(one), picture=picture,
    )  # fmt: skip
