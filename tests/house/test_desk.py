from datetime import UTC, datetime
from pathlib import Path

import pytest

from characterflywheel import desk
from characterflywheel.characters import bundled_characters
from characterflywheel.errors import FlywheelError, Waiting
from characterflywheel.people import RealPeople
from characterflywheel.records import Answers, Candidate, ChatMessage, Judgement, Task
from characterflywheel.store import EventStore


def task(number: int) -> Task:
    candidates = tuple(
        Candidate(id=f"c{number}-{k}", prompt_id=f"p{number}", policy="base", text="Ahoy!", finish_reason="stop")
        for k in range(2)
    )
    character = next(iter(bundled_characters().values()))
    history = (ChatMessage(role="user", content="Hello"),)
    return Task(
        id=f"t{number}", kind="static", prompt_id=f"p{number}", character=character, history=history,
        candidates=candidates, reviewer="ana",
    )  # fmt: skip


def judge(of: Task, **changes: object) -> Judgement:
    answers = tuple(Answers(candidate_id=c.id, false_refusal=False, templated=False) for c in of.candidates)
    values = {
        "id": f"j-{of.id}", "task_id": of.id, "prompt_id": of.prompt_id, "reviewer": of.reviewer, "answers": answers,
        "ranking": tuple(c.id for c in of.candidates), "seconds": 12.0, "created_at": datetime(2026, 1, 5, tzinfo=UTC),
    }  # fmt: skip
    return Judgement.model_validate(values | changes)


def test_the_pipeline_waits_until_people_have_judged_everything(tmp_path: Path) -> None:
    with EventStore.open(tmp_path / "flywheel.db") as store:
        people = RealPeople(tmp_path / "annotation", store)
    tasks, answers = [task(1), task(2)], tmp_path / "answers.jsonl"
    with pytest.raises(Waiting, match="2 of 2 annotation tasks await judgement"):
        people.judge(tasks)
    assert desk.export(tmp_path / "annotation", tmp_path / "tasks.jsonl") == 2
    answers.write_text(judge(tasks[1]).model_dump_json() + "\n")
    assert desk.take_in(tmp_path / "annotation", answers, tmp_path / "rejected").accepted == 1
    with pytest.raises(Waiting, match="1 of 2"):
        people.judge(tasks)
    answers.write_text(judge(tasks[0]).model_dump_json() + "\n" + judge(tasks[1]).model_dump_json() + "\n")
    intake = desk.take_in(tmp_path / "annotation", answers, tmp_path / "rejected")
    assert (intake.accepted, intake.known, intake.rejected) == (1, 1, ())
    assert people.judge(tasks) == [judge(tasks[0]), judge(tasks[1])]
    with pytest.raises(FlywheelError, match="no task is open"):
        desk.export(tmp_path / "annotation", tmp_path / "tasks.jsonl")


def test_bad_lines_are_kept_aside_under_their_numbers_and_the_rest_comes_in(tmp_path: Path) -> None:
    folder, answers = tmp_path / "annotation", tmp_path / "answers.jsonl"
    desk.post(folder, [task(1), task(2)])
    good, second = judge(task(1)), judge(task(2))
    lines = [
        good.model_dump_json(),
        "{not json",
        judge(task(3)).model_dump_json(),
        judge(task(2), reviewer="bo").model_dump_json(),
        judge(task(2), ranking=("c2-1",), answers=second.answers[1:]).model_dump_json(),
        judge(
            task(2), answers=(second.answers[0].model_copy(update={"violates": (99,)}), second.answers[1])
        ).model_dump_json(),
        judge(task(1), seconds=3.0).model_dump_json(),
    ]
    answers.write_text("\n".join(lines))
    intake = desk.take_in(folder, answers, tmp_path / "rejected")
    assert intake.accepted == 1
    assert [reason.split(":")[0] for reason in intake.rejected] == [f"line {n}" for n in (2, 3, 4, 5, 6, 7)]
    assert [task.id for task in desk.open_tasks(folder)] == ["t2"]
    assert intake.rejected_file is not None
    aside = Path(intake.rejected_file).read_text().splitlines()
    assert aside[1::2] == lines[1:]


def test_missing_and_empty_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FlywheelError, match="there is no file"):
        desk.take_in(tmp_path, tmp_path / "none.jsonl", tmp_path / "rejected")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(FlywheelError, match="is empty"):
        desk.take_in(tmp_path, tmp_path / "empty.jsonl", tmp_path / "rejected")


def test_what_looks_like_the_end_of_a_line_is_none(tmp_path: Path) -> None:
    folder, answers = tmp_path / "annotation", tmp_path / "answers.jsonl"
    desk.post(folder, [task(1)])
    rewritten = judge(task(1), rewrite="one\u2028two\x85three")
    answers.write_text(rewritten.model_dump_json() + "\n", encoding="utf-8")
    intake = desk.take_in(folder, answers, tmp_path / "rejected")
    assert (intake.accepted, intake.rejected) == (1, ())
    assert desk.judgements_of(folder)["t1"].rewrite == "one\u2028two\x85three"
