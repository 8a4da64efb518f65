"""Refusals as OpenAI clients expect them: a status and an error object, never a stack trace."""

from __future__ import annotations

import math
import reprlib

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from protocol.errors import FaultCode, LinkLost, SessionFault, WireError

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlist = _SHORT.maxdict = _SHORT.maxlevel = 3


def shown(value: object) -> str:
    """What a peer sent, short enough for a message."""
    return _SHORT.repr(value)


class ApiError(HTTPException):
    """A refusal as an HTTP status and an OpenAI error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ):
        super().__init__(status, message)
        self.status, self.param, self.code = status, param, code
        self.message = message.encode(errors="backslashreplace").decode()  # JSON can hold no lone surrogate
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, object]:
        kinds = {
            400: "invalid_request_error",
            401: "authentication_error",
            403: "permission_error",
            404: "not_found_error",
            429: "rate_limit_error",
        }
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {"www-authenticate": "Bearer"} if self.status == 401 else {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        return JSONResponse(self.body(), self.status, headers)


_STATUS = {
    FaultCode.BAD_FRAME: 400,
    FaultCode.BAD_REQUEST: 400,
    FaultCode.CONTEXT_LENGTH_EXCEEDED: 400,
    FaultCode.UNAUTHENTICATED: 401,
    FaultCode.QUOTA: 429,
    FaultCode.BUSY: 503,
    FaultCode.DRAINING: 503,
}


def as_api_error(error: WireError) -> ApiError:
    """A session's end as the HTTP client should hear it."""
    if isinstance(error, SessionFault):
        status = _STATUS.get(error.code, 502)
        wait = error.retry_after_s or (1.0 if status == 503 else None)
        return ApiError(status, error.message, code=error.code.name.lower(), retry_after_s=wait)
    return ApiError(503, str(error), code="link_lost" if isinstance(error, LinkLost) else None, retry_after_s=1)


class ErrorObject(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every refusal."""

    error: ErrorObject


def as_error(error: Exception) -> ApiError:
    """Whatever was raised, as the client should hear it."""
    match error:
        case ApiError():
            return error
        case WireError():
            return as_api_error(error)
        case RequestValidationError():
            return _invalid(error)
        case HTTPException():
            return ApiError(error.status_code, str(error.detail))
    return ApiError(500, "internal error", code="internal")


def _invalid(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong, with the field's name and value."""
    first = error.errors()[0]
    value, message = first.get("input"), str(first["msg"]).removeprefix("Value error, ")
    if isinstance(value, bytes):
        return ApiError(400, "the content type must be application/json", code="invalid_content_type")
    place = [str(part) for part in first["loc"][1:] if not str(part).startswith("<")]
    if first["type"] != "missing":
        message += f" (got {shown(value)})"
    param = ".".join(place)[:100]
    return ApiError(400, f"{param or 'the body'}: {message}", param=param or None, code="invalid_value")
