"""The characters that people can talk to now: approved, not retired, at the newest approved version."""

import time

from ..records import Character
from ..store import EventStore
from .durable import ask
from .errors import ApiError


class Cast:
    """The approved characters, read from the store again when older than `reload_seconds`.

    A change through this service shows at once (`refresh`); one made elsewhere within `reload_seconds`.
    """

    def __init__(self, store: EventStore, reload_seconds: float = 2.0) -> None:
        self._store, self._reload = store, reload_seconds
        self._characters: dict[str, Character] = {}
        self._decided = -1
        self._read_at = time.monotonic() - 2 * reload_seconds

    async def refresh(self) -> None:
        """Read the characters now."""
        self._read_at = time.monotonic()  # whoever comes meanwhile takes the old ones instead of reading too
        decided = await ask(self._store.last_publication)
        if decided != self._decided:
            self._characters, self._decided = await ask(self._store.cast), decided

    async def approved(self) -> dict[str, Character]:
        """By id, sorted by id."""
        if time.monotonic() - self._read_at > self._reload:
            try:
                await self.refresh()
            except ApiError:  # noted where it was made; those who were in service stay
                if not self._characters:
                    raise
        return self._characters

    async def get(self, id: str) -> Character | None:
        """A character that can be talked to; None where there is none."""
        return (await self.approved()).get(id)
