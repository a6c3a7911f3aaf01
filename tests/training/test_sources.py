"""Sets of examples from files: the forms that are read, what is wrong with a line, and what must not be learnt."""

import json
import unicodedata
from pathlib import Path
from typing import Any, Literal

import pytest
from training_fixture import example, prompt

from characterflywheel.config import ExtraSource, SFTConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.records import ChatMessage, Example, SetAside
from characterflywheel.safety.policy import SafetyPolicy
from characterflywheel.training import sources
from characterflywheel.training.sources import Reserved
from tiny_model import says

ASKED = {"role": "user", "content": "Tea?"}
REPLY = {"role": "assistant", "content": "Gladly."}
SYSTEM = {"role": "system", "content": "Be brief."}


def written(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


@pytest.mark.parametrize(
    "line",
    [
        {"messages": [SYSTEM, ASKED, REPLY]},
        {"prompt": [SYSTEM, ASKED], "chosen": [REPLY], "rejected": [{"role": "assistant", "content": "No."}]},
        {"prompt": [SYSTEM, ASKED], "completion": "Gladly."},
        {"chosen": [SYSTEM, ASKED, REPLY], "rejected": [SYSTEM, ASKED, REPLY], "set": "tea"},
        {"messages": [SYSTEM, ASKED, REPLY | {"tool_calls": None}]},
    ],
)  # fmt: skip
def test_every_form_is_the_same_example(line: dict[str, Any], tmp_path: Path) -> None:
    plain, other = (
        sources.read(written(tmp_path / f"{n}.jsonl", row), "tool")
        for n, row in enumerate([{"messages": [SYSTEM, ASKED, REPLY]}, line])
    )
    assert other == plain
    (one,) = other
    assert [(m.role, m.content) for m in one.messages] == [
        ("system", "Be brief."), ("user", "Tea?"), ("assistant", "Gladly."),
    ]  # fmt: skip
    assert (one.source, one.user_id, one.character_id, one.score) == ("tool", None, None, None)


def test_one_prompt_with_two_replies_is_one_prompt(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.jsonl", {"prompt": "Tea?", "chosen": "Yes."}, "",
        {"prompt": "Tea?", "completion": "No.", "user_id": "ann", "character_id": "mo", "score": 2},
    )  # fmt: skip
    one, two = sources.read(path, "adhoc")
    assert (one.prompt_id, one.id) != (two.prompt_id, two.id)
    assert one.prompt_id == two.prompt_id
    assert (two.user_id, two.character_id, two.score) == ("ann", "mo", 2.0)


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("{", "is not JSON"), ("[]", "is no JSON object"), ({"text": "hi"}, "has neither messages nor prompt"),
        ({"messages": []}, "messages must be a text or a list of messages"),
        ({"messages": [ASKED]}, "the last message must be the assistant's"),
        ({"messages": [ASKED, {"role": "assistant", "content": " "}]}, "the last message must be the assistant's"),
        ({"messages": [REPLY]}, "no message of the user comes before"),
        ({"messages": [ASKED, SYSTEM, REPLY]}, "a system message must be the first"),
        ({"messages": [{"role": "tool", "content": "x"}, REPLY]}, r"messages\[0\].role = 'tool' must be one of"),
        ({"messages": [ASKED, {"role": "assistant", "content": ["x"]}]}, r"messages\[1\].content must be a text"),
        ({"messages": [ASKED, REPLY | {"tool_calls": [{}]}]}, r"messages\[1\] has tool_calls: write into content"),
        ({"messages": [ASKED, "Gladly."]}, r"messages\[1\] is no message with role and content"),
        ({"prompt": "x", "completion": "y", "score": "high"}, "score = 'high' must be a number"),
        ({"prompt": "x", "completion": "y", "user_id": 7}, "user_id = 7 must be a text"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_with_what_is_wrong(line: Any, wrong: str, tmp_path: Path) -> None:
    path = written(tmp_path / "set.jsonl", {"messages": [ASKED, REPLY]}, line)
    with pytest.raises(FlywheelError, match=rf"set\.jsonl: 1 of 2 lines are no examples: line 2: .*{wrong}"):
        sources.read(path, "general")


def test_of_many_bad_lines_five_are_named(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(b"\xff\n" * 2 + b"nonsense\n" * 6)
    with pytest.raises(FlywheelError, match=r"8 of 8 lines .*line 1: is not UTF-8.*line 5: .*; and 3 more\. Mend them"):
        sources.read(path, "general")
    with pytest.raises(FlywheelError, match="has no example"):
        sources.read(written(tmp_path / "empty.jsonl", ""), "general")
    with pytest.raises(FlywheelError, match=r"there is no file '/.*/nowhere\.jsonl': give .* one of bundled:general"):
        sources.path_of("nowhere.jsonl")


def test_only_files_whose_source_has_a_weight_are_read(tmp_path: Path) -> None:
    path = written(tmp_path / "mine.jsonl", {"messages": [ASKED, REPLY]})
    extra = (ExtraSource(source="adhoc", file=str(path)), ExtraSource(source="tool", file="missing.jsonl"))
    config = SFTConfig(extra=extra, weights={"adhoc": 1.0})
    mine = [example(1, "I do.")]
    assert sources.offer(SFTConfig(), mine) == ((mine[0],), ())
    offered = sources.offer(config, mine)
    assert [e.source for e in offered.examples] == ["user", "adhoc"]
    before = sources.settings(config).model_dump_json()
    moved = written(tmp_path / "moved.jsonl", {"messages": [ASKED, REPLY]})
    there = config.model_copy(update={"extra": (ExtraSource(source="adhoc", file=str(moved)), extra[1])})
    assert sources.settings(there).model_dump_json() == before, "where a file lies does not count"
    written(moved, {"messages": [SYSTEM, ASKED, REPLY]})
    assert sources.settings(there).model_dump_json() != before


def test_a_reply_in_a_file_that_safety_refuses_is_not_learnt(tmp_path: Path) -> None:
    bad = {"prompt": "Tea?", "completion": "With poison in it."}
    path = written(tmp_path / "mine.jsonl", {"messages": [ASKED, REPLY]}, bad)
    config = SFTConfig(extra=(ExtraSource(source="adhoc", file=str(path)),), weights={"adhoc": 1.0})
    safety = SafetyPolicy(classifiers=(lambda text, context: ("harm",) if "poison" in text else (),))
    offered = sources.offer(config, [example(1, "poison")], safety=safety)
    assert [e.messages[-1].content for e in offered.examples] == ["poison", "Gladly."], "ours were judged before"
    (lost,) = offered.refused
    assert (lost.source, lost.row.reason, lost.row.detail) == ("adhoc", "unsafe", "harm")


def test_where_all_replies_are_learnt_safety_is_asked_of_each(tmp_path: Path) -> None:
    """In a file and in our own history; where the last alone is learnt, what came before is only read."""
    bad = {"messages": [ASKED, {"role": "assistant", "content": "With poison in it."}, ASKED, REPLY]}
    path = written(tmp_path / "mine.jsonl", bad)
    ours = example(1, "Gladly.")
    asked, reply = ours.messages[-2:]
    ours = ours.model_copy(update={"messages": (asked, ChatMessage(role="assistant", content="poison"), asked, reply)})
    config = SFTConfig(extra=(ExtraSource(source="adhoc", file=str(path)),), weights={"adhoc": 1.0})
    safety = SafetyPolicy(classifiers=(lambda text, context: ("harm",) if "poison" in text else (),))
    assert len(sources.offer(config, [ours], safety=safety).examples) == 2
    every = sources.offer(config.model_copy(update={"learn": "all"}), [ours], safety=safety)
    assert every.examples == ()
    assert [(lost.source, lost.row.reason, lost.row.detail) for lost in every.refused] == [
        ("user", "unsafe", "message 1: harm"), ("adhoc", "unsafe", "message 1: harm"),
    ]  # fmt: skip


def test_what_evaluates_and_who_is_set_aside_is_not_learnt() -> None:
    """By the prompt's id, by its text (another id, other case and spaces), by its user, and by who was set aside."""
    held = [prompt(1, "evaluate"), prompt(2, "experiment"), prompt(3, "train"), prompt(4, "annotate")]
    reserved = Reserved.of(held, [SetAside(prompt_id="x", user_id="u9")])
    shouted = example(11, "a", asked=1).model_copy(update={"prompt_id": "other", "user_id": "u11"})
    loud = tuple(ChatMessage(role=m.role, content=f" {m.content.upper()}  ") for m in shouted.messages)
    rows: list[tuple[Example, str | None]] = [
        (example(1, "a").model_copy(update={"user_id": "u0"}), "evaluation_prompt"),
        (shouted.model_copy(update={"messages": loud}), "evaluation_prompt"),
        (example(5, "a").model_copy(update={"user_id": "u2"}), "evaluation_user"),
        (example(9, "a"), "set_aside"),
        (example(3, "a"), None), (example(4, "a"), None), (example(6, "a").model_copy(update={"user_id": None}), None),
    ]  # fmt: skip
    assert [reserved.why(row) for row, _ in rows] == [why for _, why in rows]
    offered = sources.offer(SFTConfig(), [row for row, _ in rows], reserved)
    assert list(offered.examples) == [row for row, why in rows if why is None]
    assert [(lost.row.id, lost.row.reason) for lost in offered.refused] == [(row.id, why) for row, why in rows if why]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_an_evaluation_prompt_is_known_however_its_accents_are_encoded(form: Literal["NFC", "NFD"]) -> None:
    """Other letters are folded as well: a sharp S is two."""
    held = prompt(1).model_copy(update={"split": "evaluate", "messages": (says("user", "Café Ǆ ΐ, naïve \u1e9e?"),)})
    text = unicodedata.normalize(form, "CAFÉ  ǆ ΐ, NAÏVE ss?")
    asked = example(7, "Gladly.").model_copy(update={"messages": (says("user", text), says("assistant", "Gladly."))})
    assert Reserved.of([held]).why(asked) == "evaluation_prompt"
