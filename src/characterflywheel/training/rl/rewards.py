"""What RL learns from: the pointwise score, terms of style beside it, and safety's veto (PAPER sections 4, 5).

    reward = score + length_weight length + repetition_weight repetition + sum over features of weight feature

A reply that safety refuses lies `veto_margin` below the lowest of its group that it allows, however the reward model
likes it: the gradient leads away from it, and it is what online DPO rejects. A group of which all are refused, or one
of equal rewards, teaches nothing.
Each term is told apart, whatever its weight: what rides along with the score shows before it has to be weighed. By
default all weights are 0 and the reward is the score.
"""

import math
import statistics
from collections.abc import Sequence
from itertools import chain
from typing import Literal, NamedTuple, Protocol

from ...config import TermsConfig
from ...errors import FlywheelError, RewardGone
from ...records import ChatMessage, Prompt
from ...safety.policy import SafetyPolicy
from ...style.features import FEATURES, phrase_features

__all__ = ["RewardGone", "Scorer", "TermScores", "Terms", "length_term"]

Finish = Literal["stop", "length"]


class Scorer(Protocol):
    """The pointwise reward model. One on a server that is gone raises `RewardGone`."""

    def score(
        self, prompts: Sequence[Sequence[ChatMessage]], replies: Sequence[Sequence[str]]
    ) -> list[list[float]]: ...


class TermScores(NamedTuple):
    """One reply's terms, before their weights but for `style`, and the reward that they add up to.

    `score` is the reward model's. `length` is 0 inside the band and down to -1 outside, `repetition` minus the shares
    of word runs said before, in [-2, 0]. `style` is the weighted sum of features, each in `features` in the order of
    `Terms.features`. `vetoed` has the categories for which safety refuses the reply; None where it does not.
    """

    score: float
    length: float
    repetition: float
    style: float
    features: tuple[float, ...]
    vetoed: str | None
    cut_off: bool
    reward: float


def scored(
    scorer: Scorer, prompts: Sequence[Prompt], replies: Sequence[Sequence[str]], name: str = "reward model"
) -> list[list[float]]:
    """A score of every reply to every prompt.

    Raises:
        FlywheelError: one is missing or not finite. Nothing is kept of what cannot be written down and read again.
        RewardGone: the model is on a server that is gone.
    """
    scores = scorer.score([p.messages for p in prompts], replies)
    if [len(mine) for mine in scores] != [len(texts) for texts in replies]:
        raise FlywheelError(
            f"the {name} gave {sum(map(len, scores))} scores for {sum(map(len, replies))} replies: it has to score "
            "every reply of every prompt."
        )
    for prompt, mine in zip(prompts, scores, strict=True):
        for number, score in enumerate(mine, 1):
            if not math.isfinite(score):
                raise FlywheelError(
                    f"the {name} gave a score that is not finite, {score}, to reply {number} of {len(mine)} to prompt "
                    f"{prompt.id}: look at its training before going on."
                )
    return scores


class Terms:
    """The reward of RL: one scorer, one safety policy, and the weights of the terms."""

    def __init__(self, scorer: Scorer, safety: SafetyPolicy, config: TermsConfig) -> None:
        self.scorer, self.safety, self.config = scorer, safety, config
        phrases = {f"says: {phrase}": weight for phrase, weight in config.phrases.items()}
        known = {**FEATURES, **phrase_features(tuple(config.phrases))}
        self.features = {name: (known[name].of, weight) for name, weight in (config.style | phrases).items()}

    def judge(
        self, prompts: Sequence[Prompt], replies: Sequence[Sequence[str]], finish: Sequence[Sequence[Finish]]
    ) -> list[list[TermScores]]:
        """The terms of every reply to every prompt. `finish` says which replies were cut off (`length`).

        Raises:
            FlywheelError: a score is missing or not finite.
            RewardGone: the reward model is on a server that is gone.
        """
        scores = scored(self.scorer, prompts, replies)
        return [self._group(*one) for one in zip(prompts, replies, finish, scores, strict=True)]

    def _group(
        self, prompt: Prompt, texts: Sequence[str], finish: Sequence[Finish], scores: Sequence[float]
    ) -> list[TermScores]:
        told = [self._terms(prompt, *one) for one in zip(texts, finish, scores, strict=True)]
        allowed = [one.reward for one in told if one.vetoed is None]
        below = min(allowed) - self.config.veto_margin if allowed else min((one.reward for one in told), default=0.0)
        return [one if one.vetoed is None else one._replace(reward=below) for one in told]

    def _terms(self, prompt: Prompt, text: str, finish: Finish, score: float) -> TermScores:
        config, history, cut_off = self.config, prompt.messages, finish == "length"
        length = length_term(text, cut_off, config.min_words, config.max_words)
        repetition = -sum(FEATURES[name].of(history, text) for name in ("repeated_runs", "own_words"))
        features = tuple(of(history, text) for of, _ in self.features.values())
        style = sum(weight * value for (_, weight), value in zip(self.features.values(), features, strict=True))
        verdict = self.safety.check_answer(history, text)
        return TermScores(
            score, length, repetition, style, features, None if verdict.allowed else ", ".join(verdict.categories),
            cut_off, score + config.length_weight * length + config.repetition_weight * repetition + style,
        )  # fmt: skip

    def metrics(self, judged: Sequence[Sequence[TermScores]]) -> dict[str, float]:
        """Means over a step's replies, for its line of `metrics.jsonl`: every term apart, before its weight.

        `vetoed_groups` are those that safety refused as a whole: all have one reward, so they teach nothing.
        """
        every = list(chain.from_iterable(judged))
        if not every:
            raise FlywheelError("no reply was judged: a step needs a prompt and a reply.")
        return {
            "score": statistics.fmean(one.score for one in every),
            "length_term": statistics.fmean(one.length for one in every),
            "repetition_term": statistics.fmean(one.repetition for one in every),
            "style_term": statistics.fmean(one.style for one in every),
            **{
                f"feature {name}": statistics.fmean(one.features[i] for one in every)
                for i, name in enumerate(self.features)
            },
            "vetoed_share": statistics.fmean(one.vetoed is not None for one in every),
            "cut_off_share": statistics.fmean(one.cut_off for one in every),
            "vetoed_groups": float(sum(bool(mine) and all(one.vetoed is not None for one in mine) for mine in judged)),
        }


def length_term(text: str, cut_off: bool, low: int, high: int) -> float:
    """0 for `low` to `high` words, else minus the share by which it is outside, at most 1.

    A reply that was cut off has -1: its true length is unknown, and an unfinished reply is no good one, as in the
    overlong shaping of Yu et al. (2025, DAPO), which this follows in kind.
    """
    if cut_off:
        return -1.0
    count = FEATURES["words"].of((), text)
    outside = (low - count) / low if count < low else (count - high) / high
    return -min(1.0, max(0.0, outside))
