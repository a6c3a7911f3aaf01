"""What belongs to one user: feedback, conversations, consent, the web page's session."""

import asyncio
from datetime import UTC, datetime

from fastapi import APIRouter, Query, Request, Response

from ..cards import greetings
from ..ids import derive_id, uuid7
from ..instructions import repair_all
from ..records import GIVEN, Character, Conversation, Message, SignalKind
from ..service_records import Events, Remembered
from .durable import ask, durable, put
from .errors import ApiError, not_found
from .feedback import FeedbackRequest, signal_of
from .hub import Hub
from .idempotency import alone, as_stored, body_digest, remembered
from .locate import own_conversation
from .paths import path
from .schemas import (
    ConversationList,
    ConversationRequest,
    ConversationView,
    FeedbackView,
    MeRequest,
    MessageView,
    MeView,
)  # fmt: skip
from .who import Chatting, Shared, harmless_name, key_of, named_in, user_of

router = APIRouter(tags=["people"])
_HELLO = "Hello, it is good to see you."


@router.post("/v1/feedback", response_model=FeedbackView)
async def feedback(request: Request, body: FeedbackRequest, hub: Shared, principal: Chatting) -> Response:
    """Say what a user did after a reply. The answer means stored; the same act twice is one signal."""
    speaking = principal.user_id or body.user or named_in(request)
    user = await user_of(hub, request, principal, body.user)
    message = await ask(hub.store.message, body.message_id)
    if message is None and (written := hub.being_written.get(body.message_id)) is not None:
        await asyncio.wait([written], timeout=hub.config.server.timeout_s)  # the reply is still on its way
        message = await ask(hub.store.message, body.message_id)
    if message is None or message.user_id != (user.id if speaking else principal.whose(message.user_id)):
        raise not_found("message", body.message_id, "message_id")
    ours = message.model not in (None, GIVEN) or message.id == _greeting_of(message.conversation_id, message.created_at)
    if message.role != "assistant" or not ours:
        raise ApiError(422, "not_a_reply", "Feedback is on what a character said here.", "message_id")
    key = key_of(request, principal.id, user)
    digest = body_digest(await request.body()) if key else None
    async with alone(hub, key):
        known = await remembered(hub, key, digest)
        if known is not None:
            return Response(known.response, known.status, {"Idempotent-Replayed": "true"}, "application/json")
        given = await ask(hub.store.signals_of, message.conversation_id)
        signal = signal_of(body, message, key, hub.clock(), given)
        answer = FeedbackView(
            id=signal.id, message_id=signal.message_id, kind=signal.kind, value=signal.value, text=signal.text,
            created_at=signal.created_at,
        ).model_dump_json()  # fmt: skip
        memory = None
        if key and digest:
            memory = Remembered(
                id=key, user_id=message.user_id, body=digest, status=200, response=answer, created_at=hub.clock()
            )
        await durable(put(hub, Events(signals=(signal,), remembered=(memory,) if memory else ())))
        answer = await as_stored(hub, memory, answer)
    hub.metrics.signals.labels(signal.kind).inc()
    return Response(answer, media_type="application/json")


@router.post("/v1/conversations", status_code=201)
async def open_conversation(
    request: Request, body: ConversationRequest, hub: Shared, principal: Chatting
) -> ConversationView:
    """Begin to talk with a character; its greeting is the first message."""
    user = await user_of(hub, request, principal, body.user)
    character = await hub.cast.get(body.character)
    if character is None:
        raise not_found("character", body.character, "character")
    known = greetings(character, await harmless_name(hub, body.user_name))
    if body.greeting >= len(known):
        raise ApiError(422, "no_such_greeting", f"{character.name} has greetings 0 to {len(known) - 1}.", "greeting")
    at = hub.clock()
    conversation = Conversation(
        id=uuid7(at), user_id=user.id, character_id=character.id, character_version=character.version,
        source=user.population, created_at=at,
    )  # fmt: skip
    greeting: tuple[Message, ...] = ()
    text = known[body.greeting].strip()
    if text and not (await hub.moderator.check(text)).allowed:
        text = repair_all(character, _HELLO)
    if text:
        greeting = (
            Message(
                id=_greeting_of(conversation.id, at), conversation_id=conversation.id, user_id=user.id,
                role="assistant", content=text, created_at=at,
            ),
        )  # fmt: skip
    await durable(put(hub, Events(users=(user,), conversations=(conversation,), messages=greeting)))
    return _view(conversation.model_copy(update={"messages": greeting}), character)


@router.get("/v1/conversations")
async def conversations(
    request: Request, hub: Shared, principal: Chatting, limit: int = Query(20, ge=1, le=100), before: str | None = None
) -> ConversationList:
    """The user's conversations, newest first."""
    user = await user_of(hub, request, principal)
    found = await ask(hub.store.conversations_of, user.id, limit, before)
    views = [_view(one, await _character(hub, one)) for one in found]
    return ConversationList(data=tuple(views), next=found[-1].id if len(found) == limit else None)


@router.get("/v1/conversations/{id}")
async def conversation(id: str, request: Request, hub: Shared, principal: Chatting) -> ConversationView:
    """A conversation with all its messages, alternatives included."""
    user = await user_of(hub, request, principal)
    found = await own_conversation(hub, id, user)
    signals = await ask(hub.store.signals_of, found.id)
    picks = [(one.message_id, one.created_at) for one in signals if one.kind == "pick"]
    given: dict[str, list[SignalKind]] = {}
    for one in signals:
        given.setdefault(one.message_id, []).append(one.kind)
    return _view(found, await _character(hub, found), picks, given)


@router.get("/v1/me")
async def me(request: Request, hub: Shared, principal: Chatting) -> MeView:
    """What the service holds about the asking user."""
    user = await user_of(hub, request, principal)
    return MeView(id=user.id, consent=user.consent)


@router.patch("/v1/me")
async def change_me(request: Request, body: MeRequest, hub: Shared, principal: Chatting) -> MeView:
    """Agree, or no longer agree, that messages are used for training: from the next window on, all ever written."""
    user = await user_of(hub, request, principal)
    await durable(put(hub, Events(users=(user,))))
    await ask(hub.store.set_consent, user.id, body.consent)
    hub.users.pop(user.id, None)
    return MeView(id=user.id, consent=body.consent)


def _greeting_of(conversation_id: str, at: datetime) -> str:
    return derive_id("greeting", conversation_id, at=at)


def _view(
    conversation: Conversation, character: Character | None,
    picks: list[tuple[str, datetime]] | None = None, signals: dict[str, list[SignalKind]] | None = None,
) -> ConversationView:  # fmt: skip
    current = {message.id for message in path(conversation.messages, None, picks or ())}
    return ConversationView(
        id=conversation.id, character=conversation.character_id,
        character_name=character.name if character else conversation.character_id, created_at=conversation.created_at,
        messages=tuple(
            MessageView(
                id=one.id, role=one.role, content=one.content, parent_id=one.parent_id, fallback=one.fallback,
                finish=one.finish, created_at=one.created_at.astimezone(UTC), current=one.id in current,
                signals=_newest_last((signals or {}).get(one.id, [])),
            )
            for one in conversation.messages
        ),
    )  # fmt: skip


def _newest_last(kinds: list[SignalKind]) -> tuple[SignalKind, ...]:
    """Each kind once, in the order in which they were given last."""
    return tuple(reversed(dict.fromkeys(reversed(kinds))))


async def _character(hub: Hub, conversation: Conversation) -> Character | None:
    known = await hub.cast.get(conversation.character_id)
    if known is not None:
        return known
    return await ask(hub.store.character, conversation.character_id, conversation.character_version)
