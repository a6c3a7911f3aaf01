"""One service and one browser for all tests of the pages; each visit is a new person."""

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from web_site import EVIL, FLYWHEEL, Site, Visit, process

from characterflywheel.serving.keys import create_key
from characterflywheel.store import EventStore
from characterflywheel.workspace import init

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--disable-site-isolation-trials", "--disable-features=SpareRendererForSitePerProcess",
]  # fmt: skip
SERVING = r"serving .* on (http://\S+)"
UPSTREAM = Path(__file__).parents[2] / "benchmarks" / "mock_upstream.py"


def _workspace(folder: Path) -> tuple[Path, dict[str, str]]:
    workspace = init(folder, "tiny")
    with EventStore.open(workspace.database) as store:
        keys = {scope: create_key(store, "test", (scope,))[1] for scope in ("characters", "review")}
    (folder / "characters" / "evil.toml").write_text(
        f'name = """{EVIL}"""\ncategory = """{EVIL}"""\ntraits = ["""{EVIL}"""]\ngreeting = """{EVIL}"""\n'
        f'[[instructions]]\ntext = """{EVIL}"""\n'
    )
    return folder, keys


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The service with the echo backend."""
    root, keys = _workspace(tmp_path_factory.mktemp("site") / "workspace")
    command = [*FLYWHEEL, "serve", str(root), "--backend", "echo", "--port", "0"]
    with process(command, SERVING, root.parent / "serve.log") as url:
        yield Site(url, root, keys)


@pytest.fixture(scope="session")
def slow_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The service before a model server that takes its time: five sentences in two seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root, keys = _workspace(tmp_path_factory.mktemp("slow") / "workspace")
    model = [sys.executable, str(UPSTREAM), "--port", str(port), "--first", "0.8", "--words", "120", "--piece", "0.012"]
    upstream = subprocess.Popen(model, stdout=subprocess.DEVNULL)
    command = [*FLYWHEEL, "serve", str(root), "--endpoint", f"http://127.0.0.1:{port}/v1", "--port", "0"]
    try:
        with process(command, SERVING, root.parent / "serve.log") as url:
            yield Site(url, root, keys)
    finally:
        upstream.terminate()
        upstream.wait(10)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is missing; install the Debian package chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Any, site: Site) -> Iterator[Callable[..., Visit]]:
    """Begin a visit: `visit(width=390, color_scheme="dark")`, and `at=` for another site than the echoing one."""
    contexts: list[Any] = []

    def begin(width: int = 1280, height: int = 860, at: Site = site, **options: Any) -> Visit:
        options = {"viewport": {"width": width, "height": height}, "reduced_motion": "reduce", **options}
        contexts.append(browser.new_context(**options))
        return Visit(contexts[-1], at)

    yield begin
    for context in contexts:
        context.close()
