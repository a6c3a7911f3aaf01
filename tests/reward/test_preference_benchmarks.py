"""The benchmarks of real people's preferences, of several reviews and of the world: splits, votes, heads, intervals."""

import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from reward_fixture import pair as a_pair
from transformers import AutoTokenizer, LlamaForCausalLM

from characterflywheel.config import RewardConfig
from characterflywheel.llm.chat_format import ChatFormat
from characterflywheel.llm.shared_prefix import reply_logprobs
from characterflywheel.records import Candidate, ChatMessage, Estimate, Prompt
from tiny_model import asks, tiny_folder

__all__ = ["tiny_folder"]

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(scope="module")
def scripts() -> Iterator[Namespace]:
    """The benchmarks as modules; they find one another as they do when run as scripts."""
    sys.path.insert(0, BENCHMARKS)
    try:
        import frozen  # noqa: PLC0415
        import judges  # noqa: PLC0415
        import multi_review  # noqa: PLC0415
        import preferences_real  # noqa: PLC0415
        import record  # noqa: PLC0415
        import reward_world  # noqa: PLC0415
        import satisfaction  # noqa: PLC0415
        import signals_real  # noqa: PLC0415
        import world  # noqa: PLC0415

        yield Namespace(
            frozen=frozen, several=multi_review, people=preferences_real, satisfaction=satisfaction, record=record,
            world=reward_world, world_of=world.World, judges=judges, signals=signals_real,
        )  # fmt: skip
    finally:
        sys.path.remove(BENCHMARKS)


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def write_people(folder: Path) -> None:
    """Twelve harmless pairs of six prompts and three that cannot be used; ten instruction pairs of five prompts."""

    def harmless(i: int, context: str, chosen: list[dict[str, str]], rejected: str) -> dict[str, Any]:
        texts = [said("user", context)], chosen, [said("assistant", rejected)]
        return {"id": f"h{i}"} | dict(zip(("context", "chosen", "rejected"), map(json.dumps, texts), strict=True))

    rows = [harmless(i, f"ask {i % 6}", [said("assistant", "no thanks")], "yes " * (i + 1)) for i in range(12)]
    rows.append(harmless(12, "ask 1", [said("assistant", " ")], "yes"))
    rows.append(harmless(13, "ask 1", [said("assistant", "the same ")], "the  same"))
    rows.append(harmless(14, "ask 1", [said("assistant", "a"), said("user", "b"), said("assistant", "c")], "d"))
    parquet.write_table(pa.Table.from_pylist(rows), folder / "pref_hh_harmless.parquet")
    graded = [
        {"id": f"l{i}", "subset": "odd" if i % 2 else "even", "prompt": f"do {i % 5}", "label": "ab"[i % 2],
         "response_a": "first of them", "response_b": "second one of them"} for i in range(10)
    ]  # fmt: skip
    parquet.write_table(pa.Table.from_pylist(graded), folder / "pref_llmbar.parquet")


def test_pairs_of_people_are_read_and_counted(scripts: Namespace, tmp_path: Path) -> None:
    write_people(tmp_path)
    harmless, graded = (scripts.people.load(tmp_path, name) for name in ("hh", "llmbar"))
    assert len(harmless.pairs) == 12
    assert harmless.skipped == {"empty reply": 1, "equal replies": 1, "several turns differ": 1}
    assert [pair.chosen[-1].content for pair in graded.pairs[:2]] == ["first of them", "second one of them"]
    side = scripts.people.halves(harmless.pairs, seed=3)
    for prompt in {pair.prompt_id for pair in harmless.pairs}:
        assert len({s for s, pair in zip(side, harmless.pairs, strict=True) if pair.prompt_id == prompt}) == 1
    assert sorted(set(side)) == [0, 1]
    margins = np.array([1.0, -1.0, 0.0] * 4)
    every = scripts.people.judged(harmless, margins, np.ones(12, dtype=bool))["accuracy"]
    assert every["all"].value == pytest.approx(0.5)
    assert every["all"].n == 12
    assert sum(every[kind].n for kind in ("similar", "chosen longer", "chosen shorter")) == 12


def test_frozen_reads_agree_with_the_model(
    scripts: Namespace, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-likelihood and last state, against `reply_logprobs` and the model's own hidden states, all in float32."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    form = ChatFormat(AutoTokenizer.from_pretrained(tiny_folder), 200)
    tiny_model = LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    prompt = (ChatMessage(role="user", content="the sea is cold"),)
    reads = scripts.frozen.read(tiny_model, form, [prompt, prompt], [("tea", "bread and tea"), ("stars",)], 5)
    assert scripts.frozen.depths(30) == (3, 6, 9, 12, 15, 18, 21, 24, 27, 30)
    assert reads.last.shape == (3, len(scripts.frozen.depths(tiny_model.config.num_hidden_layers)), 32)
    path = (*form.prompt(prompt), scripts.frozen.cut(form.reply("bread and tea"), 5))
    with torch.inference_mode():
        expected = reply_logprobs(tiny_model, [path]).logprobs
        states = tiny_model(torch.tensor([sum(path, ())]), output_hidden_states=True).hidden_states
    tolerance = 1e-4
    assert reads.total[1] == pytest.approx(float(expected.sum()), abs=tolerance)
    assert reads.logprob[1] == pytest.approx(float(expected.mean()), abs=tolerance)
    assert np.allclose(reads.last[1, 0], states[1][0, -1], atol=tolerance)
    assert np.allclose(reads.mean[1, -1], states[-1][0, -len(path[-1]) :].mean(0), atol=tolerance)


def reads_with_signal(scripts: Namespace, n: int, seed: int) -> tuple[Any, np.ndarray[Any, Any]]:
    """Reads whose second depth, averaged over the reply, holds a reply's worth along one direction."""
    rng = np.random.default_rng(seed)
    worth = rng.standard_normal(n)
    last, mean = (rng.standard_normal((n, 3, 8)).astype(np.float32) for _ in range(2))
    mean[:, 1, 2] = worth
    return scripts.frozen.Reads(last, mean, worth.astype(np.float32), worth.astype(np.float32)), worth


def test_a_head_finds_the_layer_and_the_direction(scripts: Namespace) -> None:
    reads, worth = reads_with_signal(scripts, 600, 0)
    first, second = np.arange(0, 600, 2), np.arange(1, 600, 2)
    label = (worth[first] > worth[second]).astype(np.float32)
    pairs = scripts.frozen.Pairs(first, second, label, np.arange(300) // 2)
    head = scripts.frozen.fit_head(reads, pairs)
    assert head.choice[:2] == ("mean", 1)
    score = scripts.frozen.scores(reads, head)
    assert np.corrcoef(score, worth)[0, 1] > 0.95
    turned = scripts.frozen.Pairs(second, first, 1 - label, pairs.group)
    assert np.allclose(scripts.frozen.scores(reads, scripts.frozen.fit_head(reads, turned)), score, atol=1e-3)


def reviewed(scripts: Namespace, seed: int, reviewers: int = 7) -> tuple[Any, Any]:
    """A hundred items of three replies each, ranked by noisy reviewers of the reply's worth; two items a unit."""
    reads, worth = reads_with_signal(scripts, 300, seed)
    rng = np.random.default_rng([seed, 1])
    firsts, seconds, votes, items = [], [], [], []
    for item in range(100):
        seen = worth[3 * item : 3 * item + 3] + rng.standard_normal((reviewers, 3))
        for a, b in ((0, 1), (0, 2), (1, 2)):
            firsts.append(3 * item + a)
            seconds.append(3 * item + b)
            votes.append(np.sign(seen[:, a] - seen[:, b]))
            items.append(item)
    item = np.array(items)
    data = scripts.several.Reviewed(
        np.array(firsts), np.array(seconds), np.array(votes, dtype=np.int8), item, item // 2, tuple("x" * 300)
    )
    return data, reads


def test_single_reviews_hide_what_consensus_shows(scripts: Namespace) -> None:
    """The paper's finding holds by construction where reviewers are noisy: a good model gains more on the consensus."""
    several = scripts.several
    data, reads = reviewed(scripts, 2)
    inside = several.training_units(data, 0.5, seed=0)
    assert not set(data.unit[inside]) & set(data.unit[~inside])
    sets = several.tests(data, np.flatnonzero(~inside), several.consensus_of_seven, seed=0)
    assert len(sets.single[0]) == (~inside).sum()
    total = data.votes[sets.consensus[0]].sum(1, dtype=int)
    assert np.all(np.abs(total) >= 5)
    assert np.array_equal(sets.consensus[1], (total > 0).astype(int))
    score = several.head_scores(data, reads, np.flatnonzero(inside), seed=0)
    accuracy, gained = several.compare(data, sets, score, seed=0)
    assert accuracy["likelihood"]["consensus"].value > accuracy["likelihood"]["single"].value  # it is the worth here
    gain = gained["3 reviews"]["random head"]
    for test in ("single", "consensus", "majority"):
        better = accuracy["3 reviews"][test].value - accuracy["random head"][test].value
        assert getattr(gain, test).value == pytest.approx(better)
    assert gain.apart.value == pytest.approx(gain.consensus.value - gain.single.value)
    assert 0 < gain.apart.low < gain.apart.value < gain.apart.high
    assert set(gained["one review"]) == {"random head", "likelihood", "old head", "majority of 3"}


def test_labels_cost_as_many_reviews(scripts: Namespace) -> None:
    data, _ = reviewed(scripts, 3)
    rows = np.arange(len(data.first))
    learned = scripts.several.batches(data, rows, seed=1)
    reviews = {name: len(set(pairs.group)) for name, pairs in learned.items()}
    assert reviews == {"old": 17, "one review": 100, "majority of 3": 33, "3 reviews": 100}
    assert set(np.unique(learned["one review"].label)) == {0.0, 1.0}
    assert set(np.unique(learned["majority of 3"].label)) == {0.0, 1.0}
    assert np.allclose(np.unique(learned["3 reviews"].label), [0, 1 / 3, 2 / 3, 1])


def test_networks_learn_what_heads_learn_and_keep_their_scores(
    scripts: Namespace, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One network a batch of labels, scored once: the second call reads the files, and no seed's scores are another's.

    Time that is over before it begins trains nothing, and says so by leaving the models out.
    """
    data, _ = reviewed(scripts, 4)
    prompts = [
        Prompt(
            id=str(item), conversation_id=str(item), user_id=str(item // 2), source="user", character_id="mo",
            messages=asks(f"What about {item}?"), split="train", cluster=0, turn=1,
            created_at=datetime(2026, 1, 5, tzinfo=UTC),
        )
        for item in range(100)
    ]  # fmt: skip
    candidates = [
        Candidate(id=f"{i}", prompt_id=str(i // 3), policy="base", text=f"tea {i}", finish_reason="stop")
        for i in range(300)
    ]
    source = scripts.world_of(tuple(prompts), tuple(candidates), ())
    small = RewardConfig(backbone=str(tiny_folder), layers=2, epochs=1, max_prompt_tokens=64, max_reply_tokens=24)
    monkeypatch.setattr(scripts.world, "reward_config", lambda args: small)
    args = Namespace(work=tmp_path, epochs=1, train_pairs=1, threads=1, until=0.0)
    rows = np.flatnonzero(np.isin(data.item, range(18)))
    asked = data, source, rows, 0, args
    assert scripts.several.network_scores(*asked, True) == {}
    args.until = float("inf")
    assert scripts.several.network_scores(*asked, False) == {}
    found = scripts.several.network_scores(*asked, True)
    assert set(found) == {f"network, {name}" for name in ("old", "one review", "majority of 3", "3 reviews")}
    assert {len(score) for score in found.values()} == {300}
    assert np.std(found["network, 3 reviews"]) > 0
    monkeypatch.setattr(scripts.judges, "trained", None)  # whoever trains now, fails
    again = scripts.several.network_scores(*asked, False)
    assert all(np.array_equal(again[name], score) for name, score in found.items())
    assert not list(tmp_path.glob("*.weights"))
    assert scripts.several.network_scores(data, source, rows, 1, args, False) == {}


def test_votes_of_raters(scripts: Namespace) -> None:
    """Three raters, two of whom like the second reply better; ties are no votes, and a fourth rater is left out."""
    turns = (("user", "hi"), ("assistant", "a"), ("user", "b"), ("assistant", "c"), ("user", "d"))
    dialog = scripts.satisfaction.Dialog("one", turns, (1, 3), ((3, 2, 3, 5), (4, 4, 3, 1)))
    first, second, votes, _, _, names = scripts.satisfaction.pairs([dialog])
    assert (first.tolist(), second.tolist(), votes.tolist()) == ([0], [1], [[-1, -1, 0]])
    assert names == ("one-1", "one-3")
    assert scripts.several.consensus_of_raters(votes).tolist() == [True]
    assert scripts.several.consensus_of_raters(-votes[:, [0, 2, 2]]).tolist() == [False]
    assert scripts.several.consensus_of_raters(np.array([[1, 1, -1]], dtype=np.int8)).tolist() == [False]


@pytest.mark.slow
def test_preferences_of_people_from_the_command_line(
    scripts: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_people(tmp_path)
    options = ["--model", "tiny", "--layers", "2", "--seeds", "1", "--models", "pointwise", "pairwise"]
    command = ["preferences_real.py", "--work", str(tmp_path / "work"), "--data", str(tmp_path), *options]
    command += ["--json", str(tmp_path / "figures.json")]
    monkeypatch.setattr(sys, "argv", command)
    scripts.people.main()
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    found = figures["hh"]["models"]
    rules = {"longer wins, words", "longer wins, characters", "log-likelihood, per token", "log-likelihood, sum"}
    assert set(found) == rules | {"frozen, linear head", "pointwise", "pairwise"}
    assert found["pairwise"][0]["folds"] == 2
    assert found["pairwise"][0]["accuracy"]["all"]["n"] == 12
    assert set(figures["llmbar"]["models"]["pointwise"][0]["accuracy"]) >= {"even", "odd", "similar"}
    assert "longer wins" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, "--sets", "hh", "--models", "pointwise", "--train-pairs", "4"])
    scripts.people.main()
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert figures["hh"]["models"]["pointwise"][0]["trained"] == [4, 4]


def test_what_an_encoder_read_is_kept(scripts: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run cut short in its second chunk of two texts reads only what was not kept."""

    class Lengths:
        left = 1

        def encode(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            return np.array([[len(text), 1] for text in texts], dtype=np.float32)

    monkeypatch.setattr(scripts.signals, "TEXTS_AT_ONCE", 2)
    texts = ["tea", "rain", "bread", "tea"]
    first, second = Lengths(), Lengths()
    with pytest.raises(KeyboardInterrupt):
        scripts.signals.Remembering(first, tmp_path).encode(texts)
    assert scripts.signals.Remembering(second, tmp_path).encode(texts)[:, 0].tolist() == [3, 4, 5, 3]
    assert scripts.signals.Remembering(second, tmp_path).encode(texts)[:, 0].tolist() == [3, 4, 5, 3]


def test_a_kept_file_answers_only_for_the_settings_that_made_it(
    scripts: Namespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "margins.json"
    scripts.record.made_with(file, epochs=1, where=tmp_path)
    file.write_text("[]")
    scripts.record.made_with(file, epochs=1, where=tmp_path)
    with pytest.raises(SystemExit, match=r"margins.json was made with other settings \(epochs\): remove it"):
        scripts.record.made_with(file, epochs=2, where=tmp_path)
    assert capsys.readouterr().err == ""
    file.with_name("margins.json.settings").unlink()
    scripts.record.made_with(file, epochs=2, where=tmp_path)
    assert "did not note its settings" in capsys.readouterr().err


def test_what_pairs_teach_is_told_by_their_labels_too(scripts: Namespace) -> None:
    """Other reviewers may choose the other reply of a pair, whose id stays the same."""
    one = a_pair(0, "I do. Do you?", "No.")
    others = [
        one.model_copy(update={"chosen": one.rejected, "rejected": one.chosen}),
        one.model_copy(update={"label": 0.75}),
    ]
    assert len({scripts.world.taught([p]) for p in (one, *others)}) == 3
    assert scripts.world.taught([one]) == scripts.world.taught([one.model_copy()])


def test_estimates_are_said_and_written_in_one_way(scripts: Namespace, tmp_path: Path) -> None:
    said, about = scripts.record.said, Estimate(value=0.6, low=0.51, high=0.6889, n=12)
    assert said(about) == "0.600 [0.510, 0.689]"
    assert said(about, 2, n=True) == "0.60 [0.51, 0.69] 12"
    assert said(about.model_dump()) == said(about)
    assert said(Estimate(value=-1.0, n=3)) == "-1.000"
    missing = Estimate(value=None, n=0, reason="no turn seen")
    assert (said(missing), said(missing, why=True)) == ("-", "no turn seen")
    file = tmp_path / "figures.json"
    scripts.record.write(file, {"models": {"head": [about]}})
    assert Estimate(**json.loads(file.read_text())["models"]["head"][0]) == about
    with pytest.raises(TypeError, match="Path is no JSON"):
        scripts.record.write(file, {"where": tmp_path})
