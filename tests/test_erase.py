"""Erasure: what is left of a workspace is what it would be had the erased never come, whatever happens on the way."""

import json
import subprocess
import sys
import tempfile
import threading
from datetime import timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import IntegrityError

import erasure_fixture as made
from characterflywheel import cli, erase, tables
from characterflywheel.errors import FlywheelError
from characterflywheel.records import Dropped, User
from characterflywheel.store import EventStore, Position
from characterflywheel.workspace import Workspace

ANNA, BOB = "anna-1990@example.org", "bob-1984@example.org"
SECRET = "My grandmother kept bees behind the lighthouse."
OTHER = "Nobody else has ever seen my collection of kites."
SAID = {ANNA: [SECRET, "yes", f"{SECRET} She did!", "I was born in Aix, in 1990, on a Sunday."], BOB: [OTHER, "yes"]}
IDS = (ANNA, "1", "user", "mo", 'an"na\\ <b>é</b>', "annalongname", f"{BOB}x", "Ω≈ç√∫˜µ≤≥12")
TEXTS = st.lists(st.sampled_from([SECRET, OTHER, "yes", f"{OTHER} {SECRET}"]) | st.text(max_size=60), max_size=4)


def equal_but_for_erasures(left: Workspace, never: Workspace) -> None:
    """Every table, file kept aside and row of the store is the same in both."""
    assert _people(left) == _people(never)
    assert made.stored(left) == made.stored(never)
    for name in ("old-12345678.rejected", "old-12345678.errors.txt"):
        ours, theirs = ((space.rejected / name).read_text("utf-8") for space in (left, never))
        assert len(ours.splitlines()) == len(theirs.splitlines())
        assert ours == theirs or name.endswith(".txt")


def _people(space: Workspace) -> dict[str, object]:
    """Every table that has rows; characters are nobody's."""
    return {name: rows for name, rows in made.rows(space.root).items() if rows and "characters" not in name}


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(user=st.sampled_from(IDS), theirs=TEXTS, others=TEXTS)
@example(user='an"na\\ <b>é</b>', theirs=['He said: "no", <b>never</b> \\ ever\n\n& left\ttown'], others=["yes"])
@example(user="user", theirs=[SECRET], others=[f"You know: {SECRET}", "user"])
def test_a_workspace_is_as_if_the_user_had_never_come(user: str, theirs: list[str], others: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        left = made.build(Path(folder) / "w", {user: theirs, BOB: others})
        never = made.build(Path(folder) / "never", {BOB: others})
        done = erase.forget(left, user)
        equal_but_for_erasures(left, never)
        assert done.proof.left == ()
        assert done.rows["users"] == 1
        assert done.rows.get("messages", 0) == 2 * len(theirs)


def test_no_byte_of_the_user_is_left_anywhere(tmp_path: Path) -> None:
    space = made.build(tmp_path / "w", SAID)
    before = space.database.read_bytes()
    assert SECRET.encode() in before
    done = erase.forget(space, ANNA)
    assert done.proof.left == ()
    assert done.proof.texts >= 3
    assert (done.proof.files, done.proof.ids) > (30, 30)
    for path in (path for path in space.root.rglob("*") if path.is_file()):
        content = path.read_bytes()
        assert not [word for word in (SECRET, ANNA, "born in Aix") if word.encode() in content], path
    assert not (space.root / ".erasing.json").exists()
    assert not list(space.artifacts.glob("rl-*"))  # was not complete: begins again
    assert done.begun_again == ("artifacts/rl-0000000000ff",)
    assert not (space.report / "index.html").exists()  # it could not be written without a ledger


def test_what_a_kill_left_beside_a_finished_stage_is_erased(tmp_path: Path) -> None:
    space = made.build(tmp_path / "w", SAID)
    finished = next(space.artifacts.glob("*/artifact.json")).parent
    (finished / ".partial").mkdir()
    (finished / ".partial" / "drawn-000001.jsonl").write_text(f'{{"text": "{SECRET}"}}\n', encoding="utf-8")
    assert erase.forget(space, ANNA).proof.left == ()
    assert not (finished / ".partial").exists()
    assert (finished / "artifact.json").exists()


def test_the_artifact_says_what_was_taken_out_and_stays_what_it_is(tmp_path: Path) -> None:
    space = made.build(tmp_path / "w", SAID)
    done = erase.forget(space, ANNA)
    for name, folder in made.FOLDERS.items():
        record = json.loads((space.artifacts / folder / "artifact.json").read_text())
        assert record["hash"] == folder.rpartition("-")[2]
        assert record["outputs"] == made.output_hashes(space.artifacts / folder), name
    record = json.loads((space.artifacts / made.FOLDERS["curate"] / "artifact.json").read_text())
    assert record["erased"] == {done.id: {"prompts.parquet": 2, "dropped.parquet": 2}}


@pytest.mark.parametrize(("split", "learnt"), [("train", {"reward", "sft", "dpo"}), ("evaluate", {"sft", "dpo"})])
def test_models_that_learnt_are_named_and_those_that_held_the_user_out_are_not(
    split: str, learnt: set[str], tmp_path: Path
) -> None:
    """The fixture's annotate stage has rows of every split, which the real one has not; so sft and dpo learnt."""
    space = made.build(tmp_path / "w", SAID, split=split)
    models = {one.folder.removeprefix("artifacts/"): one.why for one in erase.forget(space, ANNA).models}
    if split == "evaluate":
        assert "made from sft" in models[made.FOLDERS["dpo"]] or "annotate" in models[made.FOLDERS["dpo"]]
    assert {name for name, folder in made.FOLDERS.items() if folder in models} == learnt


def test_rows_of_others_that_mention_an_erased_row_go_too_but_nothing_after_them(tmp_path: Path) -> None:
    space = made.build(tmp_path / "w", SAID)
    file = space.artifacts / made.FOLDERS["curate"] / "dropped.parquet"
    rows = tables.read(file, Dropped)
    bobs = rows[-1].model_copy(update={"detail": f"of {rows[0].id}"})
    tables.write(file, Dropped, [*rows[:-1], bobs])
    erase.forget(space, ANNA)
    assert tables.read(file, Dropped) == []
    assert len(pq.read_table(space.artifacts / made.FOLDERS["traffic"] / "messages.parquet")) == 4


def test_a_text_found_in_a_foreign_file_is_named_and_the_command_goes_on_when_it_is_gone(tmp_path: Path) -> None:
    space = made.build(tmp_path / "w", SAID)
    note = space.root / "notes.txt"
    note.write_text(f"remember: {SECRET}")
    with pytest.raises(FlywheelError, match=r"1 places still hold .*notes\.txt: a text, 1 times"):
        erase.forget(space, ANNA)
    assert erase.erasures(space) == []
    note.unlink()
    done = erase.forget(space, ANNA)
    assert done.rows["messages"] == 8
    assert done.files["artifacts/traffic-00000000000a/messages.parquet"] == 8
    assert not (space.root / ".erasing.json").exists()


def test_only_a_salted_digest_tells_who_was_erased(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = made.build(tmp_path / "w", SAID)

    def forget(user: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main(["forget", str(space.root), user])
        return int(stop.value.code or 0), *capsys.readouterr()

    code, out, _ = forget(ANNA)
    assert code == 0
    assert "cannot be unlearnt: 3 models" in out
    assert "not found" in out
    assert ANNA not in (space.root / "erasures.jsonl").read_text()
    code, out, _ = forget(ANNA)
    assert code == 0
    assert out.startswith("erased before: ")
    code, _, error = forget("nobody")
    assert code == 1
    assert error == f"flywheel: user 'nobody' is neither in the store nor in any file of {space.root}.\n"
    with EventStore.open(space.database) as store:
        made.speak(store, ANNA, ["I am back, and I have brought a new kite along."], made.NOW + timedelta(days=1))
    code, out, _ = forget(ANNA)
    assert code == 0
    assert "messages 2" in out
    assert len(erase.erasures(space)) == 2


def test_an_export_of_the_same_window_brings_nobody_back(tmp_path: Path) -> None:
    space = made.build(tmp_path / "w", SAID)
    with EventStore.open(space.database) as store:
        until = store.position()
    erase.forget(space, BOB)  # whose rows were the newest
    with EventStore.open(space.database) as store:
        assert store.position().messages < until.messages
        store.export(tmp_path / "again", Position(), until)
        made.speak(store, "carl-1977", ["What comes after a window is not in it."], made.NOW)
        store.export(tmp_path / "next", until, store.position())
    assert [user.id for user in tables.read(tmp_path / "again" / "users.parquet", User)] == [ANNA]
    assert [user.id for user in tables.read(tmp_path / "next" / "users.parquet", User)] == ["carl-1977"]


def test_a_run_that_has_the_workspace_is_waited_for_by_name(tmp_path: Path) -> None:
    space = made.build(tmp_path / "w", SAID)
    with space.locked(), pytest.raises(FlywheelError, match=r"is in use by process \d+"):
        erase.forget(space, ANNA)


def test_a_service_goes_on_reading_and_writing(tmp_path: Path) -> None:
    space = made.build(tmp_path / "w", SAID)
    stop, written, wrong = threading.Event(), [], []

    def serve() -> None:
        with EventStore.open(space.database) as store:
            while not stop.is_set():
                try:
                    made.speak(store, f"guest-{len(written)}", ["Good evening, is anybody at home in here?"], made.NOW)
                    store.conversations_of(f"guest-{len(written)}", 10)
                    written.append(1)
                except Exception as error:  # told to the test
                    wrong.append(error)
                    return

    service = threading.Thread(target=serve)
    service.start()
    try:
        assert erase.forget(space, ANNA).proof.left == ()
    finally:
        stop.set()
        service.join()
    assert wrong == []
    with EventStore.open(space.database) as store, store.read() as connection:
        count = connection.exec_driver_sql("SELECT count(*) FROM users WHERE id LIKE 'guest-%'").scalar_one()
    assert count == len(written) > 0


KILL = """
import os, signal, sys
from pathlib import Path
from characterflywheel import erase, erase_files, proof
from characterflywheel.store import erase as stored
from characterflywheel.workspace import Workspace

def die_after(module, name, calls, before):
    real, seen = getattr(module, name), []
    def run(*arguments, **named):
        seen.append(1)
        if before and len(seen) == calls: os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **named)
        if len(seen) == calls: os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(module, name, run)

where, calls, before = sys.argv[3], int(sys.argv[4]), sys.argv[5] == "before"
die_after({"erase": erase, "erase_files": erase_files, "proof": proof, "stored": stored}[where.split(".")[0]],
          where.split(".")[1], calls, before)
erase.forget(Workspace.open(Path(sys.argv[1])), sys.argv[2])
"""
MOMENTS = [
    ("erase._save", 1, "after"), ("erase_files.take_out", 7, "after"), ("proof.prove", 1, "after"),
    ("stored.erase", 1, "after"), ("erase_files.take_out", 1, "before"), ("erase_files.note_in_artifacts", 1, "after"),
    ("stored.compact", 1, "before"),
]  # fmt: skip


@pytest.mark.parametrize("moments", [MOMENTS[:3], pytest.param(MOMENTS[3:], marks=pytest.mark.slow)])
def test_a_killed_erasure_goes_on_and_ends_as_an_undisturbed_one(
    moments: list[tuple[str, int, str]], tmp_path: Path
) -> None:
    """`kill -9` at seven moments, each in a process of its own, and the same counts in the end."""
    calm = erase.forget(made.build(tmp_path / "calm", SAID), ANNA)
    never = made.build(tmp_path / "never", {BOB: SAID[BOB]})
    spaces = [made.build(tmp_path / f"killed-{number}", SAID) for number in range(len(moments))]
    killed = [
        subprocess.Popen([sys.executable, "-c", KILL, str(space.root), ANNA, where, str(calls), when])
        for space, (where, calls, when) in zip(spaces, moments, strict=True)
    ]
    assert [process.wait() for process in killed] == [-9] * len(moments)
    for number, space in enumerate(spaces):
        assert (space.root / ".erasing.json").exists()
        # whoever is named next, the killed erasure is completed first
        done = erase.forget(space, ANNA) if number % 2 else _after_another(space)
        assert (done.rows, done.files, done.models) == (calm.rows, calm.files, calm.models)
        assert len(erase.erasures(space)) == 1
        equal_but_for_erasures(space, never)


def _after_another(space: Workspace) -> erase.Erasure:
    with pytest.raises(FlywheelError, match="neither in the store"):
        erase.forget(space, "somebody-else")
    return erase.forget(space, ANNA)


def test_both_databases_forget(where: Path | str, tmp_path: Path) -> None:
    url = None if isinstance(where, Path) else where
    space = made.build(tmp_path / "w", SAID, url)
    never = made.build(tmp_path / "never", {BOB: SAID[BOB]}) if url is None else None
    done = erase.forget(space, ANNA)
    assert done.proof.left == ()
    assert done.rows == {
        "conversations": 4, "exposures": 1, "keys": 1, "messages": 8, "moderations": 4, "remembered": 4, "signals": 4,
        "tips": 4, "users": 1,
    }  # fmt: skip
    kept = made.stored(space)
    assert {len(kept[name]) for name in ("conversations", "signals", "tips")} == {2}
    if never:
        equal_but_for_erasures(space, never)
    with (
        EventStore.open(where if url else space.database) as store,
        pytest.raises(IntegrityError, match="append-only"),
        store.write() as connection,
    ):
        connection.exec_driver_sql("DELETE FROM messages")


def test_conversations_that_nobody_touches_are_erased_everywhere(where: Path | str, tmp_path: Path) -> None:
    url = None if isinstance(where, Path) else where
    space = made.build(tmp_path / "w", SAID, url)
    with EventStore.open(url or space.database) as store:
        made.speak(store, "carl-1977", ["I have only just begun to talk in here."], made.NOW + timedelta(days=29))
    with pytest.raises(FlywheelError, match=r"not set: give --days N, or server\.retention_days"):
        erase.retain(space)
    assert erase.retain(space, 30, made.NOW + timedelta(days=29)) is None
    done = erase.retain(space, 30, made.NOW + timedelta(days=31))
    assert done is not None
    assert (done.digest, done.proof.left) == (None, ())
    assert done.rows["conversations"] == 6
    kept = made.stored(space)
    assert len(kept["users"]) == 3  # people stay, their exposures too
    assert [len(kept[name]) for name in ("conversations", "messages", "tips", "remembered")] == [1, 2, 1, 1]
    files = {name: len(rows) for name, rows in made.rows(space.root).items() if rows}
    assert {name.rpartition("/")[2]: n for name, n in files.items()} == {
        "characters.jsonl": 1, "exposures.parquet": 2, "users.parquet": 2,
    }  # fmt: skip
