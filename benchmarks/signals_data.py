"""Real people's reactions as rows for `signals_real.py`: what was said, what they did, and who they are.

chitchat-dataset is a Python package (MIT). The other sets lie in a folder of parquet files, state no licence, and serve
judging only: nothing that is shipped is trained on them.
"""

import importlib.metadata
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from characterflywheel.records import ChatMessage
from characterflywheel.reward.signals import Reply

ROLES = {"user": "user", "bot": "assistant", "system": "assistant"}


class Rows(NamedTuple):
    """Replies with their labels; `groups` are the people (or dialogs) that a split must not tear apart.

    `people[i]` are all of them in row i, of whom none may be on both sides; the first is `groups[i]`, whose reaction
    it is.
    """

    replies: list[Reply]
    people: list[tuple[str, ...]]

    @property
    def groups(self) -> list[str]:
        return [people[0] for people in self.people]


def thumbs(folder: Path) -> Rows:
    """Thumbs that volunteers gave to bots' messages at ConvAI2: 1 up, 0 down. Whose reply it is, is the bot."""
    found = Rows([], [])
    for row in pd.read_parquet(folder / "convai2_thumbs.parquet").itertuples():
        history = tuple(ChatMessage(role=ROLES[m["role"]], content=m["content"]) for m in json.loads(row.context))
        found.replies.append(Reply(row.user_id, history, row.bot_message, (float(row.thumb),), row.bot_id))
        found.people.append((row.user_id,))
    return found


def dialogs(folder: Path) -> tuple[Rows, Counter[str]]:
    """ConvAI2's dialogs with known users: after the bot's first message of a turn, did the human ever write again?

    Also what each dialog ended with. A dialog that ends with the human's own message says of every reply in it that
    the human went on; one in which the human never wrote says nothing.
    """
    found, ends = Rows([], []), Counter[str]()
    table = pd.read_parquet(folder / "convai2_dialogs.parquet")
    for row in table[table.user_id.notna()].itertuples():
        turns = [turn for turn in json.loads(row.turns) if turn["text"].strip()]
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
        if last < 0:
            ends["the human never wrote"] += 1
            continue
        ends["a bot's message" if last < len(turns) - 1 else "the human's message, which no bot answered"] += 1
        history: list[ChatMessage] = []
        for i, turn in enumerate(turns):
            if turn["role"] == "bot" and history and history[-1].role == "user":
                label = (float(last > i),)
                found.replies.append(Reply(row.user_id, tuple(history), turn["text"], label, row.bot_id))
                found.people.append((row.user_id,))
            history.append(ChatMessage(role=ROLES[turn["role"]], content=turn["text"]))
    return found, ends


def chitchat(scope: str, keep: float, seed: int, most: int | None = None) -> tuple[Rows, Counter[int]]:
    """Replies of chitchat-dataset's conversations and whether the other person wrote again; the balance unsampled.

    The one who replies plays the character, the other the user. `replies` takes the first message of every turn but
    the opening: what follows it cannot depend on whether the other answered. `messages` takes every message after the
    opening turn, with its turn as far as it has come. All replies that were the last are kept, the others sampled with
    one probability, which leaves every AUC unbiased. `most`: so many conversations, drawn by the seed; all if absent.
    """
    (path,) = (f for f in importlib.metadata.files("chitchat-dataset") or [] if str(f).endswith("dataset.json"))
    conversations = json.loads(Path(str(path.locate())).read_text(encoding="utf-8"))
    rng, found, balance = random.Random(seed), Rows([], []), Counter[int]()
    names = sorted(conversations)
    if most is not None:
        names = sorted(random.Random(f"{seed} conversations").sample(names, min(most, len(names))))
    for name in names:
        turns = conversations[name]["messages"]
        if len(turns) < 2:
            continue  # one person waited and nobody came: there is no reply to react to
        texts = [[message["text"] for message in turn] for turn in turns]
        senders = [turn[0]["sender"] for turn in turns]
        for i in range(1, len(turns)):
            other = senders[i - 1]
            history = tuple(
                ChatMessage(role="user" if senders[j] == other else "assistant", content=" ".join(texts[j]))
                for j in range(i)
            )
            for end in range(1, 2 if scope == "replies" else len(texts[i]) + 1):
                again = int(i + 1 < len(turns))
                balance[again] += 1
                if not again or rng.random() < keep:
                    reply = Reply(other, history, " ".join(texts[i][:end]), (float(again),), senders[i])
                    found.replies.append(reply)
                    found.people.append((other, senders[i]))
    return found, balance


class Satisfaction(NamedTuple):
    """Rated replies of task dialogs, `groups` being dialogs; each row's ratings, 1 to 5, by several raters."""

    rows: Rows
    ratings: list[tuple[int, ...]]
    corpora: list[str]


def satisfaction(folder: Path, sessions: int, seed: int) -> Satisfaction:
    """Annotators' ratings of how satisfied the user is at a turn, as rows about the system's reply right before it.

    `sessions` dialogs of each corpus are drawn. Labels: mean rating above 3, and below 3 (3 is "normal").
    """
    found = Satisfaction(Rows([], []), [], [])
    table = pd.read_parquet(folder / "uss_turns.parquet")
    rng = random.Random(seed)
    for corpus, part in table[~table.is_overall].groupby("dataset"):
        names = sorted(part.session.unique())
        kept = set(rng.sample(names, min(sessions, len(names))))
        for session, turns in part[part.session.isin(kept)].groupby("session"):
            history: list[ChatMessage] = []
            for turn in turns.sort_values("turn").itertuples():
                rated = turn.role == "user" and turn.n_raters > 0
                if rated and len(history) > 1 and history[-1].role == "assistant":
                    scores = tuple(int(score) for score in turn.scores.split(","))
                    mean = sum(scores) / len(scores)
                    labels = (float(mean > 3), float(mean < 3))
                    said = history[-1].content
                    found.rows.replies.append(Reply(session, tuple(history[:-1]), said, labels, str(corpus)))
                    found.rows.people.append((session,))
                    found.ratings.append(scores)
                    found.corpora.append(str(corpus))
                history.append(ChatMessage(role=ROLES[turn.role], content=turn.text))
    return found


def split(rows: Rows, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Rows to train on and rows to test on, `share` of all people testing; rows with people of both are left out."""
    everyone = sorted({person for people in rows.people for person in people})
    random.Random(seed).shuffle(everyone)
    test = set(everyone[: int(len(everyone) * share)])
    inside = [sum(person in test for person in people) for people in rows.people]
    whole: Sequence[int] = [len(people) for people in rows.people]
    return [i for i, n in enumerate(inside) if n == 0], [i for i, n in enumerate(inside) if n == whole[i]]
