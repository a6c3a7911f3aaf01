"""Erase a person from a workspace: the event store, everything derived from what they said, and the report.

`forget` follows lineage from the user to the last row that came from them, takes those rows out, and searches the
whole workspace for what is left (`proof`). What a model has learnt cannot be taken out: those models are listed.
`retain` does the same with conversations that nobody has touched for long. `DIR/erasures.jsonl` keeps that an erasure
happened, under a salted digest of the user's id; until it is complete, `DIR/.erasing.json` says what is still to be
done, so that a killed erasure goes on where it was (docs/decisions/054-erasure.md).
"""

import hashlib
import secrets
import shutil
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from pydantic import Field

from . import erase_files, proof, tables
from . import ids as identifiers
from .erase_files import Learnt
from .errors import FlywheelError
from .lineage import Ids
from .pipeline import write_atomically
from .proof import JOURNAL, Proof
from .records import Record
from .store import EventStore
from .store import erase as stored
from .workspace import Workspace


class Erasure(Record):
    """What was erased: rows by table of the store and by file, models that had learnt from them, and the proof."""

    id: str
    kind: Literal["forget", "retain"]
    at: datetime
    before: datetime | None = None
    salt: str | None = None
    digest: str | None = None
    rows: dict[str, int]
    files: dict[str, int]
    models: tuple[Learnt, ...]
    begun_again: tuple[str, ...] = ()
    proof: Proof

    def text(self) -> str:
        """What was done, for people, a line for each part."""
        what = "forgotten" if self.kind == "forget" else f"conversations untouched since {self.before:%Y-%m-%d} erased"
        rows = ", ".join(f"{name} {count}" for name, count in self.rows.items()) or "none"
        lines = [
            f"{what} on {self.at:%Y-%m-%d %H:%M} UTC",
            f"  rows of the store: {rows}",
            f"  rows of files: {sum(self.files.values())} in {len(self.files)} files",
        ]
        if self.begun_again:
            lines.append(f"  begins again, since it was not complete: {', '.join(self.begun_again)}")
        if self.models:
            lines.append(f"  cannot be unlearnt: {len(self.models)} models were made from these rows")
            lines += [f"    {one.folder}: {one.why}" for one in self.models]
        return "\n".join([*lines, f"  {self.proof.line()}"])


class _Journal(Record):
    """What an erasure still has to do, and what it did: names the erased, and is deleted when all is done."""

    id: str
    kind: Literal["forget", "retain"]
    at: datetime
    user: str | None = None
    before: datetime | None = None
    users: tuple[str, ...] = ()
    conversations: tuple[str, ...] = ()
    row_ids: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    rows: dict[str, int] = Field(default_factory=dict)
    files: dict[str, int] = Field(default_factory=dict)
    models: tuple[Learnt, ...] = ()
    begun_again: tuple[str, ...] = ()

    @property
    def ids(self) -> Ids:
        return Ids(set(self.users), set(self.conversations), set(self.row_ids))

    def knowing(self, ids: Ids, texts: Iterable[str] = (), rows: Mapping[str, int] | None = None) -> "_Journal":
        known = self.ids
        return self.model_copy(update={
            "users": tuple(sorted(known.user | ids.user)),
            "conversations": tuple(sorted(known.conversation | ids.conversation)),
            "row_ids": tuple(sorted(known.row | ids.row)),
            "texts": tuple(sorted({*self.texts, *texts})), "rows": _most(self.rows, rows or {}),
        })  # fmt: skip


def forget(workspace: Workspace, user_id: str) -> Erasure:
    """Erase a user from the workspace; the erasure of before where they were erased and have not come back.

    Raises:
        FlywheelError: nobody knows this user; another process has the workspace; or something is left, which the
            message names, and the same command goes on.
    """
    with workspace.locked(), _store(workspace) as store:
        pending = _finish(workspace, store)
        if pending is not None and pending.digest == _digest(user_id, pending.salt):
            return pending
        if not _is_known(workspace, store, user_id):
            digest = _digest(user_id, _salt(workspace))
            for earlier in reversed(erasures(workspace)):
                if earlier.digest == digest:
                    return earlier
            raise FlywheelError(f"user {user_id!r} is neither in the store nor in any file of {workspace.root}.")
        now = datetime.now(UTC)
        journal = _Journal(id=identifiers.uuid7(now), kind="forget", at=now, user=user_id, users=(user_id,))
        return _carry_out(workspace, store, journal)


def retain(workspace: Workspace, days: int | None = None, now: datetime | None = None) -> Erasure | None:
    """Erase conversations untouched for `days` (`server.retention_days` if None), everywhere; None if there are none.

    Raises:
        FlywheelError: no time is set; another process has the workspace; or something is left.
    """
    days = days or workspace.config().server.retention_days
    if days is None:
        raise FlywheelError(
            f"how long conversations are kept is not set: give --days N, or server.retention_days in "
            f"{workspace.config_file}."
        )
    moment = now or datetime.now(UTC)
    before = moment - timedelta(days=days)
    with workspace.locked(), _store(workspace) as store:
        _finish(workspace, store)
        if not stored.any_untouched(store, before):
            stored.retire(store, before)  # answers kept for repeated requests go by their own age
            return None
        return _carry_out(
            workspace, store, _Journal(id=identifiers.uuid7(moment), kind="retain", at=moment, before=before)
        )


def erasures(workspace: Workspace) -> list[Erasure]:
    """The complete erasures, oldest first."""
    path = _record(workspace)
    return list(tables.read_jsonl(path, Erasure)) if path.exists() else []


def _carry_out(workspace: Workspace, store: EventStore, journal: _Journal) -> Erasure:
    """Erase what the journal names; every step may be repeated after a kill.

    Raises FlywheelError where something is left; the journal stays.
    """
    root = workspace.root

    def note(found: stored.Found) -> None:  # durable before anything is deleted
        nonlocal journal
        journal = journal.knowing(found.ids, found.texts, found.rows)
        _save(root, journal)

    deleted = stored.erase(store, journal.ids, journal.before, note)
    journal = journal.knowing(journal.ids, rows=deleted)
    shared = proof.common(store, journal.ids, journal.texts)
    sought = proof.needles(journal.ids, journal.texts, shared)
    plan = erase_files.plan(root, journal.ids, sought)
    journal = journal.knowing(plan.ids).model_copy(update={
        "files": _most(journal.files, {name: len(rows) for name, rows in plan.rows.items()}),
        "models": tuple({one.folder: one for one in (*plan.models, *journal.models)}.values()),
        "begun_again": tuple(sorted({*journal.begun_again, *plan.unfinished})),
    })  # fmt: skip
    _save(root, journal)
    for path in root.rglob("*.writing"):  # left by a kill in the middle of a write
        path.unlink()
    for name, rows in plan.rows.items():
        erase_files.take_out(root / name, rows)
    erase_files.note_in_artifacts(root, journal.id, journal.files)
    for name in journal.begun_again:
        shutil.rmtree(root / name, ignore_errors=True)
    _write_report(workspace)
    sought = proof.needles(journal.ids, journal.texts, shared)  # the ids of derived rows too
    stored.compact(store, lambda file: any(sought.scanner.in_file(file)))
    found = proof.prove(root, store, journal.ids, sought)
    if found.left:
        places = "; ".join(f"{one.where}: {one.what}, {one.times} times" for one in found.left[:5])
        raise FlywheelError(
            f"erased, but {len(found.left)} places still hold something of it ({places}): take it out there or remove "
            f"the file, then give the command again, which goes on from {root / JOURNAL}."
        )
    salt = _salt(workspace) if journal.user is not None else None
    erasure = Erasure(
        id=journal.id, kind=journal.kind, at=journal.at, before=journal.before, salt=salt,
        digest=_digest(journal.user, salt), rows=_counted(journal.rows), files=_counted(journal.files),
        models=journal.models, begun_again=journal.begun_again, proof=found,
    )  # fmt: skip
    kept = {one.id: one for one in erasures(workspace)} | {erasure.id: erasure}
    write_atomically(_record(workspace), "".join(one.model_dump_json() + "\n" for one in kept.values()))
    (root / JOURNAL).unlink()
    return erasure


def _finish(workspace: Workspace, store: EventStore) -> Erasure | None:
    """Complete an erasure that was killed."""
    path = workspace.root / JOURNAL
    if not path.exists():
        return None
    journal = _Journal.model_validate_json(path.read_text(encoding="utf-8"))
    if journal.kind == "retain" and stored.remaining(store, journal.ids):  # killed before anything was deleted
        journal = _Journal(id=journal.id, kind="retain", at=journal.at, before=journal.before)
    return _carry_out(workspace, store, journal)


def _is_known(workspace: Workspace, store: EventStore, user_id: str) -> bool:
    ids = Ids({user_id}, set(), set())
    if stored.remaining(store, ids):
        return True
    return bool(erase_files.plan(workspace.root, ids, proof.NOTHING).rows)


def _write_report(workspace: Workspace) -> None:
    """Write the report anew, which shows sample conversations; one that cannot be written is removed."""
    if not (workspace.report / "index.html").exists():
        return
    from .report import write_report  # noqa: PLC0415 - most workspaces of a live product have none yet

    try:
        write_report(workspace.root)
    except FlywheelError:
        (workspace.report / "index.html").unlink()


def _store(workspace: Workspace) -> EventStore:
    return EventStore.open(workspace.config().store.url or workspace.database)


def _record(workspace: Workspace) -> Path:
    return workspace.root / "erasures.jsonl"


def _save(root: Path, journal: _Journal) -> None:
    write_atomically(root / JOURNAL, journal.model_dump_json())


def _salt(workspace: Workspace) -> str:
    """One salt a workspace, so that whether someone was erased takes one digest to tell."""
    return next((one.salt for one in erasures(workspace) if one.salt), None) or secrets.token_hex(16)


def _digest(user_id: str | None, salt: str | None) -> str | None:
    """Slow on purpose (scrypt, 16 MB), so that the ids of the erased are not guessed from the file."""
    if user_id is None or salt is None:
        return None
    return hashlib.scrypt(user_id.encode(), salt=bytes.fromhex(salt), n=1 << 14, r=8, p=1, dklen=32).hex()


def _most(known: Mapping[str, int], found: Mapping[str, int]) -> dict[str, int]:
    """Counts before and after a kill: what was taken out already is not counted again."""
    return {name: max(known.get(name, 0), found.get(name, 0)) for name in sorted(known.keys() | found.keys())}


def _counted(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}
