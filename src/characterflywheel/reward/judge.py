"""What trained reward models are worth, on pairs and people they have not seen (PAPER section 3)."""

from collections.abc import Sequence
from math import log

from pydantic import Field

from ..ledger import SignalQuality
from ..records import Estimate, Preference, Record
from .composite import RewardModels
from .evaluate import PreferenceEvaluation, evaluate_preference
from .signals import SignalReport


class RewardSummary(Record):
    """What the reward models are worth: headline accuracies, signals, and the whole evaluation of both models."""

    pairs_trained: int
    pairs_held_out: int
    pointwise_accuracy: Estimate
    pairwise_accuracy: Estimate
    signals: dict[str, SignalQuality]
    pointwise: PreferenceEvaluation
    pairwise: PreferenceEvaluation
    dropped: dict[str, int] = Field(default_factory=dict)

    def line(self) -> str:
        """One line for people."""
        accuracies = ", ".join(
            f"{name} {_said(estimate)}" for name, estimate in
            (("pointwise", self.pointwise_accuracy), ("pairwise", self.pairwise_accuracy))
        )  # fmt: skip
        signals = ", ".join(
            f"p({name}) "
            + (f"AUC {s.auc:.2f} {'used' if s.usable else 'not used'}" if s.auc is not None else "unmeasured")
            for name, s in self.signals.items()
        )
        return f"{self.pairs_trained} pairs · held-out accuracy {accuracies} · {signals}"


def judge(models: RewardModels, training: Sequence[Preference], held_out: Sequence[Preference]) -> RewardSummary:
    """Evaluate saved models on held-out pairs."""
    prompts = [pair.prompt for pair in held_out]
    chosen, rejected = ([side[-1].content for side in sides] for sides in
                        ([p.chosen for p in held_out], [p.rejected for p in held_out]))  # fmt: skip
    scores = models.pointwise.score(prompts, list(zip(chosen, rejected, strict=True)))
    deviation = models.pointwise.scale.deviation
    one, two = models.pairwise.both_orders(prompts, chosen, rejected)
    pointwise = evaluate_preference(
        held_out, [(a - b) * deviation for a, b in scores], [a for a, _ in scores], [b for _, b in scores]
    )
    pairwise = evaluate_preference(
        held_out, [_log_odds((p + 1 - q) / 2) for p, q in zip(one, two, strict=True)],
        orders=([_log_odds(p) for p in one], [-_log_odds(q) for q in two]),
    )  # fmt: skip
    return RewardSummary(
        pairs_trained=len(training),
        pairs_held_out=len(held_out),
        pointwise_accuracy=pointwise.accuracy,
        pairwise_accuracy=pairwise.accuracy,
        signals={kind: _quality(report) for kind, report in sorted(models.signals.reports.items())},
        pointwise=pointwise,
        pairwise=pairwise,
    )


def _quality(report: SignalReport) -> SignalQuality:
    auc = report.auc
    interval = None if auc.low is None or auc.high is None else (auc.low, auc.high)
    return SignalQuality(auc=auc.value, interval=interval, n=auc.n, usable=report.usable, reason=auc.reason)


def _log_odds(p: float) -> float:
    p = min(max(p, 1e-9), 1 - 1e-9)
    return log(p / (1 - p))


def _said(estimate: Estimate) -> str:
    return "unmeasured" if estimate.value is None else f"{estimate.value:.0%} (n = {estimate.n})"
