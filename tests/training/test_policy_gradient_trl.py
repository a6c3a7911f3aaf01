"""GRPO through the shared prefix against TRL's `GRPOTrainer`, really run on the same tokens, to 1e-5 in float32.

TRL makes its own advantages, importance ratios, reference and old log-probabilities from given replies, rewards and
sampler's log-probabilities (its `_generate` and `_calculate_rewards` are the only things replaced); then both models
take the same step away, and the two losses and all their gradients are compared.
"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from trl_oracle import assert_same, load, move, paths, trainer

from characterflywheel.llm.shared_prefix import reply_logprobs
from characterflywheel.training import policy_gradient as pg

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's own
PATHS = paths()
SIZES = [len(path[-1]) for path in PATHS]
REWARDS = torch.tensor([[0.3, -1.2, 0.9, 0.4], [2.0, 1.5, -0.5, 1.5]])
TEMPERATURE = 0.8
LONGEST = 8
REFERENCE, STEP = 3, 6  # seeds of noise on the weights: the reference, and the step since `before`
AGGREGATIONS: dict[str, pg.Aggregation] = {
    "bnpo": "token", "dapo": "token", "grpo": "sequence", "dr_grpo": "constant",
}  # fmt: skip


class Start(NamedTuple):
    """Log-probabilities of all reply tokens at the start of the step: the learner's, the engine's, the reference's.

    The engine is rather far off: ratios from about 0.3 to 3.
    """

    before: Tensor
    sampler: Tensor
    reference: Tensor


@pytest.fixture(scope="module")
def start(tiny_folder: Path) -> Start:
    with torch.no_grad():
        before, reference = (
            reply_logprobs(load(tiny_folder, moved), PATHS, temperature=TEMPERATURE).logprobs
            for moved in (None, REFERENCE)
        )
    noise = torch.randn(len(before), generator=torch.Generator().manual_seed(1))
    return Start(before, before + 0.5 * noise, reference)


@pytest.fixture(scope="module")
def grpo_trainer(tiny_folder: Path, start: Start, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = trainer(
        "GRPO", tiny_folder, tmp_path_factory.mktemp("grpo"), [{"prompt": "a"}] * 8, more={"reward_funcs": len},
        beta=0.1, num_generations=4, temperature=TEMPERATURE, steps_per_generation=1, max_completion_length=LONGEST,
    )  # fmt: skip
    move(out.ref_model, REFERENCE, 0.02)
    prompts = [[token for segment in path[:-1] for token in segment] for path in PATHS]
    drawn = [part.tolist() for part in start.sampler.split(SIZES)]
    replies = [list(path[-1]) for path in PATHS]
    out._generate = lambda _: (prompts, replies, None, ["x"] * 8, drawn, {}, None, [])
    out._calculate_rewards = lambda *_: REWARDS.view(-1, 1)
    out.current_gradient_accumulation_steps = 1
    out.use_vllm = out.vllm_importance_sampling_correction = True
    return out


@pytest.fixture
def theirs(grpo_trainer: Any, tiny_folder: Path) -> Iterator[Any]:
    """The trainer at its start, with TRL's defaults, but truncation at 1.5."""
    settings = vars(grpo_trainer).copy()
    grpo_trainer.model.load_state_dict(load(tiny_folder).state_dict())
    grpo_trainer.vllm_importance_sampling_mode, grpo_trainer.vllm_importance_sampling_clip_max = "token_truncate", 1.5
    grpo_trainer.model.zero_grad()
    yield grpo_trainer
    vars(grpo_trainer).update(settings)
    grpo_trainer.args.delta, grpo_trainer.args.use_bias_correction_kl = None, True


def loss_of(theirs: Any) -> Tensor:
    """TRL's loss and gradients, a step after its rollouts."""
    inputs = theirs._generate_and_score_completions([{"prompt": "a"}] * 8)
    move(theirs.model, STEP, 0.02)
    loss: Tensor = theirs.compute_loss(theirs.model, inputs)
    loss.backward()
    return loss


def compare(
    theirs: Any, start: Start, folder: Path, *, importance: dict[str, Any], scale: pg.Scale = "group",
    kl_weight: float = 0.1, **more: Any,
) -> tuple[pg.Health, pg.GRPO]:  # fmt: skip
    expected = loss_of(theirs)
    model = load(folder, moved=STEP)
    now = reply_logprobs(model, PATHS, temperature=TEMPERATURE)
    weights, health = pg.importance(start.before, start.sampler, now.path, len(PATHS), **importance)
    aggregation = AGGREGATIONS[theirs.loss_type]
    out = pg.grpo(
        now.logprobs, start.before, weights, pg.advantages(REWARDS, scale=scale).flatten(), now.path,
        clip_low=theirs.epsilon_low, clip_high=theirs.epsilon_high, aggregation=aggregation,
        total=pg.denominator(SIZES, aggregation, LONGEST), reference=start.reference if kl_weight else None,
        kl_weight=kl_weight, **more,
    )  # fmt: skip
    assert_same(expected, theirs.model, out.loss, model)
    return health, out


MODES: dict[str, tuple[float | None, float, dict[str, Any]]] = {
    "token_truncate": (None, 1.5, {"truncate": 1.5}),
    "token_mask": (0.6, 1.5, {"truncate": None, "token_low": 0.6, "token_high": 1.5}),
    "sequence_truncate": (None, 1.5, {"level": "sequence", "truncate": 1.5}),
    "sequence_mask": (
        0.4, 1.8, {"level": "sequence", "truncate": None, "sequence_low": 0.4, "sequence_high": 1.8},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("loss_type", "mode"), list(product(AGGREGATIONS, MODES)))
def test_every_aggregation_and_correction_equals_trl(
    theirs: Any, start: Start, tiny_folder: Path, loss_type: str, mode: str
) -> None:
    """With clip-higher, a KL term and a step since the rollouts that clips on both sides."""
    low, high, ours = MODES[mode]
    theirs.loss_type, theirs.epsilon_high, theirs.vllm_importance_sampling_mode = loss_type, 0.28, mode
    theirs.vllm_importance_sampling_clip_min, theirs.vllm_importance_sampling_clip_max = low, high
    theirs._metrics["train"].clear()
    health, out = compare(theirs, start, tiny_folder, importance=ours)
    watched = theirs._metrics["train"]
    if mode.startswith("token"):
        assert health.mean == pytest.approx(watched["sampling/importance_sampling_ratio/mean"][0], abs=1e-5)
    assert health.maximum == pytest.approx(watched["sampling/importance_sampling_ratio/max"][0], abs=1e-5)
    assert (health.masked > 0) == mode.endswith("mask"), "the bounds must bite for this to test them"
    assert health.masked < sum(SIZES)
    if loss_type != "grpo":
        assert out.clipped_share.item() == pytest.approx(watched["clip_ratio/region_mean"][0], abs=1e-6)
    assert min(watched["clip_ratio/low_mean"][0], watched["clip_ratio/high_mean"][0]) > 0


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_every_scale_of_advantages_equals_trl(theirs: Any, start: Start, tiny_folder: Path, scale: pg.Scale) -> None:
    theirs.scale_rewards = scale
    inputs = theirs._generate_and_score_completions([{"prompt": "a"}] * 8)
    ours = pg.advantages(REWARDS, scale=scale)
    torch.testing.assert_close(ours.flatten(), inputs["advantages"], atol=1e-6, rtol=0)
    compare(theirs, start, tiny_folder, importance={"truncate": 1.5}, scale=scale)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("weight", [0.0, 0.05, 1.0])
def test_every_kl_term_equals_trl(theirs: Any, start: Start, tiny_folder: Path, weight: float, unbiased: bool) -> None:
    theirs.beta, theirs.args.use_bias_correction_kl, theirs.loss_type = weight, unbiased, "bnpo"
    theirs._metrics["train"].clear()
    _, out = compare(
        theirs, start, tiny_folder, importance={"truncate": 1.5}, kl_weight=weight, kl_unbiased=unbiased
    )  # fmt: skip
    if weight:
        assert out.kl is not None
        assert out.kl.item() == pytest.approx(theirs._metrics["train"]["kl"][0], abs=1e-5)
    else:
        assert out.kl is None


def test_two_sided_clipping_equals_trl(theirs: Any, start: Start, tiny_folder: Path) -> None:
    theirs.args.delta = 1.3
    _, out = compare(theirs, start, tiny_folder, importance={"truncate": 1.5}, ratio_max=1.3)
    theirs.args.delta = None
    theirs.model.load_state_dict(load(tiny_folder).state_dict())
    assert abs(loss_of(theirs).item() - out.loss.item()) > 1e-3, "the bound must bite for this to test it"


def test_without_correction_equals_trl(theirs: Any, tiny_folder: Path) -> None:
    """A sampler that is the learner: weights 1, so TRL with its correction switched off."""
    theirs.use_vllm = False
    theirs.beta, theirs.loss_type = 0.0, "dapo"
    inputs = theirs._generate_and_score_completions([{"prompt": "a"}] * 8)
    expected = theirs.compute_loss(theirs.model, inputs)
    expected.backward()
    model = load(tiny_folder)
    now = reply_logprobs(model, PATHS, temperature=TEMPERATURE)
    old = now.logprobs.detach()
    weights, health = pg.importance(old, old, now.path, len(PATHS))
    advantage = pg.advantages(REWARDS).flatten()
    out = pg.grpo(
        now.logprobs, old, weights, advantage, now.path, clip_low=0.2, clip_high=0.28, total=sum(SIZES)
    )  # fmt: skip
    assert (health.mean, health.maximum, health.effective_share, health.masked) == (1.0, 1.0, 1.0, 0)
    assert_same(expected, theirs.model, out.loss, model)
