"""Herding on data that is there: rejection sampling, SFT, DPO (PAPER section 4), and how training is spread."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from ..records import ExampleSource
from .base import Section


class PolicyConfig(Section):
    """A policy of the pool: a model, and perhaps an instruction that its system prompt is extended by."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    share: float = Field(gt=0, description="of the candidates, relative to the other policies' shares")
    source: str = Field(
        "parent",
        description="`parent`, `base`, `earlier:K` (what served K models before the parent), `generation:N`, a model "
        "folder, `package:NAME`, or the address of an OpenAI-compatible server, http://HOST/v1",
    )
    coached: bool = Field(False, description="told by built-in hints how to write")
    hints: tuple[str, ...] = Field((), description="own hints, one of which ends the system prompt of each prompt")
    cooling: float | None = Field(
        None, gt=0, le=1, description="factor on the temperature; 0.6 for a policy with hints, else 1"
    )
    model: str | None = Field(None, description="the model's name on a server")
    key_env: str = Field("FLYWHEEL_POOL_KEY", exclude=True, description="environment variable with the server's key")

    @model_validator(mode="after")
    def _names_what_its_source_needs(self) -> Self:
        remote = self.source.startswith(("http://", "https://"))
        if remote != (self.model is not None):
            needs = "needs `model`, its name there" if remote else "is no server, so `model` has no meaning"
            raise ValueError(f"policy {self.name!r}: source {self.source!r} {needs}")
        kind, colon, number = self.source.partition(":")
        if colon and kind in ("earlier", "generation") and not (number.isdecimal() and int(number) > 0):
            raise ValueError(f"policy {self.name!r}: source {self.source!r} must be {kind}:N with N from 1")
        return self


class RejectionConfig(Section):
    """Best of n from a pool of policies (PAPER section 4)."""

    prompts: int = Field(40, ge=1)
    candidates: int = Field(8, ge=2)
    temperature: float = Field(0.8, gt=0)
    max_tokens: int = Field(48, ge=1)
    accept_per_prompt: int = Field(1, ge=1)
    accept_share: float = Field(
        0.75, gt=0, le=1, description='share of prompts whose best reply is accepted by the rule "share"'
    )
    pool: tuple[PolicyConfig, ...] = Field(
        (PolicyConfig(name="parent", share=1.0), PolicyConfig(name="coached", share=1.0, coached=True)),
        description="policies that propose replies, `[[rejection_sampling.pool]]` tables; by default the model in "
        "service, and the same told how to write",
    )
    fresh_days: float | None = Field(
        None, gt=0, description="prompts older than the newest by more are left out; the freshest days come first"
    )
    accept: Literal["share", "best", "threshold"] = Field(
        "share", description="the best of the prompts that score highest, of every prompt, or where it has `min_score`"
    )
    min_score: float | None = Field(None, description='composite score from which the rule "threshold" accepts')
    margin: float | None = Field(
        None, ge=0, description="by how much a reply has to beat its prompt's typical candidate; any if absent"
    )
    margin_over: Literal["median", "mean"] = Field("median", description="what a prompt's typical candidate scores")
    max_character_share: float | None = Field(
        None, gt=0, le=1, description="largest share of accepted replies that one character may have, rounded up"
    )
    max_per_character: int | None = Field(None, ge=1, description="most accepted replies of one character")

    @model_validator(mode="after")
    def _can_be_carried_out(self) -> Self:
        names = [policy.name for policy in self.pool]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"pool: policies {names} must be at least one, each with its own name")
        if (self.accept == "threshold") != (self.min_score is not None):
            raise ValueError(f'accept = "{self.accept}", min_score = {self.min_score}: "threshold" and it go together')
        return self


class ExtraSource(Section):
    """A set of examples from a file (or `bundled:safety`, `bundled:general`), and the source that it belongs to."""

    source: Literal["safety", "tool", "adhoc", "general"]
    file: str = Field(min_length=1)


DEFAULT_WEIGHTS: dict[ExampleSource, float] = {
    "internal": 1.0, "user": 1.0, "rewrite": 1.0, "safety": 0.0, "tool": 0.0, "adhoc": 0.0, "general": 0.0,
}  # fmt: skip


class SFTConfig(Section):
    """Supervised fine-tuning on the mixture (PAPER section 4)."""

    epochs: int = Field(2, ge=1)
    learning_rate: float = Field(5e-5, gt=0)
    examples_per_step: int = Field(8, ge=1)
    warmup_share: float = Field(0.1, ge=0, lt=1)
    max_prompt_tokens: int = Field(192, ge=32)
    weights: dict[ExampleSource, float] = Field(
        DEFAULT_WEIGHTS, description="passes over each source an epoch; sources not named keep the weight shown here"
    )
    max_examples: dict[ExampleSource, int] = Field({}, description="most examples of a source an epoch")
    max_token_share: dict[ExampleSource, float] = Field(
        {},
        description="largest share of an epoch's trained tokens that a source may have, give or take its last example",
    )
    near_duplicates: float | None = Field(
        0.8, gt=0, le=1, description="word-triple Jaccard similarity from which both the last message and the reply "
        "make a near duplicate; only exact ones are dropped if absent"
    )  # fmt: skip
    extra: tuple[ExtraSource, ...] = Field(
        (ExtraSource(source="safety", file="bundled:safety"), ExtraSource(source="general", file="bundled:general")),
        description="sets besides traffic and rewrites, `[[sft.extra]]` tables with `source` and `file` (JSON lines "
        "with `messages`, `prompt` and `chosen`, or `prompt` and `completion`); they count by `weights`",
    )
    learn: Literal["last", "all"] = Field(
        "last", description="which replies of an example: the last, or every one that answers a user"
    )
    max_reply_tokens: int = Field(512, ge=2, description="longer replies are learnt only so far, without their end")
    train_layers: int | None = Field(None, ge=1, description="train only the last so many layers; all if absent")
    lora_rank: int | None = Field(
        None, ge=1, description="train adapters of this rank, added to the weights when done; all weights if absent"
    )
    micro_batch_tokens: int = Field(
        1536, ge=1, description="tokens that run at once, prefixes that examples share counted once; bounds memory"
    )
    evaluation_share: float = Field(
        0.1, ge=0, lt=1, description="share of users whose examples are not learnt but tell the evaluation loss"
    )
    evaluation_examples: int = Field(256, ge=1, description="hold no more users out once they have so many examples")
    evaluate_every: int = Field(10, ge=0, description="steps between evaluations; 0: only before and after")
    patience: int | None = Field(
        None, ge=1, description="stop after so many evaluations in a row without a lower loss, with the best weights"
    )
    max_loss: float | None = Field(
        None, gt=0, description="nats a token; a step's loss above it stops the run as diverged"
    )

    @field_validator("weights", mode="before")
    @classmethod
    def _keeps_the_weights_not_named(cls, given: object) -> object:
        return {**DEFAULT_WEIGHTS, **given} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _bounds_can_be_met(self) -> Self:
        for source, weight in self.weights.items():
            if not 0 <= weight < 1000:
                raise ValueError(f"weights: {source} = {weight:g} must be >= 0 and < 1000")
        for source, most in self.max_examples.items():
            if most < 0:
                raise ValueError(f"max_examples: {source} = {most} must be >= 0")
        for source, share in self.max_token_share.items():
            if not 0 < share <= 1:
                raise ValueError(f"max_token_share: {source} = {share:g} must be > 0 and <= 1")
        return self


class DPOConfig(Section):
    """Direct preference optimisation on small local sets (PAPER section 4)."""

    pairs: int = Field(24, ge=1)
    beta: float = Field(0.1, gt=0)
    learning_rate: float = Field(1e-5, gt=0)
    pairs_per_step: int = Field(6, ge=1)
    max_prompt_tokens: int = Field(192, ge=32)
    max_reply_tokens: int = Field(512, ge=2, description="longer replies are read only so far, without their end")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="chance that a label is wrong, even where all reviewers agree"
    )
    soft_labels: bool = Field(
        False, description="where reviewers disagreed, count the pair the other way round too, by their share"
    )
    length_normalised: bool = Field(False, description="log ratios a token, not summed, so that length does not count")
    sft_weight: float = Field(
        0.0, ge=0, description="weight of the chosen replies' own loss, which keeps them from becoming unlikely"
    )
    train_layers: int | None = Field(None, ge=1)
    lora_rank: int | None = Field(
        None, ge=1, description="train adapters of this rank, added to the weights when done; all weights if absent"
    )
    micro_batch_tokens: int = Field(
        1536, ge=1, description="tokens that run at once, prefixes that replies share counted once; bounds memory"
    )
    evaluation_pairs: int = Field(
        24, ge=0, description="most held-out pairs (`annotate.held_out_share`) that tell accuracy and margin"
    )
    evaluate_every: int = Field(0, ge=0, description="steps between evaluations; 0: only after the last")
    max_loss: float | None = Field(None, gt=0, description="a step's loss above it stops the run as diverged")


class ParallelConfig(Section):
    """Training by several processes, one a GPU (DESIGN section 9). What is learnt is the same but for rounding."""

    processes: int = Field(1, ge=1, description="over all machines; 1: training runs in the command's own process")
    sharding: Literal["none", "full", "node"] = Field(
        "none", description="where weights, gradients and optimiser lie: whole in every process, split over all of "
        "them (FSDP2), or split over each machine's, with a copy a machine",
    )  # fmt: skip
    gradient_checkpointing: bool = Field(
        False, description="keep each layer's input only and compute the rest again: less memory, a third more time"
    )
    launch: tuple[str, ...] = Field(
        (), description="command that starts the workers, before the worker's own words; torchrun on this machine if "
        "absent",
    )  # fmt: skip
