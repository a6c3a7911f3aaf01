"""A real PostgreSQL server for the tests: `initdb` into a temporary folder, a Unix socket there, fsync on.

It must not run as root; a test run as root borrows the system user `postgres`. Where there is no server to run, what
needs one is skipped with the reason.
"""

import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

_SETTINGS = ("listen_addresses=", "fsync=on", "synchronous_commit=on", "max_connections=50", "shared_buffers=32MB")


class PostgresServer:
    """A server in its own folder. `new_database()` gives the address of an empty database."""

    def __init__(self, binaries: Path, user: str | None) -> None:
        self._binaries = binaries
        self._user = user
        self._numbers = itertools.count()
        self.folder = Path(tempfile.mkdtemp(prefix="flywheel-pg-", dir="/tmp"))  # a socket's path must be short
        if user:
            shutil.chown(self.folder, user, pwd.getpwnam(user).pw_gid)
        self.data = self.folder / "data"
        self._run("initdb", "-D", self.data, "-U", "flywheel", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "-N")
        self.start()

    def start(self) -> None:
        """Start the server and wait until it answers (after a crash: until it has recovered)."""
        settings = " ".join(f"-c {setting}" for setting in (*_SETTINGS, f"unix_socket_directories={self.folder}"))
        self._run("pg_ctl", "start", "-w", "-D", self.data, "-l", self.folder / "log", "-o", settings)

    def stop(self, mode: str = "fast") -> None:
        """Stop the server; `immediate` is a crash: nothing is flushed, the log is replayed at the next start."""
        self._run("pg_ctl", "stop", "-w", "-D", self.data, "-m", mode)

    def new_database(self) -> str:
        """The address of an empty schema: to a store the same as an empty database, and a hundred times faster."""
        import psycopg  # noqa: PLC0415 - only where a server is wanted

        name = f"store_{next(self._numbers)}"
        address = f"postgresql://flywheel@/postgres?host={self.folder}"
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}")
        return f"{address}&options=-csearch_path%3D{name}"

    def close(self) -> None:
        self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str | Path) -> None:
        done = subprocess.run(
            [self._binaries / program, *arguments], user=self._user, cwd=self.folder, text=True, timeout=60,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{program} failed: {done.stderr}")


def _binaries() -> Path | None:
    """Where Debian and others keep the server's programs."""
    if found := shutil.which("initdb"):
        return Path(found).parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return versions[-1].parent if versions else None


def _unprivileged() -> str | None:
    """The user to run as: None is the present one. Root borrows `postgres`, or whoever has a home to run in."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    if not names & {"postgres", "nobody"}:
        pytest.skip("PostgreSQL does not run as root, and there is neither a user postgres nor nobody")
    return "postgres" if "postgres" in names else "nobody"


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """The session's PostgreSQL server."""
    binaries = _binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL server on this machine: install Debian's package postgresql")
    server = PostgresServer(binaries, _unprivileged())
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """Where a new store may be: a test that asks for it runs on both databases."""
    if request.param == "sqlite":
        return tmp_path / "flywheel.db"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.new_database()


@pytest.fixture
def new_where(where: Path | str, request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Path | str]:
    """As `where`, for tests that need several empty stores of one kind."""
    numbers = itertools.count()
    if isinstance(where, Path):
        return lambda: tmp_path / f"more-{next(numbers)}.db"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.new_database
