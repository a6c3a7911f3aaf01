"""Exports to analyse: made of records, as the event store writes them, or of columns where there are many."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from characterflywheel import tables
from characterflywheel.records import Exposure, Message, User

START = datetime(2026, 1, 5, tzinfo=UTC)


class Events:
    """Collects events of a few people, hours counted from `START`, and writes them as an export."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.exposures: list[Exposure] = []
        self.users: list[User] = []

    def user(self, name: str, arm: str | None, hour: float = 0, *, internal: bool = False) -> None:
        """A user, exposed to `arm` of experiment "g1" at `hour`."""
        population = "internal" if internal else "user"
        self.users.append(User(id=name, population=population, created_at=START - timedelta(days=30)))
        if arm:
            self.expose(name, arm, hour)

    def expose(self, name: str, arm: str, hour: float, experiment: str = "g1") -> None:
        """One more exposure."""
        at, number = START + timedelta(hours=hour), len(self.exposures)
        self.exposures.append(Exposure(id=f"e{number}", experiment=experiment, arm=arm, user_id=name, created_at=at))

    def say(self, name: str, hour: float, *, fallback: bool = False) -> None:
        """A message of the user and the reply a second later."""
        at, number = START + timedelta(hours=hour), len(self.messages)
        for role, seconds, canned in (("user", 0, False), ("assistant", 1, fallback)):
            self.messages.append(
                Message(
                    id=f"m{number}-{role}", conversation_id=f"c-{name}", user_id=name, role=role, content="hello",
                    fallback=canned, created_at=at + timedelta(seconds=seconds),
                )
            )  # fmt: skip

    def write(self, folder: Path) -> Path:
        """Write the export; returns its folder."""
        folder.mkdir(parents=True, exist_ok=True)
        tables.write(folder / "messages.parquet", Message, self.messages)
        tables.write(folder / "exposures.parquet", Exposure, self.exposures)
        tables.write(folder / "users.parquet", User, self.users)
        return folder


def crowd(folder: Path, users: int, seed: int, *, depth: float = 1.0, drop_treatment: float = 0.0) -> Path:
    """An export of `users` people in two arms over seven days, of whom half wrote in the week before.

    Treatment multiplies the messages of a visit by `depth`; `drop_treatment` is the share of its exposures lost.
    """
    rng = np.random.default_rng(seed)
    treated = rng.random(users) < 0.5
    kept = ~(treated & (rng.random(users) < drop_treatment))
    keenness = rng.gamma(2.0, 0.5, users)
    first = rng.integers(0, 3, users)
    who, hours = [], []
    for day in range(-7, 7):
        visits = (rng.random(users) < 1 - np.exp(-0.4 * keenness)) | (day == first)
        visits &= (day >= first) | (day < 0)
        told = np.where(visits, 1 + rng.poisson(3 * keenness * np.where(treated & (day >= 0), depth, 1.0)), 0)
        who.append(np.repeat(np.arange(users), told))
        hours.append(np.full(told.sum(), 24.0 * day + 12) + np.concatenate([np.arange(n) for n in told]) / 60)
    author, hour = np.concatenate(who), np.concatenate(hours)
    stamp = pa.timestamp("us", tz="UTC")
    base = int(START.timestamp() * 1e6)
    names = np.array([f"u{number}" for number in range(users)])
    folder.mkdir(parents=True, exist_ok=True)
    n = len(author)
    written = {
        "id": [f"m{i}" for i in range(n)], "conversation_id": names[author], "user_id": names[author],
        "role": ["user"] * n, "content": ["hello"] * n, "model": [None] * n, "experiment": [None] * n,
        "arm": [None] * n, "fallback": [False] * n, "parent_id": [None] * n, "finish": [None] * n,
        "created_at": pa.array((base + hour * 3.6e9).astype(np.int64)).cast(stamp),
    }  # fmt: skip
    pq.write_table(pa.table(written, schema=tables.arrow_schema(Message)), folder / "messages.parquet")
    exposed = np.flatnonzero(kept)
    seen = {
        "id": [f"e{i}" for i in exposed], "experiment": ["g1"] * len(exposed),
        "arm": np.where(treated[exposed], "treatment", "control"), "user_id": names[exposed],
        "created_at": pa.array((base + (24.0 * first[exposed] + 12) * 3.6e9).astype(np.int64)).cast(stamp),
    }  # fmt: skip
    pq.write_table(pa.table(seen, schema=tables.arrow_schema(Exposure)), folder / "exposures.parquet")
    tables.write(
        folder / "users.parquet", User, [User(id=str(name), population="user", created_at=START) for name in names]
    )
    return folder
