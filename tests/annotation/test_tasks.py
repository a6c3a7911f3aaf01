"""Tasks: different reviewers, even loads, blind and shuffled; judgements that do not fit are refused."""

from collections import Counter, defaultdict
from pathlib import Path

import pytest
from annotation_fixture import CHARACTERS, Panel, Writer, prompts

from characterflywheel.annotation.candidates import draw
from characterflywheel.annotation.tasks import HIDDEN, check_judgements, choose, make_tasks
from characterflywheel.config import AnnotateConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.pipeline import Work
from characterflywheel.records import Task

PROMPTS = prompts(20)
ANNOTATORS = [f"annotator-{k}" for k in range(5)]


@pytest.fixture
def tasks(tmp_path: Path) -> list[Task]:
    drawn = draw(PROMPTS, {"a": Writer("a"), "b": Writer("b")}, AnnotateConfig(), Work(tmp_path, 1))
    return make_tasks(PROMPTS, drawn.kept, CHARACTERS, 2, ANNOTATORS, 1)


def test_two_reviewers_each_and_even_loads(tasks: list[Task]) -> None:
    by_prompt = defaultdict(set)
    for task in tasks:
        by_prompt[task.prompt_id].add(task.reviewer)
    assert {len(reviewers) for reviewers in by_prompt.values()} == {2}
    assert set(Counter(task.reviewer for task in tasks).values()) == {8}
    assert len(set(map(frozenset, by_prompt.values()))) > 5, "reviewers meet in different pairs"


def test_blind_shuffled_and_of_the_right_kind(tasks: list[Task]) -> None:
    source = {prompt.id: prompt.source for prompt in PROMPTS}
    assert {c.policy for task in tasks for c in task.candidates} == {HIDDEN}
    assert all((task.kind == "steerability") == (source[task.prompt_id] == "internal") for task in tasks)
    assert all(message.role != "system" for task in tasks for message in task.history)
    orders = defaultdict(set)
    for task in tasks:
        orders[task.prompt_id].add(tuple(c.id for c in task.candidates))
    assert sum(len(seen) == 2 for seen in orders.values()) > 10


def test_judgements_must_fit(tasks: list[Task]) -> None:
    judgements = Panel().judge(tasks)
    assert check_judgements(tasks, judgements[::-1]) == judgements
    with pytest.raises(FlywheelError, match="without a match"):
        check_judgements(tasks, judgements[1:])
    with pytest.raises(FlywheelError, match="without a match"):
        check_judgements(tasks, [*judgements, judgements[0]])
    other = judgements[0].model_copy(update={"ranking": judgements[2].ranking})
    with pytest.raises(FlywheelError, match="not the candidates"):
        check_judgements(tasks, [other, *judgements[1:]])


def test_too_few_annotators() -> None:
    with pytest.raises(FlywheelError, match="reviewers == 3, must be <= 2"):
        make_tasks(PROMPTS, [], CHARACTERS, 3, ANNOTATORS[:2], 1)


def test_choice_of_prompts_keeps_the_sources() -> None:
    chosen = choose(PROMPTS, 8, seed=4)
    assert Counter(p.source for p in chosen) == {"internal": 2, "user": 6}
    assert chosen == choose(PROMPTS[::-1], 8, seed=4)
    assert choose(PROMPTS, 99, seed=4) == PROMPTS
