"""What rejection sampling draws from and is judged by in tests; without torch, as a killed process imports it too."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from characterflywheel.config import RejectionConfig
from characterflywheel.llm.base import Completion, Sampling
from characterflywheel.records import ChatMessage, Prompt, Scored
from characterflywheel.reward.selection import combine, veto
from characterflywheel.safety.policy import SafetyPolicy

START = datetime(2026, 1, 5, tzinfo=UTC)
ASKS = ("hello", "what do you like best?", "is it cold tonight?", "tell me of the sea", "why?", "tea or bread?")


class Killed(BaseException):
    """As a kill: nothing in a stage may catch it."""


WORDS = ("sea", "cold", "stars", "rain", "tea", "bread")
CONFIG = RejectionConfig(prompts=8, candidates=6, accept_share=0.5)
SAFETY = SafetyPolicy(classifiers=(lambda text, context: ("harm",) if "poison" in text else (),))


@dataclass
class Writer:
    """A policy that writes seeded word salad, or always one text; `calls` counts the replies asked of it."""

    name: str
    text: str | None = None
    finish: str = "stop"
    calls: int = 0

    def complete(
        self, conversations: Sequence[Sequence[ChatMessage]], *, n: int = 1, sampling: Sampling = Sampling(),
        seeds: Sequence[int],
    ) -> list[list[Completion]]:  # fmt: skip
        self.calls += n * len(conversations)
        return [[self.write(random.Random(seed + i)) for i in range(n)] for seed in seeds]

    def write(self, rng: random.Random) -> Completion:
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 12))) if self.text is None else self.text
        return Completion(text, (1, 2, 3), (-1.0,) * 3, self.finish)  # type: ignore[arg-type]


class Longer:
    """A judge that likes words, may be killed, and may lose its mind."""

    killed = False
    scale = 1.0

    def judge(
        self, prompts: Sequence[Sequence[ChatMessage]], replies: Sequence[Sequence[str]], safety: SafetyPolicy
    ) -> list[list[Scored]]:
        if self.killed:
            raise Killed
        scores = [[self.scale * len(text.split()) for text in several] for several in replies]
        laughs = [[float(text.count("a")) for text in several] for several in replies]
        parts = combine(scores, {"love": laughs}, {"love": 0.01}, {"love": (0.0, 1.0)})
        return veto(parts, prompts, replies, safety)


def prompt(number: int, split: str = "train") -> Prompt:
    messages = (ChatMessage(role="system", content="You are Mo."), ChatMessage(role="user", content=ASKS[number % 6]))
    return Prompt(
        id=f"prompt-{number:02}", conversation_id=f"c{number}", user_id=f"u{number}", source="user", character_id="mo",
        messages=messages, split=split, cluster=0, turn=1, created_at=START,
    )  # fmt: skip
