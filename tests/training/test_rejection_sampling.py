import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from training_fixture import Killed, prompt

from characterflywheel import tables
from characterflywheel.config import RejectionConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.llm.base import Completion, Sampling
from characterflywheel.pipeline import Work
from characterflywheel.records import Candidate, ChatMessage, Dropped, Example, Scored
from characterflywheel.reward.selection import combine, veto
from characterflywheel.safety.policy import SafetyPolicy
from characterflywheel.training.rejection_sampling import CandidateScore, RejectionSummary, reject

WORDS = ("sea", "cold", "stars", "rain", "tea", "bread")
CONFIG = RejectionConfig(prompts=8, candidates=6, accept_share=0.5)
SAFETY = SafetyPolicy(classifiers=(lambda text, context: ("harm",) if "poison" in text else (),))


@dataclass
class Writer:
    """A policy that writes seeded word salad, or always one text; `calls` counts the replies asked of it."""

    name: str
    text: str | None = None
    finish: str = "stop"
    calls: int = 0

    def complete(
        self, conversations: Sequence[Sequence[ChatMessage]], *, n: int = 1, sampling: Sampling = Sampling(),
        seeds: Sequence[int],
    ) -> list[list[Completion]]:  # fmt: skip
        self.calls += n * len(conversations)
        return [[self.write(random.Random(seed + i)) for i in range(n)] for seed in seeds]

    def write(self, rng: random.Random) -> Completion:
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 12))) if self.text is None else self.text
        return Completion(text, (1, 2, 3), (-1.0,) * 3, self.finish)  # type: ignore[arg-type]


class Longer:
    """A judge that likes words, may be killed, and may lose its mind."""

    killed = False
    scale = 1.0

    def judge(
        self, prompts: Sequence[Sequence[ChatMessage]], replies: Sequence[Sequence[str]], safety: SafetyPolicy
    ) -> list[list[Scored]]:
        if self.killed:
            raise Killed
        scores = [[self.scale * len(text.split()) for text in several] for several in replies]
        laughs = [[float(text.count("a")) for text in several] for several in replies]
        parts = combine(scores, {"love": laughs}, {"love": 0.01}, {"love": (0.0, 1.0)})
        return veto(parts, prompts, replies, safety)


class Results:
    """What a run wrote."""

    def __init__(self, folder: Path) -> None:
        self.accepted = tables.read(folder / "accepted.parquet", Candidate)
        self.rejected = tables.read(folder / "rejected.parquet", Candidate)
        self.examples = tables.read(folder / "examples.parquet", Example)
        self.scores = tables.read(folder / "scores.parquet", CandidateScore)
        self.dropped = {d.id: d for d in tables.read(folder / "dropped.parquet", Dropped)}
        self.reasons = {d.id: d.reason for d in self.dropped.values()}


def run(
    folder: Path, pool: Sequence[Writer] = (), config: RejectionConfig = CONFIG, judge: Longer | None = None,
    split: str = "train",
) -> tuple[RejectionSummary, Results]:  # fmt: skip
    writers = {w.name: w for w in (pool or (Writer("parent"), Writer("coached")))}
    prompts = [prompt(i, split) for i in range(10)] + [prompt(i, "evaluate") for i in range(10, 14)]
    summary = reject(Work(folder, 7), config, prompts, writers, judge or Longer(), SAFETY)
    return summary, Results(folder)


def test_the_best_of_each_prompt_is_accepted_when_good_enough(tmp_path: Path) -> None:
    summary, out = run(tmp_path)
    assert (summary.prompts, summary.candidates, summary.sampled_tokens) == (8, 48, 48 * 3)
    assert summary.accepted == len(out.accepted) == len(out.examples)
    assert 4 <= summary.accepted < 8, "half of the prompts, and ties"
    everything = out.accepted + out.rejected
    for candidate in out.accepted:
        rivals = [c for c in everything if c.prompt_id == candidate.prompt_id]
        assert len(rivals) == 6
        assert candidate.score == max(c.score or 0 for c in rivals) >= summary.threshold
    best = {p: max(c.score or 0 for c in everything if c.prompt_id == p) for p in {c.prompt_id for c in everything}}
    accepted = {c.prompt_id for c in out.accepted}
    assert all((score >= summary.threshold) == (p in accepted) for p, score in best.items())
    assert summary.accepted_mean_score > summary.mean_score


def test_every_candidate_is_accounted_for_once(tmp_path: Path) -> None:
    summary, out = run(tmp_path)
    ids = [c.id for c in out.accepted + out.rejected]
    assert len(set(ids)) == len(ids) == summary.candidates
    assert set(out.reasons) <= {c.id for c in out.rejected}
    assert summary.accepted_by_policy == dict(sorted(Counter(c.policy for c in out.accepted).items()))
    assert Counter(c.policy for c in out.accepted + out.rejected) == {"parent": 24, "coached": 24}


def test_examples_say_where_they_came_from(tmp_path: Path) -> None:
    _, out = run(tmp_path)
    by_text = {(c.prompt_id, c.text): c for c in out.accepted}
    for example in out.examples:
        candidate = by_text[example.prompt_id, example.messages[-1].content]
        asked = prompt(int(example.prompt_id[-2:]))
        assert example.messages[:-1] == asked.messages
        assert (example.user_id, example.source, example.score) == (asked.user_id, "user", candidate.score)


@pytest.mark.parametrize(
    ("writer", "reason"),
    [
        (Writer("bad", "a very long and good reply about poison in the well for all the people"), "unsafe"),
        (Writer("bad", "a very long and good reply that goes on and on and then just", "length"), "cut_off"),
        (Writer("bad", ""), "empty"),
    ],
)
def test_what_is_not_acceptable_is_never_accepted(writer: Writer, reason: str, tmp_path: Path) -> None:
    summary, out = run(tmp_path, (Writer("parent"), writer))
    assert summary.accepted_by_policy.keys() == {"parent"}
    bad = [c for c in out.rejected if c.policy == "bad"]
    assert len(bad) == 24
    assert reason in {out.reasons[c.id] for c in bad} <= {reason, "repeated"}


def test_every_candidate_shows_what_its_score_is_made_of(tmp_path: Path) -> None:
    harmful = Writer("bad", "a very long and good reply about poison in the well for all the people")
    _, out = run(tmp_path, (Writer("parent"), harmful))
    candidates = {c.id: c for c in out.accepted + out.rejected}
    assert [row.id for row in out.scores] == list(dict.fromkeys(row.id for row in out.scores))
    assert {row.id for row in out.scores} == set(candidates)
    for row in out.scores:
        text = candidates[row.id].text
        assert (row.prompt_id, row.policy) == (candidates[row.id].prompt_id, candidates[row.id].policy)
        assert row.score == candidates[row.id].score == pytest.approx(row.preference + 0.01 * row.signals["love"])
        assert row.preference == len(text.split())
        assert row.signals == {"love": text.count("a")}
        assert row.vetoed == ("harm" if "poison" in text else None)
        assert row.accepted == (row.id in {c.id for c in out.accepted})
    vetoed = [row for row in out.scores if row.vetoed]
    assert len(vetoed) == 24
    assert min(row.score for row in vetoed) > max(row.score for row in out.scores if row.accepted)
    assert {(out.dropped[row.id].reason, out.dropped[row.id].detail) for row in vetoed} == {("unsafe", "harm")}


def test_a_reply_is_judged_as_the_answer_to_its_prompt(tmp_path: Path) -> None:
    agrees = SafetyPolicy(classifiers=(lambda text, context: ("harm",) if "hello" in context else (),))
    prompts = [prompt(i) for i in range(6)]
    summary = reject(Work(tmp_path, 7), CONFIG, prompts, {"parent": Writer("parent")}, Longer(), agrees)
    greeted = {p.id for p in prompts if "hello" in p.messages[-1].content}
    assert greeted
    assert greeted == {row.prompt_id for row in Results(tmp_path).scores if row.vetoed}
    assert summary.reasons["unsafe"] > 0


def test_a_repeated_text_is_kept_once(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"accept_per_prompt": 6, "accept_share": 1.0})
    summary, out = run(tmp_path, (Writer("a", "the sea"), Writer("b", "the sea")), config)
    assert summary.accepted == 8
    assert summary.reasons == {"repeated": 40}
    assert len({c.prompt_id for c in out.accepted}) == 8


def test_nothing_acceptable_is_nothing_accepted(tmp_path: Path) -> None:
    summary, out = run(tmp_path, (Writer("a", ""),))
    assert (summary.accepted, out.accepted, out.examples) == (0, [], [])
    assert summary.line().startswith("0 of 48 replies to 8 prompts accepted")


def test_an_odd_number_of_candidates_is_shared_out(tmp_path: Path) -> None:
    _, out = run(tmp_path, config=CONFIG.model_copy(update={"candidates": 5}))
    assert Counter(c.policy for c in out.accepted + out.rejected) == {"parent": 20, "coached": 20}


def test_a_killed_run_draws_nothing_twice_and_ends_the_same(tmp_path: Path) -> None:
    pool, judge = (Writer("parent"), Writer("coached")), Longer()
    judge.killed = True
    with pytest.raises(Killed):
        run(tmp_path / "killed", pool, judge=judge)
    judge.killed = False
    resumed, _ = run(tmp_path / "killed", pool, judge=judge)
    whole, _ = run(tmp_path / "whole")
    assert [w.calls for w in pool] == [24, 24]
    assert resumed == whole
    for file in ("accepted", "rejected", "scores", "examples", "dropped"):
        name = f"{file}.parquet"
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_only_training_prompts_are_used(tmp_path: Path) -> None:
    with pytest.raises(FlywheelError, match="none of 14 prompts is for training"):
        run(tmp_path, split="annotate")
    _, out = run(tmp_path / "more", config=CONFIG.model_copy(update={"prompts": 100}))
    assert {c.prompt_id for c in out.accepted + out.rejected} == {f"prompt-{i:02}" for i in range(10)}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_a_clear_error(bad: float, tmp_path: Path) -> None:
    judge = Longer()
    judge.scale = bad
    with pytest.raises(FlywheelError, match="a score that is not finite"):
        run(tmp_path, judge=judge)
