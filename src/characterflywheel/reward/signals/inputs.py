"""What a signal model reads: a reply in its context, as embeddings and plain measures (PAPER section 3).

Four embeddings (the reply, the message it answers, the mean of the user's recent messages, the mean of the
character's) and measures of length, asking, relevance and repetition. Everything is known when the reply is shown.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ...errors import FlywheelError
from ...instructions import emojis
from ...records import ChatMessage

Floats = NDArray[np.float64]
RECENT = 6  # messages of each side that count as recent
EMBEDDINGS = 4
EMBEDDING_SPREAD = 0.5  # prior deviation of an embedding's weights together; that of all the measures is 1
MEASURES = (
    "log_words", "log_sentences", "log_questions", "ends_asking", "exclaims", "log_emojis", "repeats_itself",
    "says_you", "says_i", "log_words_answered", "answered_asks", "relevance", "copies", "log_turn", "opening",
    "log_user_run", "log_user_words", "user_repeats", "repetition", "repetition_most", "repeated_words", "repeated",
    "closest_to_user", "like_user",
)  # fmt: skip
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_SENTENCE_END = re.compile(r"[.?!…。？！]+")
_CONTENT_LETTERS = 4  # shorter words say little about the subject


class Embeds(Protocol):
    """What this module needs of `llm.encoder.Encoder`: texts to rows of length one."""

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]: ...


class Reply(NamedTuple):
    """A reply, everything said before it (system prompt aside), whose reaction it is, and the labels known.

    Labels are 1, 0, or None (NaN) where it is unknown what the user did.
    """

    user_id: str
    history: tuple[ChatMessage, ...]
    text: str
    labels: tuple[float | None, ...] = ()
    character_id: str = ""


class Context(NamedTuple):
    """What was said before a reply: `answered` is "" unless the user spoke last; recent messages, the newest last."""

    turn: int
    answered: str
    user: tuple[str, ...]
    character: tuple[str, ...]
    user_run: int


def context(history: Sequence[ChatMessage]) -> Context:
    """The part of a history that features read; system messages are nobody's words."""
    spoken = [message for message in history if message.role != "system"]
    user, character = (
        tuple(m.content for m in spoken if m.role == role)[-RECENT:] for role in ("user", "assistant")
    )  # fmt: skip
    run = next((i for i, m in enumerate(reversed(spoken)) if m.role != "user"), len(spoken))
    return Context(len(spoken), user[-1] if run else "", user, character, run)


def features(replies: Sequence[Reply], encoder: Embeds, without: Sequence[str] = ()) -> Floats:
    """Feature rows, shape (replies, 4 x width + measures): the embeddings of the module's docstring in that order,
    and `MEASURES` less those in `without`. Nothing after the reply is read. What was not said has zero embeddings.

    Raises:
        FlywheelError: `without` names something that is no measure.
    """
    kept = _kept(without)
    contexts: list[Context] = []
    for i, reply in enumerate(replies):  # candidates of one prompt share its history
        shared = i > 0 and reply.history is replies[i - 1].history
        contexts.append(contexts[-1] if shared else context(reply.history))
    texts = sorted({r.text for r in replies} | {t for c in contexts for t in (c.answered, *c.user, *c.character)})
    number = {text: i for i, text in enumerate(texts)}
    vectors = encoder.encode(texts)
    if "" in number:
        vectors[number[""]] = 0.0
    words = [_WORD.findall(text.lower()) for text in texts]
    width = vectors.shape[1] if texts else 0
    rows = np.zeros((len(replies), EMBEDDINGS * width + len(kept)))
    for row, reply, before in zip(rows, replies, contexts, strict=True):
        own, answered = number[reply.text], number[before.answered]
        user, character = ([number[text] for text in side] for side in (before.user, before.character))
        means = [vectors[side].mean(0) if side else np.zeros(width) for side in (user, character)]
        row[: EMBEDDINGS * width] = np.concatenate([vectors[own], vectors[answered], *means])
        measured = [
            *_of_reply(reply.text, words[own]), *_of_context(before, [words[i] for i in user], vectors[user]),
            *_of_both(vectors, words, own, answered, user, character),
        ]  # fmt: skip
        row[EMBEDDINGS * width :] = np.array(measured)[_ORDER][kept]
    return rows


def spreads(columns: int, without: Sequence[str] = ()) -> Floats:
    """Prior standard deviation of each standardised column's weight, shape (columns,), for `logistic.fit`.

    The measures share a variance of 1, an embedding one of `EMBEDDING_SPREAD` squared, however many columns it has:
    a penalty then means the same for every encoder.
    """
    measures = len(_kept(without))
    width = (columns - measures) // EMBEDDINGS
    spread = np.full(columns, measures**-0.5)
    spread[: EMBEDDINGS * width] = EMBEDDING_SPREAD * max(1, width) ** -0.5
    return spread


def _kept(without: Sequence[str]) -> list[int]:
    unknown = sorted(set(without) - set(MEASURES))
    if unknown:
        raise FlywheelError(f"without names {', '.join(unknown)}: the measures are {', '.join(MEASURES)}.")
    return [i for i, name in enumerate(MEASURES) if name not in without]


_REPLY_MEASURES = MEASURES[:9]
_CONTEXT_MEASURES = ("log_words_answered", "answered_asks", "log_turn", "opening", "log_user_run", "log_user_words",
                     "user_repeats")  # fmt: skip
_BOTH_MEASURES = ("relevance", "copies", "repetition", "repetition_most", "repeated_words", "repeated",
                  "closest_to_user", "like_user")  # fmt: skip
_ORDER = [(*_REPLY_MEASURES, *_CONTEXT_MEASURES, *_BOTH_MEASURES).index(name) for name in MEASURES]


def _of_reply(text: str, words: Sequence[str]) -> list[float]:
    return [
        np.log1p(len(words)), np.log1p(len(_SENTENCE_END.findall(text))), np.log1p(text.count("?")),
        float(text.rstrip().endswith("?")), float("!" in text), np.log1p(len(emojis(text))),
        1 - len(set(words)) / max(1, len(words)), float(not {"you", "your"}.isdisjoint(words)),
        float(not {"i", "my"}.isdisjoint(words)),
    ]  # fmt: skip


def _of_context(before: Context, words: Sequence[Sequence[str]], vectors: NDArray[np.float32]) -> list[float]:
    lengths = [len(said) for said in words]
    return [
        np.log1p(lengths[-1] if before.answered else 0), float("?" in before.answered), np.log1p(before.turn),
        float(before.turn == 0), np.log1p(before.user_run), np.log1p(np.mean(lengths)) if lengths else 0.0,
        float(vectors[-1] @ vectors[-2]) if len(vectors) > 1 else 0.0,
    ]  # fmt: skip


def _of_both(
    vectors: NDArray[np.float32], words: Sequence[Sequence[str]], own: int, answered: int,
    user: Sequence[int], character: Sequence[int],
) -> list[float]:  # fmt: skip
    """Cosines of the reply with what it answers and with recent messages, and shares of its content words in them."""
    said, asked = (vectors[list(side)] @ vectors[own] if side else np.zeros(1) for side in (character, user))
    mine = _content(words[own])
    shares = [len(mine & _content(words[i])) / max(1, len(mine)) for i in (answered, *character)]
    again = bool(words[own]) and any(words[own] == words[i] for i in character)
    return [
        float(vectors[own] @ vectors[answered]), shares[0], float(said[-1]), float(said.max()),
        max(shares[1:], default=0.0), float(again), float(asked.max()), float(asked.mean()),
    ]  # fmt: skip


def _content(words: Sequence[str]) -> set[str]:
    return {word for word in words if len(word) >= _CONTENT_LETTERS}
