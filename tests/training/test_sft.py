import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_fixture import Killed, dies_at, example, same_weights
from transformers import AutoModelForCausalLM

from characterflywheel import tables
from characterflywheel.config import SFTConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.llm.base import Sampling
from characterflywheel.llm.native import NativeModel
from characterflywheel.pipeline import Work
from characterflywheel.records import Dropped, Example
from characterflywheel.training import learner
from characterflywheel.training.learner import Learner
from characterflywheel.training.paths import of_examples
from characterflywheel.training.sft import TrainingSummary, accumulate, hold_out, train_sft
from tiny_model import SYSTEM, asks, says, tiny_tokenizer

REPLIES = ("the sea is cold.", "tea, and stars!", "no", "ask me tomorrow")
EXAMPLES = [example(i, text) for i, text in enumerate(REPLIES)]
CONFIG = SFTConfig(evaluation_share=0, epochs=30, examples_per_step=4, learning_rate=1e-2)
SHORT = SFTConfig(evaluation_share=0, epochs=6, examples_per_step=4, learning_rate=1e-2)


def train(folder: Path, parent: Path, config: SFTConfig = CONFIG, rows: list[Example] = EXAMPLES, **more: object):  # type: ignore[no-untyped-def]
    return train_sft(Work(folder, 3), config, parent, rows, threads=1, **more)  # type: ignore[arg-type]


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_overfitting_learns_the_replies_by_heart(tiny_folder: Path, tmp_path: Path) -> None:
    summary = train(tmp_path, tiny_folder)
    assert (summary.steps, summary.examples) == (30, 120)
    assert summary.first_loss > 2
    assert summary.last_loss < 0.3
    assert len(metrics(tmp_path)) == 30
    model = NativeModel.load(tmp_path / "model", "sft", max_prompt_tokens=192, threads=1)
    answers = model.complete(
        [e.messages[:-1] for e in EXAMPLES], sampling=Sampling(temperature=0, max_tokens=20), seeds=[0] * 4
    )
    assert [[reply.text] for (reply,) in answers] == [[text] for text in REPLIES]
    assert {reply.finish_reason for (reply,) in answers} == {"stop"}


def test_only_the_last_reply_is_learnt(tiny_folder: Path, tmp_path: Path) -> None:
    """Trained tokens are those of the replies and their end tokens, not of the prompts; loss is their mean."""
    summary = train(tmp_path, tiny_folder, SFTConfig(evaluation_share=0, epochs=1, examples_per_step=4))
    tokenizer = tiny_tokenizer()
    assert summary.trained_tokens == sum(len(tokenizer(text)["input_ids"]) + 1 for text in REPLIES)


def test_a_killed_run_ends_in_the_same_bytes(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tmp_path / "whole", tiny_folder, SHORT)
    monkeypatch.setattr(learner, "CHECKPOINT_SECONDS", -1.0)
    for step in (2, 5):
        with pytest.raises(Killed):
            train(tmp_path / "killed", tiny_folder, SHORT, on_progress=dies_at(step))
    heard: list[int] = []
    resumed = train(tmp_path / "killed", tiny_folder, SHORT, on_progress=lambda done, total: heard.append(done))
    assert heard == [5, 6], "steps 1 to 4 were kept"
    assert resumed == whole
    assert same_weights(tmp_path / "whole" / "model", tmp_path / "killed" / "model")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")


def test_the_order_of_examples_does_not_matter_but_the_seed_does(tiny_folder: Path, tmp_path: Path) -> None:
    config = SFTConfig(evaluation_share=0, epochs=2, examples_per_step=2, learning_rate=1e-3)
    train(tmp_path / "a", tiny_folder, config)
    train(tmp_path / "b", tiny_folder, config, EXAMPLES[::-1])
    train_sft(Work(tmp_path / "c", 99), config, tiny_folder, EXAMPLES, threads=1)
    assert same_weights(tmp_path / "a" / "model", tmp_path / "b" / "model")
    assert not same_weights(tmp_path / "a" / "model", tmp_path / "c" / "model")


def test_duplicates_are_counted(tiny_folder: Path, tmp_path: Path) -> None:
    twice = [*EXAMPLES, example(9, REPLIES[0], asked=0)]
    summary: TrainingSummary = train(tmp_path, tiny_folder, SFTConfig(evaluation_share=0, epochs=1), twice)
    assert (summary.duplicates, summary.examples) == (1, 4)
    assert [(s.source, s.offered, s.distinct) for s in summary.sources] == [("user", 5, 4)]


@pytest.mark.parametrize(("rows", "weights"), [([], {"user": 1.0}), (EXAMPLES, {"user": 0.0})])
def test_an_empty_mixture_is_a_clear_error(
    rows: list[Example], weights: dict[str, float], tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(FlywheelError, match=f"no example to learn from: {len(rows)} offered"):
        train(tmp_path, tiny_folder, SFTConfig(evaluation_share=0, weights=weights), rows)
    assert not (tmp_path / "model").exists()


MANY = [example(i, f"the sea is {i}", source="internal" if i % 3 else "user") for i in range(12)]
HELD = SFTConfig(
    epochs=3, examples_per_step=4, learning_rate=1e-2, evaluation_share=0.25, evaluate_every=2, near_duplicates=None
)


def test_held_out_users_are_not_learnt_but_measured(tiny_folder: Path, tmp_path: Path) -> None:
    summary = train(tmp_path / "a", tiny_folder, HELD, MANY)
    split = hold_out(MANY, 0.25, 256, 3)
    assert len(split.held) == 3
    train(tmp_path / "b", tiny_folder, HELD.model_copy(update={"evaluation_share": 0.0}), split.learnt)
    assert same_weights(tmp_path / "a" / "model", tmp_path / "b" / "model"), "measuring changes nothing"
    rows = [row for row in metrics(tmp_path / "a") if "evaluation_loss" in row]
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 7]
    assert summary.examples == 3 * 9
    (every, *each) = summary.evaluation
    assert [row.source for row in summary.evaluation] == ["all", *sorted({e.source for e in split.held})]
    assert (every.examples, sum(row.examples for row in each)) == (3, 3)
    assert every.before.value == pytest.approx(rows[0]["evaluation_loss"], abs=1e-6)
    assert every.after.value == pytest.approx(rows[-1]["evaluation_loss"], abs=1e-6)
    assert every.after.value < every.before.value
    for row in each:
        assert rows[-1][f"evaluation_loss_{row.source}"] == pytest.approx(row.after.value, abs=1e-6)
    assert summary.line().endswith(f"held out {every.before.value:.3f} to {every.after.value:.3f} (n = 3)")


def test_the_evaluation_loss_is_that_of_transformers(tiny_folder: Path, tmp_path: Path) -> None:
    """A separate forward pass for each held-out example, labels on its reply only; ours has bfloat16's products."""
    summary = train(tmp_path, tiny_folder, HELD, MANY)
    tokens, total = 0, 0.0
    for folder, told in ((tiny_folder, "before"), (tmp_path / "model", "after")):
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokens, total = 0, 0.0
        form = Learner(tiny_folder, learning_rate=1, steps=1, max_prompt_tokens=192, threads=1).format
        for row in hold_out(MANY, 0.25, 256, 3).held:
            ((path,),) = [lesson.paths for lesson in of_examples(form, [row], "last", 99).lessons.values()]
            ids = torch.tensor([sum(path, ())])
            labels = ids.clone()
            labels[0, : -len(path[-1])] = -100
            total += float(model(input_ids=ids, labels=labels).loss.detach()) * len(path[-1])
            tokens += len(path[-1])
        estimate = getattr(summary.evaluation[0], told)
        assert estimate.value == pytest.approx(total / tokens, rel=0.01)
        assert estimate.n == tokens
        assert estimate.low < estimate.value < estimate.high


def test_training_stops_early_and_keeps_the_best_weights(tiny_folder: Path, tmp_path: Path) -> None:
    """What is held out says another thing than what is learnt, so its loss soon rises."""
    held = {e.id for e in hold_out(MANY, 0.25, 256, 3).held}
    odd = [
        e.model_copy(update={"messages": (*e.messages[:-1], says("assistant", "zqx" * 5))}) if e.id in held else e
        for e in MANY
    ]
    config = HELD.model_copy(update={"epochs": 30, "patience": 2, "learning_rate": 3e-2})
    summary = train(tmp_path, tiny_folder, config, odd)
    losses = [row["evaluation_loss"] for row in metrics(tmp_path) if "evaluation_loss" in row]
    assert summary.steps < summary.planned_steps == 68
    assert losses.index(min(losses)) == len(losses) - 3
    assert summary.kept_step == 2 * losses.index(min(losses))
    assert summary.evaluation[0].after.value == pytest.approx(min(losses), abs=1e-6)
    assert summary.line().endswith("stopped early of 68")


def test_nobody_held_out_is_said(tiny_folder: Path, tmp_path: Path) -> None:
    none = train(tmp_path / "a", tiny_folder, HELD.model_copy(update={"evaluation_share": 0.0}))
    one = train(tmp_path / "b", tiny_folder, HELD, EXAMPLES[:1])
    assert (none.evaluation, none.not_evaluated) == ((), "evaluation_share is 0")
    assert (one.evaluation, one.not_evaluated) == ((), "no source has two users")
    assert one.kept_step == one.steps == one.planned_steps


@given(st.lists(st.integers(0, 9), max_size=30), st.floats(0, 0.9), st.integers(0, 9))
def test_a_user_is_held_out_whole(users: list[int], share: float, seed: int) -> None:
    rows = [example(i, f"reply {i}", asked=user) for i, user in enumerate(users)]
    split = hold_out(rows, share, 256, seed)
    assert Counter(e.id for e in (*split.learnt, *split.held)) == Counter(e.id for e in rows)
    assert not {e.user_id for e in split.learnt} & {e.user_id for e in split.held}
    count = len(set(users))
    assert len({e.user_id for e in split.held}) == (
        min(count - 1, max(1, round(share * count))) if share and count else 0
    )
    again = hold_out(rows[::-1], share, 256, seed)
    assert {e.id for e in again.held} == {e.id for e in split.held}


def test_no_more_users_are_held_out_once_they_have_enough_examples() -> None:
    """Ten users with three examples each: for at least 7 examples three users are needed, though half may be held."""
    rows = [example(3 * user + i, f"reply {i}", asked=user) for user in range(10) for i in range(3)]
    assert [len(hold_out(rows, 0.5, most, 1).held) for most in (1, 3, 4, 7, 99)] == [3, 3, 6, 9, 15]


def test_only_what_is_learnt_from_is_held_out(tiny_folder: Path, tmp_path: Path) -> None:
    """A source without weight, or capped at none, tells nothing of what training does; two copies are one example."""
    rows = [example(i, f"the sea is {i}", source=("user", "internal", "rewrite")[i % 3]) for i in range(12)]
    rows += [
        example(20 + i, "the very same reply", asked=0).model_copy(
            update={"prompt_id": f"p{i}", "user_id": f"same {i}"}
        )
        for i in range(10)
    ]
    config = HELD.model_copy(update={"epochs": 1, "weights": {"user": 1.0, "rewrite": 1.0}, "evaluation_share": 0.5,
                                     "max_examples": {"rewrite": 0}})  # fmt: skip
    summary = train(tmp_path, tiny_folder, config, rows)
    assert [(row.source, row.examples) for row in summary.evaluation] == [("all", 2), ("user", 2)]
    assert [(s.source, s.offered, s.drawn) for s in summary.sources] == [
        ("internal", 4, 0), ("rewrite", 4, 0), ("user", 14, 3),
    ]  # fmt: skip
    assert summary.duplicates == 9


def test_each_source_is_held_out_by_its_own_users() -> None:
    """Six users write 20 examples each, 154 examples of a file name nobody: a tenth is one user, and 15 of the file."""
    rows = [example(i, f"r{i}", asked=i % 6) for i in range(120)]
    rows += [example(200 + i, f"f{i}", source="safety").model_copy(update={"user_id": None}) for i in range(154)]
    assert Counter(e.source for e in hold_out(rows, 0.1, 256, 3).held) == {"user": 20, "safety": 15}
    assert Counter(e.source for e in hold_out(rows, 0.9, 60, 3).held) == {"user": 40, "safety": 21}


def test_one_user_stays_to_learn_from() -> None:
    split = hold_out(EXAMPLES[:2], 0.8, 256, 1)
    assert (len(split.learnt), len(split.held)) == (1, 1)


def test_all_replies_of_a_conversation_are_learnt_where_asked(tiny_folder: Path, tmp_path: Path) -> None:
    said = ("tea", "no, rain", "the sea")
    talk = (SYSTEM, *(m for text in said for m in (says("user", "why?"), says("assistant", text))))
    row = EXAMPLES[0].model_copy(update={"messages": talk})
    one = SFTConfig(evaluation_share=0, epochs=1)
    tokens = {text: len(tiny_tokenizer()(text)["input_ids"]) + 1 for text in said}
    assert train(tmp_path / "last", tiny_folder, one, [row]).trained_tokens == tokens["the sea"]
    every = train(tmp_path / "all", tiny_folder, one.model_copy(update={"learn": "all"}), [row])
    assert every.trained_tokens == sum(tokens.values())


@pytest.mark.parametrize("limit", [1, 70, 120])
def test_a_step_in_micro_batches_is_the_step_of_the_full_batch(limit: int, tiny_folder: Path) -> None:
    """Gradients to 1e-6 in float32 (of a clipped norm of 1); the loss is theirs too."""
    mine = Learner(tiny_folder, learning_rate=1, steps=1, max_prompt_tokens=192, threads=1)
    mine.autocast = lambda: torch.autocast("cpu", enabled=False)  # type: ignore[method-assign]
    lessons = list(of_examples(mine.format, MANY, "last", 99).lessons.values())
    found = []
    for size in (10**6, limit):
        told = accumulate(mine, lessons, size)
        gradient = torch.cat([p.grad.flatten() for p in mine.parameters])
        found.append((told["loss"], told["tokens"], gradient / gradient.norm()))
        mine.optimiser.zero_grad()
    assert found[0][:2] == (pytest.approx(found[1][0], abs=1e-6), found[1][1])
    assert (found[0][2] - found[1][2]).abs().max() < 1e-6


def test_what_does_not_fit_is_dropped_by_name_and_cut_replies_are_counted(tiny_folder: Path, tmp_path: Path) -> None:
    long = example(20, "no").model_copy(
        update={"messages": (SYSTEM, says("user", "the sea " * 99), says("assistant", "no"))}
    )
    config = SFTConfig(evaluation_share=0, epochs=1, max_reply_tokens=4)
    summary = train(tmp_path, tiny_folder, config, [*EXAMPLES, EXAMPLES[0], long])
    dropped = tables.read(tmp_path / "dropped.parquet", Dropped)
    assert [(row.id, row.reason) for row in dropped] == [
        ("example-00", "duplicate"), ("example-20", "longer_than_window"),
    ]  # fmt: skip
    assert (summary.too_long, summary.duplicates, summary.examples) == (1, 1, 4)
    assert summary.cut_replies == sum(len(tiny_tokenizer()(text)["input_ids"]) + 1 > 4 for text in REPLIES)
    assert summary.trained_tokens == sum(min(4, len(tiny_tokenizer()(text)["input_ids"]) + 1) for text in REPLIES)


def test_what_is_beyond_the_model_s_context_is_told(tiny_folder: Path, tmp_path: Path) -> None:
    """The tiny model has 512 positions. A bound above them is none where what is learnt is short."""
    long = example(20, "").model_copy(update={"messages": (*asks("the sea " * 400), says("assistant", "tea"))})
    config = SFTConfig(evaluation_share=0, epochs=1, max_prompt_tokens=4096, micro_batch_tokens=5000)
    with pytest.raises(
        FlywheelError, match=r"has \d{3,4} tokens, must be <= 512, .* lower sft.max_prompt_tokens or sft"
    ):
        train(tmp_path, tiny_folder, config, [long, *EXAMPLES])
    assert train(tmp_path, tiny_folder, config).steps == 1


def test_every_example_offered_is_drawn_or_says_why_not(tiny_folder: Path, tmp_path: Path) -> None:
    """12 examples, 3 held out, one too long, one that answers nobody; an erasure finds those held out by their id.

    Replies of those held out are cut too, but were not learnt. Two turns of one example are too long: one example.
    """
    ask, far = says("user", "why?"), says("user", "the sea " * 99)
    talk = (SYSTEM, ask, says("assistant", "so"), far, says("assistant", "no"), far, says("assistant", "hm"))
    rows = [example(i, f"the sea is {i} and cold", source="user") for i in range(12)]
    rows += [rows[0].model_copy(update={"id": "long", "user_id": "u0", "prompt_id": "p", "messages": talk[-2:]}),
             rows[0].model_copy(update={"id": "mixed", "prompt_id": "q", "messages": talk}),
             rows[0].model_copy(update={"id": "none", "prompt_id": "r", "messages": talk[1:3][::-1]})]  # fmt: skip
    config = HELD.model_copy(update={"epochs": 1, "learn": "all", "max_reply_tokens": 4, "evaluation_share": 0.25})
    held = {e.id for e in hold_out(rows, 0.25, 256, 3).held}
    summary = train(tmp_path, tiny_folder, config, rows)
    (share,) = summary.sources
    dropped = tables.read(tmp_path / "dropped.parquet", Dropped)
    assert (share.offered, share.dropped) == (15, {"held_out": 3, "longer_than_window": 1, "no_reply": 1})
    assert share.drawn == 15 - 5
    assert {row.id for row in dropped if row.reason == "held_out"} == held
    assert [row.id for row in dropped if row.reason == "longer_than_window"] == ["long", "mixed", "mixed"]
    assert (summary.too_long, summary.cut_replies) == (2, 9)


def test_adapters_learn_too(tiny_folder: Path, tmp_path: Path) -> None:
    summary = train(tmp_path, tiny_folder, CONFIG.model_copy(update={"lora_rank": 8, "learning_rate": 2e-2}))
    assert summary.last_loss < summary.first_loss / 2
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    model = NativeModel.load(tmp_path / "model", "sft", max_prompt_tokens=192, threads=1)
    logs = model.complete([EXAMPLES[0].messages[:-1]], sampling=Sampling(temperature=0, max_tokens=8), seeds=[0])
    assert logs[0][0].text


def test_a_loss_that_explodes_stops_the_run(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FlywheelError, match=r"step 1 of 30: loss is .*, at most 0.5 is allowed"):
        train(tmp_path, tiny_folder, CONFIG.model_copy(update={"max_loss": 0.5}))
    assert not (tmp_path / "model").exists()


def test_weights_that_are_not_finite_are_told_before_a_step(tiny_folder: Path, tmp_path: Path) -> None:
    broken = AutoModelForCausalLM.from_pretrained(tiny_folder)
    broken.model.norm.weight.data[0] = math.nan
    broken.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    with pytest.raises(FlywheelError, match="step 1 of 6: loss is nan, must be finite; lower the learning rate"):
        train(tmp_path / "run", tmp_path / "broken", SHORT)
