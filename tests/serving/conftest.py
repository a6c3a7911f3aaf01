"""Fixtures of services and model servers that are really started; see `live_service`."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from live_service import Live, servers, started


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A service with the echo backend, one for a module."""
    with started(tmp_path_factory.mktemp("live") / "product") as one:
        yield one


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Live]]:
    """Start services with settings of their own: `start("[server]\\n...", "--backend", "echo")`."""
    with ExitStack() as stack:
        count = iter(range(100))
        yield lambda *given: stack.enter_context(started(tmp_path / f"product-{next(count)}", *given))


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[Callable[..., servers.Server]]:
    """Start mock model servers: `upstream("--piece", "0.05")`."""
    with ExitStack() as stack:
        yield lambda *options: stack.enter_context(servers.running(servers.mock_upstream(tmp_path, *options)))
