"""Samplers that load new weights from a folder: vLLM in this process, or a server (PAPER section 4, DESIGN section 9).

vLLM's workers load a folder of weights in place of their own (`reload_weights`); another server is told by a POST. A
folder is there completely or not at all, and the one before is kept until the new one is loaded. In the folder that a
server shares, a run has one of its own and leaves all else alone.
"""

import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...errors import FlywheelError, SamplerGone
from ...llm.endpoint import EndpointModel
from ...llm.token_sampler import Drawn
from ...llm.vllm import VLLMModel
from ...pipeline import write_atomically
from ..parallel import Parallel
from ..sharding import save_whole, whole_weights
from .sampler import Place, Sampler


def write_weights(model: Any, like: Path, target: Path, dtype: torch.dtype, parallel: Parallel) -> None:
    """The learner's weights as a Hugging Face folder with the rest of `like`, there completely or not at all."""
    writing = target.with_name(target.name + ".writing")
    if parallel.main:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        for file in like.iterdir():
            if file.is_file() and ".safetensors" not in file.name:
                shutil.copy(file, writing)
    named = ((name, weight.to(dtype)) for name, weight in whole_weights(model))
    save_whole(named, model, writing, parallel.main)
    if parallel.main:
        shutil.rmtree(target, ignore_errors=True)
        writing.replace(target)


class InProcess(Sampler):
    """vLLM here: its workers reload a folder in place."""

    engine: VLLMModel

    def __init__(self, engine: VLLMModel, kind: str, place: Place, dtype: torch.dtype) -> None:
        super().__init__(engine, kind)
        self._place, self._dtype = place, dtype

    def _load(self, model: Any, version: int) -> None:
        write_weights(model, self._place.folder, self._place.scratch, self._dtype, Parallel.alone())
        self.engine.reload(self._place.scratch)
        self.loaded = version

    def close(self) -> None:
        shutil.rmtree(self._place.scratch, ignore_errors=True)


class Remote(Sampler):
    """A server: weights are written to a folder that it reads too, and it is told to load them.

    Where a reload fails the server goes on with the weights before, `max_stale` times in a row: what it draws is
    counted as stale, and importance correction makes up for it. Then, or if it never had the stage's, it is gone.
    """

    engine: EndpointModel

    def __init__(self, engine: EndpointModel, kind: str, place: Place, dtype: torch.dtype, weights: Path) -> None:
        """Brings the stage's start to the server, by a folder of this run's own in `weights`."""
        super().__init__(engine, kind)
        self._place, self._dtype, self._weights, self._failed = place, dtype, weights / _own_name(place), 0
        self.loaded = -1
        folder = self._target(0)
        if place.parallel.main:
            shutil.rmtree(self._weights, ignore_errors=True)  # what a killed run left
            shutil.copytree(place.folder, folder)
        self._reload(folder, 0)
        engine.check_temperature()

    def _load(self, model: Any, version: int) -> None:
        folder = self._target(version)
        write_weights(model, self._place.folder, folder, self._dtype, self._place.parallel)
        self._reload(folder, version)

    def _target(self, version: int) -> Path:
        return self._weights / f"version-{version:06d}"

    def _reload(self, folder: Path, version: int) -> None:
        """The main process tells the server; all learn how it went."""
        parallel, error = self._place.parallel, list[str]()
        if parallel.main:
            try:
                self._tell(folder.resolve(), version)
            except FlywheelError as failure:
                error.append(str(failure))
        error = parallel.gather(error)
        if not error:
            self.loaded, self._failed = version, 0
            self._drop_others(folder)
            return
        self._failed += 1
        if self.loaded < 0 or self._failed > self._place.config.sampler.max_stale:
            raise SamplerGone(
                f"the sampler could not load the weights of version {version} ({self._failed} in a row, at most "
                f"rl.sampler.max_stale == {self._place.config.sampler.max_stale} may fail): {error[0]}"
            )

    def _tell(self, folder: Path, version: int) -> None:
        how, endpoint = self._place.config.sampler.reload, self.engine.endpoint
        if how == "vllm":
            call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            endpoint.tried("POST", "/collective_rpc", call)
            endpoint.tried("POST", "/reset_prefix_cache", None)
        else:
            endpoint.tried("POST", how, {"path": str(folder), "version": version})

    def _drop_others(self, folder: Path) -> None:
        if self._place.parallel.main:
            for other in self._weights.iterdir():
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)

    def _versions(self, drawn: Sequence[Sequence[Drawn]]) -> list[list[int]]:
        """What the server says drew each reply, if it was told the version, else what it last said it had loaded."""
        if self._place.config.sampler.reload == "vllm":
            return super()._versions(drawn)
        return [[self.loaded if told is None else told for told in several] for several in self.engine.versions]

    def close(self) -> None:
        self.engine.endpoint.close()
        if self._place.parallel.main:
            shutil.rmtree(self._weights, ignore_errors=True)
            shutil.rmtree(self._place.scratch, ignore_errors=True)


def _own_name(place: Place) -> str:
    """Of a folder that no other run uses, also not one of the same stage on another machine; kept over a kill."""
    names = list[str]()
    if place.parallel.main:
        kept = place.scratch / "own-folder"
        if not kept.exists():
            place.scratch.mkdir(parents=True, exist_ok=True)
            write_atomically(kept, f"flywheel-{secrets.token_hex(8)}")
        names.append(kept.read_text(encoding="utf-8"))
    return place.parallel.gather(names)[0]
