"""Pre-herding: reward models, and the best of many replies as examples (PAPER sections 3 and 4)."""

from .. import tables
from ..pipeline import Work
from ..progress import progress
from ..records import Preference, Prompt, Signal
from ..reward import stage as reward
from ..reward.judge import RewardSummary
from ..store.export import conversations_from_export
from ..training import rejection_sampling
from ..training.rejection_sampling import RejectionSummary
from ..workshop import Workshop


def train_rewards(shop: Workshop, work: Work) -> RewardSummary:
    shop.unload()
    traffic = work.inputs["traffic"].folder
    prompts = tables.read(work.inputs["prompts"] / "prompts.parquet", Prompt)
    judged_on = {p.user_id for p in prompts if p.split in ("evaluate", "experiment")}
    everything = conversations_from_export(traffic, alternatives=True)  # what was regenerated away was judged too
    conversations = [c for c in everything if c.user_id not in judged_on]
    with progress("reward") as advance:
        return reward.train_rewards(
            work, shop.config.reward, tables.read(work.inputs["pairs"] / "pairs.parquet", Preference),
            conversations, tables.read(traffic / "signals.parquet", Signal),
            shop.parent_folder, shop.encoder, generation=shop.number, past=shop.past, threads=shop.threads,
            device=shop.device, on_progress=advance,
        )  # fmt: skip


def reject(shop: Workshop, work: Work) -> RejectionSummary:
    prompts = tables.read(work.inputs["prompts"] / "prompts.parquet", Prompt)
    judge = shop.rewards(work)
    with progress("rejection_sampling") as advance:
        return rejection_sampling.reject(
            work, shop.config.rejection_sampling, prompts, shop.selection_pool(), judge, shop.safety, advance
        )
