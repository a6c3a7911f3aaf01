"""What the herding stages wrote, as far as the page shows it: selection, mixture, and the logs of SFT, DPO and RL.

Records here name only the fields that are read and pass over all others, so that a workspace of another version is
shown as far as it goes. What is absent is None, and the page says so; a test holds the names against the stages' own.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from .. import tables
from ..errors import FlywheelError
from ..ledger import LedgerRow
from ..records import Estimate


class _Read(BaseModel):
    """Fields that the page reads of a record or of a line of a log."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class _Line(_Read):
    """A line of `metrics.jsonl`. What is no finite number was not measured."""

    step: int

    @field_validator("*", mode="before")
    @classmethod
    def _finite(cls, value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value


class Acceptance(_Read):
    """How many candidates of a policy, a character or a source were accepted."""

    by: Literal["policy", "character", "source"]
    name: str
    drawn: int
    accepted: int
    share: Estimate


class Scored(_Read):
    """A candidate's score and what became of it; `reason` is why it was not accepted."""

    score: float
    accepted: bool
    reason: str | None = None


class Selected(_Read):
    """Of the summary of rejection sampling."""

    prompts: int
    candidates: int
    accepted: int
    threshold: float | None = None
    lift: Estimate | None = None


class Source(_Read):
    """One source of SFT's mixture."""

    source: str
    weight: float
    offered: int
    distinct: int
    drawn: int
    dropped: dict[str, int] = {}
    tokens: int | None = None
    token_share: float | None = None
    mean_words: float | None = None
    mean_score: float | None = None


class SourceLoss(_Read):
    """Loss in nats a token on the held-out examples of a source (`all`: of every one), before and after."""

    source: str
    examples: int
    before: Estimate
    after: Estimate


class Tuned(_Read):
    """Of the summary of SFT. `kept_step` is None where an older version did not say."""

    steps: int
    sources: tuple[Source, ...] = ()
    kept_step: int | None = None
    evaluation: tuple[SourceLoss, ...] = ()
    not_evaluated: str | None = None


class TuningLine(_Line):
    """A step of SFT or DPO, or an evaluation after it."""

    loss: float | None = None
    accuracy: float | None = None
    evaluation_loss: float | None = None
    evaluation_accuracy: float | None = None


class Patched(_Read):
    """Of the summary of DPO."""

    steps: int
    pairs: int
    evaluation_accuracy: Estimate | None = None


class RLLine(_Line):
    """A step of RL. Terms are before their weights; what only a look measures is None at other steps."""

    reward: float | None = None
    score: float | None = None
    length_term: float | None = None
    repetition_term: float | None = None
    style_term: float | None = None
    vetoed_share: float | None = None
    cut_off_share: float | None = None
    entropy: float | None = None
    kl: float | None = None
    kl_to_start: float | None = None
    win_rate: float | None = None
    score_gain: float | None = None
    gold_gain: float | None = None
    words: float | None = None
    effective_share: float | None = None
    equal_groups: float | None = None


class Alarm(_Read):
    """What rang, and whether it ended training."""

    step: int
    kind: str
    feature: str | None = None
    value: float
    bound: float
    n: int
    action: str
    says: str


class Stopped(_Read):
    """Why RL ended early, and of which step the weights are."""

    step: int
    kept_step: int
    why: str


class Climbed(_Read):
    """Of the summary of RL."""

    steps: int
    prompts: int
    rollouts: int
    equal_groups: int = 0
    alarms: tuple[Alarm, ...] = ()
    stopped: Stopped | None = None


class Bounds(_Read):
    """Of RL's settings: where its alarms ring."""

    every: int = 0
    kl_max: float | None = None
    entropy_min_share: float | None = None
    win_rate_max: float | None = None


class _Settings(_Read):
    alarms: Bounds = Bounds()


class StyleAlarm(_Read):
    """A style feature by which the two sides of a comparison differ, beyond chance and by more than a trifle."""

    comparison: str
    feature: str
    first_mean: float | None
    second_mean: float | None
    difference: float | None
    low: float | None
    high: float | None
    effect: float | None
    q: float | None
    n: int
    method: str
    alarm: bool


class Runs(NamedTuple):
    """What was found of a generation's herding; None and () where there is nothing."""

    selected: Selected | None = None
    acceptance: tuple[Acceptance, ...] = ()
    scores: tuple[Scored, ...] = ()
    sources: tuple[Source, ...] = ()
    tuned: Tuned | None = None
    sft: tuple[TuningLine, ...] = ()
    patched: Patched | None = None
    dpo: tuple[TuningLine, ...] = ()
    climbed: Climbed | None = None
    rl: tuple[RLLine, ...] = ()
    bounds: Bounds = Bounds()
    style: tuple[StyleAlarm, ...] = ()


R = TypeVar("R", bound=BaseModel)


def load(workspace: Path, row: LedgerRow) -> Runs:
    """The herding stages' files of a generation, as far as this workspace has them."""
    at = {name: workspace / "artifacts" / folder for name, folder in row.stages.items()}
    nowhere = workspace / "artifacts" / "none"
    stages = ("rejection_sampling", "sft", "dpo", "rl", "style")
    selection, sft, dpo, rl, style = (at.get(name, nowhere) for name in stages)
    tuned = _part(sft / "artifact.json", "summary", Tuned)
    mixture = _part(sft / "mixture.json", "sources", Source)
    return Runs(
        selected=_first(_part(selection / "artifact.json", "summary", Selected)),
        acceptance=_table(selection / "acceptance.parquet", Acceptance),
        scores=_table(selection / "scores.parquet", Scored),
        sources=mixture or (tuned[0].sources if tuned else ()),
        tuned=_first(tuned),
        sft=_lines(sft / "metrics.jsonl", TuningLine),
        patched=_first(_part(dpo / "artifact.json", "summary", Patched)),
        dpo=_lines(dpo / "metrics.jsonl", TuningLine),
        climbed=_first(_part(rl / "artifact.json", "summary", Climbed)),
        rl=_lines(rl / "metrics.jsonl", RLLine),
        bounds=(_first(_part(rl / "artifact.json", "config", _Settings)) or _Settings()).alarms,
        style=tuple(one for one in _table(style / "style.parquet", StyleAlarm) if one.alarm),
    )


def _part(path: Path, key: str, record: type[R]) -> tuple[R, ...]:
    """The record, or the records of a list, under a key of a JSON file; none where this version cannot read them."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))[key]
        return tuple(record.model_validate(one) for one in (found if isinstance(found, list) else [found]))
    except (FileNotFoundError, KeyError, ValidationError):
        return ()


def _first(found: Sequence[R]) -> R | None:
    return found[0] if found else None


def _table(path: Path, record: type[R]) -> tuple[R, ...]:
    try:
        return tuple(tables.read(path, record))
    except (FileNotFoundError, ValidationError):
        return ()


def _lines(path: Path, record: type[R]) -> tuple[R, ...]:
    try:
        return tuple(tables.read_jsonl(path, record))
    except (FileNotFoundError, FlywheelError):
        return ()
