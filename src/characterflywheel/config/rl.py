"""Online RL: its sampler, the terms of its reward, its alarms (PAPER sections 4, 5)."""

import difflib
from typing import Literal, Self

from pydantic import Field, model_validator

from .base import Section


class SamplerConfig(Section):
    """Who draws RL's rollouts, and how new weights reach it after each step (DESIGN section 6)."""

    kind: Literal["native", "transformers", "ctranslate2", "vllm", "endpoint"] = Field(
        "native", description="ours in process, `generate`, int8 on a CPU, vLLM in process, or a server with vLLM's API"
    )
    precision: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        "auto", description="of its weights; `auto` is what the sampler is fastest in (`int8` is for ctranslate2)"
    )
    address: str | None = Field(None, exclude=True, description="endpoint: its base address, e.g. http://HOST:8000")
    model: str | None = Field(None, exclude=True, description="endpoint: the model's name there; its first if absent")
    key_env: str = Field("FLYWHEEL_SAMPLER_KEY", exclude=True, description="environment variable with endpoint's key")
    weights_folder: str | None = Field(
        None, exclude=True, description="endpoint: where new weights are put, a folder that the server reads too"
    )
    reload: str = Field(
        "vllm", exclude=True,
        description="endpoint: `vllm` (its /collective_rpc, which needs VLLM_SERVER_DEV_MODE=1), or a path such as "
        "/reload that takes `{path, version}`",
    )  # fmt: skip
    patience_s: float = Field(60, gt=0, exclude=True, description="endpoint: how long it may be away")
    timeout_s: float = Field(600, gt=0, exclude=True, description="endpoint: how long one request may take")
    max_stale: int = Field(
        0, ge=0, description="endpoint: reloads that may fail in a row; what is drawn meanwhile is counted as stale"
    )
    memory_share: float = Field(0.4, gt=0, lt=1, exclude=True, description="vllm: of the GPU's memory")

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.kind == "endpoint" and not (self.address and self.weights_folder):
            raise ValueError(
                'sampler "endpoint" needs address, e.g. "http://HOST:8000", and weights_folder, a folder that its '
                "server reads too"
            )
        if self.precision == "bfloat16" and self.kind == "ctranslate2":
            raise ValueError('precision "bfloat16" is not for "ctranslate2", which has "int8" and "float32"')
        if self.precision == "int8" and self.kind != "ctranslate2":
            raise ValueError(f'precision "int8" is for "ctranslate2", the sampler is {self.kind!r}')
        return self


class TermsConfig(Section):
    """What RL's reward has besides the reward model's score: each term times its weight is added (PAPER section 5)."""

    length_weight: float = Field(0.0, ge=0, description="of the length term: 0 inside the band, down to -1 outside")
    min_words: int = Field(4, ge=1, description="the length band")
    max_words: int = Field(60, ge=1, description="the length band; a reply that was cut off has the full penalty")
    repetition_weight: float = Field(
        0.0, ge=0, description="of minus the shares of word runs said before, in the reply and by the character earlier"
    )
    veto_margin: float = Field(
        1.0, gt=0, description="how far below its group's lowest allowed reward a reply lies that safety refuses"
    )
    style: dict[str, float] = Field({}, description="weight of a style feature by name, e.g. emojis = -0.1")
    phrases: dict[str, float] = Field({}, description="weight of a phrase that a reply says")

    @model_validator(mode="after")
    def _can_be_measured(self) -> Self:
        if self.max_words < self.min_words:
            raise ValueError(f"max_words == {self.max_words}, must be >= min_words == {self.min_words}")
        if self.style or self.phrases:
            from ..style.features import FEATURES, phrase_features  # noqa: PLC0415 - only where they are asked for

            phrase_features(tuple(self.phrases))
            for name in self.style.keys() - FEATURES.keys():
                near = difflib.get_close_matches(name, FEATURES, n=1, cutoff=0.5)
                known = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(FEATURES)}"
                raise ValueError(f"style feature {name!r} is unknown; {known}")
        return self


class RLAlarmsConfig(Section):
    """When RL has gone too far, measured against its start on the same prompts (PAPER sections 5, 8)."""

    every: int = Field(
        4, ge=0, description="steps from one look to the next; what the last step made is always looked at; 0: no"
    )
    window: int = Field(4, ge=1, description="looks that are pooled, the last so many")
    start_replies: int = Field(4, ge=1, description="replies of the start to each prompt that is looked at")
    kl_max: float = Field(10.0, gt=0, description="KL to the start, nats a reply")
    entropy_min_share: float = Field(0.5, gt=0, le=1, description="entropy over that of the first steps")
    win_rate_max: float = Field(0.65, gt=0.5, lt=1, description="by the reward, over the start's replies")
    style_effect: float = Field(0.2, gt=0, description="drift of a style feature, in standard deviations of replies")
    stop: tuple[Literal["kl", "entropy", "win_rate", "gold", "style"], ...] = Field(
        (), description="alarms that end training; the last weights looked at without one of them are kept"
    )

    @model_validator(mode="after")
    def _can_ring(self) -> Self:
        if self.stop and not self.every:
            raise ValueError(f"stop == {list(self.stop)}, but every == 0: nobody looks; set every, or stop = []")
        return self


class RLConfig(Section):
    """GRPO with importance-sampling correction, or online DPO, on near-policy prompts (PAPER section 4)."""

    algorithm: Literal["grpo", "online_dpo"] = Field(
        "grpo", description="`online_dpo` learns from the best against the worst reply of each group"
    )
    steps: int = Field(4, ge=1)
    prompts_per_step: int = Field(4, ge=1)
    group: int = Field(6, ge=2, description="replies for each prompt")
    learning_rate: float = Field(1e-5, gt=0)
    temperature: float = Field(0.8, gt=0)
    max_tokens: int = Field(48, ge=1)
    max_prompt_tokens: int = Field(192, ge=32)
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.28, gt=0)
    ratio_max: float | None = Field(
        None, gt=1, description="upper bound of the ratio where the advantage is negative, which the clip leaves free"
    )
    kl_weight: float = Field(0.0, ge=0, description="of the divergence from the start, in GRPO's loss")
    advantage_scale: Literal["group", "batch", "none"] = Field(
        "group", description="advantages are divided by the deviation of their group's rewards, of the step's, or not"
    )
    aggregation: Literal["token", "sequence", "constant"] = Field(
        "token", description="the loss is a mean over tokens, over replies, or a sum over replies times max_tokens"
    )
    updates_per_step: int = Field(1, ge=1, description="mini-batches of prompts that a step's rollouts are cut into")
    epochs: int = Field(1, ge=1, description="times that a step's rollouts are learnt from")
    beta: float = Field(0.1, gt=0, description="online DPO: strength of the pull to the start")
    min_gap: float = Field(0.0, ge=0, description="online DPO: least difference in reward of best and worst")
    choose: Literal["variance", "low_score", "random"] = Field(
        "variance", description="prompts whose candidates' scores vary most, have the lowest mean, or any"
    )
    ordinary_share: float = Field(0.25, ge=0, le=1, description="least share of prompts drawn at random")
    fresh_days: float | None = Field(
        None, gt=0, description="only prompts so near to the newest one (near-policy); all of the window if absent"
    )
    truncate_ratio: float = Field(2.0, ge=1, description="upper bound of the trainer-to-sampler importance weight")
    importance_level: Literal["token", "sequence"] = Field(
        "token", description="whose ratio is the importance weight: each token's, or its whole reply's"
    )
    token_low: float | None = Field(None, gt=0, description="tokens with a lower trainer-to-sampler ratio are masked")
    token_high: float | None = Field(None, gt=0, description="tokens with a higher ratio are masked")
    sequence_low: float | None = Field(None, gt=0, description="replies with a lower ratio are masked")
    sequence_high: float | None = Field(None, gt=0, description="replies with a higher ratio are masked")
    max_exploded_share: float = Field(
        0.02,
        ge=0,
        lt=1,
        description="share of a step's tokens whose ratio is not sane (masked, counted) that ends the run",
    )
    train_layers: int | None = Field(None, ge=1)
    lora_rank: int | None = Field(
        None, ge=1, description="train adapters of this rank, added to the weights when done; all weights if absent"
    )
    micro_batch_tokens: int = Field(
        1536, ge=1, description="tokens that run at once, prefixes that replies share counted once; bounds memory"
    )
    sampler: SamplerConfig = SamplerConfig()
    terms: TermsConfig = TermsConfig()
    alarms: RLAlarmsConfig = RLAlarmsConfig()

    @model_validator(mode="after")
    def _every_update_has_a_prompt(self) -> Self:
        if self.updates_per_step > self.prompts_per_step:
            raise ValueError(
                f"updates_per_step == {self.updates_per_step}, must be <= prompts_per_step == {self.prompts_per_step}"
            )
        if self.ratio_max is not None and self.ratio_max < 1 + self.clip_high:
            raise ValueError(
                f"ratio_max == {self.ratio_max:g}, must be >= 1 + clip_high == {1 + self.clip_high:g}: it bounds what "
                "the clip leaves free"
            )
        for name in ("token", "sequence"):
            low, high = getattr(self, f"{name}_low"), getattr(self, f"{name}_high")
            if low is not None and high is not None and low >= high:
                raise ValueError(f"{name}_low == {low:g}, must be < {name}_high == {high:g}")
        return self

    @property
    def anchored(self) -> bool:
        """Whether the start's weights are kept beside the learner's: for the loss, or for looks."""
        return self.kl_weight > 0 or self.algorithm == "online_dpo" or self.alarms.every > 0

    @property
    def updates(self) -> int:
        """Optimiser steps of one step."""
        return self.updates_per_step * self.epochs
