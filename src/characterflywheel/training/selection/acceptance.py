"""Which candidates are accepted, and why the others are not: rules over scores, as pure functions (PAPER section 4).

A reply that is unsafe, empty, cut off or repeated is never accepted. Of the others, the `accept_per_prompt` best of
each prompt may be, where they beat their prompt's typical candidate by `margin`; of those, the rule takes:

- `share`: all that score at least what `accept_share` of the prompts' best replies reach, so that hard prompts without
  a good reply teach nothing; `threshold`: all that have `min_score`; `best`: all.

Quotas by character then hold down one that talks much. Under the rule `share` the places that they leave go to the
next best replies of other characters; the other rules have taken all there are, so fewer are accepted.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Literal, NamedTuple

from ...config import RejectionConfig
from ...errors import FlywheelError
from ...records import Candidate, Scored

Reason = Literal[
    "empty", "cut_off", "repeated", "unsafe", "not_best", "small_margin", "below_threshold", "character_quota"
]
UNACCEPTABLE: frozenset[Reason] = frozenset({"empty", "cut_off", "repeated", "unsafe"})
"""Reasons for which a reply is never accepted, whatever it scores."""


class Verdicts(NamedTuple):
    """Why each candidate is not accepted, by its id; None for the accepted. `threshold` is the score they have."""

    reasons: dict[str, Reason | None]
    threshold: float | None


def decide(
    candidates: Mapping[str, Sequence[Candidate]],
    parts: Mapping[str, Scored],
    characters: Mapping[str, str],
    config: RejectionConfig,
) -> Verdicts:
    """Judge the candidates of each prompt, which have their scores in `parts` by id.

    `characters` is whose prompt it is. Nothing depends on the order of prompts or candidates.
    """
    reasons: dict[str, Reason | None] = {}
    for several in candidates.values():
        reasons |= _first_look(several, parts, config)
    passing = [c for several in candidates.values() for c in several if reasons[c.id] is None]
    passing.sort(key=lambda c: (-parts[c.id].score, c.id))
    threshold = _threshold(candidates, passing, parts, config)
    good = [c for c in passing if threshold is not None and parts[c.id].score >= threshold]
    reasons |= {c.id: "below_threshold" for c in passing[len(good) :]}
    if config.max_character_share is None and config.max_per_character is None:
        return Verdicts(reasons, threshold)
    reach = passing if config.accept == "share" else good
    reasons |= {c.id: "character_quota" for c in good}
    for candidate in _within_quotas(reach, len(good), characters, config):
        reasons[candidate.id] = None
    return Verdicts(reasons, threshold)


def _first_look(
    several: Sequence[Candidate], parts: Mapping[str, Scored], config: RejectionConfig
) -> dict[str, Reason | None]:
    """What can be said of one prompt's candidates without the others."""
    if not several:
        return {}
    ranked = sorted(several, key=lambda c: (-parts[c.id].score, c.id))
    typical = {"median": median, "mean": mean}[config.margin_over]([parts[c.id].score for c in several])
    seen: set[str] = set()
    taken = 0
    reasons: dict[str, Reason | None] = {}
    for candidate in ranked:
        reason: Reason | None = None
        text = " ".join(candidate.text.split())
        if not text:
            reason = "empty"
        elif candidate.finish_reason == "length":
            reason = "cut_off"
        elif text in seen:
            reason = "repeated"
        elif parts[candidate.id].vetoed is not None:
            reason = "unsafe"
        elif taken == config.accept_per_prompt:
            reason = "not_best"
        else:
            taken += 1
            if config.margin is not None and parts[candidate.id].score - typical < config.margin:
                reason = "small_margin"
        if reason not in UNACCEPTABLE:
            seen.add(text)
        reasons[candidate.id] = reason
    return reasons


def _threshold(
    candidates: Mapping[str, Sequence[Candidate]],
    passing: Sequence[Candidate],
    parts: Mapping[str, Scored],
    config: RejectionConfig,
) -> float | None:
    """The lowest score that the rule accepts; None where nothing is acceptable."""
    if not passing:
        return None
    if config.accept == "best":
        return parts[passing[-1].id].score
    if config.accept == "threshold":
        if config.min_score is None:
            raise FlywheelError('accept = "threshold" needs min_score: set rejection_sampling.min_score.')
        return config.min_score
    best: dict[str, float] = {}
    for candidate in passing:  # best first
        best.setdefault(candidate.prompt_id, parts[candidate.id].score)
    places = max(1, round(config.accept_share * len(candidates)))
    return sorted(best.values(), reverse=True)[min(len(best), places) - 1]


def _within_quotas(
    ranked: Sequence[Candidate], places: int, characters: Mapping[str, str], config: RejectionConfig
) -> list[Candidate]:
    """At most `places` of the candidates, best first, none of a character's beyond its quota.

    The quota is `max_character_share` of what is accepted in the end, rounded up, and at least an equal share: among
    two characters nobody can have less than half. So the largest number is sought that the quotas it allows can fill.
    """
    supply = Counter(characters[c.prompt_id] for c in ranked)
    if not supply:
        return []
    share = max(config.max_character_share or 1.0, 1 / len(supply))
    most = config.max_per_character or len(ranked)

    def quota(total: int) -> int:
        return min(most, math.ceil(share * total - 1e-9))

    total = min(places, len(ranked))
    while total > sum(min(n, quota(total)) for n in supply.values()):
        total -= 1
    taken: Counter[str] = Counter()
    kept: list[Candidate] = []
    for candidate in ranked:
        character = characters[candidate.prompt_id]
        if len(kept) < total and taken[character] < quota(total):
            taken[character] += 1
            kept.append(candidate)
    return kept
