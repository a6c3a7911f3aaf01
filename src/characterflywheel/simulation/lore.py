"""What the world knows before anybody speaks: real people's words and habits, senses, and the zero of utility."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..records import Character, ChatMessage, Instruction
from .chitchat import RealPeople, real_people
from .reactions import raw_utility, utility
from .senses import NOTICED, Encoder, Matrix, Scene, Senses
from .users import Column, draw_crowd
from .utterances import Words

REAL_ANSWERS = 400
STRANGER = Character(
    id="stranger", name="A stranger", category="person", traits=(), greeting="Hello.",
    instructions=(Instruction(text="Be yourself."),),
)  # fmt: skip


@dataclass(frozen=True)
class Lore:
    """Shared by everything simulated.

    `answers` are the features of real people's answers to real messages, shape (400, len(NOTICED)); a stranger plays
    no character, so they count as half in character and breaking no rule. `anchor` is their mean raw utility, so a
    utility of 0 is company as good as people are to one another; `answer_values` are their utilities, sorted.
    """

    real: RealPeople
    senses: Senses
    words: Words
    answers: Matrix
    anchor: float
    answer_values: Column

    def rating(self, value: float) -> float:
        """A rating from 1 to 5 for a conversation: its rank among real answers, read off the real ratings."""
        rank = float(np.searchsorted(self.answer_values, value)) / len(self.answer_values)
        return round(self.real.observed["rating"][round(100 * rank)], 1)


def gather(encoder: Encoder, cache: Path) -> Lore:
    """Learn everything; from the cache (made if missing) in a second, else in half a minute."""
    real = real_people(cache)
    senses = Senses(encoder, real.vocabulary, real.pairs)
    words = Words(real, senses, cache)
    pairs = words.real_scenes(REAL_ANSWERS)
    answers = senses.observe([Scene(STRANGER, (ChatMessage(role="user", content=a),), b) for a, b in pairs])
    answers[:, NOTICED.index("in_character")] = 0.5
    readers = draw_crowd(real.fits, len(pairs), "readers of real answers")
    anchor = float(raw_utility(answers, readers).mean())
    return Lore(real, senses, words, answers, anchor, np.sort(utility(answers, readers, anchor)))
