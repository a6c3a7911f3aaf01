"""A window of the store as Parquet files, which every later stage reads (DESIGN section 5).

The columns are those of `records.Message`, `Signal`, `Exposure`, `User` and `Conversation`, rows in the order of
arrival, so the same window gives the same bytes, whatever the database.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import ColumnElement, Connection, Table, and_, literal, null, select, true, tuple_, union

from .. import tables
from ..records import Character, Conversation, Exposure, Message, Record, Signal, User
from .paths import path
from .schema import characters, conversations, exposures, messages, signals, users

if TYPE_CHECKING:
    from .events import EventStore, Position

_ROWS_AT_ONCE = 50_000


def export(
    store: "EventStore", folder: Path, after: "Position", until: "Position", *, consenting_only: bool = True,
    texts: bool = True,
) -> None:  # fmt: skip
    """Write the events after `after` up to and including `until`, and all they refer to, into `folder`.

    Files: messages.parquet, signals.parquet, exposures.parquet (the window), users.parquet and
    conversations.parquet (those the window refers to; a conversation's messages are in messages.parquet),
    characters.jsonl (theirs, with versions). With `consenting_only`, users who have not agreed to training are left
    out of every file, and so are conversations that they opened. An experiment is analysed over everyone, and needs
    no word of what they said: without `texts`, contents are empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    refusing = select(users.c.id).where(~users.c.consent)
    theirs = select(conversations.c.id).where(conversations.c.user_id.in_(refusing))

    def window(table: Table) -> ColumnElement[bool]:
        first, last = getattr(after, table.name), getattr(until, table.name)
        agreed = table.c.user_id.not_in(refusing) if consenting_only else true()
        return and_(table.c.seq > first, table.c.seq <= last, agreed)

    said = and_(window(messages), messages.c.conversation_id.not_in(theirs) if consenting_only else true())
    talks = conversations.c.id.in_(select(messages.c.conversation_id).where(said))
    people = union(
        select(messages.c.user_id).where(said),
        *(select(table.c.user_id).where(window(table)) for table in (signals, exposures)),
        select(conversations.c.user_id).where(talks),
    )
    cast = select(conversations.c.character_id, conversations.c.character_version).where(talks)
    with store.read() as connection:
        _write(connection, folder, Message, messages, said, texts)
        _write(connection, folder, Signal, signals, window(signals), texts)
        _write(connection, folder, Exposure, exposures, window(exposures))
        _write(connection, folder, User, users, users.c.id.in_(people))
        _write(connection, folder, Conversation, conversations, talks)
        found = connection.scalars(
            select(characters.c.record)
            .where(tuple_(characters.c.id, characters.c.version).in_(cast))
            .order_by(characters.c.id, characters.c.version)
        )
        tables.write_jsonl(folder / "characters.jsonl", map(Character.model_validate_json, found.all()))


def conversations_from_export(folder: Path, *, alternatives: bool = False) -> list[Conversation]:
    """The conversations of an export, each with its messages of the window in order.

    Where replies have alternatives, the messages are those on the way to the newest one (see `paths.path`), or, with
    `alternatives`, all of them in order of arrival, each with its parent.
    """
    said: dict[str, list[Message]] = {}
    for message in tables.read(folder / "messages.parquet", Message):
        said.setdefault(message.conversation_id, []).append(message)
    return [
        conversation.model_copy(
            update={"messages": tuple(said[conversation.id] if alternatives else path(said[conversation.id]))}
        )
        for conversation in tables.read(folder / "conversations.parquet", Conversation)
    ]


def _write(
    connection: Connection, folder: Path, record: type[Record], table: Table, condition: ColumnElement[bool],
    texts: bool = True,
) -> None:  # fmt: skip
    """Write the rows of `table` that meet `condition`, in order of arrival, a batch at a time."""
    schema = tables.arrow_schema(record)
    kept = [field for field in schema.names if field in table.c]
    silent: dict[str, ColumnElement[Any]] = {}
    if not texts:
        silent = {"content": literal("").label("content"), "text": null().label("text")}
    wanted = select(*(silent.get(field, table.c[field]) for field in kept)).where(condition).order_by(table.c.seq)
    rows = connection.execute(wanted, execution_options={"stream_results": True})
    with pq.ParquetWriter(folder / f"{table.name}.parquet", schema, compression="zstd") as writer:
        while batch := rows.fetchmany(_ROWS_AT_ONCE):
            columns = dict(zip(kept, zip(*batch, strict=True), strict=True))
            empty = [()] * len(batch)  # a conversation's messages have their own file
            writer.write_table(pa.table([pa.array(columns.get(f.name, empty), f.type) for f in schema], schema=schema))
