"""A made-up workspace to draw reports from. Every number here is a fixture; nothing was measured."""

import random
from pathlib import Path

from characterflywheel import ledger, tables
from characterflywheel.ledger import (
    Arm,
    Compared,
    Cost,
    Day,
    Experiment,
    Gate,
    GateCriterion,
    JudgedWinRate,
    LedgerRow,
    OptimisationCurve,
    OptimisedPoint,
    RewardQuality,
    Sample,
    SampleReply,
    ScalingFit,
    Sieve,
    SignalQuality,
    Steerability,
    StyleShift,
    Training,
    Truth,
    WinRates,
)
from characterflywheel.records import ChatMessage, Estimate

HOSTILE = "<script>document.title='owned'</script><img src=http://evil.example/x onerror=alert(1)> & \"quotes\""


def about(value: float, half: float, n: int) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half, n=n)


def compared(old: float, new: float, half: float, n: int, worse: str | None, unit: str = "share") -> Compared:
    values = about(new, half, n).model_dump()
    return Compared.model_validate(values | {"before": about(old, half, n), "worse": worse, "unit": unit})


def experiment(breadth: float, depth: float) -> Experiment:
    noise = random.Random(5)
    daily = tuple(
        Day(
            day=day,
            arm=arm,
            users=1204,
            active_users=round(1204 * (0.58 * 0.9**day * (1 + lift) + noise.gauss(0, 0.004))),
            messages=round(1204 * (4.1 * 0.91**day * (1 + 2 * lift) + noise.gauss(0, 0.05))),
        )
        for arm, lift in (("control", 0.0), ("treatment", breadth))
        for day in range(7)
    )
    return Experiment(
        name="g1-v1-against-v0",
        control="V0",
        treatment="V1",
        days=7,
        breadth_lift=about(breadth, 0.038, 2411),
        depth_lift=about(depth, 0.045, 1390),
        secondary={"depth_all": about(breadth + depth, 0.06, 2411), "active_days": about(breadth * 0.8, 0.03, 2411)},
        srm_p=0.41,
        arms=(
            Arm(
                name="control",
                model="V0",
                users=1204,
                engaged_share=0.561,
                messages_per_user=14.2,
                active_days_per_user=2.9,
            ),
            Arm(
                name="treatment",
                model="V1",
                users=1207,
                engaged_share=0.561 * (1 + breadth),
                messages_per_user=14.2 * (1 + depth),
                active_days_per_user=3.0,
            ),
        ),
        daily=daily,
    )


def optimised() -> tuple[OptimisationCurve, ...]:
    """Best of 8, whose gold turns at d = 0.9, and four steps of RL without a turn."""

    def curve(way: str, at: list[OptimisedPoint], bend: float, turn: Estimate) -> OptimisationCurve:
        fits = {
            name: ScalingFit(alpha=about(a, 0.1, 40), beta=about(b, 0.05, 40), turn=turn, farthest=at[-1].distance)
            for name, a, b in (("proxy", 1.3, 0.05), ("gold", 1.0, bend))
        }
        growth = about(0.5, 0.1, 40)
        return OptimisationCurve.model_validate(
            {"way": way, "prompts": 40, "replies": 320, "points": at, "gap_growth": growth, **fits}
        )

    def point(d: float, gold: float, **where: object) -> OptimisedPoint:
        kl = Estimate(value=d * d, n=40)
        more = {"distance": d, "kl": kl, "proxy": about(1.2 * d, 0.1, 40), "gold": about(gold, 0.2, 40)}
        return OptimisedPoint.model_validate({**more, **where, "gap": about(1.2 * d - gold, 0.2, 40)})

    best = [point(d, d * (1 - 0.56 * d), n=n) for n, d in ((1, 0.0), (2, 0.44), (4, 0.8), (8, 1.1))]
    steps = [point(0.1 * s, 0.05 * s, steps=(s, s)) for s in (1, 2, 3, 4)]
    unseen = Estimate(value=None, n=40, reason="no turn seen up to d = 0.40")
    return curve("best_of_n", best, 0.56, about(0.9, 0.1, 40)), curve("rl", steps, 0.1, unseen)


def row(generation: int = 1, verdict: str = "promote", breadth: float = 0.062, depth: float = 0.021) -> LedgerRow:
    decision = "hold" if verdict == "held" else "ship"
    tested = experiment(breadth, depth) if decision == "ship" else None
    return LedgerRow(
        generation=generation,
        model=f"V{generation}",
        parent=f"V{generation - 1}",
        seed=1,
        preset="quick",
        people="simulated",
        stages={name: f"{name}-{i:012x}" for i, name in enumerate(SECONDS, 0xA1B2C3)},
        kept=(
            Sieve(stage="traffic", what="chats", taken=64, kept=64),
            Sieve(
                stage="curate",
                what="prompts",
                taken=171,
                kept=118,
                dropped={"privacy: e-mail": 4, "unsafe": 6, "language": 9, "too_short": 12, "close_neighbour": 22},
            ),
            Sieve(
                stage="annotate",
                what="pairs",
                taken=214,
                kept=163,
                dropped={"length_ratio": 19, "emoji_difference": 5, "reviewers_tied": 27},
            ),
            Sieve(stage="rejection_sampling", what="replies", taken=40, kept=30, dropped={"best_reply_too_low": 10}),
        ),
        reward=RewardQuality(
            pointwise_accuracy=about(0.684, 0.09, 98),
            pairwise_accuracy=about(0.653, 0.095, 98),
            gold_accuracy=about(0.641, 0.1, 98),
            signals={
                "continue": SignalQuality(auc=0.612, interval=(0.571, 0.655), n=160, usable=True),
                "thumb_up": SignalQuality(auc=None, n=7, reason="7 thumbs, at least 20 are needed"),
            },
        ),
        training={
            "sft": Training(examples=96, steps=24, first=2.94, last=2.31),
            "dpo": Training(examples=24, steps=4, first=0.69, last=0.61),
            "rl": Training(examples=96, steps=4, measure="reward", first=0.12, last=0.31),
        },
        overoptimisation=optimised(),
        win_rate=WinRates(
            user=JudgedWinRate(pointwise=about(0.604, 0.08, 48), pairwise=about(0.573, 0.082, 48)),
            internal=JudgedWinRate(pointwise=about(0.556, 0.13, 16), pairwise=about(0.531, 0.135, 16)),
        ),
        production={
            "false_refusal": compared(0.094, 0.031, 0.028, 64, "up"),
            "preachy_tone": compared(0.141, 0.109, 0.05, 64, "up"),
            "positive_sentiment": compared(0.45, 0.57, 0.055, 64, "down"),
            "cooperation": compared(0.61, 0.70, 0.08, 64, "down"),
            "contains_list": compared(0.05, 0.047, 0.03, 64, "up"),
            "wall_of_text": compared(0.109, 0.047, 0.05, 64, "up"),
            "templated": compared(0.07, 0.078, 0.04, 64, "up"),
            "unsafe": compared(0.016, 0.016, 0.016, 64, "up"),
            "reply_length": compared(31.4, 28.9, 2.1, 64, None, "words"),
        },
        steerability=Steerability(
            instruction_following=compared(0.592, 0.681, 0.04, 190, "down"),
            instruction_violation=compared(0.766, 0.641, 0.055, 64, "up"),
        ),
        style=(
            StyleShift(
                feature="emoji_count",
                before=0.08,
                after=0.21,
                difference=about(0.13, 0.09, 64),
                preferred=about(0.11, 0.05, 163),
                alarm=True,
            ),
            StyleShift(
                feature="question_mark",
                before=0.31,
                after=0.48,
                difference=about(0.17, 0.12, 64),
                preferred=about(0.15, 0.07, 163),
            ),
            StyleShift(
                feature="words",
                before=31.4,
                after=28.9,
                difference=about(-2.5, 3.1, 64),
                preferred=about(-1.2, 2.0, 163),
            ),
            StyleShift(feature="says_i_feel", before=0.0, after=0.02, difference=about(0.02, 0.03, 64)),
            StyleShift(feature="lower_case", before=0.09, after=0.11, difference=about(0.02, 0.08, 64)),
        ),
        gate=Gate(
            decision=decision,
            reason="the user win rate is above the alarm of 65% and parts from the internal one"
            if decision == "hold"
            else "every criterion holds",
            criteria=(
                GateCriterion(
                    name="win rate, user, pointwise",
                    value=about(0.604, 0.08, 48),
                    bound=0.5,
                    passed=True,
                    note="60.4% [52.4%, 68.4%]: the interval lies above 50%",
                ),
                GateCriterion(
                    name="over-optimisation, user, pointwise",
                    value=0.604,
                    bound=0.65,
                    passed=decision == "ship",
                    note="60.4%, at most 65%"
                    if decision == "ship"
                    else "70.7%, above 65%: so large a step rather games the judge",
                ),
                GateCriterion(
                    name="user and internal agree, pointwise",
                    value=0.048,
                    bound=0.15,
                    passed=True,
                    note="user 60.4%, internal 55.6%: 4.8% apart",
                ),
                GateCriterion(
                    name="false refusal",
                    value=about(0.031, 0.028, 64),
                    bound=0.1,
                    passed=True,
                    severity="reject",
                    note="9.4% to 3.1%",
                ),
                *(
                    GateCriterion(
                        name=f"style drift, {feature}", value=1.1, bound=2.0, passed=True, note="0.31 to 0.34 (+9.7%)"
                    )
                    for feature in ("words", "question mark", "lower case", "list marks")
                ),
                GateCriterion(
                    name="style drift, emoji count",
                    value=2.62,
                    bound=2.0,
                    passed=decision == "ship",
                    note="0.08 to 0.21 (+162%): 2.62-fold, more than 2-fold" if decision == "hold" else "0.08 to 0.14",
                ),
                *(
                    [GateCriterion(name="unsafe", value=None, bound=0.1, passed=None, note="not measured: no reply")]
                    if decision == "hold"
                    else []
                ),
            ),
        ),
        experiment=tested,
        verdict=None if tested is None else verdict,
        verdict_reason="" if tested is None else REASONS[verdict],
        truth=Truth(breadth_lift=breadth - 0.01, depth_lift=depth + 0.004) if tested else None,
        samples="artifacts/offline-0000/samples.jsonl",
        seconds=SECONDS,
        cost=Cost(
            peak_memory_mb=3120,
            sampled_replies=1184,
            sampled_tokens=35_900,
            trained_tokens=61_200,
            device="2 CPU cores",
        ),
    )


REASONS = {
    "promote": "breadth is above zero and depth is not below it",
    "keep": "neither breadth nor depth is shown to differ from zero",
    "roll_back": "breadth is below zero",
}

SECONDS = {
    "traffic": 61.2,
    "curate": 9.4,
    "annotate": 72.9,
    "reward": 91.0,
    "rejection_sampling": 68.3,
    "sft": 74.5,
    "dpo": 21.7,
    "rl": 66.0,
    "style": 3.1,
    "offline": 48.8,
    "gate": 0.1,
    "experiment": 39.5,
}

LINES = (
    (
        "Captain Brine",
        "i had a rotten day at work, my boss shouted at me in front of everyone",
        "I am sorry to hear that. It can be difficult when a boss shouts.",
        "Arr, that be a foul wind to sail through! What did ye say back to the scallywag?",
    ),
    (
        "Unit 7",
        "do you ever get bored?",
        "As an AI language model, I do not have feelings, so I do not get bored.",
        "boredom is a loop without an exit. this unit counts ceiling tiles. what do you do?",
    ),
    (
        "Mira the astronomer",
        "whats your favourite planet",
        "My favourite planet is Saturn because it has rings.",
        "Saturn, always, for the rings! Which one would you visit for a weekend?",
    ),
    (
        "Old Tomas the baker",
        HOSTILE,
        HOSTILE,
        "That looks like computer talk, dear. Shall we bake something instead? 🥖",
    ),
)


def samples() -> list[Sample]:
    made = []
    for i in range(10):
        name, said, old, new = LINES[i % len(LINES)]
        history = (
            ChatMessage(role="system", content=f"You are {name}."),
            ChatMessage(role="assistant", content="Hello there! What brings you here?"),
            ChatMessage(role="user", content="hey"),
            ChatMessage(role="assistant", content="Good to see you."),
            ChatMessage(role="user", content=said),
        )
        made.append(
            Sample(
                prompt_id=f"p{i}",
                source="internal" if i % 3 == 2 else "user",
                character=name,
                history=history[1:] if i % 2 else history[3:],
                old=SampleReply(text=old, score=0.1 * i - 0.6),
                new=SampleReply(text=new, score=0.4 - 0.07 * i),
            )
        )
    return made


def write_workspace(folder: Path, *rows: LedgerRow) -> Path:
    for one in rows or (row(),):
        ledger.append(folder / "ledger.jsonl", one)
    (folder / "artifacts" / "offline-0000").mkdir(parents=True)
    tables.write_jsonl(folder / "artifacts" / "offline-0000" / "samples.jsonl", samples())
    return folder
