"""The trained reward models together, and the composite score used for selection (PAPER section 3).

Preference first, user signals as auxiliaries, and of those only the ones that can rank unseen users' reactions. Safety
is no part of the score but a veto beside it (see `selection`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..llm.native import fast_dtype
from ..records import ChatMessage, Record, Scored, SignalKind
from ..safety.policy import SafetyPolicy
from . import export, stored
from .pairwise import Pairwise
from .pointwise import Pointwise
from .selection import Conversations, combine, veto
from .signals import Embeds, SignalModels


class Settings(Record):
    """How the saved models are used together. `scales`: mean and deviation of each signal's log-odds.

    The temperatures divide the preference models' log-odds.
    """

    signal_weights: dict[SignalKind, float]
    scales: dict[str, tuple[float, float]]
    pointwise_temperature: float = 1.0
    pairwise_temperature: float = 1.0


class RewardModels:
    """The preference models, the signal models, and their composite. `gold`: judges over-optimisation, never trains."""

    def __init__(
        self, pointwise: Pointwise, pairwise: Pairwise, signals: SignalModels,
        signal_weights: Mapping[SignalKind, float], scales: Mapping[str, tuple[float, float]],
        gold: Pointwise | None = None,
    ) -> None:  # fmt: skip
        self.pointwise, self.pairwise, self.signals, self.gold = pointwise, pairwise, signals, gold
        self.signal_weights, self.scales = dict(signal_weights), dict(scales)

    @property
    def weights(self) -> dict[SignalKind, float]:
        """The weights that count: of signals that were reliable on unseen users. Preference has 1."""
        return {kind: w for kind, w in self.signal_weights.items() if w and kind in self.signals.usable}

    def composite(self, prompts: Conversations, replies: Sequence[Sequence[str]]) -> list[list[float]]:
        """Standardised preference score plus the weighted standardised log-odds of the usable signals; no veto."""
        if not self.weights:
            return self.pointwise.score(prompts, replies)
        return [[one.score for one in several] for several in self.parts(prompts, replies)]

    def parts(self, prompts: Conversations, replies: Sequence[Sequence[str]]) -> list[list[Scored]]:
        """Each reply's composite score and what it is made of, before safety is asked."""
        usable = sorted(self.signals.usable)
        logits = self.signals.logits(prompts, replies) if usable else {}
        preference = self.pointwise.score(prompts, replies)
        return combine(preference, {kind: logits[kind] for kind in usable}, self.weights, self.scales)

    def judge(
        self, prompts: Conversations, replies: Sequence[Sequence[str]], safety: SafetyPolicy
    ) -> list[list[Scored]]:
        """What selection goes by: every reply's parts, and safety's veto."""
        return veto(self.parts(prompts, replies), prompts, replies, safety)

    def save(self, folder: Path) -> None:
        """Safetensors and JSON, without the policy's folder being needed again (`pointwise/`: see `export`)."""
        self.save_settings(folder)
        export.save_pointwise(self.pointwise, folder / "pointwise")
        export.save_pairwise(self.pairwise, folder / "pairwise.safetensors")
        if self.gold is not None:
            export.save_pointwise(self.gold, folder / "gold")
        self.signals.save(folder)

    def save_settings(self, folder: Path) -> None:
        """What of `save` is no weight: temperatures are known only once the saved models have been judged."""
        settings = Settings(
            signal_weights=self.signal_weights, scales=self.scales,
            pointwise_temperature=self.pointwise.temperature, pairwise_temperature=self.pairwise.temperature,
        )  # fmt: skip
        (folder / "reward.json").write_text(settings.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, encoder: Embeds, threads: int = 2, device: str = "cpu") -> "RewardModels":
        """The models that `save` wrote, to score with alone. Raises FlywheelError where there are none, or another
        version's."""
        settings = stored.read(folder / "reward.json", Settings, "reward models")
        pointwise = export.load_pointwise(
            folder / "pointwise", threads, device, temperature=settings.pointwise_temperature
        )
        pairwise = export.load_pairwise(
            folder / "pairwise.safetensors", pointwise, temperature=settings.pairwise_temperature
        )
        gold = export.load_pointwise(folder / "gold", threads, device) if (folder / "gold").exists() else None
        signals = SignalModels.load(folder, encoder)
        for model in (pointwise, pairwise, *([gold] if gold else [])):
            model.net.scores_only = True
        return cls(pointwise, pairwise, signals, settings.signal_weights, settings.scales, gold)


def precision_of(model: Pointwise) -> str:
    """Of its products: float32, or bfloat16 where the processor is fast in it."""
    return str(model.net.precision or fast_dtype(model.net.head.weight.device.type)).removeprefix("torch.")


def signal_scales(
    signals: SignalModels, prompts: Sequence[Sequence[ChatMessage]], replies: Sequence[Sequence[str]]
) -> dict[str, tuple[float, float]]:
    """Mean and deviation of each signal's log-odds on the replies that the preference models were trained on."""
    flat: dict[str, NDArray[np.float64]] = {
        kind: np.concatenate([np.array(part) for part in parts])
        for kind, parts in signals.logits(prompts, replies).items()
    }
    return {kind: (float(values.mean()), max(float(values.std()), 1e-6)) for kind, values in sorted(flat.items())}
