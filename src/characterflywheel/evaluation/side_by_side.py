"""Old and new side by side: sample conversations to read, and the interactive protocol (PAPER section 6)."""

import random
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from ..ids import derive_seed
from ..llm.base import ChatModel, Sampling
from ..records import ChatMessage, Prompt

Policy = Literal["old", "new"]


def choose(prompts: Sequence[Prompt], n: int, seed: int) -> list[Prompt]:
    """`n` prompts by seed and not by hand, the two sources taking turns while both last.

    The order of `prompts` does not matter, and a larger `n` only adds to a smaller one's choice.
    """
    drawn = sorted(prompts, key=lambda prompt: (derive_seed(seed, "choose", prompt.id), prompt.id))
    internal = [p for p in drawn if p.source == "internal"]
    user = [p for p in drawn if p.source == "user"]
    chosen: list[Prompt] = []
    for place in range(max(len(internal), len(user))):
        chosen += internal[place : place + 1] + user[place : place + 1]
    return chosen[:n]


class Turn(NamedTuple):
    """One turn of an interactive comparison: what was said, both answers, and which one goes on."""

    said: str
    old: str
    new: str
    kept: Policy


def converse(
    opening: Sequence[ChatMessage],
    speak: Callable[[Sequence[ChatMessage]], str | None],
    old: ChatModel,
    new: ChatModel,
    *,
    turns: int,
    sampling: Sampling,
    seed: int,
) -> list[Turn]:
    """Both models answer every turn, and a random one of the answers continues, so that history favours neither.

    `opening` holds the system prompt and perhaps a greeting; `speak` gives the user's next message, None to stop.
    """
    history, done = list(opening), list[Turn]()
    coin = random.Random(derive_seed(seed, "kept"))
    for number in range(turns):
        said = speak(history)
        if said is None:
            break
        history.append(ChatMessage(role="user", content=said))
        seeds = [derive_seed(seed, "turn", number)]
        answers = [m.complete([history], sampling=sampling, seeds=seeds)[0][0].text for m in (old, new)]
        kept: Policy = "new" if coin.random() < 0.5 else "old"
        done.append(Turn(said, answers[0], answers[1], kept))
        history.append(ChatMessage(role="assistant", content=answers[kept == "new"]))
    return done
