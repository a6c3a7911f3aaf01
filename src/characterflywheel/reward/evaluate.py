"""How good a preference model is on pairs it has not seen, with intervals by user (PAPER section 3).

Accuracy by slice beside the rule that the longer reply wins, calibration, whether the pairwise model keeps its mind
when the replies swap places, and whether the best of a prompt's replies is the reviewers' best. What the score leans
on is in `leans`.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from .. import intervals
from ..records import Estimate, Preference
from .calibration import calibrate
from .leans import Judged, judged_replies, leans
from .metrics import Floats
from .summary import BestOfN, Dimension, PreferenceEvaluation, Slice

__all__ = [
    "PreferenceEvaluation", "agreement", "best_of_n", "evaluate_preference", "length_match", "slices_of", "strength",
]  # fmt: skip
FEWEST_REPLIES = 4


def evaluate_preference(
    pairs: Sequence[Preference],
    margins: Sequence[float],
    chosen_scores: Sequence[float] = (),
    rejected_scores: Sequence[float] = (),
    orders: tuple[Sequence[float], Sequence[float]] | None = None,
    *,
    seed: int = 0,
) -> PreferenceEvaluation:
    """Judge a preference model on held-out pairs.

    `margins[i]` is the log-odds that the model prefers `chosen` of pair i. The pointwise model gives its scores, so
    that what they lean on can be measured; the pairwise one gives the log-odds for `chosen` in both `orders` of
    reading (`chosen` first, `rejected` first), whose average is the margin. Pairs on which the reviewers are divided
    evenly (label 0.5) have no right answer and count for nothing but calibration.

    The held-out side was drawn user by user, so the pairs of one user, whatever the prompt, count as dependent.
    """
    margin, users = np.asarray(margins, dtype=float), [pair.user_id for pair in pairs]
    lengths = np.array([[len(s[-1].content.split()) for s in (p.chosen, p.rejected)] for p in pairs]).reshape(-1, 2)
    right, longer = _won(margin), _won(lengths[:, 0] - lengths[:, 1])
    decided = [i for i, pair in enumerate(pairs) if pair.label > 0.5]

    def share(values: Floats, rows: Sequence[int]) -> Estimate:
        return intervals.share(values[list(rows)], [users[i] for i in rows])

    slices = []
    for dimension, keys in slices_of(pairs).items():
        for name in sorted({keys[i] for i in decided}):
            rows = [i for i in decided if keys[i] == name]
            slices.append(
                Slice(dimension=dimension, name=name, accuracy=share(right, rows), longer_wins=share(longer, rows))
            )
    replies = judged_replies(pairs, chosen_scores, rejected_scores) if len(chosen_scores) else []
    swap = bias = None
    if orders is not None:
        first, second = (np.asarray(side, dtype=float) for side in orders)
        swap = intervals.share((first > 0) == (second > 0), users)
        bias = _mean((_sigmoid(first) + _sigmoid(-second)) / 2 - 0.5, users)
    return PreferenceEvaluation(
        accuracy=share(right, decided),
        longer_wins=share(longer, decided),
        over_longer=_mean((right - longer)[decided], [users[i] for i in decided]),
        slices=tuple(slices),
        calibration=calibrate(margin, [pair.label for pair in pairs], users, seed),
        leans=leans(replies, seed),
        best_of_n=best_of_n(pairs, replies) if replies else None,
        swap_consistency=swap,
        first_bias=bias,
    )


def slices_of(pairs: Sequence[Preference]) -> dict[Dimension, list[str]]:
    """For each dimension, the name of every pair's slice."""
    return {
        "source": [pair.source for pair in pairs],
        "character": [pair.character_id for pair in pairs],
        "agreement": [agreement(pair) for pair in pairs],
        "strength": [strength(pair) for pair in pairs],
        "length": [length_match(pair) for pair in pairs],
        "policy": [" / ".join(sorted((pair.chosen_policy, pair.rejected_policy))) for pair in pairs],
    }


def agreement(pair: Preference) -> str:
    """How much the reviews of a pair say: `single`, `consensus` (several, all agree) or `divided`."""
    if pair.reviewers == 1:
        return "single"
    return "consensus" if pair.label == 1.0 else "divided"


def strength(pair: Preference) -> str:
    """By how much the chosen reply was preferred: `slight` up to a third of the way from first to last, `strong`
    beyond two thirds, `clear` between."""
    return "slight" if pair.strength < 0.34 else "clear" if pair.strength < 0.67 else "strong"


def length_match(pair: Preference) -> str:
    """`similar` when the longer reply has at most 1.25 times the words, else which of the two is the longer."""
    chosen, rejected = (max(1, len(side[-1].content.split())) for side in (pair.chosen, pair.rejected))
    if max(chosen, rejected) <= 1.25 * min(chosen, rejected):
        return "similar"
    return "chosen longer" if chosen > rejected else "chosen shorter"


def best_of_n(pairs: Sequence[Preference], replies: Sequence[Judged], fewest: int = FEWEST_REPLIES) -> BestOfN:
    """How often the reply with the highest score is the reviewers' best, over prompts with `fewest` replies or more.

    The reviewers' best is the one reply of a prompt that lost no comparison; where filters or ties leave several, or
    a circle leaves none, the prompt says nothing and is counted in `left_out`. Rewrites are no candidates.
    """
    beaten = {(p.prompt_id, p.rejected[-1].content) for p in pairs if p.label > 0.5 and p.chosen_policy != "rewrite"}
    by_prompt: defaultdict[str, list[Judged]] = defaultdict(list)
    for reply in replies:
        by_prompt[reply.prompt_id].append(reply)
    hits, sizes, users, left_out = [], [], [], {"too few replies": 0, "no single best": 0}
    for prompt, mine in sorted(by_prompt.items()):
        best = [reply for reply in mine if (prompt, reply.text) not in beaten]
        if len(mine) < fewest:
            left_out["too few replies"] += 1
        elif len(best) != 1:
            left_out["no single best"] += 1
        else:
            top = [reply for reply in mine if reply.score == max(one.score for one in mine)]
            hits.append((best[0] in top) / len(top))
            sizes.append(len(mine))
            users.append(mine[0].user_id)
    return BestOfN(
        accuracy=intervals.share(hits, users)
        if hits
        else Estimate(value=None, n=0, reason=f"no prompt has {fewest} replies and one undefeated"),
        chance=float(np.mean([1 / n for n in sizes])) if sizes else None,
        replies=float(np.mean(sizes)) if sizes else None,
        left_out={reason: n for reason, n in left_out.items() if n},
    )


def _won(difference: ArrayLike) -> Floats:
    """1 where the difference is above zero, 0 below, one half for a tie."""
    return np.asarray((np.sign(np.asarray(difference, dtype=float)) + 1) / 2)


def _mean(values: Floats, groups: Sequence[str]) -> Estimate:
    return intervals.mean(values, groups) if len(values) else Estimate(value=None, n=0, reason="nothing to measure")


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -60, 60))))
