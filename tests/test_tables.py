from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from characterflywheel import records, tables
from characterflywheel.characters import bundled_characters
from characterflywheel.errors import FlywheelError
from characterflywheel.records import (
    Answers,
    Candidate,
    Character,
    ChatMessage,
    Estimate,
    Judgement,
    Preference,
    Record,
    Signal,
    Task,
)  # fmt: skip

AT = datetime(2026, 1, 5, 10, 30, 0, 123456, tzinfo=UTC)
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
CHAT = st.lists(st.builds(ChatMessage, role=st.sampled_from(("user", "assistant")), content=TEXT), max_size=3)


class Tally(Record):
    """A record with a dictionary, which a table keeps as JSON text."""

    name: str
    counts: dict[str, int]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.builds(
    Preference, id=TEXT, prompt_id=TEXT, user_id=TEXT, character_id=TEXT, source=st.sampled_from(("internal", "user")),
    prompt=CHAT.map(tuple), chosen=CHAT.map(tuple), rejected=CHAT.map(tuple), chosen_policy=TEXT, rejected_policy=TEXT,
    reviewers=st.integers(1, 9), label=st.floats(0.5, 1.0), held_out=st.booleans(),
), max_size=4))  # fmt: skip
def test_pairs_survive_a_table(tmp_path_factory: pytest.TempPathFactory, rows: list[Preference]) -> None:
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    assert tables.write(path, Preference, rows) == len(rows)
    assert tables.read(path, Preference) == rows


def test_nested_records_optionals_and_times_survive(tmp_path: Path) -> None:
    judgements = [
        Judgement(
            id="j", task_id="t", prompt_id="p", reviewer="r", ranking=("b", "a"), rewrite=None, seconds=3.5,
            created_at=AT,
            answers=(
                Answers(candidate_id="a", false_refusal=True, templated=False, violates=(0, 2)),
                Answers(candidate_id="b", false_refusal=False, templated=False),
            ),
        )
    ]  # fmt: skip
    signals = [
        Signal(id="s", message_id="m", user_id="u", kind="rating", value=4, created_at=AT),
        Signal(id="t", message_id="m", user_id="u", kind="feedback", text="zu lang – ✨", created_at=AT),
    ]
    estimates = [Estimate(value=None, n=0, reason="nobody came"), Estimate(value=0.5, low=0.4, high=0.6, n=90)]
    for record, rows in ((Judgement, judgements), (Signal, signals), (Estimate, estimates)):
        path = tmp_path / f"{record.__name__}.parquet"
        tables.write(path, record, rows)
        assert tables.read(path, record) == rows


def test_dictionaries_survive_at_any_depth(tmp_path: Path) -> None:
    character = bundled_characters()["pirate"].model_copy(update={"extensions": {"colour": "red", "age": 40}})
    tallies = [Tally(name="a", counts={"z": 1, "b": 2}), Tally(name="b", counts={})]
    candidate = Candidate(id="c", prompt_id="p", policy="base", text="Arr.", finish_reason="stop", score=-0.5)
    task = Task(
        id="t", kind="static", prompt_id="p", character=character, candidates=(candidate,), reviewer="r",
        history=(ChatMessage(role="user", content="hi"),),
    )  # fmt: skip
    for record, rows in ((Tally, tallies), (Character, [character]), (Task, [task])):
        path = tmp_path / f"{record.__name__}.parquet"
        tables.write(path, record, rows)
        assert tables.read(path, record) == rows


@pytest.mark.parametrize(
    "record", [r for r in vars(records).values() if isinstance(r, type) and issubclass(r, Record) and r is not Record]
)
def test_an_empty_table_has_its_columns(record: type[BaseModel], tmp_path: Path) -> None:
    path = tmp_path / "empty.parquet"
    assert tables.write(path, record, []) == 0
    assert pq.read_schema(path).names == list(record.model_fields)
    assert tables.read(path, record) == []


def test_the_schema_follows_the_class() -> None:
    schema = tables.arrow_schema(Signal)
    assert schema.field("created_at").type == pa.timestamp("us", tz="UTC")
    assert schema.field("kind").type == pa.string()
    assert schema.field("value").type == pa.float64()
    assert tables.arrow_schema(Preference).field("chosen").type == pa.list_(
        pa.struct([("role", pa.string()), ("content", pa.string())])
    )


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    rows = [Tally(name="a", counts={"z": 1, "b": 2}), Tally(name="b", counts={"b": 2})]
    turned = [Tally(name="a", counts={"b": 2, "z": 1}), rows[1]]
    for name, some in (("one", rows), ("two", turned)):
        tables.write(tmp_path / name, Tally, some)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_json_lines_survive_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [ChatMessage(role="user", content="a\u2028b\n\"c\""), ChatMessage(role="assistant", content="")]  # fmt: skip
    assert tables.write_jsonl(path, rows) == 2
    path.write_text(path.read_text("utf-8") + "\n  \n", encoding="utf-8")
    assert list(tables.read_jsonl(path, ChatMessage)) == rows


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"role": "user", "content": "hi"}\n\n{"role": "king", "content": "hi"}\n', encoding="utf-8")
    with pytest.raises(FlywheelError, match=r"rows\.jsonl:3: not a ChatMessage[^^]*king"):
        list(tables.read_jsonl(path, ChatMessage))
