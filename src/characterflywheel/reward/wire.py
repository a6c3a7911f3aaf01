"""What the scoring server and its clients say to each other, and how they tell which models are meant.

Requests and answers are JSON of these records. Scores cross HTTP exactly: a float is written with all of its digits.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ..records import ChatMessage, Record, Scored, SignalKind

KEY_VARIABLE = "FLYWHEEL_SCORE_KEY"
"""Environment variable with the key that the server asks for and that the client sends."""

Prompt = Annotated[tuple[ChatMessage, ...], Field(min_length=1)]


class ScoreRequest(Record):
    """Score the replies of each prompt: by the composite with its parts, the pointwise or the gold model alone."""

    prompts: tuple[Prompt, ...]
    replies: tuple[tuple[str, ...], ...]
    by: Literal["composite", "pointwise", "gold"] = "composite"

    @model_validator(mode="after")
    def _replies_for_each_prompt(self) -> Self:
        if len(self.prompts) != len(self.replies):
            raise ValueError(f"{len(self.prompts)} prompts, replies to {len(self.replies)}: give a list for each")
        return self

    @property
    def texts(self) -> int:
        return sum(map(len, self.replies))


class ScoreAnswer(Record):
    """A list of scores for each prompt; with the composite also what each is made of, where safety is not asked."""

    model: str = Field(description="the id of the models that answered, see `Card`")
    scores: list[list[float]]
    parts: list[list[Scored]] | None = None


class PreferRequest(Record):
    """P(first is better than second) for each prompt, by the pairwise or the pointwise model."""

    prompts: tuple[Prompt, ...]
    firsts: tuple[str, ...]
    seconds: tuple[str, ...]
    by: Literal["pairwise", "pointwise"] = "pairwise"

    @model_validator(mode="after")
    def _two_replies_for_each_prompt(self) -> Self:
        if not len(self.prompts) == len(self.firsts) == len(self.seconds):
            raise ValueError(
                f"{len(self.prompts)} prompts, {len(self.firsts)} firsts, {len(self.seconds)} seconds: "
                "give as many of each"
            )
        return self

    @property
    def texts(self) -> int:
        return 2 * len(self.prompts)


class PreferAnswer(Record):
    """A probability for each prompt; of the pairwise model also with either reply read first (see `both_orders`)."""

    model: str
    probabilities: list[float]
    orders: tuple[list[float], list[float]] | None = None


class Limits(Record):
    """What one request may hold, and how many may wait."""

    max_replies: int = Field(1024, ge=2)
    max_body_bytes: int = Field(8 * 2**20, ge=1024)
    max_waiting: int = Field(64, ge=1)
    max_wait_s: float = Field(600, gt=0, description="a request that would wait longer is told to come back")
    max_joined: int = Field(256, ge=1, description="replies scored in one pass, unless a single request has more")


class Card(Record):
    """Whose scores a server gives: the reward stage's artifact by name, and a hash over the models' files."""

    artifact: str
    content: str
    generation: int
    mean: float = Field(description="of raw scores on the training replies; scores are standardised by it ...")
    deviation: float = Field(description="... and by this, which makes a difference of scores log-odds")
    signals: tuple[SignalKind, ...] = Field(description="reliable on unseen users")
    weights: dict[SignalKind, float] = Field(description="that count in the composite, beside preference 1.0")
    gold: bool
    precision: str = Field(description="of products, float32 or bfloat16: joined requests are as exact as that")
    limits: Limits

    @property
    def id(self) -> str:
        return model_id(self.artifact, self.content)


class Health(Record):
    """Whether the process answers, or can score."""

    status: Literal["ok", "unavailable"]


def model_id(artifact: str, content: str) -> str:
    return f"{artifact}@{content}"


def content_of(outputs: Mapping[str, str]) -> str:
    """A hash over an artifact's files by path and SHA-256; tables aside, from which an erasure may take rows."""
    kept = sorted((path, digest) for path, digest in outputs.items() if not path.endswith((".parquet", ".jsonl")))
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:12]
