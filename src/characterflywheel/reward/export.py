"""Trained preference models as folders, for this package and for others (PAPER section 3).

A pointwise model on a Llama-family backbone is an ordinary Hugging Face folder:
`AutoModelForSequenceClassification.from_pretrained` gives our raw scores, on right-padded batches too, for the tokens
of `apply_chat_template(messages, add_generation_prompt=True)`, then the reply's and the end token. An encoder's score
is read where its reply ends, under an attention that no Hugging Face head has: its folder opens with `AutoModel`, and
the head lies beside it in `head.safetensors`. Weights are kept in bfloat16, and computed with in float32 unless asked.

The pairwise model keeps its own layers and head; configuration, tokenizer and embeddings are the pointwise model's.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import FlywheelError
from ..records import Record
from . import format, stored
from .network import RewardNetwork, open_backbone
from .pairwise import Pairwise
from .pointwise import Pointwise, Scale

SETTINGS, HEAD = "pointwise.json", "head.safetensors"


class Settings(Record):
    """What is no weight about a pointwise model: how it reads, and its scale (`raw` = `score` x deviation + mean)."""

    max_prompt_tokens: int
    max_reply_tokens: int
    mean: float
    deviation: float


def save_pointwise(model: Pointwise, folder: Path) -> None:
    """Write the model's folder. Its tokenizer pads as others need it from then on (see `pad_token`)."""
    model.net.whole()
    folder.mkdir(parents=True, exist_ok=True)
    config, tokenizer = deepcopy(model.net.model.config), model.form.tokenizer
    state, head = _stored(model.net.model.state_dict()), _stored({"score.weight": model.net.head.weight})
    classifier = _classifier(config)
    if classifier is None:
        config.architectures = [type(model.net.model).__name__]
        save_file(head, folder / HEAD, metadata={"format": "pt"})
    else:
        tokenizer.pad_token = pad_token(tokenizer)
        config.pad_token_id, config.num_labels = tokenizer.pad_token_id, 1
        config.architectures = [classifier.__name__]
        state = {f"{classifier.base_model_prefix}.{name}": tensor for name, tensor in state.items()} | head
    config.dtype = torch.float32
    tokenizer.padding_side = "right"
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = Settings(
        max_prompt_tokens=model.form.max_prompt_tokens, max_reply_tokens=model.form.max_reply_tokens,
        mean=model.scale.mean, deviation=model.scale.deviation,
    )  # fmt: skip
    (folder / SETTINGS).write_text(settings.model_dump_json(indent=1) + "\n", encoding="utf-8")


def load_pointwise(folder: Path, threads: int = 2, device: str = "cpu", *, temperature: float = 1.0) -> Pointwise:
    """The model that `save_pointwise` wrote. Raises FlywheelError where there is none, or another version's."""
    settings = stored.read(folder / SETTINGS, Settings, "reward model")
    model = open_backbone(folder)
    net = RewardNetwork(model, model.config.num_hidden_layers, 1)
    own = folder / HEAD
    with safe_open(own if own.exists() else folder / "model.safetensors", "pt") as weights:
        net.head.load_state_dict({"weight": weights.get_tensor("score.weight").float()})
    form = format.make(folder, settings.max_prompt_tokens, settings.max_reply_tokens)
    return Pointwise(
        net.to(device).eval(), form, scale=Scale(settings.mean, settings.deviation),
        temperature=temperature, threads=threads,
    )  # fmt: skip


def save_pairwise(model: Pairwise, path: Path) -> None:
    """Write the model's own weights as one safetensors file."""
    model.net.whole()
    state = {name: t for name, t in model.net.state_dict().items() if name != _embeddings(model.net)}
    save_file(_stored(state), path)


def load_pairwise(path: Path, beside: Pointwise, temperature: float = 1.0) -> Pairwise:
    """The model that `save_pairwise` wrote; in memory too it shares the embeddings of the pointwise one `beside` it."""
    if not path.exists():
        raise FlywheelError(f"{path} is missing: run the reward stage.")
    embeddings = beside.net.model.get_input_embeddings().weight
    model = deepcopy(beside.net.model, {id(embeddings): embeddings})
    net = RewardNetwork(model, model.config.num_hidden_layers, 2)
    state = {name: tensor.float() for name, tensor in load_file(path).items()}
    net.load_state_dict({**state, _embeddings(net): embeddings})
    return Pairwise(
        net.to(beside.net.head.weight.device).eval(), beside.form, temperature=temperature, threads=beside.threads
    )


def pad_token(tokenizer: Any) -> str:
    """A token to pad with that never ends a text: a classifier's head reads the last token that is no padding.

    The tokenizer's own, unless it is the end token (as in many chat models), else the unknown one or a spare special
    token that the chat template does not use.
    """
    spare = sorted(tokenizer.get_added_vocab(), key=tokenizer.get_added_vocab().__getitem__)
    taken = {tokenizer.eos_token, tokenizer.bos_token, None}
    for token in (tokenizer.pad_token, tokenizer.unk_token, *spare):
        if token not in taken and token not in (tokenizer.chat_template or ""):
            return str(token)
    raise FlywheelError(
        f"the backbone's tokenizer has no token to pad with besides its end token {tokenizer.eos_token!r}: add a "
        "`pad_token` that nothing else uses to its folder."
    )


def _classifier(config: Any) -> Any:
    """The architecture's sequence classifier, if its head reads the last token without a bias, as ours does."""
    from transformers import AutoModelForSequenceClassification  # noqa: PLC0415
    from transformers.modeling_layers import GenericForSequenceClassification  # noqa: PLC0415

    found = AutoModelForSequenceClassification._model_mapping.get(type(config), None)
    return found if found is not None and issubclass(found, GenericForSequenceClassification) else None


def _embeddings(net: RewardNetwork) -> str:
    """The name of the token embeddings in the network's state."""
    weight = net.model.get_input_embeddings().weight
    return next(name for name, parameter in net.named_parameters() if parameter is weight)


def _stored(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in state.items()}
