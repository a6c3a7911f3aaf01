"""Replies that several people rated (`uss_turns.parquet`): dialogs of people with task-oriented systems.

Every user turn carries ratings, from 1 to 5, of three people or more, in the same order throughout a dialog. A turn's
ratings are taken as said of the system's reply before it; the model reads the dialog up to the end of that reply.
"""

import time
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pyarrow import parquet
from transformers import AutoTokenizer

import bench
import frozen
import judges
from characterflywheel.llm.chat_format import ChatFormat
from characterflywheel.llm.models import base_model_folder

MOST_TOKENS, DIALOGS_AT_ONCE, RATERS = 1024, 4, 3


class Dialog(NamedTuple):
    """`turns`: who spoke ("user" or "assistant") and what. `ratings[i]`: what each rater gave reply `replies[i]`, a
    place in `turns`."""

    name: str
    turns: tuple[tuple[str, str], ...]
    replies: tuple[int, ...]
    ratings: tuple[tuple[int, ...], ...]


def load(folder: Path, number: int, seed: int) -> list[Dialog]:
    """At most `number` dialogs with two rated replies or more, as many of each source, drawn by seed."""
    table = parquet.read_table(folder / "uss_turns.parquet").to_pylist()
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in table:
        if not row["is_overall"]:
            grouped.setdefault((row["dataset"], row["session"]), []).append(row)
    sources = sorted({source for source, _ in grouped})
    rng, out = np.random.default_rng(seed), []
    for source in sources:
        names = sorted(session for one, session in grouped if one == source)
        found = (_dialog(grouped[source, names[i]]) for i in rng.permutation(len(names)))
        kept = [dialog for dialog in found if dialog is not None]
        out += kept[: number // len(sources)]
    return out


def _dialog(rows: list[dict[str, Any]]) -> Dialog | None:
    rows = sorted(rows, key=lambda row: row["turn"])
    turns = tuple(("user" if row["role"] == "user" else "assistant", row["text"].strip()) for row in rows)
    rated = [
        i for i in range(1, len(rows))
        if turns[i][0] == "user" and turns[i - 1][0] == "assistant" and turns[i - 1][1] and rows[i]["n_raters"] >= 3
    ]  # fmt: skip
    ratings = [tuple(int(score) for score in rows[i]["scores"].split(",")) for i in rated]
    if len(rated) < 2 or len({len(given) for given in ratings}) != 1:
        return None  # raters cannot be told apart where a turn has more of them than another
    return Dialog(f"{rows[0]['dataset']}-{rows[0]['session']}", turns, tuple(i - 1 for i in rated), tuple(ratings))


def pairs(dialogs: list[Dialog]) -> tuple[Any, ...]:
    """The columns of `multi_review.Reviewed`, from the first three raters, whom every dialog has."""
    firsts, seconds, votes, items, names = [], [], [], [], []
    for dialog in dialogs:
        start = len(names)
        names += [f"{dialog.name}-{place}" for place in dialog.replies]
        for i, j in combinations(range(len(dialog.replies)), 2):
            preferred = np.sign(np.array(dialog.ratings[i]) - np.array(dialog.ratings[j]))
            firsts.append(start + i)
            seconds.append(start + j)
            votes.append(preferred[:RATERS])
            items.append(dialog.name)
    table: NDArray[np.int8] = np.array(votes, dtype=np.int8)
    name = np.array(items)
    return np.array(firsts), np.array(seconds), table, name, name, tuple(names)


def chat_form(max_prompt_tokens: int) -> ChatFormat:
    """The base model's chat template."""
    return ChatFormat(AutoTokenizer.from_pretrained(base_model_folder(judges.BASE)), max_prompt_tokens)


def places(dialog: Dialog, form: ChatFormat) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """The dialog's tokens and where each rated reply stands, its end token included."""
    tokenizer, ids, found = form.tokenizer, [], []
    for number, (role, text) in enumerate(dialog.turns[: dialog.replies[-1] + 1]):
        ids += tokenizer(f"<|im_start|>{role}\n")["input_ids"]
        said = form.reply(text)
        if number in dialog.replies:
            found.append((len(ids), len(ids) + len(said)))
        ids += [*said, *tokenizer("\n")["input_ids"]]
    return tuple(ids), found


def read(dialogs: list[Dialog], args: Any, make: bool) -> frozen.Reads | None:
    """The frozen base model's reads of all rated replies, a pass a dialog; None while pieces are missing."""
    loaded, files = None, []
    for start in range(0, len(dialogs), DIALOGS_AT_ONCE):
        file: Path = args.work / f"read-satisfaction-{len(dialogs)}-{start:05d}.npz"
        if not file.exists():
            if not make or time.perf_counter() > args.until:
                return None
            loaded = loaded or (bench.model(judges.BASE), chat_form(MOST_TOKENS))
            model, form = loaded
            paths, spans = [], []
            for dialog in dialogs[start : start + DIALOGS_AT_ONCE]:
                ids, found = places(dialog, form)
                paths += [(ids,)] * len(found)
                spans += found
            frozen.save(file, frozen.spans(model, paths, spans))
        files.append(file)
    return frozen.load(files)
