"""RL's distance and rewards, step by step, from the replies it learnt from and their probabilities under its start."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .bootstrap import At, Measured, Numbers


class Divergence(NamedTuple):
    """Two unbiased estimates of one reply's share in KL(policy || start), in nats, see `divergence`."""

    plain: float
    low_variance: float


def divergence(policy: Sequence[float], start: Sequence[float]) -> Divergence:
    """From log-probabilities of a reply's tokens under the policy that drew it and under its start.

    `plain` sums log(policy/start) over the tokens; `low_variance` sums Schulman's k3, (start/policy - 1) -
    log(start/policy), which is never negative: given what was said before, its mean over the next token is that token's
    KL, and these add up to the reply's.
    """
    ratio = np.asarray(start, dtype=np.float64) - np.asarray(policy, dtype=np.float64)
    return Divergence(float(-ratio.sum()), float((np.expm1(ratio) - ratio).sum()))


class Group(NamedTuple):
    """A step's replies to one prompt: its number in the list of prompts, divergences and scores, each (replies,)."""

    step: int
    prompt: int
    kl: Numbers
    kl_plain: Numbers
    proxy: Numbers
    gold: Numbers | None


class Scores(NamedTuple):
    """Of as many replies to each prompt, (prompts, replies)."""

    proxy: Numbers
    gold: Numbers | None


def pooled(steps: Sequence[int], points: int) -> list[tuple[int, int]]:
    """Runs of neighbouring steps, at most so many, as even as can be: (first, last) of each."""
    known = np.unique(np.asarray(steps, dtype=np.int64))
    return [(int(part[0]), int(part[-1])) for part in np.array_split(known, min(points, len(known)))]


def measure(
    groups: Sequence[Group], start: Scores, points: int, weights: Numbers, users: Sequence[str]
) -> tuple[list[At], Measured]:
    """A point for each run of steps: mean divergence, and rewards against the start's on the same prompts.

    The start is 0 and the unit its standard deviation between replies to one prompt. `weights` (rows, prompts): see
    `bootstrap.resampled`, made of the same `users`, one for each prompt.
    """
    runs = pooled([g.step for g in groups], points)
    prompt = np.array([g.prompt for g in groups])
    member = np.array([[first <= g.step <= last for first, last in runs] for g in groups], dtype=np.float64)
    share = weights[:, prompt]

    def mean(values: Sequence[float]) -> Numbers:
        return np.asarray((share * np.array(values)) @ member / (share @ member))

    def standardised(gained: Sequence[Numbers], begins: Numbers) -> Numbers:
        more = mean([mine.mean() - begins[g.prompt].mean() for mine, g in zip(gained, groups, strict=True)])
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(more / np.sqrt(weights @ begins.var(axis=1, ddof=1))[:, None])

    gold = [g.gold for g in groups if g.gold is not None]
    asked = [set(prompt[member[:, i] > 0].tolist()) for i in range(len(runs))]
    where = [At(len(own), len({users[p] for p in own}), steps=run) for own, run in zip(asked, runs, strict=True)]
    return where, Measured(
        mean([g.kl.mean() for g in groups]),
        mean([g.kl_plain.mean() for g in groups]),
        standardised([g.proxy for g in groups], start.proxy),
        standardised(gold, start.gold) if start.gold is not None else None,
    )
