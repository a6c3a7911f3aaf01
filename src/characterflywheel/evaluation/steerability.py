"""Steerability: do replies keep to the character's written instructions? (PAPER section 6)

Instruction following is the share of verifiable instructions that replies follow, every instruction of every reply
counted once; instruction violation the share of replies that break at least one. Replies to characters without a
verifiable instruction are left out: unmeasured is not followed.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ..instructions import verifiable, violations
from ..ledger import Compared, Steerability
from ..records import Estimate
from .answers import Answer, Comparison, compare_shares


class SteerabilityReport(NamedTuple):
    """Following and violation, their changes from old to new, and following by the kind of rule."""

    overall: Steerability
    change: dict[str, Estimate]
    by_rule: dict[str, Compared]


class _Checked(NamedTuple):
    user: str
    kind: str
    followed: float


def steerability(old: Sequence[Answer], new: Sequence[Answer]) -> SteerabilityReport:
    """Both models on the same prompts in the same order; intervals are clustered by user."""
    before, after = _checked(old), _checked(new)
    following = _compare(before, after)
    measured = [i for i, answer in enumerate(old) if verifiable(answer.character)]
    violation = compare_shares(
        [float(bool(violations(old[i].character, old[i].text))) for i in measured],
        [float(bool(violations(new[i].character, new[i].text))) for i in measured],
        [old[i].prompt.user_id for i in measured],
        "up",
    )
    kinds = sorted({row.kind for row in before})
    by_rule = {
        kind: _compare([r for r in before if r.kind == kind], [r for r in after if r.kind == kind]).both
        for kind in kinds
    }
    return SteerabilityReport(
        Steerability(instruction_following=following.both, instruction_violation=violation.both),
        {"instruction_following": following.change, "instruction_violation": violation.change},
        by_rule,
    )


def _checked(answers: Sequence[Answer]) -> list[_Checked]:
    rows = []
    for answer in answers:
        broken = set(violations(answer.character, answer.text))
        for number in verifiable(answer.character):
            rule = answer.character.instructions[number].rule
            assert rule is not None  # verifiable instructions are those with a rule
            rows.append(_Checked(answer.prompt.user_id, rule.kind, float(number not in broken)))
    return rows


def _compare(before: Sequence[_Checked], after: Sequence[_Checked]) -> Comparison:
    users = [row.user for row in before]
    return compare_shares([row.followed for row in before], [row.followed for row in after], users, "down")
