"""The style stage: features of pairs, selection, mixture, checkpoints and RL compared, with alarms (PAPER section 5).

Writes `style.parquet`, one row a comparison and feature.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from .. import tables
from ..errors import FlywheelError
from ..ledger import StyleShift
from ..pipeline import Work
from ..records import Candidate, ChatMessage, Example, Preference, Prompt, Record, Rollout
from .features import FEATURES, Feature, count_features, phrase_features
from .monitor import Difference, Kind, Reply, Side, compare, side

WINDOW_PROMPTS = 8
"""Fewer prompts than this make no window of RL: their means would say nothing."""


class StyleSummary(Record):
    """Alarms in words, and every feature from the first checkpoint to the last.

    `drift.alarm` is set where the last checkpoint differs by a discovery with an effect; `drift.preferred` says
    whether annotators lean that way too (chosen less rejected); `drift.rides` names the comparisons of what was chosen
    or learnt that have an alarm in the same direction.
    """

    comparisons: tuple[str, ...]
    alarms: tuple[str, ...]
    drift: tuple[StyleShift, ...]

    def line(self) -> str:
        """One line for the console."""
        shifted = [shift.feature for shift in self.drift if shift.alarm]
        moved = f"drift in {', '.join(shifted)}" if shifted else "no drift"
        return f"{len(self.comparisons)} comparisons, {len(self.alarms)} alarms, {moved}"


class Learning(NamedTuple):
    """What training took in and gave out beside its checkpoints, for the comparisons that need it.

    Attributes:
        own: replies of the model in service, as it is, to the prompts of rejection sampling.
        learnt: what SFT trained on.
        rollouts: what RL drew, of every step.
        windows: stretches of steps that RL is cut into, at most; fewer where a stretch would have too few prompts.
    """

    own: Sequence[Candidate] = ()
    learnt: Sequence[Example] = ()
    rollouts: Sequence[Rollout] = ()
    windows: int = 4


def watch_style(
    work: Work,
    pairs: Sequence[Preference],
    accepted: Sequence[Candidate],
    rejected: Sequence[Candidate],
    prompts: Mapping[str, Prompt],
    checkpoints: Mapping[str, Sequence[tuple[str, str]]],
    phrases: Sequence[str] = (),
    *,
    counts: Mapping[str, str] | None = None,
    learning: Learning = Learning(),
    features: Mapping[str, Feature] = FEATURES,
) -> StyleSummary:
    """Compare chosen with rejected, accepted with rejected, what SFT learnt with the model's own replies, each
    checkpoint with the one before it, and RL's later steps with its first.

    `checkpoints` maps a name to (prompt id, reply), oldest first; with three or more, the first and the last are
    compared too. `phrases` and `counts` (patterns by name) are looked for besides `features`.

    Raises:
        FlywheelError: a prompt id is not in `prompts`, or a feature of the configuration cannot be measured.
    """
    features = {**features, **phrase_features(phrases), **count_features(counts or {})}

    def measured(name: str, replies: Iterable[tuple[str, str]]) -> Side:
        return side(name, (_reply(name, prompts, prompt_id, text) for prompt_id, text in replies), features)

    sides: list[tuple[Kind, Side, Side]] = [
        (
            "pairs",
            side("rejected", _replies(pairs, "rejected"), features),
            side("chosen", _replies(pairs, "chosen"), features),
        ),
        (
            "selection",
            measured("not accepted", ((one.prompt_id, one.text) for one in rejected)),
            measured("accepted", ((one.prompt_id, one.text) for one in accepted)),
        ),
    ]
    if learning.own:
        own = measured("own replies", ((one.prompt_id, one.text) for one in learning.own))
        sides += [("mixture", own, side(name, said, features)) for name, said in by_source(learning.learnt).items()]
    models = [measured(name, replies) for name, replies in checkpoints.items()]
    steps = list(pairwise(models)) + ([(models[0], models[-1])] if len(models) > 2 else [])
    sides += [("checkpoints", before, after) for before, after in steps]
    inside = [measured(name, replies) for name, replies in by_steps(learning.rollouts, learning.windows).items()]
    sides += [("rl", inside[0], later) for later in inside[1:]]
    rows = [row for kind, first, second in sides for row in compare(kind, first, second, features)]
    tables.write(work.folder / "style.parquet", Difference, rows)
    last = f"{models[0].name} to {models[-1].name}" if len(models) > 1 else None
    return StyleSummary(
        comparisons=tuple(dict.fromkeys(row.comparison for row in rows)),
        alarms=tuple(_sentence(row) for row in rows if row.alarm),
        drift=tuple(_shift(row, rows) for row in rows if row.kind == "checkpoints" and row.comparison == last),
    )


def by_source(examples: Iterable[Example]) -> dict[str, list[Reply]]:
    """What SFT learnt, by source. A text that nobody said (of a set of examples) counts as a user of its own."""
    found: dict[str, list[Reply]] = {}
    for one in sorted(examples, key=lambda example: (example.source, example.id)):
        who = one.user_id or f"nobody, {one.prompt_id}"
        reply = Reply(one.prompt_id, who, one.messages[:-1], one.messages[-1].content)
        found.setdefault(f"learnt from {one.source}", []).append(reply)
    return found


def by_steps(rollouts: Iterable[Rollout], windows: int) -> dict[str, list[tuple[str, str]]]:
    """Replies (prompt id, text) of consecutive stretches of steps, each of about as many steps, in order.

    The first stretch stands for the start: the first step draws from it, those after it from a policy close to it.
    Prompts come in an order drawn by seed, so that stretches with different prompts still compare, as two samples do.
    Nothing where there are not steps and prompts for two stretches of `WINDOW_PROMPTS` prompts each.
    """
    asked: dict[int, dict[str, list[str]]] = {}
    for one in rollouts:
        asked.setdefault(one.step, {}).setdefault(one.prompt_id, []).append(one.text)
    steps = sorted(asked)
    groups = sum(len(replies) for replies in asked.values())
    count = min(windows, len(steps), groups // WINDOW_PROMPTS)
    if count < 2:
        return {}
    edges = [round(i * len(steps) / count) for i in range(count + 1)]
    found = {}
    for low, high in pairwise(edges):
        first, last = steps[low], steps[high - 1]
        name = f"RL step {first}" if first == last else f"RL steps {first} to {last}"
        found[name] = [(id, text) for step in steps[low:high] for id, texts in asked[step].items() for text in texts]
    return found


def _shift(row: Difference, rows: Sequence[Difference]) -> StyleShift:
    beside = [one for one in rows if one.feature == row.feature]
    (preferred,) = (one.estimate for one in beside if one.kind == "pairs")
    rides = [
        one.comparison
        for one in beside
        if one.alarm and one.kind in ("pairs", "selection", "mixture") and _sign(one) == _sign(row) != 0
    ]
    return StyleShift(
        feature=row.feature, before=row.first_mean, after=row.second_mean, difference=row.estimate,
        preferred=preferred, alarm=row.alarm, rides=tuple(rides),
    )  # fmt: skip


def _sign(row: Difference) -> int:
    value = row.difference or 0.0
    return (value > 0) - (value < 0)


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
