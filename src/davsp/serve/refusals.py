"""What is refused, in OpenAI's error shape."""

from starlette.responses import JSONResponse

LONGEST = 1000  # letters of a message, which may quote the client


class Refusal(Exception):
    """A request that gets no answer; nothing of it was sent on, or what came back is no answer.

    Args:
        status: HTTP status, 4xx or 5xx.
        message: one sentence that names the field and the mend. It goes to the client and nowhere else.
        code: of the kind, in few words; also the label of the metric.
        param: the field of the request.
    """

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(code)  # the message may quote the client, and tracebacks are logged
        self.status, self.message, self.code, self.param = status, message, code, param
        if len(message) > LONGEST:
            self.message, self.param = message[:LONGEST] + "…", param and param[:LONGEST]


def bad(message: str, code: str = "invalid_request", param: str | None = None) -> Refusal:
    """A mistake in the request, status 400."""
    return Refusal(400, message, code, param)


def body(refusal: Refusal) -> dict[str, dict[str, str | None]]:
    """As OpenAI's servers say it."""
    kind = "server_error" if refusal.status >= 500 else "invalid_request_error"
    return {"error": {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}}


def response(refusal: Refusal) -> JSONResponse:
    """The refusal as a reply."""
    headers = {"Retry-After": "1"} if refusal.status == 429 else {}
    if refusal.status == 401:
        headers = {"WWW-Authenticate": "Bearer"}
    return JSONResponse(body(refusal), refusal.status, headers)
