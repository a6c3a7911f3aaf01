"""A stage's function in several processes: what comes back, and what is said of those that fail or die."""

import multiprocessing
import os
import pickle
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import launch_jobs
import pytest

from characterflywheel.config import FlywheelConfig, ParallelConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.phases import herding
from characterflywheel.pipeline import Work
from characterflywheel.training.launch import Failure, Later, _explain, command, opened, spread
from characterflywheel.workshop import Workshop
from characterflywheel.workspace import Workspace

TWO = ParallelConfig(processes=2)
FAILED = """E1123 torch/distributed/elastic/multiprocessing/api.py: failed (exitcode: -9) local_rank: 1 (pid: 77)
Root Cause (first observed failure):
[0]:
  time      : 2026-11-23_15:11:04
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 77)
"""


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def silent(done: int, total: int, /) -> None:
    """Tests that do not ask about progress."""


def test_one_process_is_this_one(tmp_path: Path) -> None:
    """No worker is started, and what workers would open for themselves is opened here."""
    heard: list[int] = []
    value = spread(
        ParallelConfig(), launch_jobs.add, Work(tmp_path, 1), [1, 2, 3], Later(launch_jobs.open_offset), threads=4,
        device="cpu", on_progress=lambda done, total: heard.append(done),
    )  # fmt: skip
    assert (value, heard) == ((9.0, 4), [1, 2])
    assert not (tmp_path / ".partial").exists()


def test_a_worker_opens_the_reward_models_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what the command sends, RL's judge and the gold model are two parts of one thing, safety another."""
    made: list[str] = []

    def open_rewards(config: object, work: object, encoder: object, threads: int, device: str) -> SimpleNamespace:
        made.append(device)
        return SimpleNamespace(pointwise=f"pointwise {len(made)}", gold=f"gold {len(made)}")

    monkeypatch.setattr(herding, "open_rewards", open_rewards)
    monkeypatch.setattr(herding, "shared_encoder", lambda *place: None)
    monkeypatch.setattr(herding, "encoder_folder", lambda spec: tmp_path)
    shop = Workshop(Workspace(tmp_path), FlywheelConfig(parallel=TWO), None, None, 1)
    pointwise, safety, gold = pickle.loads(pickle.dumps(herding.judges(shop, Work(tmp_path, 1))))
    arguments, settings = opened([1, pointwise, safety], {"gold": gold, "threads": 4}, "cuda:1")
    assert arguments[:2] == [1, "pointwise 1"]
    assert type(arguments[2]).__name__ == "SafetyPolicy"
    assert settings == {"gold": "gold 1", "threads": 4}
    assert made == ["cuda:1"]


def test_torchrun_starts_the_workers_unless_config_says_who(tmp_path: Path) -> None:
    words = command(ParallelConfig(processes=8), tmp_path / "job")
    assert words[0] == sys.executable
    assert words[1:] == [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=8", "-m", "characterflywheel.training.worker",
        str(tmp_path / "job"),
    ]  # fmt: skip
    ours = ParallelConfig(processes=16, launch=("srun", "torchrun", "--nnodes=2"))
    assert command(ours, Path("job")) == [
        "srun", "torchrun", "--nnodes=2", "-m", "characterflywheel.training.worker", "job",
    ]  # fmt: skip


def test_a_command_that_does_not_exist_is_a_clear_error(tmp_path: Path) -> None:
    config = ParallelConfig(processes=2, launch=("no-such-launcher",))
    with pytest.raises(FlywheelError, match=r"'no-such-launcher' cannot be started .*launch"):
        spread(config, launch_jobs.add, Work(tmp_path, 1), [1.0], 0.0, threads=1, on_progress=silent)


def test_a_command_that_starts_no_workers_is_a_clear_error(tmp_path: Path) -> None:
    config = ParallelConfig(processes=2, launch=(sys.executable, "-c", "raise SystemExit(5)"))
    with pytest.raises(FlywheelError, match=r"ended with status 5 and without a result; log: .*workers.log"):
        spread(config, launch_jobs.add, Work(tmp_path, 1), [1.0], 0.0, threads=1, on_progress=silent)


@pytest.mark.parametrize(
    ("failure", "log", "said"),
    [
        (Failure(0, "rate == -1, must be > 0.", "trace"), "", "^rate == -1, must be > 0.$"),
        (Failure(0, None, "RuntimeError: Connection closed by peer"), FAILED, "worker 1 was ended by SIGKILL .*memory"),
        (Failure(1, None, "Traceback\nKeyError: 'x'\n"), "nothing", "worker 1 failed: KeyError: 'x'"),
    ],
)
def test_what_is_said_of_a_failure(failure: Failure, log: str, said: str, tmp_path: Path) -> None:
    """A user's error in its own words; a killed worker before the others' lost connections."""
    (tmp_path / "log").write_text(log, "utf-8")
    with pytest.raises(FlywheelError, match=said):
        raise FlywheelError(_explain(1, failure, tmp_path / "log"))


@pytest.mark.slow
def test_workers_do_it_together(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    work = Work(tmp_path, 1)
    value = spread(
        TWO, launch_jobs.add, work, [1.0, 2.0, 3.0], Later(launch_jobs.open_offset), threads=4, device="cpu",
        on_progress=lambda done, total: heard.append((done, total)),
    )  # fmt: skip
    assert (value, heard) == ((9.0, 2), [(1, 2), (2, 2)])
    assert work.notes["device"] == "cpu"
    assert work.notes["trained by"].startswith("2 processes, sharding none, ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "said"),
    [
        (launch_jobs.refuse, "^rate == -1, must be > 0.$"),
        (launch_jobs.crash, "worker 1 failed: ZeroDivisionError: a programmer's mistake; log: .*Run the same command"),
        (launch_jobs.die, "worker 1 was ended by SIGKILL .*memory.*Run the same command again"),
    ],
)
def test_a_worker_that_fails_ends_all(function, said: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(FlywheelError, match=said):
        spread(TWO, function, Work(tmp_path, 1), 1, on_progress=silent)


def _spread_wait(folder: Path) -> None:
    spread(TWO, launch_jobs.wait, Work(folder, 1), on_progress=silent)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_command(how: signal.Signals, tmp_path: Path) -> None:
    """Killed outright or by Ctrl-C, it leaves nobody behind."""
    command = multiprocessing.get_context("spawn").Process(target=_spread_wait, args=(tmp_path,))
    command.start()
    deadline = time.monotonic() + 120
    while len(launch_jobs.pids(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = launch_jobs.pids(tmp_path)
    assert len(workers) == 2
    assert command.pid is not None
    os.kill(command.pid, how)
    command.join(60)
    deadline = time.monotonic() + 60
    while any(_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_alive(pid) for pid in workers)


def _alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text("utf-8")
    except OSError:
        return False
