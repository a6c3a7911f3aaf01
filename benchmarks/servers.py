"""Real servers in processes of their own, for the benchmarks of the chat service: ours, the mock upstream, PostgreSQL.

A server is ready when its readiness address answers; its log goes to a file, whose end is shown where it fails.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
FLYWHEEL = (sys.executable, "-m", "characterflywheel.cli")
CHARACTER = "lighthouse"


@dataclass
class Server:
    """A process that listens. `url` is the base of its OpenAI-compatible API."""

    name: str
    command: Sequence[str]
    url: str
    ready: str
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)
    process: "subprocess.Popen[bytes] | None" = None

    def start(self, patience: float = 60.0) -> float:
        """Start and wait until it is ready; returns the seconds that took."""
        began = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env={**os.environ, **self.env},
                start_new_session=True,
            )  # fmt: skip
        while not _answers(self.ready):
            if self.process.poll() is not None or time.monotonic() - began > patience:
                tail = self.log.read_text(encoding="utf-8", errors="replace")[-3000:]
                self.kill()
                raise RuntimeError(f"{self.name} is not ready after {time.monotonic() - began:.0f} s: {tail}")
            time.sleep(0.02)
        return time.monotonic() - began

    def kill(self) -> None:
        """SIGKILL: no chance to finish anything."""
        self._end(signal.SIGKILL)

    def stop(self, patience: float = 20.0) -> float:
        """SIGTERM, as an operator stops a service; returns the seconds until it was gone."""
        began = time.monotonic()
        self._end(signal.SIGTERM, patience)
        return time.monotonic() - began

    def cpu(self) -> float:
        """Processor seconds used so far."""
        assert self.process is not None
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def memory(self) -> int:
        """Resident bytes now."""
        assert self.process is not None
        return int(Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE

    def _end(self, how: signal.Signals, patience: float = 20.0) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)  # a tracer and what it traces
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    """A started server, ended afterwards."""
    server.start()
    try:
        yield server
    finally:
        server.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def workspace(folder: Path, settings: str = "") -> str:
    """Make a workspace whose `flywheel.toml` ends with `settings` (TOML); returns an API key for chatting."""
    _flywheel("init", str(folder), "--preset", "tiny")
    (folder / "flywheel.toml").write_text(f'preset = "tiny"\n{settings}', encoding="utf-8")
    return key(folder, "chat")


def key(folder: Path, *scopes: str) -> str:
    """A new API key of a workspace, for an application."""
    return _flywheel("keys", "create", str(folder), *(x for scope in scopes for x in ("--scope", scope))).split()[0]


def flywheel(folder: Path, *options: str, port: int | None = None, prefix: Sequence[str] = ()) -> Server:
    """`flywheel serve FOLDER`, not started; `prefix` is a command that runs it, such as a tracer."""
    port = port or free_port()
    base = f"http://127.0.0.1:{port}"
    command = [*prefix, *FLYWHEEL, "serve", str(folder), "--port", str(port), *options]
    return Server("flywheel", command, f"{base}/v1", f"{base}/readyz", folder / "server.log", {"OMP_NUM_THREADS": "1"})


def mock_upstream(folder: Path, *options: str) -> Server:
    """The mock model server, not started."""
    port = free_port()
    script = str(Path(__file__).with_name("mock_upstream.py"))
    base = f"http://127.0.0.1:{port}/v1"
    command = [sys.executable, script, "--port", str(port), *options]
    return Server("mock", command, base, f"{base}/models", folder / "mock.log")


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A PostgreSQL of our own with its defaults (fsync on), in `folder`; gives the address of its database.

    The server refuses to run as root, who becomes the system's user `postgres` for it.
    """
    folder.mkdir(parents=True)
    as_user: tuple[str, ...] = ()
    if os.geteuid() == 0:
        as_user = ("runuser", "-u", "postgres", "--")
        shutil.chown(folder, "postgres")
        for parent in folder.parents:
            if not parent.stat().st_mode & 0o001:
                parent.chmod(parent.stat().st_mode | 0o011)
    data, port = folder / "data", free_port()
    _quietly(*as_user, _program("initdb"), "-D", str(data), "-A", "trust", "-U", "flywheel", "-E", "UTF8")
    settings = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories="
    control = (*as_user, _program("pg_ctl"), "-D", str(data), "-w")
    _quietly(*control, "-l", str(folder / "log"), "-o", settings, "start")
    try:
        yield f"postgresql://flywheel@127.0.0.1:{port}/postgres"
    finally:
        _quietly(*control, "-m", "fast", "stop")


def has_postgres() -> bool:
    return any(_programs("initdb"))


def _programs(name: str) -> list[str]:
    found = [shutil.which(name), *map(str, sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True))]
    return [path for path in found if path]


def _program(name: str) -> str:
    return _programs(name)[0]


def _quietly(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout[-1000:]}{done.stderr[-1000:]}")


def _flywheel(*arguments: str) -> str:
    done = subprocess.run([*FLYWHEEL, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"flywheel {' '.join(arguments)}: {done.stderr[-2000:]}")
    return done.stdout


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
