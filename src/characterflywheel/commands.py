"""What the longer commands of `cli` do: turn the flywheel, plan it, show an experiment, change what serves by hand."""

import gc
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

from . import ledger
from .errors import FlywheelError
from .pipeline import Runner
from .records import Estimate
from .release import registry
from .workspace import Workspace

if TYPE_CHECKING:
    from .config import FlywheelConfig
    from .people import Bank, People
    from .store import EventStore


class Meet(NamedTuple):
    """How a run finds its people, and what their world knows; `cli` says, since nothing else knows the simulation."""

    people_of: "Callable[[Workspace, FlywheelConfig, EventStore], People]"
    oracle_of: "Callable[[People], Callable[[Bank], ledger.Truth] | None]"


def run(workspace: Workspace, generations: int, until: str | None, meet: Meet) -> None:
    """Turn the flywheel until `generations` are complete; what is complete already is not done again.

    Raises:
        FlywheelError: another run has this workspace, or an input is bad.
        Waiting: people have to do something first.
    """
    config = workspace.config()
    complete = len(ledger.read(workspace.ledger))
    if complete < generations:
        turn(workspace, config, range(complete + 1, generations + 1), until, meet)
    else:
        following = f"flywheel run {workspace.root} --generations {complete + 1}"
        print(f"{complete} complete; the next: {following}\nsettings that were changed since count from there")
    if workspace.ledger.exists():
        from .report import write_report  # noqa: PLC0415

        print(f"report: {write_report(workspace.root)}")


def turn(workspace: Workspace, config: "FlywheelConfig", numbers: Iterable[int], until: str | None, meet: Meet) -> None:
    """Turn these generations, one after the other; with `until`, stop after that stage of the first."""
    with workspace.locked():
        from . import generation  # noqa: PLC0415 - torch only once nothing else stands in the way
        from .store import EventStore  # noqa: PLC0415

        with EventStore.open(workspace.events) as store:
            people = meet.people_of(workspace, config, store)
            gc.freeze()  # what start-up made stays: the collections after each stage need not walk it again
            try:
                for number in numbers:
                    oracle = meet.oracle_of(people)
                    row = generation.turn(workspace, config, store, people, number, until=until, oracle=oracle)
                    if row is None:
                        print(f"stopped after {until}; the same command without --until goes on")
                        return
            finally:
                gc.unfreeze()  # or some libraries complain at the end of what was never collected


def plan(workspace: Workspace, generations: int) -> None:
    """Print the stages of the generation to come, whether each is complete, and where it is kept."""
    config = workspace.config()
    from . import generation  # noqa: PLC0415

    runner = Runner(workspace.artifacts)
    stages = [(stage, runner.is_complete(stage)) for stage in generation.plan(workspace, config, generations)]
    for stage, done in stages:
        print(f"{'complete' if done else 'to do':<9} {stage.folder_name}")
    if not all(done for _, done in stages) and (complete := len(ledger.read(workspace.ledger))) >= generations:
        print(
            f"\ngeneration {generations} was turned with other settings and is not turned again: these count from "
            f"`flywheel run {workspace.root} --generations {complete + 1}`"
        )


def show_experiment(workspace: Workspace, number: int | None, as_json: bool) -> None:
    """Print the lifts of a generation's experiment and its verdict, as the ledger has them."""
    rows = [row for row in ledger.read(workspace.ledger) if number is None or row.generation == number]
    if not rows:
        which = "a generation" if number is None else f"generation {number}"
        raise FlywheelError(f"{workspace.ledger} has no row of {which}: turn it with `flywheel run {workspace.root}`.")
    row = rows[-1]
    if row.experiment is None:
        raise FlywheelError(f"generation {row.generation} had no experiment: its gate said {row.gate.decision}.")
    if as_json:
        print(row.experiment.model_dump_json(indent=1))
        return
    test = row.experiment
    print(f"{test.name}: {test.treatment} against {test.control}, {test.days} days, {test.confidence:.0%} intervals")
    for name, lift in {"breadth": test.breadth_lift, "depth": test.depth_lift, **test.secondary}.items():
        print(f"  {name:<12} {percent(lift)}")
    ratio = "not tested" if test.srm_p is None else f"p {test.srm_p:.3g}"
    print(
        f"  sample ratio {ratio}\nverdict: {row.verdict or 'none'}"
        + (f" ({row.verdict_reason})" * bool(row.verdict_reason))
    )


def percent(lift: Estimate) -> str:
    """A relative lift with its interval and n; or why there is none."""
    if lift.value is None:
        return f"not measured: {lift.reason} (n {lift.n:,})"
    interval = "" if lift.low is None or lift.high is None else f" [{lift.low:+.1%}, {lift.high:+.1%}]"
    return f"{lift.value:+.1%}{interval}, n {lift.n:,}"


def promote(workspace: Workspace, number: int, reason: str, against_gate: bool) -> None:
    """Put a generation's model into service by hand. What the gate stopped needs `against_gate` said aloud."""
    rows = {row.generation: row for row in ledger.read(workspace.ledger)}
    if number not in rows:
        held = ", ".join(map(str, rows)) or "none"
        raise FlywheelError(f"generation {number} is not in the ledger; complete are: {held}.")
    row = rows[number]
    if row.gate.decision != "ship" and not against_gate:
        raise FlywheelError(
            f"the gate said {row.gate.decision} to generation {number} ({row.gate.reason}): --against-gate overrules."
        )
    from . import generation  # noqa: PLC0415

    release = generation.release_of(workspace, row)
    with workspace.locked():
        registry.promote(workspace.registry, release, reason, datetime.now(UTC))
    print(f"in service: {release.model} (generation {number})")


def rollback(workspace: Workspace, reason: str) -> None:
    """Put the model that served before back into service."""
    with workspace.locked():
        after = registry.rollback(workspace.registry, reason, datetime.now(UTC))
    release = after.in_service
    print(f"in service: {release.model} (generation {release.generation})" if release else "in service: the base model")
