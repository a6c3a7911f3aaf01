import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from characterflywheel import config
from characterflywheel.config import FlywheelConfig, load
from characterflywheel.errors import FlywheelError


def written(folder: Path, text: str) -> Path:
    path = folder / "flywheel.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load(written(tmp_path, "")) == FlywheelConfig()


@pytest.mark.parametrize("name", config.preset_names(), ids="preset {}".format)  # "gpu" alone would be a mark
def test_presets_load(name: str, tmp_path: Path) -> None:
    assert isinstance(load(written(tmp_path, f'preset = "{name}"')), FlywheelConfig)


def test_there_are_presets() -> None:
    assert {"cluster", "gpu", "quick", "tiny"} <= set(config.preset_names())


def test_a_preset_fills_what_the_file_does_not_name(tmp_path: Path) -> None:
    tiny = load(written(tmp_path, 'preset = "tiny"'))
    mine = load(written(tmp_path, 'preset = "tiny"\nseed = 9\n[sft]\nlearning_rate = 0.5\n'))
    assert mine.seed == 9
    assert mine.sft == tiny.sft.model_copy(update={"learning_rate": 0.5})
    assert tiny.sft.max_prompt_tokens != FlywheelConfig().sft.max_prompt_tokens
    assert mine.model_copy(update={"seed": tiny.seed, "sft": tiny.sft}) == tiny


@pytest.mark.parametrize("start", ["", 'preset = "tiny"\n'])
def test_a_live_product_has_no_world(start: str, tmp_path: Path) -> None:
    assert load(written(tmp_path, start + "world = false\n")).world is None
    assert load(written(tmp_path, "world = true\n")) == FlywheelConfig()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[sft]\nlearning_rat = 1\n", "unknown key 'sft.learning_rat'; did you mean 'learning_rate'?"),
        ("sead = 1\n", "unknown key 'sead'; did you mean 'seed'?"),
        ("[world]\nmax_turn = 1\n", "unknown key 'world.max_turn'; did you mean 'max_turns'?"),
        ("[serving]\nqqq = 1\n", "unknown key 'serving.qqq'; known keys: temperature, max_tokens."),
        ("[sft]\nepochs = 0\n", "sft.epochs = 0: Input should be greater than or equal to 1"),
        ('[models]\nbackend = "magic"\n', "models.backend = 'magic'"),
        ('preset = "huge"\n', "preset 'huge' does not exist; there are cluster, gpu, quick, tiny"),
        ("[sft\n", "is not valid TOML"),
        (
            "[curate]\nannotate_share = 0.6\ntrain_share = 0.3\nevaluate_share = 0.2\n",
            r"toml: curate: annotate_share \+ train_share \+ evaluate_share == 1.1, must be < 1",
        ),
        ("[rl]\nratio_max = 1.1\n", r"toml: rl: ratio_max == 1.1, must be >= 1 \+ clip_high == 1.28"),
        ("[rl]\nclip_low = 2\n", "rl.clip_low = 2: Input should be less than 1"),
        ("[rl]\nlearning_rate = inf\n", "rl.learning_rate = inf: Input should be a finite number"),
        ('[rl.alarms]\nevery = 0\nstop = ["kl"]\n', r"toml: rl.alarms: stop == \['kl'\], but every == 0"),
        ('[rl.alarms]\nstop = ["gold"]\n', r"toml: rl.alarms.stop == \['gold'\], but reward.gold_share == 0"),
    ],
)
def test_mistakes_are_named_with_their_remedy(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(FlywheelError, match=says.replace("?", r"\?")) as caught:
        load(written(tmp_path, text))
    assert "flywheel.toml" in str(caught.value)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(FlywheelError, match="flywheel init DIR"):
        load(tmp_path / "flywheel.toml")


def test_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        FlywheelConfig().sft.epochs = 3  # type: ignore[misc]


def test_configuration_survives_json() -> None:
    whole = FlywheelConfig()
    assert FlywheelConfig.model_validate_json(whole.model_dump_json()) == whole


def test_configuration_loads_no_torch() -> None:
    code = "import sys, characterflywheel.config; print({'torch', 'transformers'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("held", "world", "decision", "meets"),
    [
        ("simulated", True, "hold", True), ("simulated", False, "hold", False), ("simulated", False, "ship", True),
        ("experiment", False, "hold", True), ("stop", True, "hold", False), ("experiment", True, "reject", False),
    ],
)  # fmt: skip
def test_who_meets_a_model_that_was_held(held: str, world: bool, decision: str, meets: bool, tmp_path: Path) -> None:
    """The README's recipe takes a preset made for simulated users: people never meet what its gate held."""
    from characterflywheel.generation import may_meet_users  # noqa: PLC0415 - torch

    found = load(written(tmp_path, f'world = {str(world).lower()}\n[gate]\nheld = "{held}"'))
    assert may_meet_users(found, decision) == meets
    quick = load(written(tmp_path, 'preset = "quick"\nworld = false'))
    assert not may_meet_users(quick, "hold")
