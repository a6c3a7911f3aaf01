"""The reward stage: preference pairs and user signals in, judged and saved reward models out (PAPER section 3)."""

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from ..config import RewardConfig
from ..errors import FlywheelError
from ..ids import derive_seed
from ..pipeline import Work
from ..records import Conversation, Preference, Signal
from . import backbone
from .composite import RewardModels, signal_scales
from .judge import RewardSummary, judge
from .pairwise import Pairwise
from .pointwise import Pointwise
from .signals import Embeds, SignalModels, collect


def train_rewards(
    work: Work,
    config: RewardConfig,
    pairs: Sequence[Preference],
    conversations: Sequence[Conversation],
    signals: Sequence[Signal],
    policy_folder: Path,
    encoder: Embeds,
    *,
    threads: int = 2,
    device: str = "cpu",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> RewardSummary:
    """Train both preference models and the signal models, judge them on what they have not seen, save them.

    Held-out pairs never train. What is judged is what was saved: the models are read back from `work.folder` first.
    `on_progress(done, total)` counts optimiser steps of both preference models.
    """
    training = sorted((pair for pair in pairs if not pair.held_out), key=_order)
    held_out = sorted((pair for pair in pairs if pair.held_out), key=_order)
    if not training:
        raise FlywheelError(f"{len(pairs)} preference pairs, none to train on: annotate more prompts.")
    form = backbone.chat_format(policy_folder, config.max_prompt_tokens)
    schedules = {
        name: schedule(training, config.pairs_per_step, config.epochs, derive_seed(work.seed, name))
        for name in ("pointwise", "pairwise")
    }
    total, done = sum(map(len, schedules.values())), 0

    def count(_: float) -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    pointwise = Pointwise(
        backbone.from_policy(policy_folder, config.layers, 1).to(device), form, config.max_reply_tokens, threads=threads
    )
    pointwise.fit(schedules["pointwise"], config.learning_rate, count)
    pairwise = Pairwise(
        backbone.from_policy(policy_folder, config.layers, 2).to(device), form, config.max_reply_tokens, threads=threads
    )
    pairwise.fit(schedules["pairwise"], config.learning_rate, count)
    reactions = SignalModels.train(
        collect(conversations, signals, config.signals), config.signals, encoder,
        min_auc=config.min_signal_auc, seed=derive_seed(work.seed, "signals"),
    )  # fmt: skip
    scales = signal_scales(
        reactions,
        [pair.prompt for pair in training],
        [(p.chosen[-1].content, p.rejected[-1].content) for p in training],
    )
    RewardModels(pointwise, pairwise, reactions, config.signal_weights, scales).save(work.folder)
    models = RewardModels.load(work.folder, encoder, threads, device)
    summary = judge(models, training, held_out)
    (work.folder / "evaluation.json").write_text(summary.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return summary


def schedule(pairs: Sequence[Preference], per_step: int, epochs: int, seed: int) -> list[list[Preference]]:
    """Batches of pairs: prompts in a new seeded order each epoch, the pairs of a prompt side by side.

    Pairs of one prompt share its tokens, and often replies, when they are in one step; that makes steps cheap.
    """
    by_prompt: dict[str, list[Preference]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt_id, []).append(pair)
    prompts, steps = sorted(by_prompt), []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(prompts))
        line = (pair for i in order for pair in by_prompt[prompts[i]])
        while batch := list(islice(line, per_step)):
            steps.append(batch)
    return steps


def _order(pair: Preference) -> tuple[str, str]:
    """By prompt, so that pairs of one prompt meet in one batch and share its tokens."""
    return pair.prompt_id, pair.id
