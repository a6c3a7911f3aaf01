import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from characterflywheel import ids, pipeline
from characterflywheel.pipeline import Runner, Stage, Work, output_hashes, summary_line, write_atomically
from characterflywheel.records import ChatMessage, Record


class Settings(Record):
    words: int = 3


class Count(Record):
    lines: int


class Killed(BaseException):
    """As a kill: nothing in the pipeline may catch it."""


def write(work: Work) -> Count:
    (work.folder / "out.txt").write_text(f"{work.seed}\n", encoding="utf-8")
    return Count(lines=1)


def stage(
    run: Callable[[Work], Count] = write, *, name: str = "sft", version: int = 1, config: BaseModel = Settings(),
    seed: int = 1, inputs: dict[str, Stage[Any]] | None = None, external: dict[str, str] | None = None,
) -> Stage[Count]:  # fmt: skip
    return Stage(name, version, config, Count, run, seed, inputs or {}, external or {})


def test_what_a_stage_notes_is_kept_beside_its_identity(tmp_path: Path) -> None:
    def noting(work: Work) -> Count:
        work.notes["scores"] = "elsewhere"
        return write(work)

    made = Runner(tmp_path).run(stage(noting))
    assert made.record.notes == {"scores": "elsewhere"}
    assert made.record.hash == stage().hash
    file = made.folder / "artifact.json"
    old = json.loads(file.read_text(encoding="utf-8"))
    del old["notes"]
    file.write_text(json.dumps(old), encoding="utf-8")
    assert Runner(tmp_path).load(stage()).record.notes == {}, "what an older version wrote can be read"


def test_a_done_stage_is_not_run_again(tmp_path: Path) -> None:
    runs, said = [], []

    def run(work: Work) -> Count:
        runs.append(work.folder)
        return write(work)

    runner = Runner(tmp_path, lambda name, line: said.append(f"{name}: {line}"))
    first = runner.run(stage(run))
    second = Runner(tmp_path, lambda name, line: said.append(f"{name}: {line}")).run(stage(run))
    assert len(runs) == 1
    assert first == second
    assert second.summary == Count(lines=1)
    assert said[0].endswith("s · lines 1")
    assert said[1] == "sft: done before · lines 1"


def test_the_record_says_where_the_output_came_from(tmp_path: Path) -> None:
    source = stage(name="curate")
    runner = Runner(tmp_path)
    runner.run(source)
    made = runner.run(stage(inputs={"prompts": source}, external={"parent": "base"}))
    record = json.loads((made / "artifact.json").read_text("utf-8"))
    assert record["stage"] == "sft"
    assert record["inputs"] == {"prompts": source.hash, "parent": "base"}
    assert record["config"] == {"words": 3}
    assert record["summary"] == {"lines": 1}
    assert record["outputs"] == {"out.txt": hashlib.sha256((made / "out.txt").read_bytes()).hexdigest()}
    assert (record["seed"], record["version"]) == (1, 1)
    assert record["packages"]["torch"]
    assert made.folder.name == f"sft-{record['hash']}"


def test_a_stage_sees_its_declared_inputs_and_its_own_seed(tmp_path: Path) -> None:
    source = stage(name="curate")

    def run(work: Work) -> Count:
        assert set(work.inputs) == {"prompts"}
        assert (work.inputs["prompts"] / "out.txt").exists()
        assert work.inputs["prompts"].summary == Count(lines=1)
        assert work.seed == ids.derive_seed(1, "sft")
        return Count(lines=0)

    runner = Runner(tmp_path)
    runner.run(source)
    assert runner.run(stage(run, inputs={"prompts": source})).summary == Count(lines=0)


def test_an_input_that_is_not_complete_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="curate"):
        Runner(tmp_path).run(stage(inputs={"prompts": stage(name="curate")}))


@pytest.mark.parametrize(
    "other",
    [
        stage(version=2), stage(config=Settings(words=4)), stage(seed=2), stage(name="dpo"),
        stage(external={"parent": "base"}), stage(inputs={"prompts": stage(name="curate")}),
        stage(inputs={"prompts": stage(name="curate", seed=2)}),
    ],
)  # fmt: skip
def test_a_changed_identity_is_a_new_folder(other: Stage[Count], tmp_path: Path) -> None:
    assert other.hash != stage().hash
    runner = Runner(tmp_path)
    runner.run(stage())
    assert not runner.is_complete(other)
    assert runner.folder(other) != runner.folder(stage())


def test_identity_reaches_through_inputs_and_ignores_order() -> None:
    def last(seed: int, roles: tuple[str, ...]) -> str:
        one = {"a": stage(name="a", seed=seed), "b": stage(name="b")}
        middle = stage(name="middle", inputs={role: one[role] for role in roles})
        return stage(inputs={"x": middle}).hash

    assert last(1, ("a", "b")) == last(1, ("b", "a"))
    assert last(1, ("a", "b")) != last(2, ("a", "b"))


def test_a_killed_stage_leaves_no_record_and_starts_clean_but_keeps_partial(tmp_path: Path) -> None:
    alive = False

    def run(work: Work) -> Count:
        seen = sorted(p.name for p in work.folder.iterdir())
        if not alive:
            (work.partial / "learner.pt").write_text("step 3", encoding="utf-8")
            (work.folder / "model").mkdir()
            (work.folder / "model" / "weights").write_text("half", encoding="utf-8")
            (work.folder / "half.parquet").write_text("half", encoding="utf-8")
            raise Killed
        assert seen == [".partial"]
        assert (work.partial / "learner.pt").read_text("utf-8") == "step 3"
        return write(work)

    runner, mine = Runner(tmp_path), stage(run)
    with pytest.raises(Killed):
        runner.run(mine)
    assert not runner.is_complete(mine)
    alive = True
    made = runner.run(mine)
    assert sorted(p.name for p in made.folder.iterdir()) == ["artifact.json", "out.txt"]
    assert set(made.record.outputs) == {"out.txt"}


def test_the_record_is_written_last_and_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed just before the rename, the stage is not complete, and the next run does it again."""
    runner, replace = Runner(tmp_path), Path.replace

    def dies(self: Path, target: Path) -> Path:
        assert target.name == "artifact.json"
        assert (target.parent / "out.txt").exists()
        assert json.loads(self.read_text("utf-8"))["stage"] == "sft"
        raise Killed

    monkeypatch.setattr(Path, "replace", dies)
    with pytest.raises(Killed):
        runner.run(stage())
    assert not runner.is_complete(stage())
    monkeypatch.setattr(Path, "replace", replace)
    assert sorted(p.name for p in runner.run(stage()).folder.iterdir()) == ["artifact.json", "out.txt"]


KILLED = """
import os, signal, sys
from pathlib import Path
from characterflywheel import pipeline
from test_pipeline import stage, trained

module = getattr(pipeline, sys.argv[2])
setattr(module, sys.argv[3], lambda *arguments, **more: os.kill(os.getpid(), signal.SIGKILL))
pipeline.Runner(Path(sys.argv[1])).run(stage(trained))
"""


def killed(root: Path, module: str, name: str) -> None:
    """Run the stage in a process that dies where `pipeline` calls this function of a module."""
    words = [sys.executable, "-c", KILLED, str(root), module, name]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=False)
    assert done.returncode == -signal.SIGKILL


def trained(work: Work) -> Count:
    """Hours of work, whose every step is kept; says how many it had to do."""
    kept = work.partial / "steps"
    done = int(kept.read_text("utf-8")) if kept.exists() else 0
    kept.write_text("3", encoding="utf-8")
    (work.folder / "model").mkdir()
    (work.folder / "model" / "weights").write_text("after 3 steps", encoding="utf-8")
    return Count(lines=3 - done)


@pytest.mark.parametrize(("module", "name"), [("hashlib", "file_digest"), ("os", "fsync")])
def test_training_that_is_killed_while_its_record_is_made_is_not_done_again(
    module: str, name: str, tmp_path: Path
) -> None:
    """Files of hundreds of gigabytes take minutes to hash: until the record is there, so are the partial results."""
    killed(tmp_path, module, name)
    runner, mine = Runner(tmp_path), stage(trained)
    assert not runner.is_complete(mine)
    made = runner.run(mine)
    assert made.summary == Count(lines=0), "no step had to be done again"
    assert set(made.record.outputs) == {"model/weights"}
    assert sorted(p.name for p in made.folder.iterdir()) == ["artifact.json", "model"]


def test_partial_results_beside_a_record_go_with_the_next_load(tmp_path: Path) -> None:
    """Killed between the record and their removal."""
    killed(tmp_path, "shutil", "rmtree")
    runner, mine = Runner(tmp_path), stage(trained)
    folder = runner.folder(mine)
    assert sorted(p.name for p in folder.iterdir()) == [".partial", "artifact.json", "model"]
    assert set(output_hashes(folder)) == {"model/weights"}
    assert runner.run(mine).summary == Count(lines=3), "it is complete"
    assert sorted(p.name for p in folder.iterdir()) == ["artifact.json", "model"]


def test_the_record_waits_until_all_files_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `fsync` is asked for in turn: every file and folder, then the record, then the folder that it is named in;
    partial results are there until after that."""
    synced: list[str] = []

    def notes(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append(path.relative_to(tmp_path.resolve()).as_posix())
        assert (path.parent if path.is_file() else path).exists()
        assert (runner.folder(mine) / ".partial" / "steps").exists()

    runner, mine = Runner(tmp_path), stage(trained)
    monkeypatch.setattr(pipeline.os, "fsync", notes)
    runner.run(mine)
    *files, record, last = synced
    name = mine.folder_name
    assert set(files) == {f"{name}/model/weights", f"{name}/model", name, "."}
    assert (record, last) == (f"{name}/artifact.json.writing", name)


def test_what_was_paid_for_is_not_paid_for_twice(tmp_path: Path) -> None:
    made = []

    def make() -> list[ChatMessage]:
        made.append(1)
        return [ChatMessage(role="assistant", content="dear ✨")]

    work = Work(tmp_path / "sft", 1)
    first = work.resumed("rows", ChatMessage, make)
    assert work.resumed("rows", ChatMessage, make) == first == make()[:1]
    assert len(made) == 2

    def dies() -> list[ChatMessage]:
        raise Killed

    with pytest.raises(Killed):
        work.resumed("other", ChatMessage, dies)
    assert work.resumed("other", ChatMessage, make) == first


def test_hashes_cover_every_file_below(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"1")
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "artifact.json").write_bytes(b"{}")
    empty = hashlib.sha256(b"").hexdigest()
    assert output_hashes(tmp_path) == {"b.txt": empty, "model/weights": hashlib.sha256(b"1").hexdigest()}


def test_an_atomic_write_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "registry.json"
    write_atomically(path, "old")
    write_atomically(path, "new ✨")
    assert path.read_text("utf-8") == "new ✨"
    assert os.listdir(tmp_path) == ["registry.json"]


def test_a_summary_says_its_own_line_or_its_numbers() -> None:
    class Told(Record):
        steps: int
        mean_loss: float
        parts: tuple[int, ...] = ()

    class Worded(Told):
        def line(self) -> str:
            return f"after {self.steps} steps"

    assert summary_line(Told(steps=3, mean_loss=0.12345)) == "steps 3, mean loss 0.123"
    assert summary_line(Worded(steps=3, mean_loss=0.1)) == "after 3 steps"
