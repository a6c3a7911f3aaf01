"""Sufficient statistics of an arm: how many users, sums and sums of products, exact (DESIGN section 8).

All that the delta method and CUPED need of the users is here, so the users never leave the database. Engagement
metrics count things, so the sums are integers: whatever order the database adds them in, they come out the same,
and variances suffer no cancellation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tea_tasting.aggr import Aggregates


def pairs(columns: Sequence[str]) -> list[tuple[str, str]]:
    """Every unordered pair of columns, a column with itself included, names in order."""
    return list(combinations_with_replacement(sorted(columns), 2))


@dataclass(frozen=True)
class Moments:
    """`sums[x]` and `products[x, y]` (x <= y) over `n` users."""

    n: int
    sums: Mapping[str, int | float]
    products: Mapping[tuple[str, str], int | float]

    @classmethod
    def of(cls, columns: Mapping[str, NDArray[Any]]) -> "Moments":
        """The moments of arrays of shape (n,), one a column; integer arrays are summed exactly (in 64 bits)."""
        wide = {k: v.astype(np.int64) if v.dtype.kind in "biu" else v.astype(np.float64) for k, v in columns.items()}
        return cls(
            n=len(next(iter(wide.values()))),
            sums={name: values.sum().item() for name, values in wide.items()},
            products={(x, y): (wide[x] @ wide[y]).item() for x, y in pairs(list(wide))},
        )

    def __add__(self, other: "Moments") -> "Moments":
        """Both groups of users together."""
        return Moments(
            self.n + other.n,
            {name: value + other.sums[name] for name, value in self.sums.items()},
            {pair: value + other.products[pair] for pair, value in self.products.items()},
        )

    def mean(self, column: str) -> float:
        """Mean over the users."""
        return self.sums[column] / self.n

    def covariance(self, x: str, y: str) -> float:
        """Unbiased covariance over the users (the variance where x is y)."""
        x, y = sorted((x, y))
        return (self.n * self.products[x, y] - self.sums[x] * self.sums[y]) / (self.n * (self.n - 1))

    def aggregates(self) -> "Aggregates":
        """The same in tea-tasting's form; needs at least two users."""
        from tea_tasting.aggr import Aggregates  # noqa: PLC0415 - takes 1.5 s to import, and not every command analyses

        return Aggregates(
            count_=self.n,
            mean_={x: self.mean(x) for x in self.sums},
            var_={x: self.covariance(x, x) for x in self.sums},
            cov_={(x, y): self.covariance(x, y) for x, y in self.products if x != y},
        )
