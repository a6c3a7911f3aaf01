"""The measurable parts of a text that style and evaluation share; `instructions` has its words, sentences and emoji."""

import re
from collections.abc import Sequence

_WORD = re.compile(r"[^\W_]+(?:['\-][^\W_]+)*")
_LIST_MARK = re.compile(r"^[ \t]*(?:[-*+•‣◦▪–][ \t]+|\(?\d{1,2}[.)][ \t]+|#{1,6}[ \t]+)(?=\S)", re.MULTILINE)


def folded(text: str) -> list[str]:
    """The words of a text without punctuation, in lower case, with a typewriter's apostrophe: for comparing."""
    return _WORD.findall(text.replace("’", "'").casefold())


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of `n` words, in order; none when there are fewer words."""
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def list_marks(text: str) -> int:
    """Lines that begin like an item of a list (bullet, number) or like a heading."""
    return len(_LIST_MARK.findall(text))
