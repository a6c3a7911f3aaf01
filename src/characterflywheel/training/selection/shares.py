"""Who answers which prompt how often: the pool's shares, kept exactly by largest remainder (PAPER section 4).

Every prompt gets the same number of candidates, of each policy its share rounded down or up; over all prompts each
policy's total is its share by largest remainder (Hamilton's method). So a policy with a tenth of 8 candidates gets
one of them for 8 prompts in 10. Arithmetic is in fractions, so that nothing depends on how a float is rounded.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import floor

from ...errors import FlywheelError
from ...ids import derive_seed


def largest_remainder(quotas: Mapping[str, Fraction]) -> dict[str, int]:
    """Whole numbers with the sum of `quotas` (itself whole), each its quota rounded down or up.

    What is left goes to the largest remainders, between equal ones to the first by name.
    """
    whole = {name: floor(quota) for name, quota in quotas.items()}
    left = int(sum(quotas.values())) - sum(whole.values())
    for name in sorted(quotas, key=lambda name: (whole[name] - quotas[name], name))[:left]:
        whole[name] += 1
    return whole


def allot(prompts: Sequence[str], shares: Mapping[str, float], candidates: int, seed: int) -> dict[str, dict[str, int]]:
    """How many candidates each policy draws for each prompt: `[policy][prompt]`, policies in the order of `shares`.

    Which prompts get a policy's odd candidates is drawn by the seed, the same chance for each prompt.

    Raises:
        FlywheelError: there is no policy, or a share is not above 0.
    """
    if not shares or min(shares.values()) <= 0:
        raise FlywheelError(f"shares of the pool are {dict(shares)}: give at least one policy, each a share above 0.")
    total = sum(Fraction(str(share)) for share in shares.values())
    each = {name: Fraction(str(share)) / total * candidates for name, share in shares.items()}
    base = {name: floor(quota) for name, quota in each.items()}
    # Of the odd places, the same number for each prompt, a policy with the most still to place goes first: then none
    # is left with more than there are prompts (the greedy proof of the Gale-Ryser theorem).
    wanted = largest_remainder({name: (quota - base[name]) * len(prompts) for name, quota in each.items()})
    odd = candidates - sum(base.values())
    result = {name: dict.fromkeys(prompts, base[name]) for name in shares}
    for prompt in sorted(prompts, key=lambda prompt: (derive_seed(seed, "shares", prompt), prompt)):
        order = sorted(wanted, key=lambda name: (-wanted[name], derive_seed(seed, "shares", prompt, name), name))
        for name in order[:odd]:
            result[name][prompt] += 1
            wanted[name] -= 1
    return result


def totals(allotted: Mapping[str, Mapping[str, int]]) -> Counter[str]:
    """Each policy's candidates over all prompts."""
    return Counter({name: sum(by_prompt.values()) for name, by_prompt in allotted.items()})
