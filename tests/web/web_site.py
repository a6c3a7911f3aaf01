"""The chat service in a process of its own, as people start it, and a browser's visit to its pages."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
FLYWHEEL = (sys.executable, "-m", "characterflywheel.cli")
EVIL = "<script>window.ran = 1</script><img src=x onerror='window.ran = 2'>"


def eventually(look: Callable[[], T], patience: float = 10.0) -> T:
    """What `look` returns as soon as it is true. (The page's policy forbids Playwright's own way of waiting.)"""
    for _ in range(int(patience / 0.03)):
        if found := look():
            return found
        time.sleep(0.03)
    raise AssertionError(f"it did not come to pass within {patience:g} s")


class Site(NamedTuple):
    """A running service: its address, its workspace, and a key for each scope that the tests use."""

    url: str
    root: Path
    keys: Mapping[str, str]

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """What the store holds, read past the service."""
        with sqlite3.connect(f"file:{self.root / 'flywheel.db'}?mode=ro", uri=True) as database:
            return database.execute(query, values).fetchall()


@contextmanager
def process(command: Sequence[str], says: str, log: Path) -> Iterator[str]:
    """Run a server until it is told to stop; yields its address, which the pattern `says` finds in its log."""
    with log.open("wb") as out:
        running = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        url = eventually(lambda: _address(running, says, log), 60)
        eventually(lambda: _answers(f"{url}/healthz"), 60)
        yield url
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait(30)


def _address(running: "subprocess.Popen[bytes]", says: str, log: Path) -> str | None:
    text = log.read_text(encoding="utf-8", errors="replace")
    assert running.poll() is None, text[-3000:]
    found = re.search(says, text)
    return found.group(1) if found else None


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


class Visit:
    """A person's browser at the site. `troubles` are errors of its console, `requests` the addresses it asked."""

    def __init__(self, context: Any, site: Site) -> None:
        self.context, self.site, self.page = context, site, context.new_page()
        self.troubles: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.set_default_timeout(10_000)

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.troubles.append(message.text)

    def home(self) -> Any:
        """The list of characters."""
        self.page.goto(self.site.url)
        self.page.wait_for_selector("#character-list a")
        return self.page

    def with_character(self, name: str) -> Any:
        """A conversation with a character, as a click on its name opens it."""
        page = self.home()
        page.locator("#character-list a", has_text=name).click()
        page.wait_for_selector(".composer")
        return page

    def say(self, text: str) -> Any:
        """Say something and wait for the whole reply; returns the turn."""
        before = self.page.locator(".turn").count()
        self.page.fill("#words", text)
        self.page.keyboard.press("Enter")
        turn = self.page.locator(".turn").nth(before)
        turn.locator(".again:not([aria-disabled=true])").wait_for()
        return turn

    @property
    def id(self) -> str:
        """The id of the conversation that is open."""
        found = re.search(r"#talk/(\S+)$", self.page.url)
        assert found, self.page.url
        return found.group(1)

    def outside(self) -> list[str]:
        """Requests to anywhere but the site."""
        return [url for url in self.requests if not url.startswith((self.site.url, "data:", "blob:"))]
