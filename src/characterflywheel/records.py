"""What crosses disk or HTTP: the nouns of the flywheel, frozen and strict (DESIGN section 5).

Conversations are OpenAI-style messages. Preference pairs are TRL's conversational `prompt/chosen/rejected`
plus our columns. Every derived row names the conversation and user it came from, so that erasing a user can
reach everything derived.
"""

from datetime import datetime
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, computed_field, model_validator

Source = Literal["internal", "user"]
Role = Literal["system", "user", "assistant"]
SignalKind = Literal[
    "continue", "thumb_up", "thumb_down", "love", "reaction", "regenerate", "pick", "edit", "report", "rating",
    "feedback",
]  # fmt: skip
GIVEN = "client"
"""The `model` of messages that came with the history that a client sent: nobody said them here."""
Finish = Literal["stop", "length", "cancelled", "error"]
Split = Literal["annotate", "train", "evaluate", "experiment"]
ExampleSource = Literal["internal", "user", "rewrite", "safety", "tool", "adhoc", "general"]


class Record(BaseModel):
    """Base of all records: immutable, and unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ChatMessage(Record):
    """One OpenAI-style message."""

    role: Role
    content: str


RuleKind = Literal[
    "max_words", "ends_with_question", "exactly_one_emoji", "no_emoji", "lower_case", "no_lists",
    "must_mention", "never_mention", "calls_user", "speaks_of_itself_as",
]  # fmt: skip


class Rule(Record):
    """What makes an instruction checkable by a program: a kind, with a word list or a number where it takes one."""

    kind: RuleKind
    words: tuple[str, ...] = ()
    number: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> Self:
        if self.kind == "max_words" and self.number is None:
            raise ValueError("max_words needs a number, e.g. number = 25")
        if self.kind in ("must_mention", "never_mention", "calls_user", "speaks_of_itself_as") and not self.words:
            raise ValueError(f'{self.kind} needs words, e.g. words = ["captain"]')
        if not all(word.strip() == word and word for word in self.words):
            raise ValueError(f"words {self.words!r} must not be empty or have spaces around them")
        return self


class Instruction(Record):
    """One written instruction of a character's creator; `rule` is None where only a reader can judge it."""

    text: str = Field(min_length=1)
    rule: Rule | None = None


class Character(Record):
    """A character: who it is, and what its creator said it must do. A change makes a new version."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    version: int = Field(default=1, ge=1)
    name: str = Field(min_length=1)
    category: str
    traits: tuple[str, ...]
    instructions: tuple[Instruction, ...] = ()
    greeting: str
    examples: tuple[ChatMessage, ...] = ()
    safety: Literal["approved", "review", "refused"] = "approved"
    extensions: dict[str, object] = Field(default_factory=dict)
    card: dict[str, object] | None = Field(default=None, description="the `data` of the character card it came from")

    @model_validator(mode="after")
    def _says_what_to_do(self) -> Self:
        if not self.instructions and self.card is None:
            raise ValueError("a character needs at least one instruction, or the character card it came from")
        return self


class User(Record):
    """A person who chats. `consent` says whether their messages may be used for training."""

    id: str
    population: Source
    consent: bool = True
    created_at: datetime


class Message(Record):
    """A message as the event store keeps it. Replies carry the model, and the arm if an experiment served it.

    `parent_id` is the message it answers: replies with the same parent are alternatives, as regenerating and drafts
    make them. It is None at the beginning and where messages simply follow one another. A `fallback` is a canned
    reply. `finish` says how a reply ended; `cancelled`: the client left while it was written.
    """

    id: str
    conversation_id: str
    user_id: str
    role: Role
    content: str
    model: str | None = None
    experiment: str | None = None
    arm: str | None = None
    fallback: bool = False
    parent_id: str | None = None
    finish: Finish | None = None
    created_at: datetime


class Conversation(Record):
    """A conversation between one user and one character, messages in order."""

    id: str
    user_id: str
    character_id: str
    character_version: int
    source: Source
    created_at: datetime
    messages: tuple[Message, ...] = ()


class Signal(Record):
    """What a user did after a reply. `value` is 1 for an act, 1 to 5 for a rating.

    `text` holds written feedback, a report's reason, the edited reply, or a reaction's emoji.
    """

    id: str
    message_id: str
    user_id: str
    kind: SignalKind
    value: float = 1.0
    text: str | None = None
    created_at: datetime


class Exposure(Record):
    """A user met an experiment's arm. Logged before the reply; the exposed are the population of the analysis."""

    id: str
    experiment: str
    arm: str
    user_id: str
    created_at: datetime


class Prompt(Record):
    """A partial conversation that ends with the user's message: what annotation, training and evaluation use.

    `messages` begins with the character's system prompt.
    """

    id: str
    conversation_id: str
    user_id: str
    source: Source
    character_id: str
    messages: tuple[ChatMessage, ...]
    split: Split
    cluster: int
    turn: int
    created_at: datetime


class Candidate(Record):
    """A reply drawn for a prompt from one policy of the pool (or written by an annotator: policy `rewrite`)."""

    id: str
    prompt_id: str
    policy: str
    text: str
    finish_reason: Literal["stop", "length"]
    score: float | None = None


class Scored(Record):
    """What selection knows of one reply. `score` never says whether it may be selected: `vetoed` does.

    `score` is the composite: `preference`, the standardised pointwise score, plus the weighted standardised log-odds of
    signals. `signals` has the log-odds of every reliable signal. `vetoed` says why safety refuses the reply, whatever
    its score; None where it does not. Values have no order, so that nobody sorts a vetoed reply by accident.
    """

    score: float
    preference: float
    signals: dict[SignalKind, float] = Field(default_factory=dict)
    vetoed: str | None = None


class PromptChoice(Record):
    """Why online RL learns from a prompt: what its candidates scored, and how old it was beside the newest prompt.

    `reason`: its scores' variance or low mean, or that it was drawn at random among the others (`ordinary`). `mean` is
    None without a score of its candidates, `variance` (unbiased) without two.
    """

    prompt_id: str
    reason: Literal["variance", "low_score", "ordinary"]
    scores: int = Field(ge=0)
    mean: float | None
    variance: float | None
    age_days: float


class Rollout(Record):
    """A reply drawn by the policy while it learns.

    `step` counts from 1, which draws from the policy's start. `logprobs[t]` is the sampler's log-probability of
    `token_ids[t]`, at its temperature; `learner_logprobs` are the same of the weights that learn from it, as they were
    when the step began, None where it taught nothing (all replies to the prompt had one reward; online DPO: it was
    neither best nor worst) and its step was not looked at. `score` is the reward model's, `reward` what was learnt
    from: the score and the weighted terms `length`, `repetition` and `style` (None where nobody measured them);
    `features` are the values behind `style`, in the order of `rl.terms`. A reply that safety refused for `vetoed` has
    less than any of its group that was allowed, one that is `cut_off` met `max_tokens`. `advantage` is GRPO's.
    `version` counts the updates behind the weights that drew it, fewer than the learner had made where it lagged.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")  # engines report NaN at times

    step: int
    prompt_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    learner_logprobs: tuple[float, ...] | None = None
    score: float
    reward: float
    length: float | None = None
    repetition: float | None = None
    style: float | None = None
    features: tuple[float, ...] = ()
    vetoed: str | None = None
    cut_off: bool | None = None
    advantage: float | None = None
    version: int | None = None


class Task(Record):
    """What an annotator is shown: the character, the history, and alternatives to judge and rank."""

    id: str
    kind: Literal["static", "interactive", "steerability"]
    prompt_id: str
    character: Character
    history: tuple[ChatMessage, ...]
    candidates: tuple[Candidate, ...]
    reviewer: str


class Answers(Record):
    """The structured questions about one reply. `violates` holds the numbers of the instructions it breaks."""

    candidate_id: str
    false_refusal: bool
    templated: bool
    violates: tuple[int, ...] = ()


class Judgement(Record):
    """One reviewer's answer to a task: questions for every reply, a ranking best first, perhaps a rewrite."""

    id: str
    task_id: str
    prompt_id: str
    reviewer: str
    answers: tuple[Answers, ...]
    ranking: tuple[str, ...]
    rewrite: str | None = None
    seconds: float
    created_at: datetime

    @model_validator(mode="after")
    def _ranking_names_the_judged(self) -> Self:
        if sorted(self.ranking) != sorted(a.candidate_id for a in self.answers):
            raise ValueError("ranking must name every judged candidate exactly once")
        return self


class Preference(Record):
    """A preference pair in TRL's conversational format, plus who preferred it and where it came from.

    `label` is the share of `reviewers` who preferred `chosen` (a soft label for Bradley-Terry, at least 0.5).
    `strength` is by how much they did, from 0 (as good as equal) to 1 (first against last of those shown).
    """

    id: str
    prompt_id: str
    user_id: str
    character_id: str
    source: Source
    prompt: tuple[ChatMessage, ...]
    chosen: tuple[ChatMessage, ...]
    rejected: tuple[ChatMessage, ...]
    chosen_policy: str
    rejected_policy: str
    reviewers: int = Field(ge=1)
    label: float = Field(ge=0.5, le=1.0)
    strength: float = Field(1.0, ge=0.0, le=1.0)
    held_out: bool = False


class Dropped(Record):
    """Something a filter did not keep, and why. Filters return what they kept and what they dropped.

    `prompt_id` is the prompt that it was made from, where it is none itself.
    """

    id: str
    stage: str
    reason: str
    detail: str = ""
    prompt_id: str | None = None


class SetAside(Record):
    """A training prompt and its user, from whose comparisons only the gold reward model learns."""

    prompt_id: str
    user_id: str


class Example(Record):
    """One supervised example: OpenAI-style `messages`, the last one to be learnt, and where it came from.

    `user_id` and `character_id` are None where nobody said it, or no character of ours: in sets of examples.
    """

    id: str
    prompt_id: str
    user_id: str | None
    character_id: str | None
    source: ExampleSource
    messages: tuple[ChatMessage, ...]
    score: float | None = None


class Estimate(Record):
    """A number with its uncertainty. `value` is None, with a `reason`, where it could not be measured; never 0."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int
    reason: str | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def interval(self) -> tuple[float, float] | None:
        """`low` and `high` together, for those who read the JSON."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    @model_validator(mode="before")
    @classmethod
    def _interval_is_derived(cls, data: object) -> object:
        return {k: v for k, v in data.items() if k != "interval"} if isinstance(data, dict) else data
