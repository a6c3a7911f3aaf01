"""Where in which conversation a request speaks: by conversation id, by the reply it regenerates, or by its history.

A client of OpenAI's API knows no conversation ids and sends everything said so far. The history's digest finds the
conversation whose last reply it ends with (a `Tip`); a history that we never served is taken in as it is given.
"""

import asyncio
from datetime import datetime
from typing import NamedTuple

from ..ids import derive_id, uuid7
from ..records import GIVEN, Character, ChatMessage, Conversation, Message, User
from ..safety.policy import Subject
from ..service_records import Events
from .durable import ask, durable, put
from .errors import ApiError, not_found
from .hub import Hub
from .paths import WINDOW, digest, path, said, seen
from .schemas import ChatRequest
from .tokens import estimated_tokens

_CHECKS_AT_ONCE = 8


class Asked(NamedTuple):
    """A user's utterance in its place. `events` make it durable; `replaces` is the reply that is regenerated.

    `seen` is everything that the user was shown before it, `history` what of that the model is told.
    """

    user: User
    character: Character
    conversation_id: str
    seen: tuple[ChatMessage, ...]
    history: tuple[ChatMessage, ...]
    utterance: Message
    events: Events
    replaces: str | None = None


async def locate(
    hub: Hub, request: ChatRequest, character: Character, user: User, at: datetime, key: str | None
) -> Asked:
    """Find the request's place.

    `key` is the digest of its idempotency key: with one, every id is a function of it, so that a repeated request
    writes the same rows.

    Raises:
        ApiError: a conversation or reply that this user does not have, or that is with another character.
    """
    if request.flywheel_regenerate:
        return await _again(hub, request.flywheel_regenerate, character, user)
    if request.flywheel_conversation:
        return await _onward(hub, request, character, user, at, key)
    return await _by_history(hub, request, character, user, at, key)


async def own_conversation(hub: Hub, id: str, user: User) -> Conversation:
    """A conversation of this user with its messages; to anybody else it does not exist."""
    found = await ask(hub.store.conversation, id)
    if found is None or found.user_id != user.id:
        raise not_found("conversation", id, "flywheel_conversation")
    return found


async def _onward(
    hub: Hub, request: ChatRequest, character: Character, user: User, at: datetime, key: str | None
) -> Asked:
    """The next utterance of a conversation whose history is ours: only the request's last message is read.

    A request that comes again, with its idempotency key or after a reply that broke off, stands where it stood before.
    """
    assert request.flywheel_conversation
    conversation = await own_conversation(hub, request.flywheel_conversation, user)
    if request.flywheel_parent and all(message.id != request.flywheel_parent for message in conversation.messages):
        await durable(put(hub, Events()))  # a reply that was just broken off may still be on its way to the store
        conversation = await own_conversation(hub, request.flywheel_conversation, user)
    character = await _its_character(hub, conversation, character)
    text, id = request.messages[-1].text, derive_id("utterance", key) if key else None
    known = next((message for message in conversation.messages if message.id == id), None)
    if known is not None:
        before = path(conversation.messages, known.parent_id) if known.parent_id else []
        return Asked(user, character, conversation.id, seen(before), said(before), known, Events())
    signals = await ask(hub.store.signals_of, conversation.id)
    picks = [(one.message_id, one.created_at) for one in signals if one.kind == "pick"]
    before = path(conversation.messages, request.flywheel_parent, picks)
    if request.flywheel_parent and not before:
        raise not_found("message", request.flywheel_parent, "flywheel_parent")
    if len(before) > 1 and before[-1].finish in ("cancelled", "error") and before[-2].content == text:
        before = before[:-2]
    while before and before[-1].role == "user":  # said, but never answered: this utterance takes its place
        before.pop()
    parent = before[-1].id if before else None
    utterance = _utterance(conversation.id, user, parent, text, at, conversation.created_at)
    utterance = utterance.model_copy(update={"id": id}) if id else utterance
    events = Events(messages=(utterance,))
    return Asked(user, character, conversation.id, seen(before), said(before), utterance, events)


async def _again(hub: Hub, reply_id: str, character: Character, user: User) -> Asked:
    """Another reply to the utterance that `reply_id` answered; nothing new is said."""
    reply = await ask(hub.store.message, reply_id)
    if reply is None or reply.user_id != user.id:
        raise not_found("message", reply_id, "flywheel_regenerate")
    conversation = await own_conversation(hub, reply.conversation_id, user)
    character = await _its_character(hub, conversation, character)
    before = path(conversation.messages, reply_id)[:-1]
    if reply.role != "assistant" or not before or before[-1].role != "user":
        raise ApiError(
            400, "not_a_reply", f"Message {reply_id!r} answers no utterance of the user.", "flywheel_regenerate"
        )
    return Asked(
        user, character, conversation.id, seen(before[:-1]), said(before[:-1]), before[-1], Events(), replaces=reply_id
    )


async def _by_history(
    hub: Hub, request: ChatRequest, character: Character, user: User, at: datetime, key: str | None
) -> Asked:
    """The conversation that ended with this history, or a new one that begins with it."""
    *given, last = [m for m in request.messages if m.role in ("user", "assistant")]
    history = tuple(ChatMessage(role="user" if m.role == "user" else "assistant", content=m.text) for m in given)
    if any(m.role == "assistant" for m in history):
        tip = await ask(hub.store.tip, digest(user.id, character.id, history))
        whole = tip is not None
        if tip is None and len(history) >= WINDOW and not user.id.startswith("key-"):
            # a client that keeps only the newest messages; people behind one key could be taken for one another
            tip = await ask(hub.store.tip, digest(user.id, character.id, history[-WINDOW:], "window"))
        if tip is not None and tip.user_id == user.id:
            conversation = await own_conversation(hub, tip.conversation_id, user)
            before = path(conversation.messages, tip.message_id)
            utterance = _utterance(conversation.id, user, tip.message_id, last.text, at, conversation.created_at)
            character = await _its_character(hub, conversation, character)
            events = Events(messages=(utterance,))
            told = said(before) if whole else await _harmless(hub, history)
            return Asked(user, character, conversation.id, seen(before), told, utterance, events)
    beginning = None if key else at  # ids that a retry must find again hold no time
    opened = Conversation(
        id=derive_id("conversation", key) if key else uuid7(at), user_id=user.id, character_id=character.id,
        character_version=character.version, source=user.population, created_at=at,
    )  # fmt: skip
    taken_in: list[Message] = []
    for message in history:
        parent = taken_in[-1].id if taken_in else None
        id = derive_id("message", opened.id, parent, message.role, message.content, at=beginning)
        taken_in.append(
            Message(
                id=id, conversation_id=opened.id, user_id=user.id, role=message.role, content=message.content,
                model=GIVEN, parent_id=parent, created_at=at,
            )
        )  # fmt: skip
    parent = taken_in[-1].id if taken_in else None
    utterance = _utterance(opened.id, user, parent, last.text, at, beginning)
    events = Events(users=(user,), conversations=(opened,), messages=(*taken_in, utterance))
    return Asked(user, character, opened.id, history, await _harmless(hub, history), utterance, events)


async def _harmless(hub: Hub, history: tuple[ChatMessage, ...]) -> tuple[ChatMessage, ...]:
    """What the model may be told of a history that we never served: what safety lets pass of its newest part.

    What is not checked within the time of a reply is not told.
    """
    free, room = asyncio.Semaphore(_CHECKS_AT_ONCE), hub.config.server.max_prompt_tokens
    newest = len(history)
    while newest and room > 0:
        newest -= 1
        room -= estimated_tokens(history[newest].content)

    async def allowed(i: int) -> bool:
        subject: Subject = "prompt" if history[i].role == "user" else "reply"
        async with free:
            context = history[i - 1].content if i else ""
            return (await hub.moderator.check(history[i].content, context=context, subject=subject)).allowed

    try:
        async with asyncio.timeout(hub.config.server.timeout_s):
            verdicts = await asyncio.gather(*(allowed(i) for i in range(newest, len(history))))
    except TimeoutError:
        return ()
    return tuple(message for message, fine in zip(history[newest:], verdicts, strict=True) if fine)


def _utterance(
    conversation_id: str, user: User, parent: str | None, text: str, at: datetime, beginning: datetime | None
) -> Message:
    """The same words in the same place are the same message: a client that tries again does not say it twice."""
    return Message(
        id=derive_id("message", conversation_id, parent, "user", text, at=beginning), conversation_id=conversation_id,
        user_id=user.id, role="user", content=text, parent_id=parent, created_at=at,
    )  # fmt: skip


async def _its_character(hub: Hub, conversation: Conversation, asked: Character) -> Character:
    """The version of the character that this conversation began with."""
    if conversation.character_id != asked.id:
        raise ApiError(
            400, "other_character", f"Conversation {conversation.id!r} is with {conversation.character_id!r}.", "model"
        )
    if conversation.character_version == asked.version:
        return asked
    found = await ask(hub.store.character, conversation.character_id, conversation.character_version)
    return found or asked
