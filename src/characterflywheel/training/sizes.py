"""Settings that the model can never meet, refused before the first stage rather than after people have annotated."""

import json
from pathlib import Path

from ..config import FlywheelConfig, RLConfig
from ..errors import FlywheelError


def check_sizes(config: FlywheelConfig, folder: Path) -> None:
    """Compare settings with the `config.json` of the model that a generation starts from; what it lacks is not checked.

    SFT and DPO learn from texts as long as they are, often far below their bounds: they are checked when these are
    known.

    Raises:
        FlywheelError: RL's prompts and replies are longer than the model's context, or the reward models keep more
            layers than it has.
    """
    file = folder / "config.json"
    values = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    room, count = values.get("max_position_embeddings"), values.get("num_hidden_layers")
    if room is not None:
        check_context(config.rl, room)
    if count is not None and config.reward.backbone is None and config.reward.layers > count:
        raise FlywheelError(f"reward.layers == {config.reward.layers}, must be <= {count}, the layers of {folder}.")


def check_context(config: RLConfig, room: int) -> None:
    """Make sure that a model of so many positions has one for every token of RL's prompts and replies.

    Raises:
        FlywheelError: it has not.
    """
    if (needed := config.max_prompt_tokens + config.max_tokens) > room:
        raise FlywheelError(
            f"rl.max_prompt_tokens + rl.max_tokens == {needed}, must be <= {room}, the model's longest context."
        )
