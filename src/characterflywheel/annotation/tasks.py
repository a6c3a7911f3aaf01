"""Tasks for reviewers: static, and steerability on internal prompts (PAPER section 2).

Reviewers are blind to the policy, see the alternatives in an order of their own, and get equal loads.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence

from .. import ids
from ..errors import FlywheelError
from ..records import Candidate, Character, Judgement, Prompt, Task

HIDDEN = "hidden"


def choose(prompts: Sequence[Prompt], number: int, seed: int) -> list[Prompt]:
    """At most `number` prompts, drawn by seed, each source with its share of them (at least one)."""
    order = sorted(prompts, key=lambda p: (ids.derive_seed(seed, "annotate", p.id), p.id))
    number = min(number, len(order))
    sources = sorted({p.source for p in order})
    counts = Counter(p.source for p in order)
    quota = {s: max(1, round(number * counts[s] / len(order))) for s in sources}
    taken = [p for s in sources for p in [q for q in order if q.source == s][: quota[s]]]
    rest = [p for p in order if p not in taken]
    return sorted((taken + rest)[:number], key=lambda p: (p.created_at, p.id))


def make_tasks(
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    characters: Mapping[str, Character],
    reviewers: int,
    annotators: Sequence[str],
    seed: int,
) -> list[Task]:
    """`reviewers` tasks for each prompt with two candidates or more, each to another annotator, loads equal to one.

    Raises FlywheelError where there are fewer annotators than reviews, or a character is unknown.
    """
    if reviewers > len(set(annotators)):
        raise FlywheelError(
            f"annotate.reviewers == {reviewers}, must be <= {len(set(annotators))}, the annotators there are."
        )
    alternatives: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        alternatives.setdefault(candidate.prompt_id, []).append(candidate.model_copy(update={"policy": HIDDEN}))
    load = dict.fromkeys(sorted(set(annotators)), 0)
    tasks = []
    for prompt in prompts:
        if len(alternatives.get(prompt.id, ())) < 2:
            continue
        if prompt.character_id not in characters:
            raise FlywheelError(
                f"prompt {prompt.id} is with character {prompt.character_id!r}, which is not in the folder."
            )
        rng = random.Random(ids.derive_seed(seed, "tasks", prompt.id))
        for reviewer in sorted(load, key=lambda name: (load[name], rng.random()))[:reviewers]:
            load[reviewer] += 1
            order = list(alternatives[prompt.id])
            rng.shuffle(order)
            tasks.append(
                Task(
                    id=ids.derive_id("task", seed, prompt.id, reviewer, *(c.text for c in order), at=prompt.created_at),
                    kind="steerability" if prompt.source == "internal" else "static",
                    prompt_id=prompt.id,
                    character=characters[prompt.character_id],
                    history=tuple(m for m in prompt.messages if m.role != "system"),
                    candidates=tuple(order),
                    reviewer=reviewer,
                )
            )
    return tasks


def check_judgements(tasks: Sequence[Task], judgements: Sequence[Judgement]) -> list[Judgement]:
    """The judgements in the order of the tasks; an error names the first that is missing or answers another task."""
    by_task = {judgement.task_id: judgement for judgement in judgements}
    if len(judgements) != len(by_task) or by_task.keys() != {task.id for task in tasks}:
        wrong = sorted(by_task.keys() ^ {task.id for task in tasks}) or sorted(j.task_id for j in judgements)
        raise FlywheelError(
            f"{len(judgements)} judgements for {len(tasks)} tasks; the first without a match is {wrong[0]}."
        )
    for task in tasks:
        judgement = by_task[task.id]
        if sorted(judgement.ranking) != sorted(candidate.id for candidate in task.candidates):
            raise FlywheelError(
                f"judgement {judgement.id} ranks {judgement.ranking}, not the candidates of task {task.id}."
            )
    return [by_task[task.id] for task in tasks]
