"""What the tests of RL share: scorers by rule, a run on the tiny model, and one that keeps every checkpoint."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from training_fixture import prompt

from characterflywheel.config import RLAlarmsConfig, RLConfig
from characterflywheel.pipeline import Work
from characterflywheel.records import ChatMessage
from characterflywheel.safety.policy import SafetyPolicy
from characterflywheel.training import learner
from characterflywheel.training.rl import RLSummary, train_rl

PROMPTS = [prompt(i) for i in range(6)]
ANYTHING = SafetyPolicy(classifiers=())
UNWATCHED = RLAlarmsConfig(every=0)


class Judged:
    """A scorer by rule."""

    def __init__(self, rule: Callable[[str], float]) -> None:
        self.rule, self.asked = rule, 0

    def score(self, prompts: Sequence[Sequence[ChatMessage]], replies: Sequence[Sequence[str]]) -> list[list[float]]:
        self.asked += sum(map(len, replies))
        return [[self.rule(text) for text in several] for several in replies]


def letters(text: str) -> float:
    return sum(c.isascii() and c.isalpha() for c in text) / max(1, len(text))


def train(
    folder: Path, parent: Path, config: RLConfig, scorer: Any = None, safety: SafetyPolicy = ANYTHING, **more: Any
) -> RLSummary:
    scorer = scorer or Judged(letters)
    return train_rl(Work(folder, 3), config, parent, PROMPTS, scorer, safety, threads=1, batch_replies=16, **more)


def train_with_every_checkpoint(folder: Path, parent: Path, config: RLConfig) -> None:
    """For a process of its own, which will be killed."""
    torch.set_num_threads(1)
    learner.CHECKPOINT_SECONDS = -1.0
    train(folder, parent, config)


def metrics(folder: Path) -> list[dict[str, float]]:
    """A line a step, without that of the end."""
    return [line for line in lines(folder) if "skipped" in line]


def lines(folder: Path) -> list[dict[str, float]]:
    """A line a step, and that of the look at what the last one made."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
