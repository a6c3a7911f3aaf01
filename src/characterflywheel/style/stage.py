"""The style stage: feature tables over pairs, selected replies and checkpoints, with alarms (PAPER section 5).

Writes `style.parquet`, one row a comparison and feature.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from .. import tables
from ..errors import FlywheelError
from ..ledger import StyleShift
from ..pipeline import Work
from ..records import Candidate, ChatMessage, Preference, Prompt, Record
from .features import FEATURES, phrase_features
from .monitor import Difference, Kind, Reply, Side, compare, side


class StyleSummary(Record):
    """Alarms in words, and every feature from the first checkpoint to the last.

    `drift.alarm` is set where the last checkpoint differs by a discovery with an effect; `drift.preferred` says
    whether annotators lean that way too (chosen less rejected).
    """

    comparisons: tuple[str, ...]
    alarms: tuple[str, ...]
    drift: tuple[StyleShift, ...]

    def line(self) -> str:
        """One line for the console."""
        shifted = [shift.feature for shift in self.drift if shift.alarm]
        moved = f"drift in {', '.join(shifted)}" if shifted else "no drift"
        return f"{len(self.comparisons)} comparisons, {len(self.alarms)} alarms, {moved}"


def watch_style(
    work: Work,
    pairs: Sequence[Preference],
    accepted: Sequence[Candidate],
    rejected: Sequence[Candidate],
    prompts: Mapping[str, Prompt],
    checkpoints: Mapping[str, Sequence[tuple[str, str]]],
    phrases: Sequence[str] = (),
) -> StyleSummary:
    """Compare chosen with rejected, accepted with rejected, and each checkpoint with the one before it.

    `checkpoints` maps a name to (prompt id, reply), oldest first; with three or more, the first and the last are
    compared too. `phrases` are looked for besides `FEATURES`. Raises FlywheelError for a prompt id not in `prompts`.
    """
    features = {**FEATURES, **phrase_features(phrases)}

    def measured(name: str, replies: Sequence[tuple[str, str]]) -> Side:
        return side(name, (_reply(name, prompts, prompt_id, text) for prompt_id, text in replies), features)

    sides: list[tuple[Kind, Side, Side]] = [
        (
            "pairs",
            side("rejected", _replies(pairs, "rejected"), features),
            side("chosen", _replies(pairs, "chosen"), features),
        ),
        (
            "selection",
            measured("not accepted", [(one.prompt_id, one.text) for one in rejected]),
            measured("accepted", [(one.prompt_id, one.text) for one in accepted]),
        ),
    ]
    models = [measured(name, replies) for name, replies in checkpoints.items()]
    steps = list(pairwise(models)) + ([(models[0], models[-1])] if len(models) > 2 else [])
    sides += [("checkpoints", before, after) for before, after in steps]
    rows = [row for kind, first, second in sides for row in compare(kind, first, second, features)]
    tables.write(work.folder / "style.parquet", Difference, rows)
    last = f"{models[0].name} to {models[-1].name}" if len(models) > 1 else None
    preferred = {row.feature: row.estimate for row in rows if row.kind == "pairs"}
    return StyleSummary(
        comparisons=tuple(dict.fromkeys(row.comparison for row in rows)),
        alarms=tuple(_sentence(row) for row in rows if row.alarm),
        drift=tuple(
            StyleShift(
                feature=row.feature,
                before=row.first_mean,
                after=row.second_mean,
                difference=row.estimate,
                preferred=preferred[row.feature],
                alarm=row.alarm,
            )
            for row in rows
            if row.kind == "checkpoints" and row.comparison == last
        ),
    )


def _replies(pairs: Sequence[Preference], which: str) -> list[Reply]:
    return [Reply(one.prompt_id, one.user_id, one.prompt, _text(getattr(one, which))) for one in pairs]


def _text(messages: Sequence[ChatMessage]) -> str:
    return messages[-1].content


def _reply(name: str, prompts: Mapping[str, Prompt], prompt_id: str, text: str) -> Reply:
    prompt = prompts.get(prompt_id)
    if prompt is None:
        raise FlywheelError(
            f"{name} answers prompt {prompt_id}, which is not among {len(prompts)} prompts: pass them all."
        )
    return Reply(prompt_id, prompt.user_id, prompt.messages, text)


def _sentence(row: Difference) -> str:
    return (
        f"{row.comparison}: {row.feature} {row.first_mean:.3g} to {row.second_mean:.3g} "
        f"(effect {row.effect:+.2f}, q {row.q:.2g}, {row.n} prompts)"
    )
