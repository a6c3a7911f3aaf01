"""A chat service that is really started: `flywheel serve` in a process of its own, on a port that it found free."""

import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import servers

BENCHMARKS = Path(servers.__file__).parent


@dataclass(frozen=True)
class Live:
    """A started service: its base address (`.../v1`), a chat key, its workspace's folder, and its process."""

    url: str
    key: str
    folder: Path
    server: servers.Server
    clients: list[openai.OpenAI] = field(default_factory=list)

    def client(self, **more: object) -> openai.OpenAI:
        """The official client; it tries again only where `max_retries` says so."""
        settings: dict[str, object] = {"base_url": self.url, "api_key": self.key, "max_retries": 0, "timeout": 20}
        self.clients.append(openai.OpenAI(**settings | more))  # type: ignore[arg-type]
        return self.clients[-1]

    def rows(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """Ask its SQLite file."""
        with closing(sqlite3.connect(self.folder / "flywheel.db")) as store:
            return store.execute(sql, values).fetchall()


@contextmanager
def started(folder: Path, settings: str = "", *options: str) -> Iterator[Live]:
    """Start a service whose `flywheel.toml` ends with `settings`; its log is printed, for when a test fails."""
    key = servers.workspace(folder, settings)
    server = servers.flywheel(folder, *(options or ("--backend", "echo")))
    try:
        server.start()
        live = Live(server.url, key, folder, server)
        yield live
        for client in live.clients:
            client.close()
    finally:
        server.stop()
        log = server.log.read_text(encoding="utf-8")
        print(f"--- log of {folder.name}\n{log[-6000:]}")
        assert "Traceback" not in log
