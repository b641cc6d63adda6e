"""What goes wrong, in the words and the JSON of OpenAI's API: `{"error": {"message", "type", "param", "code"}}`."""

from typing import Any


class ApiError(Exception):
    """An answer that is an error. status: of HTTP; code: a word for programs; param: the field that is wrong."""

    def __init__(self, status: int, code: str, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, *, param: str | None = None) -> ApiError:
    """400: the request cannot be done as it stands."""
    return ApiError(400, "invalid_value", message, param=param)
