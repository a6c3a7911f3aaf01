"""The ledger: one row a generation, which the report, the web pages and the command line read (DESIGN section 10).

Everything here was measured by a stage; readers recompute nothing. Rows are JSON lines in `DIR/ledger.jsonl`,
sorted by generation. Writing a generation again replaces its row, so a run that was killed and run again leaves
the same ledger. What differs between two runs of one seed (durations, memory) is in `seconds` and `cost` alone.
"""

from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import Field

from . import tables
from .errors import FlywheelError
from .pipeline import write_atomically
from .records import ChatMessage, Estimate, Record, Source

Decision = Literal["ship", "hold", "reject"]
Verdict = Literal["promote", "keep", "roll_back"]


class Compared(Estimate):
    """A measurement of the new model, and the same measurement of the model before it on the same prompts.

    `worse` says which direction is harm; None where neither is (reply length). `unit` is "share" for a share of
    replies, else the unit's name in the plural ("words", "tokens").
    """

    before: Estimate
    unit: str = "share"
    worse: Literal["up", "down"] | None = None


class SignalQuality(Record):
    """How well one signal model orders the replies of unseen users: AUC, its 95% interval, and the replies judged."""

    auc: float | None
    interval: tuple[float, float] | None = None
    n: int
    usable: bool = False
    reason: str | None = None


class RewardQuality(Record):
    """Accuracy of the two preference models on held-out pairs, and of the signal models (PAPER section 3).

    Calibration errors are those of the probabilities in use, on users that no temperature was fitted on. `new_policy`:
    the pointwise accuracy of the generation before on this one's pairs, whose replies its policy wrote. None: not
    measured by this version.
    """

    pointwise_accuracy: Estimate
    pairwise_accuracy: Estimate
    signals: dict[str, SignalQuality] = Field(default_factory=dict)
    longer_wins: Estimate | None = Field(None, description="accuracy of preferring the longer reply, same pairs")
    pointwise_calibration_error: Estimate | None = None
    pairwise_calibration_error: Estimate | None = None
    swap_consistency: Estimate | None = None
    models_agree: Estimate | None = None
    best_of_n: Estimate | None = None
    new_policy: Estimate | None = None
    gold_accuracy: Estimate | None = Field(None, description="of the gold model, where one was asked for")


class JudgedWinRate(Record):
    """Share of prompts on which the new model's reply beats the old one's, by both reward models."""

    pointwise: Estimate
    pairwise: Estimate


class WinRates(Record):
    """Win rates on held-out prompts of both sources (PAPER section 6)."""

    internal: JudgedWinRate
    user: JudgedWinRate


class Steerability(Record):
    """How well replies keep to the character's instructions, new model against old (PAPER section 6)."""

    instruction_following: Compared
    instruction_violation: Compared


class StyleShift(Record):
    """A surface feature's mean, old model to new; `alarm` where it moved more than the gate allows (PAPER section 5).

    `preferred` is chosen minus rejected in the preference pairs: whether the labels themselves lean that way. `rides`
    names the comparisons of what was chosen or learnt that have an alarm in the direction of this shift.
    """

    feature: str
    before: float | None
    after: float | None
    difference: Estimate | None = None
    preferred: Estimate | None = None
    alarm: bool = False
    rides: tuple[str, ...] = ()


class OptimisedPoint(Record):
    """One strength of optimisation: the best of `n`, or `steps` of RL (first and last). At n = 1 rewards are 0.

    `distance` is sqrt(KL to where the policy starts), in nats; rewards and their `gap`, proxy minus gold, are in
    standard deviations of the start's replies to one prompt. `kl_plain` is the estimator without variance reduction.
    """

    n: int | None = None
    steps: tuple[int, int] | None = None
    distance: float
    kl: Estimate
    kl_plain: Estimate | None = None
    proxy: Estimate
    gold: Estimate
    gap: Estimate


class ScalingFit(Record):
    """R(d) = d (alpha - beta d) of best-of-n, d (alpha - beta log d) of RL (Gao, Schulman, Hilton 2022).

    `turn` is the distance from which R falls, `turn_n` its n; without a value where the data do not reach it.
    """

    alpha: Estimate
    beta: Estimate
    turn: Estimate
    turn_n: float | None = None
    farthest: float
    r2: float | None = None
    residual: float | None = None


class OptimisationCurve(Record):
    """Proxy and gold reward over the distance that one way of optimising goes.

    `gap_growth`: standard deviations that the gap grows by for each unit of distance; `ties`: share of pairs of
    candidates with equal proxy scores, at 0 of which the KL of best-of-n is exact and else a bound.
    """

    way: Literal["best_of_n", "rl"]
    prompts: int
    replies: int
    points: tuple[OptimisedPoint, ...]
    proxy: ScalingFit
    gold: ScalingFit
    gap_growth: Estimate
    ties: float | None = None


class GateCriterion(Record):
    """One line of the gate; the fields are those of `release.gate.Criterion`.

    `passed` is None where it could not be measured, which does not pass; `severity` is what failing it leads to.
    """

    name: str
    value: Estimate | float | None
    bound: float
    passed: bool | None
    severity: Literal["hold", "reject"] = "hold"
    note: str = ""


class Gate(Record):
    """What the release gate decided, with every criterion it looked at."""

    decision: Decision
    criteria: tuple[GateCriterion, ...] = ()
    reason: str = ""


class Arm(Record):
    """One arm of the experiment: who met it and what they did; means over its users but where said otherwise."""

    name: str
    model: str
    users: int
    engaged_share: float | None
    messages_per_user: float | None
    messages_per_engaged_user: float | None = None
    active_days_per_user: float | None = None


class Day(Record):
    """One calendar day of one arm: its users exposed so far, those of them active, and their messages."""

    day: int = Field(ge=0, description="days since the experiment's first exposure, from 0")
    arm: str
    users: int
    active_users: int
    messages: int


class Experiment(Record):
    """The seven-day test (PAPER section 7). Lifts are relative, 0.05 is +5%; the interval is for `confidence`."""

    name: str
    control: str
    treatment: str
    days: int
    confidence: float = 0.95
    breadth_lift: Estimate
    depth_lift: Estimate
    secondary: dict[str, Estimate] = Field(default_factory=dict)
    srm_p: float | None = None
    arms: tuple[Arm, ...] = ()
    daily: tuple[Day, ...] = ()


class Truth(Record):
    """What the embedded world knows and the pipeline never reads: the lifts that truly exist."""

    breadth_lift: float | None = None
    depth_lift: float | None = None
    note: str = ""


class Sieve(Record):
    """What a stage was given, what it kept, and the rest by reason. `what` names the things in the plural."""

    stage: str
    what: str
    taken: int
    kept: int
    dropped: dict[str, int] = Field(default_factory=dict)


class Training(Record):
    """One training stage: what it learnt from, in how many steps, and its own measure from first step to last."""

    examples: int
    steps: int
    measure: str = "loss"
    first: float | None = None
    last: float | None = None


class Cost(Record):
    """What the generation took, beside its seconds."""

    peak_memory_mb: float | None = None
    sampled_replies: int | None = None
    sampled_tokens: int | None = None
    trained_tokens: int | None = None
    device: str | None = None


class LedgerRow(Record):
    """One generation of the flywheel. `parent` and `model` are names of models, `stages` names to artifact folders."""

    generation: int = Field(ge=1)
    model: str
    parent: str
    seed: int
    preset: str | None = None
    starts: datetime | None = None
    people: Literal["simulated", "real"]
    stages: dict[str, str]
    lines: dict[str, str] = Field(default_factory=dict)
    kept: tuple[Sieve, ...] = ()
    reward: RewardQuality
    training: dict[str, Training] = Field(default_factory=dict)
    win_rate: WinRates
    production: dict[str, Compared]
    steerability: Steerability
    style: tuple[StyleShift, ...] = ()
    overoptimisation: tuple[OptimisationCurve, ...] = ()
    gate: Gate
    experiment: Experiment | None = None
    verdict: Verdict | None = None
    verdict_reason: str = ""
    truth: Truth | None = None
    samples: str | None = None
    seconds: dict[str, float] = Field(default_factory=dict)
    cost: Cost = Cost()


class SampleReply(Record):
    """One model's reply in a sample conversation, with its pointwise reward (standardised; higher is better)."""

    text: str
    score: float | None = None


class Sample(Record):
    """A held-out prompt answered by the old model and the new, chosen by seed and not by hand."""

    prompt_id: str
    source: Source
    character: str
    history: tuple[ChatMessage, ...]
    old: SampleReply
    new: SampleReply


def read(path: Path) -> list[LedgerRow]:
    """The ledger's rows by generation; none where there is no ledger yet. A bad line is named by its number."""
    if not path.exists():
        return []
    rows = sorted(tables.read_jsonl(path, LedgerRow), key=lambda row: row.generation)
    numbers = [row.generation for row in rows]
    if len(set(numbers)) != len(numbers):
        twice = sorted({n for n in numbers if numbers.count(n) > 1})
        raise FlywheelError(f"{path}: generation {twice[0]} has {numbers.count(twice[0])} rows, must be 1: remove one.")
    return rows


def append(path: Path, row: LedgerRow) -> None:
    """Write a generation's row, replacing the one it has; atomic and durable."""
    rows = {known.generation: known for known in read(path)} | {row.generation: row}
    write_atomically(path, "".join(rows[number].model_dump_json() + "\n" for number in sorted(rows)))
