"""Who writes the replies: the models a chat service can serve, by name, each behind a guard (PAPER sections 7 and 8).

`config.server.backend` says how: `native` runs the models of the workspace in this process, `endpoint` asks an
OpenAI-compatible server, `echo` needs no model. The model in service is the registry's; the models of experiments are
found by name in registry and ledger. Nothing is imported or loaded before it is needed.
"""

import asyncio
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import ledger
from ..config import FlywheelConfig
from ..errors import FlywheelError
from ..llm.base import ChatModel
from ..release import registry
from ..workspace import Workspace
from .guard import Counters, Guarded, Served
from .replies import Backend, BackendBusy, BackendError, Chunk, Reply

if TYPE_CHECKING:
    from .local import Worker
    from .upstream import Upstream

__all__ = [
    "Backend", "BackendBusy", "BackendError", "Backends", "Chunk", "Counters", "Guarded", "Reply", "Served",
    "make_backends",
]  # fmt: skip

BASE = "base"
"""The base model's name in messages, as a generation gives it."""


class _Known(NamedTuple):
    """What registry and ledger say: the model in service, and each model's folder (None: the configured base model)."""

    default: str
    folders: dict[str, Path | None]


class Backends:
    """The models of a chat service by name. For one event loop; `make_backends` makes one."""

    def __init__(
        self, workspace: Workspace, config: FlywheelConfig, on_served: Callable[[Served], None] | None = None
    ) -> None:
        self._workspace, self._config, self._on_served = workspace, config, on_served
        self._open: dict[str, Guarded] = {}
        self._upstream: Upstream | None = None
        self._worker: Worker | None = None
        self._known, self._stamp = _known(workspace, config), _stamp(workspace)

    @property
    def default(self) -> str:
        """The name of the model in service."""
        return self._known.default

    @property
    def names(self) -> tuple[str, ...]:
        """The names an arm can be given. An endpoint may know more, under which it is asked as they are."""
        return tuple(dict.fromkeys((*self._known.folders, *self._open)))

    def opened(self) -> tuple[Guarded, ...]:
        """The models that have been asked for since the start or the last `refresh`."""
        return tuple(self._open.values())

    def get(self, name: str) -> Guarded:
        """The model of this name, the same object each time; it is loaded when first asked.

        Raises:
            BackendError: 503, neither registry nor ledger know it.
        """
        if (found := self._open.get(name)) is None:
            found = self._open[name] = self._make(name)
        return found

    async def refresh(self, in_use: Collection[str] | None = None) -> None:
        """Look whether another model was put in service; it is ready before it takes over.

        Costs two file stamps where nothing has changed. With `in_use`, the models of running experiments, models that
        are neither those nor in service are let go once they have answered.

        Raises:
            BackendError: the new model cannot answer, or the registry cannot be read; the one before goes on serving,
                and the next call tries again.
        """
        stamp = _stamp(self._workspace)
        if stamp != self._stamp:
            before = self._known
            after = await asyncio.to_thread(self._read)
            moved = {name for name in self._open if after.folders.get(name) != before.folders.get(name)}
            self._known = after._replace(default=before.default)
            new, present = after.default, self._open.get(after.default)
            coming = self._make(new) if present is None or new in moved else present
            await coming.ready()
            self._open[new] = coming
            if present is not None and present is not coming:
                await present.close()
            self._known, self._stamp = after, stamp
            await self._let_go(moved - {new})
        if in_use is not None:
            await self._let_go(set(self._open) - {self.default, *in_use})

    async def close(self) -> None:
        """Let go of every model and connection."""
        while self._open:
            await self._open.popitem()[1].close()
        if self._upstream:
            await self._upstream.close()
        if self._worker:
            await asyncio.to_thread(self._worker.stop)

    def _read(self) -> _Known:
        try:
            return _known(self._workspace, self._config)
        except FlywheelError as error:
            raise BackendError(str(error), status=503, code="registry", blames_backend=False) from error

    async def _let_go(self, names: Collection[str]) -> None:
        for name in names:
            await self._open.pop(name).close()

    def _make(self, name: str) -> Guarded:
        return Guarded(self._backend(name), self._config.server, on_served=self._on_served)

    def _backend(self, name: str) -> Backend:
        server = self._config.server
        if server.backend == "echo":
            from .echo import Echo  # noqa: PLC0415

            return Echo(name)
        if server.backend == "endpoint":
            from .endpoint import Endpoint  # noqa: PLC0415
            from .upstream import Upstream  # noqa: PLC0415

            self._upstream = self._upstream or Upstream.from_config(server)
            return Endpoint(name, self._upstream)
        if name not in self._known.folders:  # perhaps an experiment offered it since the last look
            self._known = self._known._replace(folders=self._read().folders)
        if name not in self._known.folders:
            raise BackendError(
                f"model {name!r} is in neither registry nor ledger; there are {', '.join(self._known.folders)}: "
                "stop the experiment that names it, or restore the workspace's files.",
                status=503, code="model_unknown", blames_backend=False,
            )  # fmt: skip
        from .local import Local, Worker  # noqa: PLC0415

        self._worker = self._worker or Worker()
        folder = self._known.folders[name]
        return Local(name, lambda: _load(name, folder, self._config), self._worker)


def make_backends(
    workspace: Workspace, config: FlywheelConfig, on_served: Callable[[Served], None] | None = None
) -> Backends:
    """The models that `workspace` can serve; nothing is loaded yet. `on_served` hears of each request as it ends.

    Raises:
        FlywheelError: the registry or the ledger cannot be read, or an endpoint is wanted and none is named.
    """
    if config.server.backend == "endpoint" and not config.server.endpoint:
        raise FlywheelError(
            'server.backend = "endpoint" needs server.endpoint, the base address of an OpenAI-compatible server, '
            'e.g. endpoint = "http://HOST:8000/v1".'
        )
    return Backends(workspace, config, on_served)


def _known(workspace: Workspace, config: FlywheelConfig) -> _Known:
    server = config.server
    if server.backend == "echo":
        return _Known("echo", {"echo": None})
    if server.backend == "endpoint" and server.endpoint_model:
        return _Known(server.endpoint_model, {server.endpoint_model: None})
    history = registry.read(workspace.registry)
    folders: dict[str, Path | None] = {BASE: None}
    for row in ledger.read(workspace.ledger):
        if "rl" in row.stages:
            folders[row.model] = workspace.artifacts / row.stages["rl"] / "model"
    for step in history.history:
        if step.release:
            folders[step.release.model] = workspace.root / step.release.folder
    return _Known(history.in_service.model if history.in_service else BASE, folders)


def _load(name: str, folder: Path | None, config: FlywheelConfig) -> ChatModel:
    """Read a model from disk, for a thread.

    Raises:
        BackendError: 503, its folder is gone.
    """
    if folder is not None and not (folder / "config.json").exists():
        raise BackendError(
            f"model {name!r} is gone from {folder.parent.name}/{folder.name}: restore the folder, make it again with "
            "`flywheel run`, or put the model before it in service with `flywheel rollback`.",
            status=503, code="model_missing", blames_backend=False,
        )  # fmt: skip
    from ..llm.models import base_model_folder  # noqa: PLC0415

    settings: dict[str, Any] = {
        "max_prompt_tokens": config.server.max_prompt_tokens, "threads": config.models.threads,
        "batch_replies": config.models.batch_replies,
    }  # fmt: skip
    where = folder or base_model_folder(config.models.base)
    if config.models.backend == "ctranslate2":
        from ..llm.ct2 import CTranslate2Model  # noqa: PLC0415

        return CTranslate2Model.load(where, name, device=config.models.device, **settings)
    from ..llm.native import NativeModel  # noqa: PLC0415

    return NativeModel.load(where, name, device=config.models.device, **settings)


def _stamp(workspace: Workspace) -> tuple[tuple[int, int] | None, ...]:
    """When registry and ledger were last written, and their sizes."""

    def of(path: Path) -> tuple[int, int] | None:
        try:
            found = path.stat()
        except FileNotFoundError:
            return None
        return found.st_mtime_ns, found.st_size

    return of(workspace.registry), of(workspace.ledger)
