"""Characters, prompts and scripted models for the tests of offline evaluation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import SimpleNamespace

from characterflywheel.evaluation.answers import Answer
from characterflywheel.llm.base import Completion, Sampling
from characterflywheel.records import Character, ChatMessage, Instruction, Prompt, Rule, Source
from characterflywheel.text import folded

CHARACTER = Character(
    id="ada",
    name="Ada",
    category="science",
    traits=("curious",),
    instructions=(
        Instruction(text="Answer in at most 12 words.", rule=Rule(kind="max_words", number=12)),
        Instruction(text="End with a question.", rule=Rule(kind="ends_with_question")),
        Instruction(text="Be kind."),
    ),
    greeting="Hello, you!",
)


def prompt(number: int, source: Source = "user", said: str = "tell me about the stars", user: str = "") -> Prompt:
    return Prompt(
        id=f"p{number:03}",
        conversation_id=f"c{number:03}",
        user_id=user or f"u{number:03}",
        source=source,
        character_id="ada",
        messages=(ChatMessage(role="system", content="You are Ada."), ChatMessage(role="user", content=said)),
        split="evaluate",
        cluster=0,
        turn=1,
        created_at=datetime(2026, 1, 5, tzinfo=UTC),
    )


def answer(text: str, number: int = 0, said: str = "tell me about the stars", **more: object) -> Answer:
    fields = {"tokens": len(text.split()), "finish_reason": "stop", "character": CHARACTER} | more
    return Answer(prompt=prompt(number, said=said), text=text, **fields)  # type: ignore[arg-type]


@dataclass
class Scripted:
    """A chat model whose reply is a function of the last message and the seed; counts what it is asked."""

    name: str
    say: Callable[[str, int], str]
    asked: int = 0

    def complete(
        self,
        conversations: Sequence[Sequence[ChatMessage]],
        *,
        n: int = 1,
        sampling: Sampling = Sampling(),
        seeds: Sequence[int],
    ) -> list[list[Completion]]:
        self.asked += len(conversations)
        done = []
        for messages, seed in zip(conversations, seeds, strict=True):
            words = self.say(messages[-1].content, seed).split(" ")
            kept = words[: sampling.max_tokens]
            reason = "stop" if len(kept) == len(words) else "length"
            done.append([Completion(" ".join(kept), tuple(range(len(kept))), (0.0,) * len(kept), reason)] * n)  # type: ignore[arg-type]
        return done


@dataclass
class WarmthJudge:
    """Reward models that count warm words: enough to know which of two replies must win."""

    pointwise: object = field(init=False)
    pairwise: object = field(init=False)

    def __post_init__(self) -> None:
        def warmth(text: str) -> float:
            return float(sum(word in ("lovely", "friend", "star") for word in folded(text)))

        self.pointwise = SimpleNamespace(score=lambda prompts, replies: [[warmth(r) for r in row] for row in replies])
        self.pairwise = SimpleNamespace(
            prefers=lambda prompts, firsts, seconds: [
                0.5 + 0.1 * max(-4.0, min(4.0, warmth(a) - warmth(b))) for a, b in zip(firsts, seconds, strict=True)
            ]
        )
