"""Style monitor: does a surface feature ride along with the reward, and does the model's style drift? (PAPER section 5)

Every comparison sets two sides against each other: rejected and chosen, rejected and accepted, the model's own replies
and what SFT learnt, one checkpoint and the next, the beginning of RL and what it drew later. Replies are averaged by
prompt first, so that a prompt with eight candidates counts once. Where the sides answer the same prompts, differences
are paired by prompt; where they do not, means are compared as Welch does. Intervals are clustered by user. Over the
features of one comparison the false discovery rate is controlled (Benjamini and Hochberg 1995), so that where two
sides do not differ at all, at most a twentieth of such comparisons has a discovery. An alarm needs an effect
too, an interval clear of zero, as that of rare flags is wider than their test, and `MIN_PROMPTS` prompts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from .. import intervals
from ..errors import FlywheelError
from ..records import ChatMessage, Estimate, Record
from .features import FEATURES, Feature, measure

FALSE_DISCOVERY_RATE = 0.05
EFFECT_ALARM = 0.2
MIN_PROMPTS = 8
"""With fewer prompts a rare feature can differ by the same in all of them, which a t-test takes for certainty."""
Kind = Literal["pairs", "selection", "mixture", "checkpoints", "rl"]


class Reply(NamedTuple):
    """A reply to be measured, with the prompt it answers and the user who wrote that."""

    prompt_id: str
    user_id: str
    history: Sequence[ChatMessage]
    text: str


class Difference(Record):
    """One feature in one comparison: `difference` is second less first.

    `ratio` is second to first, None where the first is 0. `effect` is the difference over the standard deviation of
    all replies, `q` the p-value adjusted over the comparison's features. `method` is `paired` over the `n` prompts that
    both sides answered, if these are two or more and half of a side's; else `welch` over all prompts of either, `n`
    those of the smaller side.
    """

    comparison: str
    kind: Kind
    first: str
    second: str
    feature: str
    binary: bool
    first_mean: float | None
    second_mean: float | None
    difference: float | None
    low: float | None
    high: float | None
    ratio: float | None
    effect: float | None
    p: float | None
    q: float | None
    n: int
    method: Literal["paired", "welch"]
    alarm: bool
    reason: str | None = None

    @property
    def estimate(self) -> Estimate:
        """The difference as an estimate."""
        return Estimate(value=self.difference, low=self.low, high=self.high, n=self.n, reason=self.reason)


@dataclass(frozen=True)
class Side:
    """One side of a comparison: features averaged by prompt, (prompts, features), and the replies themselves."""

    name: str
    prompts: tuple[str, ...]
    users: tuple[str, ...]
    means: NDArray[np.float64]
    replies: NDArray[np.float64]


def side(name: str, replies: Iterable[Reply], features: Mapping[str, Feature] = FEATURES) -> Side:
    """Measure the replies of one side."""
    by_prompt: dict[str, list[list[float]]] = {}
    users: dict[str, str] = {}
    for reply in replies:
        row = list(measure(reply.history, reply.text, features).values())
        by_prompt.setdefault(reply.prompt_id, []).append(row)
        users[reply.prompt_id] = reply.user_id
    prompts = tuple(sorted(by_prompt))
    means = np.array([np.mean(by_prompt[prompt], axis=0) for prompt in prompts]).reshape(len(prompts), len(features))
    rows = np.array([row for prompt in prompts for row in by_prompt[prompt]]).reshape(-1, len(features))
    return Side(name, prompts, tuple(users[prompt] for prompt in prompts), means, rows)


def compare(kind: Kind, first: Side, second: Side, features: Mapping[str, Feature] = FEATURES) -> list[Difference]:
    """Every feature of `second` against `first`, false discoveries controlled, alarms marked."""
    if first.means.shape[1] != len(features) or second.means.shape[1] != len(features):
        raise FlywheelError(f"sides were not measured with these {len(features)} features: measure them again.")
    shared = sorted(set(first.prompts) & set(second.prompts))
    paired = len(shared) >= max(2, 0.5 * min(len(first.prompts), len(second.prompts)))
    a, b = (_rows(one, shared) if paired else one for one in (first, second))
    rows = [
        _difference(kind, a, b, name, number=number, binary=feature.kind == "binary", paired=paired)
        for number, (name, feature) in enumerate(features.items())
    ]
    tested = [row.p for row in rows if row.p is not None]
    if not tested:
        return rows
    adjusted = iter(stats.false_discovery_control(tested, method="bh"))
    return [_with_alarm(row, float(next(adjusted))) if row.p is not None else row for row in rows]


def _rows(one: Side, prompts: Sequence[str]) -> Side:
    place = {prompt: i for i, prompt in enumerate(one.prompts)}
    chosen = [place[prompt] for prompt in prompts]
    return Side(one.name, tuple(prompts), tuple(one.users[i] for i in chosen), one.means[chosen], one.replies)


def _difference(kind: Kind, a: Side, b: Side, feature: str, *, number: int, binary: bool, paired: bool) -> Difference:
    x, y = a.means[:, number], b.means[:, number]
    n = len(x) if paired else min(len(x), len(y))
    estimate, p = _test(a, b, number, binary=binary, paired=paired)
    means = [float(v.mean()) if len(v) else None for v in (x, y)]
    deviation = float(np.concatenate([a.replies[:, number], b.replies[:, number]]).std()) if n else 0.0
    return Difference(
        comparison=f"{a.name} to {b.name}",
        kind=kind,
        first=a.name,
        second=b.name,
        feature=feature,
        binary=binary,
        first_mean=means[0],
        second_mean=means[1],
        difference=estimate.value,
        low=estimate.low,
        high=estimate.high,
        ratio=means[1] / means[0] if means[0] and means[1] is not None else None,
        effect=estimate.value / deviation if estimate.value is not None and deviation > 0 else None,
        p=p,
        q=None,
        n=n,
        method="paired" if paired else "welch",
        alarm=False,
        reason=estimate.reason,
    )


def _test(a: Side, b: Side, number: int, *, binary: bool, paired: bool) -> tuple[Estimate, float | None]:
    """The difference with its interval, and the p-value of no difference."""
    x, y = a.means[:, number], b.means[:, number]
    if min(len(x), len(y)) < 2:
        return Estimate(value=None, n=min(len(x), len(y)), reason="fewer than two prompts on a side"), None
    if paired:
        _, error, freedom = intervals.spread(y - x, a.users)
        together = intervals.correlation(x, y)
    else:
        (_, e, f), (_, g, h) = intervals.spread(x, a.users), intervals.spread(y, b.users)
        error, together = float(np.hypot(e, g)), 0.0
        freedom = max(1, round(error**4 / (e**4 / max(f, 1) + g**4 / max(h, 1)))) if error > 0 else 1
    value = float(y.mean() - x.mean())
    if freedom < 1 or np.isnan(error):
        return Estimate(value=value, n=len(x), reason="one user only: no interval"), None
    p = float(2 * stats.t.sf(abs(value) / error, freedom)) if error > 0 else float(value == 0)
    if binary:
        return intervals.difference(intervals.share(x, a.users), intervals.share(y, b.users), together), p
    half = error * float(stats.t.ppf((1 + intervals.CONFIDENCE) / 2, freedom))
    return Estimate(value=value, low=value - half, high=value + half, n=min(len(x), len(y))), p


def _with_alarm(row: Difference, q: float) -> Difference:
    clear = row.low is not None and row.high is not None and (row.low > 0 or row.high < 0)
    found = clear and q < FALSE_DISCOVERY_RATE and row.n >= MIN_PROMPTS
    alarm = found and row.effect is not None and abs(row.effect) >= EFFECT_ALARM
    return row.model_copy(update={"q": q, "alarm": alarm})
