"""The SFT mixture: the paper's six sources with weights, caps and bounds, and what a model was trained on (PAPER 4).

Rejection-sampled internal chats and user traffic, people's rewrites, safety, tool use, small sets for failure modes,
general ability (see `sources`). What is there twice, or nearly, is dropped with the reason. The same examples give the
same mixture in whatever order they come.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .. import tables
from ..config import SFTConfig
from ..errors import FlywheelError
from ..ids import derive_seed
from ..pipeline import write_atomically
from ..records import Dropped, Example, ExampleSource, Record
from ..text import folded
from . import sources
from .near_duplicates import Exchange, near_duplicates
from .sources import Lost

Tokens = Callable[[Example], int]
"""How many tokens of an example are learnt: those of its reply, the end token included."""


class SourceShare(Record):
    """One source's part of a mixture: examples it offered, distinct ones, and how many were drawn.

    `dropped` counts reasons. `tokens` are those drawn, `token_share` their part of all, None where nobody counted.
    `mean_words` and `mean_score` are of the replies of distinct examples, a score None where none has one.
    """

    source: ExampleSource
    weight: float
    offered: int
    distinct: int
    drawn: int
    drawn_distinct: int
    dropped: dict[str, int]
    tokens: int | None
    token_share: float | None
    mean_words: float | None
    mean_score: float | None
    scored: int
    characters: int


class MixtureRow(Record):
    """One example as it was drawn, in training order: by it, an erasure finds what a model was trained on."""

    example_id: str
    prompt_id: str
    user_id: str | None
    character_id: str | None
    source: ExampleSource
    weight: float
    epoch: int
    tokens: int | None


class MixtureReport(Record):
    """`mixture.json`: what a model was trained on."""

    epochs: int
    seed: int
    examples: int
    tokens: int | None
    sources: tuple[SourceShare, ...]
    dropped: dict[str, int]
    near_duplicates: float | None
    max_examples: dict[ExampleSource, int]
    max_token_share: dict[ExampleSource, float]


class Mixture(Record):
    """The examples to learn from, in training order, and where they came from. `rows[i]` is of `examples[i]`."""

    examples: tuple[Example, ...]
    sources: tuple[SourceShare, ...]
    dropped: tuple[Dropped, ...]
    rows: tuple[MixtureRow, ...] = ()


def blend(
    config: SFTConfig, offered: Sequence[Example], seed: int, *, tokens: Tokens | None = None,
    refused: Sequence[Lost] = (),
) -> Mixture:  # fmt: skip
    """The mixture as configured, of what `sources.offer` lets pass. See `mix`."""
    return mix(
        offered, config.weights, config.epochs, seed, near=config.near_duplicates, max_examples=config.max_examples,
        max_token_share=config.max_token_share, tokens=tokens, refused=refused,
    )  # fmt: skip


def write(folder: Path, config: SFTConfig, seed: int, mixture: Mixture, also: Sequence[Dropped] = ()) -> None:
    """State what a model is trained on: `mixture.json` (MixtureReport), `mixture.parquet` (MixtureRow).

    What was dropped, and what the caller dropped `also`, goes into `dropped.parquet`.
    """
    dropped = (*mixture.dropped, *also)
    counted = [row.tokens for row in mixture.rows if row.tokens is not None]
    report = MixtureReport(
        epochs=config.epochs, seed=seed, examples=len(mixture.examples), sources=mixture.sources,
        tokens=sum(counted) if len(counted) == len(mixture.rows) else None,
        dropped=dict(sorted(Counter(one.reason for one in dropped).items())),
        near_duplicates=config.near_duplicates, max_examples=config.max_examples,
        max_token_share=config.max_token_share,
    )  # fmt: skip
    tables.write(folder / "mixture.parquet", MixtureRow, mixture.rows)
    tables.write(folder / "dropped.parquet", Dropped, dropped)
    write_atomically(folder / "mixture.json", report.model_dump_json(indent=1) + "\n")


def mix(
    examples: Sequence[Example],
    weights: Mapping[ExampleSource, float],
    epochs: int,
    seed: int,
    *,
    near: float | None = None,
    max_examples: Mapping[ExampleSource, int] | None = None,
    max_token_share: Mapping[ExampleSource, float] | None = None,
    tokens: Tokens | None = None,
    refused: Sequence[Lost] = (),
) -> Mixture:
    """`epochs` passes over the sources, each drawn `weight` times a pass (1.5: all once, half of them again).

    A source without a weight is 0. Over all passes an example is drawn again only once all of its source have been.
    `max_examples` and `max_token_share` bound a source's part of each pass. `refused` are examples that were dropped
    before, which the statement counts.

    Raises:
        FlywheelError: tokens are bounded and not counted, or the bounds leave nothing: they must add up to 1 or more
            where no source is without one.
    """
    if max_token_share and tokens is None:
        raise FlywheelError(f"max_token_share = {dict(max_token_share)} needs a count of tokens: give `tokens`.")
    sifted = distinct_of(examples, near, weights, max_examples or {})
    distinct: dict[ExampleSource, list[Example]] = {}
    for example in sifted.kept:
        distinct.setdefault(example.source, []).append(example)
    size = {e.id: tokens(e) for e in sifted.kept if draws(e.source, weights, max_examples or {})} if tokens else {}
    queues = {source: _Queue(rows, derive_seed(seed, source)) for source, rows in sorted(distinct.items())}
    drawn: list[Example] = []
    rows: list[MixtureRow] = []
    for epoch in range(epochs):
        counts = {
            source: _times(len(distinct[source]), weights.get(source, 0.0), (max_examples or {}).get(source))
            for source in queues
        }
        planned = {source: queue.ahead(counts[source]) for source, queue in queues.items()}
        kept = _within_token_shares(planned, max_token_share or {}, size)
        one_pass = [example for source, queue in queues.items() for example in queue.take(kept[source])]
        random.Random(derive_seed(seed, epoch)).shuffle(one_pass)
        drawn += one_pass
        rows += [_row(e, weights[e.source], epoch, size.get(e.id)) for e in one_pass]
    lost = [*refused, *sifted.lost]
    offered = Counter([example.source for example in examples] + [one.source for one in refused])
    reasons: dict[ExampleSource, Counter[str]] = {source: Counter() for source in offered}
    for one in lost:
        reasons[one.source][one.row.reason] += 1
    shares = _state(offered, distinct, drawn, weights, reasons, size if tokens else None)
    return Mixture(examples=tuple(drawn), sources=shares, dropped=tuple(one.row for one in lost), rows=tuple(rows))


class Sifted(NamedTuple):
    """Distinct examples by id, and those that were there before."""

    kept: list[Example]
    lost: list[Lost]


def distinct_of(
    examples: Sequence[Example],
    near: float | None,
    weights: Mapping[ExampleSource, float],
    most: Mapping[ExampleSource, int],
) -> Sifted:
    """Examples by id without those that are there twice, or nearly; the first by id is kept.

    Sources that are not learnt from come last, so that nothing is lost to what nobody reads.
    """
    kept: list[Example] = []
    lost: list[Lost] = []

    def drop(example: Example, reason: str, detail: str = "") -> None:
        lost.append(Lost.of(example, reason, detail))

    seen: dict[object, str] = {}
    for example in sorted(examples, key=lambda e: (not draws(e.source, weights, most), e.id, e.source)):
        reply = " ".join(example.messages[-1].content.casefold().split())
        keys = ((example.prompt_id, reply), sources.text_of(example.messages))
        twin = next((seen[key] for key in keys if key in seen), None)
        if twin is not None:
            drop(example, "duplicate", f"of {twin}")
            continue
        seen |= dict.fromkeys(keys, example.id)
        kept.append(example)
    if near is None:
        return Sifted(sorted(kept, key=lambda e: e.id), lost)
    twins = near_duplicates([_exchange(example) for example in kept], near)
    for example, twin_place in zip(kept, twins, strict=True):
        if twin_place is not None:
            drop(example, "near_duplicate", f"of {kept[twin_place].id}")
    return Sifted(sorted((e for e, twin in zip(kept, twins, strict=True) if twin is None), key=lambda e: e.id), lost)


def _exchange(example: Example) -> Exchange:
    asked = next((m.content for m in reversed(example.messages[:-1]) if m.role == "user"), "")
    return Exchange(asked, example.messages[-1].content)


class _Queue:
    """A source's examples in an order drawn by the seed, round and round: none comes again before all have come."""

    def __init__(self, rows: Sequence[Example], seed: int) -> None:
        self._rows = list(rows)
        random.Random(seed).shuffle(self._rows)
        self._at = 0

    def ahead(self, count: int) -> list[Example]:
        """The next `count`, which stay."""
        return [self._rows[(self._at + i) % len(self._rows)] for i in range(count)]

    def take(self, count: int) -> list[Example]:
        """The next `count`, which are used up."""
        taken = self.ahead(count)
        self._at += count
        return taken


def draws(source: ExampleSource, weights: Mapping[ExampleSource, float], most: Mapping[ExampleSource, int]) -> bool:
    """Whether a mixture with these weights and caps learns from a source at all."""
    return weights.get(source, 0.0) > 0 and most.get(source) != 0


def _times(distinct: int, weight: float, most: int | None) -> int:
    """How many examples of a source a pass has."""
    count = distinct * int(weight) + round((weight - int(weight)) * distinct)
    return count if most is None else min(count, most)


def _within_token_shares(
    planned: Mapping[ExampleSource, Sequence[Example]], bounds: Mapping[ExampleSource, float], size: Mapping[str, int]
) -> dict[ExampleSource, int]:
    """How many of each source's planned examples a pass has room for: the largest numbers that keep all bounds.

    A source keeps its bound where it would be within it without its last example. From each that does not, the last
    example is taken, until all do. Taking one lowers the total, so bounds only tighten, and what was taken could be in
    no mixture that keeps them.
    """
    present = [source for source, rows in planned.items() if rows]
    if present and all(s in bounds for s in present) and sum(bounds[s] for s in present) < 1 - 1e-9:
        raise FlywheelError(
            f"max_token_share of the sources present adds up to {sum(bounds[s] for s in present):g} "
            f"({', '.join(present)}), must be >= 1: raise one, or leave one without a bound."
        )
    counts = {source: len(rows) for source, rows in planned.items()}
    totals = {source: sum(size.get(e.id, 0) for e in rows) for source, rows in planned.items()}

    def last(source: ExampleSource) -> int:
        return size[planned[source][counts[source] - 1].id]

    bounded = [source for source in sorted(present) if source in bounds]
    while over := [
        s for s in bounded if counts[s] and totals[s] - last(s) > bounds[s] * sum(totals.values()) * (1 + 1e-9)
    ]:
        for source in over:
            totals[source] -= last(source)
            counts[source] -= 1
    return counts


def _state(
    offered: Mapping[ExampleSource, int],
    distinct: Mapping[ExampleSource, Sequence[Example]],
    drawn: Sequence[Example],
    weights: Mapping[ExampleSource, float],
    dropped: Mapping[ExampleSource, Counter[str]],
    size: Mapping[str, int] | None,
) -> tuple[SourceShare, ...]:
    """What each source that offered anything gave."""
    total = sum(size[e.id] for e in drawn) if size is not None else 0
    shares = []
    for source in sorted(offered):
        rows, theirs = distinct.get(source, ()), [e for e in drawn if e.source == source]
        tokens = sum(size[e.id] for e in theirs) if size is not None else None
        scores = [e.score for e in rows if e.score is not None]
        words = [len(folded(e.messages[-1].content)) for e in rows]
        shares.append(
            SourceShare(
                source=source, weight=weights.get(source, 0.0), offered=offered[source], distinct=len(rows),
                drawn=len(theirs), drawn_distinct=len({e.id for e in theirs}),
                dropped=dict(sorted(dropped.get(source, Counter[str]()).items())), tokens=tokens,
                token_share=tokens / total if tokens is not None and total else None,
                mean_words=sum(words) / len(words) if words else None,
                mean_score=sum(scores) / len(scores) if scores else None, scored=len(scores),
                characters=len({e.character_id for e in rows} - {None}),
            )
        )  # fmt: skip
    return tuple(shares)


def _row(example: Example, weight: float, epoch: int, tokens: int | None) -> MixtureRow:
    return MixtureRow(
        example_id=example.id, prompt_id=example.prompt_id, user_id=example.user_id,
        character_id=example.character_id, source=example.source, weight=weight, epoch=epoch, tokens=tokens,
    )  # fmt: skip
