"""One turn of a conversation, from utterance to durable reply (PAPER sections 7 and 9, DESIGN section 8).

In this order: the user's arm, with the exposure committed before the model is asked; safety of the utterance; the
model; safety of the reply; everything in the store; only then the answer. The utterance is handed to the store at
once, so that it outlives a model that fails. What cannot be checked is not said (fail closed).
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field, replace

from ..cards import assemble
from ..ids import derive_id, derive_seed, uuid7
from ..instructions import repair_all
from ..llm.base import Sampling
from ..records import ChatMessage, Finish, Message, Signal
from ..safety import SafetyVerdict
from ..safety.moderator import Piece, screened
from ..service_records import Events, Moderation, Remembered, Tip
from ..store.journal import JournalFull
from .assignment import Assigned
from .backends import Backend, BackendBusy, BackendError, Reply
from .chat import LOST, decline
from .durable import durable, put
from .errors import ApiError
from .hub import Hub
from .locate import Asked
from .paths import WINDOW, digest
from .schemas import ChatRequest
from .telemetry import Span, chat_span
from .tokens import estimated_tokens
from .who import harmless_name

_CANCELLED: Finish = "cancelled"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Turn:
    """A turn that may be answered: its place, who serves it, and what the store has been given so far."""

    asked: Asked
    model: str
    assigned: Assigned | None
    sampling: Sampling
    prompt: tuple[ChatMessage, ...]
    refusal: SafetyVerdict | None
    earlier: asyncio.Future[None]
    reply_ids: tuple[str, ...]
    keyed: bool
    began: float = field(default_factory=time.monotonic)

    @property
    def arm_name(self) -> str:
        """`experiment/arm`; empty outside experiments."""
        return f"{self.assigned.experiment}/{self.assigned.arm}" if self.assigned else ""


@dataclass(frozen=True)
class Said:
    """A reply as it is shown and stored. `withheld` is what safety did not let pass."""

    id: str
    text: str
    finish: Finish
    fallback: bool = False
    verdict: SafetyVerdict | None = None
    withheld: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


async def begin(hub: Hub, request: ChatRequest, asked: Asked, key: str | None) -> Turn:
    """Everything that comes before the model.

    Raises:
        ApiError: the store takes nothing now, or the model that the user's arm needs is not in service.
    """
    assigned = hub.assigner.arm_of(asked.user)
    model = assigned.model if assigned else hub.backends.default
    # as early as the utterance that brings it about, which is the experiment's first message of this user
    met_at = hub.clock() if asked.replaces else asked.utterance.created_at
    begins = all(message.role != "user" for message in asked.seen)
    exposure = hub.assigner.exposure(asked.user.id, assigned, met_at, anew=begins) if assigned else None
    earlier = put(hub, asked.events.model_copy(update={"exposures": (exposure,)}) if exposure else asked.events)
    if exposure:
        await durable(earlier)
        hub.assigner.exposed(exposure)
    context = asked.history[-1].content if asked.history else ""
    verdict = await hub.moderator.check(asked.utterance.content, context=context, subject="prompt")
    name = await harmless_name(hub, request.flywheel_user_name)
    return Turn(
        asked=asked, model=model, assigned=assigned, sampling=_sampling(hub, request),
        prompt=_prompt(hub, asked, name), refusal=None if verdict.allowed else verdict, earlier=earlier,
        reply_ids=tuple(derive_id("reply", key, i) if key else uuid7() for i in range(request.n or 1)),
        keyed=key is not None,
    )  # fmt: skip


@contextmanager
def being_written(hub: Hub, turn: Turn) -> Iterator[None]:
    """While this is open, feedback on the turn's replies waits for them instead of finding nothing."""
    written = asyncio.get_running_loop().create_future()
    hub.being_written.update(dict.fromkeys(turn.reply_ids, written))
    try:
        yield
    finally:
        for id in turn.reply_ids:
            del hub.being_written[id]
        written.set_result(None)


async def replies(hub: Hub, turn: Turn) -> list[Said]:
    """The whole replies of a turn, checked. They are not in the store yet: see `commit`."""
    if turn.refusal:
        return [_declined(turn, id) for id in turn.reply_ids]
    with _traced(hub, turn) as span:
        found = await _backend(hub, turn).complete(turn.prompt, turn.sampling, _seed(hub, turn), len(turn.reply_ids))
        said = [await _checked(hub, turn, id, reply) for id, reply in zip(turn.reply_ids, found, strict=True)]
        span.answered(said[0])
    return said


async def pieces(hub: Hub, turn: Turn) -> AsyncGenerator[Said, None]:
    """The one reply of a streamed turn, as it grows: each item holds all text that may be shown by now.

    The last item is final and not in the store yet. Where this is closed early, or the model fails in the middle, what
    was shown so far is stored before the error goes on.
    """
    id = turn.reply_ids[0]
    if turn.refusal:
        yield _declined(turn, id)
        return
    shown, last, ending = "", Piece(""), _CANCELLED
    chunks = _backend(hub, turn).stream(turn.prompt, turn.sampling, _seed(hub, turn))
    try:
        with _traced(hub, turn) as span:
            context = turn.asked.utterance.content
            async with aclosing(screened(chunks, hub.moderator, context, hub.config.safety.hold)) as passing:
                async for last in passing:
                    shown += last.text
                    if last.text.strip():
                        yield Said(id, shown, "stop")
            final = _final(turn, id, shown, last)
            span.answered(final)
        shown = ""
        yield final
    except (BackendError, ApiError):
        ending = "error"
        raise
    finally:
        if shown.strip():
            _leave(hub, turn, Said(id, shown, ending))


async def commit(hub: Hub, turn: Turn, said: list[Said], remembered: Remembered | None = None) -> None:
    """Make the turn durable: replies, what safety said, the tips that find the conversation again.

    Raises:
        ApiError: the store did not take it; nothing was acknowledged.
    """
    later = put(hub, _events(hub, turn, said, remembered))
    await durable(turn.earlier)
    await durable(later)
    for one in said:
        kind = "fallback" if one.fallback else "reply"
        hub.metrics.replies.labels(turn.model, turn.arm_name, kind).inc()
    for one in said[:1] if turn.refusal else said:
        for category in one.verdict.categories if one.verdict else ():
            hub.metrics.refused.labels("prompt" if turn.refusal else "reply", category).inc()


def unanswered(hub: Hub, turn: Turn, error: BackendError) -> ApiError:
    """What a client is told when the model did not answer."""
    headers = {"Retry-After": f"{max(1, round(error.retry_after))}"} if isinstance(error, BackendBusy) else {}
    if isinstance(error, BackendBusy):
        hub.metrics.limited.labels("model").inc()
    _log.warning("model %s did not answer: %s %s", turn.model, error.code, repr(error.detail or ""))
    return ApiError(error.status, error.code, str(error), headers=headers)


def _sampling(hub: Hub, request: ChatRequest) -> Sampling:
    ours = hub.config.serving
    return Sampling(
        temperature=ours.temperature if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        max_tokens=request.max_completion_tokens or request.max_tokens or ours.max_tokens,
    )


def _prompt(hub: Hub, asked: Asked, name: str) -> tuple[ChatMessage, ...]:
    history = [*asked.history, ChatMessage(role="user", content=asked.utterance.content)]
    return tuple(assemble(asked.character, history, hub.config.server.max_prompt_tokens, estimated_tokens, name))


def _backend(hub: Hub, turn: Turn) -> Backend:
    return hub.backends.get(turn.model)


def _seed(hub: Hub, turn: Turn) -> int:
    return derive_seed(hub.config.seed, "reply", turn.reply_ids[0])


@contextmanager
def _traced(hub: Hub, turn: Turn) -> Iterator[Span]:
    """A span around the model's work."""
    place, backend = turn.asked, hub.config.server.backend
    with chat_span(
        turn.model, backend, place.character.id, place.conversation_id, turn.sampling, turn.arm_name
    ) as span:
        yield span


async def _checked(hub: Hub, turn: Turn, id: str, reply: Reply) -> Said:
    if not reply.text.strip():
        return _lost(turn, id)
    verdict = await hub.moderator.check(reply.text, context=turn.asked.utterance.content)
    if not verdict.allowed:
        return Said(id, decline(turn.asked.character), "stop", True, verdict, reply.text)
    tokens = (reply.prompt_tokens, reply.completion_tokens)
    return Said(id, reply.text.strip(), reply.finish, False, verdict, None, *tokens)


def _declined(turn: Turn, id: str) -> Said:
    return Said(id, decline(turn.asked.character), "stop", True, turn.refusal)


def _lost(turn: Turn, id: str) -> Said:
    return Said(id, repair_all(turn.asked.character, LOST), "stop", True)


def _final(turn: Turn, id: str, shown: str, last: Piece) -> Said:
    """A stream's end. Safety may have stopped it: what was shown had passed, and if nothing was, a kind refusal is."""
    if last.verdict is not None:
        if shown.strip():
            return Said(id, shown, "stop", False, last.verdict, last.withheld)
        return Said(id, decline(turn.asked.character), "stop", True, last.verdict, last.withheld)
    if not shown.strip():
        return _lost(turn, id)
    return Said(id, shown, last.finish or "stop", False, None, None, last.prompt_tokens, last.completion_tokens)


def _leave(hub: Hub, turn: Turn, said: Said) -> None:
    """Store what a user saw of a reply that nobody waits for any more.

    A request with an idempotency key may come again, and is then answered under the reply's id: what was left has
    another.
    """
    said = replace(said, id=uuid7()) if turn.keyed else said
    with suppress(JournalFull):
        hub.journal.put(_events(hub, turn, [said], None)).add_done_callback(_noted)


def _noted(done: asyncio.Future[None]) -> None:
    if not done.cancelled() and (error := done.exception()):
        _log.error("a reply that nobody waited for was not stored: %s", error)


def _events(hub: Hub, turn: Turn, said: list[Said], remembered: Remembered | None) -> Events:
    """The rows of answered turn, in the order in which they refer to one another."""
    asked, now = turn.asked, hub.clock()
    place = {"conversation_id": asked.conversation_id, "user_id": asked.user.id}
    messages = tuple(
        Message(
            id=one.id, role="assistant", content=one.text, model=turn.model, parent_id=asked.utterance.id,
            experiment=turn.assigned.experiment if turn.assigned else None,
            arm=turn.assigned.arm if turn.assigned else None, fallback=one.fallback, finish=one.finish,
            created_at=now, **place,
        )
        for one in reversed(said)  # the conversation goes on from the newest, and clients from the first draft
    )  # fmt: skip
    moderations = tuple(
        Moderation(
            id=derive_id("moderation", asked.utterance.id if turn.refusal else one.id),
            message_id=asked.utterance.id if turn.refusal else one.id,
            subject="prompt" if turn.refusal else "reply", allowed=one.verdict.allowed,
            categories=one.verdict.categories, withheld=one.withheld, created_at=now, **place,
        )
        for one in said if one.verdict is not None and not one.verdict.allowed
    )  # fmt: skip
    told = [*asked.seen, ChatMessage(role="user", content=asked.utterance.content)]
    tips = tuple(tip for one in said for tip in _tips(asked, told, one))
    signals: tuple[Signal, ...] = ()
    if asked.replaces:
        signals = (
            Signal(
                id=derive_id("regenerate", asked.replaces, said[0].id, at=now), message_id=asked.replaces,
                user_id=asked.user.id, kind="regenerate", text=said[0].id, created_at=now,
            ),
        )  # fmt: skip
    return Events(
        messages=messages, moderations=moderations, tips=tips, signals=signals,
        remembered=(remembered,) if remembered else (),
    )  # fmt: skip


def _tips(asked: Asked, told: list[ChatMessage], one: Said) -> Iterator[Tip]:
    """What finds the conversation again by this reply: all that was said, and its end for clients that forget."""
    place = {"conversation_id": asked.conversation_id, "message_id": one.id, "user_id": asked.user.id}
    ended = [*told, ChatMessage(role="assistant", content=one.text)]
    yield Tip(id=digest(asked.user.id, asked.character.id, ended), **place)
    if len(ended) > WINDOW:
        yield Tip(id=digest(asked.user.id, asked.character.id, ended[-WINDOW:], "window"), **place)
