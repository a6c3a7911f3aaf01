"""Herding: SFT, DPO, online RL, each from the model before it (PAPER section 4)."""

from functools import partial
from typing import Any

from .. import tables
from ..config import FlywheelConfig
from ..llm.encoder import shared_encoder
from ..llm.models import encoder_folder
from ..pipeline import Work
from ..progress import progress
from ..records import Example, Preference, Prompt, PromptChoice, SetAside
from ..safety import SafetyPolicy
from ..training import dpo, rl, sft
from ..training.dpo import DPOSummary
from ..training.launch import Later, spread
from ..training.rl import RLSummary
from ..training.rl.prompts import choose
from ..training.sft import TrainingSummary
from ..training.sources import Reserved
from ..workshop import Workshop, candidates, open_rewards


def train_sft(shop: Workshop, work: Work) -> TrainingSummary:
    """On what rejection sampling accepted, what annotators rewrote and the configured sets.

    Nothing is learnt of who or what evaluates, nor of the gold model's users.
    """
    shop.unload()
    examples = tables.read(work.inputs["selected"] / "examples.parquet", Example)
    examples += tables.read(work.inputs["rewrites"] / "rewrites.parquet", Example)
    prompts = tables.read(work.inputs["prompts"] / "prompts.parquet", Prompt)
    reserved = Reserved.of(prompts, tables.read(work.inputs["judge"] / "gold.parquet", SetAside))
    with progress("sft") as advance:
        return spread(
            shop.config.parallel, sft.train_sft, work, shop.config.sft, shop.parent_folder, examples,
            reserved=reserved, safety=shop.safety, threads=shop.threads, device=shop.device,
            gradient_checkpointing=shop.config.parallel.gradient_checkpointing, on_progress=advance,
        )  # fmt: skip


def train_dpo(shop: Workshop, work: Work) -> DPOSummary:
    """On what annotators preferred, but for the gold model's users."""
    aside = _set_aside(work)
    pairs = tables.read(work.inputs["pairs"] / "pairs.parquet", Preference)
    pairs = [pair for pair in pairs if pair.user_id not in aside]
    with progress("dpo") as advance:
        return spread(
            shop.config.parallel, dpo.train_dpo, work, shop.config.dpo, work.inputs["model"] / "model", pairs,
            threads=shop.threads, device=shop.device,
            gradient_checkpointing=shop.config.parallel.gradient_checkpointing, on_progress=advance,
        )  # fmt: skip


def train_rl(shop: Workshop, work: Work) -> RLSummary:
    """On prompts chosen by their candidates' scores, with the pointwise model as the reward.

    `prompts.parquet` says of each prompt why it was chosen.
    """
    config, drawn = shop.config.rl, candidates(work)
    prompts = tables.read(work.inputs["prompts"] / "prompts.parquet", Prompt)
    wanted = config.steps * config.prompts_per_step
    chosen = choose(
        prompts, drawn, wanted, by=config.choose, ordinary_share=config.ordinary_share, seed=work.seed,
        fresh_days=config.fresh_days,
    )  # fmt: skip
    tables.write(work.folder / "prompts.parquet", PromptChoice, chosen.why)
    pointwise, safety, gold = judges(shop, work)
    with progress("rl") as advance:
        return spread(
            shop.config.parallel, rl.train_rl, work, config, work.inputs["model"] / "model", chosen.prompts, pointwise,
            safety, gold=gold, threads=shop.threads, batch_replies=shop.config.models.batch_replies, device=shop.device,
            gradient_checkpointing=shop.config.parallel.gradient_checkpointing, on_progress=advance,
        )  # fmt: skip


def judges(shop: Workshop, work: Work) -> tuple[Any, Any, Any]:
    """The pointwise model, safety and the gold model; for several workers what each opens, the reward models once."""
    if shop.config.parallel.processes == 1:
        here = shop.rewards(work)
        return here.pointwise, shop.safety, here.gold
    judge = partial(_open_judge, shop.config, work)
    return Later(judge, "pointwise"), Later(_open_safety), Later(judge, "gold")


def _open_judge(config: FlywheelConfig, work: Work, device: str) -> Any:
    encoder = shared_encoder(encoder_folder(config.models.encoder), config.models.threads)
    return open_rewards(config, work, encoder, config.models.threads, device)


def _open_safety(device: str) -> SafetyPolicy:
    return SafetyPolicy()


def _set_aside(work: Work) -> set[str]:
    """The users from whose comparisons only the gold model learns."""
    return {row.user_id for row in tables.read(work.inputs["judge"] / "gold.parquet", SetAside)}
