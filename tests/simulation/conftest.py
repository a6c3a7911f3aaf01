"""Fixtures of the simulated world, see `conftest_world`."""

from conftest_world import cache, lore, people, store

__all__ = ["cache", "lore", "people", "store"]
