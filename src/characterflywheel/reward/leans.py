"""What a reward model's score goes along with: every style feature, across and within prompts (PAPER sections 3, 5).

Selection and reinforcement learning choose among replies of one prompt, so the correlation within prompts is what
they exploit. Beside it stands the reviewers' own: a lean that people share is taste, one that they do not is a leak.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import false_discovery_control

from ..records import ChatMessage, Estimate, Preference
from ..style.features import FEATURES, measure
from .metrics import Floats, permutation_p_values, rank_correlation, within_groups
from .summary import Lean

FALSE_DISCOVERY_RATE = 0.05
PERMUTATIONS = 2000
FEWEST_USERS = 5
MOST = 4000  # replies: a correlation is then known to 0.03


class Judged(NamedTuple):
    """A held-out reply: its score, and the share of its comparisons that it won with the reviewers."""

    prompt_id: str
    user_id: str
    history: tuple[ChatMessage, ...]
    text: str
    score: float
    won: float


def judged_replies(
    pairs: Sequence[Preference], chosen_scores: Sequence[float], rejected_scores: Sequence[float]
) -> list[Judged]:
    """Every reply that a policy wrote, once for its prompt, in the order of prompts; annotators' rewrites are none."""
    found: dict[tuple[str, str], tuple[Preference, float]] = {}
    won: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for pair, *scores in zip(pairs, chosen_scores, rejected_scores, strict=True):
        sides = ((pair.chosen, pair.chosen_policy, pair.label), (pair.rejected, pair.rejected_policy, 1 - pair.label))
        for (side, policy, label), score in zip(sides, scores, strict=True):
            if policy != "rewrite":
                key = (pair.prompt_id, side[-1].content)
                found.setdefault(key, (pair, score))
                won[key].append(label)
    return [
        Judged(prompt, pair.user_id, pair.prompt, text, score, float(np.mean(won[prompt, text])))
        for (prompt, text), (pair, score) in sorted(found.items(), key=lambda item: item[0])
    ]


def leans(replies: Sequence[Judged], seed: int) -> tuple[Lean, ...]:
    """The rank correlation of the score with each style feature, strongest within prompts first.

    Prompts with one reply say nothing within. A feature is flagged when its correlation within prompts is told from
    chance at a false discovery rate of 5% over all features (Benjamini and Hochberg 1995). Scores are shuffled within
    prompts for that; intervals are by user. Of more than `MOST` replies those to some users, drawn by `seed`, are
    measured.
    """
    if not replies:
        return ()
    replies = _drawn(replies, seed)
    table = np.array([list(measure(r.history, r.text).values()) for r in replies])
    prompts, users = (np.array(names) for names in zip(*((r.prompt_id, r.user_id) for r in replies), strict=True))
    score, won = np.array([r.score for r in replies]), np.array([r.won for r in replies])
    _, member, sizes = np.unique(prompts, return_inverse=True, return_counts=True)
    several = sizes[member] > 1
    groups, asking = prompts[several].tolist(), users[several].tolist()
    centred = [within_groups(values[several], groups) for values in (score, won, *table.T)]
    own, theirs, features = centred[0], centred[1], np.array(centred[2:]).T
    varies = [bool(groups) and bool(np.ptp(column) > 0) and bool(np.ptp(own) > 0) for column in features.T]
    p = permutation_p_values(own, features, groups, seed=seed, draws=PERMUTATIONS) if groups else np.ones(len(varies))
    tested = [value for value, known in zip(p, varies, strict=True) if known]
    adjusted = iter(false_discovery_control(tested) if tested else ())
    found = []
    for name, column, inside, known in zip(FEATURES, table.T, features.T, varies, strict=True):
        within = _within(own, inside, asking, seed)
        value = float(next(adjusted)) if known else None
        found.append(
            Lean(
                feature=name,
                raw=rank_correlation(score, column, users.tolist(), seed=seed),
                within=within,
                reviewers=_within(theirs, inside, asking, seed),
                p=value,
                flagged=value is not None and value <= FALSE_DISCOVERY_RATE and within.value is not None,
            )
        )
    return tuple(sorted(found, key=lambda one: -abs(one.within.value or 0.0)))


def _drawn(replies: Sequence[Judged], seed: int) -> list[Judged]:
    """All replies, or those to users in a random order until `MOST` are reached; their own order stays."""
    names, member, sizes = np.unique([r.user_id for r in replies], return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    taken = np.zeros(len(names), dtype=bool)
    taken[order[: 1 + int((sizes[order].cumsum() < MOST).sum())]] = True
    return [reply for reply, inside in zip(replies, taken[member], strict=True) if inside]


def _within(values: Floats, feature: Floats, users: Sequence[str], seed: int) -> Estimate:
    """The correlation of two centred columns; no interval where too few users got replies that differ in it."""
    found = rank_correlation(values, feature, users, seed=seed)
    differ = len({user for user, value in zip(users, feature, strict=True) if value != 0})
    if found.value is None or differ >= FEWEST_USERS:
        return found
    return Estimate(value=found.value, n=found.n, reason=f"replies to {differ} users differ in it: no interval")
