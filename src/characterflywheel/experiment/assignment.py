"""Who meets which arm: a salted hash of the user, nothing stored (PAPER section 7, DESIGN section 8).

A user's place in [0, 1) is a BLAKE2b hash of salt and id, so it is the same at every visit and on every machine,
and places under two salts are independent: experiments that overlap do not confound one another.

Arms, sorted by name, stand in pairs at the two ends of a territory and grow towards each other. A share can
therefore be raised while the experiment runs without moving anybody from one arm to another; new users only join.
"""

import hashlib
import math
from collections.abc import Mapping

from ..errors import FlywheelError

CONTROL = "control"
TREATMENT = "treatment"


def place(user_id: str, salt: str) -> float:
    """The user's place in [0, 1) under a salt: the first 53 bits of BLAKE2b, each of which a float64 holds exactly."""
    digest = hashlib.blake2b(f"{salt}\x1f{user_id}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def territories(shares: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Each arm's half-open interval of places, `[begin, end)`.

    With one or two arms the shares may sum to anything up to 1; with more, each pair of neighbours has the part
    of [0, 1) that belongs to its number of arms.

    Raises:
        FlywheelError: a share is outside [0, 1], or a pair of arms needs more than its territory.
    """
    arms = sorted(shares)
    for arm in arms:
        if not 0 <= shares[arm] <= 1:
            raise FlywheelError(f"share of arm {arm!r} = {shares[arm]}, must be in [0, 1].")
    intervals: dict[str, tuple[float, float]] = {}
    for first in range(0, len(arms), 2):
        pair = arms[first : first + 2]
        begin, end = first / len(arms), (first + len(pair)) / len(arms)
        wanted = sum(shares[arm] for arm in pair)
        if wanted > end - begin and not math.isclose(wanted, end - begin):
            raise FlywheelError(
                f"shares of {' and '.join(pair)} sum to {wanted:.4g}, above the {end - begin:.4g} that {len(pair)} of "
                f"{len(arms)} arms may have: lower them."
            )
        intervals[pair[0]] = (begin, begin + shares[pair[0]])
        if len(pair) == 2:
            intervals[pair[1]] = (max(end - shares[pair[1]], begin + shares[pair[0]]), end)
    return intervals


def assign(user_id: str, salt: str, shares: Mapping[str, float]) -> str | None:
    """The user's arm, or None for a user outside the experiment.

    Args:
        user_id: who; the unit of randomisation.
        salt: the experiment's name.
        shares: share of all users for each arm, e.g. `{"control": 0.1, "treatment": 0.1}`.
    """
    where = place(user_id, salt)
    return next((arm for arm, (begin, end) in territories(shares).items() if begin <= where < end), None)
