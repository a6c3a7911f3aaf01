"""The CTranslate2 backend: the same chat model in int8, for CPUs (DESIGN section 6).

A folder's weights are converted once and kept in the cache under a hash of its files; the cache keeps the
`KEPT_MODELS` that were opened last, and those in use. The prompt is run once for all of its replies, a system prompt
once a call. CTranslate2 seeds its random numbers only where a worker thread
starts, so each call opens the converted model anew, which takes a tenth of a second for SmolLM2-135M.

Int8 is a policy of its own: for SmolLM2-135M a token's log-probability is 0.25 nats from float32's on average and the
divergence 0.05 nats a token (718 tokens at temperature 0.8). With `precision="float32"` both are below 1e-5.
"""

import fcntl
import gc
import hashlib
import json
import os
import random
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..errors import FlywheelError
from ..ids import derive_seed
from .base import Sampling
from .chat_format import ChatFormat
from .models import cache_folder
from .shared_prefix import Segment
from .token_sampler import Drawn, TokenSampler, one_seed_each

LOGIT_BYTES = 2**28
"""Room for the logits of one batch; they are kept until its last token, (rows, max_tokens, vocabulary) float32."""
KEPT_MODELS = 8
"""Converted models in the cache: those of two generations, each with its parent, SFT, DPO and RL model."""

Precision = Literal["int8", "float32"]

_SEEDING = threading.Lock()  # the seed is one for the whole process


class CTranslate2Model(TokenSampler):
    """A chat model on CTranslate2 in int8 (`ChatModel` Protocol). It takes memory only during a call.

    The same call gives the same replies. Conversations of one call draw from one stream of random numbers, so the
    replies of a conversation also depend on those it is asked with; log-probabilities are those of the rounded weights.
    """

    kept: "Kept | None" = None  # its place in the cache

    def __init__(
        self, folder: Path, tokenizer: Any, name: str, *, max_prompt_tokens: int, threads: int, batch_replies: int = 64,
        precision: Precision = "int8", ends: frozenset[int] = frozenset(),
    ) -> None:  # fmt: skip
        """`folder` holds a model converted at this precision, see `convert`; `ends` are its further end tokens."""
        self.folder, self.name, self.threads, self.batch_replies = folder, name, threads, batch_replies
        self.precision, self.ends = precision, ends | {tokenizer.eos_token_id}
        self.format = ChatFormat(tokenizer, max_prompt_tokens)

    @classmethod
    def load(
        cls, folder: Path, name: str, *, device: str = "cpu", precision: Precision = "int8", **settings: int
    ) -> "CTranslate2Model":
        from transformers import AutoTokenizer  # noqa: PLC0415

        if device != "cpu":
            raise FlywheelError(f'backend "ctranslate2" runs on "cpu", not {device!r}: set models.backend to "native".')
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ends, kept = end_tokens(folder), converted(folder, precision)
        model = cls(kept.folder, tokenizer, name, precision=precision, ends=ends, **settings)
        model.kept = kept
        return model

    def sample(
        self,
        prompts: Sequence[tuple[Segment, Segment]],
        *,
        n: int,
        sampling: Sampling,
        seeds: Sequence[int],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Drawn]]:
        """Token ids and log-probabilities of `n` replies to each tokenised prompt."""
        one_seed_each(prompts, seeds)
        results: list[list[Drawn]] = [[] for _ in prompts]
        if not prompts:
            return results
        with _SEEDING:
            _package().set_random_seed(derive_seed("ctranslate2", *seeds) % (2**32 - 1))
            generator = _package().Generator(str(self.folder), compute_type=self.precision, intra_threads=self.threads)
            finished = 0
            for batch in self._batches(prompts, n, sampling):
                drawn = self._generate(generator, [prompts[i] for i in batch], n, sampling)
                for index, replies in zip(batch, drawn, strict=True):
                    # They come sorted by score; whoever takes the first of n must not take the likeliest.
                    results[index] = random.Random(seeds[index]).sample(replies, n)
                finished += len(batch)
                if on_progress:
                    on_progress(finished, len(prompts))
        return results

    def _batches(self, prompts: Sequence[tuple[Segment, Segment]], n: int, sampling: Sampling) -> list[list[int]]:
        """Prompts with one system prompt and similar lengths together: a batch waits for its longest prompt."""
        logits = 4 * len(self.format.tokenizer) * sampling.max_tokens
        size = max(1, min(self.batch_replies, LOGIT_BYTES // logits) // n)
        order = sorted(range(len(prompts)), key=lambda i: (prompts[i][0], len(prompts[i][1]), i))
        groups = [list(group) for _, group in groupby(order, key=lambda i: prompts[i][0])]
        return [group[at : at + size] for group in groups for at in range(0, len(group), size)]

    def _generate(
        self, generator: Any, prompts: Sequence[tuple[Segment, Segment]], n: int, sampling: Sampling
    ) -> list[list[Drawn]]:
        tokens, greedy = self.format.tokenizer.convert_ids_to_tokens, sampling.temperature == 0
        results = generator.generate_batch(
            [tokens(rest) for _, rest in prompts],
            static_prompt=tokens(prompts[0][0]) or None,
            include_prompt_in_result=False,
            return_end_token=True,
            end_token=sorted(self.ends),
            max_length=sampling.max_tokens,
            num_hypotheses=1 if greedy else n,
            sampling_topk=1 if greedy else 0,
            sampling_topp=sampling.top_p,
            sampling_temperature=sampling.temperature,
            return_logits_vocab=not greedy,
        )
        if greedy:
            return [[(list(r.sequences_ids[0]), [0.0] * len(r.sequences_ids[0]))] * n for r in results]
        return [
            [
                (list(ids), _logprobs(ids, logits, sampling.temperature))
                for ids, logits in zip(result.sequences_ids, result.logits, strict=True)
            ]
            for result in results
        ]


def _logprobs(ids: Sequence[int], logits: Sequence[Any], temperature: float) -> list[float]:
    """Of each token at the sampling temperature. `logits` may begin with those of prompt tokens."""
    table = torch.from_numpy(np.stack([np.asarray(row) for row in logits[-len(ids) :]])) / temperature
    chosen = table.gather(1, torch.tensor(ids).unsqueeze(1)).squeeze(1)
    return list((chosen - table.logsumexp(1)).tolist())


class Kept:
    """A converted model in the cache. While this lives, no process removes its `folder`."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder = folder
        weakref.finalize(self, os.close, lock)


def converted(folder: Path, precision: Precision = "int8") -> Kept:
    """The CTranslate2 form of a Hugging Face folder, made when these weights are first seen."""
    package = _package()
    digest = hashlib.sha256(f"{package.__version__} {precision}".encode())
    for file in sorted(f for f in folder.iterdir() if f.suffix in {".json", ".safetensors"}):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    target = cache_folder() / f"ct2-{digest.hexdigest()[:16]}"
    kept = _take(target)
    if kept is None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent, wait=True):  # nobody else converts or removes meanwhile
            while (kept := _take(target)) is None:
                convert(folder, target, precision)
            _drop_unused(target.parent)
    return kept


def _take(target: Path) -> Kept | None:
    """Use what is there, if it is; it counts as the newest."""
    try:
        lock = os.open(target, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with suppress(OSError):  # file systems without locks, where nothing is removed, or that are read-only
        fcntl.flock(lock, fcntl.LOCK_SH)
        os.utime(target)
    try:
        if (target / "model.bin").exists() and os.path.samestat(os.fstat(lock), target.stat()):
            return Kept(target, lock)
    except FileNotFoundError:  # removed while the lock was waited for
        pass
    os.close(lock)
    return None


def _drop_unused(cache: Path) -> None:
    """Remove all but the newest `KEPT_MODELS`, and of the others none that is in use."""
    found = sorted(cache.glob("ct2-" + 16 * "[0-9a-f]"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for old in found[KEPT_MODELS:]:
        with suppress(OSError), _locked(old, wait=False):
            removed = Path(tempfile.mkdtemp(dir=cache))
            old.replace(removed / old.name)  # gone at once
            shutil.rmtree(removed, ignore_errors=True)


@contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[None]:
    """Hold a folder for oneself. Raises OSError where it would have to wait and is not to."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError) if wait else nullcontext():
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(lock)


def convert(folder: Path, target: Path, precision: Precision, model: Any | None = None) -> None:
    """Write the CTranslate2 form of a folder's model, or of `model` with its configuration and tokenizer, to `target`.

    `target` appears complete or not at all, in place of what was there. `model` is taken apart by this and its weights
    are overwritten, so give one that nobody needs any more.
    """
    from transformers.utils import logging  # noqa: PLC0415

    base: Any = _package().converters.TransformersConverter

    class Converter(base):  # type: ignore[misc]
        def load_model(self, model_class: Any, name: str, **settings: Any) -> Any:
            return super().load_model(model_class, name, **settings) if model is None else model

    target.parent.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    gc.freeze()  # it collects garbage after each layer, which takes longer than the rest, the more so the more there is
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            made = Path(temporary, "model")
            Converter(str(folder)).convert(str(made), quantization=precision)
            settings = json.loads((made / "config.json").read_text(encoding="utf-8"))
            # a tokenizer without a first token is written as null, which the loader refuses; prompts never use it
            settings["bos_token"] = settings["bos_token"] or settings["eos_token"]
            (made / "config.json").write_text(json.dumps(settings), encoding="utf-8")
            shutil.rmtree(target, ignore_errors=True)
            made.replace(target)
    finally:
        gc.unfreeze()


def end_tokens(folder: Path) -> frozenset[int]:
    """What the folder's configurations name; some models, such as Llama 3, have several."""
    files = [f for f in (folder / "config.json", folder / "generation_config.json") if f.exists()]
    named = [json.loads(f.read_text(encoding="utf-8")).get("eos_token_id") for f in files]
    return frozenset(i for ids in named if ids is not None for i in (ids if isinstance(ids, list) else [ids]))


def _package() -> Any:
    try:
        import ctranslate2  # noqa: PLC0415
    except ImportError:
        raise FlywheelError(
            'backend "ctranslate2" needs its package: pip install "characterflywheel[ctranslate2]", or choose "native".'
        ) from None
    return ctranslate2
