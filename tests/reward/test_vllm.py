"""The pointwise model behind vLLM's /classify: a mock that computes with transformers' own classifier, for real."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from reward_fixture import Letters
from scoring_fixture import PROMPTS, REPLIES, listening, loaded, shared_artifact
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from characterflywheel.config import FlywheelConfig, RewardConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.pipeline import Artifact, ArtifactRecord, Work
from characterflywheel.reward.composite import RewardModels, precision_of
from characterflywheel.reward.pointwise import Pointwise
from characterflywheel.reward.vllm import served
from characterflywheel.workshop import Workshop
from characterflywheel.workspace import Workspace


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_artifact(tmp_path_factory)


@pytest.fixture(scope="module")
def local(folder: Path) -> Pointwise:
    return loaded(folder, torch.float32).pointwise


class Vllm:
    """What vLLM does with a sequence classifier: right-padded ids through the model, one label, sigmoid unless off."""

    def __init__(self, folder: Path, activation: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        self.activation, self.sizes = activation, list[int]()

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "ours", "object": "model", "root": "x"}]})

    async def classify(self, request: Request) -> Response:
        asked = await request.json()
        assert asked["model"] == "ours"
        assert asked["use_activation"] is False
        self.sizes.append(len(asked["input"]))
        longest = max(map(len, asked["input"]))
        pad = self.model.config.pad_token_id
        ids = torch.tensor([[*one, *[pad] * (longest - len(one))] for one in asked["input"]])
        with torch.inference_mode():
            logits = self.activation(self.model(input_ids=ids, attention_mask=(ids != pad).long()).logits)
        data = [
            {"index": i, "label": "LABEL_0", "probs": row, "num_classes": 1} for i, row in enumerate(logits.tolist())
        ]
        return JSONResponse({"id": "classify-1", "object": "list", "created": 1, "model": "ours", "data": data[::-1]})

    @contextmanager
    def running(self) -> Iterator[str]:
        routes = [Route("/v1/models", self.models), Route("/classify", self.classify, methods=["POST"])]
        with listening(Starlette(routes=routes)) as address:
            yield f"vllm+{address}"


def test_a_classifier_server_gives_the_same_scores(folder: Path, local: Pointwise, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("characterflywheel.reward.vllm.AT_ONCE", 4)
    server = Vllm(folder / "pointwise")
    with server.running() as address:
        there = served(local, address)
        for told, expected in zip(there.score(PROMPTS, REPLIES), local.score(PROMPTS, REPLIES), strict=True):
            assert told == pytest.approx(expected, abs=1e-5)
        firsts, seconds = ["a", "b", "c"], ["I do.", "Why?", "No."]
        assert there.prefers(PROMPTS, firsts, seconds) == pytest.approx(
            local.prefers(PROMPTS, firsts, seconds), abs=1e-5
        )
        assert there.score([], []) == []
        there.connection.close()
    assert max(server.sizes) <= 4


def test_the_composite_takes_it_as_its_preference(folder: Path):
    models = loaded(folder, torch.float32)
    here = models.parts(PROMPTS, REPLIES)
    with Vllm(folder / "pointwise").running() as address:
        there = RewardModels(
            served(models.pointwise, address), models.pairwise, models.signals, models.signal_weights, models.scales
        )
        parts = there.parts(PROMPTS, REPLIES)
        there.pointwise.connection.close()  # type: ignore[attr-defined]
    for mine, other in zip(here, parts, strict=True):
        assert [one.score for one in other] == pytest.approx([one.score for one in mine], abs=1e-5)
        assert [one.signals for one in other] == [one.signals for one in mine]


def test_probabilities_in_place_of_scores_are_noticed(folder: Path, local: Pointwise):
    with Vllm(folder / "pointwise", torch.sigmoid).running() as address, pytest.raises(
        FlywheelError, match=r"'ours', whose scores are up to .* standard deviations off .* knows use_activation"
    ):  # fmt: skip
        served(local, address)


def test_other_weights_are_noticed(folder: Path, local: Pointwise):
    server = Vllm(folder / "gold")
    with server.running() as address, pytest.raises(FlywheelError, match="standard deviations off this model's"):
        served(local, address)


def test_a_server_that_is_no_classifier_is_noticed(folder: Path, local: Pointwise):
    two = Vllm(folder / "pointwise", lambda logits: torch.cat([logits, -logits], 1))
    with two.running() as address, pytest.raises(FlywheelError, match="does not answer like a scoring server"):
        served(local, address)
    with pytest.raises(FlywheelError, match="start it with `vllm serve ARTIFACT/pointwise --runner pooling`"):
        served(local, "vllm+http://127.0.0.1:9", patience_s=0.2)


def test_that_vllm_computed_is_noted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Workshop, "encoder", Letters())
    record = ArtifactRecord.model_validate_json((folder / "artifact.json").read_text())
    work = Work(tmp_path, 1, {"judge": Artifact("reward", folder, None, record)})  # type: ignore[dict-item]
    with Vllm(folder / "pointwise").running() as address:
        config = FlywheelConfig(reward=RewardConfig(server=address))
        rewards = Workshop(Workspace(tmp_path), config, None, None, 1).rewards(work)
        rewards.pointwise.connection.close()  # type: ignore[union-attr]
    assert work.notes == {"scores": f"here, {precision_of(loaded(folder).pointwise)}; pointwise: vLLM"}
