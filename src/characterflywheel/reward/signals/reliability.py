"""Which signals are reliable enough to help selection, by measured criteria (PAPER section 3).

A signal is used only if it passes all: labels enough, unseen users ranked above chance by a margin, not by the clock
of the conversation alone, better than circumstances tell without reading the reply, and calibrated.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ...records import Estimate, Record
from ..metrics import auc_by_group, calibration_error
from .biases import Bias, Circumstances, biases
from .concordance import auc, auc_gain
from .probabilities import Platt, cross_fitted, miscalibration, platt

Floats = NDArray[np.float64]
FEWEST_OF_A_CLASS = 10
FEWEST_USERS = 5
MAX_CALIBRATION_ERROR = 0.05


class Criterion(Record):
    """One thing a signal must show: `value` at least (or, `at_most`, at most) `bound`. Unmeasured is not passed."""

    name: str
    value: float | None
    bound: float
    at_most: bool = False
    passed: bool


class SignalReport(Record):
    """What a signal model showed on users it was not trained on.

    Not usable means not used: `auc.reason` says why it could not be judged, else `criteria` which one it failed.
    `auc` is the model's, `nuisance_auc` that of position, length and character together, `gain` the difference.
    Probabilities are log-odds / `temperature` + `offset`; `calibration_error` is the expected one (ten bins) of
    probabilities scaled on other users, chance included; the criterion takes chance off.
    """

    auc: Estimate
    positive_share: float | None
    temperature: float | None
    usable: bool
    offset: float | None = None
    calibration_error: Estimate | None = None
    nuisance_auc: Estimate | None = None
    gain: Estimate | None = None
    biases: dict[str, Bias] = Field(default_factory=dict)
    criteria: tuple[Criterion, ...] = ()

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the criteria that were not met."""
        return tuple(criterion.name for criterion in self.criteria if not criterion.passed)


def enough(labels: Floats, users: Sequence[str]) -> tuple[Criterion, ...]:
    """Whether there is anything to judge: labels of the rarer class, and users it comes from. NaN is unknown."""
    count, people = [], []
    for value in (0.0, 1.0):
        mine = [user for user, label in zip(users, labels, strict=True) if label == value]
        count.append(len(mine))
        people.append(len(set(mine)))
    return (
        _at_least("labels of the rarer class", min(count), FEWEST_OF_A_CLASS),
        _at_least("users of the rarer class", min(people), FEWEST_USERS),
    )


def unmeasurable(labels: Floats, users: Sequence[str]) -> SignalReport | None:
    """The report of a signal that cannot be judged, with the reason; None if it can."""
    known = ~np.isnan(labels)
    positive, n = int(np.nansum(labels)), int(known.sum())
    criteria = enough(labels, users)
    if all(criterion.passed for criterion in criteria):
        return None
    reason = f"{positive} positives among {n} labels: at least {FEWEST_OF_A_CLASS} of each class are needed"
    if criteria[0].passed:
        people = int(criteria[1].value or 0)
        reason = f"{people} users: at least {FEWEST_USERS} are needed for each class"
    return SignalReport(
        auc=Estimate(value=None, n=n, reason=reason), positive_share=positive / n if n else None, temperature=None,
        usable=False, criteria=criteria,
    )  # fmt: skip


def judge(
    label: Floats, logits: Floats, ranks: Floats, alone: Mapping[str, Floats], found: Circumstances, *,
    min_auc: float, max_calibration_error: float = MAX_CALIBRATION_ERROR, seed: int,
) -> tuple[SignalReport, Platt]:  # fmt: skip
    """The report of a signal, and the scaling of its log-odds, on rows whose label is known.

    All of `logits`, `ranks` and `alone` (of circumstances) are of models that did not see the row's user.
    """
    users = found.user
    area = auc_by_group(label, ranks, users, seed=seed)
    by_nuisance, gain = auc(label, alone["all"], users), auc_gain(label, ranks, alone["all"], users)
    report = biases(label, ranks, alone, found)
    probability = cross_fitted(logits, label, users, seed)
    scaling = platt(logits, label)
    criteria = (
        *enough(label, users),
        _at_least("AUC on unseen users, lower end", area.low, min_auc, strictly=True),
        _at_least("AUC at the same position, lower end", report["position"].model_within.low, 0.5, strictly=True),
        _at_least("AUC above position, length and character, lower end", gain.low, 0.0, strictly=True),
        _at_most("calibration error, chance taken off", miscalibration(probability, label), max_calibration_error),
    )
    return (
        SignalReport(
            auc=area, positive_share=float(label.mean()), temperature=scaling.temperature, offset=scaling.offset,
            usable=all(criterion.passed for criterion in criteria),
            calibration_error=calibration_error(probability, label), nuisance_auc=by_nuisance, gain=gain,
            biases=report, criteria=criteria,
        ),
        scaling,
    )  # fmt: skip


def _at_least(name: str, value: float | None, bound: float, strictly: bool = False) -> Criterion:
    passed = value is not None and (value > bound if strictly else value >= bound)
    return Criterion(name=name, value=value, bound=bound, passed=passed)


def _at_most(name: str, value: float | None, bound: float) -> Criterion:
    return Criterion(name=name, value=value, bound=bound, at_most=True, passed=value is not None and value <= bound)
