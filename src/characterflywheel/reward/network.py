"""The networks under both preference models: the first layers of a backbone and a linear head (PAPER section 3).

Initialised from the policy's own weights, or from any Hugging Face folder that `AutoModel` opens (an encoder, another
policy), and read by `llm.reading`, which runs a prompt once for all of its replies. Products are in bfloat16 where
the processor multiplies it natively, over float32 weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FlywheelError
from ..llm import models, reading
from ..llm.native import fast_dtype
from ..llm.shared_prefix import Path as TokenPath

TOKENS_AT_ONCE = 4096


class RewardNetwork(nn.Module):
    """First layers of a backbone with a linear head over `ends` states of a path, side by side.

    Token embeddings stay as they are. `precision` is the type of its products; None: bfloat16 where that is fast.
    `scores_only`: from its first pass without gradients on, keep the packed weights alone, less than half of the
    memory; then it cannot be trained, moved, saved or loaded into.
    """

    def __init__(self, model: Any, layers: int, ends: int, outputs: int = 1) -> None:
        super().__init__()
        cut(model, layers)
        model.get_input_embeddings().requires_grad_(False)
        self.model, self.ends = model, ends
        self.head = nn.Linear(model.config.hidden_size * ends, outputs, bias=False)
        nn.init.zeros_(self.head.weight)
        self.precision: torch.dtype | None = None
        self._adapted: Any = None
        self._packed: Any = None
        self.scores_only = False

    def forward(self, paths: Sequence[TokenPath], read: Sequence[Sequence[int]]) -> Tensor:
        """Float32 (paths, outputs). `read[i]`: the `ends` places on path i, counted from its root, to read.

        Without gradients, the weights are packed once for speed, until they are trained, replaced or moved.
        """
        device = self.head.weight.device
        dtype = self.precision or fast_dtype(device.type)
        packed = None
        if not (torch.is_grad_enabled() or self.training or self._adapted):
            if self._packed is None:
                self._packed = reading.pack(self.model, dtype, release=self.scores_only)
            packed = self._packed
        else:
            self.whole()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            states = reading.states(self.model, paths, read, packed=packed)
        return self.head(states.flatten(1))  # type: ignore[no-any-return]

    def whole(self) -> None:
        """Raise FlywheelError where `scores_only` has let weights go."""
        if self._packed is not None and self._packed.released:
            raise FlywheelError("this reward model was opened to score alone: load its folder again for anything else.")

    def _unpack(self) -> None:
        """Forget the packed weights, before the model's own change."""
        self.whole()
        self._packed = None

    def adapt(self, rank: int, seed: int = 0) -> None:
        """Until `merge`, train low-rank adapters of the linear layers alone (Hu 2022); alpha is twice the rank."""
        from peft import LoraConfig, LoraModel  # noqa: PLC0415 - takes seconds, and most runs train all weights

        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        names = [name for name, part in self.model.named_modules() if isinstance(part, nn.Linear)]
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # held in a tuple: as a module of its own, it would list every parameter a second time
            self._adapted = (LoraModel(self.model, config, "default"),)

    def merge(self) -> None:
        """Add the adapters to the weights that they adapt; what is left is the plain architecture."""
        if self._adapted:
            self._adapted[0].merge_and_unload()
            self._adapted = self._packed = None

    @torch.no_grad()
    def finish(self) -> None:
        """After training: merge adapters and round weights to bfloat16, as they are kept, so that nothing that is
        measured from here on changes when they are saved and read back."""
        self._unpack()
        self.merge()
        for parameter in self.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))

    def train(self, mode: bool = True) -> "RewardNetwork":
        """The backbone never drops out: two replies to compare must not be seen through different noise (as in TRL)."""
        if mode or self.training:
            self._unpack()
        super().train(mode)
        self.model.eval()
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        self._unpack()
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._unpack()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def from_folder(
    folder: Path, layers: int, ends: int, outputs: int = 1, lora_rank: int | None = None, seed: int = 0
) -> RewardNetwork:
    """A fresh network from a Hugging Face folder, in float32; `seed` only matters for adapters."""
    net = RewardNetwork(open_backbone(folder), layers, ends, outputs)
    if lora_rank is not None:
        net.adapt(lora_rank, seed)
    return net.eval()


def open_backbone(folder: Path) -> Any:
    """The folder's transformer in float32, whatever heads were saved with it."""
    from transformers import AutoModel  # noqa: PLC0415 - takes seconds, which a plan can do without
    from transformers.utils import logging  # noqa: PLC0415

    if not (folder / "config.json").exists():
        raise FlywheelError(f"{folder} holds no model (no config.json): give a Hugging Face model folder.")
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would list the heads that are left out
    try:
        model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    finally:
        logging.set_verbosity(verbosity)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # a head over the first token, which nothing here reads
    return model


def backbone_folder(spec: str) -> Path:
    """The folder named by `RewardConfig.backbone`: a folder, or a package that carries an encoder or a base model."""
    if not spec.startswith("package:"):
        return models.existing_folder(spec)
    try:
        return models.encoder_folder(spec)
    except FlywheelError:
        return models.base_model_folder(spec)


def cut(model: Any, layers: int) -> None:
    """Keep the first `layers` layers of a transformer, wherever its architecture lists them."""
    count = model.config.num_hidden_layers
    if layers > count:
        raise FlywheelError(f"reward.layers = {layers}, the backbone has {count}: keep at most that many.")
    if layers == count:
        return
    stacks = [
        (owner, name)
        for owner in model.modules() for name, part in owner.named_children()
        if isinstance(part, nn.ModuleList) and len(part) == count
    ]  # fmt: skip
    if len(stacks) != 1:
        raise FlywheelError(
            f"{type(model).__name__} keeps its {count} layers in {len(stacks)} lists, one can be cut: set "
            f"reward.layers = {count}."
        )
    owner, name = stacks[0]
    setattr(owner, name, getattr(owner, name)[:layers])
    model.config.num_hidden_layers = layers
    kinds = getattr(model.config, "layer_types", None)
    if kinds is not None:
        model.config.layer_types = kinds[:layers]


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
