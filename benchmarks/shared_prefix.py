"""Loss and gradient of several replies to one prompt (DESIGN section 6): shared prefix against the padded batch.

    python benchmarks/shared_prefix.py [--device cuda] [--json FILE]

Every contender returns the mean negative log-likelihood of the same reply tokens. The peer is transformers on the
padded batch, twice: with `labels`, which makes logits for the prompt's tokens too, and with `logits_to_keep`, which
makes them only where a reply is predicted and is the stronger one. bfloat16 is autocast over float32 weights, as in
training. The speedup is the ratio of median seconds for forward, backward and nothing else.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import bench
import record
from characterflywheel.llm.shared_prefix import reply_logprobs

SHARED, PADDED, LEAN = "shared prefix", "padded batch", "padded batch, reply logits only"


def losses(model: Any, args: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """The same loss three ways, on random tokens: (replies, prompt + reply) ids as one batch, or as paths."""
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, model.config.vocab_size, (args.prompt_tokens,), generator=draw)
    replies = torch.randint(3, model.config.vocab_size, (args.replies, args.reply_tokens), generator=draw)
    paths = [(tuple(prompt.tolist()), tuple(reply)) for reply in replies.tolist()]
    ids = torch.cat([prompt.expand(args.replies, -1), replies], dim=1).to(args.device)
    labels = ids.clone()
    labels[:, : args.prompt_tokens] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    targets = replies.flatten().to(args.device)

    def lean() -> Tensor:
        logits = model(**batch, logits_to_keep=args.reply_tokens + 1).logits[:, :-1]
        return cross_entropy(logits.float().flatten(0, 1), targets)

    return {
        SHARED: lambda: -reply_logprobs(model, paths, device=args.device).logprobs.mean(),
        PADDED: lambda: model(**batch, labels=labels).loss,
        LEAN: lean,
    }


def step(model: Any, loss: Callable[[], Tensor], dtype: torch.dtype, device: str, _: int = 0) -> float:
    """Forward and backward; the gradient stays in the parameters."""
    model.zero_grad(set_to_none=True)
    with torch.autocast(device.split(":", maxsplit=1)[0], dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        value = loss()
    value.backward()
    return float(value.detach())


def gradients(model: Any) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def measure(model: Any, dtype: torch.dtype, args: argparse.Namespace) -> dict[str, object]:
    """One row of the table: differences to the padded batch, seconds, speedups."""
    contenders = losses(model, args)
    found, norms = {}, []
    for name in (SHARED, PADDED):
        found[name] = step(model, contenders[name], dtype, args.device)
        norms.append(gradients(model))
    apart = [a - b for a, b in zip(*norms, strict=True)]
    of = [float(b.norm()) for b in norms[1]]
    relative = float(torch.stack([d.norm() for d in apart]).norm()) / float(torch.tensor(of).norm())
    worst = max(float(d.norm()) / n for d, n in zip(apart, of, strict=True) if n)
    del norms, apart
    run = {name: partial(step, model, loss, dtype, args.device) for name, loss in contenders.items()}
    spent = bench.seconds(run, args.repeats, args.device)
    middle = {name: record.median(values) for name, values in spent.items()}
    return {
        "dtype": str(dtype).removeprefix("torch."), "loss": found[PADDED],
        "loss_difference": abs(found[SHARED] - found[PADDED]), "gradient_difference": relative,
        "gradient_difference_worst_parameter": worst, "seconds": middle, "seconds_all": spent,
        "speedup": middle[PADDED] / middle[SHARED], "speedup_reply_logits_only": middle[LEAN] / middle[SHARED],
    }  # fmt: skip


def main() -> None:
    parser = bench.arguments(__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--replies", type=int, default=8)
    parser.add_argument("--reply-tokens", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    about = record.circumstances(args, bench.VERSIONS, args.device)
    model = bench.model(args.model, args.device)
    rows: list[Any] = [measure(model, dtype, args) for dtype in (torch.float32, torch.bfloat16)]
    print(f"{args.replies} replies of {args.reply_tokens} tokens after a prompt of {args.prompt_tokens}")
    record.show(
        about, ("dtype", "loss diff", "grad diff", "s shared", "s padded", "s lean", "speedup", "vs lean"),
        [(r["dtype"], r["loss_difference"], r["gradient_difference"], *r["seconds"].values(), r["speedup"],
          r["speedup_reply_logits_only"]) for r in rows],
    )  # fmt: skip
    keys = ("speedup", "speedup_reply_logits_only", "loss_difference", "gradient_difference")
    record.write(args.json, about | {"rows": rows} | {key: rows[0][key] for key in keys})


if __name__ == "__main__":
    main()
