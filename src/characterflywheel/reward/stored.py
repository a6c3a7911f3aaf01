"""Reading back what a reward stage wrote, be it one of another version."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from ..errors import FlywheelError

R = TypeVar("R", bound=BaseModel)


def read(path: Path, record: type[R], what: str) -> R:
    """The JSON record in a file that belongs to `what`.

    Raises:
        FlywheelError: the file is missing, or holds something else than this version writes.
    """
    try:
        return record.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FlywheelError(f"{path.parent} holds no {what}: run the reward stage.") from None
    except ValidationError as error:
        raise of_another_version(path, error) from None


def of_another_version(path: Path, error: Exception) -> FlywheelError:
    """What to say of a file that this version cannot read."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
    else:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
    return FlywheelError(
        f"{path} was written by another version ({why}): use that version, or reward models of a new generation."
    )
