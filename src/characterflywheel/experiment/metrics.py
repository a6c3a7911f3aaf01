"""Breadth and depth of engagement from exported events, in SQL (PAPER section 7, DESIGN section 8).

**Population**: users with an exposure to the experiment; internal testers and users who met both arms are left out
(the latter are counted: a sticky assignment makes none). **Window**: `days` times 24 hours from each user's own first
exposure. Someone first exposed late is followed for a shorter time if the export ends first; that is the same in
both arms, because exposure comes before the reply and cannot depend on it.

**Breadth** is the share of exposed users who *engage*: who write on at least `engaged_days` (2) calendar days (UTC)
of their window. One message would not do: exposure happens at a user's first message, so every exposed user
has sent one and the share would be 1 in both arms. Coming back on another day is the least that a reply can earn.
**Active days** are the finer, secondary form of it.

**Depth** is messages written by an engaged user. Who engages is itself an outcome, so this compares different
people in the two arms; depth *over all exposed users* compares the ones that were randomised, and stands beside it.

**Covariates** for CUPED are messages and active days in the `pre_days` before first exposure, 0 for someone new.
Messages, before and after, are capped at one quantile pooled over the arms.

The statements below are the whole definition. They use standard SQL that sqlglot turns into other dialects; tables
are `messages`, `exposures`, `users`, columns those of `records`, `created_at` a timestamp in UTC without zone.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Final

import duckdb

from ..config import ExperimentConfig
from ..errors import FlywheelError
from ..records import Record
from .assignment import CONTROL, TREATMENT
from .moments import Moments, pairs

COLUMNS: Final = (
    "active_days", "engaged", "engaged_messages", "fallbacks", "messages", "pre_active_days", "pre_messages",
)  # fmt: skip

EXPOSED: Final = """
create table exposed as
select user_id, min(arm) as arm, min(created_at) as exposed_at, count(distinct arm) as arms
from exposures
where experiment = $experiment
  and user_id not in (select id from users where population = 'internal')
group by user_id
"""

# Anyone's first message of all stands in for an exposure: what the metrics are without an experiment.
EVERYONE: Final = """
create table exposed as
select user_id, 'all' as arm, min(created_at) as exposed_at, 1 as arms
from messages
where role = 'user' and coalesce(model, '') <> 'client'
  and user_id not in (select id from users where population = 'internal')
group by user_id
"""

ACTIVITY: Final = """
create table activity as
with answered as (
  select user_id, role, created_at, model,
    lead(case when role = 'assistant' and fallback then 1 else 0 end, 1, 0) over (
      partition by conversation_id order by created_at, case role when 'user' then 0 else 1 end, id
    ) as fallback
  from messages
)
select e.user_id, e.arm,
  case when m.created_at < e.exposed_at then 1 else 0 end as before,
  cast(m.created_at as date) as day,
  sum(m.fallback) as fallbacks,
  count(*) - $leave_out * sum(m.fallback) as messages
from exposed as e
join answered as m on m.user_id = e.user_id
where m.role = 'user' and coalesce(m.model, '') <> 'client' and e.arms = 1
  and m.created_at >= e.exposed_at - interval '1' day * $pre_days
  and m.created_at < e.exposed_at + interval '1' day * $days
group by e.user_id, e.arm, case when m.created_at < e.exposed_at then 1 else 0 end, cast(m.created_at as date)
"""

PEOPLE: Final = """
create table people as
select e.user_id, e.arm,
  coalesce(sum(case when a.before = 0 then a.messages end), 0) as messages,
  coalesce(sum(case when a.before = 0 then a.fallbacks end), 0) as fallbacks,
  coalesce(sum(case when a.before = 0 and a.messages > 0 then 1 end), 0) as active_days,
  coalesce(sum(case when a.before = 1 then a.messages end), 0) as pre_messages,
  coalesce(sum(case when a.before = 1 and a.messages > 0 then 1 end), 0) as pre_active_days
from exposed as e
left join activity as a on a.user_id = e.user_id
where e.arms = 1
group by e.user_id, e.arm
"""

CAPS: Final = """
select percentile_disc({quantile}) within group (order by messages) as messages,
  percentile_disc({quantile}) within group (order by pre_messages) as pre_messages
from people
"""

MOMENTS: Final = """
with capped as (
  select arm, active_days, fallbacks, pre_active_days,
    least(messages, $cap) as messages,
    least(pre_messages, $pre_cap) as pre_messages,
    case when active_days >= $engaged_days then 1 else 0 end as engaged,
    case when active_days >= $engaged_days then least(messages, $cap) else 0 end as engaged_messages
  from people
)
select arm, count(*) as users, {sums}
from capped group by arm order by arm
"""

DAILY: Final = """
with news as (
  select arm, cast(exposed_at as date) as day, count(*) as new_users from exposed where arms = 1
  group by arm, cast(exposed_at as date)
),
seen as (
  select arm, day, count(distinct user_id) as active_users, sum(messages) as messages from activity
  where before = 0 and messages > 0
  group by arm, day
)
select coalesce(n.day, s.day) as day, coalesce(n.arm, s.arm) as arm,
  coalesce(n.new_users, 0) as new_users, coalesce(s.active_users, 0) as active_users,
  coalesce(s.messages, 0) as messages
from news as n
full outer join seen as s on s.arm = n.arm and s.day = n.day
order by 1, 2
"""


class DayRow(Record):
    """One arm on one calendar day; `day` 0 is that of the experiment's first exposure, `users` those exposed so far."""

    day: int
    arm: str
    new_users: int
    users: int
    active_users: int
    messages: int


@dataclass(frozen=True)
class Observation:
    """What an experiment's events say: moments for each arm, and the days."""

    experiment: str
    moments: Mapping[str, Moments]
    days: tuple[DayRow, ...]
    crossed: int
    cap: int
    pre_cap: int


def observe(export: Path, experiment: str, config: ExperimentConfig) -> Observation:
    """Aggregate an experiment's exported events.

    Args:
        export: a folder with `messages.parquet`, `exposures.parquet` and `users.parquet`, whose messages reach back
            `pre_days` before the first exposure and include those of users who do not consent to training (an
            aggregate of engagement is no training; leaving them out would thin both arms).
        experiment: its name, as in `Exposure.experiment`.
        config: window, covariate period, definition of engaged, cap.

    Returns:
        Moments of `COLUMNS` for the arms "control" and "treatment" (n = 0 for one that nobody met).

    Raises:
        FlywheelError: a file is missing, or nobody was exposed.
    """
    with _connect(export) as database:
        database.execute(EXPOSED, {"experiment": experiment})
        found = _aggregate(database, config, experiment)
    if not any(moments.n for moments in found.moments.values()):
        raise FlywheelError(
            f"experiment {experiment!r}: no exposed user in {export}; run it first, or export later events."
        )
    nobody = Moments(0, dict.fromkeys(COLUMNS, 0), dict.fromkeys(pairs(COLUMNS), 0))
    unknown = sorted(set(found.moments) - {CONTROL, TREATMENT})
    if unknown:
        raise FlywheelError(f"experiment {experiment!r}: arms {', '.join(unknown)}, must be {CONTROL} or {TREATMENT}.")
    return replace(found, moments={arm: found.moments.get(arm, nobody) for arm in (CONTROL, TREATMENT)})


def baseline(export: Path, config: ExperimentConfig) -> Moments:
    """The metrics of everyone in an export, from their first message: what to plan an experiment with."""
    with _connect(export) as database:
        database.execute(EVERYONE)
        found = _aggregate(database, config, "baseline")
    if "all" not in found.moments:
        raise FlywheelError(f"{export} holds no message of a user: import or collect traffic before planning.")
    return found.moments["all"]


def _aggregate(database: duckdb.DuckDBPyConnection, config: ExperimentConfig, experiment: str) -> Observation:
    window = {"days": config.days, "pre_days": config.pre_days, "leave_out": int(config.leave_out_fallbacks)}
    database.execute(ACTIVITY, window)
    database.execute(PEOPLE)
    cap, pre_cap = (int(value or 0) for value in _row(database, CAPS.format(quantile=config.cap_quantile)))
    sums = ", ".join([f"sum({x})" for x in COLUMNS] + [f"sum({x} * {y})" for x, y in pairs(COLUMNS)])
    bounds = {"cap": cap, "pre_cap": pre_cap, "engaged_days": config.engaged_days}
    moments = {}
    for arm, users, *values in database.execute(MOMENTS.format(sums=sums), bounds).fetchall():
        whole = [int(value) for value in values]
        products = dict(zip(pairs(COLUMNS), whole[len(COLUMNS) :], strict=True))
        moments[arm] = Moments(users, dict(zip(COLUMNS, whole[: len(COLUMNS)], strict=True)), products)
    (crossed,) = _row(database, "select count(*) from exposed where arms > 1")
    days = _days(database.execute(DAILY).fetchall())
    return Observation(experiment=experiment, moments=moments, days=days, crossed=crossed, cap=cap, pre_cap=pre_cap)


def _days(rows: list[tuple[date, str, int, int, int]]) -> tuple[DayRow, ...]:
    """Every arm on every day from first to last, users accumulated."""
    if not rows:
        return ()
    first, last = rows[0][0], rows[-1][0]
    known = {((day - first).days, arm): numbers for day, arm, *numbers in rows}
    series = []
    for arm in sorted({arm for _, arm in known}):
        users = 0
        for day in range((last - first).days + 1):
            new, active, messages = (int(value) for value in known.get((day, arm), (0, 0, 0)))
            users += new
            series.append(DayRow(day=day, arm=arm, new_users=new, users=users, active_users=active, messages=messages))
    return tuple(sorted(series, key=lambda row: (row.day, row.arm)))


@contextmanager
def _connect(export: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """An in-memory database with the export's files as tables, times in UTC without zone."""
    with duckdb.connect(":memory:", config={"threads": 2}) as database:
        database.execute("set TimeZone = 'UTC'")
        for table in ("messages", "exposures", "users"):
            path = export / f"{table}.parquet"
            if not path.is_file():
                raise FlywheelError(f"{path} is missing: export the event store there first.")
            text = str(path).replace("'", "''")
            database.execute(
                f"create view {table} as select * replace (cast(created_at as timestamp) as created_at) "
                f"from read_parquet('{text}')"
            )
        yield database


def _row(database: duckdb.DuckDBPyConnection, query: str) -> tuple[Any, ...]:
    row = database.execute(query).fetchone()
    assert row is not None  # an aggregate without group by has one row
    return row
