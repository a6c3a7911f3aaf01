"""Several processes take the step of one: exact shares, sums, and sharded weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import together
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from transformers import AutoModelForCausalLM

from characterflywheel.errors import FlywheelError
from characterflywheel.llm.as_forward import checkpoint_layers
from characterflywheel.llm.shared_prefix import Path as TokenPath
from characterflywheel.llm.shared_prefix import reply_logprobs
from characterflywheel.training import adapters, sharding
from characterflywheel.training.parallel import Parallel
from tiny_model import tiny_llama

PATHS: list[TokenPath] = [
    ((5, 6, 7), (8, 9), (10, 11, 12)), ((5, 6, 7), (8, 9), (13,)), ((20, 21), (22, 23), (26, 27)),
    ((1, 4), (5, 6), (7, 8, 9)),
]  # fmt: skip
BATCHES = [PATHS[:1], PATHS[1:3], PATHS[3:]]  # three micro-batches, so that two processes have unequal shares


@given(st.integers(0, 40), st.integers(1, 9))
def test_every_item_is_one_process_s_in_order(count: int, world: int) -> None:
    shares = [Parallel(rank, world).share(range(count)) for rank in range(world)]
    assert [item for share in shares for item in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.integers(1, 40), st.integers(1, 9))
def test_turns_are_equally_many_and_each_batch_counts_once(count: int, world: int) -> None:
    turns = [list(Parallel(rank, world).turns(range(count))) for rank in range(world)]
    assert len(set(map(len, turns))) == 1
    assert sorted(turn.batch for own in turns for turn in own if turn.counts) == list(range(count))
    for number, at_once in enumerate(zip(*turns, strict=True)):
        counted = [turn.batch for turn in at_once if turn.counts]
        assert counted == list(range(number * world, min(count, (number + 1) * world))), "alike in size run together"


def test_alone_nothing_is_sent() -> None:
    alone = Parallel.alone()
    assert (alone.main, alone.sharded, alone.sum(2.5), alone.gather([1]), alone.agree(True)) == (
        True, False, 2.5, [1], True,
    )  # fmt: skip
    alone.barrier()
    alone.reduce_gradients([])


def test_a_worker_that_nothing_started_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(FlywheelError, match=r"RANK.* not set: workers are started by"):
        Parallel.join()


def _talk(parallel: Parallel) -> tuple[float, list[int], bool, bool]:
    return (
        parallel.sum(0.1 * (parallel.rank + 1)), parallel.gather([10 * parallel.rank] * (parallel.rank + 1)),
        parallel.agree(parallel.rank == 0), parallel.agree(parallel.rank == 1),
    )  # fmt: skip


def test_processes_sum_gather_and_agree() -> None:
    assert together(_talk, world=3) == [(pytest.approx(0.6), [0, 10, 10, 20, 20, 20], True, False)] * 3


def _train(
    parallel: Parallel, folder: Path, out: Path, *, rank: int | None = None, layers: int | None = None,
    checkpointed: bool = False, stop: int | None = None,
) -> list[float]:  # fmt: skip
    """Three steps on `BATCHES`; the model is left in `out`. With `stop`, shards are saved there and read again."""

    def prepare(model: Any) -> None:
        if rank is not None:
            adapters.attach(model, rank)
        if layers is not None:
            for parameter in [*model.model.embed_tokens.parameters(), *model.model.layers[:-layers].parameters()]:
                parameter.requires_grad_(False)
        if checkpointed:
            checkpoint_layers(model)

    def begin() -> tuple[Any, torch.optim.Optimizer]:
        if parallel.sharded:
            model = sharding.load_sharded(folder, parallel, "cpu", prepare)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            prepare(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        return model, torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, fused=True)

    model, optimiser = begin()
    norms = []
    for step in range(3):
        if step == stop:
            sharding.save_shards(model, optimiser, out / "shards")
            model, optimiser = begin()
            sharding.load_shards(model, optimiser, out / "shards")
        for turn in parallel.turns(BATCHES):
            (-reply_logprobs(model, turn.batch).logprobs.sum() / 9 * turn.counts).backward()
        parallel.reduce_gradients(p for p in model.parameters() if p.requires_grad)
        norms.append(sharding.clip_gradients((p for p in model.parameters() if p.requires_grad), 1.0))
        optimiser.step()
        optimiser.zero_grad()
    out.mkdir(exist_ok=True, parents=True)
    sharding.save_whole(sharding.whole_weights(model), model, out, parallel.main, file_bytes=20_000)
    parallel.barrier()
    return norms


HOW: dict[str, dict[str, Any]] = {
    "all weights": {}, "adapters": {"rank": 4}, "last layer, checkpointed": {"layers": 1, "checkpointed": True},
}  # fmt: skip


def _train_all(parallel: Parallel, root: Path) -> dict[str, list[float]]:
    """Gradient norms by parent and way; models in `root/PARENT WAY`."""
    sharding.fast_dtype = lambda device="cpu": torch.float32
    return {
        f"{parent} {name}": _train(parallel, root.parent / parent, root / f"{parent} {name}", **how)
        for parent in ("tied", "untied")
        for name, how in HOW.items()
    }


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _furthest(one: Path, many: Path) -> float:
    a, b = _weights(one), _weights(many)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two parents, and what one process makes of them in `one/`."""
    folder = tmp_path_factory.mktemp("parallel")
    for name in ("tied", "untied"):
        tiny_llama(tie_word_embeddings=name == "tied").save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, list[float]]:
    dtype, norms = sharding.fast_dtype, _train_all(Parallel.alone(), root / "one")
    sharding.fast_dtype = dtype
    return norms


@pytest.mark.parametrize("kind", ["none", "full"])
def test_two_processes_take_the_steps_of_one(kind: Any, root: Path, alone: dict[str, list[float]]) -> None:
    """With whole and with split weights, whatever is trained; the model's files are read back by transformers."""
    both = together(_train_all, root / kind, sharding=kind)
    assert both[0] == both[1]
    for name, norms in alone.items():
        assert both[0][name] == pytest.approx(norms, rel=1e-5)
        assert _furthest(root / kind / name, root / name.split(" ", maxsplit=1)[0]) > 1e-4, "something was learnt"
        assert _furthest(root / kind / name, root / "one" / name) < 1e-5, name
    model = AutoModelForCausalLM.from_pretrained(root / kind / "untied adapters")
    assert sum(p.numel() for p in model.parameters()) == tiny_llama(tie_word_embeddings=False).num_parameters()


def test_a_copy_a_machine(root: Path, alone: dict[str, list[float]]) -> None:
    """Four processes on two machines: split over each machine's two, copied between machines."""
    answers = together(_train_one, root, world=4, local=2, sharding="node")
    assert answers[0] == pytest.approx(alone["tied all weights"], rel=1e-5)
    assert _furthest(root / "node", root / "one" / "tied all weights") < 1e-5


def _train_one(parallel: Parallel, root: Path) -> list[float]:
    sharding.fast_dtype = lambda device="cpu": torch.float32
    return _train(parallel, root / "tied", root / "node", stop=1)


def test_a_checkpoint_before_the_first_step_changes_no_step() -> None:
    """torch would make AdamW's moments by a step of zero gradients, and count it: the next was a quarter smaller."""
    updates: list[torch.Tensor] = []
    for asked in (False, True):
        weight = torch.nn.Parameter(torch.ones(3))
        optimiser = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0, fused=True)
        if asked:
            sharding._begin(optimiser)
            assert float(optimiser.state[weight]["step"]) == 0
            get_optimizer_state_dict(torch.nn.ParameterDict({"weight": weight}), optimiser)
        for gradient in (1.0, -3.0):
            weight.grad = torch.full((3,), gradient)
            optimiser.step()
        updates.append(weight.detach().clone())
    assert torch.equal(*updates)
