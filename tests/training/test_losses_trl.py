"""SFT, DPO and online DPO through the shared prefix against TRL's trainers, really run on the same tokens, to 1e-5."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_oracle import assert_same, load, paths, trainer

from characterflywheel.llm.chat_format import ChatFormat
from characterflywheel.llm.shared_prefix import Path as TokenPath
from characterflywheel.llm.shared_prefix import reply_logprobs
from characterflywheel.training import losses
from characterflywheel.training import policy_gradient as pg
from tiny_model import asks, says, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's own
PATHS = paths()
BETA = 0.3
GENERATION = (  # ChatML that says which tokens are the assistant's own, its end token among them
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
)
REFERENCE = 3  # seed of noise on the weights


def prompt(path: TokenPath) -> list[int]:
    return [token for segment in path[:-1] for token in segment]


# Supervised fine-tuning


def test_sft_equals_trl(tiny_folder: Path, tmp_path: Path) -> None:
    """Replies of 1 to 6 tokens after prompts of 14 and 19: only the replies are learnt."""
    data = [
        {"input_ids": prompt(path) + list(path[-1]), "completion_mask": [0] * len(prompt(path)) + [1] * len(path[-1])}
        for path in PATHS
    ]
    theirs = trainer("SFT", tiny_folder, tmp_path, data, completion_only_loss=True)
    expected = trl_sft(theirs)
    ours = load(tiny_folder)
    assert_same(expected, theirs.model, losses.sft(reply_logprobs(ours, PATHS).logprobs), ours)


def test_sft_on_the_assistants_words_equals_trl(tiny_folder: Path, tmp_path: Path) -> None:
    """From conversations on: our chat format's tokens and loss are TRL's under `assistant_only_loss`."""
    tokenizer = tiny_tokenizer()
    talks = [(*asks("hello"), says("assistant", "Tea.")), (*asks("why?"), says("assistant", "the sea is cold tonight"))]
    form = ChatFormat(tokenizer, 64)
    several = [(*form.prompt(talk[:-1]), form.reply(talk[-1].content)) for talk in talks]
    tokenizer.chat_template = GENERATION
    data = [{"messages": [message.model_dump(include={"role", "content"}) for message in talk]} for talk in talks]
    theirs = trainer(
        "SFT", tiny_folder, tmp_path, data, more={"processing_class": tokenizer}, assistant_only_loss=True
    )  # fmt: skip
    expected = trl_sft(theirs)
    ours = load(tiny_folder)
    assert_same(expected, theirs.model, losses.sft(reply_logprobs(ours, several).logprobs), ours)


def trl_sft(theirs: Any) -> Tensor:
    loss: Tensor = theirs.compute_loss(theirs.model, theirs.data_collator(list(theirs.train_dataset)))
    loss.backward()
    return loss


# Direct preference optimisation: pairs of neighbours, 3 and 1, 6 and 4, 2 and 5, 5 and 2 tokens


@pytest.fixture(scope="module")
def dpo_trainer(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    return trainer(
        "DPO", tiny_folder, tmp_path_factory.mktemp("dpo"), rows,
        more={"ref_model": load(tiny_folder, moved=REFERENCE)}, beta=BETA,
    )  # fmt: skip


def trl_dpo(theirs: Any, weights: dict[str, float], pairs: range, smoothing: float = 0.0) -> Tensor:
    """The sum of TRL's loss types, over these pairs; gradients are added."""
    theirs.loss_types, theirs.loss_weights = list(weights), list(weights.values())
    theirs.label_smoothing = smoothing
    rows = [
        {"prompt_ids": prompt(PATHS[2 * i]), "chosen_ids": list(PATHS[2 * i][-1]),
         "rejected_ids": list(PATHS[2 * i + 1][-1])}
        for i in pairs
    ]  # fmt: skip
    loss: Tensor = theirs.compute_loss(theirs.model, theirs.data_collator(rows))
    (loss * len(pairs) / 4).backward()
    return loss.detach() * len(pairs) / 4


def sums(model: Any, chosen: list[TokenPath] = PATHS) -> Tensor:
    """Summed log-probabilities of every path, in pairs of neighbours."""
    tokens = reply_logprobs(model, chosen)
    return losses.per_reply(tokens.logprobs, tokens.path, len(chosen)).view(-1, 2)


def our_dpo(model: Any, folder: Path, **keywords: Any) -> losses.DPO:
    now = sums(model)
    with torch.no_grad():
        reference = sums(load(folder, moved=REFERENCE))
    return losses.dpo(*now.unbind(1), *reference.unbind(1), BETA, **keywords)


LENGTHS = torch.tensor([len(path[-1]) for path in PATHS]).view(-1, 2)


@pytest.mark.parametrize(
    ("types", "ours"),
    [
        ({"sigmoid": 1.0}, {}),
        ({"sigmoid_norm": 1.0}, {"normalise": True}),
        ({"sigmoid": 1.0, "sft": 0.2}, {"sft_weight": 0.2}),
        ({"sigmoid_norm": 1.0, "sft": 1.0}, {"normalise": True, "sft_weight": 1.0}),
    ],
)
def test_dpo_equals_trl(dpo_trainer: Any, tiny_folder: Path, types: dict[str, float], ours: dict[str, Any]) -> None:
    dpo_trainer.model.zero_grad()
    dpo_trainer._metrics["train"].clear()
    expected = trl_dpo(dpo_trainer, types, range(4))
    model = load(tiny_folder)
    out = our_dpo(model, tiny_folder, lengths=LENGTHS, **ours)
    assert_same(expected, dpo_trainer.model, out.loss, model)
    watched = dpo_trainer._metrics["train"]
    assert out.margin.item() == pytest.approx(watched["rewards/margins"][0], abs=1e-5)
    assert out.accuracy.item() == pytest.approx(watched["rewards/accuracies"][0])
    assert out.chosen.item() == pytest.approx(watched["rewards/chosen"][0], abs=1e-5)
    assert out.rejected.item() == pytest.approx(watched["rewards/rejected"][0], abs=1e-5)


@pytest.mark.parametrize("smoothing", [(0.1, 0.1, 0.1, 0.1), (0.0, 1 / 3, 0.25, 0.5)])
def test_label_smoothing_equals_trl(dpo_trainer: Any, tiny_folder: Path, smoothing: tuple[float, ...]) -> None:
    """TRL 1.16 smooths no "sigmoid", but "aot", which is the same for a batch of one pair: so pair by pair."""
    dpo_trainer.model.zero_grad()
    parts = [trl_dpo(dpo_trainer, {"aot": 1.0}, range(i, i + 1), value) for i, value in enumerate(smoothing)]
    model = load(tiny_folder)
    out = our_dpo(model, tiny_folder, smoothing=torch.tensor(smoothing))
    assert_same(torch.stack(parts).sum(), dpo_trainer.model, out.loss, model)


# Online DPO: two prompts with two replies each, the better one first and second


@pytest.mark.parametrize("rewards", [((0.3, 0.9), (1.0, 0.2)), ((0.5, -0.5), (0.7, 0.9))])
def test_online_dpo_equals_trl(tiny_folder: Path, tmp_path: Path, rewards: tuple[tuple[float, float], ...]) -> None:
    """Choice and loss of TRL's `OnlineDPOTrainer.training_step`, with only its `_generate` replaced."""
    chosen = [PATHS[0], PATHS[2], PATHS[4], PATHS[5]]
    theirs = trainer(
        "OnlineDPO", tiny_folder, tmp_path, [{"prompt": "a"}] * 8, beta=BETA,
        more={
            "ref_model": load(tiny_folder, moved=REFERENCE),
            "reward_funcs": lambda **_: [row[i] for i in range(2) for row in rewards],
        },
    )  # fmt: skip
    theirs._generate = lambda *_: (*rows(chosen[::2] + chosen[1::2]), None)
    theirs.current_gradient_accumulation_steps = 1
    expected = theirs.training_step(theirs.model, {"prompt": ["a", "b"]})

    model = load(tiny_folder)
    picked = [
        chosen[2 * i + place] for i, pair in enumerate(pg.best_against_worst(torch.tensor(rewards))) if pair
        for place in pair
    ]  # fmt: skip
    now = sums(model, picked)
    with torch.no_grad():
        reference = sums(load(tiny_folder, moved=REFERENCE), picked)
    out = losses.dpo(*now.unbind(1), *reference.unbind(1), BETA)
    assert_same(expected, theirs.model, out.loss, model)
    assert out.margin.item() == pytest.approx(theirs.stats["rewards/margins"][0], abs=1e-5)


def rows(several: list[TokenPath]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompts padded on the left, replies on the right, with their masks, as TRL's sampler gives them."""
    from trl.trainer.utils import pad  # noqa: PLC0415

    prompts = [torch.tensor(prompt(path)) for path in several]
    replies = [torch.tensor(path[-1]) for path in several]
    return (
        pad(prompts, padding_side="left"), pad([torch.ones_like(ids) for ids in prompts], padding_side="left"),
        pad(replies), pad([torch.ones_like(ids) for ids in replies]),
    )  # fmt: skip
