"""Whether training fits, before anything is loaded: memory, batches and time by arithmetic (PAPER section 4).

Bytes of weights, gradients and AdamW follow from parameter counts and how they are split (float32 masters, products in
bfloat16); activations from `footprint`, measured on narrow models with the code that trains. A micro-batch is taken to
be full of the longest examples that config allows, so that the plan is an upper bound. Time is arithmetic over a stated
share of the processor's peak, no measurement.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

from ..config import FlywheelConfig
from ..records import Record
from .footprint import Example, Footprint, measure
from .shape import Shape

GIB = 2**30
SPARE = {"gpu": 0.1, "cpu": 0.45}
"""Share of the memory that is left: CUDA's context, communication buffers, the allocator's gaps. On a CPU the C
library's heap keeps holes: SFT of SmolLM2-135M held 13% to 71% over the plan (benchmarks/training_memory.py)."""
USE = (0.2, 0.45)  # of the peak: the range that full-size training reaches, low for short examples
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}
"""Dense bfloat16 operations a second, from the vendors' data sheets."""

StageName = Literal["sft", "dpo", "rl"]


class Machine(NamedTuple):
    """What the processes run on: bytes of memory and peak operations a second of each process, whether it is a GPU,
    how many share a machine, and bytes a second between machines for each."""

    memory: float
    peak: float
    gpu: bool
    local: int = 8
    network: float = 50e9

    @property
    def spare(self) -> float:
        """Share of the memory that no plan takes."""
        return SPARE["gpu" if self.gpu else "cpu"]


class Setting(NamedTuple):
    """What of config decides memory and time of one stage."""

    stage: StageName
    example: Example
    examples_per_step: int
    steps: int
    micro_batch_tokens: int
    train_layers: int | None
    lora_rank: int | None
    processes: int
    sharding: Literal["none", "full", "node"]
    checkpointing: bool
    sampled: tuple[int, int] | None = None
    copies: int = 0
    rested: int = 0
    reference: bool = False
    judges: float = 0.0
    """Of RL. `sampled`: prompts and replies that are decoded at once in this process; `copies`: of the weights in the
    precision of products, all the time; `rested`: of those that are let go while something is learnt; `reference`: the
    start's weights, in float32, split as the learner's are; `judges`: parameters of the reward models."""


class MemoryPlan(Record):
    """Bytes of one process.

    `gathered`: weights as products take them. `copies`: of the weights, a reference's and those of a sampler that
    keeps them. `judges`: the reward models. `decoding`: those of one that lets them go, and keys, values and logits of
    replies being drawn, when nothing is being learnt.
    """

    weights: float
    optimiser: float
    gathered: float
    gradients: float
    activations: float
    copies: float
    judges: float
    decoding: float

    @property
    def total(self) -> float:
        """At the worst moment."""
        learning = self.gathered + self.gradients + self.activations
        return self.weights + self.optimiser + self.copies + self.judges + max(learning, self.decoding)


class StagePlan(Record):
    """One training stage: what it learns, how a step is cut, what it holds, how long it may take."""

    stage: StageName
    parameters: int
    trained_parameters: int
    longest_example: int
    examples_per_step: int
    micro_batch_examples: int
    micro_batches: int
    tokens_per_step: int
    steps: int
    memory: MemoryPlan
    memory_limit: float
    fits: bool
    remedy: str | None
    operations_per_step: float
    sent_per_step: float
    seconds: tuple[float, float]


def plan_stages(config: FlywheelConfig, shape: Shape, machine: Machine) -> list[StagePlan]:
    """SFT, DPO and RL under this configuration."""
    return [plan(shape, setting, machine) for setting in settings_of(config, shape)]


def settings_of(config: FlywheelConfig, shape: Shape) -> Iterator[Setting]:
    """Three stages. SFT has the examples that rejection sampling may accept; rewrites add to them."""
    parallel, sft, dpo, rl = config.parallel, config.sft, config.dpo, config.rl
    shared = (parallel.processes, parallel.sharding, parallel.gradient_checkpointing)
    accepted = config.rejection_sampling.prompts * config.rejection_sampling.accept_per_prompt
    yield Setting(
        "sft", Example(sft.max_prompt_tokens, sft.max_reply_tokens, 1), sft.examples_per_step,
        math.ceil(accepted * sft.epochs / sft.examples_per_step), sft.micro_batch_tokens, sft.train_layers,
        sft.lora_rank, *shared,
    )  # fmt: skip
    yield Setting(
        "dpo", Example(dpo.max_prompt_tokens, dpo.max_reply_tokens, 2), dpo.pairs_per_step,
        math.ceil(dpo.pairs / dpo.pairs_per_step), dpo.micro_batch_tokens, dpo.train_layers, dpo.lora_rank, *shared,
    )  # fmt: skip
    here = rl.sampler.kind not in ("endpoint", "vllm")
    rests = rl.sampler.kind in ("native", "transformers")  # see `rl.samplers.InMemory`
    slots = max(1, config.models.batch_replies // rl.group)
    yield Setting(
        "rl", Example(rl.max_prompt_tokens, rl.max_tokens, rl.group), rl.prompts_per_step, rl.steps,
        rl.micro_batch_tokens, rl.train_layers, rl.lora_rank, *shared, sampled=(slots, rl.group) if here else None,
        copies=int(here and not rests), rested=int(rests), reference=rl.anchored and rl.lora_rank is None,
        judges=_judges(config, shape),
    )  # fmt: skip


def _judges(config: FlywheelConfig, shape: Shape) -> float:
    """Parameters of the pointwise, the pairwise and perhaps the gold model, where no server has them. A backbone of
    their own is not counted: it is a small one, or why have it."""
    reward = config.reward
    if reward.server is not None or reward.backbone is not None:
        return 0.0
    each = min(reward.layers, shape.layers) * shape.layer + shape.embedding
    return float(each * (3 if reward.gold_share else 2))


def plan(shape: Shape, setting: Setting, machine: Machine) -> StagePlan:
    """One stage; if it does not fit, `remedy` says what would."""
    found = measure(shape, setting.example, lora_rank=setting.lora_rank, gpu=machine.gpu)
    memory, limit = _memory(shape, setting, machine, found), machine.memory * (1 - machine.spare)
    examples, rows = _together(setting), setting.example.rows
    rounds = math.ceil(setting.examples_per_step / examples / setting.processes)
    work = _operations(shape, setting) * setting.examples_per_step
    sent = _sent(shape, setting, rounds)
    seconds = [work / (machine.peak * share * setting.processes) for share in USE]
    return StagePlan(
        stage=setting.stage, parameters=shape.parameters,
        trained_parameters=shape.trained(setting.train_layers, setting.lora_rank), longest_example=rows,
        examples_per_step=setting.examples_per_step, micro_batch_examples=examples, micro_batches=rounds,
        tokens_per_step=setting.examples_per_step * rows, steps=setting.steps, memory=memory, memory_limit=limit,
        fits=memory.total <= limit,
        remedy=None if memory.total <= limit else _remedy(shape, setting, machine, limit),
        operations_per_step=work, sent_per_step=sent,
        seconds=(setting.steps * seconds[1], setting.steps * (seconds[0] + sent / machine.network)),
    )  # fmt: skip


def _together(setting: Setting) -> int:
    """Examples of a micro-batch: at least one, however long, and no more than a process has."""
    fitting = max(1, setting.micro_batch_tokens // setting.example.rows)
    return min(fitting, math.ceil(setting.examples_per_step / setting.processes))


def _shards(setting: Setting, machine: Machine) -> int:
    return {"none": 1, "full": setting.processes, "node": min(setting.processes, machine.local)}[setting.sharding]


def _memory(shape: Shape, setting: Setting, machine: Machine, found: Footprint) -> MemoryPlan:
    """Bytes of one process in the second micro-batch of the second step, when gradients and moments are there."""
    shards, trained = _shards(setting, machine), shape.trained(setting.train_layers, setting.lora_rank)
    low = 2 if machine.gpu or _low_precision() else 4
    head_learns = setting.lora_rank is None and setting.train_layers is None
    adapters = 0 if setting.lora_rank is None else trained
    largest = shape.embedding if head_learns else 0 if adapters else shape.width * shape.feed_forward
    if setting.sharding == "none" or setting.processes == 1:
        gathered = low * (shape.multiplied + shape.embedding) if low < 4 else 0.0
        arriving = (low + (4 if low < 4 else 0)) * largest
    else:  # a layer at work and the next one on its way; what the head has is gathered until its pass is over
        gathered = low * (2 * shape.layer + shape.embedding)
        arriving = (low + 4) * max(shape.layer if not adapters else 0, shape.embedding if head_learns else 0)
    examples, layers = _together(setting), min(setting.train_layers or shape.layers, shape.layers)
    inputs = 4.0 * setting.example.rows * shape.width
    if setting.checkpointing:
        activations = layers * inputs + max(found.head, found.kept + found.passing)
    else:
        activations = layers * found.kept + max(found.head, found.passing)
    return MemoryPlan(
        weights=4 * (shape.parameters + adapters) / shards, gathered=gathered,
        gradients=4 * trained / shards + arriving, optimiser=8 * trained / shards,
        activations=examples * activations,
        copies=float(low * shape.parameters * setting.copies + 4 * shape.parameters * setting.reference / shards),
        judges=(4.0 if machine.gpu else low) * setting.judges,
        decoding=_decoding(shape, setting, low) + low * shape.parameters * setting.rested,
    )  # fmt: skip


def _decoding(shape: Shape, setting: Setting, low: int) -> float:
    """Keys and values of prompts and replies that are decoded at once, and the replies' logits in float32."""
    if setting.sampled is None:
        return 0.0
    slots, group = setting.sampled
    tokens = slots * (setting.example.prompt + group * setting.example.reply)
    cache = 2.0 * low * tokens * shape.layers * shape.kv_heads * shape.head
    return cache + 4.0 * slots * group * shape.vocabulary


def _operations(shape: Shape, setting: Setting) -> float:
    """Multiplications and additions for one example (Kaplan 2020: 2 a parameter and token forward, twice that back)."""
    prompt, reply, replies = setting.example
    pairs = prompt**2 / 2 + replies * reply * (prompt + reply / 2)
    layers = 2.0 * shape.multiplied * setting.example.rows + 4 * shape.layers * shape.heads * shape.head * pairs
    head = 2.0 * shape.embedding * reply * replies
    back = (1.0 if setting.lora_rank else 2.0) * min(setting.train_layers or shape.layers, shape.layers) / shape.layers
    return layers * (1 + back + (1 if setting.checkpointing else 0)) + head * (1 + back)


def _sent(shape: Shape, setting: Setting, rounds: int) -> float:
    """Bytes that a process receives and sends in a step: weights twice and gradients for every micro-batch, or once."""
    trained = shape.trained(setting.train_layers, setting.lora_rank)
    if setting.processes == 1:
        return 0.0
    if setting.sharding == "none":
        return 2.0 * 4 * trained
    return rounds * (2.0 * 2 * shape.parameters + 4 * trained)


def _remedy(shape: Shape, setting: Setting, machine: Machine, limit: float) -> str:
    """What fits, by the mildest change first; changes add up."""
    said: list[str] = []
    for words, change in _changes(setting):
        if change == setting:
            continue
        setting = change
        said = [*(s for s in said if s.split(" = ", maxsplit=1)[0] != words.split(" = ", maxsplit=1)[0]), words]
        found = measure(shape, setting.example, lora_rank=setting.lora_rank, gpu=machine.gpu)
        if _memory(shape, setting, machine, found).total <= limit:
            return ", ".join(said)
    return "no setting tried fits: a smaller model, shorter examples, or processors with more memory"


def _changes(setting: Setting) -> Iterator[tuple[str, Setting]]:
    now = setting._replace(checkpointing=True)
    yield "parallel.gradient_checkpointing = true", now
    now = now._replace(micro_batch_tokens=min(now.micro_batch_tokens, now.example.rows))
    yield f"{now.stage}.micro_batch_tokens = {now.micro_batch_tokens}", now
    if now.processes > 1:
        now = now._replace(sharding="full")
        yield 'parallel.sharding = "full"', now
    if now.sampled is not None:
        now = now._replace(sampled=None, copies=0, rested=0)
        yield 'rl.sampler.kind = "endpoint"', now
    if now.judges:
        now = now._replace(judges=0.0)
        yield 'reward.server = "http://HOST:8766"', now
    if now.lora_rank is None:
        now = now._replace(lora_rank=16, reference=False)
        yield f"{now.stage}.lora_rank = 16", now
    now = now._replace(sharding="full")
    yield 'parallel.sharding = "full"', now
    for _ in range(8):
        now = now._replace(processes=2 * now.processes)
        yield f"parallel.processes = {now.processes}", now


def _low_precision() -> bool:
    import torch  # noqa: PLC0415

    from ..llm.native import fast_dtype  # noqa: PLC0415

    return fast_dtype() == torch.bfloat16
