"""Evaluation before anyone meets the model: over-optimisation, offline, style, gate (PAPER sections 5, 6 and 8)."""

from pathlib import Path

from .. import tables
from ..config import FlywheelConfig
from ..evaluation import stage as offline
from ..evaluation.stage import OfflineSummary, Reply
from ..llm.base import Sampling
from ..pipeline import Work
from ..progress import progress
from ..records import Candidate, Estimate, Example, Preference, Prompt, Rollout
from ..release import gate
from ..release.gate import Change, Gained, GateDecision, GateEvidence, RLAlarm, StyleChange
from ..reward.judge import RewardSummary
from ..reward.overoptimisation import stage as overoptimisation
from ..reward.overoptimisation.stage import OveroptimisationSummary
from ..style import stage as style_stage
from ..style.stage import Learning, StyleSummary
from ..training.mixture import MixtureRow
from ..training.rl import RLSummary
from ..workshop import Workshop, candidates


def watch_optimisation(shop: Workshop, work: Work) -> OveroptimisationSummary:
    """How far gold reward followed the reward that selection and RL climbed."""
    shop.unload()
    prompts = tables.read(work.inputs["prompts"] / "prompts.parquet", Prompt)
    learnt: RLSummary = work.inputs["policy"].summary
    rollouts = learnt.kept(tables.read(work.inputs["policy"] / "rollouts.parquet", Rollout))
    judge = shop.rewards(work)
    judged: RewardSummary = work.inputs["judge"].summary
    with progress("overoptimisation") as advance:
        return overoptimisation.measure_overoptimisation(
            work, shop.config.overoptimisation, shop.config.rl, prompts, candidates(work), rollouts,
            work.inputs["start"] / "model", judge.pointwise, judge.gold,
            gold_accuracy=judged.gold.accuracy if judged.gold else None, threads=shop.threads,
            batch_replies=shop.config.models.batch_replies, device=shop.device, on_progress=advance,
        )  # fmt: skip


def evaluate_offline(shop: Workshop, work: Work) -> OfflineSummary:
    prompts = shop.split(work, "evaluate")
    new = shop.model(work.inputs["model"] / "model", shop.model_name)
    with progress("offline") as advance:
        return offline.evaluate_offline(
            work, shop.config.offline, prompts, shop.parent_model, new, shop.rewards(work),
            shop.known_characters, advance, shop.safety,
        )  # fmt: skip


def watch_style(shop: Workshop, work: Work) -> StyleSummary:
    """Chosen against rejected, accepted against rejected, and each checkpoint against the one before."""
    prompts = {p.id: p for p in tables.read(work.inputs["prompts"] / "prompts.parquet", Prompt)}
    replies = tables.read(work.inputs["replies"] / "replies.parquet", Reply)
    told = {policy: [(r.prompt_id, r.text) for r in replies if r.policy == policy] for policy in ("old", "new")}
    asked = [prompts[i] for i, _ in told["old"][: shop.config.style.prompts]]
    checkpoints = {shop.parent.name: told["old"]}
    for name in ("sft", "dpo"):
        folder = work.inputs[name] / "model"
        checkpoints[name] = _answer(shop, folder, name, asked, work.seed)
        shop.unload(folder)
    checkpoints[shop.model_name] = told["new"]
    selected = work.inputs["selected"]
    return style_stage.watch_style(
        work, tables.read(work.inputs["pairs"] / "pairs.parquet", Preference),
        tables.read(selected / "accepted.parquet", Candidate),
        tables.read(selected / "rejected.parquet", Candidate), prompts, checkpoints, shop.config.style.phrases,
        counts=shop.config.style.counts, learning=_learning(shop, work),
    )  # fmt: skip


def _learning(shop: Workshop, work: Work) -> Learning:
    """The replies of the model in service as it is, what SFT drew of traffic and rewrites, what RL drew."""
    plain = {one.name for one in shop.config.rejection_sampling.pool
             if one.source == "parent" and not one.coached and not one.hints}  # fmt: skip
    selected = work.inputs["selected"]
    drawn = [c for name in ("accepted", "rejected") for c in tables.read(selected / f"{name}.parquet", Candidate)]
    offered = tables.read(selected / "examples.parquet", Example)
    offered += tables.read(work.inputs["pairs"] / "rewrites.parquet", Example)
    learnt = {row.example_id for row in tables.read(work.inputs["sft"] / "mixture.parquet", MixtureRow)}
    climbed: RLSummary = work.inputs["rl"].summary
    return Learning(
        own=[c for c in drawn if c.policy in plain], learnt=[e for e in offered if e.id in learnt],
        rollouts=climbed.kept(tables.read(work.inputs["rl"] / "rollouts.parquet", Rollout)),
        windows=shop.config.style.rl_windows,
    )  # fmt: skip


def decide(shop: Workshop, work: Work) -> GateDecision:
    found: OfflineSummary = work.inputs["offline"].summary
    reward: RewardSummary = work.inputs["reward"].summary
    style: StyleSummary = work.inputs["style"].summary
    climbed: OveroptimisationSummary = work.inputs["climbed"].summary
    steered = found.steerability
    evidence = GateEvidence(
        win_rates={
            source: {"pointwise": rate.pointwise, "pairwise": rate.pairwise}
            for source, rate in (("user", found.win_rate.user), ("internal", found.win_rate.internal))
        },
        production={name: Change(old=m.before, new=m) for name, m in found.production.items()},
        instruction_following=Change(old=steered.instruction_following.before, new=steered.instruction_following),
        instruction_violation=Change(old=steered.instruction_violation.before, new=steered.instruction_violation),
        style={
            shift.feature: StyleChange(old=shift.before, new=shift.after, alarm=shift.alarm, rides=shift.rides)
            for shift in style.drift
            if shift.before is not None and shift.after is not None
        },
        reward_accuracy={"pointwise": reward.pointwise_accuracy, "pairwise": reward.pairwise_accuracy},
        alarms=_rung(work.inputs["policy"].summary, shop.config),
        gained=Gained.of(climbed.rl, climbed.gold_accuracy) if shop.config.reward.gold_share else None,
    )
    return gate.decide(shop.config.gate, evidence)


def _rung(learnt: RLSummary, config: FlywheelConfig) -> dict[str, RLAlarm]:
    """Each kind that RL was to watch for, at the last look at the weights kept; drift of style has its own criteria."""
    if not config.rl.alarms.every:
        return {}
    bounds = config.rl.alarms
    kinds = {"kl": bounds.kl_max, "entropy": bounds.entropy_min_share, "win_rate": bounds.win_rate_max}
    if config.reward.gold_share:
        kinds["gold"] = 0.0
    last = {one.kind: one for one in learnt.watched}
    why = "there was no model to measure it by" if last else "no look was at the weights that were kept"
    found: dict[str, RLAlarm] = {}
    for kind, bound in kinds.items():
        rang = tuple(one.step for one in learnt.alarms if one.kind == kind)
        if kind in last:
            one = last[kind]
            found[kind] = RLAlarm(step=one.step, measured=one.measured, bound=bound, says=one.says, rang=rang)
        else:
            nothing = Estimate(value=None, n=0, reason=why)
            found[kind] = RLAlarm(step=None, measured=nothing, bound=bound, says=None, rang=rang)
    return found


def _answer(shop: Workshop, folder: Path, name: str, prompts: list[Prompt], seed: int) -> list[tuple[str, str]]:
    """One reply to each prompt, sampled as offline evaluation samples."""
    config = shop.config.offline
    sampling = Sampling(temperature=config.temperature, max_tokens=config.max_tokens)
    replies = shop.model(folder, name).complete(
        [p.messages for p in prompts], sampling=sampling, seeds=[seed + i for i in range(len(prompts))]
    )
    return [(p.id, several[0].text) for p, several in zip(prompts, replies, strict=True)]
