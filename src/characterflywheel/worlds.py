"""Which people a workspace has: the embedded world's crowd, or those who really come.

Only `cli` imports this module, so that neither the pipeline nor a command can know the simulation (DESIGN section 3).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from . import ledger
from .people import RealPeople
from .workspace import Workspace

if TYPE_CHECKING:
    from .config import FlywheelConfig
    from .people import Bank, People
    from .store import EventStore


def people_of(workspace: Workspace, config: "FlywheelConfig", store: "EventStore") -> "People":
    """The people of this workspace: the embedded world's crowd, or those who really come."""
    if config.world is None:
        return RealPeople(workspace.annotation, store)
    from .llm.encoder import shared_encoder  # noqa: PLC0415 - torch only where it is needed
    from .llm.models import encoder_folder  # noqa: PLC0415
    from .simulation.world import SimulatedPeople  # noqa: PLC0415

    threads = config.models.threads
    return SimulatedPeople(
        config.world, config.seed, store, shared_encoder(encoder_folder(config.models.encoder), threads), threads
    )


def oracle_of(people: "People") -> "Callable[[Bank], ledger.Truth] | None":
    """What the embedded world knows of the lifts that truly exist; None where people are real."""
    if isinstance(people, RealPeople):
        return None
    from .simulation.world import SimulatedPeople  # noqa: PLC0415

    assert isinstance(people, SimulatedPeople)

    def truth(bank: "Bank") -> ledger.Truth:
        lift = people.true_lift(bank)
        note = (
            f"for this bank of {len(bank.contexts)} contexts, over {lift.n:,} simulated people who lived through both "
            "arms; other contexts would give other lifts"
        )
        return ledger.Truth(breadth_lift=lift.breadth, depth_lift=lift.depth, note=note)

    return truth
