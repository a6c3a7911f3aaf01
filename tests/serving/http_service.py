"""The chat service in this process, over its real routes and a real store, with the echo backend."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from characterflywheel.config import FlywheelConfig, SafetyConfig, ServerConfig
from characterflywheel.serving.app import make_app
from characterflywheel.serving.hub import Hub
from characterflywheel.serving.keys import create_key
from characterflywheel.store import EventStore
from characterflywheel.workspace import Workspace, init


class Service:
    """A client with a key, and the parts behind it."""

    def __init__(self, client: TestClient, hub: Hub, key: str) -> None:
        self.client, self.hub, self.key = client, hub, key
        self.store = hub.store

    def key_for(self, *scopes: str, user: str | None = None) -> dict[str, str]:
        """The headers of a new key, known at once."""
        _, key = create_key(self.store, "test", scopes, user)
        self.hub.authenticator.reload()
        return {"Authorization": f"Bearer {key}"}

    def chat(self, text: str, user: str = "ann", **more: Any) -> Any:
        """One completion with the pirate; the whole response. `headers` and body fields may be given."""
        headers = more.pop("headers", {})
        before = more.pop("before", [])
        body = {"model": "pirate", "user": user, "messages": [*before, {"role": "user", "content": text}], **more}
        return self.client.post("/v1/chat/completions", json=body, headers=headers)


@contextmanager
def service(
    folder: Path, server: dict[str, Any] | None = None, safety: dict[str, Any] | None = None
) -> Iterator[Service]:
    """A service of a new workspace in `folder`, or of the one that is there."""
    workspace = Workspace.open(folder) if folder.exists() else init(folder, "tiny")
    config = FlywheelConfig(
        server=ServerConfig(**({"backend": "echo"} | (server or {}))), safety=SafetyConfig(**(safety or {}))
    )
    with EventStore.open(workspace.database) as store:
        _, key = create_key(store, "test", ("admin",))
    hubs: list[Hub] = []
    app = make_app(workspace, config, hubs.append)
    with TestClient(app, headers={"Authorization": f"Bearer {key}"}, raise_server_exceptions=False) as client:
        yield Service(client, hubs[0], key)
