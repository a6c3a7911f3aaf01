"""The pointwise model computed by a vLLM server, for those who run one (PAPER section 3; `export` writes its folder).

    vllm serve ARTIFACT/pointwise --runner pooling      reward.server = "vllm+http://HOST:8000"

Token ids go to vLLM's `/classify` with `use_activation` off, raw scores come back; chat template, cuts and scale stay
here. vLLM does not say which weights it has, so they are told by what they do: before the first score the server has
to give what the model here gives on a probe. The pairwise and the signal models are computed here.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import chain

from pydantic import BaseModel, Field

from ..errors import FlywheelError
from ..records import ChatMessage, Record
from .pointwise import Pointwise
from .remote import PATIENCE_S, Connection
from .selection import Conversations

SCHEME = "vllm+"
AGREEMENT = 0.1
"""How far, in standard deviations of the score, a probe may be off: half precision is within, other weights are not."""
AT_ONCE = 256
_PROBE = (
    ("Hello there!", ("Hi! How are you?", "no", "I am a lighthouse keeper, and the sea is rough tonight.")),
    ("What did you do today?", ("I read a book about stars. Do you like stars?", "Nothing. Nothing. Nothing.")),
)


class _Classify(Record):
    """vLLM's classification request, by token ids."""

    model: str
    input: list[list[int]]
    use_activation: bool = False


class _Class(BaseModel):
    index: int
    probs: list[float] = Field(min_length=1, max_length=1)


class _Classes(BaseModel):
    data: list[_Class]


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model] = Field(min_length=1)


class Served(Pointwise):
    """A pointwise model whose scores a vLLM server computes; made by `served`."""

    def __init__(self, local: Pointwise, connection: Connection, name: str) -> None:
        super().__init__(local.net, local.form, scale=local.scale, temperature=local.temperature, threads=local.threads)
        self.connection, self.name = connection, name

    def score(self, prompts: Conversations, replies: Sequence[Sequence[str]]) -> list[list[float]]:
        """Standardised scores of the replies of each prompt. Raises FlywheelError as `Connection.ask`."""
        texts = [
            [tuple(chain.from_iterable(path)) for path in self.paths(prompt, several)]
            for prompt, several in zip(prompts, replies, strict=True)
        ]
        raw = iter(self._raw([list(ids) for several in texts for ids in several]))
        return [[(next(raw) - self.scale.mean) / self.scale.deviation for _ in several] for several in texts]

    def _raw(self, ids: Sequence[list[int]]) -> Iterator[float]:
        for start in range(0, len(ids), AT_ONCE):
            batch = list(ids[start : start + AT_ONCE])
            told = self.connection.ask("/classify", _Classify(model=self.name, input=batch), _Classes).data
            scores = {one.index: one.probs[0] for one in told}
            if scores.keys() != set(range(len(batch))) or not all(map(math.isfinite, scores.values())):
                raise FlywheelError(f"{self.connection.address} gave {len(told)} scores for {len(batch)} replies.")
            yield from (scores[i] for i in range(len(batch)))


def served(local: Pointwise, address: str, *, patience_s: float = PATIENCE_S) -> Served:
    """`local`, computed by the server at `vllm+http://...`.

    Raises:
        FlywheelError: the server cannot be reached, or does not give the scores that `local` gives.
    """
    connection = Connection(
        address.removeprefix(SCHEME), patience_s=patience_s, start="vllm serve ARTIFACT/pointwise --runner pooling"
    )
    try:
        there = Served(local, connection, connection.get("/v1/models", _Models).data[0].id)
        prompts = [(ChatMessage(role="user", content=asked),) for asked, _ in _PROBE]
        replies = [several for _, several in _PROBE]
        pairs = zip(chain(*there.score(prompts, replies)), chain(*local.score(prompts, replies)), strict=True)
        off = max(abs(a - b) for a, b in pairs)
    except FlywheelError:
        connection.close()
        raise
    if off > AGREEMENT:
        connection.close()
        raise FlywheelError(
            f"{address} serves {there.name!r}, whose scores are up to {off:.2g} standard deviations off this model's, "
            f"at most {AGREEMENT:g} is its precision: serve the pointwise/ folder of this generation's reward artifact "
            "with a vLLM whose /classify knows use_activation."
        )
    return there
