"""What RL asks of whoever draws its rollouts: replies with log-probabilities, and that it takes new weights."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from ...config import RLConfig
from ...llm.base import Sampling
from ...llm.chat_format import ChatFormat
from ...llm.shared_prefix import Segment
from ...llm.token_sampler import Drawn, TokenSampler
from ..parallel import Parallel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class RolloutSampler(Protocol):
    """Draws replies, with their log-probabilities under the weights that drew them.

    `versions` are, for each reply of the last `sample`, the version of these weights: the learner's step, 0 for those
    of the stage's start.
    """

    name: str
    format: ChatFormat
    ends: frozenset[int]
    versions: list[list[int]]

    def sample(
        self, prompts: Sequence[tuple[Segment, Segment]], *, n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Drawn]]:
        """`n` replies to each tokenised prompt; raises SamplerGone where asking again did not help."""
        ...

    def push(self, model: Any, *, version: int | None = None) -> None:
        """Take over the learner's weights, as one more than the last version if absent. All processes call it."""
        ...

    def rest(self) -> None:
        """Nothing is drawn until the next `push`: weights that it brings anew may be let go meanwhile."""
        ...

    def close(self) -> None:
        """Let go of memory, connections and files."""
        ...


class Place(NamedTuple):
    """Where a sampler starts: the stage's start as a folder, the tokenizer, and what it may use."""

    config: RLConfig
    folder: Path
    tokenizer: Any
    device: str
    threads: int
    batch_replies: int
    scratch: Path
    parallel: Parallel

    @property
    def room(self) -> dict[str, int]:
        return {
            "max_prompt_tokens": self.config.max_prompt_tokens, "threads": self.threads,
            "batch_replies": self.batch_replies,
        }  # fmt: skip

    def dtype(self, automatic: torch.dtype) -> torch.dtype:
        """What the configuration asks for, `automatic` if it leaves that open."""
        return DTYPES.get(self.config.sampler.precision, automatic)


class Sampler(ABC):
    """An engine that draws token ids, and the way weights get into it (`RolloutSampler` Protocol)."""

    def __init__(self, engine: TokenSampler, kind: str) -> None:
        self.engine, self.name = engine, kind
        self.format, self.ends = engine.format, engine.ends
        self.versions: list[list[int]] = []
        self.pushed = 0  # the version that was to be brought last
        self.loaded = 0  # the version that is known to have arrived last

    def sample(
        self, prompts: Sequence[tuple[Segment, Segment]], *, n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Drawn]]:
        """See `RolloutSampler.sample`."""
        drawn = self.engine.sample(prompts, n=n, sampling=sampling, seeds=seeds)
        self.versions = self._versions(drawn)
        return drawn

    def push(self, model: Any, *, version: int | None = None) -> None:
        """See `RolloutSampler.push`."""
        self.pushed = self.pushed + 1 if version is None else version
        self._load(model, self.pushed)

    def rest(self) -> None:  # noqa: B027 - most engines keep their weights
        """See `RolloutSampler.rest`."""

    def close(self) -> None:  # noqa: B027 - most engines hold nothing to give back
        """See `RolloutSampler.close`."""

    @abstractmethod
    def _load(self, model: Any, version: int) -> None:
        """Give the engine these weights."""

    def _versions(self, drawn: Sequence[Sequence[Drawn]]) -> list[list[int]]:
        return [[self.loaded] * len(several) for several in drawn]
