"""Ids by their columns, in Parquet and in JSON lines, and everything that came from them."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from characterflywheel import lineage
from characterflywheel.errors import FlywheelError
from characterflywheel.lineage import Ids
from characterflywheel.scan import Scanner


@pytest.mark.parametrize(
    ("column", "holder", "kind"),
    [("user_id", "prompts", "user"), ("id", "users", "user"), ("id", "conversations", "conversation"),
     ("conversation_id", "tips", "conversation"), ("id", "tasks", "row"), ("candidate_id", "answers", "row"),
     ("id", "character", None), ("character_id", "pairs", None), ("split", "prompts", None)],
)  # fmt: skip
def test_a_column_tells_what_kind_of_id_it_holds(column: str, holder: str, kind: str | None) -> None:
    assert lineage.kind_of(column, holder) == kind


def test_what_came_from_a_user_is_followed_through_files_of_both_kinds(tmp_path: Path) -> None:
    """user -> conversation -> prompt -> (in a list of a JSON line) candidate -> judgement; a character never."""
    conversations = pa.table({"id": ["c1", "c2"], "user_id": ["ann", "bob"], "character_id": ["ann", "ann"]})
    pq.write_table(conversations, tmp_path / "conversations.parquet")
    prompts = pa.table({"id": ["p1", "p2"], "conversation_id": ["c1", "c2"], "texts": [["a secret text"], None]})
    pq.write_table(prompts, tmp_path / "prompts.parquet")
    lines = [
        {"id": "t1", "character": {"id": "p1"}, "candidates": [{"id": "k", "prompt_id": "p1"}]},
        {"id": "t2", "character": {"id": "p1"}, "candidates": [{"id": "k2", "prompt_id": "p2"}]},
    ]
    (tmp_path / "tasks.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + "no json\n")
    (tmp_path / "judgements.jsonl").write_text('{"id": "j1", "task_id": "t1", "detail": "of p2"}\n')
    tables = {path.stem: lineage.table(path) for path in tmp_path.iterdir()}
    found = lineage.closure(tables.values(), Ids({"ann"}, set(), set()))
    assert found == Ids({"ann"}, {"c1"}, {"p1", "t1", "j1"})
    assert {name: table.naming(found).tolist() for name, table in tables.items()} == {
        "conversations": [0], "prompts": [0], "tasks": [0], "judgements": [0],
    }  # fmt: skip
    other = Ids(set(), set(), {"p2"})
    assert tables["judgements"].naming(other).tolist() == []
    assert tables["judgements"].naming(other, referring=True).tolist() == [0]
    assert lineage.saying(tmp_path / "prompts.parquet", Scanner([b"secret text"])) == [lineage.Said(0, 0)]
    assert lineage.saying(tmp_path / "tasks.jsonl", Scanner([b'"prompt_id": "p2"'])) == [lineage.Said(1, 0)]


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(FlywheelError, match=r"torn\.parquet is no Parquet file"):
        lineage.table(tmp_path / "torn.parquet")
