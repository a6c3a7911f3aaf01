"""Feedback in the shapes that clients send, as signals (PAPER sections 3 and 7).

Ours: `{"message_id", "kind", "value", "text"}`. Also understood, by the reply's id under another name (`id`,
`reply_id`, `trace_id`, `traceId`, `completion_id`, `inference_id`): scores with a `name` and a `comment` as tracing
tools send them, and metrics with a `metric_name` and a boolean or a number as gateways do.
"""

import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, NamedTuple, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..ids import derive_id
from ..records import Message, Signal, SignalKind
from .errors import ApiError
from .schemas import Id, UserId

_REPLY_NAMES = ("message_id", "id", "reply_id", "trace_id", "traceId", "completion_id", "inference_id", "observationId")
_KIND_NAMES = ("kind", "name", "metric_name", "type", "key")
_TEXT_NAMES = ("text", "comment", "reason", "content")
_THUMBS = ("thumb", "thumbs", "user-feedback", "user_feedback", "feedback_score", "score", "like", "thumbs_up")
_ALIASES: dict[str, SignalKind] = {
    "thumbs_up": "thumb_up", "upvote": "thumb_up", "like": "thumb_up", "thumbs_down": "thumb_down",
    "downvote": "thumb_down", "dislike": "thumb_down", "heart": "love", "flag": "report", "emoji": "reaction",
    "correction": "edit", "comment": "feedback", "stars": "rating", "select": "pick", "retry": "regenerate",
}  # fmt: skip
_NEEDS_TEXT = ("edit", "feedback", "reaction")
_TOLERANCE = timedelta(minutes=5)  # clocks differ


class FeedbackRequest(BaseModel):
    """`POST /v1/feedback`: what a user did after a reply. `at` is when, for events that arrive late."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    message_id: Id = Field(description="the reply's id; also read as id, reply_id, trace_id, inference_id, ...")
    kind: Annotated[str, Field(max_length=64)] = Field("feedback", description="also read as name or metric_name")
    value: float | bool | str | None = None
    text: Annotated[str, Field(max_length=16_000)] | None = Field(None, description="also read as comment or reason")
    user: UserId | None = None
    at: datetime | None = None

    @field_validator("text", "value")
    @classmethod
    def _without_nul(cls, given: float | bool | str | None) -> float | bool | str | None:
        if isinstance(given, str) and "\0" in given:
            raise ValueError("a text must not hold the character NUL")
        return given

    @model_validator(mode="before")
    @classmethod
    def _by_any_name(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        found = dict(data)
        for ours, names in (("message_id", _REPLY_NAMES), ("kind", _KIND_NAMES), ("text", _TEXT_NAMES)):
            given = next((data[name] for name in names if data.get(name) is not None), None)
            if given is not None:
                found[ours] = given
        return found


class Act(NamedTuple):
    """What a signal says, in our terms."""

    kind: SignalKind
    value: float
    text: str | None


def act_of(request: FeedbackRequest) -> Act:
    """A request's kind, value and text in our terms.

    Raises:
        ApiError: 422 for a kind that does not exist, a rating outside 1 to 5, a kind that needs text without one.
    """
    name = request.kind.strip().lower().replace("-", "_").replace(" ", "_")
    value = _number(request.value)
    if request.kind.lower() in _THUMBS and name not in get_args(SignalKind) and value is not None:
        kind: str = "thumb_up" if value > 0 else "thumb_down"
        value = 1.0
    else:
        kind = _ALIASES.get(name, name)
    if kind not in get_args(SignalKind) or kind == "continue":
        known = ", ".join(one for one in get_args(SignalKind) if one != "continue")
        raise ApiError(
            422, "unknown_kind", f"Feedback of kind {request.kind!r} is not known; there are {known}.", "kind"
        )
    text = request.text if request.text is not None else request.value if isinstance(request.value, str) else None
    if kind == "rating" and (value is None or not 1 <= value <= 5):
        raise ApiError(422, "invalid_rating", f"A rating is a number from 1 to 5, not {request.value!r}.", "value")
    if kind in _NEEDS_TEXT and not (text and text.strip()):
        raise ApiError(422, "text_missing", f"Feedback of kind {kind!r} needs a text.", "text")
    return Act(cast(SignalKind, kind), 1.0 if value is None else value, text)


def signal_of(
    request: FeedbackRequest, message: Message, key: str | None, now: datetime, given: Sequence[Signal] = ()
) -> Signal:
    """The signal that a request makes on `message`; `given` are those of its conversation so far.

    An act that says what the user's last word on the matter says already is that signal again: a second click changes
    nothing, while up, down, up is three. With an idempotency key, whose digest `key` is, the key names the signal.

    Raises:
        ApiError: 422 for what `act_of` refuses, and for a time in the future or before the message.
    """
    act, at = act_of(request), _moment(request.at, message, now)
    last = _last_word([one for one in given if one.created_at <= at], act.kind, message.id)
    if key is None and last is not None and (last.message_id, *Act(last.kind, last.value, last.text)) == (
        message.id, *act
    ):  # fmt: skip
        return last
    name = (key,) if key else (message.id, *act, last.id if last else None, request.at)
    return Signal(
        id=derive_id("signal", *name), message_id=message.id, user_id=message.user_id, kind=act.kind, value=act.value,
        text=act.text, created_at=at,
    )  # fmt: skip


def _last_word(given: Sequence[Signal], kind: SignalKind, message_id: str) -> Signal | None:
    """The newest signal on the same matter: thumbs are one matter, a pick concerns the whole conversation."""
    kinds = ("thumb_up", "thumb_down") if kind in ("thumb_up", "thumb_down") else (kind,)
    found = [one for one in given if one.kind in kinds and (kind == "pick" or one.message_id == message_id)]
    return max(found, key=lambda one: one.created_at, default=None)


def _moment(at: datetime | None, message: Message, now: datetime) -> datetime:
    """When it happened, in UTC: as the client says, within what can be."""
    if at is None:
        return now
    try:
        at = (at if at.tzinfo else at.replace(tzinfo=UTC)).astimezone(UTC)
    except OverflowError as error:
        raise ApiError(422, "time_impossible", f"at = {at.isoformat()} is no time that can be kept.", "at") from error
    if at > now + _TOLERANCE:
        raise ApiError(422, "time_ahead", f"at = {at.isoformat()}, it is only {now.isoformat()}.", "at")
    if at < message.created_at - _TOLERANCE:
        raise ApiError(
            422, "time_before", f"at = {at.isoformat()}, the message is of {message.created_at.isoformat()}.", "at"
        )
    return at


def _number(value: float | bool | str | None) -> float | None:
    if isinstance(value, str) or value is None:
        return None
    number = float(value)
    if not math.isfinite(number):
        raise ApiError(422, "invalid_value", "value must be a finite number.", "value")
    return number
