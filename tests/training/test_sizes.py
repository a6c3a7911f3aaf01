"""What no stage could do with the model is refused before the first."""

import json
from pathlib import Path
from typing import Any

import pytest

from characterflywheel.config import FlywheelConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.training.sizes import check_sizes

SMALL = {"max_position_embeddings": 512, "num_hidden_layers": 6}


def folder(at: Path, values: dict[str, Any]) -> Path:
    (at / "config.json").write_text(json.dumps(values), "utf-8")
    return at


def test_what_fits_passes_and_what_is_not_known_is_not_checked(tmp_path: Path) -> None:
    check_sizes(FlywheelConfig(), tmp_path)
    check_sizes(FlywheelConfig(), folder(tmp_path, SMALL))
    huge = FlywheelConfig.model_validate({"rl": {"max_tokens": 100_000}, "reward": {"layers": 60}})
    check_sizes(huge, folder(tmp_path, {}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"rl": {"max_tokens": 321}},
            r"rl.max_prompt_tokens \+ rl.max_tokens == 513, must be <= 512, the model's longest context",
        ),
        ({"reward": {"layers": 7}}, "reward.layers == 7, must be <= 6, the layers of"),
    ],
)
def test_what_can_never_be_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(FlywheelError, match=says):
        check_sizes(FlywheelConfig.model_validate(changes), folder(tmp_path, SMALL))
    check_sizes(FlywheelConfig.model_validate({"reward": {"layers": 7, "backbone": "other"}}), folder(tmp_path, SMALL))
