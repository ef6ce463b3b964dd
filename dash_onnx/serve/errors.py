"""Errors in OpenAI's form, and the status of each refusal."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from starlette.responses import JSONResponse

from dash_onnx.core.errors import BundleError, ContextLengthError, DashError, DeviceError
from dash_onnx.serve.limits import BusyError

_CLOSED = 499  # status of a client that disconnected, in logs and metrics
_OUTCOMES = {200: "done", 429: "busy", 500: "error", 504: "timeout", _CLOSED: "closed", 0: "closed"}
_RETRY_S = 2  # Retry-After for a client refused due to load


class APIError(Exception):
    """An error as OpenAI's clients expect it.

    Attributes:
        status: HTTP status.
        message: message for the user.
        code: error code for programs.
        param: the field of the body at fault, if any.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        headers: Mapping[str, str] | None = None,
        *,
        param: str | None = None,
    ):
        """Takes the attributes, and headers of the response."""
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self._headers = dict(headers or {})
        if code in ("busy", "shutting_down"):
            self._headers["Retry-After"] = str(_RETRY_S)

    @classmethod
    def defect(cls, name: str) -> APIError:
        """An error for a bug in the server, during the named request."""
        return cls(500, f"an error of the server; see request {name} in its log", "internal_error")

    @classmethod
    def gone(cls) -> APIError:
        """An error for a client that disconnected."""
        return cls(_CLOSED, "the client went away", "closed")

    def body(self) -> dict[str, Any]:
        """The JSON body of the response."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The HTTP response."""
        return JSONResponse(self.body(), self.status, self._headers)


def outcome_of(status: int) -> str:
    """Outcome of a request as counted in metrics, by its HTTP status; 0 if none was sent."""
    return _OUTCOMES.get(status, "refused")


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Context manager that turns refusals into `APIError`."""
    try:
        yield
    except TimeoutError as error:
        raise APIError(504, str(error), "timeout") from None
    except BusyError as error:
        raise APIError(429, str(error), "busy") from None
    except (BundleError, DeviceError) as error:  # nothing that a client could fix
        raise APIError(503, str(error), "unavailable") from None
    except ContextLengthError as error:
        raise APIError(400, str(error), "context_length_exceeded") from None
    except DashError as error:
        named = re.match(r"(\w+)(?:: |=)", str(error))  # the field, as in `top_p=2 is not allowed`
        raise APIError(400, str(error), "invalid_value", param=named and named[1]) from None
