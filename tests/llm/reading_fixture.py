"""Tiny untrained encoders, conversations with alternatives, and the padded batches that their states are checked by."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, RobertaConfig, RobertaModel

from characterflywheel.llm.shared_prefix import Path
from tiny_model import VOCABULARY


def tiny_encoder(kind: Any, **changes: Any) -> Any:
    """An untrained encoder of three layers and width 32 in float32."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 64, "max_position_embeddings": 160, "initializer_range": 0.2, "pad_token_id": 1,
    }  # fmt: skip
    config = RobertaConfig if kind is RobertaModel else BertConfig
    return kind(config(**settings | changes), add_pooling_layer=False).eval()


def forest_of_conversations(rng: random.Random) -> list[Path]:
    """Two system prompts, two histories under each, four replies to each, two of them equally long."""

    def some(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, VOCABULARY) for _ in range(rng.randint(low, high)))

    histories = [(system, some(5, 30)) for system in (some(20, 30), some(10, 20)) for _ in range(2)]
    return [(*history, some(*size)) for history in histories for size in ((1, 1), (6, 6), (2, 12), (6, 6))]


def block_masked(model: Any, paths: Sequence[Path]) -> list[Tensor]:
    """transformers' states of each path's tokens, from one right-padded batch and a (paths, 1, n, n) mask: a token
    sees its own segment and those before it. Padding looks at the first token, since a row must see something."""
    flat = [[token for segment in path for token in segment] for path in paths]
    width = max(map(len, flat))
    sees = torch.zeros(len(paths), 1, width, width, dtype=torch.bool)
    sees[..., 0] = True
    for i, path in enumerate(paths):
        start = 0
        for segment in path:
            sees[i, 0, start : start + len(segment), : start + len(segment)] = True
            start += len(segment)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in flat])
    first = 0 if model.config.model_type == "bert" else model.config.pad_token_id + 1
    positions = torch.arange(first, first + width).expand(len(paths), -1)
    states = model(input_ids=ids, position_ids=positions, attention_mask=sees).last_hidden_state
    return [states[i, : len(ids)] for i, ids in enumerate(flat)]
