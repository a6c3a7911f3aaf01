"""A lived week as rows of the event store: users, conversations, exposures, messages, signals (DESIGN section 8).

Exposures come before the messages they explain; rows go day by day in order of time, one transaction a table and day,
so a killed run that starts again writes the same rows to the same places.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import compress
from typing import NamedTuple

import numpy as np

from ..ids import derive_id, derive_seed
from ..people import Bank
from ..store import EventStore
from .columns import uuid7_column
from .population import DAY, PRE_DAYS, Numbers, Stage, Visits
from .reactions import ACTS, p_act
from .users import Column, Crowd

SECOND = 1_000_000


class Written(NamedTuple):
    """How many rows a week made."""

    users: int
    conversations: int
    exposures: int
    messages: int
    signals: int


def write_week(
    store: EventStore,
    bank: Bank,
    stage: Stage,
    crowd: Crowd,
    arm: Numbers,
    user_ids: list[str],
    visits: Visits,
    seed: int,
) -> Written:
    """Write what the exposed people did before and during the experiment; the others leave no trace."""
    exposed = np.full(len(crowd), np.inf)
    during = visits.day >= 0
    np.minimum.at(exposed, visits.person[during], visits.at[during])
    visits = visits.pick(np.flatnonzero(np.isfinite(exposed[visits.person])))
    people = np.flatnonzero(np.isfinite(exposed))
    people = people[np.argsort(exposed[people], kind="stable")]
    store.add_characters(bank.characters[one] for one in stage.characters)
    _write_users(store, crowd, user_ids, people)
    conversation_ids = _write_conversations(store, bank, stage, user_ids, visits, seed)
    written_signals = 0
    for day in range(-PRE_DAYS, bank.days):
        today = people[np.floor(exposed[people] / DAY) == day]
        if today.size:
            store.append_columns("exposures", _exposures(bank, stage, arm, user_ids, today, exposed[today]))
        rows = np.flatnonzero(visits.day == day)
        if rows.size:
            part = visits.pick(rows)
            talks = list(map(conversation_ids.__getitem__, rows))
            messages, replies = _messages(bank, stage, arm, user_ids, part, talks, derive_seed(seed, "messages", day))
            store.append_columns("messages", messages)
            signals = _signals(bank, stage, crowd, user_ids, part, replies, derive_seed(seed, "signals", day))
            written_signals += len(signals["id"])
            if signals["id"]:
                store.append_columns("signals", signals)
    return Written(len(people), len(set(conversation_ids)), len(people), 2 * len(visits.person), written_signals)


def _times(bank: Bank, seconds: Column) -> Numbers:
    """Microseconds since 1970 in UTC, at whole seconds."""
    start = int(bank.starts.timestamp())
    return np.asarray((start + np.floor(seconds).astype(np.int64)) * SECOND)


def _write_users(store: EventStore, crowd: Crowd, user_ids: list[str], people: Numbers) -> None:
    joined = datetime(2025, 12, 1, tzinfo=UTC)
    store.append_columns(
        "users",
        {
            "id": [user_ids[p] for p in people],
            "population": ["user"] * len(people),
            "consent": crowd.consents[people].tolist(),
            "created_at": [joined + timedelta(minutes=derive_seed("joined", user_ids[p]) % 40_000) for p in people],
        },
    )


def _write_conversations(
    store: EventStore, bank: Bank, stage: Stage, user_ids: list[str], visits: Visits, seed: int
) -> list[str]:
    """One conversation a person and day; returns each visit's conversation id."""
    key = visits.person * (PRE_DAYS + bank.days) + visits.day + PRE_DAYS
    _, first, of_visit = np.unique(key, return_index=True, return_inverse=True)
    times = _times(bank, visits.at[first])
    ids = uuid7_column(times // 1000, derive_seed(seed, "conversations"))
    order = np.argsort(visits.at[first], kind="stable")
    store.append_columns(
        "conversations",
        {
            "id": [ids[i] for i in order],
            "user_id": [user_ids[p] for p in visits.person[first][order]],
            "character_id": [stage.characters[c] for c in visits.character[first][order]],
            "character_version": [bank.characters[stage.characters[c]].version for c in visits.character[first][order]],
            "source": ["user"] * len(ids),
            "created_at": times[order].tolist(),
        },
    )
    return [ids[i] for i in of_visit]


def _exposures(
    bank: Bank, stage: Stage, arm: Numbers, user_ids: list[str], people: Numbers, at: Column
) -> dict[str, list[object]]:
    return {
        "id": [derive_id("exposure", bank.experiment, user_ids[p], at=bank.starts) for p in people],
        "experiment": [bank.experiment] * len(people),
        "arm": [stage.arms[arm[p]] for p in people],
        "user_id": [user_ids[p] for p in people],
        "created_at": _times(bank, at).tolist(),
    }


def _messages(
    bank: Bank, stage: Stage, arm: Numbers, user_ids: list[str], visits: Visits, talks: list[str], seed: int
) -> tuple[dict[str, Sequence[object]], list[str]]:
    """Columns of the user's message and the reply, alternating; and the replies' ids."""
    n = len(visits.person)
    times = np.repeat(_times(bank, visits.at), 2)
    times[1::2] += SECOND
    ids = uuid7_column(times // 1000, seed)
    people = [user_ids[p] for p in visits.person]
    in_experiment = bool(n) and visits.day[0] >= 0
    arms = [stage.arms[a] for a in arm[visits.person]] if in_experiment else [stage.arms[0]] * n
    columns: dict[str, Sequence[object]] = {
        "id": ids,
        "conversation_id": _twice(talks),
        "user_id": _twice(people),
        "role": ["user", "assistant"] * n,
        "content": _woven([stage.asked[c] for c in visits.context], [stage.texts[r] for r in visits.reply]),
        "model": _woven([None] * n, [bank.models[one] for one in arms]),
        "experiment": _woven([None] * n, [bank.experiment if in_experiment else None] * n),
        "arm": _woven([None] * n, [one if in_experiment else None for one in arms]),
        "fallback": [False] * (2 * n),
        "created_at": times.tolist(),
    }
    return columns, ids[1::2]


def _signals(
    bank: Bank, stage: Stage, crowd: Crowd, user_ids: list[str], visits: Visits, replies: list[str], seed: int
) -> dict[str, list[object]]:
    """Feedback of every kind, each drawn by itself. Who goes on is read from the messages themselves."""
    rng = np.random.default_rng(seed)
    seen, who = stage.seen[visits.reply], crowd[visits.person]
    times = _times(bank, visits.at + 5)
    columns: dict[str, list[object]] = {name: [] for name in ("id", "message_id", "user_id", "kind", "created_at")}
    for act in ACTS:
        done = rng.random(len(replies)) < p_act(act, visits.value, seen, who, visits.turn.astype(np.float64))
        mine = list(compress(replies, done))
        columns["id"] += [derive_id("signal", act.kind, reply, at=bank.starts) for reply in mine]
        columns["message_id"] += mine
        columns["user_id"] += [user_ids[p] for p in visits.person[done]]
        columns["kind"] += [act.kind] * len(mine)
        columns["created_at"] += times[done].tolist()
    order = np.lexsort((np.array(columns["id"], dtype=str), np.array(columns["created_at"], dtype=np.int64)))
    return {name: [column[i] for i in order] for name, column in columns.items()}


def _twice(values: list[str]) -> list[str]:
    return [value for value in values for _ in range(2)]


def _woven(first: Sequence[str | None], second: Sequence[str | None]) -> list[str | None]:
    out: list[str | None] = [None] * (2 * len(first))
    out[::2], out[1::2] = first, second
    return out
