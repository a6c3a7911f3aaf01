"""Selection by the composite score: how its parts add up, and safety's veto (PAPER sections 3, 4).

Preference has weight 1. Signals that have shown that they can rank unseen users' reactions are auxiliaries with stated
weights; the others weigh nothing. Safety is no term of the sum: a reply that it refuses is not selected, whatever its
score. No model is needed here, so a client of the scoring server imports no torch.
"""

from collections.abc import Mapping, Sequence
from typing import cast

from ..records import ChatMessage, Scored, SignalKind
from ..safety.policy import SafetyPolicy

Conversations = Sequence[Sequence[ChatMessage]]
Scores = Sequence[Sequence[float]]


def combine(
    preference: Scores,
    signals: Mapping[str, Scores],
    weights: Mapping[SignalKind, float],
    scales: Mapping[str, tuple[float, float]],
) -> list[list[Scored]]:
    """score = preference + sum over k of weights[k] (signals[k] - mean_k) / deviation_k, for each prompt's replies.

    `preference` and each of `signals` hold a list for each prompt; `signals` are log-odds of the reliable kinds, and
    `scales` their mean and deviation. A kind without weight is told in `Scored.signals` and adds nothing.
    """
    kinds = cast("list[SignalKind]", list(signals))
    out = []
    for i, several in enumerate(preference):
        mine = []
        for j, score in enumerate(several):
            parts = {kind: float(signals[kind][i][j]) for kind in kinds}
            terms = (w * (parts[k] - scales[k][0]) / scales[k][1] for k, w in weights.items() if w and k in parts)
            mine.append(Scored(score=score + sum(terms), preference=score, signals=parts))
        out.append(mine)
    return out


def veto(
    scored: Sequence[Sequence[Scored]],
    prompts: Conversations,
    replies: Sequence[Sequence[str]],
    safety: SafetyPolicy,
) -> list[list[Scored]]:
    """The same with `vetoed` where safety refuses the reply as an answer to the prompt's last message."""
    out = []
    for mine, prompt, texts in zip(scored, prompts, replies, strict=True):
        verdicts = (safety.check_answer(prompt, text) for text in texts)
        reasons = (None if verdict.allowed else ", ".join(verdict.categories) for verdict in verdicts)
        out.append([one.model_copy(update={"vetoed": r}) for one, r in zip(mine, reasons, strict=True)])
    return out
