"""Reward models that answer at once, as an artifact on disk, and a scoring server that is really started."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
import torch
import uvicorn
from reward_fixture import Letters, asks, tiny_policy
from starlette.types import ASGIApp

from characterflywheel.config import RewardConfig
from characterflywheel.pipeline import ArtifactRecord, output_hashes
from characterflywheel.reward.composite import RewardModels
from characterflywheel.reward.pairwise import Pairwise
from characterflywheel.reward.pointwise import Pointwise, Scale
from characterflywheel.reward.server import card_of, make_app
from characterflywheel.reward.signals import Reply, SignalModels
from characterflywheel.reward.wire import Card, Limits

CONFIG = RewardConfig(layers=2, max_prompt_tokens=64, max_reply_tokens=24)
PROMPTS = [asks("Hi"), asks("Do you like the sea?"), asks("Why?")]
REPLIES = [["Hello.", "Hello! How are you?", "tea and rain"], ["I do. Do you?"], ["Because.", "Because…  “ünï” 🌊"]]


def reward_artifact(root: Path, name: str = "reward-0123456789ab") -> Path:
    """An artifact of the reward stage with untrained networks, whose heads are random, and trained signal models."""
    policy = tiny_policy(root / "policy")
    torch.manual_seed(0)
    pointwise, pairwise, other = (
        kind.from_folder(policy, CONFIG, threads=1) for kind in (Pointwise, Pairwise, Pointwise)
    )
    for one in (pointwise, pairwise, other):
        torch.nn.init.normal_(one.net.head.weight)
    pointwise.scale = Scale(0.5, 2.0)
    rows = [
        Reply(f"u{i % 12}", asks("Hi")[1:], "tea" if i % 2 else "rain", (float(i % 2), float(i // 2 % 2)))
        for i in range(120)
    ]
    signals = SignalModels.train(rows, ("thumb_up", "love"), Letters(), min_auc=0.55, seed=1)
    scales = {"thumb_up": (0.5, 2.0), "love": (0.0, 1.0)}
    folder = root / name
    folder.mkdir()
    weights = {"thumb_up": 0.25, "love": 0.5}
    RewardModels(pointwise, pairwise, signals, weights, scales, other).save(folder)  # type: ignore[arg-type]
    record = ArtifactRecord(
        stage="reward", hash=name.rpartition("-")[2], version=1, config={}, seed=1, inputs={},
        outputs=output_hashes(folder), summary={}, code_version="0", packages={}, device="", seconds=0,
        peak_memory_mb=0,
    )  # fmt: skip
    (folder / "artifact.json").write_text(record.model_dump_json(), encoding="utf-8")
    return folder


def shared_artifact(factory: pytest.TempPathFactory) -> Path:
    """One `reward_artifact` for all tests of this run."""
    root = factory.getbasetemp() / "scoring"
    if not root.exists():
        root.mkdir()
        reward_artifact(root)
    return next(root.glob("reward-*"))


def outputs(folder: Path) -> dict[str, str]:
    """What `artifact.json` says of the files, as the client reads it."""
    return dict(json.loads((folder / "artifact.json").read_text(encoding="utf-8"))["outputs"])


def loaded(folder: Path, precision: torch.dtype | None = None) -> RewardModels:
    """The models, computing in this precision; by default in what this processor is fast in."""
    models = RewardModels.load(folder, Letters(), threads=1)
    for one in (models.pointwise, models.pairwise, models.gold):
        if one is not None:
            one.net.precision = precision
    return models


@contextmanager
def listening(app: ASGIApp) -> Iterator[str]:
    """Any application on a free port, in a thread of its own; gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="on", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def served(
    models: RewardModels, folder: Path, *, key: str | None = None, limits: Limits | None = None
) -> Iterator[str]:
    """The scoring server with these models."""
    with listening(make_app(models, card_of(models, folder, 3, limits), key)) as address:
        yield address


def card(address: str) -> Card:
    return Card.model_validate_json(httpx2.get(f"{address}/v1/model").content)
