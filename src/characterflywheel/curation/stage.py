"""The curate stage (PAPER section 1): traffic in; prompts for annotation, training, evaluation and experiment out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from .. import tables
from ..config import CurateConfig
from ..errors import FlywheelError
from ..pipeline import Work
from ..records import Character, Conversation, Dropped, Prompt, Record, Source, Split
from ..safety import SafetyPolicy, find_identifiers
from ..store.export import conversations_from_export
from . import strata
from .diversity import Diverse, TextEncoder, sample_diverse
from .filter import STAGE, Turn, TurnFilter, turns_of
from .split import SPLITS, split_users

CONSTRAINED = ("source", "character", "turn")


class SplitCount(Record):
    """How many prompts, of how many users, a split got from a source."""

    split: Split
    source: Source
    prompts: int
    users: int


class CurateSummary(Record):
    """What curation did: turns of traffic, prompts kept, why others were dropped, splits and strata."""

    conversations: int
    turns: int
    kept: int
    reasons: dict[str, int]
    clusters: int
    splits: tuple[SplitCount, ...]
    strata: tuple[strata.StratumRow, ...]

    def line(self) -> str:
        sizes = Counter[str]()
        for row in self.splits:
            sizes[row.split] += row.prompts
        why = ", ".join(f"{reason} {n}" for reason, n in self.reasons.items()) or "none"
        return (
            f"{self.kept} of {self.turns} turns kept ({', '.join(f'{s} {sizes[s]}' for s in SPLITS)}); dropped: {why}"
        )


def curate(
    work: Work, config: CurateConfig, traffic: Path, encoder: TextEncoder, characters: Mapping[str, Character]
) -> CurateSummary:
    """Write `prompts.parquet` and `dropped.parquet` from an export of the event store.

    Raises FlywheelError when the window has no turns, or when the filters leave none.
    """
    return curate_conversations(work, config, conversations_from_export(traffic), encoder, characters)


def curate_conversations(
    work: Work,
    config: CurateConfig,
    conversations: Sequence[Conversation],
    encoder: TextEncoder,
    characters: Mapping[str, Character],
) -> CurateSummary:
    """`curate` on conversations at hand."""
    turns, unknown = turns_of(conversations, characters)
    if not turns:
        raise FlywheelError(
            f"no user message with a reply in {len(conversations)} conversations ({len(unknown)} with unknown "
            "characters): serve or import traffic, or check the characters folder."
        )
    filters = TurnFilter(SafetyPolicy().check, find_identifiers, config.languages, config.min_letters)
    usable, filtered = filters.apply(turns)
    if not usable:
        reasons = dict(Counter(row.reason for row in filtered))
        raise FlywheelError(
            f"the filters dropped all {len(turns)} turns of traffic ({reasons}): more traffic is needed."
        )
    vectors = encoder.encode([f"{turn.heard}\n{turn.said}".strip() for turn in usable])
    diverse = sample_diverse(vectors, config.clusters, config.keep_share, work.seed)
    levels = levels_of(usable)
    target = {name: strata.shares(levels_of(turns)[name]) for name in CONSTRAINED}
    chosen = strata.adjust(diverse.kept, diverse.rank, levels, target)
    prompts = _prompts(
        config, [t for t, keep in zip(usable, chosen, strict=True) if keep], diverse.cluster[chosen].tolist()
    )
    pruned = [
        Dropped(id=turn.id, stage=STAGE, reason="too_similar", detail=f"cluster {diverse.cluster[row]}")
        for row, turn in enumerate(usable)
        if not chosen[row]
    ]
    dropped = sorted([*unknown, *filtered, *pruned], key=lambda row: row.id)
    tables.write(work.folder / "prompts.parquet", Prompt, prompts)
    tables.write(work.folder / "dropped.parquet", Dropped, dropped)
    after = {
        name: [level for level, keep in zip(column, chosen, strict=True) if keep] for name, column in levels.items()
    }
    return CurateSummary(
        conversations=len(conversations),
        turns=len(turns),
        kept=len(prompts),
        reasons=dict(sorted(Counter(row.reason for row in dropped).items())),
        clusters=_count(diverse),
        splits=_split_counts(prompts),
        strata=strata.compare(levels_of(turns), after, CONSTRAINED),
    )


def levels_of(turns: Sequence[Turn]) -> dict[str, list[str]]:
    """By dimension, the level of each turn: source, character and turn are constrained, length is monitored."""
    return {
        "source": [turn.source for turn in turns],
        "character": [turn.character_id for turn in turns],
        "turn": [str(turn.turn) if turn.turn < 6 else "6+" for turn in turns],
        "length": [_length(turn.said) for turn in turns],
    }


def _length(text: str) -> str:
    words = len(text.split())
    return next(
        (name for limit, name in ((3, "1-3 words"), (8, "4-8 words"), (16, "9-16 words")) if words <= limit),
        "17+ words",
    )


def _prompts(config: CurateConfig, turns: Sequence[Turn], clusters: Sequence[int]) -> list[Prompt]:
    shares: dict[Split, float] = {
        "annotate": config.annotate_share,
        "train": config.train_share,
        "evaluate": config.evaluate_share,
        "experiment": 1 - config.annotate_share - config.train_share - config.evaluate_share,
    }
    split = split_users([turn.user_id for turn in turns], [turn.source for turn in turns], shares)
    return [
        Prompt(
            id=turn.id, conversation_id=turn.conversation_id, user_id=turn.user_id, source=turn.source,
            character_id=turn.character_id, messages=turn.messages, split=split[turn.user_id], cluster=cluster,
            turn=turn.turn, created_at=turn.created_at,
        )
        for turn, cluster in zip(turns, clusters, strict=True)
    ]  # fmt: skip


def _split_counts(prompts: Sequence[Prompt]) -> tuple[SplitCount, ...]:
    groups: dict[tuple[Split, Source], list[str]] = {}
    for prompt in prompts:
        groups.setdefault((prompt.split, prompt.source), []).append(prompt.user_id)
    order = sorted(groups, key=lambda key: (SPLITS.index(key[0]), key[1]))
    return tuple(
        SplitCount(split=key[0], source=key[1], prompts=len(groups[key]), users=len(set(groups[key]))) for key in order
    )


def _count(diverse: Diverse) -> int:
    return int(diverse.cluster.max()) + 1
