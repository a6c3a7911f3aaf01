"""Who draws RL's rollouts, and how the learner's weights reach it after each step (PAPER section 4, DESIGN section 6).

| kind | draws with | new weights |
| --- | --- | --- |
| native | ours, in the precision that decodes fastest | copied in memory |
| transformers | `generate`, on any device | copied in memory |
| ctranslate2 | int8 on a CPU | converted, in a folder of which the newest is kept |
| vllm | vLLM in this process | written to a folder, reloaded by its workers |
| endpoint | a server with vLLM's API | written to a folder that it reads too, then it is told |

Whatever draws, log-probabilities are those of the weights that drew, so that importance correction can make up for
their precision and age. Several processes have a sampler each; the endpoint's weights are written by the main one.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...config import RLConfig
from ...errors import FlywheelError, SamplerGone
from ...llm import ct2
from ...llm.base import Sampling
from ...llm.endpoint import EndpointModel
from ...llm.generate import TransformersModel
from ...llm.native import NativeModel, fast_dtype, load_model
from ...llm.shared_prefix import Segment
from ...llm.token_sampler import Drawn
from ...llm.vllm import VLLMModel
from ..parallel import Parallel
from ..sharding import whole_weights
from .reloading import InProcess, Remote
from .sampler import Place, RolloutSampler, Sampler

__all__ = ["OPENERS", "RolloutSampler", "SamplerGone", "open_sampler"]


class InMemory(Sampler):
    """A torch model of our own: weights are copied, rounded to its precision, and let go while it rests."""

    engine: NativeModel | TransformersModel
    resting = False

    def sample(
        self, prompts: Sequence[tuple[Segment, Segment]], *, n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Drawn]]:
        if self.resting:
            raise FlywheelError("the sampler has let its weights go: push the learner's first.")
        return super().sample(prompts, n=n, sampling=sampling, seeds=seeds)

    def rest(self) -> None:
        for parameter in self.engine.model.parameters():
            parameter.data = parameter.data.new_empty(0)
        self.resting = True

    @torch.no_grad()
    def _load(self, model: Any, version: int) -> None:
        own = dict(self.engine.model.named_parameters())
        for name, weight in whole_weights(model):
            mine = own.pop(name)
            if self.resting:
                mine.data = mine.data.new_empty(weight.shape)
            mine.copy_(weight)
        if own:
            raise FlywheelError(f"the learner has no weights {', '.join(sorted(own)[:3])}: it is another model.")
        self.loaded, self.resting = version, False


class Converted(Sampler):
    """CTranslate2: weights are converted into a folder, in place of those before."""

    engine: ct2.CTranslate2Model

    def __init__(self, engine: ct2.CTranslate2Model, kind: str, folder: Path, scratch: Path) -> None:
        super().__init__(engine, kind)
        self._folder, self._scratch = folder, scratch

    @torch.no_grad()
    def _load(self, model: Any, version: int) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self._folder), dtype=torch.float32)
        weights = {name: weight.float().cpu().clone() for name, weight in whole_weights(model)}
        plain.load_state_dict(weights, strict=False, assign=True)
        plain.tie_weights()
        missing = [name for name, weight in plain.named_parameters() if weight.is_meta]
        if missing:
            raise FlywheelError(f"the learner has no weights {', '.join(missing[:3])}: it is another model.")
        ct2.convert(self._folder, self._scratch, self.engine.precision, plain)
        self.loaded = version

    def close(self) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)


def open_sampler(
    config: RLConfig, folder: Path, tokenizer: Any, *, scratch: Path, threads: int, batch_replies: int,
    device: str = "cpu", parallel: Parallel = Parallel.alone(),
) -> RolloutSampler:  # fmt: skip
    """The sampler that `config.sampler` names, with the weights of `folder`, the stage's start.

    `scratch` is a folder of its own for new weights, wiped at `close`.

    Raises:
        FlywheelError: its package is missing, or it does not run here.
        SamplerGone: the server cannot be reached, or cannot load the weights.
    """
    own = scratch / f"process-{parallel.rank}"
    return OPENERS[config.sampler.kind](
        Place(config, folder, tokenizer, device, threads, batch_replies, own, parallel)
    )  # fmt: skip


def _native(place: Place) -> Sampler:
    model, _ = load_model(place.folder, place.dtype(fast_dtype(place.device)), place.device)
    return InMemory(NativeModel(model, place.tokenizer, "rl", keeps_copy=False, **place.room), "native")


def _transformers(place: Place) -> Sampler:
    automatic = torch.float32 if place.device == "cpu" else torch.bfloat16
    model, _ = load_model(place.folder, place.dtype(automatic), place.device)
    return InMemory(TransformersModel(model, place.tokenizer, "rl", **place.room), "transformers")


def _ctranslate2(place: Place) -> Sampler:
    precision: ct2.Precision = "float32" if place.config.sampler.precision == "float32" else "int8"
    if place.device != "cpu":
        raise FlywheelError(f'sampler "ctranslate2" runs on "cpu", not {place.device!r}: set rl.sampler to "native".')
    ct2.convert(place.folder, place.scratch, precision)  # not by the cache, which keeps what it converts
    engine = ct2.CTranslate2Model(
        place.scratch, place.tokenizer, "rl", precision=precision,
        ends=ct2.end_tokens(place.folder), **place.room,
    )  # fmt: skip
    return Converted(engine, "ctranslate2", place.folder, place.scratch)


def _vllm(place: Place) -> Sampler:
    config, dtype = place.config, place.dtype(torch.bfloat16)
    engine = VLLMModel.load(
        place.folder, place.tokenizer, "rl", max_prompt_tokens=config.max_prompt_tokens, max_tokens=config.max_tokens,
        ends=ct2.end_tokens(place.folder), dtype=str(dtype).removeprefix("torch."),
        memory_share=config.sampler.memory_share,
    )  # fmt: skip
    return InProcess(engine, "vllm", place, dtype)


def _endpoint(place: Place) -> Sampler:
    config, here = place.config, place.config.sampler
    assert here.address is not None, "the configuration has seen to it"
    assert here.weights_folder is not None, "as above"
    vocabulary = json.loads((place.folder / "config.json").read_text(encoding="utf-8")).get("vocab_size", 0)
    engine = EndpointModel.at(
        here.address, place.tokenizer, "rl", key_env=here.key_env, patience_s=here.patience_s,
        timeout_s=here.timeout_s, max_prompt_tokens=config.max_prompt_tokens, model=here.model,
        ends=ct2.end_tokens(place.folder), vocabulary=vocabulary,
    )  # fmt: skip
    try:
        return Remote(engine, "endpoint", place, place.dtype(torch.bfloat16), Path(here.weights_folder))
    except FlywheelError:
        engine.endpoint.close()
        raise


OPENERS: Mapping[str, Callable[[Place], Sampler]] = {
    "native": _native, "transformers": _transformers, "ctranslate2": _ctranslate2, "vllm": _vllm,
    "endpoint": _endpoint,
}  # fmt: skip
