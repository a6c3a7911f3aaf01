"""Replies from a server that gives token ids and log-probabilities: vLLM's, or another with its API (DESIGN section 6).

Prompts go to `/v1/completions` as token ids, so that both sides mean the same tokens; a reply comes back as the ids
that were drawn. A server that is away is asked again with longer and longer pauses until `patience_s` is over, then
it is gone. One that answers something else than what was asked for is an error at once.

    VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER --logprobs-mode processed_logprobs

The variable is for RL, which has to reload weights; a server like that is for a trusted network only.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import BaseModel, Field

from ..errors import FlywheelError
from ..records import ChatMessage, Record
from .base import Sampling
from .chat_format import ChatFormat
from .connection import CONCURRENT, Endpoint
from .shared_prefix import Segment
from .token_sampler import Drawn, TokenSampler, one_seed_each

_ROUNDING = 1e-3  # by how much half precision may put a log-probability above 0
_SAME = 0.05  # and how far it may put two that are the same apart
_TOKEN = re.compile(r"token_id:(\d+)")


class CompletionRequest(Record):
    """What is asked of `/v1/completions`: OpenAI's fields, and vLLM's for tokens.

    What bends the distribution is switched off by name, as a server may take it from the model's generation_config.
    """

    model: str
    prompt: tuple[int, ...]
    n: int
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop_token_ids: tuple[int, ...]
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int = 1
    skip_special_tokens: bool = False
    return_token_ids: bool = True
    return_tokens_as_token_ids: bool = True


class _Logprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]


class _Choice(BaseModel):
    index: int
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    logprobs: _Logprobs


class _Usage(BaseModel):
    prompt_tokens: int


class _Completion(BaseModel):
    """`weight_version` is what a server says of the weights that drew the replies; most say nothing."""

    choices: list[_Choice]
    usage: _Usage | None = None
    weight_version: int | str | None = None


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model] = Field(min_length=1)


class EndpointModel(TokenSampler):
    """A chat model behind an endpoint (`ChatModel` Protocol). Log-probabilities are the server's own.

    `versions` has, for each reply of the last `sample`, the version of the weights that the server says drew it; None
    where it does not say.
    """

    def __init__(
        self, endpoint: Endpoint, tokenizer: Any, name: str, *, max_prompt_tokens: int, model: str | None = None,
        ends: frozenset[int] = frozenset(), vocabulary: int = 0,
    ) -> None:  # fmt: skip
        """`model` is the name on the server, by default its first; `ends` are the model's further end tokens, and
        `vocabulary` its size where it is larger than the tokenizer's."""
        self.endpoint, self.name = endpoint, name
        self.format = ChatFormat(tokenizer, max_prompt_tokens)
        self.ends = ends | {tokenizer.eos_token_id}
        self.vocabulary = max(vocabulary, len(tokenizer))
        self.model = model or endpoint.ask("GET", "/v1/models", None, _Models).data[0].id
        self.versions: list[list[int | None]] = []

    @classmethod
    def at(
        cls, address: str, tokenizer: Any, name: str, *, key_env: str, patience_s: float, timeout_s: float,
        **settings: Any,
    ) -> "EndpointModel":  # fmt: skip
        """The server at an address, with its key from the environment."""
        endpoint = Endpoint(address, key=os.environ.get(key_env, ""), patience_s=patience_s, timeout_s=timeout_s)
        try:
            return cls(endpoint, tokenizer, name, **settings)
        except FlywheelError:
            endpoint.close()
            raise

    def sample(
        self,
        prompts: Sequence[tuple[Segment, Segment]],
        *,
        n: int,
        sampling: Sampling,
        seeds: Sequence[int],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Drawn]]:
        """Token ids and log-probabilities of `n` replies to each tokenised prompt, a request for each prompt.

        A log-probability that the server gives as NaN or null is NaN, for importance correction to mask and count.

        Raises:
            SamplerGone: see `Endpoint.ask`.
            FlywheelError: the server refuses, or answers with other replies than asked for.
        """
        one_seed_each(prompts, seeds)
        requests = [
            CompletionRequest(
                model=self.model, prompt=(*head, *rest), n=n, max_tokens=sampling.max_tokens,
                temperature=sampling.temperature, top_p=sampling.top_p, seed=seed % 2**63,
                stop_token_ids=tuple(sorted(self.ends)),
            )
            for (head, rest), seed in zip(prompts, seeds, strict=True)
        ]  # fmt: skip
        results: list[list[Drawn]] = []
        self.versions = list[list[int | None]]()
        for answer, request in zip(self._answers(requests), requests, strict=True):
            results.append(self._replies(answer, request))
            told = answer.weight_version
            self.versions.append([told if isinstance(told, int) else None] * n)
            if on_progress:
                on_progress(len(results), len(requests))
        return results

    def check_temperature(self) -> None:
        """See that log-probabilities are those at the sampling temperature: the same tokens drawn at two temperatures
        have other ones, but where the model is certain.

        Raises:
            FlywheelError: they are those of temperature 1, which is what vLLM gives by default.
        """
        prompt = self.format.prompt([ChatMessage(role="user", content="Hello!")])
        warm, cold = (
            {
                ids[0]: logs[0]
                for ids, logs in self.sample([prompt], n=32, sampling=Sampling(temperature, 1.0, 1), seeds=[1])[0]
            }
            for temperature in (1.0, 0.5)
        )
        both = [(warm[token], cold[token]) for token in warm.keys() & cold.keys()]
        told = [abs(one - other) > _SAME for one, other in both]
        if len(told) > 1 and not any(told) and min(one for one, _ in both) < -0.1:
            raise FlywheelError(
                f"{self.endpoint.address} gives the log-probabilities of temperature 1 whatever the temperature: start "
                "vLLM with --logprobs-mode processed_logprobs."
            )

    def _answers(self, requests: Iterable[CompletionRequest]) -> Iterator[_Completion]:
        """In order. Where one fails, those that have not begun are not asked."""
        with ThreadPoolExecutor(CONCURRENT) as pool:
            asked = [
                pool.submit(self.endpoint.ask, "POST", "/v1/completions", r.model_dump(mode="json"), _Completion)
                for r in requests
            ]
            try:
                for one in asked:
                    yield one.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _replies(self, answer: _Completion, request: CompletionRequest) -> list[Drawn]:
        where, got = self.endpoint.address, sorted(choice.index for choice in answer.choices)
        if got != list(range(request.n)):
            raise FlywheelError(f"{where} gave {len(got)} replies numbered {got}, not the {request.n} asked for.")
        if answer.usage is not None and answer.usage.prompt_tokens != len(request.prompt):
            raise FlywheelError(
                f"{where} read a prompt of {answer.usage.prompt_tokens} tokens, it was sent {len(request.prompt)}: "
                "serve the model with room for rl.max_prompt_tokens + rl.max_tokens."
            )
        return [self._reply(choice, request) for choice in sorted(answer.choices, key=lambda choice: choice.index)]

    def _reply(self, choice: _Choice, request: CompletionRequest) -> Drawn:
        where, logs = self.endpoint.address, choice.logprobs.token_logprobs
        ids = choice.token_ids
        if ids is None:
            named = [_TOKEN.fullmatch(token) for token in choice.logprobs.tokens]
            ids = [int(one[1]) for one in named if one]
            if len(ids) != len(named):
                raise FlywheelError(f"{where} gave the text of tokens, not their ids: it has to know return_token_ids.")
        bad = next((i for i in ids if not 0 <= i < self.vocabulary), None)
        if bad is not None:
            raise FlywheelError(f"{where} drew token {bad}, the model has {self.vocabulary}: it serves another model.")
        if not 0 < len(ids) <= request.max_tokens or len(ids) != len(logs):
            raise FlywheelError(
                f"{where} gave a reply of {len(ids)} tokens with {len(logs)} log-probabilities, not 1 to "
                f"{request.max_tokens} of both."
            )
        values = [math.nan if one is None else one for one in logs]
        above = next((one for one in values if one > _ROUNDING), None)
        if above is not None:
            raise FlywheelError(f"{where} gave a log-probability of {above}, must be <= 0: it gives something else.")
        if not (choice.finish_reason == "length" or ids[-1] in self.ends):
            raise FlywheelError(
                f"{where} ended a reply with {choice.finish_reason!r} after token {ids[-1]}, which is no end token: it "
                "was stopped from outside."
            )
        return ids, [one if math.isnan(one) else min(one, 0.0) for one in values]
