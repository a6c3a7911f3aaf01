"""The reward stage: preference pairs and user signals in, judged and saved reward models out (PAPER section 3).

Pairs that cannot teach are screened out and kept by name in `dropped.parquet`. Where `gold_share` asks for it, a gold
model learns from users of its own; nothing that trains or selects ever asks it, so that it can tell when the others
are over-optimised. `gold.parquet` names these users, and no other model of the generation learns from their
comparisons or rewrites: neither the preference models here nor SFT and DPO. Their conversations are kept from nobody:
signal models learn from their reactions, and their prompts are answered in rejection sampling and RL.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import tables
from ..config import RewardConfig
from ..errors import FlywheelError
from ..ids import derive_seed
from ..pipeline import Work
from ..records import Conversation, Dropped, Preference, SetAside, Signal
from . import format, history, network, screen
from .composite import RewardModels, signal_scales
from .fit import Objective, schedule
from .judge import RewardSummary, judge
from .pairwise import Pairwise
from .pointwise import Pointwise
from .signals import Embeds, SignalModels, collect

PAIRS_FOR_SCALES = 2000  # a mean and a deviation are then known to 2%


class Split(NamedTuple):
    """Training pairs of the models in use, and of the gold model."""

    proxy: list[Preference]
    gold: list[Preference]


def train_rewards(
    work: Work,
    config: RewardConfig,
    pairs: Sequence[Preference],
    conversations: Sequence[Conversation],
    signals: Sequence[Signal],
    policy_folder: Path,
    encoder: Embeds,
    *,
    generation: int = 1,
    past: Sequence[history.Past] = (),
    threads: int = 2,
    device: str = "cpu",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> RewardSummary:
    """Train the preference models and the signal models, judge them on what they have not seen, save them.

    They are also compared with those of `past` generations, on every generation's held-out pairs (see `history`).

    Held-out pairs never train. What is judged is what was saved: the models are read back from `work.folder` first.
    `on_progress(done, total)` counts optimiser steps of all preference models. Raises FlywheelError where no pair is
    left to train on, or all are undecided.
    """
    folder = policy_folder if config.backbone is None else network.backbone_folder(config.backbone)
    form = format.make(folder, config.max_prompt_tokens, config.max_reply_tokens)
    kept, dropped = screened = screen.screen(sorted(pairs, key=_order), form)
    tables.write(work.folder / "dropped.parquet", Dropped, dropped)
    training, held_out = ([pair for pair in kept if pair.held_out is out] for out in (False, True))
    screen.check_trainable(training, screened.reasons)
    split = split_gold(training, config.gold_share, derive_seed(work.seed, "gold"))
    for side in filter(None, split):
        screen.check_trainable(side, screened.reasons)
    aside = sorted({(pair.prompt_id, pair.user_id) for pair in split.gold})
    tables.write(work.folder / "gold.parquet", SetAside, [SetAside(prompt_id=p, user_id=u) for p, u in aside])
    steps = {
        name: schedule(mine, config.pairs_per_step, config.epochs, derive_seed(work.seed, name))
        for name, mine in (("pointwise", split.proxy), ("pairwise", split.proxy), ("gold", split.gold))
    }
    total, done = sum(map(len, steps.values())), 0

    def count(_: float) -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    objective = Objective.of(config)

    def pointwise(name: str) -> Pointwise:
        model = Pointwise.from_folder(
            folder, config, form=form, seed=derive_seed(work.seed, name, "start"), threads=threads, device=device
        )
        model.fit(steps[name], config.learning_rate, count, objective)
        return model

    scorer = pointwise("pointwise")
    comparer = Pairwise.from_folder(
        folder, config, form=form, seed=derive_seed(work.seed, "pairwise", "start"), threads=threads, device=device
    )
    comparer.fit(steps["pairwise"], config.learning_rate, count, objective)
    gold = pointwise("gold") if split.gold else None
    reactions = SignalModels.train(
        collect(conversations, signals, config.signals), config.signals, encoder,
        min_auc=config.min_signal_auc, seed=derive_seed(work.seed, "signals"),
    )  # fmt: skip
    drawn = np.random.default_rng(derive_seed(work.seed, "scales")).permutation(len(split.proxy))[:PAIRS_FOR_SCALES]
    some = [split.proxy[i] for i in sorted(drawn)]
    scales = signal_scales(
        reactions, [p.prompt for p in some], [(p.chosen[-1].content, p.rejected[-1].content) for p in some]
    )
    RewardModels(scorer, comparer, reactions, config.signal_weights, scales, gold).save(work.folder)
    del scorer, comparer, gold, reactions  # a large backbone is in memory once
    models = RewardModels.load(work.folder, encoder, threads, device)
    summary = judge(models, split.proxy, held_out, screened.reasons, work.seed)
    own = history.Preferences(models.pointwise, models.pairwise, history.taught_by(training))
    cells = history.matrix(generation, own, held_out, past, threads=threads, device=device)
    summary = summary.model_copy(update={"history": cells})
    for model, judged in ((models.pointwise, summary.pointwise), (models.pairwise, summary.pairwise)):
        model.temperature = judged.calibration.applied if judged.calibration else 1.0
    models.save_settings(work.folder)
    (work.folder / "evaluation.json").write_text(summary.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return summary


def split_gold(training: Sequence[Preference], share: float, seed: int) -> Split:
    """Set the gold model's pairs aside: whole users with all of their prompts, in seeded order, until `share` of the
    prompts is reached. Users who have a prompt in common go together. Raises FlywheelError where one side stays empty.
    """
    if share == 0:
        return Split(list(training), [])
    groups = _together([(pair.user_id, pair.prompt_id) for pair in training])
    prompts: dict[str, set[str]] = {}
    for pair, group in zip(training, groups, strict=True):
        prompts.setdefault(group, set()).add(pair.prompt_id)
    wanted = share * sum(map(len, prompts.values()))
    gold: set[str] = set()
    taken = 0
    for group in sorted(prompts, key=lambda name: (derive_seed(seed, name), name)):
        if gold and taken + len(prompts[group]) / 2 > wanted:
            break
        gold.add(group)
        taken += len(prompts[group])
    sides = Split(*([p for p, g in zip(training, groups, strict=True) if (g in gold) is own] for own in (False, True)))
    if not (sides.proxy and sides.gold):
        raise FlywheelError(
            f"reward.gold_share = {share:g} of {len(training)} training pairs by {len(prompts)} independent users "
            "leaves one side without pairs: collect pairs of more users or set it to 0."
        )
    return sides


def _together(rows: Sequence[tuple[str, str]]) -> list[str]:
    """For each (user, prompt) its group, named by the last of its users: those with a prompt in common, directly or
    by way of others."""
    above: dict[tuple[str, str], tuple[str, str]] = {}

    def top(node: tuple[str, str]) -> tuple[str, str]:
        while above.setdefault(node, node) != node:
            above[node] = above[above[node]]
            node = above[node]
        return node

    for user, prompt in rows:
        one, two = sorted((top(("user", user)), top(("prompt", prompt))))
        above[one] = two
    return [top(("user", user))[1] for user, _ in rows]


def _order(pair: Preference) -> tuple[str, str]:
    """By prompt, so that pairs of one prompt meet in one batch and share its tokens."""
    return pair.prompt_id, pair.id
