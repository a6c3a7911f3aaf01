"""RL's samplers on the tiny model: what they say of what they drew, and that pushed weights are what draws next."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from fastapi import Response
from processes import together

from characterflywheel.config import RLConfig, SamplerConfig
from characterflywheel.errors import FlywheelError, SamplerGone
from characterflywheel.llm import Sampling
from characterflywheel.llm.native import NativeModel, load_model
from characterflywheel.training.adapters import attach
from characterflywheel.training.parallel import Parallel
from characterflywheel.training.rl.samplers import OPENERS, RolloutSampler, open_sampler
from characterflywheel.training.sharding import load_sharded
from tiny_model import asks, tiny_llama, tiny_tokenizer
from token_server import TokenServer, exact, listening, nowhere

CONVERSATIONS = [asks("what do you like best about tea?"), asks("hi"), asks("the stars"), asks("the sea is cold")]
SEEDS = [3, 1, 4, 15]
SAMPLING = Sampling(temperature=0.7, max_tokens=8)
LOCAL: list[tuple[dict[str, str], float]] = [
    ({"kind": "native", "precision": "float32"}, 1e-4),
    ({"kind": "native", "precision": "bfloat16"}, 0.2),
    ({"kind": "transformers"}, 1e-4),
    ({"kind": "transformers", "precision": "bfloat16"}, 0.2),
    ({"kind": "ctranslate2", "precision": "float32"}, 1e-4),
    ({"kind": "ctranslate2"}, 0.5),
]
"""Settings, and the largest difference of a token's log-probability from a float32 pass."""


def opened(folder: Path, scratch: Path, **settings: Any) -> RolloutSampler:
    config = RLConfig(sampler=SamplerConfig(**settings), max_prompt_tokens=128, max_tokens=8)
    return open_sampler(config, folder, tiny_tokenizer(), scratch=scratch, threads=1, batch_replies=8)


def drawn(sampler: RolloutSampler, n: int = 3) -> list[list[tuple[list[int], list[float]]]]:
    prompts = [sampler.format.prompt(one) for one in CONVERSATIONS]
    return sampler.sample(prompts, n=n, sampling=SAMPLING, seeds=SEEDS)


def apart(sampler: RolloutSampler, model: Any, replies: list[list[tuple[list[int], list[float]]]]) -> float:
    """The largest difference of a token's log-probability from that of `model` in float32."""
    worst = 0.0
    for conversation, several in zip(CONVERSATIONS, replies, strict=True):
        head, rest = sampler.format.prompt(conversation)
        for ids, logs in several:
            own = exact(model, (*head, *rest), ids, SAMPLING.temperature)
            worst = max(worst, *(abs(a - b) for a, b in zip(own, logs, strict=True)))
    return worst


def ids_of(replies: list[list[tuple[list[int], list[float]]]]) -> list[list[list[int]]]:
    return [[ids for ids, _ in several] for several in replies]


def names(one: Any) -> str:
    return "-".join(one.values()) if isinstance(one, dict) else ""


@pytest.mark.parametrize(("settings", "bound"), LOCAL, ids=names)
def test_what_is_drawn_has_the_log_probabilities_of_the_weights_that_drew(
    tiny_folder: Path, tmp_path: Path, settings: dict[str, str], bound: float
) -> None:
    """At the start, and after a push of another model's weights. Rounding costs a narrow model most."""
    if settings["kind"] == "ctranslate2":
        pytest.importorskip("ctranslate2", reason="the optional package ctranslate2 is not installed")
    old, new = load_model(tiny_folder, torch.float32)[0], tiny_llama(seed=1)
    sampler = opened(tiny_folder, tmp_path / "scratch", **settings)
    before = drawn(sampler)
    assert drawn(sampler) == before, "the same call gives the same replies"
    assert sampler.versions == [[0] * 3] * 4
    kept = [p.clone() for p in new.parameters()]
    sampler.push(new)
    after = drawn(sampler)
    assert sampler.versions == [[1] * 3] * 4
    assert apart(sampler, old, before) < bound < apart(sampler, new, before)
    assert apart(sampler, new, after) < bound < apart(sampler, old, after)
    assert all(torch.equal(a, b) for a, b in zip(kept, new.parameters(), strict=True)), "the learner's are untouched"
    sampler.push(old, version=7)
    again = drawn(sampler)
    assert ids_of(again) == ids_of(before), "the old weights are back"
    assert {version for several in sampler.versions for version in several} == {7}
    sampler.close()
    assert not (tmp_path / "scratch" / "process-0").exists()


@pytest.mark.parametrize("kind", ["native", "transformers", "ctranslate2"])
def test_adapters_are_pushed_as_the_weights_they_stand_for(tiny_folder: Path, tmp_path: Path, kind: str) -> None:
    learner = load_model(tiny_folder, torch.float32)[0]
    attach(learner, 2)
    with torch.no_grad():
        for name, parameter in learner.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    sampler = opened(tiny_folder, tmp_path / "scratch", kind=kind, precision="float32")
    sampler.push(learner)
    replies = drawn(sampler)
    assert apart(sampler, learner, replies) < 1e-4 < apart(sampler, load_model(tiny_folder, torch.float32)[0], replies)
    sampler.close()


@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_a_sampler_that_rested_draws_what_is_pushed(tiny_folder: Path, tmp_path: Path, kind: str) -> None:
    """It holds no weights meanwhile, refuses to draw, and draws the same as before once it has them again."""
    sampler = opened(tiny_folder, tmp_path, kind=kind, precision="float32")
    before, (model, _) = drawn(sampler), load_model(tiny_folder, torch.float32)
    sampler.rest()
    assert sum(p.numel() for p in sampler.engine.model.parameters()) == 0  # type: ignore[attr-defined]
    with pytest.raises(FlywheelError, match="push the learner's"):
        drawn(sampler)
    sampler.push(model)
    assert drawn(sampler) == before


def test_generate_draws_by_chance_and_stops_at_any_end(tiny_folder: Path, tmp_path: Path) -> None:
    """The likeliest first token comes up as often as it says; no folder's own penalty or top-k bends the draw."""
    sampler = opened(tiny_folder, tmp_path / "scratch", kind="transformers")
    prompt = sampler.format.prompt(asks("hi"))
    first = Sampling(temperature=1.0, max_tokens=1)
    (replies,) = sampler.sample([prompt], n=600, sampling=first, seeds=[7])
    chances = {ids[0]: math.exp(logs[0]) for ids, logs in replies}
    likeliest = max(chances, key=lambda token: chances[token])
    share = sum(ids[0] == likeliest for ids, _ in replies) / 600
    assert len(chances) > 60, "more than a top-k of 50 would leave"
    assert abs(share - chances[likeliest]) < 4 * math.sqrt(chances[likeliest] / 600)
    long = Sampling(temperature=2.0, max_tokens=24)
    (replies,) = sampler.sample([prompt], n=64, sampling=long, seeds=[2])
    assert {ids[-1] in sampler.ends for ids, _ in replies} == {True, False}
    for ids, logs in replies:
        assert len(ids) == len(logs) <= 24
        assert not sampler.ends & set(ids[:-1])
    narrow, greedy = (
        sampler.sample([prompt], n=2, sampling=one, seeds=[1])[0]
        for one in (Sampling(top_p=1e-6, max_tokens=6), Sampling(temperature=0, max_tokens=6))
    )
    assert [ids for ids, _ in narrow] == [ids for ids, _ in greedy]
    assert set(greedy[0][1]) == {0.0}
    own = exact(tiny_model(tiny_folder), (*prompt[0], *prompt[1]), narrow[0][0], 1.0)
    assert narrow[0][1] == pytest.approx(own, abs=1e-4), "as before the truncation"


def tiny_model(folder: Path) -> Any:
    return load_model(folder, torch.float32)[0]


def test_ctranslate2_keeps_only_the_newest_weights(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing in the cache, which would keep a model for each generation."""
    pytest.importorskip("ctranslate2", reason="the optional package ctranslate2 is not installed")
    monkeypatch.setenv("FLYWHEEL_CACHE", str(tmp_path / "cache"))
    sampler = opened(tiny_folder, tmp_path / "scratch", kind="ctranslate2")
    for seed in (1, 2, 3):
        assert len(list(tmp_path.rglob("model.bin"))) == 1
        sampler.push(tiny_llama(seed=seed))
    sampler.close()
    assert not list(tmp_path.rglob("model.bin"))


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[tuple[TokenServer, str]]:
    one = TokenServer(tiny_folder)
    with listening(one) as address:
        yield one, address


def far(folder: Path, tmp_path: Path, server: tuple[TokenServer, str], **settings: Any) -> RolloutSampler:
    server[0].faults, server[0].asked, server[0].says_version = {}, [], False
    server[0].change = lambda answer: answer
    defaults = {"precision": "float32", "patience_s": 0.3, "weights_folder": str(tmp_path / "weights")}
    return opened(
        folder, tmp_path / "scratch", kind="endpoint", address=server[1], **defaults | settings
    )  # fmt: skip


@pytest.mark.parametrize("reload", ["vllm", "/reload"])
def test_a_server_loads_what_is_pushed(
    tiny_folder: Path, tmp_path: Path, server: tuple[TokenServer, str], reload: str
) -> None:
    """Its own weights are replaced by the stage's start at once, and one folder of weights is kept."""
    server[0].model.model.load_state_dict(tiny_llama(seed=9).state_dict())
    sampler = far(tiny_folder, tmp_path, server, reload=reload)
    (tmp_path / "weights" / "ours.txt").write_text("not to be touched", encoding="utf-8")
    old, new = tiny_model(tiny_folder), tiny_llama(seed=1)
    assert apart(sampler, old, drawn(sampler)) < 1e-4
    for version in (1, 2):
        sampler.push(new, version=version)
        assert [path.name for path in (tmp_path / "weights").glob("flywheel-*/*")] == [f"version-00000{version}"]
    assert apart(sampler, new, drawn(sampler)) < 1e-4
    assert sampler.versions == [[2] * 3] * 4
    paths = [path for path, _ in server[0].asked]
    assert paths.count("/reset_prefix_cache") == (3 if reload == "vllm" else 0)
    sampler.close()
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["ours.txt"]


def test_only_a_run_s_own_weights_are_ever_removed(
    tiny_folder: Path, tmp_path: Path, server: tuple[TokenServer, str]
) -> None:
    """Two runs share a folder with weights of somebody else; one of them is killed and begins again."""
    weights = tmp_path / "weights"
    (weights / "version-2-final").mkdir(parents=True)
    (weights / "version-2-final" / "model.safetensors").write_text("somebody's", encoding="utf-8")
    one, other = (far(tiny_folder, tmp_path / name, server, weights_folder=str(weights)) for name in ("one", "other"))
    one.push(tiny_llama(seed=1), version=7)
    other.push(tiny_llama(seed=2), version=9)
    assert sorted(path.name for path in weights.glob("flywheel-*/*")) == ["version-000007", "version-000009"]
    one.engine.endpoint.close()  # type: ignore[attr-defined]  # and no more: as a kill
    again = far(tiny_folder, tmp_path / "one", server, weights_folder=str(weights))
    assert sorted(path.name for path in weights.glob("flywheel-*/*")) == ["version-000000", "version-000009"]
    again.close()
    assert [path.name for path in weights.glob("flywheel-*/*")] == ["version-000009"]
    other.close()
    assert [path.relative_to(weights).as_posix() for path in weights.rglob("*")] == [
        "version-2-final", "version-2-final/model.safetensors",
    ]  # fmt: skip


def test_a_server_says_which_weights_drew_each_reply(
    tiny_folder: Path, tmp_path: Path, server: tuple[TokenServer, str]
) -> None:
    """It says of each reply which weights drew it, and one in two is slow to change."""
    sampler = far(tiny_folder, tmp_path, server, reload="/reload")
    sampler.push(tiny_llama(seed=1))
    slow = iter(range(100))
    server[0].change = lambda answer: answer | {"weight_version": next(slow) % 2}
    drawn(sampler)
    assert sorted(several[0] for several in sampler.versions) == [0, 0, 1, 1]
    sampler.close()


def test_a_reload_that_fails_is_borne_as_often_as_is_allowed(
    tiny_folder: Path, tmp_path: Path, server: tuple[TokenServer, str]
) -> None:
    """What is drawn meanwhile has the older weights' log-probabilities, and is stale; a success begins anew."""
    sampler = far(tiny_folder, tmp_path, server, reload="/reload", max_stale=1)
    old, new = tiny_model(tiny_folder), tiny_llama(seed=1)

    def fail(times: int) -> None:
        server[0].faults["/reload"] = [Response("no room", status_code=400)] * times

    fail(1)
    sampler.push(new)
    replies = drawn(sampler)
    assert apart(sampler, old, replies) < 1e-4
    assert sampler.versions == [[0] * 3] * 4
    sampler.push(new)
    assert apart(sampler, new, drawn(sampler)) < 1e-4
    assert sampler.versions == [[2] * 3] * 4
    fail(2)
    sampler.push(new)
    with pytest.raises(SamplerGone, match=r"weights of version 4 \(2 in a row, .*max_stale == 1 may fail\): .*no room"):
        sampler.push(new)
    sampler.close()


def test_a_server_that_never_had_the_weights_is_gone(
    tiny_folder: Path, tmp_path: Path, server: tuple[TokenServer, str]
) -> None:
    with pytest.raises(SamplerGone, match=r"weights of version 0 .*404"):
        far(tiny_folder, tmp_path, server, reload="/other", max_stale=9)
    with pytest.raises(SamplerGone, match=r"did not answer in \d+ tries"):
        opened(
            tiny_folder, tmp_path, kind="endpoint", address=nowhere(), patience_s=0.2, weights_folder=str(tmp_path)
        )  # fmt: skip


def test_a_server_that_dies_between_two_steps_is_gone(tiny_folder: Path, tmp_path: Path) -> None:
    one = TokenServer(tiny_folder)
    with listening(one) as address:
        sampler = far(tiny_folder, tmp_path, (one, address))
        drawn(sampler)
    with pytest.raises(SamplerGone, match="start it and run again"):
        drawn(sampler)
    with pytest.raises(SamplerGone, match="could not load the weights of version 1"):
        sampler.push(tiny_llama(seed=1))
    sampler.close()


def test_settings_that_do_not_go_together_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    refused: list[tuple[dict[str, str], str]] = [
        ({"precision": "int8"}, r'"int8" is for "ctranslate2", the sampler is \'native\''),
        ({"kind": "ctranslate2", "precision": "bfloat16"}, r'"bfloat16" is not for "ctranslate2"'),
        ({"kind": "endpoint", "address": "http://there:1"}, r"needs address, e.g. .*, and weights_folder"),
    ]
    for settings, said in refused:
        with pytest.raises(ValueError, match=said):
            SamplerConfig.model_validate(settings)
    other = tiny_llama(num_hidden_layers=1)
    sampler = opened(tiny_folder, tmp_path)
    with pytest.raises(FlywheelError, match=r"the learner has no weights model.layers.1"):
        sampler.push(other)


def push_shards(parallel: Parallel, folder: Path, scratch: Path, settings: dict[str, str]) -> Any:
    """What one of several processes draws after a push of weights that are split over all."""
    learner = load_sharded(folder, parallel, "cpu")
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.mul_(1.1)
    config = RLConfig(sampler=SamplerConfig.model_validate(settings), max_prompt_tokens=128, max_tokens=8)
    sampler = open_sampler(
        config, folder, tiny_tokenizer(), scratch=scratch, threads=1, batch_replies=8, parallel=parallel
    )
    sampler.push(learner, version=5)
    replies, versions = drawn(sampler), sampler.versions
    parallel.barrier()
    sampler.close()
    return replies, versions


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native", "endpoint"])
def test_weights_that_are_split_over_processes_are_pushed_whole(
    tiny_folder: Path, tmp_path: Path, server: tuple[TokenServer, str], kind: str
) -> None:
    """Each process has a sampler of its own, or asks the same server, which the main one tells to load them."""
    settings = {"kind": kind, "precision": "float32"}
    if kind == "endpoint":
        server[0].faults, server[0].asked, server[0].change = {}, [], lambda answer: answer
        settings |= {"address": server[1], "weights_folder": str(tmp_path / "weights"), "reload": "/reload"}
    one, two = together(push_shards, tiny_folder, tmp_path / "scratch", settings, sharding="full")
    assert one == two
    grown = tiny_model(tiny_folder)
    with torch.no_grad():
        for parameter in grown.parameters():
            parameter.mul_(1.1)
    replies, versions = one
    sampler = opened(tiny_folder, tmp_path / "alone", precision="float32")
    assert apart(sampler, grown, replies) < 1e-4 < apart(sampler, tiny_model(tiny_folder), replies)
    assert {version for several in versions for version in several} == {5}
    if kind == "endpoint":
        assert [path for path, _ in server[0].asked].count("/reload") == 2, "the start's, and the pushed"
        assert not list((tmp_path / "weights").iterdir())


class StandIn:
    """vLLM's `LLM` as documented, on the native sampler: it shows that we call it so, not that vLLM does as it says."""

    def __init__(self, model: str, **settings: Any) -> None:
        self.settings = settings
        torch_model, tokenizer = load_model(Path(model), torch.float32)
        self.model = NativeModel(torch_model, tokenizer, "vllm", max_prompt_tokens=128, threads=1)
        self.resets = 0

    def generate(self, prompts: Any, sampling_params: Any, use_tqdm: bool) -> list[Any]:
        return [self._answer(*one) for one in zip(prompts, sampling_params, strict=True)]

    def _answer(self, prompt: Any, how: Any) -> Any:
        sampling = Sampling(how.temperature, how.top_p, how.max_tokens)
        (drawn,) = self.model.sample(
            [((), tuple(prompt["prompt_token_ids"]))], n=how.n, sampling=sampling, seeds=[how.seed]
        )
        outputs = []
        for ids, logs in drawn:
            told = [{token: SimpleNamespace(logprob=value)} for token, value in zip(ids, logs, strict=True)]
            outputs.append(SimpleNamespace(token_ids=ids, logprobs=told))
        return SimpleNamespace(outputs=outputs)

    def collective_rpc(self, method: str, kwargs: dict[str, str]) -> None:
        assert method == "reload_weights"
        self.model.model.load_state_dict(tiny_model(Path(kwargs["weights_path"])).state_dict())

    def reset_prefix_cache(self) -> None:
        self.resets += 1


def test_vllm_is_called_as_it_documents(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FlywheelError, match=r'sampler "vllm" needs its package'):
        opened(tiny_folder, tmp_path, kind="vllm")
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = StandIn, SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    sampler = opened(tiny_folder, tmp_path / "scratch", kind="vllm", precision="float32")
    engine: Any = sampler.engine.engine  # type: ignore[attr-defined]
    assert engine.settings["logprobs_mode"] == "processed_logprobs"
    assert engine.settings["max_model_len"] == 128 + 8
    old, new = tiny_model(tiny_folder), tiny_llama(seed=1)
    assert apart(sampler, old, drawn(sampler)) < 1e-4
    sampler.push(new)
    assert apart(sampler, new, drawn(sampler)) < 1e-4
    assert (sampler.versions, engine.resets) == ([[1] * 3] * 4, 1)
    sampler.close()
    assert not list((tmp_path / "scratch").rglob("*.safetensors"))


def test_the_kinds_are_those_of_the_configuration() -> None:
    assert set(OPENERS) == set(get_args(SamplerConfig.model_fields["kind"].annotation))
