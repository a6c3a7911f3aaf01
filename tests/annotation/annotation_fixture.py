"""A small pool of policies and a panel of reviewers for the annotation tests: seeded writers, no neural network."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from characterflywheel import ids
from characterflywheel.characters import bundled_characters, system_prompt
from characterflywheel.instructions import repair_all, violations
from characterflywheel.llm.base import Completion, Sampling
from characterflywheel.people import Bank, Service
from characterflywheel.records import Answers, Character, ChatMessage, Judgement, Prompt, Task

START = datetime(2026, 1, 5, tzinfo=UTC)
CHARACTERS = bundled_characters()
WORDS = (
    "sea",
    "cold",
    "tonight",
    "my lamp",
    "burns low",
    "while",
    "we talk",
    "of bread",
    "maps",
    "stars",
    "rain",
    "tea",
)


@dataclass
class Writer:
    """A policy that writes seeded word salad; `calls` counts conversations asked of it."""

    name: str
    calls: int = 0
    seen: list[str] = field(default_factory=list)
    temperatures: list[float] = field(default_factory=list)

    def complete(
        self,
        conversations: Sequence[Sequence[ChatMessage]],
        *,
        n: int = 1,
        sampling: Sampling = Sampling(),
        seeds: Sequence[int],
    ) -> list[list[Completion]]:
        self.calls += len(conversations)
        self.seen += [conversation[0].content for conversation in conversations]
        self.temperatures.append(sampling.temperature)
        out = []
        for seed in seeds:
            rng = random.Random(seed)
            texts = [" ".join(rng.choices(WORDS, k=rng.randint(4, 12))).capitalize() + "." for _ in range(n)]
            out.append([Completion(text, (1,), (-1.0,), "stop") for text in texts])
        return out


class Panel:
    """Reviewers who prefer long replies, err now and then, and rewrite where the best breaks the description."""

    def talk(self, service: Service, characters: Sequence[Character], generation: int, starts: datetime) -> None:
        raise NotImplementedError

    def live(self, bank: Bank) -> None:
        raise NotImplementedError

    def judge(self, tasks: Sequence[Task]) -> list[Judgement]:
        return [self._judge(task) for task in tasks]

    def _judge(self, task: Task) -> Judgement:
        rng = random.Random(ids.derive_seed(task.id))
        ranked = sorted(task.candidates, key=lambda c: -len(c.text) + rng.gauss(0, 8))
        broken = {c.id: violations(task.character, c.text) for c in ranked}
        best = ranked[0]
        return Judgement(
            id=ids.derive_id("judgement", task.id),
            task_id=task.id,
            prompt_id=task.prompt_id,
            reviewer=task.reviewer,
            answers=tuple(
                Answers(candidate_id=c.id, false_refusal=False, templated=rng.random() < 0.2, violates=broken[c.id])
                for c in ranked
            ),
            ranking=tuple(c.id for c in ranked),
            rewrite=repair_all(task.character, best.text) if broken[best.id] else None,
            seconds=30.0,
            created_at=START,
        )


def prompts(number: int, users: int = 8) -> list[Prompt]:
    """Prompts for annotation, a quarter of them internal; users of the two sources differ."""
    names = sorted(CHARACTERS)
    made = []
    for i in range(number):
        source = "internal" if i % 4 == 0 else "user"
        character = CHARACTERS[names[i % len(names)]]
        made.append(
            Prompt(
                id=ids.derive_id("prompt", i), conversation_id=f"c{i}", user_id=f"{source}-{i % users}", source=source,
                character_id=character.id, split="annotate", cluster=0, turn=1, created_at=START + timedelta(minutes=i),
                messages=(
                    ChatMessage(role="system", content=system_prompt(character)),
                    ChatMessage(role="user", content=f"tell me about number {i}"),
                ),
            )
        )  # fmt: skip
    return made
