"""A Llama-family model's shape from its `config.json` alone: how many parameters there are, and where.

Counts are those of the modules that transformers builds (tests compare them); nothing here imports torch. The shapes
of models too large to carry are in `shapes/`, with the numbers of their published configurations.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FlywheelError

SHAPES = Path(__file__).parent / "shapes"


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder; `head` is the size of one attention head, `tied` whether input and output embedding are one.

    `biases`: numbers added to what the linear layers of one layer put out.
    """

    layers: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    tied: bool
    biases: int

    @property
    def linear(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of a layer's linear modules: q, k, v, o, gate, up, down."""
        q, kv = self.heads * self.head, self.kv_heads * self.head
        wide = (self.width, self.feed_forward)
        return ((self.width, q), (self.width, kv), (self.width, kv), (q, self.width), wide, wide, wide[::-1])

    @property
    def layer(self) -> int:
        """Parameters of a layer, its two norms included."""
        return sum(a * b for a, b in self.linear) + self.biases + 2 * self.width

    @property
    def embedding(self) -> int:
        """Parameters of one embedding matrix."""
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.embedding * (1 if self.tied else 2) + self.width

    @property
    def multiplied(self) -> int:
        """Parameters that every token is multiplied with in the layers (not the head's)."""
        return self.layers * sum(a * b for a, b in self.linear)

    def adapters(self, rank: int, layers: int | None = None) -> int:
        """Parameters of low-rank adapters on all linear modules of the last `layers` layers."""
        return min(layers or self.layers, self.layers) * sum(rank * (a + b) for a, b in self.linear)

    def trained(self, train_layers: int | None, lora_rank: int | None) -> int:
        """Parameters that learn: adapters, the last layers with the last norm, or all."""
        if lora_rank is not None:
            return self.adapters(lora_rank, train_layers)
        if train_layers is not None:
            return min(train_layers, self.layers) * self.layer + self.width
        return self.parameters


def shape_of(config: dict[str, Any]) -> Shape:
    """Read the values of a `config.json`.

    Raises:
        FlywheelError: the model is not of the Llama family, or a size is missing.
    """
    family = config.get("model_type")
    if family not in ("llama", "mistral", "qwen2"):
        raise FlywheelError(f"model type {family!r} is not of the Llama family (llama, mistral, qwen2).")
    try:
        width, heads = config["hidden_size"], config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        head = config.get("head_dim") or width // heads
        q, kv, wide = heads * head, kv_heads * head, config["intermediate_size"]
        attention = bool(config.get("attention_bias", False))
        biases = (q + 2 * kv) if attention or family == "qwen2" else 0
        biases += width if attention and family != "qwen2" else 0
        biases += (2 * wide + width) if config.get("mlp_bias", False) else 0
        return Shape(
            config["num_hidden_layers"], width, wide, heads, kv_heads, head, config["vocab_size"],
            bool(config.get("tie_word_embeddings", False)), biases,
        )  # fmt: skip
    except KeyError as error:
        raise FlywheelError(f"config.json has no {error.args[0]!r}: give a complete Hugging Face folder.") from None


def read_shape(folder: Path) -> Shape:
    """The shape of a model folder; a missing folder named as one of `shapes/` has that shape.

    Raises:
        FlywheelError: there is neither a folder nor a known shape of its name.
    """
    file = folder / "config.json"
    if not file.exists():
        file = SHAPES / f"{known(folder.name)}.json"
    if not file.exists():
        names = ", ".join(sorted(path.stem for path in SHAPES.glob("*.json")))
        raise FlywheelError(
            f"model folder {str(folder)!r} has no config.json, and its name is not of a known shape ({names})."
        )
    return shape_of(json.loads(file.read_text(encoding="utf-8")))


def known(name: str) -> str:
    """The shape's name in a folder's: `Llama-3.1-70B-Instruct` is `llama-3.1-70b`."""
    return name.lower().removesuffix("-instruct").removeprefix("meta-")
