"""What a model backend gives the chat service, and how it fails (PAPER section 7, DESIGN section 6).

A backend fails with a `BackendError` only, which carries the status to answer with and a short code to count by. Its
message is fit for the client: the value, the bound, the remedy, never the model server's own words or a key.
"""

from collections.abc import AsyncGenerator, Sequence
from typing import NamedTuple, Protocol

from ..llm.base import Sampling
from ..records import ChatMessage, Finish


class Reply(NamedTuple):
    """A whole reply. Token counts are None where the backend does not count."""

    text: str
    finish: Finish
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Chunk(NamedTuple):
    """A piece of a reply. The last one, and only it, has `finish`; its text may be empty."""

    text: str
    finish: Finish | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class BackendError(Exception):
    """No reply: `status` is 502 (failed), 503 (not there) or 504 (too slow); `code` is one of few words to count by.

    `retry_after` is in seconds, where it can be said. `detail` is for the log only: what the model server said,
    shortened. `blames_backend` is False where the request itself or the wait in the queue was the trouble.
    """

    def __init__(
        self, message: str, *, status: int, code: str, retry_after: float | None = None, detail: str | None = None,
        blames_backend: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.code, self.retry_after, self.detail = status, code, retry_after, detail
        self.blames_backend = blames_backend


class BackendBusy(BackendError):  # noqa: N818 - not a failure
    """Too much waits already: come back after `retry_after` seconds."""

    retry_after: float

    def __init__(
        self, message: str, *, retry_after: float, code: str = "queue_full", detail: str | None = None
    ) -> None:
        super().__init__(message, status=429, code=code, retry_after=retry_after, detail=detail, blames_backend=False)


class Backend(Protocol):
    """A model that answers. Cancelling a call, or closing a stream, stops the writing.

    All raise `BackendError`, and nothing else.
    """

    @property
    def name(self) -> str:
        """The model's name, which goes into every message it writes."""
        ...

    async def complete(self, messages: Sequence[ChatMessage], sampling: Sampling, seed: int, n: int = 1) -> list[Reply]:
        """`n` replies to a conversation."""
        ...

    def stream(self, messages: Sequence[ChatMessage], sampling: Sampling, seed: int) -> AsyncGenerator[Chunk, None]:
        """A reply in pieces, as they are written."""
        ...

    async def ready(self) -> None:
        """Return where the model can answer, loading it if need be; else raise, saying why not."""
        ...

    async def close(self) -> None:
        """Let go of connections and memory."""
        ...
