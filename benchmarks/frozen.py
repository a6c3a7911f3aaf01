"""What a language model that nobody trained to judge says of replies: its states at several layers, its likelihood.

One shared-prefix pass a prompt reads everything, in bfloat16 where the processor has it. On the states stands a linear
Bradley-Terry head, a ridge logistic regression on differences; layer, pooling and penalty are chosen by
cross-validation inside the training part.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from torch import Tensor

from characterflywheel.errors import FlywheelError
from characterflywheel.llm import shared_prefix
from characterflywheel.llm.chat_format import ChatFormat
from characterflywheel.records import ChatMessage

Floats = NDArray[np.float32]
PENALTIES = (1e-4, 1e-3, 1e-2)  # sklearn's C for unit-variance features


class Reads(NamedTuple):
    """Of R replies. `last`, `mean`: states at the end token and averaged over the reply, (R, len(depths), width);
    `logprob`: mean log-probability of a token of the reply, its end included; `total`: their sum. Both (R,)."""

    last: Floats
    mean: Floats
    logprob: Floats
    total: Floats


def read(
    model: Any, form: ChatFormat, prompts: Sequence[Sequence[ChatMessage]], replies: Sequence[Sequence[str]], most: int
) -> Reads:
    """One pass of a `LlamaForCausalLM` over prompts with their replies, in order; these are cut after `most` tokens."""
    paths = []
    for prompt, texts in zip(prompts, replies, strict=True):
        head = tuple(segment for segment in form.prompt(prompt) if segment)
        paths += [(*head, cut(form.reply(text), most)) for text in texts]
    ends = [sum(map(len, path)) for path in paths]
    return spans(model, paths, [(end - len(path[-1]), end) for path, end in zip(paths, ends, strict=True)])


def join(parts: Sequence[Reads]) -> Reads:
    """One after the other."""
    return Reads(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def depths(layers: int) -> tuple[int, ...]:
    """After how many of a model's layers its states are read: ten places, the last one after the final norm."""
    return tuple(sorted({round(layers * tenth / 10) for tenth in range(1, 11)} - {0}))


def spans(model: Any, paths: Sequence[shared_prefix.Path], places: Sequence[tuple[int, int]]) -> Reads:
    """One pass over all paths; of each, the tokens from the first of its `places` up to the second are read."""
    forest = shared_prefix.plant(paths)
    streams: dict[int, Tensor] = {}
    backbone, places_read = model.model, depths(len(model.model.layers))
    bf16 = torch.cpu._is_avx512_bf16_supported()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16), ExitStack() as hooks:
        for number in places_read[:-1]:
            layer = backbone.layers[number]
            layer.run_as = partial(_kept, layer, streams, number)
            hooks.callback(delattr, layer, "run_as")
        final = shared_prefix.hidden_states(backbone, forest)
        streams[places_read[-1]] = final.float()
        rows = [mine[start:stop] for mine, (start, stop) in zip(forest.rows, places, strict=True)]
        before = torch.cat(
            [mine[start - 1 : stop - 1] for mine, (start, stop) in zip(forest.rows, places, strict=True)]
        )
        logs = torch.log_softmax(model.lm_head(final[before]).float(), dim=-1)
        each = logs.gather(1, forest.ids[torch.cat(rows)].unsqueeze(1)).squeeze(1).split([len(mine) for mine in rows])
    deep = torch.stack([streams[n] for n in places_read], dim=1)
    return Reads(
        torch.stack([deep[mine[-1]] for mine in rows]).numpy(),
        torch.stack([deep[mine].mean(0) for mine in rows]).numpy(),
        torch.stack([s.mean() for s in each]).numpy(),
        torch.stack([s.sum() for s in each]).numpy(),
    )


def _kept(layer: Any, streams: dict[int, Tensor], number: int, function: Any, x: Tensor, *more: Any) -> Any:
    """Run a layer, and keep the states that it begins with."""
    streams[number] = x.float()
    return function(layer, x, *more)


def cut(ids: shared_prefix.Segment, most: int) -> shared_prefix.Segment:
    """As the reward models cut a reply: its beginning and its end token."""
    return ids if len(ids) <= most else (*ids[: most - 1], ids[-1])


def save(path: Path, reads: Reads) -> None:
    """Half precision is plenty for a linear head."""
    states = {name: getattr(reads, name).astype(np.float16) for name in ("last", "mean")}
    with path.with_suffix(".partial").open("wb") as file:
        np.savez(file, **states, logprob=reads.logprob, total=reads.total)
    path.with_suffix(".partial").replace(path)


def load(paths: Sequence[Path]) -> Reads:
    """The reads of several files, one after the other."""
    return join([Reads(*(np.load(path)[name].astype(np.float32) for name in Reads._fields)) for path in paths])


class Head(NamedTuple):
    """A linear Bradley-Terry head: its weights, and the pooling, depth and penalty chosen inside its training part.

    The depth counts tenths of the backbone's layers (its place in `depths`).
    """

    choice: tuple[str, int, float]
    weights: NDArray[np.float64]


class Pairs(NamedTuple):
    """Row numbers of two replies in `Reads`, the label (share of reviews for the first), and a group for each pair."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    label: Floats
    group: NDArray[Any]

    def at(self, rows: NDArray[Any]) -> "Pairs":
        return Pairs(*(column[rows] for column in self))


def view(reads: Reads, pooling: str, depth: int) -> Floats:
    """(replies, width) states."""
    states: Floats = getattr(reads, pooling)[:, depth]
    return states


def fit_head(reads: Reads, pairs: Pairs, penalties: Sequence[float] = PENALTIES, folds: int = 3) -> Head:
    """The head with the least cross-validated log loss over `folds` parts of the pairs that share no group."""
    count = min(folds, len(np.unique(pairs.group)))
    if count < 2:
        raise FlywheelError(f"a head's layer is chosen across prompts: {count} is too few, give at least 2.")
    parts = list(GroupKFold(count).split(pairs.first, groups=pairs.group))
    best: tuple[float, tuple[str, int, float]] | None = None
    for pooling in ("last", "mean"):
        for depth in range(reads.last.shape[1]):
            x = view(reads, pooling, depth)
            for penalty in penalties:
                loss = 0.0
                for inside, outside in parts:
                    other = pairs.at(outside)
                    margin = (x[other.first] - x[other.second]) @ _weights(x, pairs.at(inside), penalty)
                    loss += float((np.logaddexp(0, margin) - other.label * margin).sum())
                if best is None or loss < best[0]:
                    best = loss, (pooling, depth, penalty)
    assert best is not None
    choice = best[1]
    return Head(choice, _weights(view(reads, choice[0], choice[1]), pairs, choice[2]))


def scores(reads: Reads, head: Head) -> NDArray[np.float64]:
    """A score for every reply."""
    return np.asarray(view(reads, head.choice[0], head.choice[1]) @ head.weights, dtype=np.float64)


def random_scores(reads: Reads, depth: int, seed: int) -> NDArray[np.float64]:
    """Scores of a head that nobody trained: random weights on the states of the end token, each of unit variance."""
    x = view(reads, "last", depth)
    return np.asarray((x / (x.std(0) + 1e-6)) @ np.random.default_rng(seed).standard_normal(x.shape[1]))


def _weights(x: Floats, pairs: Pairs, penalty: float) -> NDArray[np.float64]:
    """Of a ridge logistic regression on differences of unit mean square; both orders of every pair, soft labels."""
    apart = x[pairs.first] - x[pairs.second]
    scale = np.sqrt((apart**2).mean(0)) + 1e-6
    seen = apart / scale
    outcome = np.repeat([1.0, 0.0], len(seen))
    rows, weight = np.r_[seen, seen], np.r_[pairs.label, 1 - pairs.label]
    told = weight > 0
    mirrored = (
        np.r_[rows[told], -rows[told]],
        np.r_[outcome[told], 1 - outcome[told]],
        np.r_[weight[told], weight[told]],
    )
    model = LogisticRegression(C=penalty, fit_intercept=False, max_iter=200).fit(*mirrored)
    return np.asarray(model.coef_[0] / scale, dtype=np.float64)
