"""How far each sampler of RL is from the learner, what importance correction costs, and what a push takes.

    python benchmarks/samplers.py [--json FILE]

Every local sampler draws --replies replies to each bundled character at RL's temperature, after the learner's weights
were pushed to it; the learner is the base model with every weight off by a thousandth, so that a push has something to
bring. Each token's log-probability by the sampler is held against that of the learner in float32 (the truth about its
weights) and as RL runs it (bfloat16 products where the processor has them): the mean absolute difference, Schulman's k3
estimate of KL(sampler || learner), and from RL's truncated weights their mean and the effective share of the samples.
Intervals are Student's, a prompt's tokens counted as dependent. Samplers take turns, so draws and pushes are timed in
the same state of the machine. vLLM and a server are not here: they need a GPU, or a machine of their own.
"""

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer

import bench
import record
from characterflywheel import intervals
from characterflywheel.characters import bundled_characters, system_prompt
from characterflywheel.config import RLConfig, SamplerConfig
from characterflywheel.llm import Sampling
from characterflywheel.llm.native import fast_dtype
from characterflywheel.llm.shared_prefix import reply_logprobs
from characterflywheel.records import ChatMessage, Estimate
from characterflywheel.training import policy_gradient
from characterflywheel.training.rl.samplers import RolloutSampler, open_sampler

SAYS = (
    "Hi! Who are you?", "What did you do today?", "I had a long day. Cheer me up a little.", "Tell me a short story.",
    "What do you like best?", "Can you keep a secret?",
)  # fmt: skip
KINDS = {
    "native bfloat16": {"kind": "native", "precision": "bfloat16"},
    "native float32": {"kind": "native", "precision": "float32"},
    "transformers float32": {"kind": "transformers", "precision": "float32"},
    "transformers bfloat16": {"kind": "transformers", "precision": "bfloat16"},
    "ctranslate2 int8": {"kind": "ctranslate2", "precision": "int8"},
    "ctranslate2 float32": {"kind": "ctranslate2", "precision": "float32"},
}


class Difference(NamedTuple):
    """A sampler against one way of running the learner; means and k3 over tokens, intervals over prompts."""

    absolute: Estimate
    kl: Estimate
    weight_mean: float
    effective_share: float


def over_prompts(values: Sequence[Tensor]) -> Estimate:
    """The mean over tokens; those of one prompt are counted as dependent."""
    groups = [i for i, mine in enumerate(values) for _ in mine]
    return intervals.mean(torch.cat(list(values)).numpy(), groups)


def difference(sampler: Sequence[Tensor], learner: Sequence[Tensor], truncate: float) -> Difference:
    """Log-probabilities of the same tokens, one tensor a prompt."""
    apart = [b.double() - a.double() for a, b in zip(sampler, learner, strict=True)]
    owner = torch.zeros(sum(map(len, apart)), dtype=torch.long)
    health = policy_gradient.importance(torch.cat(list(learner)), torch.cat(list(sampler)), owner, 1, truncate=truncate)
    return Difference(
        over_prompts([d.abs() for d in apart]), over_prompts([torch.expm1(d) - d for d in apart]), health.health.mean,
        health.health.effective_share,
    )  # fmt: skip


def learner_logprobs(
    model: Any, prompts: Sequence[Any], drawn: Sequence[Any], temperature: float, mixed: bool
) -> list[Tensor]:
    """The learner's own log-probabilities of each prompt's replies, (tokens,), as RL computes them if `mixed`."""
    found = []
    precise = torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext()
    for prompt, replies in zip(prompts, drawn, strict=True):
        with torch.inference_mode(), precise:
            paths = [(*prompt, tuple(ids)) for ids, _ in replies]
            found.append(reply_logprobs(model, paths, temperature=temperature).logprobs.float())
    return found


def disturbed(model: Any) -> Any:
    """Every weight times 1 + N(0, 0.001)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-3 * torch.randn(parameter.shape, generator=generator))
    return model


def main() -> None:
    parser = bench.arguments(__doc__)
    parser.add_argument("--replies", type=int, default=8)
    parser.add_argument("--reply-tokens", type=int, default=32, help="at most")
    parser.add_argument("--temperature", type=float, default=RLConfig().temperature)
    parser.add_argument("--only", nargs="*", choices=tuple(KINDS), help="these samplers")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    about = record.circumstances(args, bench.VERSIONS)
    installed = importlib.util.find_spec("ctranslate2") is not None
    kinds = {
        name: settings for name, settings in KINDS.items()
        if (not args.only or name in args.only) and (installed or settings["kind"] != "ctranslate2")
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(args, kinds, Path(scratch))
    header = ("sampler", "|difference|", "KL", "share", "share as RL", "push s", "draw s", "tokens")
    record.show(about, header, [_row(name, one) for name, one in figures["samplers"].items()])
    missing = None if installed else "the optional package ctranslate2 is not installed"
    record.write(args.json, about | figures | {"ctranslate2_missing": missing})


def measure(args: argparse.Namespace, kinds: dict[str, dict[str, str]], scratch: Path) -> dict[str, Any]:
    """Push and draw with every sampler in turns, then hold its first draw against the learner."""
    folder = bench.folder(args.model, scratch / "model")
    learner = disturbed(bench.model(args.model))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    samplers: dict[str, RolloutSampler] = {}
    for name, settings in kinds.items():
        config = RLConfig(
            sampler=SamplerConfig.model_validate(settings), max_tokens=args.reply_tokens, max_prompt_tokens=512
        )
        samplers[name] = open_sampler(
            config, folder, tokenizer, scratch=scratch / name.replace(" ", "-"), threads=args.threads, batch_replies=64
        )
    form = next(iter(samplers.values())).format
    prompts = [
        form.prompt([ChatMessage(role="system", content=system_prompt(one)), ChatMessage(role="user", content=said)])
        for one, said in zip(bundled_characters().values(), SAYS * 2, strict=True)
    ]
    sampling = Sampling(temperature=args.temperature, max_tokens=args.reply_tokens)
    drawn: dict[str, Any] = {}
    pushes: dict[str, list[float]] = {name: [] for name in samplers}
    draws: dict[str, list[float]] = {name: [] for name in samplers}
    for repeat in range(args.repeats):
        for name, sampler in samplers.items():
            began = time.perf_counter()
            sampler.push(learner)
            pushed = time.perf_counter()
            seeds = [1000 * repeat + i for i in range(len(prompts))]
            mine = sampler.sample(prompts, n=args.replies, sampling=sampling, seeds=seeds)
            pushes[name].append(pushed - began)
            draws[name].append(time.perf_counter() - pushed)
            drawn.setdefault(name, mine)
            told = f"push {pushes[name][-1]:.1f} s, draw {draws[name][-1]:.1f} s"
            print(f"round {repeat + 1} of {args.repeats}, {name}: {told}", file=sys.stderr, flush=True)
    found = {}
    for name, sampler in samplers.items():
        sampler.close()
        told = [torch.tensor(list(chain.from_iterable(logs for _, logs in several))) for several in drawn[name]]
        exact = learner_logprobs(learner, prompts, drawn[name], args.temperature, mixed=False)
        found[name] = {
            "tokens": sum(map(len, told)), "push_seconds": statistics.median(pushes[name]),
            "draw_seconds": statistics.median(draws[name]), "push_seconds_all": pushes[name],
            "draw_seconds_all": draws[name],
            "float32": difference(told, exact, RLConfig().truncate_ratio)._asdict(), "as_rl": None,
        }  # fmt: skip
        if fast_dtype() == torch.bfloat16:
            own = learner_logprobs(learner, prompts, drawn[name], args.temperature, mixed=True)
            found[name]["as_rl"] = difference(told, own, RLConfig().truncate_ratio)._asdict()
    lengths = [len(head) + len(rest) for head, rest in prompts]
    return {"prompts": len(prompts), "prompt_tokens": statistics.fmean(lengths), "samplers": found}


def _row(name: str, one: dict[str, Any]) -> tuple[object, ...]:
    exact, rl = one["float32"], one["as_rl"]
    return (
        name, _said(exact["absolute"]), _said(exact["kl"]), exact["effective_share"],
        rl["effective_share"] if rl else None, one["push_seconds"], one["draw_seconds"], one["tokens"],
    )  # fmt: skip


def _said(one: Estimate) -> str:
    return f"{one.value:.2g} [{one.low:.2g}, {one.high:.2g}]"


if __name__ == "__main__":
    main()
