"""The networks under both preference models: the first layers of the policy and a scalar head (PAPER section 3).

Initialised from the policy's own weights and read with its own tokenizer, which keeps capitals and emoji. Everything
of one prompt runs in one shared-prefix pass, in bfloat16 where the processor has it, over float32 weights.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import cos, pi
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import FlywheelError
from ..llm import shared_prefix
from ..llm.chat_format import ChatFormat
from ..records import ChatMessage

T = TypeVar("T")
HEAD_RATE = 20.0  # the head starts from nothing and may move faster than the layers
TOKENS_AT_ONCE = 4096


class Backbone(nn.Module):
    """First layers of a Llama-family policy with a linear head; `ends` states of a path are read and summed by it."""

    def __init__(self, model: Any, layers: int, ends: int) -> None:
        super().__init__()
        shared_prefix.check_family(model.config)
        if layers > len(model.layers):
            raise FlywheelError(
                f"reward.layers = {layers}, the policy has {len(model.layers)}: keep at most that many."
            )
        model.layers = model.layers[:layers]
        model.config.num_hidden_layers = layers
        model.embed_tokens.requires_grad_(False)
        self.model, self.ends = model, ends
        self.head = nn.Linear(model.config.hidden_size * ends, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, paths: Sequence[shared_prefix.Path], read: Sequence[Sequence[int]]) -> Tensor:
        """A score for each path, shape (paths,). `read[i]`: the places on path i, counted from its root, to read."""
        forest = shared_prefix.plant(paths, self.head.weight.device)
        with lower_precision(self.head.weight.device):
            states = shared_prefix.hidden_states(self.model, forest).float()
        places = torch.stack([rows[list(at)] for rows, at in zip(forest.rows, read, strict=True)])
        return self.head(states[places].flatten(1)).squeeze(1)  # type: ignore[no-any-return]


@contextmanager
def lower_precision(device: torch.device) -> Iterator[None]:
    """bfloat16 matrix products where the device has them; elsewhere emulation would be slower than float32."""
    has = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=has):
        yield


def from_policy(folder: Path, layers: int, ends: int) -> Backbone:
    """A fresh reward network from a policy's Hugging Face folder."""
    from transformers import LlamaForCausalLM  # noqa: PLC0415 - takes seconds, which a plan can do without
    from transformers.utils import logging  # noqa: PLC0415

    logging.disable_progress_bar()
    return Backbone(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).model, layers, ends)


def chat_format(folder: Path, max_prompt_tokens: int) -> ChatFormat:
    """The tokenizer of a policy's (or saved reward model's) folder."""
    from transformers import AutoTokenizer  # noqa: PLC0415

    return ChatFormat(AutoTokenizer.from_pretrained(folder), max_prompt_tokens)


def train(
    net: Backbone,
    steps: Sequence[Sequence[T]],
    loss_of: Callable[[Sequence[T]], Tensor],
    *,
    learning_rate: float,
    on_step: Callable[[float], None] = lambda loss: None,
) -> None:
    """AdamW with a tenth of warm-up, then a cosine to zero; `loss_of` is called once a step."""
    layers = [p for p in net.model.parameters() if p.requires_grad]
    groups = [
        {"params": layers, "lr": learning_rate, "share": 1.0},
        {"params": [net.head.weight], "lr": learning_rate * HEAD_RATE, "share": HEAD_RATE},
    ]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    warm = max(1, len(steps) // 10)
    net.train()
    for number, items in enumerate(steps):
        rate = (number + 1) / warm if number < warm else (1 + cos(pi * (number - warm) / max(1, len(steps) - warm))) / 2
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * group["share"] * rate
        loss = loss_of(items)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([*layers, net.head.weight], 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        on_step(float(loss.detach()))
    net.eval()


def in_batches(sizes: Sequence[int], limit: int = TOKENS_AT_ONCE) -> Iterator[range]:
    """Consecutive ranges whose sizes add up to at most `limit` (one item at the least)."""
    start, total = 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > limit:
            yield range(start, i)
            start, total = i, 0
        total += size
    if start < len(sizes):
        yield range(start, len(sizes))


def prompt_path(form: ChatFormat, prompt: Sequence[ChatMessage]) -> tuple[shared_prefix.Segment, ...]:
    """A prompt's segments: system prompt, then history up to where the reply begins."""
    return tuple(segment for segment in form.prompt(prompt) if segment)


def reply_opening(form: ChatFormat) -> shared_prefix.Segment:
    """The tokens with which the chat template opens a reply (none where the template opens it with nothing)."""
    asked = [{"role": "user", "content": "a"}]
    long, short = (
        form.tokenizer.apply_chat_template(asked, add_generation_prompt=opens, return_dict=False)
        for opens in (True, False)
    )
    return tuple(long[len(short) :])


def reply_segment(form: ChatFormat, text: str, max_tokens: int) -> shared_prefix.Segment:
    """A reply's tokens, cut at `max_tokens`, with its end token, which is where the head reads."""
    ids = form.reply(text)
    return ids if len(ids) <= max_tokens else (*ids[: max_tokens - 1], ids[-1])


def save(net: Backbone, path: Path) -> None:
    """Trained weights as bfloat16 safetensors, embeddings aside (they are the policy's, see `save_embeddings`)."""
    state = {k: v.to(torch.bfloat16).contiguous() for k, v in net.state_dict().items() if "embed_tokens" not in k}
    save_file(state, path)


def save_shared(net: Backbone, form: ChatFormat, folder: Path) -> None:
    """What both networks share: configuration, tokenizer and the policy's embeddings."""
    settings = json.dumps(net.model.config.to_dict(), indent=1, sort_keys=True)
    (folder / "backbone.json").write_text(settings + "\n", encoding="utf-8")
    save_file(
        {"embed_tokens": net.model.embed_tokens.weight.detach().to(torch.bfloat16)}, folder / "embeddings.safetensors"
    )
    form.tokenizer.save_pretrained(folder / "tokenizer")


def load(folder: Path, name: str, ends: int) -> Backbone:
    """A network that `save` and `save_shared` wrote, ready to score, in float32."""
    if not (folder / "backbone.json").exists():
        raise FlywheelError(f"{folder} holds no reward model: run the reward stage.")
    from transformers import LlamaConfig, LlamaModel  # noqa: PLC0415

    config = LlamaConfig(**json.loads((folder / "backbone.json").read_text(encoding="utf-8")))
    with torch.device("meta"):
        net = Backbone(LlamaModel(config), config.num_hidden_layers, ends)
    state = load_file(folder / f"{name}.safetensors")
    state["model.embed_tokens.weight"] = load_file(folder / "embeddings.safetensors")["embed_tokens"]
    net.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
    net.model.rotary_emb = type(net.model.rotary_emb)(config)  # its tables are no parameters
    return net.eval()
