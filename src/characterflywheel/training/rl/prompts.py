"""Which prompts online RL learns from: near-policy ones, chosen by their candidates' scores (PAPER section 4).

Rejection sampling has scored several replies of a close policy to each prompt, so a low mean says where the policy is
weak and a high variance where a group's comparison has something to teach. A floor of ordinary prompts, drawn at
random, keeps the rest of the traffic in sight. Every choice says why it was made.
"""

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Literal, NamedTuple

from ...errors import FlywheelError
from ...ids import derive_seed
from ...records import Candidate, Prompt, PromptChoice

By = Literal["variance", "low_score", "random"]


class Chosen(NamedTuple):
    """The prompts in the order in which they are learnt from, and why each was chosen, in the same order."""

    prompts: list[Prompt]
    why: list[PromptChoice]


class _Scores(NamedTuple):
    """What a prompt's candidates scored; None where there are too few of them."""

    number: int
    mean: float | None
    variance: float | None


_UNSCORED = _Scores(0, None, None)


def _by_variance(one: _Scores) -> float | None:
    """Larger first; a prompt whose candidates all score the same has nothing to compare."""
    return one.variance or None


def _by_low_score(one: _Scores) -> float | None:
    return None if one.mean is None else -one.mean


_RANK: Mapping[By, Callable[[_Scores], float | None]] = {
    "variance": _by_variance, "low_score": _by_low_score, "random": lambda one: None,
}  # fmt: skip


def choose(
    prompts: Sequence[Prompt], scored: Sequence[Candidate], count: int, *, by: By, ordinary_share: float, seed: int,
    fresh_days: float | None = None, now: datetime | None = None,
) -> Chosen:  # fmt: skip
    """At most `count` prompts of the training split, none twice, in an order that does not depend on the input's.

    Of `count` prompts, count (1 - ordinary_share), rounded down, come by the rule `by`, the largest variance or the
    lowest mean first, fewer where the rule has no more to say; the others are drawn evenly from what is left. `scored`
    are rejection sampling's candidates; those without a score count as absent. `fresh_days` keeps prompts written at
    most so long before `now`, by default the newest training prompt's time.

    Raises:
        FlywheelError: `count` or `ordinary_share` out of bounds, a score that is not finite, or no prompt that is
            fresh enough though there are prompts.
    """
    if count < 1:
        raise FlywheelError(f"count == {count}, must be >= 1: reinforcement learning needs a prompt.")
    if not 0 <= ordinary_share <= 1:
        raise FlywheelError(f"ordinary_share == {ordinary_share}, must be in [0, 1]: look at rl.ordinary_share.")
    training = sorted({p.id: p for p in prompts if p.split == "train"}.values(), key=lambda p: p.id)
    if not training:
        return Chosen([], [])
    newest = max(p.created_at for p in training)
    now = now or newest
    fresh = [p for p in training if fresh_days is None or now - p.created_at <= timedelta(days=fresh_days)]
    if not fresh:
        raise FlywheelError(
            f"the newest of {len(training)} training prompts is {_days(now - newest):.1f} days old, at most "
            f"{fresh_days:g} are near-policy: gather traffic, or raise rl.fresh_days."
        )
    scores = _scores(scored)
    ranks = {p.id: _RANK[by](scores.get(p.id, _UNSCORED)) for p in fresh}
    ranked = sorted((p for p in fresh if ranks[p.id] is not None), key=lambda p: (-(ranks[p.id] or 0.0), p.id))
    picked = ranked[: math.floor(count * (1 - ordinary_share) + 1e-9)]
    by_rule = {p.id for p in picked}
    rest = [p for p in fresh if p.id not in by_rule]
    picked += random.Random(seed).sample(rest, min(len(rest), count - len(picked)))
    random.Random(derive_seed(seed, "order")).shuffle(picked)
    return Chosen(picked, [_why(p, by if p.id in by_rule else "random", scores, now) for p in picked])


def _why(prompt: Prompt, by: By, scores: Mapping[str, _Scores], now: datetime) -> PromptChoice:
    told = scores.get(prompt.id, _UNSCORED)
    return PromptChoice(
        prompt_id=prompt.id, reason="ordinary" if by == "random" else by, scores=told.number, mean=told.mean,
        variance=told.variance, age_days=_days(now - prompt.created_at),
    )  # fmt: skip


def _scores(scored: Sequence[Candidate]) -> dict[str, _Scores]:
    values: dict[str, list[float]] = {}
    for one in scored:
        if one.score is not None:
            if not math.isfinite(one.score):
                raise FlywheelError(
                    f"candidate {one.id} of prompt {one.prompt_id} has score {one.score}, must be finite: look at the "
                    "reward model's training before going on."
                )
            values.setdefault(one.prompt_id, []).append(one.score)
    return {
        id: _Scores(len(mine), statistics.fmean(mine), statistics.variance(mine) if len(mine) > 1 else None)
        for id, mine in values.items()
    }


def _days(span: timedelta) -> float:
    return span / timedelta(days=1)
