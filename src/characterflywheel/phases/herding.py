"""Herding: SFT, DPO, online RL, each from the model before it (PAPER section 4)."""

from .. import tables
from ..pipeline import Work
from ..progress import progress
from ..records import Example, Preference, Prompt, SetAside
from ..training import dpo, rl, sft
from ..training.dpo import DPOSummary
from ..training.rl import RLSummary
from ..training.sft import TrainingSummary
from ..workshop import Workshop, candidates


def train_sft(shop: Workshop, work: Work) -> TrainingSummary:
    """On what rejection sampling accepted and what annotators rewrote, but for the gold model's users."""
    shop.unload()
    examples = tables.read(work.inputs["selected"] / "examples.parquet", Example)
    aside = _set_aside(work)
    rewrites = tables.read(work.inputs["rewrites"] / "rewrites.parquet", Example)
    examples += [example for example in rewrites if example.user_id not in aside]
    with progress("sft") as advance:
        return sft.train_sft(
            work, shop.config.sft, shop.parent_folder, examples, threads=shop.threads, device=shop.device,
            on_progress=advance,
        )  # fmt: skip


def train_dpo(shop: Workshop, work: Work) -> DPOSummary:
    """On what annotators preferred, but for the gold model's users."""
    aside = _set_aside(work)
    pairs = tables.read(work.inputs["pairs"] / "pairs.parquet", Preference)
    pairs = [pair for pair in pairs if pair.user_id not in aside]
    with progress("dpo") as advance:
        return dpo.train_dpo(
            work, shop.config.dpo, work.inputs["model"] / "model", pairs, threads=shop.threads,
            device=shop.device, on_progress=advance,
        )  # fmt: skip


def train_rl(shop: Workshop, work: Work) -> RLSummary:
    """On prompts whose candidates' scores vary most, with the pointwise model as the reward."""
    config, drawn = shop.config.rl, candidates(work)
    prompts = tables.read(work.inputs["prompts"] / "prompts.parquet", Prompt)
    wanted = config.steps * config.prompts_per_step
    chosen = rl.choose_prompts(prompts, drawn, wanted, config.ordinary_share, work.seed)
    with progress("rl") as advance:
        return rl.train_rl(
            work, config, work.inputs["model"] / "model", chosen, shop.rewards(work).pointwise,
            shop.safety, threads=shop.threads, batch_replies=shop.config.models.batch_replies, device=shop.device,
            on_progress=advance,
        )  # fmt: skip


def _set_aside(work: Work) -> set[str]:
    """The users from whose comparisons only the gold model learns."""
    return {row.user_id for row in tables.read(work.inputs["judge"] / "gold.parquet", SetAside)}
