import json
import math
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from training_fixture import Killed, dies_at, pair, same_weights

from characterflywheel import tables
from characterflywheel.config import DPOConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.pipeline import Work
from characterflywheel.records import Dropped, Preference
from characterflywheel.training import dpo, learner, losses
from characterflywheel.training.dpo import DPOSummary, choose_pairs, train_dpo
from characterflywheel.training.learner import Learner
from characterflywheel.training.paths import of_pairs, open_format
from tiny_model import SYSTEM, says

CONFIG = DPOConfig(pairs=4, pairs_per_step=4, learning_rate=1e-3, beta=0.1)
PAIRS = [
    pair(i, f"I like {word}. Do you?", f"I like {word}.") for i, word in enumerate(("tea", "rain", "sea", "bread"))
]


def train(
    folder: Path, parent: Path, config: DPOConfig = CONFIG, rows: list[Preference] = PAIRS, **more: object
) -> DPOSummary:
    return train_dpo(Work(folder, 3), config, parent, rows, threads=1, **more)  # type: ignore[arg-type]


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def epochs(times: int) -> tuple[DPOConfig, list[Preference]]:
    """DPO makes one pass; for more, the same pairs under other ids."""
    rows = [p.model_copy(update={"id": f"{p.id}-{i}"}) for i in range(times) for p in PAIRS]
    ordered = [r.model_copy(update={"id": f"{n:03}"}) for n, r in enumerate(rows)]
    return CONFIG.model_copy(update={"pairs": len(ordered)}), ordered


def test_the_loss_starts_at_log_two_and_falls(tiny_folder: Path, tmp_path: Path) -> None:
    config, rows = epochs(15)
    summary = train(tmp_path, tiny_folder, config, rows)
    assert (summary.steps, summary.pairs) == (15, 60)
    assert summary.first_loss == pytest.approx(math.log(2), abs=0.01), "the policy is its own reference"
    assert summary.last_loss < 0.4
    assert summary.last_accuracy == 1.0
    assert len(metrics(tmp_path)) == 15


def test_held_out_pairs_are_never_used(tiny_folder: Path, tmp_path: Path) -> None:
    held_out = [p.model_copy(update={"held_out": True}) for p in PAIRS[:2]]
    assert train(tmp_path / "a", tiny_folder, rows=[*held_out, *PAIRS[2:]]).pairs == 2
    train(tmp_path / "b", tiny_folder, rows=PAIRS[2:])
    assert same_weights(tmp_path / "a" / "model", tmp_path / "b" / "model")
    with pytest.raises(FlywheelError, match="none of 2 preference pairs is for training"):
        train(tmp_path / "c", tiny_folder, rows=held_out)


def test_the_pairs_that_reviewers_agreed_on_come_first(tiny_folder: Path, tmp_path: Path) -> None:
    doubtful = [pair(i, "zzz", "the sea", label=0.6) for i in (7, 8)]
    few = CONFIG.model_copy(update={"pairs": 4})
    train(tmp_path / "a", tiny_folder, few, [*doubtful, *PAIRS])
    train(tmp_path / "b", tiny_folder, few, PAIRS)
    assert same_weights(tmp_path / "a" / "model", tmp_path / "b" / "model")


def test_a_killed_run_ends_in_the_same_bytes(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference stays the parent, whatever the checkpoint holds."""
    config, rows = epochs(5)
    whole = train(tmp_path / "whole", tiny_folder, config, rows)
    monkeypatch.setattr(learner, "CHECKPOINT_SECONDS", -1.0)
    with pytest.raises(Killed):
        train(tmp_path / "killed", tiny_folder, config, rows, on_progress=dies_at(4))
    heard: list[int] = []
    resumed = train(tmp_path / "killed", tiny_folder, config, rows, on_progress=lambda done, total: heard.append(done))
    assert heard == [4, 5]
    assert resumed == whole
    assert same_weights(tmp_path / "whole" / "model", tmp_path / "killed" / "model")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")


def test_a_kill_while_the_reference_is_written_costs_only_time(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def dies(value: object, file: BinaryIO) -> None:
        file.write(b"half a ten")
        raise Killed

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(Killed):
        train(tmp_path / "killed", tiny_folder)
    monkeypatch.setattr(torch, "save", save)
    assert train(tmp_path / "killed", tiny_folder) == train(tmp_path / "whole", tiny_folder)


def test_pairs_are_chosen_by_clarity_and_from_every_prompt_before_any_twice() -> None:
    several = [pair(n % 5, f"good {n}", "bad", label=1.0 if n < 20 else 0.75).model_copy(update={"id": f"p{n:02}"})
               for n in range(30)]  # fmt: skip
    chosen = choose_pairs(several, 10, seed=1)
    assert sorted(p.prompt_id for p in chosen[:5]) == [f"prompt-{n:02}" for n in range(5)]
    assert all(p.label == 1.0 for p in chosen)
    assert choose_pairs(several[::-1], 10, seed=1) == chosen
    assert choose_pairs(several, 10, seed=2) != chosen


def test_the_first_margin_is_exactly_zero(tiny_folder: Path, tmp_path: Path) -> None:
    """The reference ran in the same micro-batches as the policy, so bfloat16's rounding is the same."""
    config, rows = epochs(2)
    config = config.model_copy(update={"micro_batch_tokens": 120})
    train(tmp_path, tiny_folder, config, rows)
    first, second = metrics(tmp_path)
    assert (first["margin"], first["chosen"], first["rejected"]) == (0.0, 0.0, 0.0)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert second["margin"] != 0.0


def test_the_reference_is_computed_once_and_goes_on_where_it_was_killed(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, rows = epochs(3)
    heard: list[int] = []
    real = dpo._sums

    def sums(mine: Learner, batch: dpo.Batch) -> torch.Tensor:
        heard.append(len(batch.paths))
        if len(heard) == 3:
            raise Killed
        return real(mine, batch)

    monkeypatch.setattr(dpo, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(dpo, "_sums", sums)
    with pytest.raises(Killed):
        train(tmp_path / "killed", tiny_folder, config, rows)
    resumed = train(tmp_path / "killed", tiny_folder, config, rows)
    assert heard == [4, 4, 4, 4, 0, 0], "two batches before the kill, the third and the (empty) held-out set after it"
    monkeypatch.setattr(dpo, "_sums", real)
    assert train(tmp_path / "whole", tiny_folder, config, rows) == resumed
    assert same_weights(tmp_path / "killed" / "model", tmp_path / "whole" / "model")


def test_held_out_pairs_tell_accuracy_and_margin(tiny_folder: Path, tmp_path: Path) -> None:
    """Held-out pairs differ as the learnt ones do: ending with a question wins. By hand from the saved models."""
    config, rows = epochs(10)
    held = [
        pair(20 + i, f"We saw {w}. Do you?", f"We saw {w}.", held_out=True)
        for i, w in enumerate(("milk", "snow", "salt"))
    ]
    config = config.model_copy(update={"evaluate_every": 4, "evaluation_pairs": 3})
    summary = train(tmp_path, tiny_folder, config, [*rows, *held])
    evaluations = [row for row in metrics(tmp_path) if "evaluation_loss" in row]
    assert [row["step"] for row in evaluations] == [4, 8, 10]
    form = open_format(tiny_folder, config.max_prompt_tokens)
    margins = []
    both = [
        Learner(folder, learning_rate=1, steps=1, max_prompt_tokens=192, threads=1)
        for folder in (tmp_path / "model", tiny_folder)
    ]
    for lesson in of_pairs(form, held, 99).lessons.values():
        now, before = (learner.reply_sums(mine, lesson.paths) for mine in both)
        margins.append(config.beta * float((now[0] - before[0]) - (now[1] - before[1])))
    assert summary.evaluation_margin.value == pytest.approx(sum(margins) / 3, abs=0.02)
    assert summary.evaluation_accuracy.value == sum(m > 0 for m in margins) / 3 == 1.0
    assert summary.evaluation_accuracy.n == 3
    assert evaluations[-1]["evaluation_margin"] == pytest.approx(summary.evaluation_margin.value, abs=1e-5)
    assert summary.line().endswith("ranked right, 100% of 3 held out")


def test_without_held_out_pairs_the_summary_says_why(tiny_folder: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "a", tiny_folder).evaluation_accuracy.reason == "no pair is held out"
    none = CONFIG.model_copy(update={"evaluation_pairs": 0})
    assert train(tmp_path / "b", tiny_folder, none).evaluation_margin.reason == "evaluation_pairs is 0"


VARIANTS = [
    {}, {"label_smoothing": 0.1}, {"soft_labels": True}, {"soft_labels": True, "label_smoothing": 0.2},
    {"sft_weight": 0.5}, {"length_normalised": True}, {"length_normalised": True, "sft_weight": 0.3},
]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_micro_batches_add_up_to_the_loss_of_the_whole_step(variant: dict[str, float], tiny_folder: Path) -> None:
    """For every variant: the loss is `losses.dpo` of all pairs at once, gradients agree to 1e-6 (float32, norm 1)."""
    config = CONFIG.model_copy(update=variant)
    rows = [p.model_copy(update={"label": label}) for p, label in zip(PAIRS, (1.0, 0.75, 0.6, 1.0), strict=True)]
    mine = Learner(tiny_folder, learning_rate=1, steps=1, max_prompt_tokens=192, threads=1)
    mine.autocast = lambda: torch.autocast("cpu", enabled=False)  # type: ignore[method-assign]
    seen = of_pairs(mine.format, rows, 99)
    reference = torch.tensor([[-30.0, -31.0], [-40.0, -35.0], [-20.0, -28.0], [-33.0, -30.0]])
    found = []
    for limit in (10**6, 1):
        batch = dpo._batch(rows, seen, config.model_copy(update={"micro_batch_tokens": limit}))
        assert len(batch.together) == (1 if limit > 1 else 4)
        told = dpo.accumulate(mine, batch, reference, config)
        gradient = torch.cat([p.grad.flatten() for p in mine.parameters])
        found.append((told, gradient / gradient.norm()))
        mine.optimiser.zero_grad()
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert (found[0][1] - found[1][1]).abs().max() < 1e-6
    paths = [path for lesson in seen.lessons.values() for path in lesson.paths]
    sums = learner.reply_sums(mine, paths).view(-1, 2)
    noise = losses.label_noise(
        torch.tensor([r.label for r in rows]) if variant.get("soft_labels") else torch.ones(4), config.label_smoothing
    )
    lengths = torch.tensor([len(path[-1]) for path in paths]).view(-1, 2)
    whole = losses.dpo(
        *sums.unbind(1), *reference.unbind(1), config.beta, smoothing=noise, lengths=lengths,
        normalise=config.length_normalised, sft_weight=config.sft_weight,
    )  # fmt: skip
    assert found[0][0]["loss"] == pytest.approx(whole.loss.item(), rel=1e-5)


def test_adapters_learn_what_pairs_say(tiny_folder: Path, tmp_path: Path) -> None:
    config, rows = epochs(15)
    config = config.model_copy(update={"lora_rank": 8, "learning_rate": 5e-3})
    summary = train(tmp_path, tiny_folder, config, rows)
    assert summary.first_loss == pytest.approx(math.log(2), abs=1e-6), "adapters begin as nothing"
    assert summary.last_loss < 0.5
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_what_does_not_fit_is_dropped_by_name_and_cut_replies_are_counted(tiny_folder: Path, tmp_path: Path) -> None:
    long = pair(9, "tea", "rain").model_copy(update={"prompt": (SYSTEM, says("user", "the sea " * 99))})
    config = CONFIG.model_copy(update={"max_reply_tokens": 4})
    summary = train(tmp_path, tiny_folder, config, [*PAIRS, long])
    assert (summary.too_long, summary.pairs, summary.cut_replies) == (1, 4, 8)
    assert summary.trained_tokens == 4 * 8
    assert [row.id for row in tables.read(tmp_path / "dropped.parquet", Dropped)] == ["pair-09"]


def test_every_pair_is_learnt_measured_or_counted(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [*PAIRS, pair(8, "tea", "rain", label=0.5), pair(9, "tea", "rain", label=0.5, held_out=True)]
    rows += [pair(10 + i, f"tea {i}", "rain", held_out=True) for i in range(3)]
    rows += [pair(20, "tea", "rain").model_copy(update={"prompt": (SYSTEM, says("user", "the sea " * 99))})]
    config = CONFIG.model_copy(update={"pairs": 3, "evaluation_pairs": 1})
    summary = train(tmp_path, tiny_folder, config, rows)
    assert (summary.pairs, summary.evaluated, summary.ties, summary.too_long) == (3, 1, 2, 1)
    assert summary.left_over == len(PAIRS) - 3 + 2


def test_what_is_beyond_the_model_s_context_is_told(tiny_folder: Path, tmp_path: Path) -> None:
    long = pair(9, "tea", "rain").model_copy(update={"prompt": (SYSTEM, says("user", "the sea " * 400))})
    config = CONFIG.model_copy(update={"max_prompt_tokens": 4096, "pairs": 5})
    with pytest.raises(
        FlywheelError, match=r"has \d{3,4} tokens, must be <= 512, .* lower dpo.max_prompt_tokens or dpo"
    ):
        train(tmp_path, tiny_folder, config, [*PAIRS, long])


def test_a_loss_that_explodes_stops_the_run(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FlywheelError, match=r"step 1 of 1: loss is 0.6931, at most 0.5 is allowed"):
        train(tmp_path, tiny_folder, CONFIG.model_copy(update={"max_loss": 0.5}))
