"""What `flywheel score` does: find a generation's reward models and serve them to RL, selection and evaluation."""

from typing import TYPE_CHECKING

from . import ledger
from .config import FlywheelConfig
from .errors import FlywheelError
from .pipeline import Runner
from .workspace import Workspace

if TYPE_CHECKING:
    from .reward.wire import Limits


def score(workspace: Workspace, number: int | None, host: str, port: int, limits: "Limits | None" = None) -> None:
    """Serve the reward models of generation `number`, or of the newest that has some.

    Raises:
        FlywheelError: there are none, or the server cannot listen.
    """
    config = workspace.config()
    number, name = newest(workspace, config) if number is None else (number, folder_of(workspace, config, number))
    if name is None:
        who = f"generation {number} has no" if number else "no generation has"
        raise FlywheelError(f"{who} reward models: `flywheel run {workspace.root} --until reward` trains them.")
    from .llm.encoder import shared_encoder  # noqa: PLC0415 - torch only once there is something to serve
    from .llm.models import encoder_folder  # noqa: PLC0415
    from .reward.composite import RewardModels  # noqa: PLC0415
    from .reward.server import card_of, serve  # noqa: PLC0415

    run, folder = config.models, workspace.artifacts / name
    encoder = shared_encoder(encoder_folder(run.encoder), run.threads)
    models = RewardModels.load(folder, encoder, run.threads, run.device)
    serve(models, card_of(models, folder, number, limits), host, port)


def newest(workspace: Workspace, config: FlywheelConfig) -> tuple[int, str | None]:
    """The last generation with complete reward models, the one being turned included, and their artifact's name."""
    complete = len(ledger.read(workspace.ledger))
    for number in (complete + 1, complete):
        if number and (name := folder_of(workspace, config, number)):
            return number, name
    return 0, None


def folder_of(workspace: Workspace, config: FlywheelConfig, number: int) -> str | None:
    """The name of a generation's reward artifact: as the ledger has it, else as planned; None where incomplete."""
    rows = {row.generation: row for row in ledger.read(workspace.ledger)}
    if number in rows:
        return rows[number].stages["reward"]
    if number != len(rows) + 1:
        return None
    from .generation import plan  # noqa: PLC0415

    stage = next(stage for stage in plan(workspace, config, number) if stage.name == "reward")
    return stage.folder_name if Runner(workspace.artifacts).is_complete(stage) else None
