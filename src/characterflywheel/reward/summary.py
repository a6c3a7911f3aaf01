"""What the reward stage reports of its models: the records that the ledger, the gate and the report read.

Only records, so that readers need neither torch nor scipy.
"""

from typing import Final, Literal

from pydantic import Field

from ..ledger import RewardQuality, SignalQuality
from ..records import Estimate, Record

Dimension = Literal["source", "character", "agreement", "strength", "length", "policy"]
Standing = Literal["own", "next", "past", "later"]
CHANCE: Final = 0.5


class Slice(Record):
    """Accuracy on part of the held-out pairs, with that of preferring the longer reply on the same pairs."""

    dimension: Dimension
    name: str
    accuracy: Estimate
    longer_wins: Estimate


class ReliabilityBin(Record):
    """Pairs of like confidence: its mean, and the share of reviewers who agree with the model."""

    confidence: float
    agree: Estimate


class CalibrationError(Record):
    """Expected calibration error; `by_chance`: what a perfectly calibrated model would show on such pairs."""

    error: Estimate
    by_chance: float | None


class Calibration(Record):
    """A model's probabilities as trained and with its temperature; `after` is on users it was not fitted on."""

    temperature: float
    before: CalibrationError
    after: CalibrationError
    log_loss_before: float
    log_loss_after: float
    reliability_before: tuple[ReliabilityBin, ...] = ()
    reliability_after: tuple[ReliabilityBin, ...] = ()

    @property
    def kept(self) -> bool:
        """Whether the temperature lowered the log loss on other users; else none is applied."""
        return self.log_loss_after < self.log_loss_before

    @property
    def applied(self) -> float:
        """The temperature to use: the fitted one where it is kept, else 1."""
        return self.temperature if self.kept else 1.0

    @property
    def in_use(self) -> CalibrationError:
        """The error of the probabilities that are used: `after` where the temperature is kept, else `before`."""
        return self.after if self.kept else self.before


class Lean(Record):
    """Rank correlation of the score with a style feature over the held-out replies.

    `within` is that of what is left when each prompt's mean is taken off, which a choice among one prompt's replies
    exploits; `reviewers` is the same for the share of comparisons that a reply won with the reviewers. `p` belongs to
    `within`, adjusted over the features (Benjamini and Hochberg 1995).
    """

    feature: str
    raw: Estimate
    within: Estimate
    reviewers: Estimate
    p: float | None
    flagged: bool = False


class BestOfN(Record):
    """How often the model's best reply of a prompt is the reviewers', over prompts that have one undefeated reply.

    `chance` is what a random pick would reach. `left_out` counts prompts by reason.
    """

    accuracy: Estimate
    chance: float | None
    replies: float | None = Field(description="mean number of replies a prompt")
    left_out: dict[str, int]


class PreferenceEvaluation(Record):
    """One preference model on held-out pairs (PAPER section 3).

    `over_longer` is its accuracy less that of preferring the longer reply, paired. What scores lean on is None for a
    model that scores pairs; swap consistency and `first_bias` (P(the reply read first is better) less one half) are
    None for one that reads one reply at a time.
    """

    accuracy: Estimate
    longer_wins: Estimate
    over_longer: Estimate
    slices: tuple[Slice, ...]
    calibration: Calibration | None
    leans: tuple[Lean, ...] = ()
    best_of_n: BestOfN | None = None
    swap_consistency: Estimate | None = None
    first_bias: Estimate | None = None

    @property
    def calibration_error(self) -> Estimate:
        """Of the probabilities in use, on users that no temperature was fitted on."""
        unknown = Estimate(value=None, n=0, reason="pairs of at least two users are needed")
        return self.calibration.in_use.error if self.calibration else unknown

    def by(self, dimension: Dimension) -> dict[str, Slice]:
        """The slices of one dimension, by name."""
        return {part.name: part for part in self.slices if part.dimension == dimension}


class Cell(Record):
    """The models of one generation on the frozen held-out pairs of another.

    `left_out` counts pairs of users from whom those models learnt. `reason` says why nothing was measured.
    """

    models: int
    pairs: int
    pointwise: Estimate
    pairwise: Estimate
    left_out: int = 0

    @property
    def standing(self) -> Standing:
        """`next`: pairs of the generation after, whose replies are those of the policy that these models shaped."""
        ahead = self.pairs - self.models
        return "own" if ahead == 0 else "next" if ahead == 1 else "past" if ahead < 0 else "later"


class RewardSummary(Record):
    """What the reward models are worth: headline accuracies, signals, and the whole evaluation of both models.

    `gold`, where there is a gold model, is judged on the same held-out pairs as those that it watches.
    """

    pairs_trained: int
    pairs_held_out: int
    dropped: dict[str, int] = Field(default_factory=dict, description="pairs that no model could learn from, by reason")
    pointwise_accuracy: Estimate
    pairwise_accuracy: Estimate
    signals: dict[str, SignalQuality]
    pointwise: PreferenceEvaluation
    pairwise: PreferenceEvaluation
    models_agree: Estimate
    gold: PreferenceEvaluation | None = None
    history: tuple[Cell, ...] = ()

    def quality(self) -> RewardQuality:
        """What the ledger keeps."""
        best, last = self.pointwise.best_of_n, max((cell.pairs for cell in self.history), default=0)
        return RewardQuality(
            pointwise_accuracy=self.pointwise_accuracy,
            pairwise_accuracy=self.pairwise_accuracy,
            signals=self.signals,
            longer_wins=self.pointwise.longer_wins,
            pointwise_calibration_error=self.pointwise.calibration_error,
            pairwise_calibration_error=self.pairwise.calibration_error,
            swap_consistency=self.pairwise.swap_consistency,
            models_agree=self.models_agree,
            best_of_n=best.accuracy if best else None,
            gold_accuracy=self.gold.accuracy if self.gold else None,
            new_policy=next((c.pointwise for c in self.history if c.pairs == last and c.standing == "next"), None),
        )

    def line(self) -> str:
        """One line for people."""
        accuracies = ", ".join(
            f"{name} {_said(estimate)}" for name, estimate in
            (
                ("pointwise", self.pointwise_accuracy), ("pairwise", self.pairwise_accuracy),
                ("gold", self.gold.accuracy if self.gold else None),
            ) if estimate is not None
        )  # fmt: skip
        signals = ", ".join(
            f"p({name}) "
            + (f"AUC {s.auc:.2f} {'used' if s.usable else 'not used'}" if s.auc is not None else "unmeasured")
            for name, s in self.signals.items()
        )
        return f"{self.pairs_trained} pairs · held-out accuracy {accuracies} · {self._leaning()} · {signals}"

    def _leaning(self) -> str:
        worst = self.offenders()
        if not worst:
            return "leans on no style feature that could be told from chance"
        return "leans on " + ", ".join(f"{one.feature} {one.within.value:+.2f}" for one in worst)

    def offenders(self, most: int = 3) -> list[Lean]:
        """The style features that the score goes along with most within a prompt, of those told from chance."""
        flagged = [one for one in self.pointwise.leans if one.flagged]
        return sorted(flagged, key=lambda one: -abs(one.within.value or 0.0))[:most]


def no_judge(accuracy: Estimate | None) -> str | None:
    """Why a gold model with this held-out accuracy can tell nothing of others; None where it is better than chance."""
    name = "the gold model itself"
    if accuracy is None or accuracy.value is None or accuracy.low is None or accuracy.high is None:
        return f"{name} was not measured: {(accuracy and accuracy.reason) or 'no held-out accuracy'}"
    if accuracy.low > CHANCE:
        return None
    span = f"{accuracy.value:.0%} [{accuracy.low:.0%}, {accuracy.high:.0%}], n = {accuracy.n}"
    return f"{name} is not shown to know better than chance ({span})"


def _said(estimate: Estimate) -> str:
    return "unmeasured" if estimate.value is None else f"{estimate.value:.0%} (n = {estimate.n})"
