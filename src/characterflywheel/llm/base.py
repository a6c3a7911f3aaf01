"""The Protocol that every chat model backend fulfils; the pipeline cannot tell them apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from ..records import ChatMessage


@dataclass(frozen=True)
class Sampling:
    """How to draw a reply. `top_p` 1.0 samples the whole distribution, which reinforcement learning needs."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 64


class Completion(NamedTuple):
    """One sampled reply.

    `logprobs[t]` is the natural log-probability of `token_ids[t]` under the sampler at the sampling temperature,
    before any top-p truncation; the end token is included in both when the reply ended by itself.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]


class ChatModel(Protocol):
    """Completes conversations. `name` goes into every message it writes."""

    name: str

    def complete(
        self,
        conversations: Sequence[Sequence[ChatMessage]],
        *,
        n: int = 1,
        sampling: Sampling = Sampling(),
        seeds: Sequence[int],
    ) -> list[list[Completion]]:
        """`n` replies to each conversation; `seeds[i]` makes conversation i's replies repeatable.

        The same call gives the same result on the same machine; how conversations are grouped may change the
        last bits of a probability, and so, rarely, a token.
        """
        ...
