"""The pool of policies that propose replies: the parent, earlier generations, a bigger sibling (PAPER sections 2, 4).

A policy is a model and, perhaps, hints that extend its system prompt (`[[rejection_sampling.pool]]`). Models are
loaded when first asked and one at a time, so a bigger sibling needs its own memory only. A policy that does not exist
yet, as `earlier:1` in the first generation, is left out, and the others share its part.
"""

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from . import ledger
from .addresses import refuse_password
from .annotation.candidates import HINTS, RewritePolicy
from .config import PolicyConfig, RejectionConfig
from .errors import FlywheelError
from .llm.base import ChatModel, Completion, Sampling
from .llm.identity import identity
from .llm.models import base_model_folder
from .records import ChatMessage
from .release import registry
from .serving.endpoint import Endpoint
from .serving.replies import BackendBusy, BackendError, Reply
from .serving.upstream import Upstream
from .workspace import Workspace

COOLING = 0.6
"""Of a policy with hints, unless config says otherwise."""
PATIENCE_S = 60.0
"""How long a server may be away before a policy has failed."""
CONCURRENT = 16
"""Conversations that a server is asked at once."""
_PASSING = frozenset({429, 502, 503, 504})
_FINAL = frozenset({"model_missing", "upstream_key", "upstream_rejected"})


class Known(NamedTuple):
    """The model folders that sources name. `served` were in service before the parent, oldest first."""

    base: str
    served: tuple[Path | None, ...]
    generations: Mapping[int, Path]


def known_models(workspace: Workspace, base: str, number: int) -> Known:
    """The models of a workspace when generation `number` begins; a `served` of None is the base model."""
    serving = [release for release in registry.read(workspace.registry).serving if release.generation < number]
    before = (None, *(workspace.root / release.folder for release in serving[:-1])) if serving else ()
    made = {
        row.generation: workspace.artifacts / row.stages["rl"] / "model"
        for row in ledger.read(workspace.ledger)
        if row.generation < number and "rl" in row.stages
    }
    return Known(base, before, made)


def folder_of(policy: PolicyConfig, known: Known) -> str | Path | None:
    """The folder, `package:NAME` or `parent` that a policy's source names; None where there is no such model yet.

    Raises:
        FlywheelError: the generation has left no model.
    """
    kind, _, number = policy.source.partition(":")
    if policy.source == "base":
        return known.base
    if kind == "earlier":
        if int(number) > len(known.served):
            return None
        return known.served[-int(number)] or known.base
    if kind == "generation":
        found = known.generations.get(int(number))
        if found is None or not (found / "config.json").exists():
            there = ", ".join(str(n) for n in sorted(known.generations)) or "none yet"
            raise FlywheelError(
                f"policy {policy.name!r}: generation {number} has left no model; there are: {there}. "
                "Use `earlier:1`, or take it out of rejection_sampling.pool."
            )
        return found
    return policy.source


def settings(config: RejectionConfig, known: Known) -> RejectionConfig:
    """The stage's settings as part of its identity: sources by content, not by where they lie or answer."""
    sources = []
    for policy in config.pool:
        folder = None if policy.model is not None else folder_of(policy, known)
        if policy.model is not None:
            name = f"server of {policy.model}"
        elif folder is None:
            name = "absent"
        elif folder == "parent":
            name = "parent"  # its identity is part of every stage's
        elif isinstance(folder, Path):
            name = folder.parent.name  # the artifact, whose name is a hash
        else:
            name = identity(folder)
        sources.append(policy.model_copy(update={"source": name}))
    return config.model_copy(update={"pool": tuple(sources)})


class Pool(Mapping[str, ChatModel]):
    """The policies by name, in the order of the configuration. Only the model asked last is kept, beside the parent."""

    def __init__(
        self, policies: Sequence[PolicyConfig], known: Known, parent: Path, open_parent: Callable[[], ChatModel],
        load: Callable[[Path, str], ChatModel],
    ) -> None:  # fmt: skip
        """`load(folder, name)` opens a model folder; `open_parent` gives the one in service, which others use too.

        Raises:
            FlywheelError: a source names no model, or no policy is left.
        """
        self._parent, self._open_parent, self._load = parent, open_parent, load
        remote = [policy for policy in policies if policy.model is not None]
        self._folders = {p.name: folder_of(p, known) for p in policies if p not in remote}
        self.absent = tuple(name for name, folder in self._folders.items() if folder is None)
        self._policies = {p.name: p for p in policies if p.name not in self.absent}
        self._held: tuple[Path, ChatModel] | None = None
        if not self._policies:
            raise FlywheelError(f"no policy of the pool exists yet ({', '.join(self.absent)}): add `parent`.")

    def __getitem__(self, name: str) -> ChatModel:
        policy = self._policies[name]
        model = self._model(policy)
        if policy.coached or policy.hints:
            cooling = COOLING if policy.cooling is None else policy.cooling
            return RewritePolicy(model, policy.hints or HINTS, cooling)
        return model if policy.cooling is None else _Cooled(model, policy.cooling)

    def __iter__(self) -> Iterator[str]:
        return iter(self._policies)

    def __len__(self) -> int:
        return len(self._policies)

    def _model(self, policy: PolicyConfig) -> ChatModel:
        if policy.model is not None:
            return ServedPolicy(policy.source, policy.model, key=os.environ.get(policy.key_env))
        folder = self._folders[policy.name]
        assert folder is not None, "absent policies are left out"
        if folder == "parent":
            return self._open_parent()
        path = folder if isinstance(folder, Path) else base_model_folder(folder)
        if path == self._parent:
            return self._open_parent()
        if self._held is None or self._held[0] != path:
            self._held = None  # its memory goes first
            self._held = (path, self._load(path, policy.name))
        return self._held[1]


class _Cooled:
    """A model that writes with more care: its temperature times a factor."""

    def __init__(self, model: ChatModel, cooling: float) -> None:
        self.model, self.cooling, self.name = model, cooling, model.name

    def complete(
        self,
        conversations: Sequence[Sequence[ChatMessage]],
        *,
        n: int = 1,
        sampling: Sampling = Sampling(),
        seeds: Sequence[int],
    ) -> list[list[Completion]]:
        cooled = replace(sampling, temperature=self.cooling * sampling.temperature)
        return self.model.complete(conversations, n=n, sampling=cooled, seeds=seeds)


class ServedPolicy:
    """A chat model on an OpenAI-compatible server (`ChatModel` Protocol): a bigger sibling, as a policy of the pool.

    A server tells neither token ids nor, for several drafts, their number: both are empty. What its own filter
    withholds is an empty reply. Seeds are passed on; whether they repeat a reply is the server's affair.
    """

    def __init__(
        self, address: str, model: str, *, key: str | None = None, patience_s: float = PATIENCE_S,
        timeout_s: float = 600.0, concurrent: int = CONCURRENT,
    ) -> None:  # fmt: skip
        """Raises FlywheelError where `address` is no http address or holds a password, or the key cannot be sent."""
        refuse_password(address, "a policy's source", "that its key_env names")
        self.name, self.address = model, address
        self._key, self._patience_s, self._timeout_s, self._concurrent = key, patience_s, timeout_s, concurrent
        try:
            Upstream(address, key=key)  # refuses a wrong address before any work
        except FlywheelError as error:
            raise FlywheelError(_ours(str(error))) from None

    def complete(
        self,
        conversations: Sequence[Sequence[ChatMessage]],
        *,
        n: int = 1,
        sampling: Sampling = Sampling(),
        seeds: Sequence[int],
    ) -> list[list[Completion]]:
        """As `ChatModel.complete`.

        Raises:
            FlywheelError: the server refuses, or is away or too busy for `patience_s`.
        """
        return asyncio.run(self._complete(conversations, n, sampling, seeds))

    async def _complete(
        self, conversations: Sequence[Sequence[ChatMessage]], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        upstream = Upstream(self.address, key=self._key, timeout_s=self._timeout_s)
        endpoint, room = Endpoint(self.name, upstream), asyncio.Semaphore(self._concurrent)

        async def one(conversation: Sequence[ChatMessage], seed: int) -> list[Completion]:
            async with room:
                return [
                    _completion(reply) for reply in await self._patiently(endpoint, conversation, sampling, seed, n)
                ]

        try:
            async with asyncio.TaskGroup() as group:
                asked = [group.create_task(one(c, s)) for c, s in zip(conversations, seeds, strict=True)]
        except* FlywheelError as several:
            raise several.exceptions[0] from None
        finally:
            await upstream.close()
        return [task.result() for task in asked]

    async def _patiently(
        self, endpoint: Endpoint, conversation: Sequence[ChatMessage], sampling: Sampling, seed: int, n: int
    ) -> list[Reply]:
        began, pause = time.monotonic(), 0.25
        while True:
            try:
                return await endpoint.complete(conversation, sampling, seed, n)
            except BackendError as error:
                waited = time.monotonic() - began
                if error.status not in _PASSING or error.code in _FINAL or waited + pause > self._patience_s:
                    raise FlywheelError(f"{self.address}: {_ours(str(error))} Asked for {waited:.0f} s.") from None
                pause = error.retry_after if isinstance(error, BackendBusy) else min(5.0, 2 * pause)
            await asyncio.sleep(pause)


def _completion(reply: Reply) -> Completion:
    if reply.finish == "error":  # withheld by the server's filter
        return Completion("", (), (), "stop")
    return Completion(reply.text.strip(), (), (), "length" if reply.finish == "length" else "stop")


def _ours(message: str) -> str:
    """The chat service's message about its own server, with the names of the pool's settings."""
    for theirs, ours in (("server.endpoint_key_env", "key_env"), ("server.endpoint_model", "model"),
                         ("server.endpoint", "source")):  # fmt: skip
        message = message.replace(theirs, ours)
    return message
