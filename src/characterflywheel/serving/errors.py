"""What the chat service answers when it cannot do what was asked: OpenAI-shaped errors (DESIGN section 10)."""

import logging
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.exceptions import HTTPException

from ..cards import PromptTooLongError
from ..errors import FlywheelError
from ..records import Record
from ..store.database import StoreUnavailable

_log = logging.getLogger(__name__)
_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 409: "conflict_error", 413: "invalid_request_error", 415: "invalid_request_error",
    422: "invalid_request_error", 429: "rate_limit_error",
}  # fmt: skip


class ErrorDetail(Record):
    """What went wrong, in the shape that OpenAI's clients read."""

    message: str
    type: str
    code: str | None = None
    param: str | None = None


class ErrorBody(Record):
    """The body of every answer with a status of 400 and above."""

    error: ErrorDetail = Field(...)


class ApiError(Exception):
    """An answer other than success: status, a code for programs, a sentence for people."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = dict(headers or {})

    def body(self) -> ErrorBody:
        kind = _TYPES.get(self.status, "server_error")
        return ErrorBody(error=ErrorDetail(message=self.message, type=kind, code=self.code, param=self.param))

    def response(self) -> JSONResponse:
        return JSONResponse(self.body().model_dump(), self.status, self.headers)


def not_found(what: str, id: str, param: str | None = None) -> ApiError:
    """What does not exist and what belongs to somebody else look the same from outside."""
    return ApiError(404, f"{what}_not_found", f"There is no {what} {id!r}.", param)


def store_away(error: Exception) -> ApiError:
    """503: what is wrong with the store, and where it is, is for the log only."""
    _log.error("the store does not answer: %s", error or type(error).__name__)
    return ApiError(503, "store_unavailable", "The store does not answer; try again.", headers={"Retry-After": "2"})


def add_handlers(app: FastAPI) -> None:
    """Give every error that can leave a route the same shape."""

    async def api_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.response()

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        message = f"{where or 'body'}: {first['msg']}"
        return ApiError(422, "invalid_request", message, where or None).response()

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        return ApiError(error.status_code, code, str(error.detail), headers=error.headers).response()

    async def remedy(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, StoreUnavailable):
            return store_away(error).response()
        code = "context_length_exceeded" if isinstance(error, PromptTooLongError) else "invalid_request"
        return ApiError(400, code, str(error)).response()

    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        return ApiError(500, "internal_error", "Something went wrong here; the log says what.").response()

    app.add_exception_handler(Exception, unforeseen)
    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(FlywheelError, remedy)
