"""Every generation's reward models on every generation's frozen held-out pairs (PAPER section 3).

A model judged on the pairs of the generation after it is judged on replies of the policy that it helped to make: that
is its accuracy on the new policy. Cells once measured are carried from one generation's report to the next; only what
is missing is scored, and a past model only ever scores held-out pairs.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import ValidationError

from .. import intervals, tables
from ..errors import FlywheelError
from ..records import Estimate, Preference
from . import export, screen
from .judge import pairwise_margins, pointwise_margins
from .pairwise import Pairwise
from .pointwise import Pointwise
from .summary import Cell, RewardSummary

UNREADABLE = (FlywheelError, OSError, ValueError, KeyError, TypeError, RuntimeError)


class Past(NamedTuple):
    """A generation before this one: the folders of its reward stage and of the pairs that it annotated."""

    generation: int
    rewards: Path
    pairs: Path


class Preferences(NamedTuple):
    """The two preference models of a generation, and the users from whom they learnt."""

    pointwise: Pointwise
    pairwise: Pairwise
    taught_by: frozenset[str]


def matrix(
    generation: int,
    own: Preferences,
    held_out: Sequence[Preference],
    past: Sequence[Past],
    *,
    threads: int = 2,
    device: str = "cpu",
) -> tuple[Cell, ...]:
    """Cells of all models of generations up to `generation` on all of their frozen pairs, by models, then pairs.

    `own` and `held_out` are this generation's. A past model that this version cannot read, or that cannot score, gives
    cells without values, with the reason, until it can; one whose pairs are gone cells with nothing to measure; the
    others are measured all the same.
    """
    sets = {one.generation: _held_out(one) for one in past} | {generation: list(held_out)}
    known = {(cell.models, cell.pairs): cell for cell in _carried(past)}
    cells = []
    for models in sorted(sets):
        missing = [pairs for pairs in sorted(sets) if (models, pairs) not in known]
        if missing and models == generation:
            known |= {(models, pairs): cell(models, pairs, own, sets[pairs]) for pairs in missing}
        elif missing:
            known |= _measured(next(one for one in past if one.generation == models), missing, sets, threads, device)
        cells += [known[models, pairs] for pairs in sorted(sets)]
    return tuple(cells)


def cell(models: int, pairs: int, judges: Preferences, rows: Sequence[Preference]) -> Cell:
    """The accuracy of both models on decided pairs that they can read, of users from whom they did not learn."""
    fresh = [row for row in rows if row.user_id not in judges.taught_by]
    kept = [row for row in screen.screen(fresh, judges.pointwise.form).kept if row.label > 0.5]
    users = [row.user_id for row in kept]
    one, two = (
        intervals.share((np.sign(margins.log_odds) + 1) / 2, users)
        for margins in (pointwise_margins(judges.pointwise, kept), pairwise_margins(judges.pairwise, kept))
    )
    return Cell(models=models, pairs=pairs, pointwise=one, pairwise=two, left_out=len(rows) - len(fresh))


def taught_by(pairs: Iterable[Preference]) -> frozenset[str]:
    """The users of the pairs that train."""
    return frozenset(pair.user_id for pair in pairs if not pair.held_out)


def load(one: Past, threads: int = 2, device: str = "cpu") -> Preferences:
    """The preference models of a past generation, without its signal models."""
    pointwise = export.load_pointwise(one.rewards / "pointwise", threads, device)
    pairwise = export.load_pairwise(one.rewards / "pairwise.safetensors", pointwise)
    return Preferences(pointwise, pairwise, taught_by(_pairs(one)))


def _measured(
    one: Past, wanted: Sequence[int], sets: dict[int, list[Preference]], threads: int, device: str
) -> dict[tuple[int, int], Cell]:
    judges: Preferences | None = None
    found: dict[tuple[int, int], Cell] = {}
    for pairs in wanted:
        try:
            judges = judges or load(one, threads, device)
            found[one.generation, pairs] = cell(one.generation, pairs, judges, sets[pairs])
        except UNREADABLE as error:
            why = (str(error) or type(error).__name__).splitlines()[0]
            reason = f"generation {one.generation}'s models cannot be read by this version: {why}"
            nothing = Estimate(value=None, n=0, reason=reason)
            lost = Cell(models=one.generation, pairs=pairs, pointwise=nothing, pairwise=nothing)
            found[one.generation, pairs] = lost
    return found


def _carried(past: Sequence[Past]) -> tuple[Cell, ...]:
    """What the last generation measured; nothing if an older version wrote its report.

    A cell without values is no measurement: what stood in its way may be gone.
    """
    if not past:
        return ()
    last = max(past, key=lambda one: one.generation)
    try:
        report = json.loads((last.rewards / "evaluation.json").read_text(encoding="utf-8"))
        cells = RewardSummary.model_validate(report).history
    except (OSError, ValidationError, json.JSONDecodeError):
        return ()
    return tuple(cell for cell in cells if cell.pointwise.value is not None and cell.pairwise.value is not None)


def _pairs(one: Past) -> list[Preference]:
    return tables.read(one.pairs / "pairs.parquet", Preference)


def _held_out(one: Past) -> list[Preference]:
    try:
        return sorted((pair for pair in _pairs(one) if pair.held_out), key=lambda pair: (pair.prompt_id, pair.id))
    except UNREADABLE:
        return []
