"""What a model is, by its content: new weights under an old name are another model, and make everything new.

Large files are told apart by their size and by samples spread over them, so that tens of gigabytes take a second.
"""

import hashlib
from pathlib import Path

from .models import existing_folder, version

_WHOLE = 16 << 20
_SAMPLES, _SAMPLE = 64, 64 << 10


def identity(spec: str) -> str:
    """`package:NAME==VERSION`, or a folder's name with a hash of its files; where the folder lies does not count.

    Raises:
        FlywheelError: the package is not installed, or the folder is no model's.
    """
    if spec.startswith("package:"):
        return f"{spec}=={version(spec.removeprefix('package:'))}"
    folder = existing_folder(spec)
    running = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        running.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        _add(running, path)
    return f"{folder.resolve().name}-{running.hexdigest()[:12]}"


def _add(running: "hashlib._Hash", path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE:
            running.update(file.read())
            return
        for i in range(_SAMPLES):
            file.seek((size - _SAMPLE) * i // (_SAMPLES - 1))
            running.update(file.read(_SAMPLE))
