"""From a sampler of tokens to a chat model: what the local backends have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from ..records import ChatMessage
from .base import Completion, Sampling
from .chat_format import ChatFormat
from .shared_prefix import Segment

Drawn = tuple[list[int], list[float]]
"""A reply's token ids, the end token included, and their log-probabilities."""


class TokenSampler(ABC):
    """A chat model (`ChatModel` Protocol) whose backend draws token ids; `ends` are the tokens that end a reply."""

    name: str
    format: ChatFormat
    ends: frozenset[int]

    @abstractmethod
    def sample(
        self,
        prompts: Sequence[tuple[Segment, Segment]],
        *,
        n: int,
        sampling: Sampling,
        seeds: Sequence[int],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Drawn]]:
        """`n` replies to each tokenised prompt; one seed a prompt."""

    def complete(
        self,
        conversations: Sequence[Sequence[ChatMessage]],
        *,
        n: int = 1,
        sampling: Sampling = Sampling(),
        seeds: Sequence[int],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Completion]]:
        """See `ChatModel.complete`. `on_progress(done, total)` counts conversations."""
        prompts = [self.format.prompt(c) for c in conversations]
        drawn = self.sample(prompts, n=n, sampling=sampling, seeds=seeds, on_progress=on_progress)
        return [[self.format.completion(ids, logs, self.ends) for ids, logs in replies] for replies in drawn]


def one_seed_each(prompts: Sequence[object], seeds: Sequence[int]) -> None:
    """Raises ValueError where there are not as many seeds as prompts."""
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many seeds, got {len(seeds)}.")
