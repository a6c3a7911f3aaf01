"""Conversations of a traffic week, many at once: every turn of all of them is one call to the chat service."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import numpy as np

from ..ids import derive_id
from ..people import Service, Utterance
from ..records import Character, ChatMessage, Source, User
from .lore import Lore
from .reactions import ACTS, p_act, p_continue, utility
from .senses import Scene
from .users import Crowd
from .utterances import challenge

RATES = 0.1  # share of people who rate a conversation when it ends
MOOD = 0.7  # spread of ratings, in utility, that a conversation does not explain
TESTERS_PATIENCE = 1.5  # log-odds; testing is their work
CHALLENGES_FIRST, CHALLENGES_LATER = 0.3, 0.5


@dataclass
class Talk:
    """A conversation that is going on; `person` is a row of the crowd, `text` what the user says next."""

    person: int
    user_id: str
    character: Character
    source: Source
    id: str
    now: datetime
    text: str
    history: tuple[ChatMessage, ...] = ()
    values: list[float] = field(default_factory=list)

    def said(self) -> set[str]:
        """Everything the user has said or is about to say."""
        return {m.content for m in self.history if m.role == "user"} | {self.text}


def new_users(crowd: Crowd, source: Source, starts: datetime, *seed: object) -> list[User]:
    """One record a person; testers have agreed to everything."""
    return [
        User(
            id=derive_id("user", *seed, source, number, at=starts),
            population=source,
            consent=bool(consents) or source == "internal",
            created_at=starts,
        )
        for number, consents in enumerate(crowd.consents)
    ]


def arrive(
    lore: Lore,
    service: Service,
    users: Sequence[User],
    characters: Sequence[Character],
    starts: datetime,
    rng: np.random.Generator,
) -> list[Talk]:
    """Everybody opens a conversation at some time of the week; characters are shared out evenly. Sorted by time."""
    n = len(users)
    chosen = [characters[i % len(characters)] for i in rng.permutation(n)]
    seconds = 86_400 * rng.integers(0, 7, n) + 3600 * (rng.choice(24, n, p=lore.real.fits.hours) + rng.random(n))
    texts = lore.words.open(chosen, rng)
    challenges = rng.random(n) < CHALLENGES_FIRST
    talks = []
    for person in np.argsort(seconds, kind="stable"):
        user, character, at = users[person], chosen[person], starts + timedelta(seconds=int(seconds[person]))
        text = challenge(character, rng) if user.population == "internal" and challenges[person] else texts[person]
        opened = service.open_conversation(user.id, character, user.population, at)
        talks.append(Talk(int(person), user.id, character, user.population, opened, at, text))
    return talks


def take_turn(
    lore: Lore,
    service: Service,
    talks: Sequence[Talk],
    crowd: Crowd,
    turn: int,
    *,
    last: bool,
    rng: np.random.Generator,
) -> list[Talk]:
    """Everybody writes, reads, reacts, and goes on or leaves; returns those that go on.

    After the `last` turn the window closes and nobody knows who would have gone on: no `continue` is recorded.
    """
    if not talks:
        return []
    n = len(talks)
    replies = service.reply([Utterance(t.id, t.user_id, t.character, t.history, t.text, t.now) for t in talks])
    for talk, reply in zip(talks, replies, strict=True):
        said = ChatMessage(role="user", content=talk.text), ChatMessage(role="assistant", content=reply.content)
        talk.history += said
    seen = lore.senses.observe([Scene(t.character, t.history[:-1], t.history[-1].content) for t in talks])
    who = crowd[np.array([t.person for t in talks])]
    value = utility(seen, who, lore.anchor)
    patience = np.array([TESTERS_PATIENCE if t.source == "internal" else 0.0 for t in talks])
    stays = rng.random(n) < p_continue(value + patience, who)
    position = np.full(n, float(turn))
    acts = {act.kind: rng.random(n) < p_act(act, value, seen, who, position) for act in ACTS}
    rates = (rng.random(n) < RATES) & (~stays | last)
    pauses = np.clip(np.exp(who.pause + lore.real.fits.lag.within * rng.standard_normal(n)), 1, 600)
    following = lore.words.answer(who, [r.content for r in replies], [t.said() for t in talks], rng)
    challenges = rng.random(n) < CHALLENGES_LATER
    moods = MOOD * rng.standard_normal(n)
    going = []
    for i, (talk, reply) in enumerate(zip(talks, replies, strict=True)):
        talk.values.append(float(value[i]))
        at = reply.created_at + timedelta(seconds=2)
        for kind, done in acts.items():
            if done[i]:
                service.signal(reply.id, talk.user_id, kind, at)
        if not last:
            service.signal(reply.id, talk.user_id, "continue", at, float(stays[i]))
        if rates[i]:
            service.signal(reply.id, talk.user_id, "rating", at, lore.rating(float(np.mean(talk.values)) + moods[i]))
        if stays[i]:
            talk.now = reply.created_at + timedelta(seconds=3 + int(pauses[i]))
            tests = talk.source == "internal" and challenges[i]
            talk.text = challenge(talk.character, rng) if tests else following[i]
            going.append(talk)
    return going
