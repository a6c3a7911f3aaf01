"""vLLM in this process, on its own GPUs or a share of ours (DESIGN section 6). vLLM is an extra: it pins its torch.

Prompts are token ids; prefix caching runs a prompt once for all of its replies. Log-probabilities are those at the
sampling temperature (`processed_logprobs`). New weights come from a folder, as vLLM documents it: its workers reload
them in place (`reload_weights`), and what the prefix cache held of the old ones is dropped.

Nothing here was run with a real vLLM where it was written: it is held against a stand-in with vLLM's interface.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import FlywheelError
from .base import Sampling
from .chat_format import ChatFormat
from .shared_prefix import Segment
from .token_sampler import Drawn, TokenSampler, one_seed_each


class VLLMModel(TokenSampler):
    """A chat model on vLLM (`ChatModel` Protocol)."""

    def __init__(self, engine: Any, tokenizer: Any, name: str, *, max_prompt_tokens: int, ends: frozenset[int]) -> None:
        """`engine` is a `vllm.LLM`; `ends` are the model's further end tokens."""
        self.engine, self.name = engine, name
        self.format = ChatFormat(tokenizer, max_prompt_tokens)
        self.ends = ends | {tokenizer.eos_token_id}

    @classmethod
    def load(
        cls, folder: Path, tokenizer: Any, name: str, *, max_prompt_tokens: int, max_tokens: int,
        ends: frozenset[int] = frozenset(), dtype: str = "auto", memory_share: float = 0.4, seed: int = 0,
    ) -> "VLLMModel":  # fmt: skip
        """Start an engine for prompts and replies of at most so many tokens, with so much of the GPU's memory.

        Raises:
            FlywheelError: vLLM is not installed.
        """
        engine = _package().LLM(
            model=str(folder), tokenizer=str(folder), dtype=dtype, max_model_len=max_prompt_tokens + max_tokens,
            gpu_memory_utilization=memory_share, enable_prefix_caching=True, logprobs_mode="processed_logprobs",
            seed=seed,
        )  # fmt: skip
        return cls(engine, tokenizer, name, max_prompt_tokens=max_prompt_tokens, ends=ends)

    def sample(
        self,
        prompts: Sequence[tuple[Segment, Segment]],
        *,
        n: int,
        sampling: Sampling,
        seeds: Sequence[int],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Drawn]]:
        """Token ids and log-probabilities of `n` replies to each tokenised prompt.

        Raises:
            FlywheelError: vLLM gave another number of replies, or one without its log-probabilities.
        """
        one_seed_each(prompts, seeds)
        how = [
            _package().SamplingParams(
                n=n, temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=sampling.max_tokens,
                seed=seed % 2**63, logprobs=0, stop_token_ids=sorted(self.ends), detokenize=False,
            )
            for seed in seeds
        ]  # fmt: skip
        asked = [{"prompt_token_ids": [*head, *rest]} for head, rest in prompts]
        answers = self.engine.generate(asked, how, use_tqdm=False) if asked else []
        results = [[self._reply(one) for one in answer.outputs] for answer in answers]
        if [len(several) for several in results] != [n] * len(prompts):
            raise FlywheelError(f"vLLM gave {[len(several) for several in results]} replies, not {n} to each prompt.")
        if on_progress:
            on_progress(len(prompts), len(prompts))
        return results

    def _reply(self, output: Any) -> Drawn:
        """vLLM tells for each place the log-probabilities of some tokens by id, the drawn one's among them."""
        ids = list(output.token_ids)
        if output.logprobs is None or len(output.logprobs) != len(ids) or not ids:
            raise FlywheelError(f"vLLM gave a reply of {len(ids)} tokens without as many log-probabilities.")
        told = [place[token].logprob for token, place in zip(ids, output.logprobs, strict=True)]
        return ids, [value if math.isnan(value) else min(value, 0.0) for value in told]

    def reload(self, folder: Path) -> None:
        """Take the weights of a folder in the same format as the one that the engine was started with."""
        self.engine.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self.engine.reset_prefix_cache()


def _package() -> Any:
    try:
        return importlib.import_module("vllm")
    except ImportError:
        raise FlywheelError(
            'sampler "vllm" needs its package: install vllm beside this one, run its server and set rl.sampler.kind to '
            '"endpoint", or set it to "native".'
        ) from None
