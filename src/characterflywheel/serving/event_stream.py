"""Server-sent events from a generator: an error before the first one is an ordinary answer, and leaving closes it."""

from collections.abc import AsyncGenerator

import anyio
from starlette.responses import StreamingResponse
from starlette.types import Send

from .errors import ApiError


class EventStream(StreamingResponse):
    """Streams `events`. All of the generator runs in one task, its closing too, when the client has left."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.events = events

    async def stream_response(self, send: Send) -> None:
        try:
            try:
                first = await anext(self.events)
            except ApiError as error:
                answer = error.response()
                await send({"type": "http.response.start", "status": error.status, "headers": answer.raw_headers})
                await send({"type": "http.response.body", "body": answer.body, "more_body": False})
                return
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": first, "more_body": True})
            async for event in self.events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            with anyio.CancelScope(shield=True):
                await self.events.aclose()
