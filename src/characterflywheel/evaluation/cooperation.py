"""Does a reply go along with the user? A rule for the production metric *cooperation* (PAPER section 6)."""

from collections.abc import Sequence

from ..instructions import emojis
from ..records import ChatMessage
from ..text import folded, ngrams
from .phrases import deflects, refuses

FUNCTION_WORDS = frozenset(
    """a about after again all also am an and any are as at back be because been before being both but by can could did
    do does doing don't down each even few for from further get go going gonna got had has have having he he's
    her here hers him his how i i'd i'll i'm i've if in into is isn't it it's its itself just know let let's like
    make many may me mean might more most much must my myself no nor not now of off oh ok okay on once one only
    or other our out over own please put quite rather really right said same say see she she's should so some
    something sort still such sure take tell than that that's the their them then there there's these they
    they're thing things think this those through to too under until up us very want was wasn't way we we're well
    were what what's when where which while who whom why will with won't would yeah yes you you'd you'll you're
    you've your yours""".split()  # noqa: SIM905
)
YOU = frozenset(("you", "your", "you're", "you've", "you'd", "you'll", "yours", "u"))


def cooperates(history: Sequence[ChatMessage], reply: str) -> bool:
    """Whether the reply plays along: it says something new, neither refuses nor deflects, and takes up what the user
    said last.

    New is no run of four words that the character said before in this conversation, no parroting of the user, no
    going round in circles. Taking up is a shared content word (by its first five letters), a word to
    "you", or a question back. A user's message without content words (hi, yes) is taken up by any reply.
    """
    said = next((m.content for m in reversed(history) if m.role == "user"), "")
    words = folded(reply)
    if not (words or emojis(reply)) or refuses(reply) or deflects(reply):
        return False
    if repeats_itself(history, reply) or _stuck(words) or _parrots(folded(said), words):
        return False
    theirs = _stems(folded(said))
    return not theirs or bool(theirs & _stems(words)) or bool(YOU.intersection(words)) or "?" in reply


def repeats_itself(history: Sequence[ChatMessage], reply: str) -> bool:
    """Whether the reply has a run of four words that an earlier reply of this conversation had."""
    said = {run for m in history if m.role == "assistant" for run in ngrams(folded(m.content), 4)}
    return any(run in said for run in ngrams(folded(reply), 4))


def _stems(words: Sequence[str]) -> set[str]:
    return {word[:5] for word in words if word not in FUNCTION_WORDS}


def _parrots(said: Sequence[str], words: Sequence[str]) -> bool:
    """Four words or more, all of them a run of the user's own."""
    return len(words) >= 4 and " ".join(words) in " ".join(said)


def _stuck(words: list[str]) -> bool:
    """Says most of its three-word runs more than once."""
    runs = ngrams(words, 3)
    return len(runs) >= 6 and len(set(runs)) < len(runs) / 2
