"""The int8 backend: log-probabilities against transformers in float32, repeatable draws, honest order, clear errors."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from characterflywheel.config import FlywheelConfig, ModelsConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.llm import Sampling, ct2
from characterflywheel.llm.ct2 import CTranslate2Model, Precision, converted
from characterflywheel.workshop import BACKENDS, Workshop
from characterflywheel.workspace import Workspace
from tiny_model import asks, says

pytest.importorskip("ctranslate2", reason="the optional package ctranslate2 is not installed")

OTHER = says("system", "You are Di: warm.")
CONVERSATIONS = (
    asks("what do you like best about tea and bread?"), asks("hi"), asks("the stars", OTHER),
    (says("user", "no system prompt here"),), asks("tea"),
)  # fmt: skip
SEEDS = (3, 1, 4, 15, 9)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLYWHEEL_CACHE", str(tmp_path_factory.getbasetemp() / "ct2-cache"))


@pytest.fixture
def model(tiny_folder: Path) -> CTranslate2Model:
    return CTranslate2Model.load(tiny_folder, "tiny", max_prompt_tokens=128, threads=1)


@pytest.mark.parametrize(("precision", "mean", "most"), [("float32", 3e-6, 3e-5), ("int8", 0.1, 0.5)])
def test_logprobs_are_those_of_transformers_at_the_sampling_temperature(
    tiny_folder: Path, precision: Precision, mean: float, most: float
) -> None:
    """Prompts of unequal length, three system prompts, several batches. Rounding to int8 costs a narrow model most."""
    model = CTranslate2Model.load(tiny_folder, "tiny", max_prompt_tokens=128, threads=1, precision=precision)
    reference = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    replies = model.complete(CONVERSATIONS, n=3, sampling=Sampling(temperature=0.7, max_tokens=8), seeds=SEEDS)
    apart = []
    for conversation, drawn in zip(CONVERSATIONS, replies, strict=True):
        head, rest = model.format.prompt(conversation)
        for reply in drawn:
            ids = torch.tensor([[*head, *rest, *reply.token_ids]])
            with torch.inference_mode():
                logits = reference(ids).logits[0, len(head) + len(rest) - 1 : -1] / 0.7
            exact = logits.log_softmax(-1).gather(1, torch.tensor(reply.token_ids).unsqueeze(1)).squeeze(1)
            apart += (exact - torch.tensor(reply.logprobs)).abs().tolist()
    assert len(apart) >= 60
    assert sum(apart) / len(apart) < mean
    assert max(apart) < most


def test_same_call_same_replies(model: CTranslate2Model) -> None:
    first = model.complete(CONVERSATIONS, n=2, sampling=Sampling(max_tokens=6), seeds=SEEDS)
    assert model.complete(CONVERSATIONS, n=2, sampling=Sampling(max_tokens=6), seeds=SEEDS) == first
    assert model.complete(CONVERSATIONS, n=2, sampling=Sampling(max_tokens=6), seeds=SEEDS[::-1]) != first


def test_tokens_are_drawn_with_their_probabilities(model: CTranslate2Model) -> None:
    """The likeliest first token comes up as often as its probability says, within four standard errors."""
    (drawn,) = model.complete([asks("hi")], n=600, sampling=Sampling(max_tokens=1), seeds=[7])
    chances = {reply.token_ids[0]: math.exp(reply.logprobs[0]) for reply in drawn}
    likeliest = max(chances, key=lambda token: chances[token])
    share = sum(reply.token_ids[0] == likeliest for reply in drawn) / 600
    assert len(chances) > 20
    assert abs(share - chances[likeliest]) < 4 * math.sqrt(chances[likeliest] / 600)


def test_replies_are_not_sorted_by_likelihood(model: CTranslate2Model) -> None:
    drawn = model.complete(CONVERSATIONS, n=6, sampling=Sampling(max_tokens=4), seeds=SEEDS)
    scores = [[sum(reply.logprobs) / len(reply.logprobs) for reply in replies] for replies in drawn]
    assert any(row != sorted(row, reverse=True) for row in scores)
    assert any(row[0] < max(row) for row in scores)


def test_a_reply_ends_by_itself_or_at_the_limit(model: CTranslate2Model) -> None:
    (drawn,) = model.complete([asks("hi")], n=64, sampling=Sampling(temperature=2.0, max_tokens=24), seeds=[2])
    end = model.format.tokenizer.eos_token_id
    assert {reply.finish_reason for reply in drawn} == {"stop", "length"}
    for reply in drawn:
        assert len(reply.token_ids) == len(reply.logprobs) <= 24
        assert (reply.finish_reason == "stop") == (reply.token_ids[-1] == end)
        assert end not in reply.token_ids[:-1]
        assert "<|im_end|>" not in reply.text


def test_any_of_a_models_end_tokens_ends_a_reply(tiny_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    ends = list(range(2, 100))
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}), encoding="utf-8")
    model = CTranslate2Model.load(copy, "tiny", max_prompt_tokens=128, threads=1)
    (drawn,) = model.complete([asks("hi")], n=32, sampling=Sampling(max_tokens=24), seeds=[5])
    assert len({reply.token_ids[-1] for reply in drawn if reply.finish_reason == "stop"}) > 3
    for reply in drawn:
        assert (reply.finish_reason == "stop") == (reply.token_ids[-1] in ends)
        assert not set(reply.token_ids[:-1]) & set(ends)


def test_greedy_does_not_depend_on_company(model: CTranslate2Model) -> None:
    greedy = Sampling(temperature=0, max_tokens=6)
    together = model.complete(CONVERSATIONS, sampling=greedy, seeds=SEEDS)
    alone = [model.complete([c], sampling=greedy, seeds=[0])[0] for c in CONVERSATIONS]
    assert [r.token_ids for (r,) in together] == [r.token_ids for (r,) in alone]
    narrow = model.complete(CONVERSATIONS, n=2, sampling=Sampling(top_p=1e-6, max_tokens=6), seeds=SEEDS)
    assert [r.token_ids for (r, _) in narrow] == [r.token_ids for (r,) in together]
    assert set(together[0][0].logprobs) == {0.0}


def test_progress_counts_conversations(model: CTranslate2Model) -> None:
    seen: list[tuple[int, int]] = []
    model.complete(
        CONVERSATIONS, sampling=Sampling(max_tokens=2), seeds=SEEDS, on_progress=lambda *done: seen.append(done)
    )
    assert seen[-1] == (5, 5)
    assert model.complete([], seeds=[]) == []
    with pytest.raises(ValueError, match="as many seeds"):
        model.complete(CONVERSATIONS, seeds=[1])


def test_weights_are_converted_once(tiny_folder: Path, tmp_path: Path) -> None:
    first = converted(tiny_folder).folder
    written = (first / "model.bin").stat().st_mtime_ns
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    assert converted(copy).folder == first
    assert (first / "model.bin").stat().st_mtime_ns == written
    assert converted(other(tiny_folder, tmp_path, 1)).folder != first


def other(folder: Path, where: Path, number: int) -> Path:
    """A copy of the model with another last weight."""
    copy = shutil.copytree(folder, where / f"other-{number}")
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-2] ^= number
    (copy / "model.safetensors").write_bytes(weights)
    return copy


HOLDS = """
import sys
from pathlib import Path
from characterflywheel.llm.ct2 import converted

kept = converted(Path(sys.argv[1]))
print(kept.folder, flush=True)
sys.stdin.read()
"""


def test_the_cache_keeps_the_newest_and_those_in_use(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for two: one that this process has open, one that another has open, and the newest two of the others."""
    monkeypatch.setenv("FLYWHEEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ct2, "KEPT_MODELS", 2)
    folders = [other(tiny_folder, tmp_path, number) for number in range(1, 7)]
    mine = CTranslate2Model.load(folders[0], "mine", max_prompt_tokens=128, threads=1)
    converted(folders[1])
    words = [sys.executable, "-c", HOLDS, str(folders[1])]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        made = [converted(folder).folder for folder in folders[2:5]]
        assert there(tmp_path) == {mine.folder, theirs, *made[1:]}
        assert converted(folders[3]).folder == made[1], "used again, it is the newest"
        made.append(converted(folders[5]).folder)
        assert there(tmp_path) == {mine.folder, theirs, made[1], made[3]}
        assert len(mine.complete([asks("hi")], sampling=Sampling(max_tokens=2), seeds=[1])) == 1
        process.kill()
    made.append(converted(folders[4]).folder)
    assert there(tmp_path) == {mine.folder, made[3], made[4]}, "made again; who is killed uses nothing any more"
    del mine
    assert converted(folders[0]).folder in there(tmp_path)
    made.append(converted(folders[2]).folder)
    assert len(there(tmp_path)) == 2
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {path.name for path in there(tmp_path)}


def there(where: Path) -> set[Path]:
    return {path.parent for path in (where / "cache").glob("ct2-*/model.bin")}


def test_config_chooses_the_backend(tiny_folder: Path, tmp_path: Path) -> None:
    config = FlywheelConfig(models=ModelsConfig(backend="ctranslate2", threads=1))
    shop = Workshop(Workspace(tmp_path), config, None, None, 1)
    assert isinstance(shop.model(tiny_folder, "tiny"), CTranslate2Model)
    assert set(BACKENDS) == set(ModelsConfig.model_fields["backend"].annotation.__args__)


def test_errors_name_the_remedy(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FlywheelError, match=r"not 'cuda'.*\"native\""):
        CTranslate2Model.load(tiny_folder, "tiny", device="cuda", max_prompt_tokens=128, threads=1)
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(FlywheelError, match=r"pip install .*ctranslate2"):
        CTranslate2Model.load(tiny_folder, "tiny", max_prompt_tokens=128, threads=1)
