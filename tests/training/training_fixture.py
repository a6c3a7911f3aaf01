"""What the training tests learn from: prompts, examples and pairs with small texts, and a run that dies."""

from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from characterflywheel.records import Example, Preference, Prompt
from tiny_model import asks, says

START = datetime(2026, 1, 5, tzinfo=UTC)
ASKS = ("hello", "what do you like best?", "is it cold tonight?", "tell me of the sea", "why?", "tea or bread?")


class Killed(BaseException):
    """As a kill: nothing in a stage may catch it."""


def dies_at(step: int):  # type: ignore[no-untyped-def]
    """A progress callback that kills the run when it hears of this step."""

    def on_progress(done: int, total: int, /) -> None:
        if done == step:
            raise Killed

    return on_progress


def prompt(number: int, split: str = "train") -> Prompt:
    return Prompt(
        id=f"prompt-{number:02}", conversation_id=f"c{number}", user_id=f"u{number}", source="user", character_id="mo",
        messages=asks(ASKS[number % len(ASKS)]), split=split, cluster=0, turn=1, created_at=START,
    )  # fmt: skip


def example(number: int, reply: str, *, asked: int | None = None, source: str = "user") -> Example:
    asked = number if asked is None else asked
    return Example(
        id=f"example-{number:02}", prompt_id=f"prompt-{asked:02}", user_id=f"u{asked}", character_id="mo",
        source=source, messages=(*asks(ASKS[asked % len(ASKS)]), says("assistant", reply)),
    )  # fmt: skip


def pair(number: int, chosen: str, rejected: str, *, label: float = 1.0, held_out: bool = False) -> Preference:
    return Preference(
        id=f"pair-{number:02}", prompt_id=f"prompt-{number:02}", user_id=f"u{number}", character_id="mo",
        source="user", prompt=asks(ASKS[number % len(ASKS)]), chosen=(says("assistant", chosen),),
        rejected=(says("assistant", rejected),), chosen_policy="a", rejected_policy="b", reviewers=2, label=label,
        held_out=held_out,
    )  # fmt: skip


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same_weights(one: Path, two: Path) -> bool:
    a, b = weights(one), weights(two)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name].to(a[name].dtype)) for name in a)
