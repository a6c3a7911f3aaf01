"""Configuration: one frozen model a stage, `FlywheelConfig` over them, presets as TOML files (DESIGN section 3).

`DIR/flywheel.toml` starts from a preset and overrides what it names. Unknown keys are refused with the nearest
known one. This module imports neither torch nor transformers.
"""

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, get_args

from pydantic import ValidationError, model_validator

from ..errors import FlywheelError
from .base import Section
from .judging import BAD_SIGNALS, GOOD_SIGNALS, AnnotateConfig, CurateConfig, RewardConfig
from .release import ExperimentConfig, GateConfig, OfflineConfig, OveroptimisationConfig, StyleConfig
from .rl import RLAlarmsConfig, RLConfig, SamplerConfig, TermsConfig
from .service import ModelsConfig, SafetyConfig, ServerConfig, ServingConfig, StoreConfig, TrafficConfig, WorldConfig
from .training import DEFAULT_WEIGHTS, DPOConfig, ExtraSource, ParallelConfig, PolicyConfig, RejectionConfig, SFTConfig

__all__ = [
    "BAD_SIGNALS",
    "DEFAULT_WEIGHTS",
    "GOOD_SIGNALS",
    "PRESETS",
    "AnnotateConfig",
    "CurateConfig",
    "DPOConfig",
    "ExperimentConfig",
    "ExtraSource",
    "FlywheelConfig",
    "GateConfig",
    "ModelsConfig",
    "OfflineConfig",
    "OveroptimisationConfig",
    "ParallelConfig",
    "PolicyConfig",
    "RLAlarmsConfig",
    "RLConfig",
    "RejectionConfig",
    "RewardConfig",
    "SFTConfig",
    "SafetyConfig",
    "SamplerConfig",
    "Section",
    "ServerConfig",
    "ServingConfig",
    "StoreConfig",
    "StyleConfig",
    "TermsConfig",
    "TrafficConfig",
    "WorldConfig",
    "load",
    "preset_names",
]

PRESETS = Path(__file__).parent.parent / "presets"


class FlywheelConfig(Section):
    """A workspace's whole configuration."""

    seed: int = 1
    models: ModelsConfig = ModelsConfig()
    world: WorldConfig | None = WorldConfig()
    serving: ServingConfig = ServingConfig()
    server: ServerConfig = ServerConfig()
    safety: SafetyConfig = SafetyConfig()
    store: StoreConfig = StoreConfig()
    traffic: TrafficConfig = TrafficConfig()
    curate: CurateConfig = CurateConfig()
    annotate: AnnotateConfig = AnnotateConfig()
    reward: RewardConfig = RewardConfig()
    rejection_sampling: RejectionConfig = RejectionConfig()
    sft: SFTConfig = SFTConfig()
    dpo: DPOConfig = DPOConfig()
    rl: RLConfig = RLConfig()
    parallel: ParallelConfig = ParallelConfig()
    overoptimisation: OveroptimisationConfig = OveroptimisationConfig()
    offline: OfflineConfig = OfflineConfig()
    style: StyleConfig = StyleConfig()
    gate: GateConfig = GateConfig()
    experiment: ExperimentConfig = ExperimentConfig()

    @model_validator(mode="after")
    def _gold_can_ring(self) -> Self:
        if "gold" in self.rl.alarms.stop and not self.reward.gold_share:
            raise ValueError(
                f"rl.alarms.stop == {list(self.rl.alarms.stop)}, but reward.gold_share == 0: there is no gold model; "
                "give it a share of the users, 0.2 say, or leave it out"
            )
        return self


def preset_names() -> list[str]:
    """The presets that ship with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load(path: Path) -> FlywheelConfig:
    """Read `flywheel.toml`. A top-level `preset = "NAME"` gives the values that the file does not name."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FlywheelError(f"{path} is missing: create a workspace with `flywheel init DIR`.") from None
    except tomllib.TOMLDecodeError as error:
        raise FlywheelError(f"{path} is not valid TOML: {error}.") from error
    preset = values.pop("preset", None)
    if preset is not None:
        source = PRESETS / f"{preset}.toml"
        if not source.exists():
            raise FlywheelError(f"{path}: preset {preset!r} does not exist; there are {', '.join(preset_names())}.")
        values = _merge(tomllib.loads(source.read_text(encoding="utf-8")), values)
    if isinstance(values.get("world"), bool):
        values["world"] = {} if values["world"] else None
    try:
        return FlywheelConfig.model_validate(values)
    except ValidationError as error:
        raise FlywheelError(f"{path}: {_explain(error)}") from error


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def _explain(error: ValidationError) -> str:
    """The first problem, as a sentence; an unknown key (another may then be missing) names its nearest neighbour."""
    errors = error.errors()
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        *parents, key = (str(part) for part in first["loc"])
        section: Any = FlywheelConfig
        for parent in parents:
            if not parent.isdecimal():  # the place in a list of tables
                field = section.model_fields[parent]
                inner = [a for a in get_args(field.annotation) if isinstance(a, type) and issubclass(a, Section)]
                section = inner[0] if inner else type(field.default)
        near = difflib.get_close_matches(key, section.model_fields, n=1, cutoff=0.5)
        known = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(section.model_fields)}."
        return f"unknown key {where!r}; {known}"
    if isinstance(first["input"], Mapping | Section):  # of several values together, which the message names
        return f"{where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}."
    return f"{where} = {first['input']!r}: {first['msg']}."
