"""A week of many people with a bank of replies, as arrays (PAPER section 7, DESIGN section 7, scale).

Replies are really generated for a bank of contexts by the arms' models. Every day a person decides whether to come
(habit, and how they liked earlier days), picks a character, writes, reads a reply of their arm, and stays or leaves.
All chance is drawn for everybody, whether they need it or not, so the same person meets the same luck in another
arm: that is what makes `true_lift` sharp. The truth is for checking the flywheel's claims, never for the pipeline.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import FlywheelError
from ..ids import derive_seed
from ..people import Bank
from .chitchat import Fits
from .reactions import p_continue, p_visit, utility
from .senses import Matrix, Scene, Senses, portrait
from .users import Column, Crowd, draw_crowd

Numbers = NDArray[np.int64]

CONTROL = "control"
PRE_DAYS = 7
LONGEST_STAY = 30  # turns a day
DAY = 86_400.0


@dataclass(frozen=True)
class Stage:
    """A bank of replies as arrays.

    Attributes:
        arms: names, the control first.
        texts: every reply of every arm; `seen` are its features, shape (len(texts), len(NOTICED)).
        first, count: (arms, contexts) where a context's replies begin in `texts`, and how many there are.
        contexts: (characters, k) contexts of each character, padded; `lengths` how many are real.
        faces: (characters, characters) inner products of the characters' embeddings.
        characters: their ids; `asked` is the user's last message of each context.
    """

    arms: tuple[str, ...]
    texts: tuple[str, ...]
    seen: Matrix
    first: Numbers
    count: Numbers
    contexts: Numbers
    lengths: Numbers
    faces: Column
    characters: tuple[str, ...]
    asked: tuple[str, ...]


class Visits(NamedTuple):
    """What people did, one row a user turn with its reply, in order of time.

    `person`, `day` (that of the visit, from -7 on), `turn`, `context`, `reply` (in `Stage.texts`), `at` (seconds since
    the experiment starts, when the user writes), `value` (hidden utility of the reply).
    """

    person: Numbers
    day: Numbers
    turn: Numbers
    character: Numbers
    context: Numbers
    reply: Numbers
    at: Column
    value: Column

    def pick(self, rows: Numbers) -> "Visits":
        """Some of the rows."""
        return Visits(
            self.person[rows], self.day[rows], self.turn[rows], self.character[rows], self.context[rows],
            self.reply[rows], self.at[rows], self.value[rows],
        )  # fmt: skip


@dataclass(frozen=True)
class TrueLift:
    """Relative lifts of treatment over control, as the experiment defines them, over `n` people who lived both.

    `breadth`: share active on two days or more; `depth`: messages of an engaged user; `depth_all`: of an exposed one.
    """

    breadth: float
    depth: float
    depth_all: float
    n: int


def set_stage(bank: Bank, senses: Senses) -> Stage:
    """Measure every reply of the bank. Raises FlywheelError where an arm has no reply to a context."""
    if CONTROL not in bank.replies:
        raise FlywheelError(f"experiment {bank.experiment}: arms are {sorted(bank.replies)}, one must be {CONTROL!r}.")
    arms = (CONTROL, *sorted(arm for arm in bank.replies if arm != CONTROL))
    count = np.array([[len(replies) for replies in bank.replies[arm]] for arm in arms])
    if not count.size or count.min() < 1:
        raise FlywheelError(f"experiment {bank.experiment}: a context without a reply; every arm must answer each.")
    first = (np.cumsum(count) - count.ravel()).reshape(count.shape)
    scenes = [
        Scene(bank.characters[prompt.character_id], prompt.messages, reply.text)
        for arm in arms
        for prompt, replies in zip(bank.contexts, bank.replies[arm], strict=True)
        for reply in replies
    ]
    ids = sorted({prompt.character_id for prompt in bank.contexts})
    places = [[n for n, prompt in enumerate(bank.contexts) if prompt.character_id == one] for one in ids]
    longest = max(map(len, places))
    faces = senses.embed([portrait(bank.characters[one]) for one in ids]).astype(np.float64)
    return Stage(
        arms=arms,
        texts=tuple(scene.reply for scene in scenes),
        seen=senses.observe(scenes),
        first=first,
        count=count,
        contexts=np.array([place + [0] * (longest - len(place)) for place in places]),
        lengths=np.array([len(place) for place in places]),
        faces=faces @ faces.T,
        characters=tuple(ids),
        asked=tuple(prompt.messages[-1].content for prompt in bank.contexts),
    )


def live_through(stage: Stage, crowd: Crowd, arm: Numbers, anchor: float, fits: Fits, days: int, seed: int) -> Visits:
    """Seven days before the experiment, everybody with the control, then `days` days with each person's own arm.

    Everyone arrives on a day of their own, evenly spread over both weeks, and comes back after it by habit.
    """
    n = len(crowd)
    rng = np.random.default_rng(derive_seed(seed, "habits"))
    root = np.linalg.cholesky(stage.faces + 1e-3 * np.eye(len(stage.faces)))
    fondness = 3 * rng.standard_normal((n, len(root))) @ root.T
    arrival = rng.integers(-PRE_DAYS, days, n)
    satisfaction = np.zeros(n)
    rows: list[Visits] = []
    for day in range(-PRE_DAYS, days):
        rng = np.random.default_rng(derive_seed(seed, "day", day))
        returns = rng.random(n) < p_visit(satisfaction, crowd)
        came = (arrival == day) | returns & (arrival < day)
        clock = day * DAY + 3600 * (rng.choice(24, n, p=fits.hours) + rng.random(n))
        character = np.argmax(fondness + rng.gumbel(size=fondness.shape), axis=1)
        begin = rng.integers(0, 1 << 30, n)
        serving = arm if day >= 0 else np.zeros_like(arm)
        there = np.flatnonzero(came)
        total, turns = np.zeros(n), np.zeros(n)
        for turn in range(LONGEST_STAY):
            if not there.size:
                break
            luck = np.random.default_rng(derive_seed(seed, "turn", day, turn))
            which, stay = luck.random((2, n))
            pause = np.exp(crowd.pause + fits.lag.within * luck.standard_normal(n))
            clock += np.clip(pause, 1, 600) * (turn > 0)
            who = crowd[there]
            place = character[there]
            context = stage.contexts[place, (begin[there] + turn) % stage.lengths[place]]
            served = serving[there]
            reply = stage.first[served, context] + (which[there] * stage.count[served, context]).astype(np.int64)
            value = utility(stage.seen[reply], who, anchor)
            day_is, turn_is = np.full(there.size, day), np.full(there.size, turn)
            rows.append(Visits(there, day_is, turn_is, place, context, reply, clock[there], value))
            total[there] += value
            turns[there] += 1
            there = there[stay[there] < p_continue(value, who)]
            clock += 1
        satisfaction = np.where(came, 0.3 * satisfaction + 0.7 * total / np.maximum(1, turns), 0.9 * satisfaction)
    visits = _joined(rows)
    return visits.pick(np.lexsort((visits.person, visits.at)))


def true_lift(
    stage: Stage,
    fits: Fits,
    anchor: float,
    days: int,
    n: int,
    seed: int,
    cap_quantile: float = 0.999,
    engaged_days: int = 2,
) -> TrueLift:
    """The lift of the first other arm, from `n` people who each live through both with the same luck.

    Messages are capped at a quantile pooled over the arms, as in the experiment. n = 100,000 takes seconds and leaves
    a standard error of about a tenth of a real experiment's.
    """
    crowd = draw_crowd(fits, n, "truth", seed)
    active, messages = [], []
    for arm in range(2):
        visits = live_through(stage, crowd, np.full(n, arm), anchor, fits, days, derive_seed("truth", seed))
        mine = visits.day >= 0
        person, date = visits.person[mine], np.floor(visits.at[mine] / DAY).astype(np.int64)
        distinct = np.unique(person * 1000 + date) // 1000
        active.append(np.bincount(distinct, minlength=n))
        messages.append(np.bincount(person, minlength=n).astype(np.float64))
    exposed = active[0] > 0
    cap = float(np.quantile(np.concatenate([m[exposed] for m in messages]), cap_quantile, method="higher"))
    engaged = [a[exposed] >= engaged_days for a in active]
    capped = [np.minimum(m[exposed], cap) for m in messages]
    old, new = ((e.mean(), m[e].mean(), m.mean()) for e, m in zip(engaged, capped, strict=True))
    breadth, depth, depth_all = (float(b / a - 1) for a, b in zip(old, new, strict=True))
    return TrueLift(breadth, depth, depth_all, n=int(exposed.sum()))


def _joined(parts: Sequence[Visits]) -> Visits:
    def whole(name: str) -> NDArray[np.generic]:
        return np.concatenate([getattr(part, name) for part in parts])

    return Visits(*(whole(name) for name in Visits._fields))  # type: ignore[arg-type]


def arms_of(names: Sequence[str | None], stage: Stage) -> Numbers:
    """Numbers of the arms in `stage.arms`; -1 for people outside the experiment."""
    numbers = {name: number for number, name in enumerate(stage.arms)}
    return np.array([-1 if name is None else numbers[name] for name in names], dtype=np.int64)
