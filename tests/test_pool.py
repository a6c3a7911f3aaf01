"""The pool of policies: what sources name, one model at a time, and a bigger sibling on a server that really runs."""

import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from characterflywheel import ledger, pool
from characterflywheel.annotation.candidates import HINTS, RewritePolicy
from characterflywheel.config import PolicyConfig, RejectionConfig, load
from characterflywheel.errors import FlywheelError
from characterflywheel.llm.base import Completion, Sampling
from characterflywheel.pipeline import Work
from characterflywheel.pool import Known, Pool, ServedPolicy
from characterflywheel.records import ChatMessage, Prompt
from characterflywheel.release import registry
from characterflywheel.training.selection.drawing import draw
from characterflywheel.workspace import Workspace
from test_ledger import row

ASKED = (ChatMessage(role="system", content="You are Mo."), ChatMessage(role="user", content="hello"))
SAMPLING = Sampling(temperature=0.8, max_tokens=24)
NOW = datetime(2026, 1, 5, tzinfo=UTC)


class Model:
    """Notes what it was asked."""

    def __init__(self, name: str) -> None:
        self.name, self.asked = name, []  # type: ignore[var-annotated]

    def complete(
        self, conversations: Sequence[Sequence[ChatMessage]], *, n: int = 1, sampling: Sampling = SAMPLING,
        seeds: Sequence[int],
    ) -> list[list[Completion]]:  # fmt: skip
        self.asked.append((conversations, sampling))
        return [[Completion("hi", (1,), (-1.0,), "stop")] * n for _ in conversations]


def policy(name: str, source: str = "parent", **more: Any) -> PolicyConfig:
    return PolicyConfig(name=name, share=1.0, source=source, **more)


def folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(f'{{"of": "{path.parent.name}"}}')
    return path


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Three generations made models; the second one's was not promoted, the third one's serves."""
    space = Workspace(tmp_path)
    for number in (1, 2, 3):
        made = folder(space.artifacts / f"rl-00000000000{number}" / "model")
        release = registry.Release(
            generation=number, model=f"gen{number}", folder=f"artifacts/{made.parent.name}/model"
        )
        ledger.append(space.ledger, row(number).model_copy(update={"stages": {"rl": made.parent.name}}))
        if number != 2:
            registry.promote(space.registry, release, "better", NOW)
    return space


def test_sources_name_models(workspace: Workspace, tmp_path: Path) -> None:
    models = [workspace.artifacts / f"rl-00000000000{n}" / "model" for n in (1, 2, 3)]
    known = pool.known_models(workspace, str(folder(tmp_path / "base")), 4)
    found = {
        source: pool.folder_of(policy("p", source), known)
        for source in ("parent", "base", "earlier:1", "earlier:2", "earlier:3", "generation:2", "/some/model")
    }
    base = str(tmp_path / "base")
    assert found == {
        "parent": "parent", "base": base, "earlier:1": models[0], "earlier:2": base, "earlier:3": None,
        "generation:2": models[1], "/some/model": "/some/model",
    }  # fmt: skip
    with pytest.raises(FlywheelError, match="policy 'p': generation 4 has left no model; there are: 1, 2, 3"):
        pool.folder_of(policy("p", "generation:4"), known)
    first = pool.known_models(workspace, base, 1)
    assert (first.served, first.generations) == ((), {})


def test_an_identity_is_what_a_source_holds_and_not_where(workspace: Workspace, tmp_path: Path) -> None:
    base = str(folder(tmp_path / "base"))
    known = pool.known_models(workspace, base, 4)
    copies = [str(folder(tmp_path / place / "big")) for place in ("here", "there")]
    (Path(copies[1]) / "config.json").write_text((Path(copies[0]) / "config.json").read_text())
    one, two = (
        pool.settings(RejectionConfig(pool=(
            policy("parent"), policy("before", "earlier:1"), policy("far", address, model="big", key_env=key),
            policy("folder", copy), policy("none", "earlier:9"),
        )), known)
        for address, key, copy in (("http://a/v1", "A", copies[0]), ("http://b:8000/v1", "B", copies[1]))
    )  # fmt: skip
    assert one.model_dump_json() == two.model_dump_json()
    sources = [p.source for p in one.pool]
    assert sources[:3] == ["parent", "rl-000000000001", "server of big"]
    assert sources[3].startswith("big-")
    assert sources[4] == "absent"
    (Path(copies[1]) / "config.json").write_text("{}")
    three = pool.settings(RejectionConfig(pool=(policy("folder", copies[1]),)), known)
    assert three.pool[0].source != sources[3], "new weights are another policy"


def test_one_model_at_a_time_beside_the_parent(workspace: Workspace, tmp_path: Path) -> None:
    base, parent = folder(tmp_path / "base"), workspace.artifacts / "rl-000000000003" / "model"
    known = pool.known_models(workspace, str(base), 4)
    loaded: list[tuple[Path, str]] = []

    def load(path: Path, name: str) -> Model:
        loaded.append((path, name))
        return Model(name)

    mine = Model("gen3")
    policies = [
        policy("parent"), policy("coached", coached=True), policy("cool", cooling=0.5), policy("base", "base"),
        policy("hinted", "base", hints=("Be brief.",)), policy("before", "earlier:1"), policy("none", "earlier:9"),
    ]  # fmt: skip
    found = Pool(policies, known, parent, lambda: mine, load)
    assert (list(found), found.absent) == ([p.name for p in policies[:-1]], ("none",))
    assert found["parent"] is mine
    coached = found["coached"]
    assert isinstance(coached, RewritePolicy)
    assert (coached.model, coached.hints, coached.cooling) == (mine, HINTS, pool.COOLING)
    found["cool"].complete([ASKED], sampling=SAMPLING, seeds=[1])
    assert mine.asked == [([ASKED], Sampling(temperature=0.4, max_tokens=24))]
    assert loaded == []
    found["base"], found["base"], found["hinted"]
    assert loaded == [(base, "base")]
    found["before"], found["base"]
    assert [name for _, name in loaded] == ["base", "before", "base"]
    found["hinted"].complete([ASKED], sampling=SAMPLING, seeds=[1])
    with pytest.raises(FlywheelError, match=r"no policy of the pool exists yet \(none\)"):
        Pool([policy("none", "earlier:9")], known, parent, lambda: mine, load)


def test_the_base_that_serves_is_not_loaded_twice(tmp_path: Path) -> None:
    base = folder(tmp_path / "base")
    mine = Model("base")
    known = Known(str(base), (), {})
    assert Pool([policy("b", "base")], known, base, lambda: mine, lambda path, name: Model(name))["b"] is mine


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"source": "http://host/v1"}, "needs `model`"), ({"model": "big"}, "is no server"),
        ({"source": "earlier:x"}, "must be earlier:N"), ({"source": "generation:0"}, "must be generation:N"),
        ({"name": "a b"}, "pattern"), ({"share": 0.0}, "greater than 0"),
    ],
)  # fmt: skip
def test_what_a_policy_cannot_be(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PolicyConfig(**{"name": "p", "share": 1.0, **wrong})
    with pytest.raises(ValueError, match="its own name"):
        RejectionConfig(pool=(policy("a"), policy("a")))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('shar = 1.0\nname = "a"', r"unknown key 'rejection_sampling\.pool\.0\.shar'; did you mean 'share'\?"),
        ('share = 1.0\nname = "a"\nsource = "http://a"', r"pool\.0: policy 'a': source 'http://a' needs `model`"),
    ],
)
def test_a_mistake_in_a_policys_table_is_one_sentence(lines: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "flywheel.toml").write_text(f"[[rejection_sampling.pool]]\n{lines}\n")
    with pytest.raises(FlywheelError, match=said):
        load(tmp_path / "flywheel.toml")


@contextmanager
def server(port: int, *more: str) -> Iterator[str]:
    script = Path(__file__).parents[1] / "benchmarks" / "mock_upstream.py"
    with subprocess.Popen([sys.executable, str(script), "--port", str(port), *more]) as process:
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    assert time.monotonic() < deadline
                    assert process.poll() is None
                    time.sleep(0.05)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_bigger_sibling_on_a_server(port: int) -> None:
    """Drafts come as asked; a server that goes away, or has no such model, is named with what to do."""
    with server(port, "--words", "7") as address:
        replies = ServedPolicy(address, "mock").complete([ASKED] * 40, n=3, sampling=SAMPLING, seeds=range(40))
        assert [len(several) for several in replies] == [3] * 40
        assert {reply for several in replies for reply in several} == {
            Completion("The lamp is lit and the sea", (), (), "stop")
        }
        again = ServedPolicy(address, "mock?mode=refused:2", patience_s=20)
        assert len(again.complete([ASKED], sampling=SAMPLING, seeds=[1])[0]) == 1, "it may be away for a moment"
        for mode, said in (("status:404", "no such model: serve it there, or set model"), ("status:401", "key_env"),
                           ("garbage", "cannot be read: is source")):  # fmt: skip
            with pytest.raises(FlywheelError, match=said):
                ServedPolicy(address, f"mock?mode={mode}", patience_s=0.3).complete([ASKED], seeds=[1])
    began = time.monotonic()
    with pytest.raises(FlywheelError, match="cannot be reached: start it, or correct source"):
        ServedPolicy(address, "mock", patience_s=0.5).complete([ASKED] * 3, seeds=range(3))
    assert time.monotonic() - began < 20
    with pytest.raises(FlywheelError, match=r"^source = 'ftp://host' is no address"):
        ServedPolicy("ftp://host", "mock")


def test_a_server_that_is_gone_stops_the_stage_and_what_is_drawn_is_kept(port: int, tmp_path: Path) -> None:
    parent = Model("parent")
    far = ServedPolicy(f"http://127.0.0.1:{port}/v1", "mock", patience_s=0.3)
    work = Work(tmp_path, 1)
    asked = [
        Prompt(
            id=f"p{n}", conversation_id=f"c{n}", user_id=f"u{n}", source="user", character_id="mo", messages=ASKED,
            split="train", cluster=0, turn=1, created_at=NOW,
        )
        for n in range(8)
    ]  # fmt: skip
    config = RejectionConfig(candidates=4, pool=(policy("parent"), policy("big")))
    said = rf"policy 'big' of the pool failed after 0 of its 16 candidates .*127\.0\.0\.1:{port}.* All 16 drawn so far"
    with pytest.raises(FlywheelError, match=said):
        draw(work, config, asked, {"parent": parent, "big": far})
    with server(port, "--words", "5"):
        drawn = draw(work, config, asked, {"parent": parent, "big": far})
    assert Counter(one.candidate.policy for one in drawn) == {"parent": 16, "big": 16}
    assert len(parent.asked) == 1
    assert {one.tokens for one in drawn if one.candidate.policy == "big"} == {None}


def test_a_password_in_a_source_is_refused_and_not_repeated() -> None:
    with pytest.raises(FlywheelError, match=r"source has a user or password .*key_env") as told:
        ServedPolicy("http://user:SECRET@127.0.0.1:1/v1", "mock", patience_s=0.2)
    assert "SECRET" not in str(told.value)
