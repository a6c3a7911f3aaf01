"""User-signal models: p(continue) and p(thumb up) after a reply, from the same context (PAPER section 3).

One multi-label logistic model on frozen features: sentence embeddings of the reply and of what it answers, and a few
plain measures known when the reply is shown. Missing labels are masked. Signals are noisy and biased, so one is used
only where it has shown, on users it was not trained on, that it can rank.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from ...errors import FlywheelError
from ...ids import derive_seed
from ...instructions import emojis
from ...records import ChatMessage, Conversation, Estimate, Record, Signal
from ..evaluate import auc_by_group

Floats = NDArray[np.float64]
PENALTIES = (1000.0, 250.0, 60.0, 15.0)
FEWEST_OF_A_CLASS = 10
MEASURES = (
    "log_words", "log_words_answered", "asks", "ends_asking", "answered_asks", "exclaims", "emojis", "log_turn",
    "relevance", "repetition",
)  # fmt: skip


class Embeds(Protocol):
    """What this module needs of `llm.encoder.Encoder`: texts to rows of length one."""

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]: ...


class Reply(NamedTuple):
    """A reply, everything said before it (system prompt aside), whose reaction it is, and the labels known."""

    user_id: str
    history: tuple[ChatMessage, ...]
    text: str
    labels: tuple[float | None, ...] = ()


class SignalReport(Record):
    """What a signal model showed on users it was not trained on. Not usable means not used, `auc.reason` or bound."""

    auc: Estimate
    positive_share: float | None
    temperature: float | None
    usable: bool


def collect(conversations: Sequence[Conversation], signals: Sequence[Signal], kinds: Sequence[str]) -> list[Reply]:
    """Every reply whose outcome is known, with its labels in the order of `kinds`.

    An outcome is known once a `continue` row says that the user wrote again (1) or left (0); a conversation that was
    cut short by its cap has none. Of a reply with a known outcome, an act that did not happen is a 0.
    """
    acts: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for signal in signals:
        acts[signal.message_id][signal.kind] = float(signal.value > 0)
    replies = []
    for conversation in sorted(conversations, key=lambda c: c.id):
        history: list[ChatMessage] = []
        for message in conversation.messages:
            known = acts.get(message.id, {})
            # without a known outcome an act would be known only where it happened
            if message.role == "assistant" and "continue" in known and not message.fallback:
                labels = tuple(known.get(kind, 0.0) for kind in kinds)
                replies.append(Reply(conversation.user_id, tuple(history), message.content, labels))
            if message.role != "system":
                history.append(ChatMessage(role=message.role, content=message.content))
    return replies


def features(replies: Sequence[Reply], encoder: Embeds, without: Sequence[str] = ()) -> Floats:
    """Feature rows, shape (replies, 2 x width + measures): embeddings of the reply and of the message it answers,
    and `MEASURES` less those in `without`. Nothing after the reply is read."""
    spoken = [[m for m in reply.history if m.role != "system"] for reply in replies]
    answered = [turns[-1].content if turns and turns[-1].role == "user" else "" for turns in spoken]
    previous = [next((m.content for m in reversed(turns) if m.role == "assistant"), "") for turns in spoken]
    texts = sorted({*(reply.text for reply in replies), *answered, *previous})
    row = {text: i for i, text in enumerate(texts)}
    vectors = encoder.encode(texts)
    if "" in row:
        vectors[row[""]] = 0.0  # nothing was said
    own, before, last = (
        vectors[[row[t] for t in side]].astype(float) for side in ([r.text for r in replies], answered, previous)
    )
    measured = np.array(
        [
            _measures(reply.text, asked, len(turns), float(a @ b), float(a @ c))
            for reply, asked, turns, a, b, c in zip(replies, answered, spoken, own, before, last, strict=True)
        ]
    ).reshape(len(replies), len(MEASURES))
    kept = [i for i, name in enumerate(MEASURES) if name not in without]
    return np.hstack([own, before, measured[:, kept]])


def _measures(text: str, answered: str, turn: int, relevance: float, repetition: float) -> list[float]:
    return [
        np.log1p(len(text.split())), np.log1p(len(answered.split())), float("?" in text),
        float(text.rstrip().endswith("?")), float("?" in answered), float("!" in text), np.log1p(len(emojis(text))),
        np.log1p(turn), relevance, repetition,
    ]  # fmt: skip


class Weights(NamedTuple):
    """Standardisation of the features, and a row of weights and an offset for each label."""

    mean: Floats
    scale: Floats
    weight: Floats
    offset: Floats

    def logits(self, x: Floats) -> Floats:
        """Log-odds, shape (rows, labels)."""
        return np.asarray((x - self.mean) / self.scale @ self.weight.T + self.offset)


def fit(x: Floats, y: Floats, penalty: float) -> Weights:
    """Logistic regression with an L2 penalty on standardised features; NaN labels count for nothing.

    `x` is (rows, features), `y` (rows, labels). The classes keep their natural balance: the offset absorbs it, ranks
    do not depend on it, and weighting would only spoil the probabilities.
    """
    mean, scale = x.mean(0), x.std(0)
    scale[scale < 1e-9] = 1.0
    z, known = (x - mean) / scale, ~np.isnan(y)
    target = np.where(known, y, 0.0)
    labels, width = y.shape[1], x.shape[1]
    start = np.zeros((labels, width + 1))
    share = (target.sum(0) + 0.5) / (known.sum(0) + 1.0)
    start[:, -1] = np.log(share / (1 - share))

    def loss(flat: Floats) -> tuple[float, Floats]:
        weight = flat.reshape(labels, width + 1)
        logit = z @ weight[:, :-1].T + weight[:, -1]
        error = np.where(known, expit(logit) - target, 0.0)
        nll = -np.where(known, target * logit + log_expit(-logit), 0.0).sum()
        gradient = np.c_[error.T @ z + penalty * weight[:, :-1], error.sum(0)]
        return float(nll + penalty / 2 * (weight[:, :-1] ** 2).sum()), gradient.ravel()

    best = minimize(loss, start.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 200, "ftol": 1e-7}).x
    best = best.reshape(labels, width + 1)
    return Weights(mean, scale, best[:, :-1], best[:, -1])


def folds(groups: Sequence[str], count: int, seed: int) -> NDArray[np.int64]:
    """A fold for every row such that no group is in two: groups are shuffled, then dealt to the smallest fold."""
    names, member, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    filled, fold = np.zeros(count), np.zeros(len(names), dtype=np.int64)
    for name in sorted(order, key=lambda i: -sizes[i]):
        fold[name] = int(filled.argmin())
        filled[fold[name]] += sizes[name]
    return fold[member]


def choose_penalty(x: Floats, y: Floats, groups: Sequence[str], seed: int, count: int = 3) -> float:
    """The penalty with the least log loss on held-out groups."""
    if len(set(groups)) < count:
        return PENALTIES[0]
    fold = folds(groups, count, seed)
    known, target = ~np.isnan(y), np.nan_to_num(y)

    def held_out_loss(penalty: float) -> float:
        total = 0.0
        for k in range(count):
            here = fold == k
            logit = fit(x[~here], y[~here], penalty).logits(x[here])
            total -= float(np.where(known[here], target[here] * logit + log_expit(-logit), 0.0).sum())
        return total

    return min(PENALTIES, key=held_out_loss)


class HeldOut(NamedTuple):
    """For every row, from a model that never saw its group: log-odds, and the same without the model's own offset.

    Models of different folds have different offsets, lower where more positives were held out: rows of several folds
    are ranked by `ranks`, or the offsets would rank them the wrong way round.
    """

    logits: Floats
    ranks: Floats


def cross_fit(x: Floats, y: Floats, groups: Sequence[str], seed: int, count: int = 5) -> HeldOut:
    """Predictions for every row by cross-fitting over groups, penalty included. Needs `count` groups."""
    fold = folds(groups, count, derive_seed(seed, "outer"))
    logits, ranks = np.zeros_like(y), np.zeros_like(y)
    for k in range(count):
        here = fold == k
        others = [g for g, inside in zip(groups, here, strict=True) if not inside]
        penalty = choose_penalty(x[~here], y[~here], others, derive_seed(seed, "inner", k))
        weights = fit(x[~here], y[~here], penalty)
        logits[here] = weights.logits(x[here])
        ranks[here] = logits[here] - weights.offset
    return HeldOut(logits, ranks)


def temperature(logits: Floats, labels: Floats) -> float:
    """The divisor of the log-odds with the least log loss on held-out rows (Guo et al. 2017), from 0.25 to 8."""
    grid = np.exp2(np.linspace(-2, 3, 101))
    scaled = logits[None, :] / grid[:, None]
    return float(grid[int(np.argmin(-(labels * scaled + log_expit(-scaled)).sum(1)))])


class SignalModels:
    """p(signal | context, reply) for each signal kind; `usable` names those that may help select."""

    def __init__(
        self, kinds: Sequence[str], reports: Mapping[str, SignalReport], weights: Weights, encoder: Embeds
    ) -> None:
        self.kinds, self.reports, self.weights, self.encoder = tuple(kinds), dict(reports), weights, encoder

    @classmethod
    def train(
        cls, replies: Sequence[Reply], kinds: Sequence[str], encoder: Embeds, *, min_auc: float, seed: int
    ) -> "SignalModels":
        """Fit on all replies; judge and calibrate by cross-fitting over users, so that every AUC is on unseen users.

        A kind with under ten of either class, or fewer than five users, is not measurable: unusable, with the reason.
        """
        y = np.array([[np.nan if v is None else v for v in reply.labels] for reply in replies], dtype=float)
        y = y.reshape(len(replies), len(kinds))
        users = [reply.user_id for reply in replies]
        reasons = {kind: _unmeasurable(y[:, i], users) for i, kind in enumerate(kinds)}
        kept = [i for i, kind in enumerate(kinds) if reasons[kind] is None]
        reports = {
            kind: SignalReport(
                auc=Estimate(value=None, n=int((~np.isnan(y[:, i])).sum()), reason=reasons[kind]),
                positive_share=_mean(y[:, i]), temperature=None, usable=False,
            )
            for i, kind in enumerate(kinds)
        }  # fmt: skip
        if not kept:
            empty = np.zeros(0)
            return cls((), reports, Weights(empty, empty, np.zeros((0, 0)), empty), encoder)
        x, y = features(replies, encoder), y[:, kept]
        held_out = cross_fit(x, y, users, seed)
        temperatures = []
        for column, i in enumerate(kept):
            known = ~np.isnan(y[:, column])
            label, logit = y[known, column], held_out.logits[known, column]
            auc = auc_by_group(
                label, held_out.ranks[known, column], [u for u, k in zip(users, known, strict=True) if k], seed=seed
            )
            temperatures.append(temperature(logit, label))
            reports[kinds[i]] = SignalReport(
                auc=auc, positive_share=_mean(label), temperature=temperatures[-1],
                usable=auc.low is not None and auc.low > min_auc,
            )  # fmt: skip
        weights = fit(x, y, choose_penalty(x, y, users, derive_seed(seed, "final")))
        scale = np.array(temperatures)
        calibrated = weights._replace(weight=weights.weight / scale[:, None], offset=weights.offset / scale)
        return cls([kinds[i] for i in kept], reports, calibrated, encoder)

    @property
    def usable(self) -> tuple[str, ...]:
        return tuple(kind for kind in self.kinds if self.reports[kind].usable)

    def logits(
        self, prompts: Sequence[Sequence[ChatMessage]], replies: Sequence[Sequence[str]]
    ) -> dict[str, list[list[float]]]:
        """Calibrated log-odds of each signal for each reply of each prompt."""
        rows = [
            Reply("", tuple(m for m in prompt if m.role != "system"), text)
            for prompt, texts in zip(prompts, replies, strict=True)
            for text in texts
        ]
        if not self.kinds or not rows:
            return {kind: [[] for _ in prompts] for kind in self.kinds}
        flat = self.weights.logits(features(rows, self.encoder))
        ends = np.cumsum([len(texts) for texts in replies])[:-1]
        return {kind: [part.tolist() for part in np.split(flat[:, i], ends)] for i, kind in enumerate(self.kinds)}

    def predict(
        self, prompts: Sequence[Sequence[ChatMessage]], replies: Sequence[Sequence[str]]
    ) -> dict[str, list[list[float]]]:
        """Probability of each signal for each reply of each prompt."""
        return {
            kind: [expit(np.array(part)).tolist() for part in parts]
            for kind, parts in self.logits(prompts, replies).items()
        }

    def save(self, folder: Path) -> None:
        """Writes `signals.json` (what they are worth) and `signals.safetensors` (float64 weights)."""
        described = {"kinds": self.kinds, "reports": {k: r.model_dump() for k, r in sorted(self.reports.items())}}
        (folder / "signals.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        save_file(self.weights._asdict(), folder / "signals.safetensors")

    @classmethod
    def load(cls, folder: Path, encoder: Embeds) -> "SignalModels":
        """The models that `save` wrote."""
        try:
            described = json.loads((folder / "signals.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FlywheelError(f"{folder} holds no signal models: run the reward stage.") from None
        reports = {kind: SignalReport.model_validate(report) for kind, report in described["reports"].items()}
        return cls(described["kinds"], reports, Weights(**load_file(folder / "signals.safetensors")), encoder)


def _unmeasurable(labels: Floats, users: Sequence[str]) -> str | None:
    known = ~np.isnan(labels)
    positive, n = int(np.nansum(labels)), int(known.sum())
    if min(positive, n - positive) < FEWEST_OF_A_CLASS:
        return f"{positive} positives among {n} labels: at least {FEWEST_OF_A_CLASS} of each class are needed"
    people = len({u for u, k in zip(users, known, strict=True) if k})
    return None if people >= 5 else f"{people} users: at least 5 are needed"


def _mean(labels: Floats) -> float | None:
    known = labels[~np.isnan(labels)]
    return float(known.mean()) if len(known) else None
