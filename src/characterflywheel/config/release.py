"""What is asked of a new model before and while people meet it (PAPER sections 5 to 8)."""

from typing import Literal, Self

from pydantic import Field, model_validator

from .base import Section


class OveroptimisationConfig(Section):
    """How far proxy and gold reward go together (Gao, Schulman, Hilton 2022); all read after training."""

    rl_points: int = Field(8, ge=1, description="RL's steps are pooled into at most so many points")
    rl_prompts: int = Field(128, ge=1, description="prompts of RL that are read, evenly over its steps")
    start_replies: int = Field(4, ge=2, description="replies of RL's start to each of them, what it is compared with")
    draws: int = Field(1000, ge=100, description="of the bootstrap over users")


class OfflineConfig(Section):
    """Offline evaluation (PAPER section 6)."""

    prompts: int = Field(48, ge=1)
    temperature: float = Field(0.8, gt=0)
    max_tokens: int = Field(48, ge=1)


class StyleConfig(Section):
    """Style artefacts (PAPER section 5)."""

    prompts: int = Field(16, ge=1, description="prompts that the checkpoints between the old and the new model answer")
    phrases: tuple[str, ...] = Field((), description="phrases to watch for besides the built-in features")
    counts: dict[str, str] = Field(
        {}, description='regular expressions to count in replies, by the feature\'s name, e.g. tildes = "~+"'
    )
    rl_windows: int = Field(4, ge=2, description="stretches of steps that RL's own replies are compared over, at most")

    @model_validator(mode="after")
    def _can_be_measured(self) -> Self:
        if self.phrases or self.counts:
            from ..style.features import count_features, phrase_features  # noqa: PLC0415 - only where they are asked for

            phrase_features(self.phrases)
            count_features(self.counts)
        return self


class GateConfig(Section):
    """Bounds a release must respect (PAPER section 8)."""

    held: Literal["stop", "simulated", "experiment"] = Field(
        "stop",
        description="whether a model that is held, not rejected, may still meet users in its experiment's arm: never, "
        "where the users are simulated, always",
    )
    win_rate_min: float = Field(0.5, ge=0, lt=1)
    win_rate_alarm: float = Field(0.65, gt=0, le=1)
    win_rate_gap_max: float = Field(0.15, description="user against internal win rate: further apart is a warning")
    max_metric_worsening: float = Field(0.1, description="absolute rise of a bad production metric")
    max_steerability_worsening: float = Field(0.05, description="absolute, of following and of violation")
    max_style_drift: float = Field(2.0, description="ratio of a style feature's mean, new to old, either way")
    style_floor: float = Field(0.02, gt=0, description="smaller style means count as this: rare is not drift")
    style_alarms: Literal["note", "hold"] = Field(
        "note", description="what a drift alarm of a feature that was also preferred, selected or learnt leads to, "
        "however small its ratio: a note, or a model that is held"
    )  # fmt: skip


class ExperimentConfig(Section):
    """The seven-day A/B test (PAPER section 7)."""

    contexts: int = Field(24, ge=1, description="contexts of the bank that replies are generated for")
    replies: int = Field(2, ge=1, description="replies of each arm for each context")
    days: int = Field(7, ge=1)
    arm_share: float = Field(0.1, gt=0, le=0.5)
    temperature: float = Field(0.8, gt=0)
    max_tokens: int = Field(48, ge=1)
    confidence: float = Field(0.95, gt=0.5, lt=1)
    min_users: int = Field(500, ge=2, description="below this many users an arm, no lift is stated")
    engaged_days: int = Field(2, ge=1, description="days of the window with a message that make a user engaged")
    pre_days: int = Field(7, ge=1, description="days before first exposure whose activity is the covariate")
    cap_quantile: float = Field(0.999, gt=0.5, le=1, description="messages are capped there, pooled over arms")
    leave_out_fallbacks: bool = Field(False, description="do not count messages that a canned reply answered")
    power: float = Field(0.8, gt=0.5, lt=1, description="of the detectable lifts that are printed")
