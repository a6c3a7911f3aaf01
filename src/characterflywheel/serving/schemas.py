"""Requests and answers of the HTTP API: OpenAI's shapes, ours in `flywheel_...` fields (DESIGN section 10)."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_serializer

from ..records import Finish, Record, Role, SignalKind

Id = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+$")]
UserName = Annotated[str, Field(max_length=32, pattern=r"^[\w][\w .'’-]*$")]
UserId = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+$")]


class Request(BaseModel):
    """Base of request bodies: what we do not know is ignored, as clients send fields of newer API versions."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class TextPart(Request):
    """One part of a message given as parts; only text can be said to a character."""

    type: Literal["text"]
    text: str


class InputMessage(Request):
    """A message as clients send it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | tuple[TextPart, ...]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class StreamOptions(Request):
    """Options of a streamed answer."""

    include_usage: bool = False


class ChatRequest(Request):
    """`POST /v1/chat/completions`. `model` is a character's id; the last message is the user's."""

    model: Id
    messages: Annotated[tuple[InputMessage, ...], Field(min_length=1)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(1, ge=1, le=8)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1, le=4096)
    max_completion_tokens: int | None = Field(None, ge=1, le=4096)
    user: UserId | None = None
    flywheel_conversation: Id | None = Field(None, description="go on with this conversation; its history is ours")
    flywheel_regenerate: Id | None = Field(None, description="write another reply in place of this one, which is kept")
    flywheel_parent: Id | None = Field(None, description="the reply that is answered; the current one if absent")
    flywheel_user_name: UserName | None = Field(None, description="for {{user}} in cards")

    @field_validator("messages")
    @classmethod
    def _ends_with_the_user(cls, messages: tuple[InputMessage, ...]) -> tuple[InputMessage, ...]:
        if messages[-1].role != "user" or not messages[-1].text.strip():
            raise ValueError("the last message must be the user's and must not be empty")
        if any("\0" in message.text for message in messages):
            raise ValueError("a message must not hold the character NUL")
        return messages


class ReplyMessage(Record):
    """The character's words in a completion."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(Record):
    """One reply. `flywheel_id` is its message id, which feedback names."""

    index: int
    message: ReplyMessage
    finish_reason: Literal["stop", "length", "content_filter"]
    logprobs: None = None
    flywheel_id: str
    flywheel_fallback: bool = False


class Usage(Record):
    """Tokens, where the backend counts them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletion(Record):
    """A whole answer. `id` is the message id of the first choice."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: tuple[Choice, ...]
    usage: Usage | None = None
    flywheel_conversation: str
    flywheel_message: str
    flywheel_model: str


class Delta(Record):
    """What a chunk of a streamed answer adds; what it does not add is not named."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer
    def _what_it_adds(self) -> dict[str, str]:
        return {name: value for name, value in (("role", self.role), ("content", self.content)) if value is not None}


class ChunkChoice(Record):
    """The one choice of a chunk."""

    index: int = 0
    delta: Delta
    finish_reason: Literal["stop", "length", "content_filter"] | None = None


class ChatChunk(Record):
    """A piece of a streamed answer; the one with `finish_reason` is sent when the reply is in the store."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: tuple[ChunkChoice, ...]
    usage: Usage | None = None
    flywheel_conversation: str
    flywheel_message: str
    flywheel_model: str
    flywheel_fallback: bool = False


class ModelCard(Record):
    """A character as `/v1/models` lists it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "flywheel"
    flywheel_name: str
    flywheel_category: str


class ModelList(Record):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: tuple[ModelCard, ...]


class MessageView(Record):
    """A message as its own user sees it. Replies to the same `parent_id` are alternatives."""

    id: str
    role: Role
    content: str
    parent_id: str | None
    fallback: bool
    finish: Finish | None
    created_at: datetime
    current: bool = Field(description="whether it is on the path that the conversation goes on from")
    signals: tuple[SignalKind, ...] = Field((), description="each kind once, the one given last at the end")


class ConversationView(Record):
    """A conversation of the asking user."""

    id: str
    character: str
    character_name: str
    created_at: datetime
    messages: tuple[MessageView, ...] = ()


class ConversationList(Record):
    """Conversations, newest first; `next` is the `before` of the next page, None at the end."""

    data: tuple[ConversationView, ...]
    next: str | None


class ConversationRequest(Request):
    """`POST /v1/conversations`: begin to talk; the character greets. `greeting` numbers its alternate greetings."""

    character: Id
    user: UserId | None = None
    greeting: int = Field(0, ge=0, le=1000)
    user_name: UserName = Field("User", description="for {{user}} in cards")


class MeView(Record):
    """What the service holds about the asking user."""

    id: str
    consent: bool = Field(description="whether their messages may be used for training")


class MeRequest(Request):
    """`PATCH /v1/me`."""

    consent: bool


class FeedbackView(Record):
    """A signal as it is stored."""

    id: str
    message_id: str
    kind: SignalKind
    value: float
    text: str | None
    created_at: datetime


class Health(Record):
    """`/healthz` and `/readyz`: whether each part works, in a word or a sentence."""

    status: Literal["ok", "unavailable"]
    checks: dict[str, str] = Field(default_factory=dict)
