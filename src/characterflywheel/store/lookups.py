"""What the chat service asks of the store, each a function of an open connection."""

from typing import TypeVar

from sqlalchemy import Connection, Table, func, select

from ..records import Character, Conversation, Message, Record, Signal, Source
from ..service_records import ApiKey, Experiment, Publication
from .rows import record
from .schema import characters, conversations, experiments, keys, messages, publications, signals, users

R = TypeVar("R", bound=Record)


def one(connection: Connection, table: Table, kind: type[R], id: str) -> R | None:
    """The row with an id, as its record."""
    row = connection.execute(select(table).where(table.c.id == id)).one_or_none()
    return None if row is None else record(kind, row)


def conversation(connection: Connection, id: str) -> Conversation | None:
    """A conversation with all its messages, in order of arrival."""
    found = one(connection, conversations, Conversation, id)
    if found is None:
        return None
    said = connection.execute(select(messages).where(messages.c.conversation_id == id).order_by(messages.c.seq))
    return found.model_copy(update={"messages": tuple(record(Message, row) for row in said)})


def conversations_of(connection: Connection, user_id: str, limit: int, before_id: str | None) -> list[Conversation]:
    """A user's conversations without messages, newest first; those older than `before_id` if it is given."""
    table = conversations
    wanted = select(table).where(table.c.user_id == user_id)
    if before_id is not None:
        wanted = wanted.where(table.c.seq < select(table.c.seq).where(table.c.id == before_id).scalar_subquery())
    return [record(Conversation, row) for row in connection.execute(wanted.order_by(table.c.seq.desc()).limit(limit))]


def character(connection: Connection, id: str, version: int | None) -> Character | None:
    """A version of a character, the newest if None."""
    wanted = select(characters.c.record).where(characters.c.id == id)
    if version is not None:
        wanted = wanted.where(characters.c.version == version)
    found = connection.scalar(wanted.order_by(characters.c.version.desc()).limit(1))
    return None if found is None else Character.model_validate_json(found)


def versions(connection: Connection, id: str) -> list[Character]:
    """All versions of a character, oldest first."""
    wanted = select(characters.c.record).where(characters.c.id == id).order_by(characters.c.version)
    return [Character.model_validate_json(found) for found in connection.scalars(wanted)]


def newest_characters(connection: Connection) -> dict[str, Character]:
    """The newest version of every character by id, sorted by id."""
    found = connection.scalars(select(characters.c.record).order_by(characters.c.id, characters.c.version))
    return {one.id: one for one in map(Character.model_validate_json, found)}


def publications_in_force(connection: Connection) -> dict[str, Publication]:
    """The newest decision about each character's newest version, by character id.

    A character whose newest version nobody decided about is absent, whatever was said of older ones.
    """
    newest = select(characters.c.id, func.max(characters.c.version).label("version")).group_by(characters.c.id)
    latest = newest.subquery()
    wanted = select(publications).join(
        latest, (publications.c.character_id == latest.c.id) & (publications.c.version == latest.c.version)
    )
    found = connection.execute(wanted.order_by(publications.c.seq))
    return {row.character_id: record(Publication, row) for row in found}


def cast(connection: Connection) -> dict[str, Character]:
    """The characters in service by id, sorted by id: each at its newest approved version, unless it was retired.

    A version's newest decision counts. Retiring any version takes the character out until a later approval.
    """
    order = (publications.c.character_id, publications.c.seq)
    state: dict[str, dict[int, str]] = {}
    for row in connection.execute(select(publications).order_by(*order)):
        decided = state.setdefault(row.character_id, {})
        if row.state == "retired":
            decided.clear()
        decided[row.version] = row.state
    chosen = [
        (id, max(version for version in decided if decided[version] == "approved"))
        for id, decided in state.items()
        if "approved" in decided.values()
    ]
    found = {id: character(connection, id, version) for id, version in chosen}
    return {id: one for id, one in sorted(found.items()) if one is not None}


def last_publication(connection: Connection) -> int:
    """The number of the newest decision about any character; 0 where there is none."""
    return connection.scalar(select(func.coalesce(func.max(publications.c.seq), 0))) or 0


def signals_of(connection: Connection, conversation_id: str) -> list[Signal]:
    """The signals on a conversation's messages, in order of arrival."""
    theirs = select(messages.c.id).where(messages.c.conversation_id == conversation_id)
    found = connection.execute(select(signals).where(signals.c.message_id.in_(theirs)).order_by(signals.c.seq))
    return [record(Signal, row) for row in found]


def publication_history(connection: Connection, character_id: str) -> list[Publication]:
    """Every decision about a character, oldest first."""
    wanted = select(publications).where(publications.c.character_id == character_id).order_by(publications.c.seq)
    return [record(Publication, row) for row in connection.execute(wanted)]


def experiments_in_force(connection: Connection) -> dict[str, Experiment]:
    """The newest row of every experiment by name."""
    found = connection.execute(select(experiments).order_by(experiments.c.seq))
    return {row.name: record(Experiment, row) for row in found}


def api_keys(connection: Connection) -> list[ApiKey]:
    """All keys, revoked and expired ones too, oldest first."""
    return [record(ApiKey, row) for row in connection.execute(select(keys).order_by(keys.c.seq))]


def populations(connection: Connection, user_ids: list[str]) -> dict[str, Source]:
    """The population of each known user."""
    found = connection.execute(select(users.c.id, users.c.population).where(users.c.id.in_(user_ids)))
    return {row.id: row.population for row in found}
