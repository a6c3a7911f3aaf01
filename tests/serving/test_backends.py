"""Which models can serve, by name; promotions and rollbacks take effect; what is gone from disk is said."""

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from mock_server import Mock, Settings, serving

from characterflywheel import ledger
from characterflywheel.config import FlywheelConfig, ModelsConfig, ServerConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.llm.base import Sampling
from characterflywheel.records import ChatMessage
from characterflywheel.release import registry
from characterflywheel.release.registry import Release
from characterflywheel.serving.backends import BackendError, Backends, Served, make_backends
from characterflywheel.workspace import Workspace
from test_ledger import row
from tiny_model import tiny_llama, tiny_tokenizer

AT = datetime(2026, 1, 19, tzinfo=UTC)
ASKED = (ChatMessage(role="system", content="You are Mo."), ChatMessage(role="user", content="hello to you"))
PLAIN = Sampling(temperature=0.8, max_tokens=6)


def model(folder: Path, seed: int) -> Path:
    torch.set_num_threads(1)
    tiny_llama(seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """With a base model of its own, and `v1` to `v3` as generations leave them."""
    for generation in (1, 2, 3):
        model(tmp_path / "artifacts" / f"rl-{generation}" / "model", generation)
    model(tmp_path / "base", 0)
    return Workspace(tmp_path)


def promote(workspace: Workspace, generation: int) -> None:
    release = Release(generation=generation, model=f"v{generation}", folder=f"artifacts/rl-{generation}/model")
    registry.promote(workspace.registry, release, "it won", AT)


def native(workspace: Workspace, **server: Any) -> FlywheelConfig:
    models = ModelsConfig(base=str(workspace.root / "base"), threads=1, batch_replies=8)
    return FlywheelConfig(models=models, server=ServerConfig(max_prompt_tokens=300, **server))


def using(backends: Backends, test: Callable[[], Awaitable[Any]]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(30):
            try:
                return await test()
            finally:
                await backends.close()

    return asyncio.run(bounded())


async def answer(backends: Backends, name: str) -> str:
    return (await backends.get(name).complete(ASKED, PLAIN, 1))[0].text


def test_a_promotion_takes_effect_without_a_restart(workspace: Workspace) -> None:
    backends = make_backends(workspace, native(workspace))
    assert (backends.default, backends.names) == ("base", ("base",))

    async def test() -> Any:
        said = {"base": await answer(backends, backends.default)}
        promote(workspace, 1)
        assert backends.default == "base", "until somebody looks"
        await backends.refresh()
        assert backends.default == "v1"
        said["v1"] = await answer(backends, backends.default)
        kept = backends.get("v1")
        await backends.refresh()
        assert backends.get("v1") is kept
        promote(workspace, 2)
        await backends.refresh()
        said["v2"] = await answer(backends, backends.default)
        registry.rollback(workspace.registry, "users left", AT)
        await backends.refresh()
        assert backends.default == "v1"
        assert said["v1"] == await answer(backends, "v1")
        return said

    said = using(backends, test)
    assert len(set(said.values())) == 3, "three models wrote"
    assert backends.names == ("base", "v1", "v2")


def test_models_of_experiments_are_found_in_registry_and_ledger_and_let_go(workspace: Workspace) -> None:
    promote(workspace, 1)
    entry = row(3)
    ledger.append(workspace.ledger, entry.model_copy(update={"model": "v3", "stages": {"rl": "rl-3"}}))
    backends = make_backends(workspace, native(workspace))
    assert set(backends.names) == {"base", "v1", "v3"}

    async def test() -> Any:
        arm, default = backends.get("v3"), backends.get(backends.default)
        writing = asyncio.create_task(arm.complete(ASKED, Sampling(temperature=0.8, max_tokens=60), 1))
        await arm.ready()
        await default.ready()
        await backends.refresh(in_use={"v3"})
        assert {one.name for one in backends.opened()} == {"v1", "v3"}
        await asyncio.sleep(0.01)
        await backends.refresh(in_use=())
        assert {one.name for one in backends.opened()} == {"v1"}
        assert (await writing)[0].finish in ("stop", "length"), "those who came before are answered"
        return await answer(backends, "v3")

    assert using(backends, test), "it is loaded again when asked again"


def test_a_model_that_is_gone_from_disk(workspace: Workspace) -> None:
    """In service from the start: an error with the remedy, and served again once it is restored."""
    promote(workspace, 1)
    backends = make_backends(workspace, native(workspace))
    folder = workspace.artifacts / "rl-1" / "model"

    async def test() -> list[BackendError]:
        shutil.move(folder, workspace.root / "aside")
        errors = []
        for _ in range(7):
            with pytest.raises(BackendError) as caught:
                await answer(backends, "v1")
            errors.append(caught.value)
        with pytest.raises(BackendError, match="gone from rl-1/model"):
            await backends.get("v1").ready()
        shutil.move(workspace.root / "aside", folder)
        assert await answer(backends, "v1")
        return errors

    errors = using(backends, test)
    assert {(error.status, error.code) for error in errors} == {(503, "model_missing")}
    assert "flywheel rollback" in str(errors[-1])
    assert str(workspace.root) not in str(errors[-1]), "clients need not know where it lies"


def test_a_promoted_model_that_cannot_be_loaded_does_not_take_over(
    workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    promote(workspace, 1)
    backends = make_backends(workspace, native(workspace))
    weights = workspace.artifacts / "rl-2" / "model" / "model.safetensors"
    whole = weights.read_bytes()

    async def test() -> None:
        weights.write_bytes(whole[:1000])
        promote(workspace, 2)
        for _ in range(2):
            with pytest.raises(BackendError, match="its files cannot be read: restore them") as caught:
                await backends.refresh()
            assert (caught.value.status, caught.value.code) == (503, "model_unloadable")
            assert backends.default == "v1"
            assert await answer(backends, backends.default)
        weights.write_bytes(whole)
        await backends.refresh()
        assert backends.default == "v2"
        assert await answer(backends, "v2")
        workspace.registry.write_text("{}")
        with pytest.raises(BackendError, match="is no registry of models"):
            await backends.refresh()
        assert backends.default == "v2"

    using(backends, test)
    assert "could not be loaded" in caplog.text


def test_a_generation_that_was_made_again_replaces_its_model(workspace: Workspace) -> None:
    """The same name, another folder: what `flywheel run` leaves when a generation is run anew."""
    promote(workspace, 1)
    backends = make_backends(workspace, native(workspace))

    async def test() -> tuple[str, str]:
        before = await answer(backends, "v1")
        again = Release(generation=1, model="v1", folder="artifacts/rl-2/model")
        registry.promote(workspace.registry, again, "made again", AT)
        await backends.refresh()
        return before, await answer(backends, backends.default)

    before, after = using(backends, test)
    assert before != after


def test_a_name_that_nobody_knows(workspace: Workspace) -> None:
    backends = make_backends(workspace, native(workspace))
    with pytest.raises(BackendError, match="'gen9' is in neither registry nor ledger; there are base") as caught:
        backends.get("gen9")
    assert (caught.value.status, caught.value.code) == (503, "model_unknown")


def test_an_endpoint_serves_arms_by_name(tmp_path: Path) -> None:
    """Each arm's model is asked for under its own name; `endpoint_model` names the one in service."""
    seen: list[Served] = []

    async def test() -> Any:
        async with serving(Mock(Settings(words=3), models=("llama", "tuned"))) as address:
            server = ServerConfig(backend="endpoint", endpoint=address, endpoint_model="llama")
            backends = make_backends(Workspace(tmp_path), FlywheelConfig(server=server), seen.append)
            assert (backends.default, backends.names) == ("llama", ("llama",))
            said = [await answer(backends, name) for name in ("llama", "tuned")]
            await backends.get("tuned").ready()
            with pytest.raises(BackendError, match="it has llama, tuned"):
                await backends.get("other").ready()
            await backends.refresh(in_use=("tuned",))
            assert [one.name for one in backends.opened()] == ["llama", "tuned"]
            await backends.close()
            return said

    assert asyncio.run(test()) == ["The lamp is"] * 2
    assert [served.model for served in seen] == ["llama", "tuned"]


def test_without_a_name_there_an_endpoint_is_asked_for_the_model_in_service(workspace: Workspace) -> None:
    promote(workspace, 1)
    server = ServerConfig(backend="endpoint", endpoint="http://127.0.0.1:1/v1")
    backends = make_backends(workspace, FlywheelConfig(server=server))

    async def test() -> str:
        promote(workspace, 2)
        with pytest.raises(BackendError, match="cannot be reached"):
            await backends.refresh()
        return backends.default

    assert using(backends, test) == "v1"


def test_an_endpoint_needs_an_address(tmp_path: Path) -> None:
    with pytest.raises(FlywheelError, match=r'needs server\.endpoint, .*http://HOST:8000/v1"'):
        make_backends(Workspace(tmp_path), FlywheelConfig(server=ServerConfig(backend="endpoint")))


def test_the_echo_needs_nothing_and_imports_little(tmp_path: Path) -> None:
    script = """
import asyncio, sys
from pathlib import Path
from characterflywheel.config import FlywheelConfig, ServerConfig
from characterflywheel.llm.base import Sampling
from characterflywheel.records import ChatMessage
from characterflywheel.serving.backends import make_backends
from characterflywheel.workspace import Workspace

async def main():
    backends = make_backends(Workspace(Path(sys.argv[1])), FlywheelConfig(server=ServerConfig(backend="echo")))
    echo, said = backends.get(backends.default), [ChatMessage(role="user", content="  one two\\n three ")]
    await echo.ready()
    print((await echo.complete(said, Sampling(), 0, n=2)))
    print([tuple(c) async for c in echo.stream(said, Sampling(max_tokens=2), 0)])
    print(await echo.complete([], Sampling(), 0))
    await backends.refresh(in_use=())
    await backends.close()
    print(sorted({"torch", "transformers", "aiohttp"} & set(sys.modules)))

asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    reply = "Reply(text='one two\\n three', finish='stop', prompt_tokens=None, completion_tokens=None)"
    assert done.stdout.splitlines() == [
        f"[{reply}, {reply}]",
        "[('one ', None, None, None), ('two\\n ', None, None, None), ('', 'length', None, None)]",
        "[Reply(text='', finish='stop', prompt_tokens=None, completion_tokens=None)]", "[]",
    ]  # fmt: skip
