"""Style features: cheap functions of history and reply that a reward could reward by accident (PAPER section 5).

A feature is binary (contains "I feel") or real (emoji, words, list marks). The list is meant to change as the model
does. In code a new one is a line of `FEATURES`, whatever it needs of the history or the reply:

    "shorter": Feature("binary", "is shorter than the user's message", lambda h, r: float(len(r) < len(h[-1].content))),

In a workspace's `flywheel.toml` it is a phrase (binary: whether it is said) or a pattern (real: how often it matches):

    [style]
    phrases = ["as the sea"]
    counts = { tildes = "~+", sighs = "sigh(s|ed)?" }
"""

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

from ..errors import FlywheelError
from ..instructions import emojis, follows, words
from ..records import ChatMessage, Rule
from ..text import folded, list_marks, ngrams

History = Sequence[ChatMessage]


class Feature(NamedTuple):
    """A surface feature. `of(history, reply)` is 0 or 1 for a binary one, and its mean then a share of replies."""

    kind: Literal["binary", "real"]
    meaning: str
    of: Callable[[History, str], float]


_FIRST = frozenset(("i", "me", "my", "mine", "myself", "i'm", "i've", "i'd", "i'll"))
_SECOND = frozenset(("you", "your", "yours", "yourself", "you're", "you've", "you'd", "you'll"))


def _count(pattern: str) -> Callable[[History, str], float]:
    search = re.compile(pattern, re.IGNORECASE)
    return lambda history, reply: float(sum(bool(m.group()) for m in search.finditer(reply.replace("’", "'"))))


def _has(pattern: str) -> Callable[[History, str], float]:
    search = re.compile(pattern, re.IGNORECASE)
    return lambda history, reply: float(search.search(reply.replace("’", "'")) is not None)


def _follows(rule: Rule) -> Callable[[History, str], float]:
    return lambda history, reply: float(bool(reply.strip()) and follows(rule, reply))


def _said(history: History, role: str) -> list[str]:
    return [message.content for message in history if message.role == role]


def _echo(history: History, reply: str) -> float:
    """Share of the reply's three-word runs that the user's last message has."""
    last = _said(history, "user")[-1:]
    runs, theirs = ngrams(folded(reply), 3), {run for text in last for run in ngrams(folded(text), 3)}
    return sum(run in theirs for run in runs) / len(runs) if runs else 0.0


def _starts_alike(history: History, reply: str, role: str) -> float:
    """Whether the reply's first two words begin a message of `role` too (the user's last, or any of its own)."""
    texts = _said(history, role)[-1:] if role == "user" else _said(history, role)
    start = folded(reply)[:2]
    return float(len(start) == 2 and any(folded(text)[:2] == start for text in texts))


def _repeated(history: History, reply: str) -> float:
    """Share of the reply's three-word runs that came before in the reply: 0 for most, towards 1 when it loops."""
    runs = ngrams(folded(reply), 3)
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _own_words(history: History, reply: str) -> float:
    """Share of the reply's four-word runs that the character has said before in this conversation."""
    runs = ngrams(folded(reply), 4)
    before = {run for text in _said(history, "assistant") for run in ngrams(folded(text), 4)}
    return sum(run in before for run in runs) / len(runs) if runs else 0.0


def _unfinished(history: History, reply: str) -> float:
    """Whether the reply breaks off: it ends in a letter, a digit, a comma or an opening mark."""
    end = reply.rstrip()[-1:]
    return float(end.isalnum() or end in set(",;:([{&-–—"))


def _share(reply: str, of: frozenset[str]) -> float:
    said = folded(reply)
    return sum(word in of for word in said) / len(said) if said else 0.0


def _shouted(reply: str) -> int:
    return sum(len(word) >= 4 and word.isalpha() and word.isupper() for word in words(reply))


FEATURES: Mapping[str, Feature] = MappingProxyType(
    {
        "words": Feature("real", "words", lambda h, r: float(len(words(r)))),
        "characters": Feature("real", "characters", lambda h, r: float(len(r))),
        "newlines": Feature("real", "line breaks", lambda h, r: float(r.strip().count("\n"))),
        "emojis": Feature("real", "emoji", lambda h, r: float(len(emojis(r)))),
        "has_emoji": Feature("binary", "has an emoji", lambda h, r: float(bool(emojis(r)))),
        "list_marks": Feature("real", "lines that begin a list item or heading", lambda h, r: float(list_marks(r))),
        "questions": Feature("real", "question marks", _count(r"\?")),
        "ends_with_question": Feature("binary", "ends with a question", _follows(Rule(kind="ends_with_question"))),
        "exclamations": Feature("real", "exclamation marks", _count("!")),
        "ellipses": Feature("real", "ellipses", _count(r"\.{3,}|…")),
        "lower_case": Feature("binary", "has no capital", _follows(Rule(kind="lower_case"))),
        "shouted_words": Feature("real", "words in capitals, four letters or more", lambda h, r: float(_shouted(r))),
        "stage_directions": Feature("real", "*actions between stars*", _count(r"(?<!\*)\*[^*\n]+\*(?!\*)")),
        "bold": Feature("real", "**words in bold**", _count(r"\*\*[^*\n]+\*\*")),
        "i_feel": Feature("binary", "says I feel", _has(r"\bi(?:'m)? feel(?:ing)?\b")),
        "as_an_ai": Feature(
            "binary",
            "speaks as an AI",
            _has(r"\b(?:as an?|i am an?|i'm an?) (?:ai\b|artificial|language model)|\bai model\b"),
        ),
        "sorry": Feature("binary", "says sorry", _has(r"\b(?:sorry|apologi[sz]e)\b")),
        "of_course": Feature("binary", "opens by agreeing", _has(r"^\W*(?:of course|sure|absolutely|certainly)\b")),
        "i_am_glad": Feature("binary", "says it is glad", _has(r"\b(?:i'm|i am) (?:\w+ )?(?:glad|happy|excited)\b")),
        "i_share": Feature("real", "share of words that are I, me, my", lambda h, r: _share(r, _FIRST)),
        "you_share": Feature("real", "share of words that are you, your", lambda h, r: _share(r, _SECOND)),
        "user_echo": Feature("real", "share of three-word runs from the user's message", _echo),
        "starts_like_user": Feature("binary", "opens as the user did", lambda h, r: _starts_alike(h, r, "user")),
        "starts_like_before": Feature(
            "binary", "opens as it did before in this chat", lambda h, r: _starts_alike(h, r, "assistant")
        ),
        "repeated_runs": Feature("real", "share of three-word runs said twice within the reply", _repeated),
        "own_words": Feature("real", "share of four-word runs said before in this chat", _own_words),
        "unfinished": Feature("binary", "breaks off", _unfinished),
    }
)  # fmt: skip


def phrase_features(phrases: Sequence[str]) -> dict[str, Feature]:
    """A binary feature for each phrase to look for (whole words, case ignored), named `says: PHRASE`."""
    for phrase in phrases:
        if not phrase.strip():
            raise FlywheelError(f"phrase {phrase!r} is empty, must have a word: take it out of the list.")
    return {
        f"says: {phrase}": Feature("binary", f"says {phrase}", _has(rf"(?<!\w){re.escape(phrase)}(?!\w)"))
        for phrase in phrases
    }


def count_features(patterns: Mapping[str, str]) -> dict[str, Feature]:
    """A real feature for each regular expression by name: how often it matches in the reply, case ignored.

    Raises:
        FlywheelError: a name is that of a feature of `FEATURES`, or the pattern is none.
    """
    found = {}
    for name, pattern in patterns.items():
        if name in FEATURES:
            raise FlywheelError(f"style feature {name!r} is built in ({FEATURES[name].meaning}): give another name.")
        try:
            found[name] = Feature("real", f"matches of {pattern}", _count(pattern))
        except re.error as error:
            raise FlywheelError(f"style feature {name!r}: {pattern!r} is no regular expression ({error}).") from None
    return found


def measure(history: History, reply: str, features: Mapping[str, Feature] = FEATURES) -> dict[str, float]:
    """Every feature of one reply by name. `history` ends with the user's message; a system prompt may lead it."""
    return {name: feature.of(history, reply) for name, feature in features.items()}
