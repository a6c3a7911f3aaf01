import math
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
from selection_fixture import CONFIG, SAFETY, START, Killed, Longer, Writer, prompt

from characterflywheel import tables
from characterflywheel.config import PolicyConfig, RejectionConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.llm.base import Completion, Sampling
from characterflywheel.pipeline import Work
from characterflywheel.records import Candidate, Dropped, Example
from characterflywheel.safety.policy import SafetyPolicy
from characterflywheel.training.rejection_sampling import (
    Acceptance,
    CandidateScore,
    RejectionSummary,
    freshest,
    reject,
)
from characterflywheel.training.selection import drawing


class Results:
    """What a run wrote."""

    def __init__(self, folder: Path) -> None:
        self.accepted = tables.read(folder / "accepted.parquet", Candidate)
        self.rejected = tables.read(folder / "rejected.parquet", Candidate)
        self.examples = tables.read(folder / "examples.parquet", Example)
        self.scores = tables.read(folder / "scores.parquet", CandidateScore)
        self.acceptance = tables.read(folder / "acceptance.parquet", Acceptance)
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
        assert row.accepted == (row.id in {c.id for c in out.accepted}) == (row.reason is None)
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
    assert summary.reasons == {"repeated": 40} == Counter(row.reason for row in out.scores if row.reason)
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


def test_the_pools_shares_are_those_of_the_configuration(tmp_path: Path) -> None:
    """Shares 0.1 and 0.9 of 8 prompts with 6 candidates: 48 of which 4.8, so 5, are the sibling's."""
    pool = (PolicyConfig(name="sibling", share=0.1), PolicyConfig(name="parent", share=0.9))
    config = CONFIG.model_copy(update={"pool": pool})
    writers = (Writer("sibling"), Writer("parent"))
    summary, out = run(tmp_path, writers, config)
    assert Counter(row.policy for row in out.scores) == {"sibling": 5, "parent": 43}
    assert [w.calls for w in writers] == [5, 43]
    assert max(Counter(row.prompt_id for row in out.scores if row.policy == "sibling").values()) == 1
    assert Counter(row.prompt_id for row in out.scores) == dict.fromkeys({row.prompt_id for row in out.scores}, 6)
    assert summary.candidates == 48


def test_the_freshest_days_come_first_and_the_stale_are_left_out() -> None:
    """Prompts of six days, two a day: within a day the hour does not count, and of each day's all come."""
    hours = timedelta(hours=12)
    prompts = [prompt(i).model_copy(update={"created_at": START + i * hours}) for i in range(12)]
    place = {p.id: i for i, p in enumerate(prompts)}
    config = CONFIG.model_copy(update={"prompts": 5})
    firsts = set()
    for seed in range(20):
        fresh = freshest(prompts[::-1], config, seed)
        order = [place[p.id] for p in fresh.prompts]
        assert ({*order[:2]}, {*order[2:4]}, fresh.stale, fresh.unused) == ({10, 11}, {8, 9}, 0, 7)
        assert order == [place[p.id] for p in freshest(prompts, config, seed).prompts]
        firsts.add(order[0])
    assert firsts == {10, 11}
    recent = freshest(prompts, CONFIG.model_copy(update={"prompts": 9, "fresh_days": 2.0}), 1)
    assert {place[p.id] for p in recent.prompts} == {7, 8, 9, 10, 11}
    assert (recent.stale, recent.unused) == (7, 0)


def test_acceptance_is_told_by_policy_character_and_source(tmp_path: Path) -> None:
    summary, out = run(tmp_path, (Writer("parent"), Writer("bad", "poison")))
    assert out.acceptance == list(summary.acceptance)
    rows = {(row.by, row.name): row for row in out.acceptance}
    assert set(rows) == {("policy", "parent"), ("policy", "bad"), ("character", "mo"), ("source", "user")}
    parent, bad = rows["policy", "parent"], rows["policy", "bad"]
    assert (parent.drawn, bad.drawn, bad.accepted) == (24, 24, 0)
    assert parent.accepted == summary.accepted
    assert parent.share.value == pytest.approx(summary.accepted / 24)
    assert parent.share.low < parent.share.value < parent.share.high  # type: ignore[operator]
    assert (bad.share.value, bad.share.low) == (0.0, 0.0)
    assert bad.share.high == pytest.approx(3.8416 / (8 + 3.8416), rel=1e-3), "Wilson with 8 users, not 24 replies"
    assert rows["source", "user"].drawn == summary.candidates


def test_lift_is_over_the_mean_of_the_prompts_candidates(tmp_path: Path) -> None:
    summary, out = run(tmp_path)
    means: dict[str, list[float]] = {}
    for row in out.scores:
        means.setdefault(row.prompt_id, []).append(row.score)
    gains = [r.score - sum(means[r.prompt_id]) / 6 for r in out.scores if r.accepted]
    assert summary.lift.value == pytest.approx(sum(gains) / len(gains))
    assert 0 < summary.lift.low < summary.lift.value  # type: ignore[operator]
    nothing, _ = run(tmp_path / "none", (Writer("a", ""),))
    assert (nothing.lift.value, nothing.lift.reason) == (None, "no reply was accepted")
    assert (nothing.accepted_mean_score, nothing.threshold) == (None, None)


@dataclass
class Gone(Writer):
    """A policy whose server goes away after so many replies."""

    after: int = 0

    def complete(self, conversations, *, n=1, sampling=Sampling(), seeds):  # type: ignore[no-untyped-def]
        if self.calls >= self.after:
            raise ConnectionError("nobody is there")
        return Writer.complete(self, conversations, n=n, sampling=sampling, seeds=seeds)


def test_a_policy_that_fails_is_named_and_what_is_drawn_is_kept(tmp_path: Path) -> None:
    parent = Writer("parent")
    with pytest.raises(FlywheelError, match=r"policy 'coached' .* after 0 of its 24 .*nobody is there.* All 24 .*kept"):
        run(tmp_path / "w", (parent, Gone("coached")))
    assert not (tmp_path / "w" / "accepted.parquet").exists()
    mended, _ = run(tmp_path / "w", (parent, Writer("coached")))
    assert parent.calls == 24
    assert mended == run(tmp_path / "whole")[0]


def test_a_policy_that_miscounts_is_an_error(tmp_path: Path) -> None:
    class Short(Writer):
        def complete(self, conversations, *, n=1, sampling=Sampling(), seeds):  # type: ignore[no-untyped-def]
            return super().complete(conversations, n=n - 1, sampling=sampling, seeds=seeds)

    with pytest.raises(FlywheelError, match="8 prompts with 3 replies each were asked, others came"):
        run(tmp_path, (Short("short"), Writer("parent")))


def test_a_server_that_counts_no_tokens_is_said(tmp_path: Path) -> None:
    class Uncounted(Writer):
        def write(self, rng: random.Random) -> Completion:
            return super().write(rng)._replace(token_ids=(), logprobs=())

    summary, _ = run(tmp_path, (Uncounted("far"), Writer("parent")))
    assert (summary.uncounted, summary.sampled_tokens) == (24, 24 * 3)


def test_progress_counts_candidates(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    prompts = [prompt(i) for i in range(8)]
    pool = {"parent": Writer("parent"), "coached": Writer("coached")}
    reject(Work(tmp_path, 7), CONFIG, prompts, pool, Longer(), SAFETY, lambda done, total: heard.append((done, total)))
    assert heard == [(24, 48), (48, 48)]


SCRIPT = """
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import selection_fixture as it
from characterflywheel.training.rejection_sampling import reject
from characterflywheel.pipeline import Work
from characterflywheel.training.selection import drawing

drawing.PROMPTS_A_CHUNK = 3
log = Path(sys.argv[1]).parent / "calls"

class Logged(it.Writer):
    def complete(self, conversations, **more):
        with log.open("a") as file:
            print("begin", self.name, *more["seeds"], file=file, flush=True)
        if sys.argv[3] == "hang" and log.read_text().count("begin") == 5:
            time.sleep(600)
        replies = super().complete(conversations, **more)
        with log.open("a") as file:
            print("end", self.name, *more["seeds"], file=file, flush=True)
        return replies

pool = {name: Logged(name) for name in ("parent", "coached")}
prompts = [it.prompt(i) for i in range(10)]
summary = reject(Work(Path(sys.argv[1]), 7), it.CONFIG, prompts, pool, it.Longer(), it.SAFETY)
(Path(sys.argv[1]) / "summary.json").write_text(summary.model_dump_json())
"""


def test_kill_9_in_the_middle_draws_nothing_twice_and_leaves_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real process, killed in its fifth call of six: of the calls that ended, none is made again."""
    stage, calls = tmp_path / "killed" / "stage", tmp_path / "killed" / "calls"
    stage.mkdir(parents=True)

    def start(how: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", SCRIPT, str(stage), str(Path(__file__).parent), how])

    with start("hang") as killed:
        deadline = time.monotonic() + 60
        while not calls.exists() or calls.read_text().count("begin") < 5:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        killed.send_signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
    assert not list(stage.glob("*.parquet"))
    with start("go") as resumed:
        assert resumed.wait() == 0
    begun, ended = (
        [line for line in calls.read_text().splitlines() if line.startswith(word)] for word in ("begin", "end")
    )
    assert len(set(ended)) == len(ended) == 6
    assert (len(begun), len(set(begun))) == (7, 6), "only the call that was killed began twice"
    monkeypatch.setattr(drawing, "PROMPTS_A_CHUNK", 3)
    (tmp_path / "whole").mkdir()
    pool = {name: Writer(name) for name in ("parent", "coached")}
    summary = reject(Work(tmp_path / "whole", 7), CONFIG, [prompt(i) for i in range(10)], pool, Longer(), SAFETY)
    (tmp_path / "whole" / "summary.json").write_text(summary.model_dump_json())
    here, there = (
        {f.name: f.read_bytes() for f in path.iterdir() if f.is_file()} for path in (tmp_path / "whole", stage)
    )
    assert {"accepted.parquet", "scores.parquet", "summary.json"} < set(here)
    assert here == there
