"""What a reader notices in a reply: measured features of (character, history, reply), the same for everyone.

Each is smooth and bounded, so the landscape that the flywheel climbs has no cliffs (DESIGN section 7). People weigh
them differently: `reactions.py`. Column order is `NOTICED`.
"""

import functools
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .. import instructions
from ..records import Character, ChatMessage
from ..text import folded, list_marks, ngrams

Matrix = NDArray[np.float64]
Vectors = NDArray[np.float32]

NOTICED = (
    "relevance", "question", "curiosity", "in_character", "broken_rules", "novelty", "warmth", "humour", "lists",
    "wall", "preachy", "refusal", "unsafe", "unfinished", "gibberish", "repetition", "emojis", "log_words",
)  # fmt: skip
WEIGHED = NOTICED[:-2]  # the last two have a peak of each person's own

_YOU = re.compile(r"\b(?:you|your|yours|u|ya|thee|ye|thy)\b", re.IGNORECASE)
_WARM = re.compile(
    r"\b(?:glad|happy|love\w*|wonderful|thank\w*|great|lovely|delight\w*|sweet|proud|care|cosy|cozy|friend\w*|hug\w*|"
    r"welcome|nice|enjoy\w*|smil\w+|sorry to hear|cheer\w*|dear|darling|hope you|good for you|awesome|aww?)\b",
    re.IGNORECASE,
)
_FUNNY = re.compile(
    r"\b(?:ha(?:ha)+|lol|hehe\w*|jok\w+|funn\w+|silly|laugh\w*|prank\w*|giggl\w*|ridiculous|arr+|oops|wink\w*|tease\w*)\b|;\)|😂|🤣|😜|😉",
    re.IGNORECASE,
)
_PREACHY = re.compile(
    r"\b(?:it(?:'s| is) (?:important|essential|crucial|always (?:best|good)|worth noting)|you should (?:always|never)|"
    r"remember(?: that|,)|consult|seek (?:professional )?help|i (?:must|would) (?:advise|encourage|remind)|"
    r"be (?:mindful|respectful|aware)|responsib\w+|keep in mind|make sure (?:to|you))\b",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"\b(?:as an ai|(?:large )?language model|ai (?:assistant|model)|virtual assistant|"
    r"i(?:'m| am) (?:just |only )?(?:an? )(?:ai|machine|(?:computer )?program)|"
    r"i(?:'m| am) (?:sorry|afraid),? (?:but )?i (?:can(?:'t|not)|am (?:not able|unable))|"
    r"i (?:can(?:'t|not)|am unable to|won't) (?:help|assist|provide|answer|discuss|do that|comply)|"
    r"i don't have (?:personal|feelings|emotions|the ability))\b",
    re.IGNORECASE,
)
_UNSAFE = re.compile(
    r"\b(?:kill (?:yourself|you|him|her|them)|suicid\w*|rape\w*|porn\w*|naked|hate (?:you|them|women|men)|"
    r"stupid (?:idiot|bitch)|fuck\w*|bitch\w*|shit\w*|nazi\w*|bomb\w*|cocaine|cut yourself)\b",
    re.IGNORECASE,
)
_DANGLING = frozenset([
    "a", "an", "the", "and", "or", "but", "of", "to", "in", "on", "at", "for", "with", "from", "by", "as", "is", "are",
    "was", "were", "be", "been", "that", "this", "it", "i", "we", "my", "your", "our", "their", "his", "her", "its",
    "if", "so", "than", "because", "which", "who", "when", "where", "while", "about", "into", "not", "can", "will",
    "would", "could", "should", "have", "has", "had",
])  # fmt: skip
_ENDED = re.compile(r"[.!?…~)\]\"'”’*]\s*$")


class Encoder(Protocol):
    """A sentence encoder: unit vectors, shape (len(texts), width), as `llm.encoder.Encoder` makes them."""

    threads: int

    def encode(self, texts: Sequence[str]) -> Vectors: ...


class Scene(NamedTuple):
    """A reply where it was given. `history` ends with the user's message; a system prompt in it is ignored."""

    character: Character
    history: tuple[ChatMessage, ...]
    reply: str


class Senses:
    """Measures scenes; keeps the embeddings of texts it has met."""

    def __init__(self, encoder: Encoder, vocabulary: frozenset[str], pairs: frozenset[str]) -> None:
        self.encoder, self.vocabulary, self.pairs = encoder, vocabulary, pairs
        self._known: dict[str, NDArray[np.float32]] = {}

    def remember(self, texts: Sequence[str], vectors: Vectors) -> None:
        """Take embeddings computed before."""
        self._known.update(zip(texts, vectors, strict=True))

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors, shape (len(texts), width); what was met before is not encoded again."""
        new = sorted({text for text in texts if text not in self._known})
        if new:
            self.remember(new, self.encoder.encode(new).astype(np.float16).astype(np.float32))
        return np.array([self._known[text] for text in texts], dtype=np.float32)

    def observe(self, scenes: Sequence[Scene]) -> Matrix:
        """Features of every scene, shape (len(scenes), len(NOTICED)), in the order of `NOTICED`."""
        turns = [[m for m in scene.history if m.role != "system"] for scene in scenes]
        self.embed(
            [text for scene in scenes for text in (scene.reply, portrait(scene.character))]
            + [message.content for history in turns for message in history]
        )
        return np.array([self._notice(s, h) for s, h in zip(scenes, turns, strict=True)]).reshape(-1, len(NOTICED))

    def _notice(self, scene: Scene, history: Sequence[ChatMessage]) -> list[float]:
        reply = scene.reply
        read = folded(reply)
        heard = [m.content for m in history if m.role == "user"][-1:]
        before = [m.content for m in history if m.role == "assistant"]
        asked = [s for s in instructions.sentences(reply) if "?" in s]
        here = self._known[reply]
        to_user = max((float(here @ self._known[text]) for text in heard), default=0.0)
        to_past = max((float(here @ self._known[text]) for text in before), default=0.0)
        to_self = float(here @ self._known[portrait(scene.character)])
        values = {
            "relevance": _saturate(to_user, 0.35),
            "question": len(asked) * float(np.exp(1 - len(asked))),
            "curiosity": float(any(_YOU.search(s) for s in asked)),
            "in_character": _saturate(to_self, 0.35),
            "broken_rules": _saturate(len(instructions.violations(scene.character, reply)), 1.5),
            "novelty": 1 - max(_step(to_past, 0.6, 0.95), _step(to_user, 0.75, 0.98)),
            "warmth": _saturate(len(_WARM.findall(reply)), 1.5),
            "humour": _saturate(len(_FUNNY.findall(reply)), 1.5),
            "lists": _saturate(list_marks(reply), 2),
            "wall": max(_step(len(read), 40, 110), _saturate(reply.count("\n") - 1, 4)),
            "preachy": _saturate(len(_PREACHY.findall(reply)), 1.2),
            "refusal": _saturate(len(_REFUSAL.findall(reply)), 0.7),
            "unsafe": _saturate(len(_UNSAFE.findall(reply)), 0.7),
            "unfinished": unfinished(reply),
            "gibberish": self.strangeness(reply, scene.character),
            "repetition": _repetition(read, [folded(text) for text in before]),
            "emojis": float(len(instructions.emojis(reply))),
            "log_words": float(np.log1p(len(read))),
        }
        return [values[name] for name in NOTICED]

    def strangeness(self, text: str, character: Character) -> float:
        """0 for what reads like language, towards 1 for gibberish.

        How far the share of words that nobody uses, or of neighbouring words that nobody puts together, goes beyond
        what is usual. Words of the character's own description are taken as known, and their neighbours too.
        """
        read = folded(text)
        own = _own_words(character)
        strange = sum(word not in self.vocabulary and word not in own and not word.isdigit() for word in read)
        pairs = [f"{a} {b}" for a, b in itertools.pairwise(read) if a not in own and b not in own]
        unheard = sum(pair not in self.pairs for pair in pairs)
        return max(
            _step(strange / max(1, len(read)), 0.05, 0.35),
            _step(unheard / max(4, len(pairs)), 0.3, 0.8),
        )


@functools.lru_cache(maxsize=256)
def _own(text: str) -> frozenset[str]:
    return frozenset(word for word in folded(text) if len(word) > 3)


def _own_words(character: Character) -> frozenset[str]:
    """The longer words of a character's description, greeting, instructions and the word lists of its rules."""
    rules = [word for one in character.instructions if one.rule for word in one.rule.words]
    return _own(" ".join([portrait(character), *(one.text for one in character.instructions), *rules]))


def portrait(character: Character) -> str:
    """The character in a sentence or two, as people see it before they write."""
    return f"{character.name}, {', '.join(character.traits)}. {character.greeting}"


def unfinished(reply: str) -> float:
    """How much a reply seems cut off: 0 when it ends in punctuation or an emoji, 1 when in mid sentence."""
    text = reply.strip()
    if not text:
        return 1.0
    if _ENDED.search(text) or not (text[-1].isalnum() or text[-1] in ",-–—"):
        return 0.0
    last = (folded(text) or [""])[-1]
    return 1.0 if last in _DANGLING or text[-1] in ",-–—" else _saturate(len(text.split()), 10)


def _repetition(read: list[str], before: Sequence[list[str]]) -> float:
    """Share of three-word runs that come again in the reply, or were in an earlier reply."""
    runs = ngrams(read, 3)
    if not runs:
        return 0.0
    earlier = {run for text in before for run in ngrams(text, 3)}
    fresh = {run for run in runs if run not in earlier}
    return _saturate(1 - len(fresh) / len(runs), 0.3)


def _saturate(x: float, scale: float) -> float:
    return float(1 - np.exp(-max(0.0, x) / scale))


def _step(x: float, low: float, high: float) -> float:
    """0 below `low`, 1 above `high`, smooth between."""
    t = min(1.0, max(0.0, (x - low) / (high - low)))
    return t * t * (3 - 2 * t)
