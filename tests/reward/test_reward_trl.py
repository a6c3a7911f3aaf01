"""Loss and gradients of our whole network path against TRL's `RewardTrainer`, really run on the same token ids."""

import contextlib
import io
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from reward_fixture import asks, tiny_policy
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import RewardConfig as TRLConfig
from trl import RewardTrainer

from characterflywheel.config import RewardConfig
from characterflywheel.llm.shared_prefix import Path as TokenPath
from characterflywheel.reward.fit import Objective
from characterflywheel.reward.losses import centring
from characterflywheel.reward.pointwise import Pointwise

REPLIES = (
    ("I like tea. Do you?", "Tea."),
    ("The rain again, and no coat; what would you do?", "I like tea. Do you?"),
    ("Stars!", "A long evening of bread, ships and stars."),
)
STRENGTHS = (1.0, 0.25, 0.5)
PAD = 16  # <empty_output>, a special token that no text has


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Pointwise:
    """A two-layer Llama with a random head, in float32."""
    config = RewardConfig(layers=2, max_prompt_tokens=64, max_reply_tokens=24)
    model = Pointwise.from_folder(tiny_policy(tmp_path_factory.mktemp("policy")), config, threads=1)
    model.net.precision = torch.float32
    torch.nn.init.normal_(model.net.head.weight, std=0.05, generator=torch.Generator().manual_seed(3))
    return model


def token_paths(ours: Pointwise) -> list[TokenPath]:
    """Prompts shared by the replies of a pair, and by two pairs."""
    return [path for i, texts in enumerate(REPLIES) for path in ours.paths(asks(f"What about {i // 2}?"), texts)]


def theirs(ours: Pointwise) -> LlamaForSequenceClassification:
    """The same weights in the classifier that TRL trains."""
    settings = ours.net.model.config.to_dict()
    settings = {name: value for name, value in settings.items() if name not in ("id2label", "label2id")}
    model = LlamaForSequenceClassification(LlamaConfig(**settings | {"pad_token_id": PAD, "num_labels": 1}))
    model.model.load_state_dict(ours.net.model.state_dict())
    model.score.weight.data.copy_(ours.net.head.weight.data)
    model.model.embed_tokens.requires_grad_(False)
    return model


@pytest.mark.filterwarnings("ignore")  # TRL's own
@pytest.mark.parametrize(("margin", "centring_weight"), [(0.0, 0.0), (0.7, 0.01), (2.0, 0.3)])
def test_loss_and_every_gradient_equal_trl(
    ours: Pointwise, tmp_path: Path, margin: float, centring_weight: float
) -> None:
    """TRL: mean of -log s(chosen - rejected - margin) + c (chosen + rejected)², with each pair's own margin.

    By hand with one pair of scores 2 and 1, margin 0.7 x strength 0.5 and c = 0.01: -log s(2 - 1 - 0.35) + 0.01 x 9
    = log(1 + exp(-0.65)) + 0.09 = 0.42006 + 0.09 = 0.51006.
    """
    paths = token_paths(ours)
    flat = [[token for segment in path for token in segment] for path in paths]
    rows = Dataset.from_dict({
        "chosen_ids": flat[::2], "rejected_ids": flat[1::2], "margin": [margin * s for s in STRENGTHS],
    })  # fmt: skip
    tokenizer = ours.form.tokenizer
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(PAD)
    model = theirs(ours)
    arguments = TRLConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        disable_tqdm=True, center_rewards_coefficient=centring_weight or None, per_device_train_batch_size=3,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = RewardTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
        batch = trainer.data_collator([rows[i] for i in range(3)])
        expected = trainer.compute_loss(trainer.model, dict(batch))
    expected.backward()

    ours.net.zero_grad()
    chosen, rejected = ours.raw(paths).view(-1, 2).unbind(1)
    objective = Objective(margin=margin, centring=centring_weight)
    loss = objective.loss(chosen - rejected, [1.0] * 3, STRENGTHS) + objective.centring * centring(chosen, rejected)
    loss.backward()

    assert float(loss) == pytest.approx(float(expected), abs=1e-6)
    reference = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
    mine = {f"model.{name}": p.grad for name, p in ours.net.model.named_parameters() if p.requires_grad}
    mine["score.weight"] = ours.net.head.weight.grad
    assert set(mine) == set(reference)
    for name, gradient in reference.items():
        torch.testing.assert_close(mine[name], gradient, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert max(float(g.abs().max()) for g in reference.values()) > 1e-2


def test_the_hand_worked_example() -> None:
    """See above: 0.51006."""
    chosen, rejected = torch.tensor([2.0]), torch.tensor([1.0])
    objective = Objective(margin=0.7, centring=0.01)
    loss = objective.loss(chosen - rejected, [1.0], [0.5]) + objective.centring * centring(chosen, rejected)
    assert float(loss) == pytest.approx(0.51006, abs=5e-6)
