"""What the pointwise and the pairwise preference model share: a network on a backbone, and how it begins (PAPER 3)."""

from pathlib import Path
from typing import ClassVar, Self

from ..config import RewardConfig
from . import format, network


class PreferenceModel:
    """A network that reads `ends` places of a path, the form that texts are given to it in, and its temperature."""

    ends: ClassVar[int]

    def __init__(
        self, net: network.RewardNetwork, form: format.Form, *, temperature: float = 1.0, threads: int = 2
    ) -> None:
        self.net, self.form, self.temperature, self.threads = net, form, temperature, threads

    @classmethod
    def from_folder(
        cls, folder: Path, config: RewardConfig, *, form: format.Form | None = None, seed: int = 0, threads: int = 2,
        device: str = "cpu",
    ) -> Self:  # fmt: skip
        """An untrained one on a backbone's folder, read by `form`; it has no opinion yet (scores 0, answers 0.5)."""
        net = network.from_folder(folder, config.layers, cls.ends, lora_rank=config.lora_rank, seed=seed)
        form = form or format.make(folder, config.max_prompt_tokens, config.max_reply_tokens)
        return cls(net.to(device), form, threads=threads)
