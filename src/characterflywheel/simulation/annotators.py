"""Simulated annotators: they disagree, have biases, tire, err, and rewrite by rule (PAPER section 2, DESIGN section 7).

Each has tastes of their own, drawn like any user's, and follows the guideline that a reply must not break the
character's description, more or less strictly. A rewrite is what a person would do by hand: keep the sentences that
are good, cut the rest, put right what the character's creator asked for, and now and then forget one thing.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np

from .. import instructions
from ..ids import derive_id, derive_seed
from ..records import Answers, Candidate, Character, ChatMessage, Judgement, Task
from ..text import folded, ngrams
from .chitchat import Fits
from .reactions import utility
from .senses import NOTICED, Matrix, Scene, Senses
from .users import Crowd, draw_crowd
from .utterances import Words

DESK_OPENS = datetime(2026, 1, 5, 9, tzinfo=UTC)
TEMPLATE_WORDS = 5
_MARKS = re.compile(r"[\"“”*_]+")
_ENDS = re.compile(r"[.!?…]\W*$")
_REFUSAL, _PREACHY, _STRANGE, _BROKEN, _EMOJIS, _WORDS = (
    NOTICED.index(name) for name in ("refusal", "preachy", "gibberish", "broken_rules", "emojis", "log_words")
)


@dataclass(frozen=True)
class Annotator:
    """One reviewer's ways.

    `strictness`: utility lost by a reply that breaks the description; `loves_length`, `loves_emoji`: biases, in
    utility for each e-fold of words and for each emoji; `noise`: standard deviation of a judgement; `misses` and
    `imagines`: chances to overlook a broken instruction and to see one that is kept; `forgets`: chance to leave one
    instruction broken in a rewrite; `stamina`: tasks after which half of the tiredness has come; `pace`: seconds.
    """

    tastes: Crowd
    strictness: float
    loves_length: float
    loves_emoji: float
    noise: float
    misses: float
    imagines: float
    forgets: float
    stamina: float
    pace: float


def draw_annotator(fits: Fits, reviewer: str, seed: int) -> Annotator:
    """The annotator of that name: the same in every generation."""
    rng = np.random.default_rng(derive_seed(seed, "annotator", reviewer))
    return Annotator(
        tastes=draw_crowd(fits, 1, seed, "annotator", reviewer),
        strictness=float(rng.uniform(0.6, 1.6)),
        loves_length=float(rng.normal(0, 0.25)),
        loves_emoji=float(rng.normal(0.05, 0.2)),
        noise=float(0.45 * np.exp(rng.normal(0, 0.3))),
        misses=float(rng.beta(2, 14)),
        imagines=float(rng.beta(1, 40)),
        forgets=float(rng.beta(2, 14)),
        stamina=float(rng.uniform(80, 240)),
        pace=float(25 * np.exp(rng.normal(0, 0.3))),
    )


@dataclass
class Desk:
    """One annotator at work: how many tasks are done, and the time."""

    annotator: Annotator
    now: datetime = DESK_OPENS
    done: int = 0

    @property
    def tired(self) -> float:
        """0 fresh, towards 1 in the end."""
        return self.done / (self.done + self.annotator.stamina)


def judge_task(task: Task, desk: Desk, senses: Senses, words: Words, anchor: float, seed: int) -> Judgement:
    """Answer one task: questions about every reply, a ranking, and a rewrite when even the best one is off."""
    rng = np.random.default_rng(derive_seed(seed, "judge", task.id))
    who, tired = desk.annotator, desk.tired
    seen = senses.observe([Scene(task.character, task.history, c.text) for c in task.candidates])
    liking = _perceived(seen, who, tired, anchor, rng)
    answers = tuple(
        _answer(task, candidate, row, who, tired, rng) for candidate, row in zip(task.candidates, seen, strict=True)
    )
    order = np.argsort(-liking, kind="stable")
    best = int(order[0])
    rewrite = None
    if answers[best].violates:
        rewrite = rewritten(
            task.character, task.history, task.candidates[best].text, who.forgets * (1 + tired), words, rng
        )
    read = sum(len(candidate.text.split()) for candidate in task.candidates)
    seconds = float(
        round((who.pace + 0.3 * read + (40 if rewrite else 0)) * (1 - 0.4 * tired) * rng.lognormal(0, 0.25), 1)
    )
    desk.now += timedelta(seconds=seconds)
    desk.done += 1
    return Judgement(
        id=derive_id("judgement", task.id, at=desk.now),
        task_id=task.id,
        prompt_id=task.prompt_id,
        reviewer=task.reviewer,
        answers=answers,
        ranking=tuple(task.candidates[i].id for i in order),
        rewrite=rewrite,
        seconds=seconds,
        created_at=desk.now,
    )


def _perceived(
    seen: Matrix, who: Annotator, tired: float, anchor: float, rng: np.random.Generator
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Liking of each reply as this reviewer sees it now; what is shown first has a small advantage."""
    n = len(seen)
    tastes = who.tastes[np.zeros(n, dtype=np.int64)]
    liking = utility(seen, tastes, anchor) - who.strictness * seen[:, _BROKEN]
    liking += who.loves_length * seen[:, _WORDS] + who.loves_emoji * np.minimum(seen[:, _EMOJIS], 4)
    liking += 0.1 * (np.arange(n) == 0) * (1 + tired)
    return np.asarray(liking + who.noise * (1 + tired) * rng.standard_normal(n))


def _answer(
    task: Task,
    candidate: Candidate,
    row: np.ndarray[tuple[int], np.dtype[np.float64]],
    who: Annotator,
    tired: float,
    rng: np.random.Generator,
) -> Answers:
    broken = set(instructions.violations(task.character, candidate.text))
    luck = rng.random(len(task.character.instructions) + 2)
    misses = min(0.9, who.misses * (1 + tired))
    violates = tuple(
        number
        for number in instructions.verifiable(task.character)
        if (luck[number] >= misses if number in broken else luck[number] < who.imagines)
    )
    refused = row[_REFUSAL] > 0.5
    return Answers(
        candidate_id=candidate.id,
        false_refusal=bool(luck[-2] < (1 - misses if refused else who.imagines)),
        templated=bool(luck[-1] < (1 - misses if is_templated(task, candidate) else who.imagines)),
        violates=violates,
    )


def is_templated(task: Task, candidate: Candidate) -> bool:
    """Whether five words in a row were in an earlier reply, or stand in another alternative too."""
    runs = set(ngrams(folded(candidate.text), TEMPLATE_WORDS))
    others = [c.text for c in task.candidates if c.id != candidate.id and c.text != candidate.text]
    earlier = [m.content for m in task.history if m.role == "assistant"]
    return any(runs & set(ngrams(folded(text), TEMPLATE_WORDS)) for text in (*others, *earlier))


def rewritten(
    character: Character,
    history: tuple[ChatMessage, ...],
    reply: str,
    forgets: float,
    words: Words,
    rng: np.random.Generator,
) -> str | None:
    """The reply as a person would put it right, or None if nothing came of it.

    Good sentences are kept, in order, up to the length the character may have; where none is left, what a real person
    said in such a place; then a question if the reply asks none, and the instructions, of which one may be forgotten.
    """
    heard = [m.content for m in history if m.role == "user"][-1:]
    rules = {i.rule.kind: i.rule for i in character.instructions if i.rule}
    limit = rules["max_words"].number if "max_words" in rules else None
    room = (limit or 25) - (9 if {"ends_with_question", "must_mention"} & set(rules) else 2)
    kept: list[str] = []
    for sentence in _good_sentences(character, history, reply, words.senses):
        if len(instructions.words(" ".join([*kept, sentence]))) <= room:
            kept.append(sentence)
    if len(instructions.words(" ".join(kept))) < 3 and heard:
        kept = [_tidy(part) for part in instructions.sentences(words.real_reply(heard[0], character))[:2]]
    if heard and "ends_with_question" not in rules and "?" not in " ".join(kept) and rng.random() < 0.4:
        question = words.real_question(f"{heard[0]} {' '.join(kept)}", longest=8)
        kept += [question] if question else []
    followed = character
    if rules and rng.random() < forgets:
        ruled = instructions.verifiable(character)
        forgotten = ruled[int(rng.integers(len(ruled)))]
        left = tuple(one for number, one in enumerate(character.instructions) if number != forgotten)
        followed = character.model_copy(update={"instructions": left})
    text = instructions.repair_all(followed, " ".join(kept).strip())
    return text if text.strip() and text.strip() != reply.strip() else None


def _good_sentences(character: Character, history: tuple[ChatMessage, ...], reply: str, senses: Senses) -> list[str]:
    """The finished sentences of a reply that neither refuse nor preach nor read like gibberish nor come twice."""
    parts = [
        part
        for part in dict.fromkeys(instructions.sentences(" ".join(_MARKS.sub(" ", reply).split())))
        if part[0].isalnum() and len(part.split()) > 1 and _ENDS.search(part)
    ]
    if not parts:
        return []
    seen = senses.observe([Scene(character, history, part) for part in parts])
    return [
        part
        for part, row in zip(parts, seen, strict=True)
        if row[[_REFUSAL, _PREACHY]].max() < 0.5 and row[_STRANGE] < 0.1
    ]


def _tidy(sentence: str) -> str:
    """A chat message's sentence with a capital and a full stop."""
    text = sentence[:1].upper() + sentence[1:]
    return text if _ENDS.search(text) else f"{text}."
