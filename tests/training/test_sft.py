import json
from pathlib import Path

import pytest
from training_fixture import Killed, dies_at, example, same_weights

from characterflywheel.config import SFTConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.llm.base import Sampling
from characterflywheel.llm.native import NativeModel
from characterflywheel.pipeline import Work
from characterflywheel.records import Example
from characterflywheel.training import learner
from characterflywheel.training.sft import TrainingSummary, train_sft
from tiny_model import tiny_tokenizer

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
