"""`flywheel keys` and `flywheel experiment` as people and scripts meet them."""

import json
import re
from pathlib import Path

import pytest

from characterflywheel import cli
from characterflywheel.serving.auth import Authenticator, Unauthorized
from characterflywheel.store import EventStore

SECRET = b"0123456789abcdef0123456789abcdef"


@pytest.fixture
def made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert flywheel("init", tmp_path / "w", "--preset", "tiny") == 0
    capsys.readouterr()
    return tmp_path / "w"


def flywheel(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code if isinstance(stop.value.code, int) else 0


def test_a_key_is_made_listed_and_revoked(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--scope", "chat", "--scope", "characters", "--name", "app", "--user", "ada", "--days", "30")
    assert flywheel("keys", "create", made, *options) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"fw_[0-9a-f]{16}_[A-Za-z0-9_-]{43}\n", out)
    assert "chat, characters; for user ada; until" in err
    key = out.strip()
    headers = {"authorization": f"Bearer {key}"}
    with EventStore.open(made / "flywheel.db") as store:
        principal = Authenticator(store, SECRET).authenticate(headers, {})
    assert (principal.scopes, principal.user_id) == ({"chat", "characters"}, "ada")
    assert flywheel("keys", "list", made) == 0
    listed = capsys.readouterr().out
    assert principal.id in listed
    assert "until" in listed
    assert flywheel("keys", "revoke", made, principal.id) == 0
    assert capsys.readouterr().out == f"key {principal.id} (app) is revoked\n"
    assert flywheel("keys", "list", made, "--json") == 0
    listed = capsys.readouterr().out
    (row,) = json.loads(listed)
    assert row["revoked_at"] is not None
    assert "digest" not in row
    with EventStore.open(made / "flywheel.db") as store, pytest.raises(Unauthorized, match="revoked"):
        Authenticator(store, SECRET).authenticate(headers, {})
    secret = key.split("_", 2)[2].encode()
    assert not any(secret in path.read_bytes() for path in made.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("keys", "create", "DIR", "--scope", "root"), "scope 'root' does not exist; there are chat, characters,"),
        (("keys", "create", "DIR", "--scope", "chat", "--days", "0"), "days = 0, must be above 0"),
        (("keys", "revoke", "DIR", "abc"), "there is no key 'abc'"),
        (("experiment", "start", "DIR", "x", "--arm", "control"), "must read ARM=MODEL:SHARE, e.g. control=base:0.1"),
        (("experiment", "start", "DIR", "x", "--arm", "control=base:many"), "must end with a share of users"),
        (("experiment", "start", "DIR", "x", "--arm", "control=base:0.1"), "must be control and treatment"),
        (
            ("experiment", "start", "DIR", "x", "--arm", "control=base:0.1", "--arm", "treatment=gen7:0.1"),
            "models gen7 are not in service; there are base",
        ),
        (("experiment", "ramp", "DIR", "x", "--share", "treatment=0.2"), "there is no experiment 'x'; there are none"),
        (("experiment", "stop", "DIR", "x"), "there is no experiment 'x'"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: tuple[str, ...], sentence: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert flywheel(*(made if one == "DIR" else one for one in arguments)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("flywheel: ")
    assert sentence in err
    assert err.count("\n") == 1


def test_a_key_without_scope_is_wrong_usage(made: Path) -> None:
    assert flywheel("keys", "create", made) == 2


def test_an_experiment_is_started_ramped_and_stopped(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = ("--arm", "control=base:0.1", "--arm", "treatment=base:0.1")
    assert flywheel("experiment", "start", made, "aa", *arms) == 0
    assert "running  control base 10.0%, treatment base 10.0%; since" in capsys.readouterr().out
    assert flywheel("experiment", "ramp", made, "aa", "--share", "control=0.2", "--share", "treatment=0.2") == 0
    assert "control base 20.0%, treatment base 20.0%" in capsys.readouterr().out
    assert flywheel("experiment", "stop", made, "aa") == 0
    capsys.readouterr()
    assert flywheel("experiment", "start", made, "aa", *arms) == 1
    assert "is stopped, and a name is used once" in capsys.readouterr().err
    assert flywheel("experiment", "list", made) == 0
    assert re.match(r"aa +stopped  control base 20.0%", capsys.readouterr().out)
    assert flywheel("experiment", "list", made, "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["shares"] == {"control": 0.2, "treatment": 0.2}
