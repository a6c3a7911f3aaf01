"""Training by several processes: who takes which items, and sums over all of them (DESIGN section 9).

A step's loss is divided by totals over all processes and gradients are summed, so that any number of processes takes
the same step. `Parallel.alone()` is the one process of a laptop: it shares nothing and waits for nobody.
`Parallel.join` is a process that torchrun started: gloo between processors, NCCL between GPUs.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, Literal, NamedTuple, Self, TypeVar

import torch
from torch import distributed

from ..errors import FlywheelError

T = TypeVar("T")
Sharding = Literal["none", "full", "node"]
PATIENCE = timedelta(hours=3)
"""How long a process waits for the others: one may be saving tens of gigabytes, or wait for an hour until a busy
scoring server answers it (`reward.remote`). Who fails ends all of them at once, whatever this says."""


class Turn(NamedTuple, Generic[T]):
    """A micro-batch for this process. One that does not `count` is run for company: its loss is taken times 0."""

    batch: T
    counts: bool


@dataclass(frozen=True)
class Parallel:
    """This process among `world` of them, numbered from 0; `local` of them share its machine.

    `sharding`: where weights, gradients and the optimiser lie: all in every process ("none"), split over all
    ("full"), or split over a machine's and copied from machine to machine ("node").
    """

    rank: int = 0
    world: int = 1
    local: int = 1
    sharding: Sharding = "none"
    device: str | None = None

    @classmethod
    def alone(cls) -> Self:
        """The only process."""
        return cls()

    @classmethod
    def join(cls, sharding: Sharding = "none", device: str = "cpu") -> Self:
        """Meet the other processes that torchrun started with this one, and take this machine's next GPU if any.

        Raises:
            FlywheelError: torchrun did not start this process, or the machine has fewer GPUs than processes.
        """
        missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE") if name not in os.environ]
        if missing:
            raise FlywheelError(f"{', '.join(missing)} not set: workers are started by `flywheel run` with torchrun.")
        here, local = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        kind = device.split(":", maxsplit=1)[0]
        if kind == "cuda":
            if (found := torch.cuda.device_count()) < local:
                raise FlywheelError(f"{local} processes on this machine, but {found} GPUs: start one process a GPU.")
            torch.cuda.set_device(here)
            device = f"cuda:{here}"
        distributed.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=PATIENCE)
        return cls(distributed.get_rank(), distributed.get_world_size(), local, sharding, device)

    def leave(self) -> None:
        """Say goodbye to the others; the last call on this value."""
        if self.world > 1:
            distributed.destroy_process_group()

    @property
    def main(self) -> bool:
        """Whether this process writes files, progress and logs."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        return self.sharding != "none" and self.world > 1

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's stretch of `items`, which all processes hold in the same order; lengths differ by at most 1.

        An item is what stays together (a pair, a prompt with its group of replies). May be empty.
        """
        return list(items[len(items) * self.rank // self.world : len(items) * (self.rank + 1) // self.world])

    def turns(self, batches: Sequence[T]) -> Iterator[Turn[T]]:
        """This process's part of the step's micro-batches, which all processes have cut alike.

        They are dealt out in turn: the largest come first, and processes wait for each other. Every process gets
        equally many, as sharded weights are gathered by all together; one that has fewer runs the last micro-batch
        again without counting it.
        """
        mine = batches[self.rank :: self.world]
        for batch in mine:
            yield Turn(batch, True)
        for _ in range(-(-len(batches) // self.world) - len(mine)):
            yield Turn(batches[-1], False)

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

    def agree(self, value: bool) -> bool:
        """What the main process says: clocks differ, and what is done together is decided once."""
        return bool(self.sum(float(value and self.main)))

    def reduce_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum the gradients over all processes; a process without one adds nothing.

        Those of sharded weights have been summed by the backward pass.
        """
        if self.world == 1 or self.sharded:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad)

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            self.sum(0.0)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, without gradient: its shard, or all of it."""
    shard = getattr(tensor.detach(), "to_local", None)
    return tensor.detach() if shard is None else shard()
