"""An encoder over token sequences that share prefixes (PAPER section 3): a context is read once for all replies.

The forest of `shared_prefix`, with the attention of an encoder: inside a segment tokens see each other both ways, and
every token sees all segments above its own. A segment never sees what comes below it, so its states do not depend on
which replies follow: this is a BERT with a block mask, not with its usual full one, and equals one run on the padded
batch with that mask. Positions count from the root; every token has type 0.

Works on the modules of Hugging Face's `BertModel` and `RobertaModel`, with gradients; weights stay where they are.
"""

from typing import Any

import torch
from torch import Tensor

from .shared_prefix import Forest, attend

FAMILY = ("bert", "roberta", "xlm-roberta")


def hidden_states(model: Any, forest: Forest) -> Tensor:
    """Final states of every row, shape (N, width)."""
    x = embed(model, forest)
    trees = forest.masked(both_ways=True)
    for layer in model.encoder.layer:
        attention = layer.attention.self
        q, k, v = (
            part(x).unflatten(-1, (attention.num_attention_heads, -1))
            for part in (attention.query, attention.key, attention.value)
        )
        dropout = attention.dropout.p if model.training else 0.0
        mixed = torch.cat(
            [attend(q[t.start : t.stop], k[t.start : t.stop], v[t.start : t.stop], t.mask, dropout) for t in trees]
        )
        x = layer.attention.output(mixed, x)
        x = layer.output(layer.intermediate(x), x)
    return x


def embed(model: Any, forest: Forest) -> Tensor:
    """Normalised sums of token, position and type embeddings, shape (N, width)."""
    positions = (forest.positions + first_position(model.config)).unsqueeze(0)
    return model.embeddings(input_ids=forest.ids.unsqueeze(0), position_ids=positions)[0]  # type: ignore[no-any-return]


def first_position(config: Any) -> int:
    """The position of the first token: RoBERTa counts from behind its padding token's number, BERT from 0."""
    return 0 if config.model_type == "bert" else config.pad_token_id + 1
