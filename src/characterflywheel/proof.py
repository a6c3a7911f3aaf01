"""Search a whole workspace for what should be gone from it: the proof that an erasure gives.

Ids are looked for as values of the columns that hold them and, where they cannot be words of another text by chance,
as bytes of every file, the database's pages among them; so are the texts. Weights cannot be searched and are listed.
"""

import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from . import lineage
from .lineage import Ids
from .records import Record
from .scan import SHORTEST, Scanner, spellings
from .store import EventStore
from .store import erase as stored
from .store.schema import characters, conversations, messages, users

DISTINCTIVE = 20
"""Shorter texts say nothing about who wrote them."""
TABLES = (".parquet", ".jsonl")
WEIGHTS = (".safetensors", ".pt", ".bin", ".gz", ".zip", ".png", ".jpg", ".jpeg", ".webp")
JOURNAL = ".erasing.json"
_OWN = (JOURNAL, ".lock")


class Left(Record):
    """A file, or a table of the store, in which something was found, and how often."""

    where: str
    what: str
    times: int


class Proof(Record):
    """What was searched for and where. `left` is empty where all is gone.

    `common` are texts that others also say and ids that are part of others': they prove nothing either way, and are
    only looked for as values.
    """

    ids: int
    texts: int
    common: int
    files: int
    bytes: int
    seconds: float
    left: tuple[Left, ...]
    not_searched: tuple[str, ...]

    def line(self) -> str:
        sought = f"{self.ids} ids and {self.texts} texts ({self.common} more are not theirs alone)"
        where = f"{self.files} files, {self.bytes / 1e6:,.0f} MB, in {self.seconds:.1f} s"
        found = f"found {sum(one.times for one in self.left)} times" if self.left else "not found"
        weights = f"; {len(self.not_searched)} files of weights cannot be searched" if self.not_searched else ""
        return f"searched for {sought} in {where}: {found}{weights}"


class Needles(NamedTuple):
    """What bytes are searched for: `scanner` finds spellings of texts and ids, `common` are those left out of it."""

    scanner: Scanner
    texts: int
    common: int
    is_text: tuple[bool, ...]

    def what(self, number: int) -> str:
        return "a text" if self.is_text[number] else "an id"


NOTHING = Needles(Scanner(()), 0, 0, ())
"""Nothing to search for."""


def files(root: Path) -> list[Path]:
    """Every file of a workspace but the erasure's own journal and the lock, sorted."""
    return sorted(p for p in root.rglob("*") if p.is_file() and not (p.parent == root and p.name in _OWN))


def is_table(path: Path, root: Path) -> bool:
    """Whether a file's rows have ids: Parquet and JSON lines, but for the ledger and the erasures themselves."""
    return path.suffix in TABLES and path.parent != root


def common(store: EventStore, ids: Ids, texts: Iterable[str]) -> set[str]:
    """Those of these ids and texts that the store's other people say too, or have within ids of their own."""
    ours = sorted({*filter(_is_no_word, ids.user | ids.conversation), *filter(_is_distinctive, texts)})
    forms = [(form, one) for one in ours for form in spellings(one)]
    scanner = Scanner(form for form, _ in forms)
    columns = (users.c.id, conversations.c.id, characters.c.record, messages.c.content, *stored.SAID)
    return {forms[hit.needle][1] for _, some in stored.texts(store, columns) for hit in scanner.hits(some)}


def needles(ids: Ids, texts: Iterable[str], shared: set[str]) -> Needles:
    """What to search bytes for: ids that are no words, and texts that say who wrote them, less what is `shared`."""
    said = set(filter(_is_distinctive, texts)) - shared
    named = {one for kind in ids for one in kind if _is_no_word(one)} - shared - said
    spelt = [(form, one in said) for one in sorted(named | said) for form in spellings(one)]
    scanner = Scanner(form for form, _ in spelt)
    return Needles(scanner, len(said), len(shared), tuple(is_text for _, is_text in spelt))


def prove(root: Path, store: EventStore, ids: Ids, sought: Needles) -> Proof:
    """Search every file under `root`, and the store wherever it is kept."""
    started = time.monotonic()
    left: Counter[tuple[str, str]] = Counter()
    not_searched = []
    searched = size = 0
    for path in files(root):
        name = path.relative_to(root).as_posix()
        left.update((f"the name of {name}", sought.what(hit.needle)) for hit in sought.scanner.hits(name.encode()))
        if path.suffix in WEIGHTS:
            not_searched.append(name)
            continue
        searched += 1
        size += path.stat().st_size
        if is_table(path, root):
            left[name, "an id"] += len(lineage.table(path).naming(ids, referring=True))
        if path.suffix == ".parquet":
            left.update((name, sought.what(said.needle)) for said in lineage.saying(path, sought.scanner))
        left.update((name, sought.what(hit.needle)) for hit in sought.scanner.in_file(path))
    left.update({(f"table {name}", "an id"): count for name, count in stored.remaining(store, ids).items()})
    if store.dialect == "postgresql" or any(where.startswith("flywheel.db") for where, _ in left):
        for column, some in stored.texts(store, stored.text_columns()):
            left.update((f"table {column}", sought.what(hit.needle)) for hit in sought.scanner.hits(some))
    found = tuple(Left(where=where, what=what, times=n) for (where, what), n in sorted(left.items()) if n)
    return Proof(
        ids=sum(map(len, ids)), texts=sought.texts, common=sought.common, files=searched, bytes=size,
        seconds=round(time.monotonic() - started, 2), left=found, not_searched=tuple(not_searched),
    )  # fmt: skip


def _is_distinctive(text: str) -> bool:
    return len(text) >= DISTINCTIVE


def _is_no_word(id: str) -> bool:
    """Whether an id would not stand in some text by chance."""
    return len(id.encode("utf-8", "surrogatepass")) >= SHORTEST and any(letter in "@0123456789" for letter in id)
