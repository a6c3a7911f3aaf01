"""The registry: what serves, its history, idempotence, and a file that someone broke."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from characterflywheel.errors import FlywheelError
from characterflywheel.release import registry
from characterflywheel.release.registry import Release

AT = datetime(2026, 1, 19, tzinfo=UTC)


def release(generation: int) -> Release:
    return Release(generation=generation, model=f"v{generation}", folder=f"artifacts/rl-{generation}/model")


def test_promote_and_roll_back(tmp_path: Path) -> None:
    path = tmp_path / "registry.json"
    assert registry.read(path).in_service is None
    for generation in range(3):
        registry.promote(path, release(generation), "it won", AT)
    assert registry.read(path).in_service == release(2)
    registry.rollback(path, "users left", AT)
    assert registry.read(path).in_service == release(1)
    registry.promote(path, release(3), "it won", AT)
    assert registry.read(path).serving == (release(0), release(1), release(3))
    written = json.loads(path.read_text())
    assert written["in_service"] == release(3).model_dump()
    assert [step["action"] for step in written["history"]] == ["promote"] * 3 + ["rollback", "promote"]
    assert [step["release"]["generation"] for step in written["history"]] == [0, 1, 2, 1, 3]


def test_promoting_again_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "registry.json"
    registry.promote(path, release(1), "it won", AT)
    before = path.read_bytes()
    registry.promote(path, release(1), "it won", AT)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["registry.json"]


def test_nothing_to_roll_back_to(tmp_path: Path) -> None:
    path = tmp_path / "registry.json"
    with pytest.raises(FlywheelError, match="the base model is in service"):
        registry.rollback(path, "why not", AT)


def test_the_base_model_served_before_the_first(tmp_path: Path) -> None:
    path = tmp_path / "registry.json"
    registry.promote(path, release(1), "it won", AT)
    assert registry.rollback(path, "complaints", AT).in_service is None
    assert registry.read(path).history[-1].release is None
    with pytest.raises(FlywheelError, match="the base model is in service"):
        registry.rollback(path, "why not", AT)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"history": [{"action": "promote"}]}'])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "registry.json"
    path.write_text(text)
    with pytest.raises(FlywheelError, match="is no registry of models"):
        registry.read(path)


def test_an_impossible_history_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "registry.json"
    step = {"action": "rollback", "release": release(1).model_dump(), "reason": "edited", "at": AT.isoformat()}
    path.write_text(json.dumps({"history": [step]}))
    with pytest.raises(FlywheelError, match="is no registry of models"):
        registry.read(path)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-1, 4), max_size=8))
def test_a_rollback_undoes_the_last_promotion(tmp_path_factory: pytest.TempPathFactory, moves: list[int]) -> None:
    path = tmp_path_factory.mktemp("registry") / "registry.json"
    model: list[Release] = []
    for move in moves:
        if move >= 0:
            registry.promote(path, release(move), "", AT)
            if not model or model[-1] != release(move):
                model.append(release(move))
        elif model:
            registry.rollback(path, "", AT)
            model.pop()
    assert list(registry.read(path).serving) == model
