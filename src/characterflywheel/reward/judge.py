"""What trained reward models are worth, on pairs and people they have not seen (PAPER section 3)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .. import intervals
from ..ledger import SignalQuality
from ..records import Preference
from .calibration import log_odds
from .composite import RewardModels
from .evaluate import evaluate_preference
from .pairwise import Pairwise
from .pointwise import Pointwise
from .signals import SignalReport
from .summary import RewardSummary

__all__ = ["Margins", "RewardSummary", "judge", "pairwise_margins", "pointwise_margins"]


class Margins(NamedTuple):
    """A model's uncalibrated log-odds that `chosen` is better, pair by pair, and the two numbers they came from.

    `first` and `second` are the scores of chosen and rejected (pointwise), or the log-odds for chosen when it is read
    first and when it is read second (pairwise).
    """

    log_odds: list[float]
    first: list[float]
    second: list[float]


def pointwise_margins(model: Pointwise, pairs: Sequence[Preference]) -> Margins:
    """Scores of both replies of every pair; their difference in raw units is the log-odds."""
    sides = [(pair.chosen[-1].content, pair.rejected[-1].content) for pair in pairs]
    scores = model.score([pair.prompt for pair in pairs], sides)
    deviation = model.scale.deviation
    return Margins([(a - b) * deviation for a, b in scores], [a for a, _ in scores], [b for _, b in scores])


def pairwise_margins(model: Pairwise, pairs: Sequence[Preference]) -> Margins:
    """Every pair read in both orders; the margin is the mean of both log-odds for chosen."""
    one, two = model.both_orders(
        [pair.prompt for pair in pairs],
        [pair.chosen[-1].content for pair in pairs],
        [pair.rejected[-1].content for pair in pairs],
    )
    first = [log_odds(p) * model.temperature for p in one]
    second = [-log_odds(q) * model.temperature for q in two]
    return Margins([(a + b) / 2 for a, b in zip(first, second, strict=True)], first, second)


def judge(
    models: RewardModels, training: Sequence[Preference], held_out: Sequence[Preference],
    dropped: Mapping[str, int] | None = None, seed: int = 0,
) -> RewardSummary:  # fmt: skip
    """Evaluate saved models on held-out pairs; `dropped` counts by reason those that nothing could be learnt from.

    `summary.pointwise.calibration.applied` (and `pairwise`) is the one to keep with the models. A gold model's word on
    the others counts for as much as its own accuracy on the same pairs shows, see `summary.no_judge`.
    """
    scored, compared = pointwise_margins(models.pointwise, held_out), pairwise_margins(models.pairwise, held_out)
    pointwise = evaluate_preference(held_out, scored.log_odds, scored.first, scored.second, seed=seed)
    pairwise = evaluate_preference(held_out, compared.log_odds, orders=(compared.first, compared.second), seed=seed)
    watched = pointwise_margins(models.gold, held_out) if models.gold is not None else None
    same = np.sign(scored.log_odds) == np.sign(compared.log_odds)
    return RewardSummary(
        pairs_trained=len(training),
        pairs_held_out=len(held_out),
        dropped=dict(dropped or {}),
        pointwise_accuracy=pointwise.accuracy,
        pairwise_accuracy=pairwise.accuracy,
        signals={kind: _quality(report) for kind, report in sorted(models.signals.reports.items())},
        pointwise=pointwise,
        pairwise=pairwise,
        gold=watched and evaluate_preference(held_out, *watched, seed=seed),
        models_agree=intervals.share(same, [pair.user_id for pair in held_out]),
    )


def _quality(report: SignalReport) -> SignalQuality:
    auc = report.auc
    interval = None if auc.low is None or auc.high is None else (auc.low, auc.high)
    return SignalQuality(auc=auc.value, interval=interval, n=auc.n, usable=report.usable, reason=auc.reason)
