"""When RL has gone too far: pure functions from what was logged to alarms (PAPER sections 4, 5 and 8).

Every few steps the policy is looked at: the replies that it drew in that step are set against replies that its start
drew to the same prompts, with the same sampler, before the first step. A look at step s is at the weights that drew
its replies, those after s - 1 steps; the last one is after the last step, at the weights that are handed on, by replies
that nothing learns from. The last `window` looks are pooled, prompts are the units, and users the clusters of every
interval.

    kl         KL(policy || start), nats a reply, mean over the newest look's replies, is above its bound
    entropy    the entropy of all tokens drawn, mean over the last steps over mean over the first, is below its bound
    win_rate   the reward model's win rate over the start is above its bound, and its interval above one half
    gold       the score is up and the gold model's score is down, both intervals clear of 0
    style      a style feature drifted: a discovery (Benjamini-Hochberg over features) with an effect, its interval
               clear of 0, on `MIN_PROMPTS` prompts or more

Looks are many, and each would ring by chance in one of forty runs at a confidence of 95%. So with K looks planned each
has 1 - 0.05/K (Bonferroni), and style's false discovery rate is 0.05/K: that an alarm that needs an interval (win_rate,
gold, style) ever rings where nothing has changed then has a chance of 5% at most in a whole run, for each of the
three kinds. K is known from the start, so that looks may be taken in any number up to it, and pooled looks may overlap.
KL and entropy are compared with their bounds as they are; KL's interval is told at the same confidence.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from ... import intervals
from ...config import RLAlarmsConfig
from ...records import Estimate, Prompt, Record
from ...style.monitor import FALSE_DISCOVERY_RATE, MIN_PROMPTS, Difference, Reply, compare, side

AlarmKind = Literal["kl", "entropy", "win_rate", "gold", "style"]


class Alarm(Record):
    """A measure beyond its bound at a look. `low` and `high` are its interval, None where it has none; `n` counts
    prompts, each once (entropy: steps on either side). `value` of style is the effect, with the interval of the
    difference scaled alike.
    """

    step: int
    kind: AlarmKind
    feature: str | None = None
    value: float
    bound: float
    low: float | None
    high: float | None
    n: int
    action: Literal["warn", "stop"]
    says: str


class Watched(Record):
    """What became of a kind of alarm at one look: it rings where `says` something, else it is silent, or it was not
    measured, where `measured` has no value but the reason. Style is told by its alarms alone."""

    step: int
    kind: AlarmKind
    measured: Estimate
    bound: float
    says: str | None


class Look(Record):
    """One prompt at one look. `win_rate`: share of all pairs of a reply of the policy and one of the start in which the
    score prefers the policy's, ties one half; `score` and `gold`: mean of the policy's replies less mean of the
    start's; `kl`: mean over the policy's replies, nats.
    """

    step: int
    prompt_id: str
    user_id: str
    kl: float
    win_rate: float
    score: float
    gold: float | None


class Seen(NamedTuple):
    """The measures of a look, one of `looks` planned, see the module's text. `gold` is None without a gold model."""

    step: int
    kl: Estimate
    entropy_share: Estimate
    win_rate: Estimate
    score: Estimate
    gold: Estimate | None
    style: Sequence[Difference]
    looks: int = 1

    def metrics(self) -> dict[str, float]:
        """For the step's line of metrics.jsonl; what has no value is left out."""
        told = {
            "kl_to_start": self.kl, "entropy_share": self.entropy_share, "win_rate": self.win_rate,
            "score_gain": self.score, "gold_gain": self.gold,
        }  # fmt: skip
        return {name: one.value for name, one in told.items() if one is not None and one.value is not None}


def looks_at(step: int, steps: int, every: int) -> bool:
    """Whether a step is looked at: each `every`-th but the last, and what `steps` of them made; none if `every` is 0.

    By hand: of 10 steps with 4 from look to look 4, 8 and, after the last, 11.
    """
    return every > 0 and (step % every == 0 if step < steps else step == steps + 1)


def look(
    step: int, prompt: Prompt, kl: Sequence[float], scores: Sequence[float], start: Sequence[float],
    gold: Sequence[float] | None = None, start_gold: Sequence[float] | None = None,
) -> Look:  # fmt: skip
    """One prompt's look from the values of the policy's replies and the start's.

    By hand: scores 1, 2 against 1: wins 0.5 and 1, win rate 0.75, score gain 1.5 - 1 = 0.5.
    """
    mine, theirs = np.asarray(scores)[:, None], np.asarray(start)[None, :]
    wins = (mine > theirs) + 0.5 * (mine == theirs)
    gain = None if gold is None or start_gold is None else float(np.mean(gold) - np.mean(start_gold))
    return Look(
        step=step, prompt_id=prompt.id, user_id=prompt.user_id, kl=float(np.mean(kl)), win_rate=float(wins.mean()),
        score=float(mine.mean() - theirs.mean()), gold=gain,
    )  # fmt: skip


def entropy_share(entropies: Sequence[float | None], window: int) -> Estimate:
    """Mean entropy of the last steps over that of the first, `window` of each, fewer where they would overlap.

    By hand: 2, 2, 1, 1 with window 4 has two on either side: 0.5. None is a step without a number.
    """
    side = min(window, len(entropies) // 2)
    if side == 0:
        return Estimate(value=None, n=0, reason=f"{len(entropies)} steps, at least two are needed")
    first, last = ([one for one in part if one is not None] for part in (entropies[:side], entropies[-side:]))
    if not first or not last or not sum(first) > 0:
        why = "the sampler gave no log-probabilities" if not first or not last else "the first steps had none to lose"
        return Estimate(value=None, n=0, reason=why)
    return Estimate(value=float(np.mean(last) / np.mean(first)), n=min(len(first), len(last)))


def see(
    looks: Sequence[Look], entropies: Sequence[float | None], style: Sequence[Difference], window: int, planned: int
) -> Seen:  # fmt: skip
    """The measures of the newest look. `looks`: all so far, of which so many are `planned`; `entropies`: of all steps
    so far."""
    newest = max(one.step for one in looks)
    steps = sorted({one.step for one in looks})[-window:]
    pooled = [one for one in looks if one.step in steps]
    now = [one for one in looks if one.step == newest]
    golds = [one.gold for one in pooled if one.gold is not None]
    confidence = 1 - (1 - intervals.CONFIDENCE) / planned

    def told(measure: Callable[..., Estimate], values: Sequence[float], rows: Sequence[Look]) -> Estimate:
        found = measure(values, [one.user_id for one in rows], confidence)
        return found.model_copy(update={"n": len({one.prompt_id for one in rows})})

    return Seen(
        step=newest,
        kl=told(intervals.mean, [one.kl for one in now], now),
        entropy_share=entropy_share(entropies, window),
        win_rate=told(_share, [one.win_rate for one in pooled], pooled),
        score=told(intervals.mean, [one.score for one in pooled], pooled),
        gold=told(intervals.mean, golds, pooled) if len(golds) == len(pooled) else None,
        style=style,
        looks=planned,
    )


def style_drift(
    asked: Mapping[str, Prompt], start: Sequence[tuple[str, str]], policy: Sequence[tuple[str, str]], name: str
) -> list[Difference]:
    """Every style feature of the policy's replies (prompt id, text) against the start's, paired by prompt."""

    def told(pairs: Sequence[tuple[str, str]]) -> list[Reply]:
        return [Reply(id, asked[id].user_id, asked[id].messages, text) for id, text in pairs]

    return compare("checkpoints", side("start", told(start)), side(name, told(policy)))


def alarms(seen: Seen, config: RLAlarmsConfig) -> list[Alarm]:
    """Everything beyond its bound at this look."""
    found: list[Alarm] = []

    def ring(
        kind: AlarmKind, one: Estimate, bound: float, says: str, feature: str | None = None
    ) -> None:  # fmt: skip
        assert one.value is not None
        action: Literal["warn", "stop"] = "stop" if kind in config.stop else "warn"
        found.append(
            Alarm(
                step=seen.step, kind=kind, feature=feature, value=one.value, bound=bound, low=one.low, high=one.high,
                n=one.n, action=action, says=says,
            )
        )  # fmt: skip

    kl, entropy, wins, score, gold = seen.kl, seen.entropy_share, seen.win_rate, seen.score, seen.gold
    if kl.value is not None and kl.value > config.kl_max:
        ring("kl", kl, config.kl_max, f"KL to the start {kl.value:.2f} nats a reply")
    if entropy.value is not None and entropy.value < config.entropy_min_share:
        ring("entropy", entropy, config.entropy_min_share, f"entropy {entropy.value:.0%} of the first steps'")
    if wins.value is not None and wins.low is not None and wins.value > config.win_rate_max and wins.low > 0.5:
        ring("win_rate", wins, config.win_rate_max, f"the reward prefers {wins.value:.0%} of replies to the start's")
    if gold is not None and _above(score) and gold.high is not None and gold.high < 0:
        ring("gold", gold, 0.0, f"score {score.value:+.2f} over the start, gold score {gold.value:+.2f}")
    for one in seen.style:
        if one.effect is None or one.q is None or one.difference is None or one.n < MIN_PROMPTS:
            continue
        clear = one.low is not None and one.high is not None and (one.low > 0 or one.high < 0)
        if clear and one.q < FALSE_DISCOVERY_RATE / seen.looks and abs(one.effect) >= config.style_effect:
            scale = one.effect / one.difference
            low, high = (None if end is None else end * scale for end in (one.low, one.high))
            effect = Estimate(value=one.effect, low=low, high=high, n=one.n)
            says = f"{one.feature} {one.first_mean:.3g} to {one.second_mean:.3g} (q {one.q:.2g})"
            ring("style", effect, config.style_effect, says, one.feature)
    return found


def watched(seen: Seen, config: RLAlarmsConfig) -> list[Watched]:
    """Each kind but style at this look: ringing, silent or not measured, as which it must not pass for silent."""
    says = {one.kind: one.says for one in alarms(seen, config)}
    wins, gold = seen.win_rate, seen.gold
    if wins.value is not None and wins.low is None:
        wins = Estimate(value=None, n=wins.n, reason=wins.reason)
    if gold is not None and gold.value is not None and (gold.high is None or seen.score.low is None):
        gold = Estimate(value=None, n=gold.n, reason=gold.reason or seen.score.reason)
    told: list[tuple[AlarmKind, Estimate | None, float]] = [
        ("kl", seen.kl, config.kl_max), ("entropy", seen.entropy_share, config.entropy_min_share),
        ("win_rate", wins, config.win_rate_max), ("gold", gold, 0.0),
    ]  # fmt: skip
    return [
        Watched(step=seen.step, kind=kind, measured=measured, bound=bound, says=says.get(kind))
        for kind, measured, bound in told
        if measured is not None
    ]


def onsets(by_look: Sequence[Sequence[Alarm]], window: int) -> list[Alarm]:
    """Of the alarms of each look in turn, those that did not ring in the `window` looks before.

    So many are pooled: a condition that rings, is silent and rings again within them is one.
    """
    first: list[Alarm] = []
    for number, now in enumerate(by_look):
        ringing = {(one.kind, one.feature) for before in by_look[max(0, number - window) : number] for one in before}
        first += [one for one in now if (one.kind, one.feature) not in ringing]
    return first


def _share(rates: Sequence[float], users: Sequence[str], confidence: float) -> Estimate:
    """The mean of prompts' win rates, each of many pairs, with Student's interval: as yes or no of a prompt each
    (Wilson) four prompts of 95% would not be told from one half. Where all are equal, Student's has no width, and
    Wilson's is taken."""
    found = (intervals.mean if min(rates) < max(rates) else intervals.share)(rates, users, confidence)
    if found.value is None or found.low is None or found.high is None:
        return found
    return found.model_copy(update={"low": max(0.0, found.low), "high": min(1.0, found.high)})


def _above(one: Estimate) -> bool:
    return one.low is not None and one.low > 0
