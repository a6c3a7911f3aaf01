"""The signal models of a generation: trained, judged on users they did not see, saved, asked (PAPER section 3)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy.special import expit

from ...errors import FlywheelError
from ...ids import derive_seed
from ...records import ChatMessage, Record
from .. import stored
from .biases import Circumstances, circumstances, nuisance_ranks
from .inputs import Embeds, Reply, features, spreads
from .logistic import Weights, checked_labels, cross_fit, fit
from .reliability import MAX_CALIBRATION_ERROR, SignalReport, judge, unmeasurable

Floats = NDArray[np.float64]
REPLIES_AT_ONCE = 4096  # whose features are in memory together


class Saved(Record):
    """What `signals.json` says: which kinds are modelled, and what every kind showed."""

    kinds: tuple[str, ...]
    reports: dict[str, SignalReport]


class SignalModels:
    """p(signal | context, reply) for each signal kind; `usable` names those that may help select."""

    def __init__(
        self, kinds: Sequence[str], reports: Mapping[str, SignalReport], weights: Weights, encoder: Embeds
    ) -> None:
        self.kinds, self.reports, self.weights, self.encoder = tuple(kinds), dict(reports), weights, encoder

    @classmethod
    def train(
        cls, replies: Sequence[Reply], kinds: Sequence[str], encoder: Embeds, *, min_auc: float, seed: int,
        max_calibration_error: float = MAX_CALIBRATION_ERROR,
    ) -> "SignalModels":  # fmt: skip
        """Fit on all replies; judge and calibrate by cross-fitting over users, so that every figure is of unseen users.

        A kind with under ten labels of either class, or these of fewer than five users, is not measurable: its report
        says so, and it is not modelled. The others are judged by the criteria of `reliability`.

        Raises:
            FlywheelError: labels that are not one for each kind or neither 0, 1 nor unknown; an empty reply; a kind
                named twice.
        """
        y = _labels(replies, kinds)
        users = [reply.user_id for reply in replies]
        reports = {kind: unmeasurable(y[:, i], users) for i, kind in enumerate(kinds)}
        kept = [i for i, kind in enumerate(kinds) if reports[kind] is None]
        if not kept:
            empty = np.zeros(0)
            return cls((), _judged(reports), Weights(empty, empty, np.zeros((0, 0)), empty), encoder)
        y = y[:, kept]
        known = ~np.isnan(y)
        told = known.any(1)  # rows that say something about a kind that is modelled
        rows = [replies[i] for i in np.flatnonzero(told).tolist()]
        y, known = y[told], known[told]
        x, found = features(rows, encoder), circumstances(rows)
        spread = spreads(x.shape[1])
        held_out = cross_fit(x, y, found.user, seed, spread)
        alone = nuisance_ranks(y, found, seed)
        weights = fit(x, y, held_out.penalty, spread)
        temperatures, offsets = np.ones(len(kept)), np.zeros(len(kept))
        for column, i in enumerate(kept):
            here = known[:, column]
            reports[kinds[i]], scaling = judge(
                y[here, column], held_out.logits[here, column], held_out.ranks[here, column],
                {name: ranks[here, column] for name, ranks in alone.items()}, _where(found, here),
                min_auc=min_auc, max_calibration_error=max_calibration_error, seed=derive_seed(seed, kinds[i]),
            )  # fmt: skip
            temperatures[column], offsets[column] = scaling.temperature, scaling.offset
        calibrated = weights._replace(
            weight=weights.weight / temperatures[:, None], offset=weights.offset / temperatures + offsets
        )
        return cls([kinds[i] for i in kept], _judged(reports), calibrated, encoder)

    @property
    def usable(self) -> tuple[str, ...]:
        return tuple(kind for kind in self.kinds if self.reports[kind].usable)

    def logits(
        self, prompts: Sequence[Sequence[ChatMessage]], replies: Sequence[Sequence[str]]
    ) -> dict[str, list[list[float]]]:
        """Calibrated log-odds of each signal for each reply of each prompt."""
        rows = [
            Reply("", history, text)
            for history, texts in zip(map(tuple, prompts), replies, strict=True)
            for text in texts
        ]
        if not self.kinds or not rows:
            return {kind: [[] for _ in prompts] for kind in self.kinds}
        parts = (rows[i : i + REPLIES_AT_ONCE] for i in range(0, len(rows), REPLIES_AT_ONCE))
        flat = np.concatenate([self.weights.logits(features(part, self.encoder)) for part in parts])
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
        saved = Saved(kinds=tuple(self.kinds), reports=dict(sorted(self.reports.items())))
        (folder / "signals.json").write_text(saved.model_dump_json(indent=1) + "\n", encoding="utf-8")
        save_file(self.weights._asdict(), folder / "signals.safetensors")

    @classmethod
    def load(cls, folder: Path, encoder: Embeds) -> "SignalModels":
        """The models that `save` wrote. Raises FlywheelError where there are none, or another version's."""
        saved = stored.read(folder / "signals.json", Saved, "signal models")
        path = folder / "signals.safetensors"
        try:
            weights = Weights(**load_file(path))
        except TypeError as error:  # arrays of other names
            raise stored.of_another_version(path, error) from None
        return cls(saved.kinds, saved.reports, weights, encoder)


def _labels(replies: Sequence[Reply], kinds: Sequence[str]) -> Floats:
    """Labels, shape (replies, kinds), NaN where unknown."""
    if len(set(kinds)) < len(kinds):
        raise FlywheelError(f"signals {', '.join(kinds)} name one twice.")
    for i, reply in enumerate(replies):
        if len(reply.labels) != len(kinds):
            raise FlywheelError(
                f"reply {i} has {len(reply.labels)} labels, must be one for each of {len(kinds)} kinds."
            )
        if not reply.text.strip():
            raise FlywheelError(f"reply {i} (user {reply.user_id!r}) is empty: leave out what nobody could read.")
    y = np.array([[np.nan if v is None else v for v in reply.labels] for reply in replies], dtype=float)
    return checked_labels(y.reshape(len(replies), len(kinds)))


def _where(found: Circumstances, here: NDArray[np.bool_]) -> Circumstances:
    rows = np.flatnonzero(here).tolist()
    return Circumstances(
        tuple(found.position[i] for i in rows), tuple(found.length[i] for i in rows),
        tuple(found.character[i] for i in rows), tuple(found.user[i] for i in rows),
    )  # fmt: skip


def _judged(reports: Mapping[str, SignalReport | None]) -> dict[str, SignalReport]:
    return {kind: report for kind, report in reports.items() if report is not None}
