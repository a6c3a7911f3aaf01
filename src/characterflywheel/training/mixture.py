"""The SFT mixture: sources with weights, de-duplicated, and a statement of what a model was trained on (PAPER 4)."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence

from ..ids import derive_seed
from ..records import Dropped, Example, Record


class SourceShare(Record):
    """One source's part of a mixture: examples it offered, distinct ones, and how many were drawn."""

    source: str
    weight: float
    offered: int
    distinct: int
    drawn: int


class Mixture(Record):
    """The examples to learn from, in training order, and where they came from."""

    examples: tuple[Example, ...]
    sources: tuple[SourceShare, ...]
    dropped: tuple[Dropped, ...]


def mix(examples: Sequence[Example], weights: Mapping[str, float], epochs: int, seed: int) -> Mixture:
    """`epochs` passes over the sources, each drawn `weight` times a pass (1.5: all once, half of them again).

    An example whose prompt and reply were seen before is dropped, with the reason. A source without a weight is 0.
    """
    distinct: dict[str, list[Example]] = {}
    dropped, seen = [], set()
    for example in sorted(examples, key=lambda e: e.id):
        key = (example.prompt_id, example.messages[-1].content)
        if key in seen:
            dropped.append(Dropped(id=example.id, stage="sft", reason="duplicate", prompt_id=example.prompt_id))
            continue
        seen.add(key)
        distinct.setdefault(example.source, []).append(example)
    drawn: list[Example] = []
    for epoch in range(epochs):
        one_pass: list[Example] = []
        for source, rows in sorted(distinct.items()):
            weight = weights.get(source, 0.0)
            chooser = random.Random(derive_seed(seed, epoch, source))
            one_pass += rows * int(weight)
            one_pass += chooser.sample(rows, round((weight - int(weight)) * len(rows)))
        random.Random(derive_seed(seed, epoch)).shuffle(one_pass)
        drawn += one_pass
    counts, offered = Counter[str](e.source for e in drawn), Counter[str](e.source for e in examples)
    shares = tuple(
        SourceShare(
            source=source, weight=weights.get(source, 0.0), offered=offered[source], distinct=len(rows),
            drawn=counts[source],
        )
        for source, rows in sorted(distinct.items())
    )  # fmt: skip
    return Mixture(examples=tuple(drawn), sources=shares, dropped=tuple(dropped))
