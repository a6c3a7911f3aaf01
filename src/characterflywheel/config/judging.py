"""From traffic to reward models: curation, annotation and what is fitted on them (PAPER sections 1 to 3)."""

from typing import Self

from pydantic import Field, model_validator

from ..records import SignalKind
from .base import Section


class CurateConfig(Section):
    """Filters, diversity and strata (PAPER section 1)."""

    languages: tuple[str, ...] = ("en",)
    min_letters: int = Field(2, ge=1, description="a user's message with fewer letters is no prompt")
    clusters: int = Field(12, ge=1)
    keep_share: float = Field(0.8, gt=0, le=1, description="share kept within a cluster")
    annotate_share: float = Field(0.3, gt=0, lt=1)
    train_share: float = Field(0.27, gt=0, lt=1)
    evaluate_share: float = Field(0.22, gt=0, lt=1, description="the rest is the experiment's bank of contexts")

    @model_validator(mode="after")
    def _leaves_contexts_for_the_experiment(self) -> Self:
        used = self.annotate_share + self.train_share + self.evaluate_share
        if used >= 1:
            raise ValueError(f"annotate_share + train_share + evaluate_share == {used:g}, must be < 1")
        return self


class AnnotateConfig(Section):
    """Candidates, reviews, and which pairs are kept (PAPER section 2)."""

    prompts: int = Field(48, ge=1)
    candidates: int = Field(4, ge=2, description="alternatives for each prompt, over the pool of policies")
    reviewers: int = Field(3, ge=1, description="reviews of each task; an odd number leaves few ties")
    temperature: float = Field(0.8, gt=0)
    max_tokens: int = Field(48, ge=1)
    max_length_ratio: float = Field(3.0, gt=1, description="pairs with a longer to shorter ratio above are dropped")
    max_emoji_difference: int = Field(2, ge=0)
    keep_ties: bool = Field(
        False, description="pairs on which reviewers are evenly divided also train (see reward.tie_threshold)"
    )
    held_out_share: float = Field(0.25, gt=0, lt=1, description="share of prompts whose pairs only evaluate")


GOOD_SIGNALS: frozenset[SignalKind] = frozenset({"continue", "thumb_up", "love", "pick"})
BAD_SIGNALS: frozenset[SignalKind] = frozenset({"thumb_down", "regenerate", "report"})
"""Of the other kinds (a reaction, an edit, a rating, words) the presence says neither, so either sign may be right."""


class RewardConfig(Section):
    """Preference and signal models (PAPER section 3)."""

    backbone: str | None = Field(None, description="a model folder or package:NAME to start from; the policy if absent")
    layers: int = Field(6, ge=1, description="layers of the backbone that are kept")
    lora_rank: int | None = Field(
        None, ge=1, description="train adapters of this rank, merged when done; all weights if absent"
    )
    epochs: int = Field(2, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    pairs_per_step: int = Field(8, ge=1)
    max_prompt_tokens: int = Field(224, ge=32, description="longer histories lose their oldest turns")
    max_reply_tokens: int = Field(80, ge=2, description="longer replies are read only so far")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="chance s that a label is wrong: l becomes l (1 - s) + (1 - l) s"
    )
    margin: float = Field(0.0, ge=0, description="log-odds by which the strongest preference has to win")
    tie_threshold: float = Field(
        0.0, ge=0, description="Rao-Kupper log-odds within which replies tie; 0: a tie is half a win for each"
    )
    centring: float = Field(0.01, ge=0, description="weight of (chosen + rejected)^2, which keeps scores near zero")
    gold_share: float = Field(
        0.0, ge=0, lt=1, description="share of training prompts that only the gold model learns from"
    )
    signals: tuple[SignalKind, ...] = ("continue", "thumb_up", "thumb_down", "love", "regenerate", "report")
    min_signal_auc: float = Field(0.55, description="a signal whose AUC interval begins below is not used")
    signal_weights: dict[SignalKind, float] = Field(
        {"continue": 0.125, "thumb_up": 0.125},
        description="weight of a reliable signal's standardised log-odds beside preference 1.0; others weigh nothing",
    )
    server: str | None = Field(
        None, exclude=True,  # the same models and code elsewhere; vLLM is, see `generation.compose`
        description="address of a `flywheel score` that selection, RL and evaluation ask instead of loading models; "
        "`vllm+http://...`: of a vLLM server with the pointwise model",
    )  # fmt: skip

    @model_validator(mode="after")
    def _preference_comes_first(self) -> Self:
        """By weight, in deviations over the training replies; among one prompt's replies a signal can still decide."""
        for kind, weight in self.signal_weights.items():
            if (kind in GOOD_SIGNALS and weight < 0) or (kind in BAD_SIGNALS and weight > 0):
                bound = ">= 0: it is a good sign" if kind in GOOD_SIGNALS else "<= 0: it is a bad sign"
                raise ValueError(f"signal_weights: {kind} = {weight:g} must be {bound}")
        total = sum(abs(weight) for weight in self.signal_weights.values())
        if not total < 1:
            raise ValueError(
                f"signal_weights: together {total:g}, must be < 1: a deviation of preference then outweighs one "
                "of all signals together"
            )
        return self
