import multiprocessing
from pathlib import Path

import pytest

from characterflywheel import config, workspace
from characterflywheel.characters import bundled_characters, load_characters
from characterflywheel.errors import FlywheelError
from characterflywheel.workspace import Workspace


@pytest.mark.parametrize("preset", config.preset_names())
def test_init_gives_every_preset_a_valid_configuration_and_the_bundled_characters(tmp_path: Path, preset: str) -> None:
    made = workspace.init(tmp_path / "w", preset)
    assert isinstance(made.config(), config.FlywheelConfig)
    assert load_characters(made.characters) == bundled_characters()
    assert Workspace.open(tmp_path / "w") == made


def test_init_can_be_run_again_after_a_kill_and_keeps_changed_characters(tmp_path: Path) -> None:
    made = workspace.init(tmp_path / "w", "tiny")
    changed = sorted(made.characters.glob("*.toml"))[0]
    changed.write_text(changed.read_text() + "\n# mine\n")
    made.config_file.unlink()  # as if killed before the last step
    workspace.init(tmp_path / "w", "tiny")
    assert changed.read_text().endswith("# mine\n")


def test_init_refuses_what_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").touch()
    with pytest.raises(FlywheelError, match=r"not empty \(it holds 'thesis.doc'\)"):
        workspace.init(tmp_path, "tiny")
    with pytest.raises(FlywheelError, match="is a file"):
        workspace.init(tmp_path / "thesis.doc", "tiny")
    with pytest.raises(FlywheelError, match=r"preset 'huge' does not exist; there are .*quick, tiny"):
        workspace.init(tmp_path / "w", "huge")
    workspace.init(tmp_path / "w", "tiny")
    with pytest.raises(FlywheelError, match="is a workspace already"):
        workspace.init(tmp_path / "w", "tiny")


def test_what_the_template_suggests_is_valid(tmp_path: Path) -> None:
    made = workspace.init(tmp_path / "w", "tiny")
    lines = made.config_file.read_text().splitlines()
    suggested = [line.removeprefix("# ") if " = " in line or "# [" in line else line for line in lines]
    made.config_file.write_text("\n".join(suggested))
    loaded = made.config()
    assert (loaded.world, loaded.seed, loaded.models.base) == (None, 1, "/models/my-llama")


def _hold(root: Path, held: "multiprocessing.synchronize.Event", let_go: "multiprocessing.synchronize.Event") -> None:
    with Workspace(root).locked():
        held.set()
        let_go.wait(30)


def test_two_processes_cannot_change_one_workspace_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    made = workspace.init(tmp_path / "w", "tiny")
    spawn = multiprocessing.get_context("spawn")
    held, let_go = spawn.Event(), spawn.Event()
    holder = spawn.Process(target=_hold, args=(made.root, held, let_go))
    holder.start()
    assert held.wait(30)
    with pytest.raises(FlywheelError, match=f"in use by process {holder.pid}"), made.locked():
        pass
    holder.kill()
    holder.join()
    with made.locked():
        assert (made.root / ".lock").exists()
