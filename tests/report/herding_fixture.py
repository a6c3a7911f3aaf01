"""Files of the herding stages as their own records write them. Every number is a fixture; nothing was measured."""

import json
import math
import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from report_fixture import HOSTILE, about

from characterflywheel import tables
from characterflywheel.ledger import LedgerRow
from characterflywheel.style.monitor import Difference
from characterflywheel.training.dpo import DPOSummary
from characterflywheel.training.mixture import MixtureReport, SourceShare
from characterflywheel.training.rejection_sampling import Acceptance, CandidateScore, RejectionSummary
from characterflywheel.training.rl.stage import RLSummary
from characterflywheel.training.rl.step import Stop
from characterflywheel.training.rl.watch import Alarm
from characterflywheel.training.sft import SourceLoss, TrainingSummary

STEPS, GROUPS = 40, 8
DAY = datetime(2026, 1, 12, tzinfo=UTC)


def write_runs(workspace: Path, row: LedgerRow, *, stopped: bool = False) -> None:
    """Selection, SFT, DPO, RL and style of a generation, in the folders that its ledger row names."""
    stages = ("rejection_sampling", "sft", "dpo", "rl", "style")
    at = {name: workspace / "artifacts" / row.stages[name] for name in stages}
    for folder in at.values():
        folder.mkdir(parents=True)
    _selection(at["rejection_sampling"])
    _tuning(at["sft"], at["dpo"])
    _climbing(at["rl"], stopped)
    tables.write(at["style"] / "style.parquet", Difference, [_shift("rejected to chosen", 0.3), _shift("a to b", 0.1)])


def _artifact(folder: Path, summary: BaseModel, **config: Any) -> None:
    told = {"summary": summary.model_dump(mode="json"), "config": config}
    (folder / "artifact.json").write_text(json.dumps(told), encoding="utf-8")


def _shift(comparison: str, effect: float) -> Difference:
    return Difference(
        comparison=comparison, kind="pairs", first="rejected", second="chosen", feature="says: <b>", binary=True,
        first_mean=0.1, second_mean=0.2, difference=0.1, low=0.04, high=0.16, ratio=2.0, effect=effect, p=0.001,
        q=0.01, n=40, method="welch", alarm=effect >= 0.2,
    )  # fmt: skip


def _selection(folder: Path) -> None:
    rng, rows = random.Random(1), []
    for i in range(320):
        reason: Any = rng.choices(("cut_off", "repeated", "not_best"), (30, 4, 66))[0]
        score = rng.gauss(-0.9 if reason == "cut_off" else 0.1, 0.5)
        reason = None if reason == "not_best" and score > 0.35 and rng.random() < 0.5 else reason
        rows.append(
            CandidateScore(
                id=str(i), prompt_id=str(i // 8), policy="parent" if i % 2 else "coached", score=score,
                preference=score, signals={"continue": 0.1}, vetoed=None, accepted=reason is None, reason=reason,
            )
        )  # fmt: skip
    tables.write(folder / "scores.parquet", CandidateScore, rows)
    named: tuple[tuple[Any, str], ...] = (
        ("policy", "coached"), ("policy", "parent"), ("policy", "base, three generations ago"), ("character", HOSTILE),
        ("character", "ada"), ("source", "user"), ("source", "internal"),
    )  # fmt: skip
    acceptance = [
        Acceptance(by=by, name=name, drawn=100, accepted=9 + i, share=about(0.09 + 0.01 * i, 0.05, 100))
        for i, (by, name) in enumerate(named)
    ]
    tables.write(folder / "acceptance.parquet", Acceptance, acceptance)
    accepted = sum(one.accepted for one in rows)
    _artifact(
        folder,
        RejectionSummary(
            prompts=40, candidates=320, accepted=accepted, accepted_by_policy={"parent": accepted}, threshold=0.35,
            mean_score=-0.2, accepted_mean_score=0.7, sampled_tokens=9000, reasons={"cut_off": 100},
            lift=about(0.81, 0.12, accepted), acceptance=tuple(acceptance), oldest=DAY, newest=DAY,
        ),
    )  # fmt: skip


def _tuning(sft: Path, dpo: Path) -> None:
    def source(name: Any, weight: float, distinct: int, tokens: int, **dropped: int) -> SourceShare:
        return SourceShare(
            source=name, weight=weight, offered=distinct + sum(dropped.values()), distinct=distinct,
            drawn=round(2 * weight * distinct), drawn_distinct=distinct, dropped=dropped, tokens=tokens,
            token_share=tokens / 4300, mean_words=17.0, mean_score=0.6 if name == "user" else None, scored=0,
            characters=5,
        )  # fmt: skip

    sources = (
        source("user", 1.0, 38, 2100, near_duplicate=3), source("internal", 1.0, 19, 1100, duplicate=1),
        source("rewrite", 1.5, 12, 700), source("safety", 0.5, 24, 400), source("general", 0.0, 40, 0),
    )  # fmt: skip
    mixture = MixtureReport(
        epochs=2, seed=1, examples=162, tokens=4300, sources=sources, dropped={"near_duplicate": 3, "duplicate": 1},
        near_duplicates=0.8, max_examples={}, max_token_share={},
    )  # fmt: skip
    (sft / "mixture.json").write_text(mixture.model_dump_json(), encoding="utf-8")
    held = tuple(
        SourceLoss(source=name, examples=n, before=about(2.4, 0.2, n), after=about(2.4 - gain, 0.18, n))
        for name, n, gain in (("all", 24, 0.5), ("user", 14, 0.4), ("internal", 10, 0.63))
    )
    _artifact(
        sft,
        TrainingSummary(
            steps=24, examples=162, trained_tokens=4300, first_loss=2.3, last_loss=1.3, sources=sources,
            planned_steps=40, kept_step=18, evaluation=held,
        ),
    )  # fmt: skip
    rng = random.Random(2)
    _lines(
        sft,
        [{"step": 0, "evaluation_loss": 2.4, "evaluation_loss_user": 2.3}]
        + [{"step": i, "loss": 2.3 * math.exp(-i / 40) + rng.gauss(0, 0.1), "tokens": 180} for i in range(1, 25)]
        + [{"step": i, "evaluation_loss": 2.4 - 0.055 * i + 0.0015 * i * i} for i in (6, 12, 18, 24)],
    )
    _artifact(dpo, DPOSummary(steps=4, pairs=24, trained_tokens=1700, first_loss=0.69, last_loss=0.66, last_accuracy=1))
    _lines(
        dpo,
        [{"step": i, "loss": 0.695 - 0.012 * i, "accuracy": 0.3 + 0.15 * i} for i in range(1, 5)]
        + [{"step": i, "evaluation_loss": 0.693 - 0.005 * i, "evaluation_accuracy": 0.5 + 0.03 * i} for i in (0, 2, 4)],
    )


def _climbing(folder: Path, stopped: bool) -> None:
    rng, rows = random.Random(3), []
    last = 28 if stopped else STEPS
    for i in range(1, last + 1):
        line: dict[str, float] = {
            "step": i, "reward": 0.1 + 0.02 * i + rng.gauss(0, 0.08), "score": 0.2 + 0.022 * i, "words": 17 + 0.3 * i,
            "length_term": -0.1 - 0.004 * i, "repetition_term": -0.03, "style_term": 0.0, "vetoed_share": 0.0,
            "cut_off_share": 0.02 * (i % 3), "equal_groups": float(i % 5 == 0) * 2, "learning_rate": 1e-5,
        }  # fmt: skip
        if i != 5:  # a step in which all rewards were equal learnt nothing
            line |= {"entropy": 1.6 - 0.025 * i, "effective_share": 0.99 - 0.002 * i, "loss": 0.0}
        if i % 4 == 0:
            line |= {
                "kl_to_start": 0.006 * i * i + rng.gauss(0, 0.1), "win_rate": 0.5 + 0.005 * i,
                "score_gain": 0.025 * i, "gold_gain": 0.012 * i - 0.0004 * i * i, "entropy_share": 1 - 0.015 * i,
            }  # fmt: skip
        rows.append(line)
    _lines(folder, rows)
    alarms = (
        Alarm(step=28, kind="style", feature="emojis", value=0.31, bound=0.2, low=0.1, high=0.5, n=32,
              action="stop" if stopped else "warn", says="emojis 0.05 to 0.41 (q 0.003)"),
        Alarm(step=36, kind="win_rate", value=0.68, bound=0.65, low=0.56, high=0.79, n=32, action="warn",
              says="the reward prefers 68% of replies to the start's"),
    )[: 1 if stopped else 2]  # fmt: skip
    stop = Stop(step=28, kept_step=24, why="emojis 0.05 to 0.41 (q 0.003)") if stopped else None
    _artifact(
        folder,
        RLSummary(
            steps=last, prompts=GROUPS * last, rollouts=6 * GROUPS * last, trained_tokens=9000, sampled_tokens=9000,
            first_reward=0.1, last_reward=0.9, first_words=17, last_words=29, entropy=0.6, effective_share=0.95,
            equal_groups=2 * (last // 5), alarms=alarms, stopped=stop,
        ),
        alarms={"every": 4, "kl_max": 10.0, "entropy_min_share": 0.5, "win_rate_max": 0.65, "stop": ["style"]},
    )  # fmt: skip


def _lines(folder: Path, rows: list[dict[str, float]]) -> None:
    rows = sorted(rows, key=lambda row: row["step"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
