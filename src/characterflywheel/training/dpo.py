"""Direct preference optimisation on a small set: an off-policy, local patch (PAPER section 4)."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from ..config import DPOConfig
from ..errors import FlywheelError
from ..ids import derive_seed
from ..llm.shared_prefix import Path as TokenPath
from ..llm.shared_prefix import reply_logprobs
from ..pipeline import Work
from ..progress import Advance
from ..records import Preference, Record
from . import losses
from .learner import Learner, micro_batches, reference_logprobs, write_metrics


class DPOSummary(Record):
    """What DPO did; accuracy is how often the implicit reward ranks a pair of the last step right, before that step."""

    steps: int
    pairs: int
    trained_tokens: int
    first_loss: float
    last_loss: float
    last_accuracy: float

    def line(self) -> str:
        return (
            f"{self.steps} steps on {self.pairs} pairs, loss {self.first_loss:.3f} to {self.last_loss:.3f}, "
            f"{self.last_accuracy:.0%} of the last step's pairs ranked right"
        )


def train_dpo(
    work: Work, config: DPOConfig, parent: Path, preferences: Sequence[Preference], *, threads: int,
    device: str = "cpu", on_progress: Advance = lambda done, total: None,
) -> DPOSummary:  # fmt: skip
    """Train on the pairs that reviewers agreed on most, `config.pairs` of them; held-out pairs are never used.

    The reference log-probabilities are computed once, before the first step; a pair's prompt runs once for both
    replies. Writes `model/` and `metrics.jsonl`.
    """
    usable = [p for p in preferences if not p.held_out]
    pairs = choose_pairs(usable, config.pairs, work.seed)
    if not pairs:
        raise FlywheelError(f"none of {len(preferences)} preference pairs is for training: annotate more prompts.")
    batches = [pairs[i : i + config.pairs_per_step] for i in range(0, len(pairs), config.pairs_per_step)]
    # The reference is the parent even when a checkpoint resumes, so it is computed before the learner is.
    reference_file = work.partial / "reference.pt"
    if not reference_file.exists():
        fresh = _learner(config, parent, len(batches), threads, device, None)
        sums = reference_logprobs(fresh, [_paths(fresh, pair) for pair in pairs])
        writing = reference_file.with_suffix(".writing")
        torch.save(torch.stack(sums), writing)
        writing.replace(reference_file)
        del fresh
    reference = torch.load(reference_file, weights_only=True)
    place = {pair.id: row for pair, row in zip(pairs, reference, strict=True)}
    learner = _learner(config, parent, len(batches), threads, device, work.partial)
    for step in learner.remaining_steps():
        batch = batches[step]
        loss_sum = right = tokens = 0.0
        for group in micro_batches([(pair, _paths(learner, pair)) for pair in batch]):
            paths = [path for _, both in group for path in both]
            with learner.autocast():
                logprobs = reply_logprobs(learner.model, paths, device=device)
            sums_now = losses.per_reply(logprobs.logprobs, logprobs.path, len(paths)).view(-1, 2)
            before = torch.stack([place[pair.id] for pair, _ in group])
            out = losses.dpo(sums_now[:, 0], sums_now[:, 1], before[:, 0], before[:, 1], config.beta)
            (out.loss * len(group) / len(batch)).backward()  # type: ignore[no-untyped-call]
            loss_sum += out.loss.item() * len(group)
            right += out.accuracy.item() * len(group)
            tokens += len(logprobs.path)
        learner.update(loss=loss_sum / len(batch), accuracy=right / len(batch), tokens=tokens)
        on_progress(step + 1, len(batches))
    learner.save(work.folder / "model")
    write_metrics(work.folder, learner)
    first, last = learner.log[0], learner.log[-1]
    return DPOSummary(
        steps=len(batches), pairs=len(pairs), trained_tokens=int(sum(r["tokens"] for r in learner.log)),
        first_loss=first["loss"], last_loss=last["loss"], 
        last_accuracy=last["accuracy"],
    )  # fmt: skip


def choose_pairs(pairs: Sequence[Preference], count: int, seed: int) -> list[Preference]:
    """The clearest pairs, no ties; each prompt's first before any prompt's second, seeded among equals."""
    ordered = sorted((p for p in pairs if p.label > 0.5), key=lambda p: (-p.label, derive_seed(seed, p.id)))
    taken = Counter[str]()
    rounds = []
    for pair in ordered:
        rounds.append(taken[pair.prompt_id])
        taken[pair.prompt_id] += 1
    order = sorted(range(len(ordered)), key=lambda i: (rounds[i], i))
    return [ordered[i] for i in order[:count]]


def _learner(config: DPOConfig, parent: Path, steps: int, threads: int, device: str, partial: Path | None) -> Learner:
    return Learner(
        parent, learning_rate=config.learning_rate, steps=steps, max_prompt_tokens=config.max_prompt_tokens,
        threads=threads, device=device, train_layers=config.train_layers, partial=partial,
    )  # fmt: skip


def _paths(learner: Learner, pair: Preference) -> list[TokenPath]:
    prompt = learner.format.prompt(pair.prompt)
    return [(*prompt, learner.format.reply(side[-1].content)) for side in (pair.chosen, pair.rejected)]
