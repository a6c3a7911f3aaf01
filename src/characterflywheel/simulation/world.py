"""The simulated crowd behind the doors of real people (DESIGN section 7): talk, judge, live.

A function of (configuration, seed, generation, what the service answers): a killed run that starts again does the
same things with the same ids. Nothing here is read by the pipeline; the hidden utility stays behind these doors.
"""

from collections.abc import Sequence
from datetime import datetime

import numpy as np

from ..config import WorldConfig
from ..errors import FlywheelError
from ..experiment.assignment import assign
from ..ids import derive_id, derive_seed
from ..llm.models import cache_folder
from ..people import Bank, Service
from ..records import Character, Judgement, Source, Task
from ..store import EventStore
from . import fidelity, population
from .annotators import Desk, draw_annotator, judge_task
from .chronicle import Written, write_week
from .lore import gather
from .senses import Encoder
from .talking import arrive, new_users, take_turn
from .users import draw_crowd


class SimulatedPeople:
    """People of the embedded world; implements `people.People`."""

    def __init__(self, config: WorldConfig, seed: int, store: EventStore, encoder: Encoder, threads: int = 2) -> None:
        self.config, self.seed, self.store = config, seed, store
        encoder.threads = threads
        self.lore = gather(encoder, cache_folder())

    def talk(self, service: Service, characters: Sequence[Character], generation: int, starts: datetime) -> None:
        """Have the conversations of one traffic week: production users and internal testers, new ones each time."""
        if not characters:
            raise FlywheelError("no character to talk to: the workspace needs at least one.")
        self.store.add_characters(characters)
        sizes: tuple[tuple[Source, int], ...] = (
            ("user", self.config.user_conversations),
            ("internal", self.config.internal_conversations),
        )
        for source, count in sizes:
            rng = np.random.default_rng(derive_seed(self.seed, "talk", generation, source))
            crowd = draw_crowd(self.lore.real.fits, count, self.seed, "talk", generation, source)
            users = new_users(crowd, source, starts, self.seed, generation)
            self.store.add_users(users)
            talks = arrive(self.lore, service, users, characters, starts, rng)
            for turn in range(self.config.max_turns):
                last = turn + 1 == self.config.max_turns
                talks = take_turn(self.lore, service, talks, crowd, turn, last=last, rng=rng)

    def judge(self, tasks: Sequence[Task]) -> list[Judgement]:
        """Answer annotation tasks in order; reviewers tire as they go."""
        lore = self.lore
        names = sorted({task.reviewer for task in tasks})
        desks = {name: Desk(draw_annotator(lore.real.fits, name, self.seed)) for name in names}
        lore.senses.embed([candidate.text for task in tasks for candidate in task.candidates])
        return [judge_task(t, desks[t.reviewer], lore.senses, lore.words, lore.anchor, self.seed) for t in tasks]

    def live(self, bank: Bank) -> None:
        """Live the experiment's days, and the week before; what exposed people did goes into the event store."""
        self.live_and_count(bank)

    def live_and_count(self, bank: Bank) -> Written:
        """`live`, returning how many rows it made. The same people live in every experiment, assigned anew."""
        fits = self.lore.real.fits
        stage = population.set_stage(bank, self.lore.senses)
        user_ids = [derive_id("user", self.seed, "population", i) for i in range(self.config.population)]
        shares = dict.fromkeys(stage.arms, bank.arm_share)
        arm = population.arms_of([assign(user, bank.experiment, shares) for user in user_ids], stage)
        inside = np.flatnonzero(arm >= 0)
        crowd = draw_crowd(fits, len(user_ids), self.seed, "population")[inside]
        seed = derive_seed(self.seed, "live", bank.experiment)
        visits = population.live_through(stage, crowd, arm[inside], self.lore.anchor, fits, bank.days, seed)
        ids = [user_ids[i] for i in inside]
        return write_week(self.store, bank, stage, crowd, arm[inside], ids, visits, seed)

    def true_lift(self, bank: Bank, n: int = 100_000) -> population.TrueLift:
        """What the experiment tries to estimate, from people who live through both arms. For checks only."""
        stage = population.set_stage(bank, self.lore.senses)
        return population.true_lift(stage, self.lore.real.fits, self.lore.anchor, bank.days, n, self.seed)

    def fidelity(self, n: int = 2000) -> tuple[fidelity.Comparison, ...]:
        """How the crowd compares with the real people it was fitted to, reported beside the results."""
        return fidelity.measure(self.lore, n, self.seed)
