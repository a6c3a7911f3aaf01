"""Training by several processes: who takes which items, and sums over all of them (DESIGN section 9).

A step's loss is divided by totals over all processes and gradients are summed, so that any number of processes takes
the same step. `Parallel.alone()` is the one process of a laptop: it shares nothing and waits for nobody.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Self, TypeVar

import torch
from torch import distributed

T = TypeVar("T")


class Turn(NamedTuple, Generic[T]):
    """A micro-batch for this process. One that does not `count` is run for company: its loss is taken times 0."""

    batch: T
    counts: bool


@dataclass(frozen=True)
class Parallel:
    """This process among `world` of them, numbered from 0."""

    rank: int = 0
    world: int = 1

    @classmethod
    def alone(cls) -> Self:
        """The only process."""
        return cls()

    @property
    def main(self) -> bool:
        """Whether this process writes files, progress and logs."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's stretch of `items`, which all processes hold in the same order; lengths differ by at most 1.

        An item is what stays together (a pair, a prompt with its group of replies). May be empty.
        """
        return list(items[len(items) * self.rank // self.world : len(items) * (self.rank + 1) // self.world])

    def turns(self, batches: Sequence[T]) -> Iterator[Turn[T]]:
        """This process's stretch of the step's micro-batches, which all processes have cut alike.

        Every process gets equally many, as sharded weights are gathered by all together; one whose stretch is shorter
        runs the first micro-batch again without counting it.
        """
        mine = self.share(batches)
        for batch in mine:
            yield Turn(batch, True)
        for _ in range(-(-len(batches) // self.world) - len(mine)):
            yield Turn(batches[0], False)

    def sum(self, value: float) -> float:
        """The sum of `value` over all processes, in float64."""
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        distributed.all_reduce(total)
        return total.item()

    def gather(self, items: list[T]) -> list[T]:
        """The items of all processes, in the order of `share`; items can be pickled."""
        if self.world == 1:
            return items
        parts: list[Any] = [None] * self.world
        distributed.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def reduce_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum the gradients over all processes; a process without one adds nothing."""
        if self.world == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad)

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            distributed.barrier()
