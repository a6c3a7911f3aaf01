"""The annotate stage (PAPER section 2): prompts and a pool of policies in; judged, filtered preference pairs out."""

from collections import Counter
from collections.abc import Mapping, Sequence

from .. import tables
from ..config import AnnotateConfig
from ..errors import FlywheelError
from ..llm.base import ChatModel
from ..people import People
from ..pipeline import Work
from ..progress import Advance
from ..records import Candidate, Character, Dropped, Estimate, Example, Preference, Prompt, Record
from .agreement import agreement
from .candidates import STAGE, draw
from .pairs import Reviewed, make_pairs
from .tasks import check_judgements, choose, make_tasks


class AnnotateSummary(Record):
    """What annotation made. `reasons` counts dropped candidates, prompts and pairs; `agreement`: alpha by question."""

    prompts: int
    candidates: dict[str, int]
    tasks: int
    reviewers: int
    pairs: int
    held_out: int
    rewrites: int
    reasons: dict[str, int]
    agreement: dict[str, Estimate]

    def line(self) -> str:
        alpha = self.agreement["ranking"]
        agree = (
            f"alpha {alpha.value:.2f} on {alpha.n} choices" if alpha.value is not None else f"no alpha: {alpha.reason}"
        )
        why = ", ".join(f"{reason} {n}" for reason, n in self.reasons.items()) or "none"
        return (
            f"{self.pairs} pairs ({self.held_out} held out) and {self.rewrites} rewrites from {self.tasks} reviews of "
            f"{self.prompts} prompts; {agree}; dropped: {why}"
        )


def annotate(
    work: Work,
    config: AnnotateConfig,
    prompts: Sequence[Prompt],
    pool: Mapping[str, ChatModel],
    characters: Mapping[str, Character],
    people: People,
    annotators: Sequence[str],
    on_progress: Advance = lambda done, total: None,
) -> AnnotateSummary:
    """Draw alternatives for prompts of the `annotate` split, have them judged, and write pairs and rewrites.

    `people.judge` may raise Waiting; the drawn candidates are kept, and the same tasks are asked for again.
    """
    chosen = choose([prompt for prompt in prompts if prompt.split == "annotate"], config.prompts, work.seed)
    if not chosen:
        raise FlywheelError(f"none of {len(prompts)} prompts is for annotation: more traffic is needed.")
    drawn = draw(chosen, pool, config, work, on_progress)
    tasks = make_tasks(chosen, drawn.kept, characters, config.reviewers, annotators, work.seed)
    judgements = check_judgements(tasks, people.judge(tasks))
    reviewed = [
        Reviewed(
            prompt,
            {candidate.id: candidate for candidate in drawn.kept if candidate.prompt_id == prompt.id},
            [judgement for judgement in judgements if judgement.prompt_id == prompt.id],
        )
        for prompt in chosen
    ]
    unjudged = [
        Dropped(id=one.prompt.id, stage=STAGE, reason="too_few_candidates", detail=f"{len(one.candidates)} distinct")
        for one in reviewed
        if not one.judgements
    ]
    pairs = make_pairs(reviewed, config, work.seed)
    dropped = [*drawn.dropped, *unjudged, *pairs.dropped]
    tables.write(work.folder / "candidates.parquet", Candidate, drawn.kept)
    tables.write_jsonl(work.folder / "tasks.jsonl", tasks)
    tables.write_jsonl(work.folder / "judgements.jsonl", judgements)
    tables.write(work.folder / "pairs.parquet", Preference, pairs.kept)
    tables.write(work.folder / "dropped.parquet", Dropped, dropped)
    tables.write(work.folder / "rewrites.parquet", Example, pairs.rewrites)
    return AnnotateSummary(
        prompts=len(chosen),
        candidates=dict(sorted(Counter(candidate.policy for candidate in drawn.kept).items())),
        tasks=len(tasks),
        reviewers=len({task.reviewer for task in tasks}),
        pairs=len(pairs.kept),
        held_out=sum(pair.held_out for pair in pairs.kept),
        rewrites=len(pairs.rewrites),
        reasons=dict(sorted(Counter(row.reason for row in dropped).items())),
        agreement=agreement(judgements, work.seed),
    )
