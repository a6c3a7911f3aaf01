"""`/v1/chat/completions` and `/v1/models`: OpenAI's API with characters as models (DESIGN section 10)."""

import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ValidationError

from ..records import Character, User
from ..service_records import Remembered
from .backends import BackendError
from .durable import durable
from .errors import ApiError, not_found
from .event_stream import EventStream
from .hub import Hub
from .idempotency import alone, as_stored, begun, body_digest, remembered
from .locate import locate
from .schemas import (
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Choice,
    ChunkChoice,
    Delta,
    ModelCard,
    ModelList,
    ReplyMessage,
    Usage,
)  # fmt: skip
from .turn import Said, Turn, begin, being_written, commit, pieces, replies, unanswered
from .who import Chatting, Shared, hub_of, key_of, may, user_of

router = APIRouter(tags=["chat"])
_chatting = may("chat")
_JSON = "application/json"


class _Straight(APIRoute):
    """Documented by FastAPI, answered without its dependencies and copies: this is the route that bears the load."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def answer(request: Request) -> Response:
            principal = await _chatting(request)
            try:
                body = ChatRequest.model_validate_json(await request.body())
            except ValidationError as error:
                raise RequestValidationError(error.errors(include_url=False, include_context=False)) from error
            return await chat(request, body, await hub_of(request), principal)

        return answer


async def chat(request: Request, body: ChatRequest, hub: Shared, principal: Chatting) -> Response:
    """Talk to a character. With `stream`, server-sent events as OpenAI sends them; the last one means stored."""
    user = await user_of(hub, request, principal, body.user)
    _bounded(hub, body)
    key = key_of(request, principal.id, user)
    if body.stream:
        if (body.n or 1) > 1:
            raise ApiError(400, "invalid_request", "A stream has one reply: ask for n = 1.", "n")
        return EventStream(_stream_once(hub, body, user, key, await request.body()))
    return Response(*await _whole_once(hub, body, user, key, await request.body()), media_type=_JSON)


router.add_api_route(
    "/v1/chat/completions", chat, methods=["POST"], response_model=ChatCompletion, route_class_override=_Straight,
    responses={200: {"content": {"text/event-stream": {}}}},
)  # fmt: skip


@router.get("/v1/models")
async def models(hub: Shared, principal: Chatting) -> ModelList:
    """The characters that can be talked to."""
    return ModelList(data=tuple(map(_card, (await hub.cast.approved()).values())))


@router.get("/v1/models/{id}")
async def model(id: str, hub: Shared, principal: Chatting) -> ModelCard:
    """One character."""
    return _card(await _character(hub, id))


async def _whole_once(
    hub: Hub, body: ChatRequest, user: User, key: str | None, raw: bytes
) -> tuple[str, int, dict[str, str]]:
    """Content, status and headers of a whole answer; a request with a known idempotency key gets the same again."""
    async with alone(hub, key):
        digest = body_digest(raw) if key else None
        known = await remembered(hub, key, digest)
        if known is not None:
            return known.response, known.status, {"Idempotent-Replayed": "true"}
        return await _whole(hub, body, user, key, digest), 200, {}


async def _stream_once(
    hub: Hub, body: ChatRequest, user: User, key: str | None, raw: bytes
) -> AsyncGenerator[bytes, None]:
    """The events of a streamed answer; a request with a known idempotency key gets the same text again."""
    async with alone(hub, key):
        digest = body_digest(raw) if key else None
        known = await remembered(hub, key, digest)
        if known is not None:
            events = _replayed(known.response)
        else:
            events = _stream(hub, body, await _begin(hub, body, user, key, digest), key, digest)
        async with aclosing(events):
            async for event in events:
                yield event


async def _whole(hub: Hub, body: ChatRequest, user: User, key: str | None, digest: str | None) -> str:
    """The answer as JSON; what it says is in the store when it is returned."""
    turn = await _begin(hub, body, user, key, digest)
    with being_written(hub, turn):
        try:
            said = await replies(hub, turn)
        except BackendError as error:
            await durable(turn.earlier)  # so that the key's body is known before it may come again
            raise unanswered(hub, turn, error) from error
        answer = _completion(turn, said).model_dump_json()
        memory = _memory(hub, user, key, digest, answer)
        await commit(hub, turn, said, memory)
        return await as_stored(hub, memory, answer)


def _memory(hub: Hub, user: User, key: str | None, digest: str | None, answer: str) -> Remembered | None:
    if key is None or digest is None:
        return None
    return Remembered(id=key, user_id=user.id, body=digest, status=200, response=answer, created_at=hub.clock())


async def _stream(
    hub: Hub, body: ChatRequest, turn: Turn, key: str | None, digest: str | None
) -> AsyncGenerator[bytes, None]:
    """The events of a streamed answer. The chunk with the finish reason comes after the commit."""
    with being_written(hub, turn), hub.metrics.open_streams.track_inprogress():
        shown, said = "", None
        try:
            async with aclosing(pieces(hub, turn)) as growing:
                async for said in growing:
                    added = said.text[len(shown) :] if said.text.startswith(shown) else said.text
                    if added:
                        if not shown:
                            hub.metrics.first_chunk.observe(time.monotonic() - turn.began)
                        yield _event(_chunk(turn, said, Delta(role=None if shown else "assistant", content=added)))
                    shown = said.text
            assert said is not None
            answer = _completion(turn, [said]).model_dump_json()
            memory = _memory(hub, turn.asked.user, key, digest, answer)
            await commit(hub, turn, [said], memory)
            if await as_stored(hub, memory, answer) != answer:
                raise ApiError(409, "answered_elsewhere", "Another process answered this key: ask again to see how.")
        except BackendError as error:
            problem = unanswered(hub, turn, error)
            with suppress(ApiError):
                await durable(turn.earlier)
            if not shown:
                raise problem from error
            yield _event(problem.body().model_dump_json())
            return
        except ApiError as error:
            if not shown:
                raise
            yield _event(error.body().model_dump_json())
            return
        yield _event(_chunk(turn, said, Delta(), _reason(said)))
        if body.stream_options and body.stream_options.include_usage and (usage := _usage([said])):
            yield _event(_chunk(turn, said, None, None, usage))
        yield b"data: [DONE]\n\n"


async def _replayed(answer: str) -> AsyncGenerator[bytes, None]:
    """An answer that was given before, as a stream of one piece."""
    known = ChatCompletion.model_validate_json(answer)
    choice = known.choices[0]
    chunk = ChatChunk(
        id=known.id, created=known.created, model=known.model, flywheel_conversation=known.flywheel_conversation,
        choices=(ChunkChoice(delta=Delta(role="assistant", content=choice.message.content)),),
        flywheel_message=known.flywheel_message, flywheel_model=known.flywheel_model,
        flywheel_fallback=choice.flywheel_fallback,
    )  # fmt: skip
    yield _event(chunk.model_dump_json())
    last = (ChunkChoice(delta=Delta(), finish_reason=choice.finish_reason),)
    yield _event(chunk.model_copy(update={"choices": last}).model_dump_json())
    yield b"data: [DONE]\n\n"


async def _begin(hub: Hub, body: ChatRequest, user: User, key: str | None, digest: str | None) -> Turn:
    character = await _character(hub, body.model)
    asked = await locate(hub, body, character, user, hub.clock(), key)
    if key and digest:
        row = begun(key, digest, user.id, hub.clock())
        asked = asked._replace(events=asked.events.model_copy(update={"remembered": (row,)}))
    try:
        return await begin(hub, body, asked, key)
    except BackendError as error:
        raise ApiError(error.status, error.code, str(error)) from error


async def _character(hub: Hub, id: str) -> Character:
    found = await hub.cast.get(id)
    if found is None:
        raise not_found("model", id, "model")
    return found


def _bounded(hub: Hub, body: ChatRequest) -> None:
    bounds = hub.config.server
    if len(body.messages) > bounds.max_messages:
        raise ApiError(
            413, "too_many_messages", f"{len(body.messages)} messages, at most {bounds.max_messages}.", "messages"
        )
    longest = max(len(message.text) for message in body.messages)
    if longest > bounds.max_message_chars:
        raise ApiError(
            413,
            "message_too_long",
            f"A message of {longest} characters, at most {bounds.max_message_chars}.",
            "messages",
        )


def _completion(turn: Turn, said: list[Said]) -> ChatCompletion:
    choices = tuple(
        Choice(
            index=i, message=ReplyMessage(content=one.text), finish_reason=_reason(one), flywheel_id=one.id,
            flywheel_fallback=one.fallback,
        )
        for i, one in enumerate(said)
    )  # fmt: skip
    return ChatCompletion(
        id=said[0].id, created=int(turn.asked.utterance.created_at.timestamp()), model=turn.asked.character.id,
        choices=choices, usage=_usage(said), flywheel_conversation=turn.asked.conversation_id,
        flywheel_message=turn.asked.utterance.id, flywheel_model=turn.model,
    )  # fmt: skip


def _chunk(turn: Turn, said: Said, delta: Delta | None, reason: str | None = None, usage: Usage | None = None) -> str:
    choices = () if delta is None else (ChunkChoice(delta=delta, finish_reason=reason),)
    return ChatChunk(
        id=said.id, created=int(turn.asked.utterance.created_at.timestamp()), model=turn.asked.character.id,
        choices=choices, usage=usage, flywheel_conversation=turn.asked.conversation_id,
        flywheel_message=turn.asked.utterance.id, flywheel_model=turn.model, flywheel_fallback=said.fallback,
    ).model_dump_json()  # fmt: skip


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()


def _reason(said: Said) -> str:
    stopped = said.verdict is not None and not said.verdict.allowed and not said.fallback
    if stopped or said.finish == "error":
        return "content_filter"
    return "length" if said.finish == "length" else "stop"


def _usage(said: list[Said]) -> Usage | None:
    if said[0].prompt_tokens is None or any(one.completion_tokens is None for one in said):
        return None
    written = sum(one.completion_tokens or 0 for one in said)
    return Usage(
        prompt_tokens=said[0].prompt_tokens, completion_tokens=written,
        total_tokens=said[0].prompt_tokens + written,
    )  # fmt: skip


def _card(character: Character) -> ModelCard:
    return ModelCard(id=character.id, created=0, flywheel_name=character.name, flywheel_category=character.category)
