"""The event store: everything that happened, once and in order (DESIGN sections 4, 5)."""

from .database import StoreUnavailable
from .events import EventStore, Position
from .journal import Journal, JournalFull

__all__ = ["EventStore", "Journal", "JournalFull", "Position", "StoreUnavailable"]
